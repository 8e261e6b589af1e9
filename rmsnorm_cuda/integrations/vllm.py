"""A vLLM plug-in: implementations of its IR ops rms_norm and fused_add_rms_norm, under the provider
name "rmsnorm_cuda", and of its layers with a gate.

Installed, it is found by vLLM through the entry point `vllm.general_plugins`, and does nothing
until it is asked for:

    vllm serve MODEL --ir-op-priority.rms_norm=rmsnorm_cuda \
        --ir-op-priority.fused_add_rms_norm=rmsnorm_cuda

    VLLM_PLUGINS=rmsnorm_cuda vllm serve MODEL -cc.custom_ops+=+rms_norm_gated

vLLM puts its platform's own implementations behind an IR op's, for arguments that ours declines. A
layer with a gate is a CustomOp: `custom_ops` says whether its kernel runs, or its formula for the
compiler. Named in VLLM_PLUGINS, ours is the kernel, on CUDA and on CPUs.

Numerics. The op is defined as the norm in fp32, rounded to the weight's dtype, times the weight,
rounded to the input's. With a weight of the input's dtype that is the Llama family's order, with an
fp32 weight (GemmaRMSNorm hands 1 + w over in fp32) one rounding: ours is the same but where a value
is so near to a tie that the roundings of fp32 arithmetic decide. fused_add_rms_norm is that of the
sum before it is rounded for the residual, as the definition has it (`round_sum=False`). A layer
with a gate computes what its forward_native() does: RMSNormGated and FusedRMSNormGated round once,
Mixer2RMSNormGated (Mamba 2) before the weight, too.

Declined, and so left to the next implementation: `variance_size`, a weight of another 16-bit dtype
or one narrower than the input, fp64, a residual of another dtype than the input, and a weight that
is broadcast. A layer with a gate keeps vLLM's own forward for fp64, for FusedRMSNormGated with a
residual, and for Mixer2RMSNormGated where ranks share a group or the weight has another dtype.
"""

import functools
import sys
import warnings

import torch
from torch import Tensor

from ..functional import fused_add_rms_norm, rms_norm
from .gated_layers import around_fused_rms_norm_gated, around_mixer2, around_rms_norm_gated
from .when_imported import when_imported

PROVIDER = "rmsnorm_cuda"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register() -> None:
    """Registers both implementations, once. An older vLLM, without IR ops, is left as it is, with a
    warning.
    """
    try:
        from vllm.ir import ops

        norm, fused = ops.rms_norm, ops.fused_add_rms_norm
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"rmsnorm_cuda: this vLLM has no IR ops for norms, and keeps its own: {error}",
            stacklevel=2,
        )
        return
    if PROVIDER not in norm.impls:
        norm.register_impl(PROVIDER, supports_args=_supports)(_rms_norm)
    if PROVIDER not in fused.impls:
        fused.register_impl(PROVIDER, supports_args=_supports_fused)(_fused_add_rms_norm)


# The modules that define layers with a gate.
_GATED_LAYERS = {
    "vllm.model_executor.layers.layernorm": ("RMSNormGated", around_rms_norm_gated),
    "vllm.third_party.flash_linear_attention.ops.kda": (
        "FusedRMSNormGated",
        around_fused_rms_norm_gated,
    ),
    "vllm.model_executor.layers.mamba.mamba_mixer2": (
        "Mixer2RMSNormGated",
        functools.partial(around_mixer2, cast_before_weight=True),
    ),
}


def register_gated_layers() -> None:
    """Has vLLM build its layers with a gate as ours, each from when vLLM has imported it. A class
    for which a platform has registered one of its own stays that.
    """
    for module, (name, around) in _GATED_LAYERS.items():
        register_it = functools.partial(_register_layer, module, name, around)
        when_imported((module,), register_it, f"{name} of vLLM")


def _register_layer(module: str, name: str, around) -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    if name in op_registry_oot:
        return
    theirs = getattr(sys.modules[module], name)
    methods = {
        key: _around(getattr(theirs, key), around) for key in ("forward_cuda", "forward_cpu")
    }
    ours = type(theirs)(name, (theirs,), methods)
    theirs.register_oot(ours, name=name)
    ours.name = theirs.name  # by which `custom_ops` means it


def _around(original, around):
    def forward(self, *args, **kwargs):
        return around(original, self, *args, **kwargs)

    return forward


# vLLM demands the names, types and defaults of its own. Not in place: of an op that works in place
# vLLM clones the arguments where they live on, and memory traffic is the same.


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, epsilon, cast_before_weight=_rounds_first(x, weight))


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    cast = _rounds_first(x, weight)
    options = {"cast_before_weight": cast, "round_sum": False}
    return fused_add_rms_norm(x, x_residual, weight, epsilon, **options)


def _rounds_first(x, weight):
    return weight is not None and weight.dtype == x.dtype


def _supports(x, weight, epsilon, variance_size=None):
    if variance_size is not None or x.dtype not in _DTYPES or not x.dim():
        return False
    if weight is None:
        return True
    return weight.dtype in (x.dtype, torch.float32) and weight.shape == x.shape[-1:]


def _supports_fused(x, x_residual, weight, epsilon, variance_size=None):
    is_like_x = x_residual.dtype == x.dtype and x_residual.shape == x.shape
    return is_like_x and _supports(x, weight, epsilon, variance_size)
