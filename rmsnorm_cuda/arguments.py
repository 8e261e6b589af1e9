"""Checks and converts the arguments that the eager entry points in C++ do not take.

Numbers of numpy stand for Python's. An object of the wrong kind is a TypeError that names the
argument; torch.ops would name its schema.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_NUMBERS = (Tensor, torch.SymFloat, torch.SymInt)  # which torch takes for numbers itself


def _converted(value, expected):
    """The value as torch.ops takes it; NotImplemented if it is not what is expected."""
    is_flag = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    match expected:
        case "a Tensor" if hasattr(value, "__torch_function__"):
            return value
        case "a torch.dtype" if isinstance(value, torch.dtype):
            return value
        case "a bool" if is_flag:
            return bool(value)
        case "a number" if isinstance(value, _NUMBERS) or type(value) in (float, int):
            return value
        case "a number" if isinstance(value, numbers.Real):
            return float(value)
        case "a str" if isinstance(value, str):
            return value
        case "an int" if isinstance(value, torch.SymInt):
            return value
        case "an int":
            with contextlib.suppress(TypeError):
                return operator.index(value)
        case "an int or a tuple of ints" if not is_flag and not isinstance(value, str):
            sizes = value if isinstance(value, Sequence) else (value,)
            sizes = tuple(_converted(size, "an int") for size in sizes)
            return NotImplemented if NotImplemented in sizes else sizes
    return NotImplemented


_KINDS = {  # what each argument is expected to be
    **dict.fromkeys(("input", "residual", "gate", "weight", "scale", "out"), "a Tensor"),
    "input_weight": "a Tensor",
    **dict.fromkeys(("q", "k", "q_weight", "k_weight", "cos", "sin", "positions"), "a Tensor"),
    **dict.fromkeys(("eps", "scale_ub", "weight_offset"), "a number"),
    **dict.fromkeys(("cast_before_weight", "column_major", "keep_norm", "round_sum"), "a bool"),
    **dict.fromkeys(("interleaved", "interleaved_sections", "round_each_step"), "a bool"),
    "activation": "a str",
    "norm_before_gate": "a bool",
    "group_size": "an int",
    "heads_dim": "an int",
    "sections": "an int or a tuple of ints",
    "normalized_shape": "an int or a tuple of ints",
    "block": "an int",
    "dtype": "a torch.dtype",
}


def checked(op: str, *groups: dict) -> tuple[dict, ...]:
    """Arguments by the names of `op`'s schema, as torch.ops takes them.

    Raises:
        TypeError: one is of the wrong kind.
    """
    return tuple({name: _checked(op, name, group[name]) for name in group} for group in groups)


def _checked(op, name, given):
    if given is None and _is_optional(op, name):
        return None
    expected = _KINDS[name]
    if name == "scale" and op.startswith("rms_norm_add"):  # of the sum, not of 8 bits
        expected = "a number"
    value = _converted(given, expected)
    if value is NotImplemented:
        expected += " or None" if _is_optional(op, name) else ""
        name = "return_norm" if name == "keep_norm" else name  # as the function calls it
        got = type(given).__name__
        if "weight" in name and isinstance(given, int | tuple | list) and op != "rms_norm":
            got += "; it normalizes the last dimension, and takes no normalized_shape"
        raise TypeError(f"{op}: expected {name} to be {expected}, but got {got}")
    return value


def _is_optional(op, name):
    """Whether None is a value of the argument: its schema says so. `out` is the function's own."""
    schema = getattr(torch.ops.rmsnorm_cuda, op).default._schema
    types = {argument.name: argument.type for argument in schema.arguments}
    return name == "out" or isinstance(types[name], torch.OptionalType)


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

    def is_default(value):
        return value is None or (isinstance(value, bool | int | float) and value == 0)

    tensors, more = (input, weight, options["out"]), {"weight": weight, "eps": eps}
    more |= {name: value for name, value in options.items() if not is_default(value)}
    return handle_torch_function(function, tensors, input, normalized_shape, **more)
