"""torch.func.vmap: one call for all samples, equal to a loop over them. torch's own loop is
switched off.
"""

import itertools

import pytest
import torch
from cases import OPTIONS, Calls, name, ops, pairs, random, random_weight, same_bits

from rmsnorm_cuda import (
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
from rmsnorm_cuda.reference import ulp_distance
from rmsnorm_cuda.vmap import RULES

SAMPLES, SHAPE = 3, (2, 5, 8)


@pytest.fixture(autouse=True)
def no_fallback():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def loop(function, in_dims, *args):
    slices = [
        [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
        for i in range(SAMPLES)
    ]
    results = [function(*s) for s in slices]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(None if r[0] is None else torch.stack(r) for r in zip(*results, strict=True))


def batched(tensor_shape, dim, dtype, mean=0.0):
    """Of `tensor_shape` for each sample, the samples side by side in `dim`; None: one for all."""
    if dim is None:
        return random(*tensor_shape, dtype=dtype, mean=mean)
    return random(SAMPLES, *tensor_shape, dtype=dtype, mean=mean).movedim(0, dim)


def ulps_apart(got, want):
    """Where every sample has a weight of its own, kernel and ATen share the formula: a norm rounded
    to fp32 is multiplied. That is half an ulp more before the last rounding, 1 ulp after it; a
    gradient has two such products."""
    got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert ulp_distance(a, b).max() <= (2 if a.dtype == torch.float32 else 1)


def exact(got, want):
    got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


IN_DIMS = [(0, None), (2, None), (0, 0), (1, 1), (None, 0), (3, 0)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("in_dims, dtypes, options", pairs(IN_DIMS, DTYPES, OPTIONS), ids=name)
def test_rms_norm(in_dims, dtypes, options):
    dtype, weight_dtype = dtypes
    x, weight = (
        batched(SHAPE, in_dims[0], dtype),
        batched(SHAPE[-1:], in_dims[1], weight_dtype, mean=1.0),
    )
    for op in (rms_norm, ops.rms_norm_forward):

        def function(x, weight):
            return op(x, SHAPE[-1:], weight, 1e-5, **options)  # noqa: B023

        close = exact if in_dims[1] is None else ulps_apart
        close(torch.vmap(function, in_dims)(x, weight), loop(function, in_dims, x, weight))


def test_without_weight_and_eps():
    x = random(SAMPLES, *SHAPE)
    exact(torch.vmap(lambda x: rms_norm(x, SHAPE[1:]))(x), rms_norm(x, SHAPE[1:]))


def test_several_normalized_dimensions_and_a_weight_for_each_sample():
    x, weight = random(SAMPLES, *SHAPE), random_weight((SAMPLES, *SHAPE[1:]), torch.float32)

    def function(x, weight):
        return rms_norm(x, SHAPE[1:], weight)

    ulps_apart(torch.vmap(function)(x, weight), loop(function, (0, 0), x, weight))


def test_one_row_for_each_sample():
    x, weight = random(SAMPLES, 8), random_weight((SAMPLES, 8), torch.float32)
    exact(torch.vmap(lambda x: rms_norm(x, 8))(x), rms_norm(x, 8))
    ulps_apart(
        torch.vmap(lambda x, w: rms_norm(x, 8, w))(x, weight),
        loop(lambda x, w: rms_norm(x, 8, w), (0, 0), x, weight),
    )


def test_nested():
    x, weight = random(SAMPLES, 4, 6, 8), random_weight((4, 8), torch.float32)
    got = torch.vmap(torch.vmap(lambda x, w: rms_norm(x, 8, w)), (0, None))(x, weight)
    ulps_apart(
        got, torch.stack([torch.stack([rms_norm(a, 8, w) for a, w in zip(b, weight)]) for b in x])
    )


@pytest.mark.parametrize(
    "dims, dtype, mask, options",
    pairs(
        # of weight, gradient and input
        [(None, 0, None), (None, 1, 0), (0, 0, 0), (0, None, None), (None, None, 2)],
        [torch.float32, torch.bfloat16],
        [(True, True), (True, False), (False, True)],
        OPTIONS,
    ),
    ids=name,
)
def test_backward(dims, dtype, mask, options):
    weight_dim, dy_dim, x_dim = dims
    x, dy = batched(SHAPE, x_dim, dtype), batched(SHAPE, dy_dim, dtype)
    weight, other = (
        batched(SHAPE[-1:], weight_dim, torch.float32, mean=1.0),
        batched(SHAPE, dy_dim, dtype),
    )

    def function(dy, x, weight, other):
        rstd = ops.rms_norm_forward(x, SHAPE[-1:], None, 1e-5)[1]
        return ops.rms_norm_backward(dy, x, SHAPE[-1:], weight, rstd, 1e-5, mask, other, **options)

    in_dims, args = (dy_dim, x_dim, weight_dim, dy_dim), (dy, x, weight, other)

    def wanted(*args):  # an absent gradient cannot leave vmap
        return tuple(t for t, want in zip(function(*args), mask) if want)

    got, want = torch.vmap(wanted, in_dims)(*args), loop(wanted, in_dims, *args)
    for a, b in zip(got, want, strict=True):
        # Sums of some ten terms of size 1 in other orders, and one more rounding of fp32 terms in
        # 16 bits.
        torch.testing.assert_close(
            a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=16 * torch.finfo(a.dtype).eps
        )


def test_batched_gradients_of_autograd():
    """is_grads_batched: the backward op alone is under vmap."""
    x, weight = random(4, 8).requires_grad_(), random_weight(8, torch.float32).requires_grad_()
    dy = random(SAMPLES, 4, 8)
    got = torch.autograd.grad(rms_norm(x, 8, weight), (x, weight), dy, is_grads_batched=True)
    want = loop(lambda dy: torch.autograd.grad(rms_norm(x, 8, weight), (x, weight), dy), (0,), dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "in_dims, residual_dtype, options",
    pairs(
        [(0, 0, None), (1, None, None), (None, 2, None), (0, 0, 0), (None, None, 0)],
        [torch.bfloat16, torch.float32],
        OPTIONS,
    ),
    ids=name,
)
def test_fused_add(in_dims, residual_dtype, options):
    x, residual = (
        batched(SHAPE, in_dims[0], torch.bfloat16),
        batched(SHAPE, in_dims[1], residual_dtype),
    )
    weight = batched(SHAPE[-1:], in_dims[2], torch.bfloat16, mean=1.0)
    kinds = itertools.product((fused_add_rms_norm, ops.fused_add_rms_norm_forward), (True, False))
    for op, round_sum in kinds:

        def function(x, residual, weight):
            return op(x, residual, weight, 1e-5, **options, round_sum=round_sum)  # noqa: B023

        close = exact if in_dims[2] is None else ulps_apart
        close(
            torch.vmap(function, in_dims)(x, residual, weight),
            loop(function, in_dims, x, residual, weight),
        )


@pytest.mark.parametrize("weight_dim", [None, 0])
def test_fused_add_in_place(weight_dim):
    weight = batched((8,), weight_dim, torch.float32, mean=1.0)
    x, residual = batched(SHAPE, 1, torch.float32), batched(SHAPE, 0, torch.float32)
    want = loop(fused_add_rms_norm, (1, 0, weight_dim), x, residual, weight)

    def function(*args):
        fused_add_rms_norm_(*args)
        return args[:2]

    got = torch.vmap(function, (1, 0, weight_dim))(x, residual, weight)
    for written in (got, (x.movedim(1, 0), residual)):
        (exact if weight_dim is None else ulps_apart)(written, want)


def test_fused_add_in_place_needs_both_batched():
    x, residual = random(SAMPLES, 4, 8), random(4, 8)
    before = residual.clone()
    with pytest.raises(RuntimeError, match="not batched"):
        torch.vmap(fused_add_rms_norm_, (0, None))(x, residual)
    assert same_bits(residual, before)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"block": 64, "column_major": True},
        {"scale": torch.tensor([0.05])},
        {"return_norm": True},
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_quantized(added, kind):
    x, residual = random(SAMPLES, 4, 128).bfloat16(), random(4, 128).bfloat16()
    weight = random_weight(128, torch.float32)

    def function(x, residual):
        tensors = (x, residual) if added else (x,)
        op = fused_add_rms_norm_quant if added else rms_norm_quant
        more = {"round_sum": False} if added else {}
        results = op(*tensors, weight, 1e-5, dtype=torch.int8, **kind, **more)
        return results[:1] + results[2:] if "scale" in kind else results

    got, want = torch.vmap(function, (0, None))(x, residual), loop(function, (0, None), x, residual)
    exact(got, want)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=name)
@pytest.mark.parametrize("added", [False, True])
def test_quantized_with_a_scale_for_each_sample(added, dtype):
    x, residual, weight, scales = (
        random(SAMPLES, 4, 64),
        random(4, 64),
        random_weight(64, torch.float32),
        torch.rand(SAMPLES, 1) + 0.01,
    )

    def function(x, scale):
        options = {"scale": scale, "dtype": dtype, "return_norm": True}
        q, _, *rest = (
            fused_add_rms_norm_quant(x, residual, weight, **options)
            if added
            else rms_norm_quant(x, weight, **options)
        )
        return q, *rest

    for by_scale in (scales, scales[:, 0]):
        exact(torch.vmap(function)(x, by_scale), loop(function, (0, 0), x, by_scale))


@pytest.mark.parametrize(
    "options, kind, added",
    pairs(
        OPTIONS,
        [
            {},
            {"block": 64, "column_major": True},
            {"scale": torch.tensor([0.05])},
            {"scale_ub": 1.0},
        ],
        [False, True],
    ),
    ids=name,
)
def test_quantized_with_a_weight_for_each_sample(added, kind, options):
    """Of a row whose norm has the kernel's bits, the codes and scales have them too."""
    x, residual = random(SAMPLES, 4, 128).bfloat16(), random(4, 128).bfloat16()
    weights = random_weight((SAMPLES, 128), torch.float32)

    def function(x, weight):
        tensors = (x, residual) if added else (x,)
        op = fused_add_rms_norm_quant if added else rms_norm_quant
        q, scale, *rest = op(
            *tensors, weight, 1e-5, dtype=torch.int8, return_norm=True, **kind, **options
        )
        return q, *([] if "scale" in kind else [scale]), *rest

    q, *scale, norm = (got := torch.vmap(function)(x, weights))[:1] + got[1 : -1 - added] + got[-1:]
    want = loop(function, (0, 0), x, weights)
    ulps_apart(got[1:], want[1:])
    # Off by a rounding where scale or norm is an ulp off; the sign and size of the codes are the
    # kernels'.
    assert (q.int() - want[0].int()).abs().max() <= 1 and (q != want[0]).float().mean() < 0.01
    rows = (norm == want[-1]).all(-1)
    assert rows.float().mean() > 0.7
    exact(tuple(t[rows] for t in (q, *scale)), tuple(t[rows] for t in want[: 1 + len(scale)]))
    if "column_major" in kind:
        assert scale[0].movedim(-1, 0).is_contiguous()


def test_quantized_under_vmap_refuses_as_it_does_without():
    x, weights = random(4, 8), random(SAMPLES, 8)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.vmap(lambda w: rms_norm_quant(x, w, dtype=torch.int8))(
            weights.clone().requires_grad_()
        )
    with pytest.raises(ValueError, match="expected block to be 64 or 128"):
        torch.vmap(lambda w: rms_norm_quant(x, w, dtype=torch.int8, block=2))(weights)
    with pytest.raises(RuntimeError, match="rms_norm_quant"):
        torch.vmap(lambda w: rms_norm_quant(x, w[:4], dtype=torch.int8))(weights)


W, X, ROWS = torch.rand(SAMPLES, 8), torch.randn(4, 8), torch.randn(SAMPLES, 4, 8)
# name: (function of a sample, its batched arguments, what is raised)
REFUSED = {
    "weight's shape": (
        lambda w: rms_norm(X, 8, w),
        [torch.rand(SAMPLES, 1)],
        RuntimeError,
        "expected weight to be of same shape",
    ),
    "a weight for each row": (
        lambda x, w: rms_norm(x, 8, w),
        [ROWS, torch.rand(SAMPLES, 4, 8)],
        RuntimeError,
        "expected weight to be",
    ),
    "a number": (
        lambda w: rms_norm(X, 8, w),
        [torch.rand(SAMPLES)],
        RuntimeError,
        "expected weight to be of same shape",
    ),
    "weight's dtype": (
        lambda w: rms_norm(X, 8, w),
        [torch.ones(SAMPLES, 8, dtype=torch.int64)],
        NotImplementedError,
        "'Long'",
    ),
    "weight_offset": (
        lambda w: rms_norm(X, 8, w, weight_offset=float("nan")),
        [W],
        ValueError,
        "weight_offset",
    ),
    "input's shape": (
        lambda w: rms_norm(X[:, :4], 8, w),
        [W],
        RuntimeError,
        "given normalized_shape",
    ),
    "residual's shape": (
        lambda w: fused_add_rms_norm(X, X[:1], w),
        [W],
        RuntimeError,
        "expected residual of input's shape",
    ),
    "residual's dtype": (
        lambda w: fused_add_rms_norm(X, X.half(), w),
        [W],
        RuntimeError,
        "expected residual of input's dtype",
    ),
    "fused, weight": (
        lambda w: fused_add_rms_norm(X, X, w),
        [torch.rand(SAMPLES, 1, 8)],
        RuntimeError,
        "expected weight to be",
    ),
    "narrower result": (
        lambda x, r, w: fused_add_rms_norm_(x, r, w, cast_before_weight=True),
        [ROWS.bfloat16(), ROWS.bfloat16(), W],
        RuntimeError,
        "cannot take the place of input",
    ),
    "gradient's shape": (
        lambda dy, w: ops.rms_norm_backward(dy, X, [8], w, torch.ones(4), None, (False, True)),
        [torch.randn(SAMPLES, 1, 8), W],
        RuntimeError,
        "expected grad_output of shape",
    ),
    "backward, weight": (
        lambda w: ops.rms_norm_backward(X, X, [8], w, torch.ones(4), None, (True, True)),
        [torch.rand(SAMPLES, 1)],
        RuntimeError,
        "expected weight to be",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_as_it_does_without(what):
    function, batches, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        function(*(t[0] for t in batches))
    with pytest.raises(error, match=message):
        torch.vmap(function)(*batches)


def test_no_samples():
    x, weights = torch.randn(4, 8), torch.empty(0, 8)
    assert torch.vmap(lambda w: rms_norm(x, 8, w))(weights).shape == (0, 4, 8)
    assert torch.vmap(lambda w: fused_add_rms_norm(x, x, w)[0])(weights).shape == (0, 4, 8)


def test_in_place_over_shared_memory_is_refused():
    x = torch.randn(SAMPLES, 4, 8)
    for tensors in ((x, x, W.clone()), (x, torch.randn(SAMPLES, 4, 8), x[:, 0])):
        before = [t.clone() for t in tensors]
        with pytest.raises(RuntimeError, match="memory of their own"):
            torch.vmap(lambda *args: (fused_add_rms_norm_(*args), args[0])[1])(*tensors)
        exact(tensors, tuple(before))


@pytest.mark.parametrize("kind", [{}, {"column_major": True, "block": 64}, {"return_norm": True}])
def test_quantized_without_columns(kind):
    x, weights = torch.empty(4, 0), torch.empty(SAMPLES, 0)
    exact(
        torch.vmap(lambda w: rms_norm_quant(x, w, dtype=torch.int8, **kind))(weights),
        loop(lambda w: rms_norm_quant(x, w, dtype=torch.int8, **kind), (0,), weights),
    )


def test_per_sample_gradients():
    """Of the weight, as for differential privacy, by functional_call on a module."""
    from rmsnorm_cuda import RMSNorm

    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), RMSNorm(16), torch.nn.Linear(16, 2)
    ).double()
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    x, target = random(SAMPLES, 8, dtype=torch.float64), random(SAMPLES, 2, dtype=torch.float64)

    def loss(parameters, x, target):
        return (torch.func.functional_call(model, parameters, (x,)) - target).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    for i in range(SAMPLES):
        want = torch.autograd.grad(
            loss(dict(model.named_parameters()), x[i], target[i]), list(model.parameters())
        )
        for key, w in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[key][i], w, rtol=1e-11, atol=1e-12)


