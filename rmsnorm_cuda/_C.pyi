from collections.abc import Sequence
from typing import Any

from torch import Tensor, dtype

torch_version: str
compiler: str

def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor | None = None,
    /,
) -> Tensor: ...
def fused_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, weight_offset: float, cast_before_weight: bool, /
) -> tuple[Tensor, Tensor]: ...  # NotImplemented: for torch.ops
def fused_add_rms_norm_(
    input: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, weight_offset: float, cast_before_weight: bool, /
) -> None: ...
def rms_norm_forward(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def fused_add_rms_norm_forward(
    input: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, weight_offset: float, cast_before_weight: bool, /
) -> tuple[Tensor, Tensor, Tensor]: ...
def rms_norm_quant(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    return_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    out: tuple[Tensor, ...] | None,
    /,
) -> tuple[Tensor, ...]: ...  # NotImplemented: for torch.ops
def fused_add_rms_norm_quant(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    return_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    out: tuple[Tensor, ...] | None,
    /,
) -> tuple[Tensor, ...]: ...
def isas() -> dict[str, bool]: ...
def isa() -> str: ...
def set_isa(name: str | None) -> None: ...
def last_isa() -> str: ...
def libraries() -> tuple[str, str]: ...
def cuda_built() -> bool: ...
def cuda_architectures() -> str: ...
def cuda_versions() -> tuple[int, int]: ...
def cuda_error(error: int) -> str: ...
def cuda_plan(
    backward: bool, rows: int, cols: int, dy: dtype, x: dtype, w: dtype, arch: int, multiprocessors: int, shared_bytes: int
) -> dict[str, Any]: ...
def cuda_limits(arch: int) -> dict[str, tuple[int, int, int]]: ...
def last_plan() -> dict[str, Any]: ...
