"""Batching rules of the ops under torch.func.vmap: one call for all samples, never a loop over
them.

The batched dimension goes to the front, where the kernels take any number of leading dimensions.
What each sample has of its own within a row (a weight, the gradient of one) is done in ATen ops
around the norm without a weight, in the type that the kernels compute in: as they do, it rounds
once. A rule first calls the op on _no_rows and _one, for its checks. Results are batched in front.
"""

from itertools import combinations, starmap

import torch

from .again import has_kernel
from .functional import _ops
from .reference import compute_dtype, default_eps, gain_of, output_dtype, quantize_reference


def _front(tensor, dim, size):
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one(tensor, dim):
    """The tensor as the first sample sees it."""
    if tensor is None or dim is None:
        return tensor
    samples = tensor.movedim(dim, 0)
    return samples[0] if len(samples) else samples.new_empty(samples.shape[1:])


def _no_rows(tensor, dim):
    """No rows of one sample. An op that is called on them checks and refuses what it does for a
    sample, and computes nothing.
    """
    return tensor if tensor is None else _one(tensor, dim).unsqueeze(0)[:0]


def _gain(weight, dim, lead, dtype, weight_offset=0.0, **_):
    """weight + weight_offset as (batch, 1, ..., 1, *normalized_shape), with `lead` ones."""
    gain = gain_of(weight.movedim(dim, 0), dtype, weight_offset)
    return gain.reshape(len(gain), *(1,) * lead, *gain.shape[1:])


def _unscaled(input, normalized_shape, eps, dtype, cast_before_weight=False, **_):
    """What the weight multiplies, of type `dtype`, and rstd."""
    eps = default_eps(input) if eps is None else eps
    xhat, rstd = _ops.rms_norm_forward(input.to(dtype), normalized_shape, None, eps)
    if cast_before_weight:
        xhat = xhat.to(input.dtype).to(dtype)
    return xhat, rstd.to(compute_dtype(input))


def _rms_norm_forward(info, in_dims, input, normalized_shape, weight=None, eps=None, **options):
    input_dim, _, weight_dim, *_ = *in_dims, None
    sample = _no_rows(input, input_dim)
    if input_dim is not None:
        input = input.movedim(input_dim, 0)
    if weight is None or weight_dim is None:
        return _ops.rms_norm_forward(input, normalized_shape, weight, eps, **options), (0, 0)
    _ops.rms_norm_forward(sample, normalized_shape, _one(weight, weight_dim), eps, **options)
    dtype = compute_dtype(input, weight)
    xhat, rstd = _unscaled(input, normalized_shape, eps, dtype, **options)
    lead = rstd.dim() - (input_dim is not None)
    output = xhat * _gain(weight, weight_dim, lead, dtype, **options)
    result_dtype = output_dtype(input, weight, options.get("cast_before_weight", False))
    return (output.to(result_dtype), rstd), (0, input_dim and 0)


def _rms_norm(info, in_dims, input, normalized_shape, weight=None, eps=None, **options):
    if in_dims[2:3] in ((), (None,)):
        input = input.movedim(in_dims[0], 0)
        return _ops.rms_norm(input, normalized_shape, weight, eps, **options), 0
    args = input, normalized_shape, weight, eps
    (output, _), _ = _rms_norm_forward(info, in_dims, *args, **options)
    return output, 0


def _rms_norm_backward(
    info,
    in_dims,
    grad_output,
    input,
    normalized_shape,
    weight,
    rstd,
    eps,
    output_mask,
    grad_residual=None,
    **options,
):
    dims = (*in_dims, None)
    tensors = (grad_output, dims[0]), (input, dims[1]), (rstd, dims[4]), (grad_residual, dims[7])
    dy, x, row_rstd, dsum = (_no_rows(*of) for of in tensors)
    _ops.rms_norm_backward(
        dy, x, normalized_shape, _one(weight, dims[3]), row_rstd, eps, output_mask, dsum, **options
    )
    dy, x, rstd, dsum = (_front(t, dim, info.batch_size) for t, dim in tensors)
    dtype, lead = compute_dtype(x, weight), rstd.dim() - 1
    grad_input = grad_weight = None
    if output_mask[1] and weight is not None:
        xhat, _ = _unscaled(x, normalized_shape, eps, dtype, **options)
        product = dy.to(dtype) * xhat
        grad_weight = (product.sum(tuple(range(1, 1 + lead))) if lead else product).to(weight.dtype)
    if output_mask[0]:
        if weight is not None and dims[3] is not None:
            dy = dy.to(dtype) * _gain(weight, dims[3], lead, dtype, **options)
            weight, options = None, {}
        grad_input, _ = _ops.rms_norm_backward(
            dy, x, normalized_shape, weight, rstd, eps, (True, False), dsum, **options
        )
    return (grad_input, grad_weight), (0, 0)


