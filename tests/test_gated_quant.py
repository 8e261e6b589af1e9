"""rms_norm_gated_quant: the bits of rms_norm_gated and of the quantization behind, layouts, out=,
errors, torch.compile.
"""

import math
import re

import pytest
import torch
from cases import (
    GEMMA,
    LLAMA,
    OPTIONS,
    name,
    ops,
    pairs,
    random,
    refused_alike_while_tracing,
    same_bits,
)
from test_gated import ACTIVATIONS, ORDERS, operands
from test_quant import BF16, E4M3, E5M2, FORMATS, FP16, FP32, INT8, bits, check, kinds

import rmsnorm_cuda
from rmsnorm_cuda import rms_norm, rms_norm_gated, rms_norm_gated_quant, rms_norm_quant

EPS = 1e-5


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def same(got, want):
    codes = (a.element_size() == 1 for a in got)
    both = ((bits(a), bits(b)) if one else (a, b) for one, a, b in zip(codes, got, want))
    return all(same_bits(a, b) for a, b in both)


def check_steps(tensors, dtype, kind, **how):
    """With the norm and without it: the same codes and scales."""
    norm = rms_norm_gated(*tensors, EPS, **how)
    results = rms_norm_gated_quant(*tensors, EPS, dtype=dtype, return_norm=True, **kind, **how)
    assert same_bits(results[2], norm)
    check(results, norm, dtype, kind)
    alone = rms_norm_gated_quant(*tensors, EPS, dtype=dtype, **kind, **how)
    assert len(alone) == 2 and same(alone, results)


@pytest.mark.parametrize(
    "dtypes, options, order, activation, dtype, shape",
    pairs(
        [
            *((t, t, t) for t in (FP32, BF16, FP16)),
            (BF16, BF16, FP32),
            (BF16, FP32, FP32),
            (FP32, BF16, FP16),
            (FP16, BF16, None),
            (BF16, None, BF16),
            (FP32, None, BF16),
        ],
        OPTIONS,
        ORDERS,
        ACTIVATIONS,
        FORMATS,
        [
            ((3, 5), 64, None),
            ((7,), 192, 64),
            ((19,), 256, 32),  # a block has columns of several groups
            ((4,), 384, 96),  # a group ends within a block
            ((2, 2), 7, None),
            ((6,), 130, 13),
            ((3,), 4096, 512),
            ((2,), 9216, 1024),
            ((1,), 9024, None),
            ((300,), 128, 128),
        ],
    ),
    ids=name,
)
def test_bits_of_the_steps(device, dtypes, options, order, activation, dtype, shape):
    rows, cols, group_size = shape
    x_dtype, gate_dtype, weight_dtype = dtypes
    sizes = torch.tensor([[3.0], [1e-4], [0.0]]).repeat(math.prod(rows), 1)[: math.prod(rows)]
    x, gate, weight = operands(rows, cols, x_dtype, gate_dtype, weight_dtype)
    x = (x.float() * sizes.view(*rows, 1)).to(x_dtype)
    gate = None if gate_dtype is None else gate
    tensors = on(device, (x, gate, None if weight_dtype is None else weight))
    for kind in kinds(cols, device):
        check_steps(tensors, dtype, kind, group_size=group_size, **options, **order, **activation)


@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("group_size", [None, 256])
def test_more_rows_than_a_tile_holds(device, order, group_size, threads):
    tensors = on(device, operands((700,), 1024, BF16))
    for count in (1, 3):
        threads(count)
        for kind in ({}, {"block": 128, "column_major": True}):
            check_steps(tensors, E4M3, kind, group_size=group_size, **order, **LLAMA)


def test_without_a_gate_it_is_that_of_a_norm(device):
    x, _, weight = on(device, operands((5,), 192, BF16))
    want = rms_norm_quant(x, weight, EPS, dtype=E4M3, return_norm=True)
    got = rms_norm_gated_quant(x, None, weight, EPS, dtype=E4M3, return_norm=True)
    assert same(got, want)
    # A scale of 64 columns, which are a row there.
    got = rms_norm_gated_quant(x, None, None, EPS, dtype=INT8, group_size=64, block=64)
    want = rms_norm_quant(x.view(15, 64), None, EPS, dtype=INT8)
    assert same((got[0].view(15, 64), got[1].view(15, 1)), want)


