"""Derivatives of every kind, of any order, in any nesting, against the formula in ATen ops."""

import pytest
import torch
from cases import GEMMA, LLAMA, formula, name, ops, random, random_weight, same_bits
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from rmsnorm_cuda import fused_add_rms_norm, rms_norm
from rmsnorm_cuda.reference import rms_norm_backward_reference, rms_norm_reference

SHAPE = (
    2,
    3,
)  # the normalized one; in fp64 cast_before_weight rounds nothing, and has a derivative
VARIANTS = {
    "weight": ({}, True),
    "no weight": ({}, False),
    "offset": (GEMMA, True),
    "cast": (LLAMA, True),
    "no weight, cast": (LLAMA, False),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def case(request):
    """(ours, formula, fp64 arguments): functions of x, or of x and weight."""
    options, weighted = request.param
    x = random(4, *SHAPE, dtype=torch.float64)
    args = (x, random_weight(SHAPE, torch.float64)) if weighted else (x,)

    def close_over(function):
        return lambda x, weight=None: function(x, SHAPE, weight, 1e-3, **options)

    return close_over(rms_norm), close_over(formula), args


def leaves(args):
    return tuple(t.clone().requires_grad_() for t in args)


def close(a, b, what=""):
    torch.testing.assert_close(
        a, b, rtol=1e-11, atol=1e-12, msg=lambda message: f"{what} {message}"
    )


def test_gradcheck(case):
    ours, _, args = case
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(ours, leaves(args), check_forward_ad=True, **batched)


def test_gradgradcheck(case):
    ours, _, args = case
    assert gradgradcheck(ours, leaves(args), check_fwd_over_rev=True, check_rev_over_rev=True)


def raw_ops():
    """{id: (function of fp64 tensors, those tensors)} of the ops beside rms_norm, each with every
    option.
    """
    x, residual, dy, weight = (random(3, 5, dtype=torch.float64) for _ in range(4))
    weight = weight[0] + 1
    rstd = ops.rms_norm_forward(x, (5,), None, 1e-3)[1]
    cases = {}
    for key, options in {"plain": {}, "offset": GEMMA, "cast": LLAMA}.items():

        def bind(op, *rest, options=options, results=slice(None)):
            return lambda *tensors: op(*tensors, *rest, 1e-3, **options)[results]

        def backward(mask, options=options):
            def function(dy, x, weight=None, grad_residual=None):
                # Where a gradient is recorded, rstd is found again from x: the derivative is that
                # of the whole.
                results = ops.rms_norm_backward(
                    dy, x, (5,), weight, rstd, 1e-3, mask, grad_residual, **options
                )
                return tuple(r for r, want in zip(results, mask) if want)

            return function

        cases |= {
            f"forward-{key}": (
                lambda x, w, f=options: ops.rms_norm_forward(x, (5,), w, 1e-3, **f)[0],
                (x, weight),
            ),
            f"fused-{key}": (bind(fused_add_rms_norm), (x, residual, weight)),
            f"fused without weight-{key}": (bind(fused_add_rms_norm, None), (x, residual)),
            f"fused forward-{key}": (
                bind(ops.fused_add_rms_norm_forward, results=slice(2)),
                (x, residual, weight),
            ),
            f"backward-{key}": (backward((True, True)), (dy, x, weight, residual)),
            f"backward, dx only-{key}": (backward((True, False)), (dy, x)),
        }
    return cases


RAW = raw_ops()


@pytest.mark.parametrize("function, args", RAW.values(), ids=RAW)
def test_gradcheck_of_every_op(function, args):
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, leaves(args), check_forward_ad=True, **batched)
    assert gradgradcheck(function, leaves(args), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_double_backward(case):
    ours, want, args = case
    dy, ddx = (
        random(4, *SHAPE, dtype=torch.float64).requires_grad_(),
        random(4, *SHAPE, dtype=torch.float64),
    )

    def second(function):
        inputs = leaves(args)
        (dx,) = torch.autograd.grad(function(*inputs), inputs[:1], dy, create_graph=True)
        return torch.autograd.grad(dx, (*inputs, dy), ddx)

    close(second(ours), second(want))


def test_third_derivative():
    def third(function):
        x = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64, requires_grad=True)
        value = function(x, (3,), None, 1e-3)[0, 0]
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad[0, 0]
        return value.detach()

    close(third(rms_norm), third(formula))


