"""RMSNorm for PyTorch: handwritten CUDA and AVX kernels behind one differentiable, compile-friendly op.

    rms_norm(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False, out=None)
    fused_add_rms_norm(input, residual, weight=None, eps=None, *, ...) -> (output, residual_out)     and in place: ..._
    rms_norm_quant(input, weight=None, eps=None, *, dtype, scale=None, block=None, ...) -> (output, scale)       and fused_add_...
    RMSNorm(normalized_shape, eps=None, elementwise_affine=True, ...)      the module, a torch.nn.RMSNorm
    replace_rms_norm(model, *, fuse_residual=False)                         swaps a model's norms for ours; patch_transformers(*types)
    monitor(model)                                                          watches what a model's norms are given
    rms_norm_sharded(input, normalized_size, weight=None, eps=None, *, group=None, ...)      rows spread over ranks
    include_dir(), library_dir(), torch_library_dir(), cmake_dir()          what a C++ program is built with

`python -m rmsnorm_cuda` shows what is built and checks it.
"""

import importlib
from typing import TYPE_CHECKING

from . import binary

binary.load(__name__)

from . import _C, config, vmap  # noqa: E402, F401  (vmap: its batching rules are registered)
from .functional import (  # noqa: E402
    decompositions,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    fused_add_rms_norm_quant,
    rms_norm,
    rms_norm_quant,
)
from .integrations import dtensor, jagged, onnx  # noqa: E402
from .modules import RMSNorm  # noqa: E402
from .paths import cmake_dir, include_dir, library_dir, torch_library_dir  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "RMSNorm",
    "cmake_dir",
    "config",
    "decompositions",
    "fused_add_rms_norm",
    "fused_add_rms_norm_",
    "fused_add_rms_norm_quant",
    "include_dir",
    "library_dir",
    "monitor",
    "monitoring",
    "ops",
    "patch_transformers",
    "replace_rms_norm",
    "rms_norm",
    "rms_norm_quant",
    "rms_norm_sharded",
    "torch_library_dir",
]

jagged.register()
dtensor.register_when_imported()
onnx.register_when_imported()


if TYPE_CHECKING:
    from . import monitoring, ops
    from .integrations.sharded import rms_norm_sharded
    from .integrations.transformers import patch_transformers, replace_rms_norm
    from .monitoring import monitor

# Imported when they are first used: `import rmsnorm_cuda` stays quick.
_LATER = {
    "monitor": ".monitoring",
    "monitoring": ".monitoring",
    "ops": ".ops",
    "patch_transformers": ".integrations.transformers",
    "replace_rms_norm": ".integrations.transformers",
    "rms_norm_sharded": ".integrations.sharded",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name], __name__)
    return module if _LATER[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
