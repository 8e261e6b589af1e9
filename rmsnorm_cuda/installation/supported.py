"""What is supported: setup.py, the loader, the wheels, the tests and the pages read it here."""

PYTHONS = "3.10", "3.11", "3.12", "3.13", "3.14", "3.14t", "3.15"  # t: free-threaded

# A wheel carries the layers for each of these minor versions, and their sources for any other.
TORCHES = "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"

# No upper bound, or pip would replace a newer torch. a0 keeps a container's 2.11.0a0+... too.
TORCH = f"torch>={TORCHES[0]}a0"
PYTHON = f">={PYTHONS[0]}"
