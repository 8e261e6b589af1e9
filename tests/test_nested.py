"""Jagged nested tensors: the ops on their values, wherever torch's norm takes them."""

import pytest
import torch
from cases import same_bits
from torch import nn

import rmsnorm_cuda
from rmsnorm_cuda import (
    RMSNorm,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    replace_rms_norm,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
    rms_norm_gated,
    rms_norm_gated_quant,
    rms_norm_quant,
    rms_norm_rope,
)

OFFSETS = torch.tensor([0, 3, 3, 12])


def jagged(values):
    return torch.nested.nested_tensor_from_jagged(values, OFFSETS)


def values(*shape, **options):
    return torch.randn(12, *(shape or (16,)), generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_offset": 1.0}, {"cast_before_weight": True}],
    ids=["", "gemma", "llama"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(dtype, options):
    """The bits of the values alone, in gradients too."""
    x, w = values().to(dtype), torch.rand(16) + 0.5
    leaves = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    want = rms_norm(leaves[0][0], 16, leaves[0][1], 1e-6, **options)
    got = rms_norm(jagged(leaves[1][0]), 16, leaves[1][1], 1e-6, **options)
    assert got.is_nested and same_bits(got.values().detach(), want.detach())
    want.sin().sum().backward()
    got.values().sin().sum().backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(*leaves))


def test_heads_and_no_weight():
    x = values(4, 8)
    assert same_bits(rms_norm(jagged(x), (8,)).values(), rms_norm(x, (8,)))
    assert same_bits(rms_norm(jagged(x), (4, 8)).values(), rms_norm(x, (4, 8)))


def test_no_copy():
    x = values()
    out = jagged(torch.empty_like(x))
    assert rms_norm(jagged(x), 16, out=out) is out and same_bits(out.values(), rms_norm(x, 16))


def test_module_swapped_and_compiled():
    x = jagged(values())
    model = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16, 1e-6))
    want = model(x).values()
    assert len(replace_rms_norm(model)) == 1
    torch.testing.assert_close(model(x).values(), want)
    torch._dynamo.reset()
    norm = RMSNorm(16, 1e-6)
    for how in (norm, rmsnorm_cuda.rms_norm):
        compiled = torch.compile(
            lambda x, how=how: how(x) if how is norm else how(x, 16),
            backend="aot_eager",
            fullgraph=True,
        )
        assert same_bits(compiled(x).values(), (norm(x) if how is norm else how(x, 16)).values())


def test_fused_addition_and_quantization():
    x, w = values(), torch.rand(16)
    base = jagged(x)
    for got, want in zip(
        fused_add_rms_norm(base, base * 2, w), fused_add_rms_norm(x, x * 2, w), strict=True
    ):
        assert same_bits(got.values(), want)
    for got, want in zip(
        rms_norm_quant(base, w, dtype=torch.int8),
        rms_norm_quant(x, w, dtype=torch.int8),
        strict=True,
    ):
        assert torch.equal(got.values(), want)
    for of in (x, x.bfloat16()):
        hidden, residual = jagged(of), jagged(of.flip(0))
        want = fused_add_rms_norm(of, of.flip(0), w, round_sum=False)
        fused_add_rms_norm_(hidden, residual, w, round_sum=False)
        assert same_bits(hidden.values(), want[0]) and same_bits(residual.values(), want[1])


def test_what_is_refused():
    x = jagged(values())
    with pytest.raises(RuntimeError, match="ragged"):
        rms_norm(jagged(torch.ones(12)), 12)
    with pytest.raises(RuntimeError, match="expected residual to be a nested tensor as input is"):
        fused_add_rms_norm(x, values())
    other = torch.nested.nested_tensor_from_jagged(values(), torch.tensor([0, 1, 4, 12]))
    with pytest.raises(RuntimeError, match="of the same lengths"):
        fused_add_rms_norm(x, other)


