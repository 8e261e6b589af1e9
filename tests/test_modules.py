"""rmsnorm_cuda.RMSNorm: a torch.nn.RMSNorm in everything but the kernels."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, OPTIONS, name, pairs, random, same_bits

import rmsnorm_cuda


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


@pytest.mark.parametrize(
    "options, dtype, shape", pairs(OPTIONS, [*DTYPES, None], [1, 7, 64, (3, 5)]), ids=name
)
def test_is_the_function(options, dtype, shape):
    """With the module's own weight, eps and options, forward and backward; None: no weight."""
    module = rmsnorm_cuda.RMSNorm(shape, 1e-3, dtype is not None, dtype=dtype, **options)
    if module.weight is not None:
        torch.nn.init.normal_(module.weight, mean=1.0, std=0.25)
    x = random(4, 6, *module.normalized_shape, dtype=dtype or torch.float32).requires_grad_()
    leaves, results = [x, *module.parameters()], []
    for function in (
        module,
        lambda x: rmsnorm_cuda.rms_norm(x, shape, module.weight, 1e-3, **options),
    ):
        y = function(x)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies(clone):
    module = rmsnorm_cuda.RMSNorm(8, 1e-3, weight_offset=0.5, cast_before_weight=True).eval()
    torch.nn.init.normal_(module.weight)
    twin, x = clone(module), torch.randn(2, 8)
    assert repr(twin) == repr(module) and not twin.training
    assert torch.equal(twin(x), module(x))
