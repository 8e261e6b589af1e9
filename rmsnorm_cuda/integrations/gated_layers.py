"""The gated norms of vLLM and SGLang, whose layers have the same attributes.

Each function goes around a forward of such a layer. It gets that as `original`, and calls it where
ours does not compute the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..functional import rms_norm_gated

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}


def around_rms_norm_gated(
    original: Callable, norm: nn.Module, x: Tensor, z: Tensor | None = None
) -> Tensor:
    """vLLM's RMSNormGated, and RMSNorm of SGLang's layernorm_gated: rounded once."""
    # SGLang leaves a slice of a projection as it is: [tokens, heads, columns] beside rows of heads.
    rows = x
    if z is not None and z.dim() == x.dim() + 1 and z.numel() == x.numel():
        rows = x.reshape(z.shape)
    if norm.bias is not None or not _is_ours(rows, z, norm):
        return original(norm, x, z)
    options = {"norm_before_gate": norm.norm_before_gate, "group_size": norm.group_size}
    activation = _ACTIVATIONS[norm.activation]
    y = rms_norm_gated(rows, z, norm.weight, norm.eps, activation=activation, **options)
    return y.view(x.shape)


def around_fused_rms_norm_gated(
    original: Callable,
    norm: nn.Module,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FusedRMSNormGated of both, fla's: rounded once. With a residual it is theirs."""
    if residual is not None or prenorm or norm.bias is not None or not _is_ours(x, g, norm):
        return original(norm, x, g, residual, prenorm, residual_in_fp32)
    activation = _ACTIVATIONS[norm.activation]
    return rms_norm_gated(x, g, norm.weight, norm.eps, activation=activation)


def around_mixer2(
    original: Callable, norm: nn.Module, x: Tensor, gate: Tensor, *, cast_before_weight: bool
) -> Tensor:
    """Mixer2RMSNormGated of both, of Mamba 2, where the groups lie whole on this rank."""
    ranks, groups = norm.tp_size, norm.n_groups
    whole = ranks == 1 or (groups > 1 and groups % ranks == 0)
    if not (norm.use_rms_norm and whole and _is_ours(x, gate, norm)):
        return original(norm, x, gate)
    if cast_before_weight and norm.weight.dtype != x.dtype:
        return original(norm, x, gate)
    return rms_norm_gated(
        x,
        gate,
        norm.weight,
        norm.variance_epsilon,
        norm_before_gate=False,
        group_size=norm.group_size,
        cast_before_weight=cast_before_weight,
    )


def _is_ours(x: Tensor, gate: Tensor | None, norm: nn.Module) -> bool:
    weight = norm.weight
    return (
        all(t is None or t.dtype in _DTYPES for t in (x, gate, weight))
        and (gate is None or gate.shape == x.shape)
        and (weight is None or weight.shape == x.shape[-1:])
        and getattr(norm, "activation", "silu") in _ACTIVATIONS
        and x.device.type in ("cpu", "cuda")
    )
