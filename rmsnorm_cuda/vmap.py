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


def _fused_add_rms_norm_forward(
    info, in_dims, input, residual, weight=None, eps=None, *, round_sum=True, **options
):
    input_dim, residual_dim, weight_dim, *_ = *in_dims, None
    sample = _no_rows(input, input_dim), _no_rows(residual, residual_dim), _one(weight, weight_dim)
    input = _front(input, input_dim, info.batch_size)
    residual = _front(residual, residual_dim, info.batch_size)
    if weight is None or weight_dim is None:
        args = input, residual, weight, eps
        results = _ops.fused_add_rms_norm_forward(*args, round_sum=round_sum, **options)
        return results, (0, 0, 0)
    _ops.fused_add_rms_norm_forward(*sample, eps, round_sum=round_sum, **options)
    dtype, casts = compute_dtype(input), options.get("cast_before_weight", False)
    total = input.to(dtype) + residual.to(dtype)
    rounded, shape = total.to(residual.dtype), total.shape[-1:]
    if round_sum or not casts:
        args = (0, None, weight_dim), rounded if round_sum else total, shape, weight, eps
        (output, rstd), _ = _rms_norm_forward(info, *args, **options)
    else:  # to the residual's dtype, not the total's
        dtype = compute_dtype(total, weight)
        xhat, rstd = _unscaled(total, shape, eps, dtype)
        gain = _gain(weight, weight_dim, rstd.dim() - 1, dtype, **options)
        output = xhat.to(residual.dtype).to(dtype) * gain
    return (output.to(output_dtype(input, weight, casts)), rounded, rstd), (0, 0, 0)


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
    """Of an op whose first so many tensors are input, and a residual or a gate."""

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
    elif op is _ops.rms_norm_gated_quant.default:
        rule, dims = _gated("rms_norm_gated_forward"), (0, None if front[1] is None else 0)
    else:
        rule, dims = _fused_add_rms_norm_forward, (0, 0)
    names = "weight_offset", "cast_before_weight", "round_sum", "activation", "norm_before_gate"
    norms = {key: options[key] for key in (*names, "group_size") if key in options}
    results, (of_norm, *_) = rule(info, (*dims, weight_dim), *front, weight, eps, **norms)
    norm, *total, _ = results
    norm = norm.movedim(of_norm, 0)
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


def _by_formula(formula, in_dims, args, options):
    """(results, where each has the samples) of a formula, whose ATen ops have batching rules of
    their own. (torch.vmap() cannot begin within a rule.)
    """
    level = torch._C._functorch.peek_interpreter_stack().level()
    args = [
        torch._C._functorch._add_batch_dim(arg, dim, level) if isinstance(dim, int) else arg
        for arg, dim in zip(args, in_dims)
    ]
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    batched = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    with torch._C._ForceDispatchKeyGuard(keys[0], keys[1] - batched):
        # Past the dispatcher, which would look for a batching rule of the formula.
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        results = formula._op_dk(key, *args, **options)
    unwrap = torch._C._functorch._unwrap_batched
    if isinstance(results, torch.Tensor):
        return unwrap(results, level)
    return tuple(zip(*((r, None) if r is None else unwrap(r, level) for r in results)))


def _before(tensor, dim, dims, axes, size):
    """Samples in front of the `dims` last dimensions, of which some may be missing, and behind
    those of axes.
    """
    tensor = _front(tensor, dim, size)
    ones = (1,) * (axes + dims + 1 - tensor.dim())
    shape = *tensor.shape[: axes + 1], *ones, *tensor.shape[axes + 1 :]
    return tensor.reshape(shape).movedim(0, axes)


