# Written by `python .ci/stubs.py`.
from collections.abc import Sequence
from typing import Any

from torch import Tensor, dtype

compiler: str
torch_version: str

def cuda_architectures() -> str: ...
def cuda_built() -> bool: ...
def cuda_error(arg0: int, /) -> str: ...
def cuda_limits(arg0: int, /) -> dict[str, Any]: ...
def cuda_plan(
    arg0: bool,
    arg1: int,
    arg2: int,
    arg3: dtype,
    arg4: dtype,
    arg5: int,
    arg6: int,
    arg7: int,
    /,
) -> dict[str, Any]: ...
def cuda_versions() -> tuple[int, int]: ...
def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def fused_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    /,
) -> bool | None: ...
def fused_add_rms_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def fused_add_rms_norm_out(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
    /,
) -> bool | None: ...
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
    keep_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...
def fused_add_rms_norm_quant_out(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    keep_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    round_sum: bool,
    out: Tensor | None,
    scale_out: Tensor | None,
    residual_out: Tensor | None,
    norm_out: Tensor | None,
    /,
) -> bool | None: ...
def isa() -> str: ...
def isas() -> dict[str, bool]: ...
def last_isa() -> str: ...
def last_plan() -> dict[str, Any]: ...
def libraries() -> tuple[str, str]: ...
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> Tensor | None: ...
def rms_norm_add(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> Tensor | None: ...
def rms_norm_add_out(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    scale: float,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def rms_norm_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    scale: float,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> bool | None: ...
def rms_norm_add_rms_norm_out(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    scale: float,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_forward(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def rms_norm_gated(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    activation: str,
    norm_before_gate: bool,
    group_size: int | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> Tensor | None: ...
def rms_norm_gated_out(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    activation: str,
    norm_before_gate: bool,
    group_size: int | None,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_gated_quant(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    keep_norm: bool,
    activation: str,
    norm_before_gate: bool,
    group_size: int | None,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def rms_norm_gated_quant_out(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    keep_norm: bool,
    activation: str,
    norm_before_gate: bool,
    group_size: int | None,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    scale_out: Tensor | None,
    norm_out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_out(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_quant(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    keep_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def rms_norm_quant_out(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    dtype: dtype,
    block: int | None,
    scale_ub: float | None,
    column_major: bool,
    keep_norm: bool,
    weight_offset: float,
    cast_before_weight: bool,
    out: Tensor | None,
    scale_out: Tensor | None,
    norm_out: Tensor | None,
    /,
) -> bool | None: ...
def rms_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float | None,
    heads_dim: int,
    interleaved: bool,
    sections: Sequence[int] | None,
    interleaved_sections: bool,
    weight_offset: float,
    cast_before_weight: bool,
    round_each_step: bool,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def rms_norm_rope_(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float | None,
    heads_dim: int,
    interleaved: bool,
    sections: Sequence[int] | None,
    interleaved_sections: bool,
    weight_offset: float,
    cast_before_weight: bool,
    round_each_step: bool,
    /,
) -> bool | None: ...
def rms_norm_rope_out(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float | None,
    heads_dim: int,
    interleaved: bool,
    sections: Sequence[int] | None,
    interleaved_sections: bool,
    weight_offset: float,
    cast_before_weight: bool,
    round_each_step: bool,
    q_out: Tensor | None,
    k_out: Tensor | None,
    /,
) -> bool | None: ...
def set_isa(name: str | None) -> None: ...
