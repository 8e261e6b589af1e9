"""What the operators compute, in plain ATen ops: the yardstick of the tests and of the self-check,
and what vmap quantizes by.

Nothing here is fast, differentiable or dependent on the extension. fp64 inputs whose squares leave
the range of fp64 (|x| beyond 1e154, or below 1e-162 with eps = 0) are outside what this formula can
judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INT_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_INT64_MAX = torch.iinfo(torch.int64).max


@torch.no_grad()
def rms_norm_reference(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    rounds_to: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), computed in `dtype` and rounded
    once.

    The result has the dtype of `input`. With `cast_before_weight` there are two roundings by
    definition: x / sqrt(...) is rounded to the dtype of `input`, multiplied by the weight, and that
    product is rounded to the promotion of both dtypes. `rounds_to` stands for the dtype of `input`
    where that is a sum in fp32 which has not been rounded.
    """
    rounds_to = rounds_to or input.dtype
    dims = _trailing_dims(input, normalized_shape)
    x = input.to(dtype)
    xhat = x * _rstd(x, dims, default_eps(input) if eps is None else eps)
    if cast_before_weight:
        xhat = round_once(xhat, rounds_to)
    if weight is None:
        return round_once(xhat, rounds_to)
    gain = gain_of(weight, compute_dtype(input, weight), weight_offset).to(dtype)
    result = torch.promote_types(rounds_to, weight.dtype) if cast_before_weight else rounds_to
    return round_once(xhat.to(dtype) * gain, result)


@torch.no_grad()
def rms_norm_backward_reference(
    grad: Tensor,
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) in fp64, not rounded: round_once() gives what an exact kernel would store.

    The rounding of `cast_before_weight` counts as the identity for dx; dweight sees the rounded
    value, which is what the forward multiplied by.
    """
    dims = _trailing_dims(input, normalized_shape)
    x, dy = input.double(), grad.double()
    rstd = _rstd(x, dims, default_eps(input) if eps is None else eps)
    xhat = x * rstd
    g = dy
    if weight is not None:
        g = dy * gain_of(weight, compute_dtype(input, weight), weight_offset).double()
    dx = rstd * (g - xhat * (g * xhat).mean(dims, keepdim=True))
    if weight is None:
        return dx, None
    seen = round_once(xhat, input.dtype).double() if cast_before_weight else xhat
    rows = math.prod(input.shape[: input.dim() - len(dims)])
    return dx, (dy * seen).reshape(rows, *weight.shape).sum(0)


@torch.no_grad()
def rms_norm_gated_reference(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """What rms_norm_gated computes, in fp64, rounded where its docstring says so."""
    x, act = input.double(), 1.0
    if gate is not None:
        act = torch.sigmoid(gate.double()) * (gate.double() if activation == "silu" else 1.0)
    if not norm_before_gate:
        x = x * act
    groups = x if group_size is None else x.unflatten(-1, (-1, group_size))
    eps = default_eps(input) if eps is None else eps
    y = (groups * _rstd(groups, [-1], eps)).reshape(x.shape)
    product_dtype = output_dtype(input, weight, cast_before_weight)
    if weight is not None:
        if cast_before_weight:
            y = round_once(y, input.dtype).double()
        y = y * gain_of(weight, compute_dtype(input, weight, gate), weight_offset).double()
    if gate is None or not norm_before_gate:
        return round_once(y, product_dtype)
    if weight is not None and cast_before_weight:
        y = round_once(y, product_dtype).double()
    return round_once(y * act, input.dtype)


@torch.no_grad()
def rms_norm_rope_reference(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """q or k of rms_norm_rope in fp64, not rounded at the end; cos and sin of each token."""
    x64 = x.transpose(-3, -2) if heads_dim == -3 else x
    heads, width = x64.shape[-2:]
    if weight is not None and weight.dim() == 1 and len(weight) != width:
        weight = weight.unflatten(0, (heads, width))
        xhat = x64.double() * _rstd(x64.double(), [-2, -1], default_eps(x) if eps is None else eps)
    else:
        xhat = x64.double() * _rstd(x64.double(), [-1], default_eps(x) if eps is None else eps)
    if cast_before_weight:
        xhat = round_once(xhat, x.dtype).double()
    norm = xhat
    if weight is not None:
        norm = xhat * gain_of(weight, compute_dtype(x, weight), weight_offset).double()
    compute = compute_dtype(x, weight)
    cos, sin = (t.to(compute).double().unsqueeze(-2) for t in (cos, sin))
    pairs = cos.shape[-1]
    turned, rest = norm.split([2 * pairs, width - 2 * pairs], -1)
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    both = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    result = torch.cat([turned, rest], -1)
    return result.transpose(-3, -2) if heads_dim == -3 else result


@torch.no_grad()
def quantize_reference(
    norm: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    block: int | None = None,
    scale_ub: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, scale) that rms_norm_quant makes of a norm, step by step, to the bit."""
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    least_scale = torch.finfo(torch.float32).eps if dtype == torch.int8 else 1 / (512 * limit)
    least_scale = torch.tensor(least_scale).item()  # as the kernels have it: rounded to fp32
    y = norm.float()
    if scale is not None:
        q = y * (1 / scale)
    else:
        groups = y.unflatten(-1, (-1, block or y.shape[-1]))
        largest = groups.abs().amax(-1, keepdim=True)
        if scale_ub is not None and scale_ub <= torch.finfo(torch.float32).max:
            largest = largest.clamp(max=scale_ub)
        scale = (largest / limit).clamp(min=least_scale)
        q = (groups * (1 / scale) if dtype == torch.int8 else groups / scale).flatten(-2)
        scale = scale.squeeze(-1)
    if dtype == torch.int8:
        return q.nan_to_num(0.0).clamp(-128, 127).round().to(dtype), scale
    return q.clamp(-limit, limit).to(dtype), scale


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What operators on these tensors compute in: fp64 if one of them is fp64, else fp32."""
    has_fp64 = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if has_fp64 else torch.float32


def default_eps(input: Tensor) -> float:
    """The meaning of eps=None: the machine epsilon of the type that torch would compute in."""
    return torch.finfo(compute_dtype(input)).eps


def output_dtype(input: Tensor, weight: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    """The dtype of the norm that operators on these tensors return."""
    if weight is None or not cast_before_weight:
        return input.dtype
    return torch.promote_types(input.dtype, weight.dtype)


@torch.no_grad()
def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value.to(dtype)` with one rounding, to nearest even.

    ATen converts fp64 to a 16-bit type by way of fp32, and the two roundings together go wrong near
    ties. Here the way through fp32 rounds to odd, which loses nothing that the second rounding
    needs.
    """
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    near = value.float()
    bits = near.view(torch.int32)
    # Now truncated toward zero.
    bits = torch.where(near.double().abs() > value.abs(), bits - 1, bits)
    bits = torch.where((near.double() != value) & ~value.isnan(), bits | 1, bits)
    return bits.view(torch.float32).to(dtype)


