"""RMSNorm of rows whose elements are spread over the ranks of a group, by one all-reduce of a
number for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed import group as groups
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.tensor import DTensor

from ..functional import rms_norm
from ..reference import compute_dtype, default_eps, gain_of, output_dtype


def rms_norm_sharded(
    input: Tensor,
    normalized_size: int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    group: ProcessGroup | None = None,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
) -> Tensor:
    """:func:`rms_norm` over a last dimension that is sharded: what a norm of q or k over all heads
    needs behind a column-parallel projection (Olmo 2, MiniMax), instead of gathering its input.

    Each rank has some columns of the same rows, not necessarily equally many. The rows' sums of
    squares are added up over the group, and in the backward their products with the gradient: one
    all-reduce of one fp32 number for each row. Computed in fp32 (fp64) and rounded once, in ATen
    ops, which torch.compile fuses (from torch 2.12 on): within 1 ulp in 16 bits, 4 in fp32. Rows
    whose squares leave fp32's range are not rescued. In both it is as good as torch's own norm.

    Args:
        input: ``(*, n)``, this rank's columns.
        normalized_size: how many columns all ranks have together.
        weight: ``(n,)``, the weights of these columns.
        group: of the ranks that share the rows (ProcessGroup, or DeviceMesh of one dimension);
            None: all.
        eps, weight_offset, cast_before_weight: as of :func:`rms_norm`.

    Returns: ``(*, n)``, this rank's columns of the norm. Differentiable once, in ``input`` and
        ``weight``, by autograd; not by the transforms of torch.func.

    Errors: as of :func:`rms_norm`; TypeError if given a DTensor, whose own rules are another way.
    """
    if isinstance(input, DTensor) or isinstance(weight, DTensor):
        raise TypeError(
            "rms_norm_sharded: expected this rank's columns as a plain tensor, but got a DTensor; "
            "call rms_norm, or to_local() first"
        )
    if not input.dim():
        raise ValueError(
            "rms_norm_sharded: expected input with at least one dimension, but got a scalar"
        )
    columns = input.shape[-1]
    # On no rows, for the checks that both have.
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    with torch.no_grad():
        rms_norm(input.new_empty((0, columns)), (columns,), weight, eps, **options)
    if columns > normalized_size:
        raise ValueError(
            f"rms_norm_sharded: expected normalized_size to be at least input's {columns} columns, "
            f"but got {normalized_size}"
        )
    group = groups.WORLD if group is None else group
    return _apply(input, weight, normalized_size, eps, group, weight_offset, cast_before_weight)


def _sum_over(group, terms):
    return wait_tensor(all_reduce(terms.sum(-1, keepdim=True), "sum", group))


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, size, eps, group, weight_offset, cast_before_weight):
        compute = compute_dtype(input, weight)
        eps = default_eps(input) if eps is None else eps
        x = input.to(compute)
        rstd = torch.rsqrt(_sum_over(group, x * x) / size + eps)
        ctx.save_for_backward(input, weight, rstd)
        ctx.options = size, group, weight_offset, cast_before_weight
        xhat = x * rstd
        if weight is None:
            return xhat.to(input.dtype)
        if cast_before_weight:
            xhat = xhat.to(input.dtype).to(compute)
        output = xhat * gain_of(weight, compute, weight_offset)
        return output.to(output_dtype(input, weight, cast_before_weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, weight, rstd = ctx.saved_tensors
        size, group, weight_offset, cast_before_weight = ctx.options
        dy, xhat, dx, dweight = grad.to(rstd.dtype), input.to(rstd.dtype) * rstd, None, None
        if ctx.needs_input_grad[0]:
            g = dy if weight is None else dy * gain_of(weight, rstd.dtype, weight_offset)
            dx = (rstd * (g - xhat * (_sum_over(group, g * xhat) / size))).to(input.dtype)
        if ctx.needs_input_grad[1]:
            if cast_before_weight:
                xhat = xhat.to(input.dtype).to(rstd.dtype)
            dweight = (dy * xhat).reshape(-1, dy.shape[-1]).sum(0).to(weight.dtype)
        return dx, dweight, *(None,) * 5


# The Dynamo of 2.11 makes zeros of the gradients of an autograd.Function over a collective: the
# graph is broken there.
_apply = _Sharded.apply
if torch.__version__ < "2.12.dev0":
    _apply = torch.compiler.disable(_apply)