def test_ensemble_in_training():
    """The leaves are outside, under plain autograd: stacked weights of several models."""
    x, weights = (
        random(4, 8, dtype=torch.float64),
        random_weight((SAMPLES, 8), torch.float64).requires_grad_(),
    )

    def losses(function):
        return function(lambda w: rms_norm(x, 8, w, 1e-5).square().sum())

    got = torch.autograd.grad(losses(lambda f: torch.vmap(f)(weights)).sum(), weights)
    want = torch.autograd.grad(
        losses(lambda f: torch.stack([f(w) for w in weights])).sum(), weights
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_the_kernel_runs_once():
    x, weights = random(SAMPLES, 4, 8), random_weight((SAMPLES, 8), torch.float32)
    with Calls() as calls:
        torch.vmap(lambda x: rms_norm(x, 8, weights[0]))(x)
        torch.vmap(lambda x, w: fused_add_rms_norm(x, x, w))(x, weights)
        torch.vmap(lambda x, w: rms_norm_quant(x, w, dtype=torch.int8)[0])(x, weights)
        torch.vmap(lambda x, r: (fused_add_rms_norm_(x, r), x)[1])(x, x.clone())
        torch.vmap(
            lambda dy, x: ops.rms_norm_backward(
                dy, x, [8], weights[0], x[:, 0], None, (True, False)
            )[0]
        )(x, x)
    forward = ops.rms_norm_forward.default
    assert calls.ours == [
        ops.rms_norm.default,
        forward,
        forward,
        ops.fused_add_rms_norm_.default,
        ops.rms_norm_backward.default,
    ]


def test_compiled():
    x, weights = random(SAMPLES, 4, 8), random_weight((SAMPLES, 8), torch.float32)

    def function(x, weights):
        return torch.vmap(lambda x, w: rms_norm(x, 8, w))(x, weights), torch.vmap(
            lambda x: rms_norm(x, 8)
        )(x)

    torch._dynamo.reset()
    ulps_apart(
        torch.compile(function, fullgraph=True, backend="aot_eager")(x, weights),
        function(x, weights),
    )


def test_every_op_but_those_with_out_has_a_rule():
    names = {
        op.removeprefix("rmsnorm_cuda::")
        for op in torch._C._dispatch_get_all_op_names()
        if op.startswith("rmsnorm_cuda::")
    }
    assert {op for op in names if "." not in op and not op.endswith("_formula")} == set(RULES)
    with pytest.raises(RuntimeError, match="vmap|[Bb]atching"):
        torch.vmap(lambda x, out: rms_norm(x, 8, out=out))(
            random(SAMPLES, 4, 8), random(SAMPLES, 4, 8)
        )


# -------------------------------------------------------------------------------------- sandwich

SANDWICH_DIMS = [
    (0, 0, None, None),
    (1, 0, None, None),
    (0, None, None, None),
    (None, 1, None, None),
    (0, 0, 0, None),
    (None, 0, None, 0),
    (None, None, 0, 1),
]


@pytest.mark.parametrize("in_dims", SANDWICH_DIMS)
@pytest.mark.parametrize("how", [{}, {"weight_offset": 1.0}, {"cast_before_weight": True}])
def test_sandwich(in_dims, how):
    """Forward, gradients for each sample, and in place."""
    shapes = (2, 5, 8), (2, 5, 8), (8,), (8,)
    args = [batched(s, dim, torch.float32) for s, dim in zip(shapes, in_dims)]

    def pair(x, residual, v, w):
        return rms_norm_add_rms_norm(x, residual, v, w, 1e-5, scale=0.5, **how)

    def forward(x, residual, v, w):
        return ops.rms_norm_add_rms_norm_forward(x, residual, v, w, 1e-5, **how)

    def add(x, residual, v, w):
        return rms_norm_add(x, residual, v, 1e-5, **how), *ops.rms_norm_add_forward(x, residual, v)

    def in_place(x, residual, v, w):
        x, residual = x.clone(), residual.clone()
        rms_norm_add_rms_norm_(x, residual, v, w, 1e-5, **how)
        return x, residual

    each = [pair, forward]
    each += [add] if any(dim is not None for dim in in_dims[:3]) else []
    each += [in_place] if None not in in_dims[:2] else []
    for function in each:
        got, want = torch.vmap(function, in_dims)(*args), loop(function, in_dims, *args)
        if in_dims[2:] == (None, None):
            exact(got, want)
        else:  # the formula's roundings, of sums and norms of size 1
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def gradients(*args):
        loss = lambda *args: sum(t.sin().sum() for t in pair(*args))  # noqa: E731
        return torch.func.grad(loss, (0, 1, 2, 3))(*args)

    got, want = torch.vmap(gradients, in_dims)(*args), loop(gradients, in_dims, *args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sandwich_refusals():
    x, w = random(3, 2, 8), random(3, 8)
    with pytest.raises(RuntimeError, match="one of them is not batched"):
        torch.vmap(lambda x: rms_norm_add_rms_norm_(x, torch.ones(2, 8), None, None))(x)
    with pytest.raises(RuntimeError, match="two of them share theirs"):
        torch.vmap(lambda x, r, v, w: rms_norm_add_rms_norm_(x, r, v, w))(x, x.clone(), w, w)
    with pytest.raises(RuntimeError, match="input_weight of shape"):
        torch.vmap(lambda x, v: rms_norm_add_rms_norm(x, x, v, None))(x, random(3, 9))
    with pytest.raises(RuntimeError, match="input_weight of shape"):
        torch.vmap(lambda x, r, v: rms_norm_add_rms_norm_(x, r, v, None))(
            x, x.clone(), random(3, 9)
        )


# ------------------------------------------------------------------------------------------- rope

# of q, k, q_weight, k_weight and the angles
GATED_DIMS = [(0, 0, None), (1, 0, None), (0, None, None), (None, 1, None), (0, 0, 0), (None, 0, 0)]
GATED_KINDS = [
    {},
    {"norm_before_gate": False, "group_size": 4},
    {"activation": "sigmoid", "group_size": 2},
    {"norm_before_gate": False, "cast_before_weight": True},
]


@pytest.mark.parametrize("in_dims", GATED_DIMS)
@pytest.mark.parametrize("how", GATED_KINDS)
def test_gated(in_dims, how):
    """Forward, gradients for each sample, and the backward op."""
    args = [batched(s, dim, torch.float32) for s, dim in zip(((2, 5, 8), (2, 5, 8), (8,)), in_dims)]

    def function(x, gate, w):
        return (rms_norm_gated(x, gate, w, 1e-5, **how),)

    def forward(x, gate, w):
        return ops.rms_norm_gated_forward(x, gate, w, 1e-5, **how)

    close = exact if in_dims[2] is None else ulps_apart_of_rotated
    for each in (function, forward):
        close(torch.vmap(each, in_dims)(*args), loop(each, in_dims, *args))

    def loss(*args):
        return (function(*args)[0].square() * torch.arange(8)).sum()

    def gradients(*args):
        return torch.func.grad(loss, (0, 1, 2))(*args)

    def backward(x, gate, w, mask):
        y, rstd = ops.rms_norm_gated_forward(x, gate, w, 1e-5, **how)
        grads = ops.rms_norm_gated_backward(y, x, gate, w, rstd, 1e-5, mask, **how)
        return tuple(g for g in grads if g is not None)

    masks = [True] * 3, [True, True, False], [False, True, False]
    for mask in (None, *masks):
        each = gradients if mask is None else lambda *args: backward(*args, mask)  # noqa: B023
        got, want = torch.vmap(each, in_dims)(*args), loop(each, in_dims, *args)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("in_dims", GATED_DIMS)
@pytest.mark.parametrize("how", GATED_KINDS)
@pytest.mark.parametrize("kind", [{}, {"block": 64, "column_major": True}])
def test_gated_in_8_bits(in_dims, how, kind):
    shapes = zip(((2, 5, 128), (2, 5, 128), (128,)), in_dims)
    args = [batched(shape, dim, torch.float32) for shape, dim in shapes]

    def function(x, gate, w):
        options = {"dtype": torch.int8, "return_norm": True} | kind | how
        return rms_norm_gated_quant(x, gate, w, 1e-5, **options)

    got, want = torch.vmap(function, in_dims)(*args), loop(function, in_dims, *args)
    if in_dims[2] is None:
        return exact(got, want)
    ulps_apart_of_rotated(got[1:], want[1:])
    assert (got[0].int() - want[0].int()).abs().max() <= 1


@pytest.mark.parametrize("has_gate", [True, False])
def test_gated_with_a_scale_for_each_sample(has_gate):
    x, gate, scales = random(4, 64), random(4, 64), torch.rand(SAMPLES) + 0.01

    def function(scale):
        tensors = x, gate if has_gate else None
        return rms_norm_gated_quant(*tensors, scale=scale, dtype=torch.int8, group_size=16)[:1]

    exact(torch.vmap(function)(scales), loop(function, (0,), scales))


def test_groups_without_a_gate():
    x, w = batched((5, 8), 0, torch.float32), random(8)

    def function(x):
        return (rms_norm(x, 8, w, 1e-5, group_size=4),)

    exact(torch.vmap(function)(x), loop(function, (0,), x))


ROPE_DIMS = [
    (0, 0, None, None, None),
    (1, 0, None, None, 0),
    (0, None, None, None, 1),
    (None, 0, 0, None, None),
    (2, 1, None, 1, 0),
    (None, None, None, None, 0),
    (None, None, 0, 0, None),
]
ROPE_KINDS = [((8,), -2), ((4, 8), -3), ((32,), -2), ((32,), -3), ((4, 8), -2)]


@pytest.mark.parametrize("in_dims, kind, options", pairs(ROPE_DIMS, ROPE_KINDS, OPTIONS), ids=name)
def test_rope(in_dims, kind, options):
    """Forward, gradients for each sample, the backward op, and in place."""
    weight_shape, heads_dim = kind
    shapes = [(2, 5, n, 8) if heads_dim == -2 else (2, n, 5, 8) for n in (4, 2)]
    shapes += [weight_shape, (8,), (5, 3)]
    args = [batched(s, dim, torch.float32) for s, dim in zip(shapes, in_dims)]
    how = {"heads_dim": heads_dim, "interleaved": True} | options

    def function(q, k, w, v, a):
        return rms_norm_rope(q, k, w, v, a.cos(), a.sin(), 1e-5, **how)

    def forward(q, k, w, v, a):
        return ops.rms_norm_rope_forward(q, k, w, v, a.cos(), a.sin(), None, 1e-5, **how)

    close = exact if in_dims[2:4] == (None, None) else ulps_apart_of_rotated
    for each in (function, forward):
        close(torch.vmap(each, in_dims)(*args), loop(each, in_dims, *args))

    def loss(*args):
        return sum((t.square() * torch.arange(8)).sum() for t in function(*args))

    def gradients(*args):
        return torch.func.grad(loss, (0, 1, 2, 3))(*args)

    got, want = torch.vmap(gradients, in_dims)(*args), loop(gradients, in_dims, *args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    def backward(q, k, w, v, a, mask):
        tensors = q, k, w, v, a.cos(), a.sin(), None
        y, z, *rstd = ops.rms_norm_rope_forward(*tensors, 1e-5, **how)
        grads = ops.rms_norm_rope_backward(y, z, *tensors, *rstd, 1e-5, mask, **how)
        return tuple(g for g in grads if g is not None)

    for mask in ([True] * 4, [True, True, False, False], [True, False, False, True]):
        of = lambda *args: backward(*args, mask)  # noqa: B023, E731
        for a, b in zip(torch.vmap(of, in_dims)(*args), loop(of, in_dims, *args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    def in_place(q, k, w, v, a):
        rms_norm_rope_(q, k, w, v, a.cos(), a.sin(), 1e-5, **how)
        return q.clone(), k.clone()

    if None in in_dims[:2]:
        with pytest.raises(RuntimeError, match="one of them is not batched; use rms_norm_rope"):
            torch.vmap(in_place, in_dims)(*args)
    elif weight_shape != (32,) or heads_dim == -2:
        want = loop(function, in_dims, *args)
        args[:2] = [t.clone() for t in args[:2]]
        close(torch.vmap(in_place, in_dims)(*args), want)


def ulps_apart_of_rotated(got, want):
    """As above; a difference of two products is as far off as these are."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=2e-6)


@pytest.mark.parametrize("dims", [(0, 0, None), (0, None, None), (None, 0, None), (0, 0, 0)])
@pytest.mark.parametrize("sections", [None, [1, 3]])
def test_rope_of_a_cache(dims, sections):
    axes = () if sections is None else (2,)
    q, cache = batched((5, 4, 8), dims[0], torch.float32), batched((11, 4), dims[2], torch.float32)
    samples = () if dims[1] is None else (SAMPLES,)
    positions = torch.randint(0, 11, (*samples, *axes, 5))

    def function(q, positions, cache):
        angles = cache.cos(), cache.sin()
        how = {"positions": positions, "sections": sections}
        return rms_norm_rope(q, None, None, None, *angles, 1e-5, **how)[:1]

    got = torch.vmap(function, dims)(q, positions, cache)
    want = loop(function, dims, q, positions, cache)
    (exact if dims[2] is None else ulps_apart_of_rotated)(got, want)


def test_rope_in_place_of_weights_for_each_sample_that_share_memory():
    both = random(SAMPLES, 5, 6, 8)
    q, k = both[:, :, :4], both[:, :, 4:]
    angle = random(5, 4)

    def function(q, k, w):
        rms_norm_rope_(q, k, w, None, angle.cos(), angle.sin())

    with pytest.raises(RuntimeError, match="two of them share theirs; use rms_norm_rope"):
        torch.vmap(function)(q, k, random(SAMPLES, 8))
