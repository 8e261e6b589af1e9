"""Batching rules of the ops under torch.func.vmap: one call for all samples, never a loop over them.

The batched dimension goes to the front, where the kernels take any number of leading dimensions. What each sample has of
its own within a row (a weight, the gradient of one) is done in ATen ops around the norm without a weight, in the type that
the kernels compute in: as they do, it rounds once.
"""

import torch

from .functional import _ops
from .reference import default_eps


def _front(tensor, dim, size):
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _compute_dtype(*tensors):
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _gain(weight, dim, lead, weight_offset, dtype):
    """weight + weight_offset as (batch, 1, ..., 1, *normalized_shape), with `lead` ones."""
    gain = weight.movedim(dim, 0).to(dtype) + weight_offset
    return gain.reshape(len(gain), *(1,) * lead, *gain.shape[1:])


def _unscaled(input, normalized_shape, eps, cast_before_weight, dtype):
    """What the weight multiplies, of type `dtype`, and rstd."""
    xhat, rstd = _ops.rms_norm_forward(input.to(dtype), normalized_shape, None, default_eps(input) if eps is None else eps)
    if cast_before_weight:
        xhat = xhat.to(input.dtype).to(dtype)
    return xhat, rstd.to(_compute_dtype(input))


def _rms_norm_forward(info, in_dims, input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0,
                      cast_before_weight=False):  # fmt: skip
    input_dim, _, weight_dim, *_ = *in_dims, None
    if input_dim is not None:
        input = input.movedim(input_dim, 0)
    if weight is None or weight_dim is None:
        options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
        return _ops.rms_norm_forward(input, normalized_shape, weight, eps, **options), (0, 0)
    dtype = _compute_dtype(input, weight)
    xhat, rstd = _unscaled(input, normalized_shape, eps, cast_before_weight, dtype)
    lead = rstd.dim() - (input_dim is not None)
    output = xhat * _gain(weight, weight_dim, lead, weight_offset, dtype)
    result = torch.promote_types(input.dtype, weight.dtype) if cast_before_weight else input.dtype
    return (output.to(result), rstd), (0, input_dim and 0)


def _rms_norm(info, in_dims, input, normalized_shape, weight=None, eps=None, **options):
    if in_dims[2:3] in ((), (None,)):
        return _ops.rms_norm(input.movedim(in_dims[0], 0), normalized_shape, weight, eps, **options), 0
    (output, _), _ = _rms_norm_forward(info, in_dims, input, normalized_shape, weight, eps, **options)
    return output, 0


def _rms_norm_backward(info, in_dims, grad_output, input, normalized_shape, weight, rstd, eps, output_mask, grad_residual=None,
                       *, weight_offset=0.0, cast_before_weight=False):  # fmt: skip
    dims = (*in_dims, None)
    tensors = (grad_output, dims[0]), (input, dims[1]), (rstd, dims[4]), (grad_residual, dims[7])
    grad_output, input, rstd, grad_residual = (_front(t, dim, info.batch_size) for t, dim in tensors)
    dtype, lead = _compute_dtype(input, weight), rstd.dim() - 1
    grad_input = grad_weight = None
    if output_mask[1] and weight is not None:
        xhat, _ = _unscaled(input, normalized_shape, eps, cast_before_weight, dtype)
        product = grad_output.to(dtype) * xhat
        grad_weight = (product.sum(tuple(range(1, 1 + lead))) if lead else product).to(weight.dtype)
    if output_mask[0]:
        options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
        if weight is not None and dims[3] is not None:
            grad_output = grad_output.to(dtype) * _gain(weight, dims[3], lead, weight_offset, dtype)
            weight, options = None, {}
        arguments = grad_output, input, normalized_shape, weight, rstd, eps, (True, False), grad_residual
        grad_input, _ = _ops.rms_norm_backward(*arguments, **options)
    return (grad_input, grad_weight), (0, 0)


def _fused_add_rms_norm_forward(info, in_dims, input, residual, weight=None, eps=None, **options):
    input_dim, residual_dim, weight_dim, *_ = *in_dims, None
    input, residual = _front(input, input_dim, info.batch_size), _front(residual, residual_dim, info.batch_size)
    if weight is None or weight_dim is None:
        return _ops.fused_add_rms_norm_forward(input, residual, weight, eps, **options), (0, 0, 0)
    dtype = _compute_dtype(input)
    total = (input.to(dtype) + residual.to(dtype)).to(residual.dtype)
    dims = 0, None, weight_dim
    (output, rstd), _ = _rms_norm_forward(info, dims, total, total.shape[-1:], weight, eps, **options)
    result = torch.promote_types(input.dtype, weight.dtype) if options.get("cast_before_weight") else input.dtype
    return (output.to(result), total, rstd), (0, 0, 0)


def _fused_add_rms_norm(info, in_dims, *args, **options):
    (output, total, _), _ = _fused_add_rms_norm_forward(info, in_dims, *args, **options)
    return (output, total), (0, 0)


def _fused_add_rms_norm_(info, in_dims, input, residual, weight=None, eps=None, **options):
    if None in in_dims[:2]:
        raise RuntimeError(
            "fused_add_rms_norm_: under vmap, input and residual are overwritten by results for each sample, but one of them is "
            "not batched; use fused_add_rms_norm"
        )
    input, residual = input.movedim(in_dims[0], 0), residual.movedim(in_dims[1], 0)
    if in_dims[2:3] in ((), (None,)):
        _ops.fused_add_rms_norm_(input, residual, weight, eps, **options)
    else:
        results, _ = _fused_add_rms_norm(info, (0, 0, in_dims[2]), input, residual, weight, eps, **options)
        input.copy_(results[0]), residual.copy_(results[1])
    return None, None


def _quant(op, tensors):
    def rule(info, in_dims, *args, **options):
        if any(dim is not None for dim in in_dims[tensors:]):
            raise NotImplementedError(f"{op.__name__}: vmap over weight or scale is not supported, only over the other tensors")
        front = (_front(t, dim, info.batch_size) for t, dim in zip(args[:tensors], in_dims))
        results = op(*front, *args[tensors:], **options)
        # What is not wanted has no elements, and no batch.
        return results, tuple(None if result.dim() == 1 and not len(result) else 0 for result in results)

    return rule


RULES = {
    "rms_norm": _rms_norm,
    "rms_norm_forward": _rms_norm_forward,
    "rms_norm_backward": _rms_norm_backward,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "fused_add_rms_norm_forward": _fused_add_rms_norm_forward,
    "fused_add_rms_norm_": _fused_add_rms_norm_,
    "rms_norm_quant": _quant(_ops.rms_norm_quant, 1),
    "fused_add_rms_norm_quant": _quant(_ops.fused_add_rms_norm_quant, 2),
}
for _name, _rule in RULES.items():
    torch.library.register_vmap(f"rmsnorm_cuda::{_name}", _rule)
