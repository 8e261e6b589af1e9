"""Bridges to other libraries. Each module here is imported on first use, and imports its library
lazily if at all.
"""
