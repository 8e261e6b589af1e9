"""The ops themselves, `torch.ops.rmsnorm_cuda`, with types (ops.pyi): what compiled graphs, policies and C++ see.

Their names are API; the functions of the package check and choose before they call them.
"""

from __future__ import annotations

import torch

from . import _C  # noqa: F401  (it registers them)


def __getattr__(name: str):
    return getattr(torch.ops.rmsnorm_cuda, name)
