# Written by `python .ci/stubs.py`.
from collections.abc import Sequence
from typing import overload

from torch import Tensor, dtype

@overload
def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
    residual_out: Tensor,
) -> None: ...
def fused_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> None: ...
def fused_add_rms_norm_formula(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...
def fused_add_rms_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...

fused_add_rms_norm_forward_formula = fused_add_rms_norm_forward

@overload
def fused_add_rms_norm_quant(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@overload
def fused_add_rms_norm_quant(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
    scale_out: Tensor,
    residual_out: Tensor,
    norm_out: Tensor,
) -> None: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
) -> None: ...
def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    rstd: Tensor,
    eps: float | None,
    output_mask: Sequence[bool],
    grad_residual: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...

rms_norm_backward_formula = rms_norm_backward

def rms_norm_formula(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor: ...
def rms_norm_forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...

rms_norm_forward_formula = rms_norm_forward

@overload
def rms_norm_quant(
    input: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def rms_norm_quant(
    input: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
    scale_out: Tensor,
    norm_out: Tensor,
) -> None: ...
