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
    round_sum: bool = True,
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
    round_sum: bool = True,
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
    round_sum: bool = True,
) -> None: ...
def fused_add_rms_norm_formula(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_sum: bool = True,
) -> tuple[Tensor, Tensor]: ...
def fused_add_rms_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_sum: bool = True,
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
    round_sum: bool = True,
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
    round_sum: bool = True,
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
@overload
def rms_norm_add(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor: ...
@overload
def rms_norm_add(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
) -> None: ...
def rms_norm_add_formula(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor: ...
def rms_norm_add_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...

rms_norm_add_forward_formula = rms_norm_add_forward

@overload
def rms_norm_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
    residual_out: Tensor,
) -> None: ...
def rms_norm_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> None: ...
def rms_norm_add_rms_norm_formula(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]: ...
def rms_norm_add_rms_norm_forward(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

rms_norm_add_rms_norm_forward_formula = rms_norm_add_rms_norm_forward

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
def rms_norm_gated(
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
) -> Tensor: ...
@overload
def rms_norm_gated(
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
    out: Tensor,
) -> None: ...
def rms_norm_gated_backward(
    grad_output: Tensor,
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float | None,
    output_mask: Sequence[bool],
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...

rms_norm_gated_backward_formula = rms_norm_gated_backward

def rms_norm_gated_formula(
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
) -> Tensor: ...
def rms_norm_gated_forward(
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
) -> tuple[Tensor, Tensor]: ...

rms_norm_gated_forward_formula = rms_norm_gated_forward

@overload
def rms_norm_gated_quant(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def rms_norm_gated_quant(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: dtype,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    out: Tensor,
    scale_out: Tensor,
    norm_out: Tensor,
) -> None: ...
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
@overload
def rms_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
    q_out: Tensor,
    k_out: Tensor,
) -> None: ...
def rms_norm_rope_(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> None: ...
def rms_norm_rope_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    eps: float | None,
    output_mask: Sequence[bool],
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

rms_norm_rope_backward_formula = rms_norm_rope_backward

def rms_norm_rope_formula(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]: ...
def rms_norm_rope_forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

rms_norm_rope_forward_formula = rms_norm_rope_forward
