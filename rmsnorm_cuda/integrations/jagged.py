"""The ops on jagged nested tensors: on their values, which are rows one after the other, without a
copy.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from ..again import op_names

_OF_ROWS = {"grad_output", "input", "residual", "grad_residual", "rstd", "out", "residual_out"}
_OF_ROWS |= {"gate", "grad_gate"}
_OF_ROWS |= {"grad_q", "grad_k", "q", "k", "q_out", "k_out"}
# Plain results: rstd of rotated rows, which may begin with the heads. (That of groups, too, begins
# with these.)
_PLAIN = {"grad_weight", "grad_q_weight", "grad_k_weight", "q_rstd", "k_rstd"}


def _on_values(cls, func, types, args, kwargs):
    from torch.nested._internal.ops import extract_kwargs

    given = dict(zip([argument.name for argument in func._schema.arguments], args)) | kwargs
    jagged = {name: value for name, value in given.items() if isinstance(value, NestedTensor)}
    name, first = next(iter(jagged.items()))
    is_rope = "q" in given

    def lengths(t):  # heads may be in front of tokens, and cos has none
        return (t._size[0], t._size[t._ragged_idx]) if is_rope else t._size[: t._ragged_idx + 1]

    for other_name, other in jagged.items():
        if lengths(other) != lengths(first):
            raise RuntimeError(
                f"{func}: expected nested tensors of the same lengths, but {other_name} has "
                f"{other._size} and {name} {first._size}"
            )
    normalized = len(given.get("normalized_shape", "1"))
    rows, plain = _OF_ROWS, _PLAIN
    if given.get("group_size") is not None:
        rows, plain = rows - {"rstd"}, plain | {"rstd"}
    if is_rope:
        rows = rows | ({"cos", "sin"} if given.get("positions") is None else {"positions"})
        tokens = given["q"].dim() + (-3 if given.get("heads_dim", -2) == -2 else -2)
        if "q" in jagged and given["q"]._ragged_idx != tokens:
            raise RuntimeError(
                f"{func}: expected the tokens of q to be what is ragged, but it has the sizes "
                f"{given['q']._size}"
            )
    for missing in sorted(rows - jagged.keys()):
        value = given.get(missing)
        if value is not None and value.numel():
            raise RuntimeError(
                f"{func}: expected {missing} to be a nested tensor as {name} is, but got "
                f"{type(given[missing]).__name__}"
            )
    if "input" in jagged and first.dim() - first._ragged_idx <= normalized:
        raise RuntimeError(
            f"{func}: the normalized dimensions of a nested tensor may not be ragged, but it has "
            f"the sizes {first._size}"
        )
    results = func(*map(_values, args), **{key: _values(value) for key, value in kwargs.items()})
    layout = extract_kwargs(first)

    def wrapped(result, what):
        # What was not asked for is None, or has no elements.
        if not isinstance(result, Tensor) or what in plain:
            return result
        has_rows = result.numel() or not first._values.numel()
        return NestedTensor(result, **layout) if has_rows else result

    if isinstance(results, tuple):
        return tuple(map(wrapped, results, [returned.name for returned in func._schema.returns]))
    return wrapped(results, "")


def _values(value):
    return value._values if isinstance(value, NestedTensor) else value


def register() -> None:
    for op in op_names():
        with contextlib.suppress(RuntimeError):  # an earlier import of this package has done it
            torch.library.register_torch_dispatch(op, NestedTensor, _on_values)
