"""Values of the gradients. Their tolerances are derived in cases.assert_backward."""

import itertools
import math

import pytest
import torch
from cases import (
    DTYPES,
    OPTIONS,
    WEIGHT_DTYPES,
    assert_backward,
    assert_near,
    hard_rows,
    name,
    ops,
    pairs,
    random,
    random_weight,
    same_bits,
)

from rmsnorm_cuda import rms_norm
from rmsnorm_cuda.reference import rms_norm_backward_reference

pytestmark = pytest.mark.usefixtures("painted")

# One row; a vector; around a group of 16 rows, which are of more than 1024 columns; two blocks of
# 256 rows of dweight; long rows, of more than a tile of weights (8192) too.
SHAPES = [
    *((1, 1), (5, 7), (9, 64), (8, 640), (33, 129), (300, 65)),
    *((15, 1031), (16, 1030), (17, 1025), (9, 4097), (3, 8259)),
]
CUDA_SHAPES = [(5, 1), (3, 33), (70, 64), (2, 4097)]


def raw_backward(dy, x, cols, weight, eps, options, mask=(True, True)):
    _, rstd = ops.rms_norm_forward(x, (cols,), weight, eps, **options)
    return ops.rms_norm_backward(dy, x, (cols,), weight, rstd, eps, mask, **options)


