"""Arguments of the public functions that the eager entry points leave alone: not of the plainest
types.

Numbers of numpy stand for Python's. An object of the wrong kind is a TypeError that names the
argument; torch.ops would name its schema.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_NUMBERS = (Tensor, torch.SymFloat, torch.SymInt)  # which torch takes for numbers itself


def _tensor(value):
    return value if hasattr(value, "__torch_function__") else NotImplemented


def _number(value):
    if isinstance(value, _NUMBERS) or type(value) in (float, int):
        return value
    return float(value) if isinstance(value, numbers.Real) else NotImplemented


def _integer(value):
    if isinstance(value, torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return NotImplemented


def _flag(value):
    is_flag = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    return bool(value) if is_flag else NotImplemented


def _dtype(value):
    return value if isinstance(value, torch.dtype) else NotImplemented


def _shape(value):
    if isinstance(value, Sequence) and not isinstance(value, str):
        sizes = tuple(map(_integer, value))
    else:
        sizes = (NotImplemented if _flag(value) is not NotImplemented else _integer(value),)
    return NotImplemented if NotImplemented in sizes else sizes


# By name: what is expected, whether it may be None, and the value as torch.ops takes it.
_KINDS: dict[str, tuple[str, bool, Callable]] = {
    "input": ("a Tensor", False, _tensor),
    "residual": ("a Tensor", False, _tensor),
    "weight": ("a Tensor", True, _tensor),
    "scale": ("a Tensor", True, _tensor),
    "out": ("a Tensor", True, _tensor),
    "normalized_shape": ("an int or a tuple of ints", False, _shape),
    "eps": ("a number", True, _number),
    "scale_ub": ("a number", True, _number),
    "weight_offset": ("a number", False, _number),
    "block": ("an int", True, _integer),
    "cast_before_weight": ("a bool", False, _flag),
    "column_major": ("a bool", False, _flag),
    "return_norm": ("a bool", False, _flag),
    "dtype": ("a torch.dtype", False, _dtype),
}


def checked(op: str, **arguments) -> tuple:
    """The arguments, which have the names of `op`'s, as torch.ops takes them.

    Raises:
        TypeError: one is of the wrong kind.
    """
    values = []
    for name, given in arguments.items():
        expected, optional, convert = _KINDS[name]
        value = given if given is None and optional else convert(given)
        if value is NotImplemented:
            expected += " or None" if optional else ""
            got = type(given).__name__
            raise TypeError(f"{op}: expected {name} to be {expected}, but got {got}")
        values.append(value)
    return tuple(values)


def check_out(op: str, out: object, count: int) -> None:
    """That `out` is as many tensors as the function returns."""
    if not isinstance(out, tuple | list):
        got = type(out).__name__
        raise TypeError(f"{op}: expected out to be a tuple of {count} tensors, but got {got}")
    if len(out) != count:
        raise ValueError(f"{op}: expected out to hold {count} tensors, but got {len(out)}")


def is_overridden(input: object, *others: object) -> bool:
    """Whether a __torch_function__ takes the call. Not that of nested tensors, which knows
    F.rms_norm alone: they have these ops (integrations/jagged.py)."""
    if not has_torch_function((input, *others)):
        return False
    if torch._C._is_torch_function_mode_enabled() or not isinstance(input, Tensor):
        return True
    with torch._C.DisableTorchFunctionSubclass():
        return not input.is_nested


def override(function: Callable, input, normalized_shape, weight, eps, **options):
    """Hands the call to the __torch_function__ as F.rms_norm would: with the options, which are
    ours alone, only where they are not at their defaults."""
    given = {
        name: value
        for name, value in options.items()
        if not (value is None or (isinstance(value, bool | int | float) and value == 0))
    }
    tensors = input, weight, options["out"]
    return handle_torch_function(
        function, tensors, input, normalized_shape, weight=weight, eps=eps, **given
    )