def _rope_args(info, in_dims, args, options, grads=0):
    """(args, dims, whether it is the formula's turn) of an op whose arguments are so many
    gradients, and then q, k, their weights, cos, sin and positions. The formula: where samples have
    weights or a cache of their own, or each asks for its gradient of a weight. Else samples are in
    front.
    """
    dims = [*in_dims, *(None,) * (len(args) - len(in_dims))]
    args, size = list(args), info.batch_size
    q, k, q_weight, k_weight, cos, sin, positions = range(grads, grads + 7)
    while len(args) <= positions:
        args.append(None), dims.append(None)
    has_cache, own_angles = args[positions] is not None, (dims[cos], dims[sin]) != (None, None)
    own_weights = (dims[q_weight], dims[k_weight]) != (None, None)
    if own_weights or (has_cache and own_angles) or (grads and any(args[grads + 10][2:])):
        return args, dims, True
    axes = 0 if options.get("sections") is None else 1
    tokens = args[q].dim() - (dims[q] is not None) - 2
    if own_angles:
        for i in (cos, sin):
            args[i] = _before(args[i], dims[i], tokens + 1, axes, size)
    if dims[positions] is not None:
        args[positions] = _before(args[positions], dims[positions], tokens, axes, size)
    for i in (*range(grads), q, k):
        args[i] = _front(args[i], dims[i], size)
    if grads:
        for i, weight in ((positions + 1, q_weight), (positions + 2, k_weight)):
            if args[k] is not None or weight == q_weight:
                args[i] = _front(args[i], dims[i], size).movedim(0, _rstd_dim(args[weight]))
            elif dims[i] is not None:
                args[i] = _one(args[i], dims[i])
    return args, dims, False


def _rstd_dim(weight):
    """Where the samples are: the rows of heads with weights of their own begin with the heads."""
    return 1 if weight is not None and weight.dim() == 2 else 0