def test_functorch(case):
    """grad, vjp, jvp, hessian, vmap, vmap of grad, jacrev, jacfwd and compositions."""
    ours, want, args = case
    probe, tangents = (
        random(4, *SHAPE, dtype=torch.float64),
        tuple(torch.randn_like(t) for t in args),
    )
    argnums = tuple(range(len(args)))
    func = torch.func

    def loss(f):
        return lambda *args: (f(*args) * probe[: len(args[0])]).sum()

    def per_row(f):
        return lambda x, *weight: (f(x.unsqueeze(0), *weight) * probe[0]).sum()

    in_dims = (0,) + (None,) * (len(args) - 1)
    transforms = {
        "grad": lambda f: func.grad(loss(f), argnums)(*args),
        "vjp": lambda f: func.vjp(f, *args)[1](probe),
        "jvp": lambda f: func.jvp(f, args, tangents),
        "hessian": lambda f: func.hessian(loss(f), argnums)(*args),
        "jacrev": lambda f: func.jacrev(f, argnums)(*args),
        "jacfwd": lambda f: func.jacfwd(f, argnums)(*args),
        "vmap": lambda f: func.vmap(f, in_dims)(args[0], *args[1:]),
        "vmap of grad": lambda f: func.vmap(func.grad(per_row(f), argnums), in_dims)(*args),
        "grad of vmap": lambda f: func.grad(
            lambda *a: func.vmap(per_row(f), in_dims)(*a).sum(), argnums
        )(*args),
        "jvp of grad": lambda f: func.jvp(
            lambda *a: func.grad(loss(f), argnums)(*a), args, tangents
        ),
    }
    for kind, transform in transforms.items():
        close(transform(ours), transform(want), kind)


def test_vmap_over_weights():
    """An ensemble: a weight per member, with one input and with an input per member."""
    x, weights = random(3, 5, 6, dtype=torch.float64), random_weight((3, 6), torch.float64)
    for in_dims, inputs in (((0, 0), x), ((None, 0), x[0])):
        got = torch.func.vmap(lambda x, w: rms_norm(x, 6, w), in_dims)(inputs, weights)
        close(got, torch.func.vmap(lambda x, w: formula(x, (6,), w), in_dims)(inputs, weights))


