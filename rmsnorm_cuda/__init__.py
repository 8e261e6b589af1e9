"""RMSNorm for PyTorch: CUDA and AVX kernels behind one differentiable, compile-friendly op.

    rms_norm(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, ...)
    fused_add_rms_norm(input, residual, weight=None, eps=None, *, ...) -> (output, residual_out)
    rms_norm_quant(input, weight=None, eps=None, *, dtype, scale=None, ...) -> (output, scale)
    rms_norm_add(input, residual, weight=None, eps=None, *, ...)      residual + norm(input)
    rms_norm_add_rms_norm(input, residual, input_weight, weight, eps=None, *, ...)   and its norm
    rms_norm_gated(input, gate, weight=None, eps=None, *, activation="silu", group_size=None, ...)
    rms_norm_rope(q, k, q_weight, k_weight, cos, sin, ...) -> (q, k)
    rms_norm_sharded(input, normalized_size, ..., group=None)   rows spread over ranks
    RMSNorm(normalized_shape, eps=None, ...)                    the module, a torch.nn.RMSNorm
    RMSNormGated(hidden_size, eps=None, ...)                    its module
    replace_rms_norm(model), patch_transformers(*types)         swap a model's norms for ours
    monitor(model)                                              watches what norms are given

fused_add_rms_norm_, rms_norm_add_rms_norm_ and rms_norm_rope_ work in place;
fused_add_rms_norm_quant and rms_norm_gated_quant do all of their steps. include_dir(),
library_dir(), torch_library_dir() and cmake_dir() are for C++. `python -m rmsnorm_cuda` shows what
is built and checks it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .installation.load import load

load(__name__)

from . import _C, config, vmap  # noqa: F401  (vmap: its batching rules are registered)
from .functional import (
    decompositions,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    fused_add_rms_norm_quant,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
    rms_norm_gated,
    rms_norm_gated_quant,
    rms_norm_quant,
    rms_norm_rope,
    rms_norm_rope_,
)
from .installation.paths import cmake_dir, include_dir, library_dir, torch_library_dir
from .integrations import dtensor, jagged, onnx
from .modules import RMSNorm, RMSNormGated

if TYPE_CHECKING:
    from . import monitoring, ops
    from .integrations.sharded import rms_norm_sharded
    from .integrations.transformers import patch_transformers, replace_rms_norm
    from .monitoring import monitor

__version__ = "0.1.0"
__all__ = ["RMSNorm", "rms_norm", "rms_norm_quant", "rms_norm_rope", "rms_norm_rope_"]
__all__ += ["RMSNormGated", "rms_norm_gated", "rms_norm_gated_quant", "rms_norm_sharded"]
__all__ += ["fused_add_rms_norm", "fused_add_rms_norm_", "fused_add_rms_norm_quant"]
__all__ += ["rms_norm_add", "rms_norm_add_rms_norm", "rms_norm_add_rms_norm_"]
__all__ += ["config", "decompositions", "monitor", "monitoring", "ops"]
__all__ += ["patch_transformers", "replace_rms_norm"]
__all__ += ["cmake_dir", "include_dir", "library_dir", "torch_library_dir"]
# Imported when they are first used: `import rmsnorm_cuda` stays quick.
_LAZY = {
    "monitor": ".monitoring",
    "monitoring": ".monitoring",
    "ops": ".ops",
    "patch_transformers": ".integrations.transformers",
    "replace_rms_norm": ".integrations.transformers",
    "rms_norm_sharded": ".integrations.sharded",
}

jagged.register()
dtensor.register_when_imported()
onnx.register_when_imported()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name], __name__)
    return module if _LAZY[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    """What a user may use; not what is only imported here."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
