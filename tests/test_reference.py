"""What the tests measure with: rounding to a dtype, and distances in ulp."""

import pytest
import torch
from cases import DTYPES, name

from rmsnorm_cuda.reference import rms_norm_reference, round_once, ulp_distance


def test_round_once():
    """At the middle of two neighbours, and one fp64 step to either side of it: for all values of
    the 16-bit types.
    """
    for dtype, inf_bits in ((torch.float16, 0x7C00), (torch.bfloat16, 0x7F80)):
        values = torch.arange(inf_bits, dtype=torch.int32).to(torch.int16).view(dtype)
        low, high = values[:-1], values[1:]
        middle = (low.double() + high.double()) / 2
        even = torch.where(low.view(torch.int16) % 2 == 0, low, high)
        for sign in (1, -1):
            assert torch.equal(round_once(sign * middle, dtype), sign * even)
            assert torch.equal(
                round_once(sign * torch.nextafter(middle, high.double()), dtype), sign * high
            )
            assert torch.equal(
                round_once(sign * torch.nextafter(middle, low.double()), dtype), sign * low
            )
        special = torch.tensor([float("nan"), float("inf"), 1e300, -5e-324], dtype=torch.float64)
        assert ulp_distance(round_once(special, dtype), special.to(dtype)).max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_ulp_distance(dtype):
    info, far = torch.finfo(dtype), torch.iinfo(torch.int64).max
    nan, inf = float("nan"), float("inf")
    pairs = [
        (1.0, 1.0, 0),
        (1.0, 1.0 + info.eps, 1),
        (1.0, 1.0 - info.eps, 2),
        (0.0, -0.0, 0),
        (nan, nan, 0),
        (nan, 1.0, far),
        (inf, info.max, 1),
        (inf, inf, 0),
        (info.smallest_normal, -info.smallest_normal, round(2 / info.eps)),
    ]
    a, b = (torch.tensor([pair[k] for pair in pairs], dtype=torch.float64) for k in (0, 1))
    want = torch.tensor([pair[2] for pair in pairs])
    assert torch.equal(ulp_distance(a.to(dtype), b.to(dtype)), want)
    assert torch.equal(ulp_distance(b.to(dtype), a.to(dtype)), want)
    with pytest.raises(TypeError, match="same floating dtype"):
        ulp_distance(a.to(dtype), b.to(torch.int32))


def test_shape_that_is_not_the_inputs():
    for shape in ((), (3,), (2, 4)):
        with pytest.raises(RuntimeError, match=r"expected an input of shape \[\*, .*got \[3, 4\]"):
            rms_norm_reference(torch.ones(3, 4), shape)
