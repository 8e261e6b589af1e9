"""Values of the forward, against the fp64 reference rounded once."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    LLAMA,
    OPTIONS,
    ROWS,
    WEIGHT_DTYPES,
    assert_forward,
    hard_rows,
    lengths,
    name,
    ops,
    pairs,
    random,
    random_weight,
    same_bits,
)

from rmsnorm_cuda import rms_norm
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance

pytestmark = pytest.mark.usefixtures("painted")


def cpu(t):
    return None if t is None else t.cpu()


@pytest.mark.parametrize(
    "dtype, weight_dtype, options", pairs(DTYPES, WEIGHT_DTYPES, OPTIONS), ids=name
)
def test_dtypes_and_lengths(device, dtype, weight_dtype, options):
    for cols, rows in zip(lengths(device), itertools.cycle(ROWS[::-1])):
        x = random(rows, cols, dtype=dtype, device=device)
        weight = random_weight(cols, weight_dtype, device)
        y = rms_norm(x, (cols,), weight, 1e-6, **options)
        assert_forward(y, cpu(x), (cols,), cpu(weight), 1e-6, options)


@pytest.mark.parametrize(
    "dtype, options, weight_dtype, eps",
    pairs(DTYPES, OPTIONS, [torch.float32, torch.bfloat16, None], [0.0, 1e-6, None]),
    ids=name,
)
def test_hard_rows(device, dtype, options, weight_dtype, eps):
    for cols in (1, 37, 300):
        x = torch.stack(list(hard_rows(cols, dtype).values()))
        weight = random_weight(cols, weight_dtype)
        wd = None if weight is None else weight.to(device)
        y = rms_norm(x.to(device), (cols,), wd, eps, **options)
        assert_forward(y, x, (cols,), weight, eps, options)


def test_broken_rows_are_broken_as_in_the_formula(device):
    """Spelled out, without the reference: Inf / Inf is NaN, finite / Inf is 0, and one NaN takes
    its whole row.
    """
    x = torch.ones(3, 5)
    x[0, 1], x[1, 1] = math.inf, math.nan
    y = rms_norm(x.to(device), 5).cpu()
    assert (
        y[0].isnan().tolist() == [False, True, False, False, False]
        and y[0].nan_to_num(0).eq(0).all()
    )
    assert y[1].isnan().all()
    assert ulp_distance(y[2], torch.ones(5)).max() <= 1


@pytest.mark.parametrize("scale", [2.0**600, 2.0**1020, 2.0**-600, 2.0**-1060])
def test_fp64_range(device, scale):
    """Squares that leave fp64: a power of two cancels out, so what is scaled equals what is not
    (eps = 0).
    """
    x = (
        random(4, 50, dtype=torch.float64).clamp(-3, 3).mul(2.0**10).round()
    )  # integers: exact as denormals too
    want = rms_norm(x.to(device), 50, None, 0.0).cpu()
    x = x * (scale * 2.0**-10 if scale > 1 else scale)
    assert ulp_distance(rms_norm(x.to(device), 50, None, 0.0).cpu(), want).max() <= 2
    if scale < 1:  # an ordinary eps is all there is then, and the scaling must not lose it
        want = x / math.sqrt(1e-6)
        assert ulp_distance(rms_norm(x.to(device), 50, None, 1e-6).cpu(), want).max() <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_products_at_the_end_of_the_range(device, dtype):
    """weight * rstd is formed first in fp32; where that leaves the range, the result may still be
    in it.

    The odd weight at every place: the kernels look at whole vectors and at the remainder in
    different ways.
    """
    largest, least = torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny / 8
    cols = 67
    x = torch.full((2, cols), 2.0**-12, dtype=dtype)
    x[1] = 2.0**12
    weights = [torch.tensor([least, largest], dtype=dtype).repeat(cols)[:cols]]
    for odd in (largest, least, math.inf, math.nan):
        for at in range(0, cols, 1 if device == "cpu" else 22):
            weights.append(torch.zeros(cols, dtype=dtype))
            weights[-1][at] = odd
    # 67 places and 3 options: each place of one odd weight has another than of the next
    for weight, options in zip(weights, itertools.cycle(OPTIONS)):
        y = rms_norm(x.to(device), cols, weight.to(device), 0.0, **options)
        assert_forward(y, x, (cols,), weight, 0.0, options)


@pytest.mark.parametrize("cols", [64, 4096, 770_000])
def test_equal_rows_in_fp64(cols):
    """Where each addition rounds alike; without what they round off 6454 ulp are lost."""
    y = rms_norm(torch.full((1, cols), 1 / 3, dtype=torch.float64), cols, None, 0.0)
    assert (y - 1).abs().max() <= 4 * 2**-53  # of square, root, quotient and product


def test_long_equal_rows(device):
    """Equal values make the same rounding error in every step: naive fp32 sums are 5 ulp off at
    this length.
    """
    cols = 4097 if device == "cuda" else 100_003
    for value in (0.1, 1.0000001, 3.3):
        x = torch.full((1, cols), value)
        assert_forward(rms_norm(x.to(device), cols), x, (cols,), None, None, {})


@pytest.mark.parametrize("ratio", [1, 3, 10, 100, 1000])
@pytest.mark.parametrize("cols", [27, 64, 128, 576, 4096])
def test_row_that_one_element_dominates(cols, ratio):
    """A massive activation: its square alone makes rounding errors that nothing averages out, 3 ulp
    of them in fp32 sums.
    """
    rows = max(64, 400_000 // cols)
    generator = torch.Generator().manual_seed(ratio)
    x = torch.randn(rows, cols, generator=generator)
    at = torch.randint(0, cols, (rows,), generator=generator)
    x[torch.arange(rows), at] = ratio * (1 + torch.rand(rows, generator=generator))
    for weight in (None, 1 + torch.randn(cols, generator=generator) / 5):
        assert_forward(rms_norm(x, cols, weight, 1e-6), x, (cols,), weight, 1e-6, {})
    _, rstd = torch.ops.rmsnorm_cuda.rms_norm_forward(x, [cols], None, 1e-6)
    assert ulp_distance(rstd, (x.double().square().mean(-1) + 1e-6).rsqrt().float()).max() <= 1


@pytest.mark.parametrize("cols", [64, 192, 256, 1024])
def test_worst_rows_of_fp32(cols):
    """One large element in each of 8 lanes, and small ones that are the same in all: every lane
    makes the same 7 roundings. Of the sum 7 * 2^-24, half of that of 1 / rms, and the last
    rounding: 4 ulp at most. (3 were found.)"""
    generator = torch.Generator().manual_seed(0)
    lane = torch.rand(5_000, cols // 8, generator=generator) / 20
    lane[:, 0] = 1 + torch.rand(5_000, generator=generator)
    x = lane.repeat_interleave(8, 1)
    assert (
        ulp_distance(rms_norm(x, cols, None, 0.0), rms_norm_reference(x, (cols,), None, 0.0)).max()
        <= 4
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_as_torch(dtype):
    """The defaults mean what torch's defaults mean, eps=None among them. torch's CPU composite errs
    by some fp32 ulps.
    """
    x, weight = random(5, 96, dtype=dtype) * 1e-3, random_weight(96, dtype)
    got, want = rms_norm(x, (96,), weight), F.rms_norm(x, (96,), weight)
    tolerance = max(torch.finfo(dtype).eps, 4e-7) if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    "dtype, weight_dtype, options",
    pairs(DTYPES, [torch.float32, torch.bfloat16, None], OPTIONS),
    ids=name,
)
def test_rms_norm_forward_and_out(device, dtype, weight_dtype, options):
    """The other two ways in give the same bits, and rstd is 1 / sqrt(mean(x^2) + eps), also where
    fp32 cannot hold it.
    """
    cols = 129
    x, weight = (
        torch.stack(list(hard_rows(cols, dtype).values())),
        random_weight(cols, weight_dtype),
    )
    xd, wd = x.to(device), None if weight is None else weight.to(device)
    want = rms_norm(xd, (cols,), wd, 1e-30, **options)
    out = torch.full(x.shape, math.nan, dtype=want.dtype).to(device)
    assert rms_norm(xd, (cols,), wd, 1e-30, **options, out=out) is out and same_bits(out, want)
    y, rstd = ops.rms_norm_forward(xd, (cols,), wd, 1e-30, **options)
    assert same_bits(y, want)
    assert rstd.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    ) and rstd.shape == (len(x),)
    want_rstd = (1 / (x.double().square().mean(-1) + 1e-30).sqrt()).to(rstd.dtype)
    assert ulp_distance(rstd.cpu(), want_rstd).max() <= (2 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_out_writes_its_elements_and_no_others(device, dtype):
    for cols in (*range(1, 18), 33, 128, 300):  # every rest of a vector of 8 or 16
        x = random(5, cols, dtype=dtype)
        buffer = torch.full((5 + 2, cols + 3), math.nan, dtype=dtype).to(device)
        rms_norm(x.to(device), cols, out=buffer[1:-1, 1 : cols + 1])
        written = buffer.cpu()
        assert same_bits(written[1:-1, 1 : cols + 1], rms_norm(x.to(device), cols))
        written[1:-1, 1 : cols + 1] = math.nan
        assert written.isnan().all()


def test_out_may_be_the_input_or_lie_between_its_rows(device):
    x = random(6, 50)
    want = rms_norm(x.to(device), 50)
    inplace = x.clone().to(device)
    assert rms_norm(inplace, 50, out=inplace) is inplace and same_bits(inplace, want)
    fused = torch.cat([x, torch.full_like(x, math.nan)], dim=1).to(device)
    rms_norm(fused[:, :50], 50, out=fused[:, 50:])
    fused = fused.cpu()
    assert same_bits(fused[:, 50:], want) and same_bits(fused[:, :50], x)


def test_out_beside_the_input(device):
    """In one memory: before it, behind it, and between rows of two dimensions."""
    whole = random(2, 5, 24)
    for x, out in ((0, 1), (1, 0)):
        halves = whole.to(device).clone()
        rms_norm(halves[x], 24, out=halves[out])
        assert torch.equal(halves[x].cpu(), whole[x])
        assert same_bits(halves[out], rms_norm(halves[x], 24))
    strided = whole.to(device).clone()
    rms_norm(strided[:, :2, :8], 8, out=strided[:, 3:, :8])
    x, got = whole[:, :2, :8], strided.cpu()
    assert torch.equal(got[:, :2, :8], x)
    assert same_bits(got[:, 3:, :8], rms_norm(x.to(device), 8))


def test_out_is_promoted_with_cast_before_weight():
    x, weight = random(3, 20, dtype=torch.bfloat16), random_weight(20, torch.float32)
    out = torch.full((3, 20), math.nan)
    assert same_bits(rms_norm(x, 20, weight, **LLAMA, out=out), rms_norm(x, 20, weight, **LLAMA))


def test_normalized_shape_may_be_an_int():
    x = random(3, 20)
    for shape in (20, (20,), [20], torch.Size([20])):
        assert same_bits(rms_norm(x, shape), rms_norm(x, (20,)))


@pytest.mark.parametrize(
    "bits, dtype",
    ((0x7FFFFFFF, torch.float32), (-1, torch.float32), (0x7FFF, torch.float16)),
    ids=str,
)
def test_any_nan_in_the_weight_stays_one(bits, dtype, device):
    """Rounding a NaN of all ones to bf16 by adding half a unit would turn it into a zero."""
    weight = torch.ones(256, dtype=dtype)
    weight.view(torch.int32 if dtype == torch.float32 else torch.int16)[[3, 70]] = bits
    for rows in (1, 9):
        y = rms_norm(
            random(rows, 256, dtype=torch.bfloat16, device=device), 256, weight.to(device)
        ).cpu()
        assert y[:, [3, 70]].isnan().all() and y.isnan().sum() == 2 * rows