def test_forward_mode(case):
    ours, want, args = case
    tangents = tuple(torch.randn_like(t) for t in args)

    def tangent(function):
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(*pair) for pair in zip(args, tangents, strict=True))
            return tuple(t.clone() for t in forward_ad.unpack_dual(function(*duals)))

    close(tangent(ours), tangent(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_transforms_of_narrow_types(dtype):
    """Under a transform the formula stands in for the kernels: computed in fp32 and rounded once,
    like them.
    """
    x, weight, dy = (
        random(4, 48, dtype=dtype),
        random_weight(48, torch.float32),
        random(4, 48, dtype=dtype),
    )
    for options in ({}, GEMMA):
        y, vjp = torch.func.vjp(lambda x, w: rms_norm(x, 48, w, 1e-5, **options), x, weight)
        leaf_x, leaf_w = leaves((x, weight))
        want = rms_norm(leaf_x, 48, leaf_w, 1e-5, **options)
        assert y.dtype == want.dtype
        tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        torch.testing.assert_close(y, want.detach(), **tolerance)
        for got, expected in zip(
            vjp(dy), torch.autograd.grad(want, [leaf_x, leaf_w], dy), strict=True
        ):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, **tolerance)


def test_raw_forward_is_differentiable_and_rstd_is_not():
    """The op with two results, as a server or a compiler calls it."""
    x, weight = leaves((random(4, 6, dtype=torch.float64), random_weight(6, torch.float64)))
    y, rstd = ops.rms_norm_forward(x, (6,), weight, 1e-3)
    assert y.requires_grad and not rstd.requires_grad
    dy = random(4, 6, dtype=torch.float64)
    want = torch.autograd.grad(rms_norm(x, 6, weight, 1e-3), [x, weight], dy)
    assert all(map(same_bits, torch.autograd.grad(y, [x, weight], dy), want))


def test_gradients_that_are_not_asked_for():
    """Of a backward that is itself recorded, which is the formula's."""
    x, weight = random(4, 6, dtype=torch.float64), random_weight(6, torch.float64)
    _, rstd = ops.rms_norm_forward(x, (6,), weight, 1e-3)
    dy = random(4, 6, dtype=torch.float64)
    masks = ([True, False], [False, True], [True, True], [False, False])
    for w, mask in [(weight, mask) for mask in masks] + [(None, [True, True])]:
        want = ops.rms_norm_backward(dy, x, (6,), w, rstd, 1e-3, mask)
        got = ops.rms_norm_backward(*leaves((dy,)), x, (6,), w, rstd, 1e-3, mask)
        for a, b, asked in zip(got, want, (mask[0], mask[1] and w is not None)):
            if asked:
                assert a.requires_grad
                torch.testing.assert_close(a.detach(), b)
            else:
                assert a is b is None


def test_nothing_is_recorded_without_need():
    x, weight = random(2, 8), random_weight(8, torch.float32)
    assert rms_norm(x, 8, weight).grad_fn is None
    weight.requires_grad_()
    assert rms_norm(x, 8, weight).grad_fn is not None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert rms_norm(x, 8, weight).grad_fn is None


def test_saved_tensors(case):
    """Input, weight and rstd are kept, no more: what activation memory is made of."""
    ours, _, args = case
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = ours(*leaves(args))
    assert sorted(kept) == sorted([*(t.shape for t in args), torch.Size([4])])
    y.sum().backward()


def test_checkpoint():
    x, weight = leaves((random(4, 8), random_weight(8, torch.float32)))
    dy = random(4, 8)
    want = torch.autograd.grad(rms_norm(x, 8, weight), [x, weight], dy)
    y = torch.utils.checkpoint.checkpoint(lambda x: rms_norm(x, 8, weight), x, use_reentrant=False)
    assert all(map(same_bits, torch.autograd.grad(y, [x, weight], dy), want))


def test_backward_twice_is_refused_as_usual():
    x = random(2, 8).requires_grad_()
    y = rms_norm(x, 8).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_out_bumps_the_version():
    """Autograd notices that a value it has kept was overwritten."""
    out = random(2, 8)
    version = out._version
    rms_norm(random(2, 8), 8, out=out)
    assert out._version == version + 1
    factor = random(2, 8).requires_grad_()
    product = (factor * out).sum()
    rms_norm(out, 8, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_input_overwritten_after_the_forward():
    x, weight = random(2, 8), random_weight(8, torch.float32).requires_grad_()
    y = rms_norm(x, 8, weight).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# Every way to a derivative of a function of x and weight, as (value, gradients of its sum).
def by_kernel(function, x, weight):
    y = function(x, weight)
    return y, *torch.autograd.grad(y.sum(), (x, weight))


def by_create_graph(function, x, weight):
    y = function(x, weight)
    return y, *torch.autograd.grad(y.sum(), (x, weight), create_graph=True)


def by_vjp(function, x, weight):
    y, pull = torch.func.vjp(function, x, weight)
    return y, *pull(torch.ones_like(y))


def by_jvp(function, x, weight):
    y, _ = torch.func.jvp(function, (x, weight), (torch.ones_like(x), torch.ones_like(weight)))
    return y, *by_kernel(function, x, weight)[1:]


@pytest.mark.parametrize("way", [by_kernel, by_create_graph, by_vjp, by_jvp])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-30])
def test_rows_whose_squares_leave_fp32(way, eps):
    """The formula is rescaled there as the kernels are: values and first derivatives do not depend
    on the way to them.
    """
    powers = torch.tensor([0.0, 20.0, 30.0, 37.0, -20.0, -30.0, 7.0, -7.0])
    x = torch.randn(8, 64).mul(10 ** powers[:, None]).requires_grad_()
    weight = torch.randn(64, requires_grad=True)
    for function in (
        lambda x, w: rms_norm(x, 64, w, eps),
        lambda x, w: fused_add_rms_norm(x, torch.zeros(8, 64), w, eps)[0],
    ):
        y, dx, dweight = way(function, x, weight)
        want_dx, want_dweight = rms_norm_backward_reference(torch.ones_like(y), x, 64, weight, eps)
        want = rms_norm_reference(x, 64, weight, eps)
        # Some eps of fp32; dx cancels, so beside the largest of its row.
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-30)
        assert ((dx - want_dx).abs() <= 1e-5 * want_dx.abs().amax(1, keepdim=True)).all()
        torch.testing.assert_close(dweight.double(), want_dweight, rtol=1e-5, atol=1e-5)


def test_tangents_where_squares_leave_fp32():
    x, weight = torch.randn(3, 64) * 1e25, torch.randn(64)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(rms_norm(forward_ad.make_dual(x, x), 64, weight, 0.0))
    torch.testing.assert_close(y, rms_norm(x, 64, weight, 0.0))
    assert tangent.abs().max() <= 1e-5  # a longer x has the same norm
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not support automatic differentiation"),
    ):
        rms_norm(x, 64, weight, out=forward_ad.make_dual(torch.empty_like(x), x))


def test_formula_without_columns_or_rows():
    for shape in ((3, 0), (0, 4)):
        y, pull = torch.func.vjp(lambda x: rms_norm(x, shape[-1]), torch.empty(shape))
        assert y.shape == shape and pull(y)[0].shape == shape
