"""rmsnorm_cuda.RMSNorm: a torch.nn.RMSNorm in everything but the kernels."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import rmsnorm_cuda
from rmsnorm_cuda.reference import (
    rms_norm_backward_reference,
    rms_norm_reference,
    round_once,
    ulp_distance,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# llama order rounds twice, and its first rounding may fall the other way on a near-tie: then both
# ulps count
OPTIONS = [({}, 1), ({"cast_before_weight": True}, 2), ({"weight_offset": 1.0}, 1)]


def make(shape=64, options=OPTIONS[0][0], **kwargs):
    """A module with a weight that is not all ones."""
    module = rmsnorm_cuda.RMSNorm(shape, **kwargs, **options)
    if module.weight is not None:
        torch.nn.init.normal_(module.weight, mean=1.0, std=0.25)
    return module


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((64,), {}),
        (((3, 5),), {"eps": 1e-5}),
        ((8, 1e-6, False), {}),
        ((8,), {"dtype": torch.bfloat16, "device": "meta"}),
    ],
)
def test_is_a_torch_rms_norm(args, kwargs):
    ours, theirs = rmsnorm_cuda.RMSNorm(*args, **kwargs), torch.nn.RMSNorm(*args, **kwargs)
    assert isinstance(ours, torch.nn.RMSNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (ours.normalized_shape, ours.eps, ours.elementwise_affine) == (
        theirs.normalized_shape,
        theirs.eps,
        theirs.elementwise_affine,
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.shape, a.dtype, a.device, a.requires_grad) == (
            b.shape,
            b.dtype,
            b.device,
            b.requires_grad,
        )
        assert a.is_meta or torch.equal(a, b)


def test_repr_shows_options_only_when_set():
    assert repr(rmsnorm_cuda.RMSNorm(8, 1e-6, weight_offset=1.0, cast_before_weight=True)) == (
        "RMSNorm((8,), eps=1e-06, elementwise_affine=True, weight_offset=1.0, "
        "cast_before_weight=True)"
    )


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        rmsnorm_cuda.RMSNorm(8, None, True, None, None, 1.0)


def test_fresh_weight_scales_by_one():
    x = torch.randn(4, 8)
    for options in ({}, {"weight_offset": 1.0}, {"weight_offset": 0.5}):
        module = rmsnorm_cuda.RMSNorm(8, **options)
        torch.testing.assert_close(module(x), F.rms_norm(x, (8,)))
        module.weight.data.fill_(7.0)
        module.reset_parameters()
        torch.testing.assert_close(module(x), F.rms_norm(x, (8,)))
    assert not rmsnorm_cuda.RMSNorm(8, weight_offset=1.0).weight.any()


@pytest.mark.parametrize("options, ulps", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [1, 7, 64, (3, 5)])
def test_forward(shape, dtype, options, ulps):
    torch.manual_seed(0)
    module = make(shape, options, eps=1e-5, dtype=dtype)
    x = torch.randn(4, 6, *module.normalized_shape).to(dtype)
    want = rms_norm_reference(x, module.normalized_shape, module.weight, 1e-5, **options)
    got = module(x)
    assert got.dtype == want.dtype and got.shape == want.shape
    # the reference is itself fp64: there a few roundings of its own are in the distance
    assert ulp_distance(got, want).max() <= (ulps if dtype != torch.float64 else 8)


@pytest.mark.parametrize("input_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_output_dtype(input_dtype, weight_dtype):
    x = torch.randn(2, 8).to(input_dtype)
    assert make(8, dtype=weight_dtype)(x).dtype == input_dtype
    promoted = torch.promote_types(input_dtype, weight_dtype)
    assert make(8, {"cast_before_weight": True}, dtype=weight_dtype)(x).dtype == promoted


@pytest.mark.parametrize("options, _", OPTIONS)
def test_gradients(options, _):
    torch.manual_seed(0)
    module = make(33, options, eps=1e-5)
    x = torch.randn(5, 33, requires_grad=True)
    grad = torch.randn(5, 33)
    module(x).backward(grad)
    dx, dweight = rms_norm_backward_reference(grad, x, 33, module.weight, 1e-5, **options)
    # plain fp32 arithmetic: sums of 33 and of 5 terms of size 1
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight.grad.double(), dweight, rtol=1e-5, atol=1e-5)


def test_without_weight():
    module = rmsnorm_cuda.RMSNorm(16, elementwise_affine=False)
    x = torch.randn(3, 16)
    assert not list(module.parameters())
    assert ulp_distance(module(x), rms_norm_reference(x, 16)).max() <= 1


def test_state_dict_travels_both_ways():
    ours, theirs = make(8), torch.nn.RMSNorm(8)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    fresh = rmsnorm_cuda.RMSNorm(8)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh.weight, ours.weight)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(clone):
    module = make(8, {"weight_offset": 0.5, "cast_before_weight": True}, eps=1e-3).eval()
    twin = clone(module)
    x = torch.randn(2, 8)
    assert repr(twin) == repr(module) and not twin.training
    assert torch.equal(twin(x), module(x))


def test_weight_that_is_not_a_parameter():
    """forward() reads _parameters directly; where the weight lives elsewhere it still has to be
    found.
    """

    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = torch.randn(2, 8)
    module = make(8)
    want = rms_norm_reference(x, 8, 2 * module.weight)
    parametrize.register_parametrization(module, "weight", Double())
    assert ulp_distance(module(x), want).max() <= 1
    parametrize.remove_parametrizations(module, "weight")
    assert ulp_distance(module(x), want).max() <= 1


def test_functional_call():
    module, weight, x = make(8), torch.randn(8), torch.randn(2, 8)
    got = torch.func.functional_call(module, {"weight": weight}, (x,))
    assert ulp_distance(got, rms_norm_reference(x, 8, weight)).max() <= 1


@pytest.mark.parametrize("options, _", OPTIONS)
def test_compile_fullgraph(options, _):
    torch._dynamo.reset()
    module = make(16, options, eps=1e-5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16, requires_grad=True)
    grad = torch.randn(3, 16)
    want = torch.autograd.grad(module(x), [x, module.weight], grad)
    y = compiled(x)
    assert torch.equal(y, module(x))
    for a, b in zip(torch.autograd.grad(y, [x, module.weight], grad), want, strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("dtype", DTYPES)
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