@torch.no_grad()
def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values of the common dtype lie between a and b, plus one; 0 where they
    are equal.

    +0 and -0 are equal, and so are two NaNs whatever their bits. Infinity is the neighbour of the
    largest finite value. NaN against a number, and what does not fit int64, is the largest int64.
    """
    if a.dtype != b.dtype or a.dtype not in _INT_OF:
        raise TypeError(
            f"ulp_distance: expected two tensors of the same floating dtype, got {a.dtype} and "
            f"{b.dtype}"
        )
    i, j = torch.broadcast_tensors(_ordinal(a), _ordinal(b))
    distance = i - j
    overflowed = ((i < 0) != (j < 0)) & ((distance < 0) != (i < 0))
    distance = torch.where(overflowed, _INT64_MAX, distance.abs())
    distance = torch.where(a.isnan() != b.isnan(), _INT64_MAX, distance)
    return torch.where(a.isnan() & b.isnan(), 0, distance)


def _ordinal(x: Tensor) -> Tensor:
    """The index of each value in the order of all values of its dtype; +0 and -0 are both 0."""
    bits = x.contiguous().view(_INT_OF[x.dtype]).long()
    magnitude = bits & torch.iinfo(_INT_OF[x.dtype]).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _trailing_dims(input: Tensor, normalized_shape) -> list[int]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"expected an input of shape [*, {', '.join(map(str, shape))}], got {list(input.shape)}"
        )
    return list(range(-len(shape), 0))


def _rstd(x: Tensor, dims: list[int], eps: float) -> Tensor:
    return 1.0 / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)


def gain_of(weight: Tensor, dtype: torch.dtype, weight_offset: float) -> Tensor:
    """weight + weight_offset in `dtype`. -0 + 0 would be 0: an offset of 0 changes no bit."""
    return weight.to(dtype) + (weight_offset or -0.0)