def to(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtypes(device, dtype, options):
    """Every triple of dtypes: the gradient's is its own. Each meets some of the shapes, in
    rotation, to be quick.
    """
    shapes = itertools.cycle(CUDA_SHAPES[1:3] if device == "cuda" else SHAPES)
    first = 3 * DTYPES.index(dtype) + OPTIONS.index(options)
    combinations = itertools.product(DTYPES, WEIGHT_DTYPES)
    for shape, (grad_dtype, weight_dtype) in zip(
        itertools.islice(shapes, first, None), combinations
    ):
        rows, cols = shape
        dy, x = random(rows, cols, dtype=grad_dtype), random(rows, cols, dtype=dtype)
        weight = random_weight(cols, weight_dtype)
        dx, dweight = raw_backward(*to(device, dy, x), cols, *to(device, weight), 1e-6, options)
        assert (dweight is None) == (weight is None)
        assert_backward(dx, dweight, dy, x, (cols,), weight, 1e-6, options)


@pytest.mark.parametrize("shape", [(1000, 64), (3, 20000), (2000, 7)])
def test_larger(device, shape, torch_kernels):
    torch_kernels(device)  # a simulator takes minutes
    dy, x, weight = random(*shape), random(*shape), random_weight(shape[1], torch.float32)
    assert_backward(
        *raw_backward(dy, x, shape[1], weight, 1e-6, {}), dy, x, shape[1:], weight, 1e-6, {}
    )


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_shapes(shape, device):
    dy, x, weight = random(*shape), random(*shape), random_weight(shape[1], torch.float32)
    dx, dweight = raw_backward(*to(device, dy, x), shape[1], weight.to(device), 1e-6, {})
    assert_backward(dx, dweight, dy, x, shape[1:], weight, 1e-6, {})


@pytest.mark.parametrize(
    "dtype, weight_dtype, options",
    pairs(DTYPES, [torch.float32, torch.bfloat16, torch.float64, None], OPTIONS),
    ids=name,
)
def test_autograd_is_the_raw_op(device, dtype, weight_dtype, options):
    """What autograd calls, it calls with the right arguments; multi-dimensional normalized_shape
    and eps too.
    """
    x, weight = (
        random(4, 6, 5, dtype=dtype, device=device),
        random_weight((6, 5), weight_dtype, device),
    )
    inputs = [t.requires_grad_() for t in (x, weight) if t is not None]
    y = rms_norm(x, (6, 5), weight, 1e-3, **options)
    dy = random(4, 6, 5, dtype=y.dtype, device=device)
    got = torch.autograd.grad(y, inputs, grad_outputs=dy)
    assert_backward(
        got[0],
        got[1] if weight is not None else None,
        dy.cpu(),
        x.detach().cpu(),
        (6, 5),
        None if weight is None else weight.detach().cpu(),
        1e-3,
        options,
    )


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_outside_the_fast_range(device, dtype, weight_dtype):
    """rstd is no normal fp32 number, or its square is not: the row is done again in fp64."""
    rows = hard_rows(77, dtype)
    x = torch.stack(
        [rows[kind] for kind in ("plain", "huge", "largest", "tiny", "denormal", "plain again")]
    )
    dy, weight = random(len(x), 77), random_weight(77, weight_dtype)
    for eps in (0.0, 1e-35):
        for options in OPTIONS:
            dyd, xd, wd = to(device, dy, x, weight)
            dx, dweight = raw_backward(dyd, xd, 77, wd, eps, options)
            assert_backward(dx, dweight, dy, x, (77,), weight, eps, options)


def test_broken_rows_stay_alone(device):
    """NaN and Inf spoil their own row of dx; dweight sums over all rows and is spoiled, as in the
    formula.
    """
    rows = hard_rows(40, torch.float32)
    x, dy, weight = (
        torch.stack(list(rows.values())),
        random(len(rows), 40),
        random_weight(40, torch.float32),
    )
    dyd, xd, wd = to(device, dy, x, weight)
    dx, dweight = raw_backward(dyd, xd, 40, wd, 0.0, {})
    want_dx, want_dweight = rms_norm_backward_reference(dy, x, 40, weight, 0.0)
    broken = [kind in ("zero", "nan", "inf", "-inf") for kind in rows]
    assert dx.cpu().isnan().any(1).tolist() == broken
    for got, want in ((dx, want_dx), (dweight, want_dweight)):
        assert torch.equal(got.cpu().isnan(), want.isnan())
    sound = [i for i, b in enumerate(broken) if not b]
    assert_backward(dx.cpu()[sound], None, dy[sound], x[sound], (40,), weight, 0.0, {})


def test_output_mask(device):
    """A gradient that is not wanted is not made, and the other one has the same bits."""
    dy, x, weight = to(device, random(30, 50), random(30, 50), random_weight(50, torch.float32))
    dx, dweight = raw_backward(dy, x, 50, weight, 1e-6, {})
    only_dx = raw_backward(dy, x, 50, weight, 1e-6, {}, (True, False))
    only_dweight = raw_backward(dy, x, 50, weight, 1e-6, {}, (False, True))
    assert same_bits(only_dx[0], dx) and only_dx[1] is None
    assert only_dweight[0] is None and same_bits(only_dweight[1], dweight)
    assert raw_backward(dy, x, 50, weight, 1e-6, {}, (False, False)) == (None, None)
    assert raw_backward(dy, x, 50, None, 1e-6, {})[1] is None


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_frozen(device, frozen):
    """requires_grad=False on one side: the other side's gradient alone, and the mask says so to the
    op.
    """
    x, weight, dy = to(device, random(6, 50), random_weight(50, torch.float32), random(6, 50))
    dx, dweight = raw_backward(dy, x, 50, weight, None, {})
    moving, want = (x, dx) if frozen == "weight" else (weight, dweight)
    moving.requires_grad_()
    (got,) = torch.autograd.grad(rms_norm(x, 50, weight), [moving], grad_outputs=dy)
    assert same_bits(got, want)


@pytest.mark.parametrize("reduce", ["sum", "mean", "sum over rows"])
def test_expanded_gradient(reduce):
    """y.sum().backward() hands over a gradient of stride 0."""
    x, weight = random(6, 50).requires_grad_(), random_weight(50, torch.float32).requires_grad_()
    y = rms_norm(x, 50, weight)
    if reduce == "sum over rows":
        dy = random(50).expand(6, 50)
        y.sum(0).backward(dy[0])
    else:
        dy = torch.tensor(1.0 if reduce == "sum" else 1 / 300).expand(6, 50)
        getattr(y, reduce)().backward()
    assert_backward(x.grad, weight.grad, dy, x.detach(), (50,), weight.detach(), None, {})
    want = raw_backward(dy.contiguous(), x.detach(), 50, weight.detach(), None, {})
    assert same_bits(x.grad, want[0]) and same_bits(weight.grad, want[1])


def test_gradients_add_up():
    """A tied weight, and an input used twice."""
    x, weight = (
        random(4, 9, dtype=torch.float64).requires_grad_(),
        random_weight(9, torch.float64).requires_grad_(),
    )
    (rms_norm(x, 9, weight) + rms_norm(2 * x, 9, weight)).sum().backward()
    dy = torch.ones(4, 9, dtype=torch.float64)
    first = rms_norm_backward_reference(dy, x.detach(), 9, weight.detach())
    second = rms_norm_backward_reference(dy, 2 * x.detach(), 9, weight.detach())
    assert_near(x.grad, first[0] + 2 * second[0], 1e-13)
    assert_near(weight.grad, first[1] + second[1], 1e-13)


def test_dweight_of_many_rows_of_one_sign():
    """No cancellation and 20000 rows: summed in fp32 one after another, this would be off by 1e-4
    of its value.
    """
    x, dy = torch.full((20000, 3), 1.1), torch.full((20000, 3), 0.1)
    _, dweight = raw_backward(dy, x, 3, torch.ones(3), 0.0, {})
    want = rms_norm_backward_reference(dy, x, 3, torch.ones(3), 0.0)[1]
    # the worst that blocks of 256 rows can do is 256 u
    assert_near(dweight, want, 256 * 2.0**-24 * want.abs())
    assert math.isclose(want[0], 2000, rel_tol=1e-6)


@pytest.mark.parametrize("rows", [256, 4096])
@pytest.mark.parametrize("cols", [64, 128, 1024])
def test_weight_gradient_of_equal_rows(rows, cols):
    """Each row adds the same with the same rounding error: 256 additions one after the other were
    62 ulp off. 32 of them, then 8 sums of those, make at most 40 * 2^-24 of the sum, in random rows
    a fifth of that; torch has 6 to 8."""
    x, dy = (torch.randn(1, cols).expand(rows, cols).contiguous() for _ in range(2))
    grad = raw_backward(dy, x, cols, torch.ones(cols), 1e-6, {})[1]
    x64 = x.double()
    want = (dy.double() * x64 * (x64.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(0)
    assert ((grad - want).abs() / want.abs()).max() <= 16 * 2**-24


@pytest.mark.parametrize("cols", [24_576, 300_000])
def test_equal_terms_of_long_fp64_rows(cols):
    """Each addition of g * xhat would round to the same side."""
    x, dy, weight = (torch.full((1, cols), v, dtype=torch.float64) for v in (0.1, 0.3, 0.7))
    weight = weight[0]
    _, rstd = ops.rms_norm_forward(x, [cols], weight)
    dx, dweight = ops.rms_norm_backward(dy, x, [cols], weight, rstd, None, [True, True])
    assert_backward(dx, dweight, dy, x, [cols], weight, None, {})
