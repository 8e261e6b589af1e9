"""The ops themselves, `torch.ops.rmsnorm_cuda`, with types (ops.pyi): what compiled graphs,
policies and C++ see.

Their names are API; the functions of the package check and choose before they call them. An
overload by its name, such as rms_norm.default, is typed as torch types it: take it from
`torch.ops.rmsnorm_cuda`.
"""

from __future__ import annotations

import torch

from . import _C  # noqa: F401  (it registers them)


def __getattr__(name: str):
    return getattr(torch.ops.rmsnorm_cuda, name)


def __dir__():
    names = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    return sorted({name for namespace, _, name in names if namespace == "rmsnorm_cuda"})
