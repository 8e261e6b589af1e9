"""Where one process imports this package twice: notebooks, autoreload, test runners that forget
modules, an import that Ctrl-C ended.

There are two of each Python object then, and one torch. So what torch keeps is registered where it
is missing, and a class is known by its name.
"""

import torch


def has_kernel(op: str, key: str) -> bool:
    """Whether torch has one of ours for this dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"rmsnorm_cuda::{op}", key)


def op_names() -> list[str]:
    """The ops with kernels: "rmsnorm_cuda::rms_norm", "rmsnorm_cuda::rms_norm.out", ..."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n for n in names if n.startswith("rmsnorm_cuda::") and not n.endswith("_formula"))


def same(one: type, other: type) -> bool:
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def is_a(thing: object, cls: type) -> bool:
    """isinstance(), also of what an earlier import made."""
    return any(same(base, cls) for base in type(thing).__mro__)