@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("group_size", [None, 64])
def test_what_is_no_number_and_rows_out_of_range(device, order, group_size):
    for value in (math.nan, math.inf, 1e20):
        x, gate, weight = operands((4,), 128, FP32)
        x[1, 5], gate[2, 70], x[3] = value, value, x[3] * value
        tensors, how = on(device, (x, gate, weight)), {"group_size": group_size} | order
        norm = rms_norm_gated(*tensors, EPS, **how)
        for dtype in FORMATS:
            results = rms_norm_gated_quant(*tensors, EPS, dtype=dtype, **how)
            clean = norm.cpu().isfinite().all(-1)
            check([t.cpu()[clean] for t in results], norm.cpu()[clean], dtype, {})
            assert (results[1].cpu().isfinite().view(-1) == clean).all()


def test_layouts(device, torch_kernels):
    """Slices of a projection, heads that are transposed, and what is not dense."""
    torch_kernels(device)  # for the way back of a strided tensor
    whole = random(4, 5, 3 * 128, dtype=BF16).to(device)
    gate = whole[..., 256:].transpose(0, 1).contiguous().transpose(0, 1)
    for kind in kinds(128, device):
        for group_size in (None, 32):
            check_steps((whole[..., 128:256], gate, None), E4M3, kind, group_size=group_size)
    not_dense = random(128, 6).to(device).t()
    check_steps((not_dense, not_dense, None), E5M2, {}, norm_before_gate=False)


@pytest.mark.parametrize("shape", ((0, 64), (3, 0), (2, 0, 64)), ids=str)
def test_empty(shape):
    x = torch.empty(shape)
    for kind in ({}, {"block": 64, "column_major": True}):
        output, scale, norm = rms_norm_gated_quant(
            x, x, dtype=E4M3, group_size=32, return_norm=True, **kind
        )
        blocks = shape[-1] // 64 if kind else 1
        assert output.shape == norm.shape == shape and scale.shape == (*shape[:-1], blocks)
        assert scale.isfinite().all()


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_out(device, order):
    tensors = on(device, operands((6,), 256, BF16))
    how = {"dtype": E4M3, "group_size": 64, "activation": "sigmoid"} | order | GEMMA
    for kind in kinds(256, device):
        for norm in (False, True):
            want = rms_norm_gated_quant(*tensors, EPS, return_norm=norm, **kind, **how)
            out = tuple(torch.empty_like(t) for t in want)
            got = rms_norm_gated_quant(*tensors, EPS, return_norm=norm, out=out, **kind, **how)
            assert same(got, want)
            assert all(a.data_ptr() == b.data_ptr() or a.numel() == 1 for a, b in zip(got, out))