def _rope(name, returns_rstd=False, grads=0):
    op, formula = (getattr(_ops, n).default for n in (name, f"{name}_formula"))

    def rule(info, in_dims, *args, **options):
        args, dims, by_formula = _rope_args(info, in_dims, args, options, grads)
        if by_formula:
            return _by_formula(formula, dims, args, options)
        results = op(*args, **options)
        out_dims = [0] * len(results)
        if returns_rstd:
            out_dims[2:] = [_rstd_dim(args[2]), _rstd_dim(args[3])]
        if not grads and args[1] is None:  # results of k have no elements, and no batch
            no_k = [args[0].new_empty(0, dtype=r.dtype) for r in results]
            results = [r if i % 2 == 0 else no_k[i] for i, r in enumerate(results)]
            out_dims[1::2] = [None] * (len(results) // 2)
        return tuple(results), tuple(out_dims)

    return rule


def _rms_norm_rope_(info, in_dims, *args, **options):
    k = args[1]
    if in_dims[0] is None or (k is not None and in_dims[1] is None):
        raise RuntimeError(
            "rms_norm_rope_: under vmap, q and k are overwritten by results for each sample, but "
            "one of them is not batched; use rms_norm_rope"
        )
    given, dims, by_formula = _rope_args(info, in_dims, args, options)
    if not by_formula:
        _ops.rms_norm_rope_(*given, **options)
        return None, None
    sample = [_no_rows(t, dim) for t, dim in zip(args[:2], dims)]
    _ops.rms_norm_rope_(*sample, *map(_one, given[2:], dims[2:]), **options)
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    if any(starmap(torch._C._is_alias_of, combinations(tensors, 2))):
        raise RuntimeError(
            "rms_norm_rope_: under vmap over weights or a cache, expected all tensors to have "
            "memory of their own, but two of them share theirs; use rms_norm_rope"
        )
    results, of = _by_formula(_ops.rms_norm_rope_formula.default, dims, given, options)
    for t, dim, result, result_dim in zip(args[:2], dims, results, of):
        if t is not None:
            t.movedim(dim, 0).copy_(result.movedim(result_dim, 0))
    return None, None


def _gated(name, grads=0):
    """Of an op whose arguments are so many gradients, and then input, gate and weight. Where
    samples have weights of their own, or each asks for its gradient of the weight, the formula.
    """
    op, formula = (getattr(_ops, n).default for n in (name, f"{name}_formula"))

    def rule(info, in_dims, *args, **options):
        input, gate, weight, rstd, mask = grads, grads + 1, grads + 2, 4, 6
        missing = (None,) * max(0, weight + 1 - len(args))
        args = [*args, *missing]
        dims = [*in_dims, *(None,) * (len(args) - len(in_dims))]
        if dims[weight] is not None or (grads and args[mask][2]):
            return _by_formula(formula, dims, args, options)
        of_rstd = 0 if options.get("group_size") is None else 1  # behind the groups
        for i in (*range(grads), input, gate):
            args[i] = _front(args[i], dims[i], info.batch_size)
        if grads:
            args[rstd] = _front(args[rstd], dims[rstd], info.batch_size).movedim(0, of_rstd)
        results = op(*args, **options)
        if isinstance(results, torch.Tensor):
            return results, 0
        return results, (0, 0, 0) if grads else (0, of_rstd)

    return rule


def _added(name, weights):
    """Of an op whose arguments are input, residual and so many weights. Where samples have weights
    of their own, the formula.
    """
    op, formula = (getattr(_ops, n).default for n in (name, f"{name}_formula"))

    def rule(info, in_dims, *args, **options):
        dims = [*in_dims, *(None,) * (len(args) - len(in_dims))]
        if any(dim is not None for dim in dims[2 : 2 + weights]):
            return _by_formula(formula, dims, args, options)
        front = (_front(t, dim, info.batch_size) for t, dim in zip(args[:2], dims))
        results = op(*front, *args[2:], **options)
        return results, 0 if isinstance(results, torch.Tensor) else (0,) * len(results)

    return rule


def _rms_norm_add_rms_norm_(info, in_dims, *args, **options):
    if None in in_dims[:2]:
        raise RuntimeError(
            "rms_norm_add_rms_norm_: under vmap, input and residual are overwritten by results for "
            "each sample, but one of them is not batched; use rms_norm_add_rms_norm"
        )
    input, residual = (t.movedim(dim, 0) for t, dim in zip(args, in_dims[:2]))
    if in_dims[2] is None and in_dims[3] is None:
        _ops.rms_norm_add_rms_norm_(input, residual, *args[2:], **options)
        return None, None
    sample = _no_rows(input, 0), _no_rows(residual, 0), *map(_one, args[2:4], in_dims[2:4])
    _ops.rms_norm_add_rms_norm_(*sample, *args[4:], **options)
    tensors = [t for t in (input, residual, *args[2:4]) if t is not None]
    if any(starmap(torch._C._is_alias_of, combinations(tensors, 2))):
        raise RuntimeError(
            "rms_norm_add_rms_norm_: under vmap over weights, expected all tensors to have memory "
            "of their own, but two of them share theirs; use rms_norm_add_rms_norm"
        )
    given = input, residual, *args[2:]
    dims = 0, 0, *in_dims[2:], *(None,) * (len(args) - len(in_dims))
    results, of = _by_formula(_ops.rms_norm_add_rms_norm_formula.default, dims, given, options)
    for t, result, dim in zip((input, residual), results, of):
        t.copy_(result.movedim(dim, 0))
    return None, None


RULES = {
    "rms_norm": _rms_norm,
    "rms_norm_forward": _rms_norm_forward,
    "rms_norm_backward": _rms_norm_backward,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "fused_add_rms_norm_forward": _fused_add_rms_norm_forward,
    "fused_add_rms_norm_": _fused_add_rms_norm_,
    "rms_norm_add": _added("rms_norm_add", 1),
    "rms_norm_add_forward": _added("rms_norm_add_forward", 1),
    "rms_norm_add_rms_norm": _added("rms_norm_add_rms_norm", 2),
    "rms_norm_add_rms_norm_forward": _added("rms_norm_add_rms_norm_forward", 2),
    "rms_norm_add_rms_norm_": _rms_norm_add_rms_norm_,
    "rms_norm_gated": _gated("rms_norm_gated"),
    "rms_norm_gated_forward": _gated("rms_norm_gated_forward"),
    "rms_norm_gated_backward": _gated("rms_norm_gated_backward", grads=1),
    "rms_norm_rope": _rope("rms_norm_rope"),
    "rms_norm_rope_forward": _rope("rms_norm_rope_forward", returns_rstd=True),
    "rms_norm_rope_backward": _rope("rms_norm_rope_backward", grads=2),
    "rms_norm_rope_": _rms_norm_rope_,
    "rms_norm_quant": _quant(_ops.rms_norm_quant.default, 1),
    "fused_add_rms_norm_quant": _quant(_ops.fused_add_rms_norm_quant.default, 2),
    "rms_norm_gated_quant": _quant(_ops.rms_norm_gated_quant.default, 2),
}
for _name, _rule in RULES.items():
    if not has_kernel(_name, "FuncTorchBatched"):
        torch.library.register_vmap(f"rmsnorm_cuda::{_name}", _rule)