class Overriding(torch.Tensor):
    """Sees what a __torch_function__ is handed."""

    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append((func, len(args), sorted(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)


def test_override_is_handed_what_f_rms_norm_would():
    x = values().as_subclass(Overriding)
    Overriding.calls.clear()
    torch.nn.functional.rms_norm(x, (16,), None, 1e-6)
    (_, *theirs), *_ = Overriding.calls
    Overriding.calls.clear()
    rms_norm(x, (16,), None, 1e-6)
    (func, *ours), *_ = Overriding.calls
    assert func is rms_norm and ours == theirs
    Overriding.calls.clear()
    rms_norm(x, (16,), None, 1e-6, weight_offset=1.0, cast_before_weight=True)
    assert Overriding.calls[0] == (
        rms_norm,
        2,
        ["cast_before_weight", "eps", "weight", "weight_offset"],
    )


def test_sandwich():
    first = [t.requires_grad_() for t in (values(8), values(8), torch.rand(8), torch.rand(8))]
    x, residual, *weights = second = [t.detach().clone().requires_grad_() for t in first]
    want = rms_norm_add_rms_norm(*first, 1e-6)
    got = rms_norm_add_rms_norm(jagged(x), jagged(residual), *weights, 1e-6)
    assert all(same_bits(a.values().detach(), b.detach()) for a, b in zip(got, want))
    sum(t.sin().sum() for t in want).backward()
    sum(t.values().sin().sum() for t in got).backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(first, second))
    total = rms_norm_add(jagged(x), jagged(residual), weights[0], 1e-6)
    assert same_bits(total.values().detach(), want[1].detach())
    with pytest.raises(RuntimeError, match="expected residual to be a nested tensor as input is"):
        rms_norm_add(jagged(x), residual)
    with torch.no_grad():
        there = jagged(x.clone()), jagged(residual.clone())
        rms_norm_add_rms_norm_(*there, *weights, 1e-6)
        assert all(same_bits(a.values(), b) for a, b in zip(there, want))


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated(group_size, norm_before_gate):
    how = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    leaves = [[t.clone().requires_grad_() for t in (values(8), values(8), torch.rand(8))]] * 2
    leaves[1] = [t.detach().clone().requires_grad_() for t in leaves[0]]
    x, gate, w = leaves[1]
    want = rms_norm_gated(*leaves[0], 1e-6, **how)
    got = rms_norm_gated(jagged(x), jagged(gate), w, 1e-6, **how)
    assert same_bits(got.values().detach(), want.detach())
    want.sin().sum().backward(), got.values().sin().sum().backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(*leaves))
    with pytest.raises(RuntimeError, match="expected gate to be a nested tensor as input is"):
        rms_norm_gated(jagged(x), gate, w)
    with torch.no_grad():
        got = rms_norm(jagged(x), 8, w, 1e-6, group_size=4)
        assert same_bits(got.values(), rms_norm(x, 8, w, 1e-6, group_size=4))
        want = rms_norm_gated_quant(x, gate, w, dtype=torch.int8, **how)
        got = rms_norm_gated_quant(jagged(x), jagged(gate), w, dtype=torch.int8, **how)
        assert all(torch.equal(a.values(), b) for a, b in zip(got, want))


@pytest.mark.parametrize("weight_shape", [(8,), (4, 8), (32,)])
def test_rotated_heads(weight_shape):
    """By angles of the tokens, which are as ragged, or by positions in a cache."""
    q, k, w = values(4, 8), values(2, 8), torch.rand(weight_shape)
    cos, sin = values(4).cos(), values(4).sin()
    leaves = [[t.clone().requires_grad_() for t in (q, k, w)] for _ in range(2)]
    want = rms_norm_rope(*leaves[0], None, cos, sin, 1e-6)
    nested = jagged(leaves[1][0]), jagged(leaves[1][1]), leaves[1][2]
    got = rms_norm_rope(*nested, None, jagged(cos), jagged(sin), 1e-6)
    assert all(same_bits(a.values().detach(), b.detach()) for a, b in zip(got, want))
    sum(t.sin().sum() for t in want).backward()
    sum(t.values().sin().sum() for t in got).backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(*leaves))
    positions = torch.randint(0, 12, (12,))
    want = rms_norm_rope(q, None, None, None, cos, sin, positions=positions)[0]
    got = rms_norm_rope(jagged(q), None, None, None, cos, sin, positions=jagged(positions))[0]
    assert same_bits(got.values(), want)
    with pytest.raises(RuntimeError, match="expected cos to be a nested tensor as q is"):
        rms_norm_rope(jagged(q), None, None, None, cos, sin)
    heads = torch.nested.nested_tensor_from_jagged(
        q.transpose(0, 1).contiguous(), OFFSETS, jagged_dim=2
    )
    with pytest.raises(RuntimeError, match="the tokens of q to be what is ragged"):
        rms_norm_rope(heads, None, None, None, jagged(cos), jagged(sin))
    heads = rms_norm_rope(heads, None, None, None, jagged(cos), jagged(sin), heads_dim=-3)[0]
    want = rms_norm_rope(q, None, None, None, cos, sin)[0]
    assert same_bits(heads.values().transpose(0, 1), want)
