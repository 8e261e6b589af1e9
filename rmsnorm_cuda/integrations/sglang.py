"""An SGLang plug-in: RMSNorm, GemmaRMSNorm and the norms with a gate of its models on our kernels.

Installed, it is found by SGLang through the entry point `sglang.srt.plugins`, and does nothing
until it is named:

    SGLANG_PLUGINS=rmsnorm_cuda python -m sglang.launch_server --model-path MODEL

It goes around `forward_cuda` and `forward_cpu` of the first two, `forward` of FusedRMSNormGated and
of layernorm_gated's RMSNorm (Qwen3-Next, Qwen 3.5, Kimi-Linear, Bailing), and `forward_cuda` of
Mixer2RMSNormGated (Mamba 2 and its hybrids). SGLang's own runs on where there is
something that ours does not do: quantization in the same kernel, a part of the row for the
variance, an fp32 residual, another output dtype, mixed dtypes of input and residual, its
batch-invariant mode (whose native forward a trainer may want the bits of), another activation of a
gate, a group that ranks share. On a CPU without AMX SGLang takes its native forward, as it does
under torch.compile; neither is touched.

Numerics are those of SGLang's CUDA kernels: one rounding, of x / rms * w (Gemma: * (1 + w), in
fp32), where `cast_x_before_out_mul` is set round(x / rms) * w, in place on x and residual if there
is a residual. The sum x + residual is normalized before it is rounded for the residual, as by them
and by SGLang's native RMSNorm (its native GemmaRMSNorm rounds it first). With a gate there is one
rounding, as in SGLang's Triton kernels (its native Mixer2RMSNormGated rounds before the weight).
"""

from __future__ import annotations

import functools

import torch

from ..functional import fused_add_rms_norm_, rms_norm
from .gated_layers import around_fused_rms_norm_gated, around_mixer2, around_rms_norm_gated


def register() -> None:
    """Registers the hooks; SGLang applies them when it has loaded all plug-ins, or
    HookRegistry.apply_hooks() does.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in _HOOKS.items():
        HookRegistry.register(f"sglang.{target}", hook, HookType.AROUND)


def _around_rms_norm(
    original, self, x, residual=None, post_residual_addition=None, quant_linear=None
):
    absent = ("_quant_linear", "variance_size_override", "override_orig_dtype")
    plain = quant_linear is None and all(getattr(self, name, None) is None for name in absent)
    if self.fp32_residual and residual is not None:
        plain = False
    if plain and _is_ours(
        x, residual, post_residual_addition, self.weight, self.cast_x_before_out_mul
    ):
        return _forward(x, residual, post_residual_addition, self, 0.0, self.cast_x_before_out_mul)
    rest = () if quant_linear is None else (quant_linear,)
    return original(self, x, residual, post_residual_addition, *rest)


def _around_gemma_rms_norm(original, self, x, residual=None, post_residual_addition=None):
    if _is_ours(x, residual, post_residual_addition, self.weight, False):
        return _forward(x, residual, post_residual_addition, self, 1.0, False)
    return original(self, x, residual, post_residual_addition)


def _unless_batch_invariant(around):
    def hook(original, norm, *args, **kwargs):
        if _is_batch_invariant():
            return original(norm, *args, **kwargs)
        return around(original, norm, *args, **kwargs)

    return hook


_LAYERS, _GATED = "srt.layers.layernorm", "kernels.ops.attention.fla"
_HOOKS = {
    f"{_LAYERS}.RMSNorm.forward_cuda": _around_rms_norm,
    f"{_LAYERS}.RMSNorm.forward_cpu": _around_rms_norm,
    f"{_LAYERS}.GemmaRMSNorm.forward_cuda": _around_gemma_rms_norm,
    f"{_LAYERS}.GemmaRMSNorm.forward_cpu": _around_gemma_rms_norm,
    f"{_GATED}.layernorm_gated.RMSNorm.forward": _unless_batch_invariant(around_rms_norm_gated),
    f"{_GATED}.fused_norm_gate.FusedRMSNormGated.forward": _unless_batch_invariant(
        around_fused_rms_norm_gated
    ),
    "srt.layers.attention.mamba.mixer2_rms_norm_gated.Mixer2RMSNormGated.forward_cuda": (
        _unless_batch_invariant(functools.partial(around_mixer2, cast_before_weight=False))
    ),
}


def _is_batch_invariant() -> bool:
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled

    return is_batch_invariant_mode_enabled()


def _is_ours(x, residual, post_residual_addition, weight, cast):
    added = [t for t in (residual, post_residual_addition) if t is not None]
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(t.dtype == x.dtype for t in added)
        and (residual is None or x.stride(-1) == residual.stride(-1) == 1)
        and (not cast or weight.dtype == x.dtype)
        and not _is_batch_invariant()
    )


def _forward(x, residual, post_residual_addition, norm, weight_offset, cast):
    weight, options = norm.weight.data, {"weight_offset": weight_offset, "cast_before_weight": cast}
    if residual is None:
        return rms_norm(x, x.shape[-1:], weight, norm.variance_epsilon, **options)
    if post_residual_addition is not None:
        residual = residual + post_residual_addition
    fused_add_rms_norm_(x, residual, weight, norm.variance_epsilon, **options, round_sum=False)
    return x, residual