def _fused_add_rms_norm_forward(info, in_dims, input, residual, weight=None, eps=None, **options):
    input_dim, residual_dim, weight_dim, *_ = *in_dims, None
    sample = _no_rows(input, input_dim), _no_rows(residual, residual_dim), _one(weight, weight_dim)
    input = _front(input, input_dim, info.batch_size)
    residual = _front(residual, residual_dim, info.batch_size)
    if weight is None or weight_dim is None:
        return _ops.fused_add_rms_norm_forward(input, residual, weight, eps, **options), (0, 0, 0)
    _ops.fused_add_rms_norm_forward(*sample, eps, **options)
    dtype = compute_dtype(input)
    total = (input.to(dtype) + residual.to(dtype)).to(residual.dtype)
    args = (0, None, weight_dim), total, total.shape[-1:], weight, eps
    (output, rstd), _ = _rms_norm_forward(info, *args, **options)
    result_dtype = output_dtype(input, weight, options.get("cast_before_weight", False))
    return (output.to(result_dtype), total, rstd), (0, 0, 0)


def _fused_add_rms_norm(info, in_dims, *args, **options):
    (output, total, _), _ = _fused_add_rms_norm_forward(info, in_dims, *args, **options)
    return (output, total), (0, 0)


def _fused_add_rms_norm_(info, in_dims, input, residual, weight=None, eps=None, **options):
    if None in in_dims[:2]:
        raise RuntimeError(
            "fused_add_rms_norm_: under vmap, input and residual are overwritten by results for "
            "each sample, but one of them is not batched; use fused_add_rms_norm"
        )
    input, residual = input.movedim(in_dims[0], 0), residual.movedim(in_dims[1], 0)
    if in_dims[2:3] in ((), (None,)):
        _ops.fused_add_rms_norm_(input, residual, weight, eps, **options)
        return None, None
    sample = _no_rows(input, 0), _no_rows(residual, 0), _one(weight, in_dims[2])
    _ops.fused_add_rms_norm_(*sample, eps, **options)
    if any(starmap(torch._C._is_alias_of, combinations((input, residual, weight), 2))):
        raise RuntimeError(
            "fused_add_rms_norm_: under vmap over weight, expected input, residual and weight to "
            "have memory of their own, but two of them share theirs; use fused_add_rms_norm"
        )
    args = (0, 0, in_dims[2]), input, residual, weight, eps
    (output, total), _ = _fused_add_rms_norm(info, *args, **options)
    input.copy_(output), residual.copy_(total)
    return None, None


def _quant(op, tensors):
    def rule(info, in_dims, *args, **options):
        front = [_front(t, dim, info.batch_size) for t, dim in zip(args[:tensors], in_dims)]
        weight, scale, eps, *_ = *args[tensors:], None, None, None
        weight_dim, scale_dim, *_ = *in_dims[tensors:], None, None
        if weight_dim is None and scale_dim is None:
            results = op(*front, weight, scale, eps, **options)
        else:
            own = weight, weight_dim, scale, scale_dim
            results = _quant_by_steps(op, info, front, *own, eps, options)
        # What is not wanted has no elements, and no batch.
        return results, tuple(None if t.dim() == 1 and not len(t) else 0 for t in results)

    return rule


def _quant_by_steps(op, info, front, weight, weight_dim, scale, scale_dim, eps, options):
    """Where samples have weights or scales of their own: the norm, and then the quantization in
    ATen ops, to the same bits.
    """
    # Its checks, and the results that are not wanted; without columns neither weights nor scales
    # matter.
    sample = _one(weight, weight_dim), _one(scale, scale_dim), eps
    _, no_scale, *_, no_norm = op(*(_no_rows(t, 0) for t in front), *sample, **options)
    if not front[0].shape[-1]:
        return op(*front, *sample, **options)
    if len(front) == 1:
        rule, dims, front = _rms_norm_forward, (0, None), (*front, front[0].shape[-1:])
    else:
        rule, dims = _fused_add_rms_norm_forward, (0, 0)
    norms = {key: options[key] for key in ("weight_offset", "cast_before_weight") if key in options}
    (norm, *total, _), _ = rule(info, (*dims, weight_dim), *front, weight, eps, **norms)
    static = scale is not None
    if static:  # one number for each sample, or for all
        scale = scale if scale_dim is None else scale.movedim(scale_dim, 0)
        scale = scale.reshape(-1, *(1,) * (norm.dim() - 1))
    kind = options["dtype"], scale, options.get("block"), options.get("scale_ub")
    output, scale = quantize_reference(norm, *kind)
    if options.get("column_major"):
        scale = scale.movedim(-1, 0).contiguous().movedim(0, -1)
    norm = norm if options.get("keep_norm") else no_norm
    return output, no_scale if static else scale, *total, norm


RULES = {
    "rms_norm": _rms_norm,
    "rms_norm_forward": _rms_norm_forward,
    "rms_norm_backward": _rms_norm_backward,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "fused_add_rms_norm_forward": _fused_add_rms_norm_forward,
    "fused_add_rms_norm_": _fused_add_rms_norm_,
    "rms_norm_quant": _quant(_ops.rms_norm_quant.default, 1),
    "fused_add_rms_norm_quant": _quant(_ops.fused_add_rms_norm_quant.default, 2),
}
for _name, _rule in RULES.items():
    if not has_kernel(_name, "FuncTorchBatched"):
        torch.library.register_vmap(f"rmsnorm_cuda::{_name}", _rule)