X, W = torch.ones(2, 128), torch.ones(128)
ONES = (X.to(E4M3), torch.ones(2, 1))
# What differs, exception, what the message says. The checks are those of rms_norm_gated and of
# rms_norm_quant, whose tests have the others.
BAD = {
    "activation": ({"activation": "relu"}, ValueError, "'silu' or 'sigmoid', but got 'relu'"),
    "groups": ({"group_size": 3}, RuntimeError, "whole groups of 3 columns"),
    "gate's shape": ({"gate": X[:1]}, RuntimeError, "expected gate of shape [2, 128]"),
    "gate in fp64": ({"gate": X.double()}, NotImplementedError, "expected input, gate and weight"),
    "input in fp64": ({"input": X.double()}, NotImplementedError, "for 'Double'"),
    "weight in fp64": ({"weight": W.double()}, NotImplementedError, "for 'Double'"),
    "weight's shape": ({"weight": W[:4]}, RuntimeError, "weight of shape [4]"),
    "dtype": ({"dtype": BF16}, ValueError, "dtype to be float8_e4m3fn, float8_e5m2 or int8"),
    "block": ({"block": 32}, ValueError, "block to be 64 or 128, but got 32"),
    "scale": ({"scale": W}, RuntimeError, "scale to be one float32"),
    "both": ({"scale": W[:1], "block": 64}, ValueError, "expected neither beside a given scale"),
    "scale_ub": ({"scale_ub": 0.0}, ValueError, "scale_ub to be positive, but got 0"),
    "no blocks": ({"column_major": True}, ValueError, "expected block to be given"),
    "eps": ({"eps": -1.0}, ValueError, "eps to be finite and not negative"),
    "no Tensor": ({"gate": 1}, TypeError, "expected gate to be a Tensor or None, but got int"),
    "a gradient": ({"gate": X.clone().requires_grad_()}, RuntimeError, "automatic differentiation"),
    "out": ({"out": ONES[:1]}, ValueError, "out to hold 2 tensors, but got 1"),
    "out's dtype": ({"out": (X, ONES[1])}, RuntimeError, "out of dtype Float8_e4m3fn, but got"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    changed, exception, message = BAD[what]
    args = {"input": X, "gate": X, "weight": W, "dtype": E4M3} | changed
    with pytest.raises(exception, match=re.escape(message)) as caught:
        rms_norm_gated_quant(**args)
    assert "rms_norm_gated_quant" in str(caught.value)
    refused_alike_while_tracing(rms_norm_gated_quant, **args)
    assert (X == 1).all() and (ONES[1] == 1).all(), "something was written"


def test_overlaps():
    memory = torch.ones(4, 128)
    codes = memory.view(E4M3).view(-1)[: 2 * 128].view(2, 128)
    other = torch.ones(2, 128)
    for what in ("input", "gate", "weight"):
        args = {"input": other, "gate": other, "weight": W} | {what: memory[:2]}
        args["weight"] = memory[0] if what == "weight" else W
        with pytest.raises(RuntimeError, match=f"out and {what} share memory"):
            rms_norm_gated_quant(**args, dtype=E4M3, out=(codes, torch.ones(2, 1)))
    with pytest.raises(RuntimeError, match="norm_out and gate share memory"):
        rms_norm_gated_quant(
            other, memory[:2], dtype=E4M3, return_norm=True, out=(*ONES, memory[1:3])
        )
    assert (memory == 1).all() and (ONES[1] == 1).all()


# ---------------------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break(backend):
    def layer(x, gate, weight, out):
        q, scale = rms_norm_gated_quant(x * 2, gate, weight, EPS, dtype=INT8, group_size=64)
        more = {"norm_before_gate": False, "activation": "sigmoid", "return_norm": True}
        r, blocks, norm = rms_norm_gated_quant(x, gate, weight, dtype=E4M3, block=64, **more)
        rms_norm_gated_quant(x * 2, None, weight, dtype=E4M3, out=out)
        return q.float() * scale, r.float() * blocks.repeat_interleave(64, -1), norm

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (6, 3):
        x, gate, weight = operands((rows,), 128, BF16)
        outs = [(torch.zeros(rows, 128).to(E4M3), torch.zeros(rows, 1)) for _ in range(2)]
        results = [f(x, gate, weight, out) for f, out in zip((compiled, layer), outs)]
        assert all(map(same_bits, *results))
        assert same(*outs)


def test_exported_as_one_node():
    class Layer(torch.nn.Module):
        def forward(self, x, gate):
            return rms_norm_gated_quant(x, gate, dtype=INT8, block=64, group_size=32)

    x, gate, _ = operands((6,), 64, FP32)
    dims = ({0: torch.export.Dim("rows")},) * 2
    program = torch.export.export(Layer(), (x, gate), dynamic_shapes=dims)
    nodes = [n.target for n in program.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    assert nodes == [ops.rms_norm_gated_quant.default]
    decomposed = program.run_decompositions(rmsnorm_cuda.decompositions())  # which it has none of
    for p in (program, decomposed):
        got = p.module()(x[:3], gate[:3])
        assert all(map(same_bits, got, Layer()(x[:3], gate[:3])))


def test_a_weight_of_ones_and_no_weight_are_the_same(device):
    x, gate, _ = on(device, operands((3,), 64, FP16))
    ones = torch.ones(64, dtype=FP16, device=device)
    a, b = (rms_norm_gated_quant(x, gate, w, EPS, dtype=E5M2) for w in (None, ones))
    assert same(a, b)
    assert same_bits(rms_norm(x, 64, None, EPS), rms_norm_gated(x, None, ones, EPS))
