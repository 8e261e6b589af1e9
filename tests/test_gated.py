"""rms_norm_gated and RMSNormGated: values, the roundings of the models, groups, layouts, gradients,
what is written and refused."""

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
    random_weight,
    refused_alike_while_tracing,
    same_bits,
)
from torch.nn.functional import silu

import rmsnorm_cuda
from rmsnorm_cuda import RMSNormGated, rms_norm, rms_norm_gated
from rmsnorm_cuda.reference import rms_norm_gated_reference, rms_norm_reference, ulp_distance

EPS = 1e-6
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ORDERS = [{}, {"norm_before_gate": False}]
ACTIVATIONS = [{}, {"activation": "sigmoid"}]


def operands(rows, cols, dtype, gate_dtype=None, weight_dtype=None, device="cpu"):
    """(input, gate, weight)"""
    x = random(*rows, cols, dtype=dtype, device=device)
    gate = random(*rows, cols, dtype=gate_dtype or dtype, device=device)
    return x, gate, random_weight(cols, weight_dtype or dtype, device)


def assert_near(got, x, gate, weight, eps=EPS, **options):
    """Within 1 ulp of fp64 rounded once in 16 bits, 4 in what is computed in: of the norm's, the
    activation's and the product's roundings; with cast_before_weight one more for each rounding
    that a near-tie may turn, relative to the product."""
    want = rms_norm_gated_reference(x, gate, weight, eps, **options)
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape
    dtypes = [t.dtype for t in (x, gate, weight) if t is not None]
    computes = FP64 if FP64 in dtypes else FP32
    limit = 1 if got.element_size() < computes.itemsize else 16 if computes == FP64 else 4
    distance = ulp_distance(got, want)
    good = distance <= limit
    if options.get("cast_before_weight"):
        eps = torch.finfo(x.dtype).eps + torch.finfo(got.dtype).eps
        near = (got.double() - want.double()).abs() <= 2 * eps * want.double().abs()
        assert (good | near).all() and good.float().mean() > 0.99
    else:
        assert good.all(), distance.max()
    if got.element_size() < computes.itemsize and got.numel() >= 1000:
        assert (distance > 0).float().mean() < 0.01, "it is not rounded to the nearest"


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    "dtypes, options, order, activation, shape",
    pairs(
        [
            *((t, t, t) for t in (FP32, BF16, FP16, FP64)),
            (BF16, FP32, FP32),
            (FP32, BF16, FP16),
            (FP16, FP16, None),
            (FP32, FP64, FP32),
            (BF16, BF16, FP64),
        ],
        OPTIONS,
        ORDERS,
        ACTIVATIONS,
        [
            ((3, 5), 64, None),
            ((2, 3), 192, 64),
            ((7,), 130, 13),
            ((4,), 4096, None),
            ((3,), 4096, 512),
            ((1,), 9000, 1000),
            ((2, 2), 1, 1),
            ((300,), 128, None),
        ],
    ),
    ids=name,
)
def test_values(device, dtypes, options, order, activation, shape):
    rows, cols, group_size = shape
    dtype, gate_dtype, weight_dtype = dtypes
    x, gate, weight = operands(rows, cols, dtype, gate_dtype, weight_dtype or FP32)
    weight = None if weight_dtype is None else weight
    how = {"group_size": group_size} | options | order | activation
    there = [None if t is None else t.to(device) for t in (x, gate, weight)]
    assert_near(rms_norm_gated(*there, EPS, **how), x, gate, weight, **how)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_more_rows_than_a_tile_holds(device, dtype, order, options):
    """Of groups whose weights differ."""
    x, gate, weight = operands((300,), 1024, dtype)
    there = [t.to(device) for t in (x, gate, weight)]
    how = {"group_size": 256} | order | options
    assert_near(rms_norm_gated(*there, EPS, **how), x, gate, weight, **how)


def eager_norm(x, weight, eps):
    """What is normalized in fp32, and rounded to x's dtype ahead of the weight."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def grouped(t, size):
    h = t.float().unflatten(-1, (-1, size))
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).flatten(-2)


# The formulas of transformers' classes, by what they round, and the options that are theirs.
FAMILIES = {
    "Qwen3-Next": (
        lambda x, g, w: (eager_norm(x, w, EPS) * silu(g.float())).to(x.dtype),
        {"cast_before_weight": True},
    ),
    "Kimi-Linear": (
        lambda x, g, w: (w.float() * grouped(x, 64) * torch.sigmoid(g.float())).to(x.dtype),
        {"activation": "sigmoid"},
    ),
    "Mamba 2": (
        lambda x, g, w: w * grouped(x.float() * silu(g.float()), 64).to(x.dtype),
        {"norm_before_gate": False, "cast_before_weight": True},
    ),
    "Zamba 2": (
        lambda x, g, w: w * grouped(x.float() * silu(g.float()), 16).to(x.dtype),
        {"norm_before_gate": False, "group_size": 16, "cast_before_weight": True},
    ),
    "Falcon-H1": (
        lambda x, g, w: (w.float() * grouped(x.float() * silu(g.float()), 16)).to(x.dtype),
        {"norm_before_gate": False, "group_size": 16},
    ),
}


@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)], ids=name
)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_round_so(device, torch_kernels, family, dtypes):
    """In 16 bits the bits of eager code, but for near-ties of one rounding: of rsqrt, the
    activation and the sum of squares both sides have an fp32 ulp or two of their own."""
    torch_kernels(device)
    eager, options = FAMILIES[family]
    x, gate, weight = operands((64, 3), 64, dtypes[0], weight_dtype=dtypes[1], device=device)
    want, got = eager(x, gate, weight), rms_norm_gated(x, gate, weight, EPS, **options)
    assert got.dtype == want.dtype
    exact = got == want
    if dtypes == (FP32, FP32):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    else:
        eps = max(torch.finfo(t).eps for t in dtypes)
        assert ((got - want).abs() <= 2 * eps * want.abs()).all() and exact.float().mean() > 0.99
        if got.element_size() == 2:
            assert exact.float().mean() > 0.995


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("size", [1, 24, 64, 192])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_groups_have_the_bits_of_rows(device, dtype, size, options):
    x, _, weight = operands((3, 5), 192, dtype)
    x, weight = x.to(device), weight.to(device)
    groups = x.unflatten(-1, (-1, size))
    got = rms_norm(x, 192, None, EPS, group_size=size)
    assert same_bits(got, rms_norm(groups, size, None, EPS).flatten(-2))
    got = rms_norm(x, 192, weight, EPS, group_size=size, **options)
    of_group = zip(groups.unbind(-2), weight.unflatten(0, (-1, size)))
    want = torch.stack([rms_norm(g, size, w, EPS, **options).cpu() for g, w in of_group], -2)
    assert same_bits(got, want.flatten(-2))
    assert same_bits(got, rms_norm_gated(x, None, weight, EPS, group_size=size, **options))
    out = torch.empty_like(got)
    rms_norm(x, (192,), weight, EPS, group_size=size, **options, out=out)
    assert same_bits(out, got)


def test_no_gate_and_no_groups_is_the_norm():
    x, _, weight = operands((3, 5), 96, BF16, weight_dtype=FP32)
    for options in OPTIONS:
        want = rms_norm(x, 96, weight, EPS, **options)
        assert same_bits(rms_norm_gated(x, None, weight, EPS, **options), want)
        assert same_bits(rms_norm_gated(x, None, weight, EPS, group_size=96, **options), want)


def test_groups_of_a_norm_refuse():
    x = torch.ones(3, 2, 8)
    with pytest.raises(ValueError, match="of one dimension beside group_size"):
        rms_norm(x, (2, 8), group_size=4)
    with pytest.raises(RuntimeError, match=r"expected input with shape \[\*, 9\]"):
        rms_norm(x, 9, group_size=3)
    with pytest.raises(RuntimeError, match="whole groups of 3 columns"):
        rms_norm(x, 8, group_size=3)
    with pytest.raises(TypeError, match="expected normalized_shape to be an int or a tuple"):
        rms_norm(x, "8", group_size=4)


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("group_size", [None, 16])
def test_strides(device, torch_kernels, dtype, order, group_size):
    """The gate as a slice of a projection, x as heads of one; what is scattered is copied."""
    cols, how = 64, {"group_size": group_size} | order
    projection = random(2, 5, 3 * cols, dtype=dtype)
    x, gate, weight = projection[..., cols : 2 * cols], projection[..., :cols], random(cols)
    dense = [t.contiguous().to(device) for t in (x, gate)]
    want = rms_norm_gated(x.contiguous(), gate.contiguous(), weight, EPS, **how)
    there = projection.to(device)
    x, gate, weight = there[..., cols : 2 * cols], there[..., :cols], weight.to(device)
    assert same_bits(rms_norm_gated(x, gate, weight, EPS, **how).cpu(), want) or device == "cuda"
    want = rms_norm_gated(*dense, weight, EPS, **how)
    assert same_bits(rms_norm_gated(x, gate, weight, EPS, **how), want)
    turned = [t.transpose(0, 1) for t in (x, gate)]
    assert same_bits(rms_norm_gated(*turned, weight, EPS, **how).transpose(0, 1), want)
    torch_kernels(device)
    scattered = [torch.stack([t, t], -1)[..., 0] for t in (x, gate)]
    assert same_bits(rms_norm_gated(*scattered, weight, EPS, **how), want)
    wide = gate[:1].expand_as(gate)
    dense = rms_norm_gated(x, wide.contiguous(), weight, EPS, **how)
    assert same_bits(rms_norm_gated(x, wide, weight, EPS, **how), dense)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0), (1, 1, 8), (0,)])
@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_shapes(shape, order):
    x, gate, weight = random(*shape), random(*shape), random(shape[-1])
    y, rstd = ops.rms_norm_gated_forward(x, gate, weight, EPS, **order)
    assert y.shape == shape and rstd.shape == shape[:-1]
    assert shape[-1] or rstd.isnan().all()
    y, rstd = ops.rms_norm_gated_forward(x, gate, weight, EPS, group_size=4, **order)
    assert y.shape == shape and rstd.shape == (shape[-1] // 4, *shape[:-1])
    leaves = [t.requires_grad_() for t in (x, gate, weight)]
    grads = torch.autograd.grad(rms_norm_gated(*leaves, EPS, **order).sum(), leaves)
    assert all(g.shape == t.shape and not g.isnan().any() for g, t in zip(grads, leaves))


@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_do_not_depend_on_threads_or_batch(threads, dtype, order):
    x, gate, weight = operands((700,), 192, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.clone().requires_grad_() for t in (x, gate, weight)]
        y = rms_norm_gated(*leaves, EPS, group_size=64, **order)
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), leaves)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))
    alone = rms_norm_gated(x[7], gate[7], weight, EPS, group_size=64, **order)
    assert same_bits(alone, results[0][0][7].detach())


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_instruction_sets_agree(order):
    leaves = [t.requires_grad_() for t in operands((5, 3), 80, BF16, FP32)]
    first = None
    for isa, supported in rmsnorm_cuda._C.isas().items():
        if supported and isa not in ("scalar", "fp64"):
            rmsnorm_cuda._C.set_isa(isa)
            y = rms_norm_gated(*leaves, EPS, group_size=16, **order)
            results = [y, *torch.autograd.grad(y.float().sum(), leaves)]
            first = first or results
            assert all(same_bits(a, b) for a, b in zip(results, first))
    rmsnorm_cuda._C.set_isa(None)


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_rows_out_of_range_are_rescued(device, order):
    """Squares that overflow or vanish in fp32, and what is no number."""
    x, gate, weight = operands((4,), 64, FP32)
    for scale in (1e19, 1e-25):
        there = [t.to(device) for t in (x * scale, gate, weight)]
        got = rms_norm_gated(*there, 0.0, **order)
        assert_near(got, x * scale, gate, weight, 0.0, **order)
    gate[0, 3], gate[1, 5], x[2, 7] = math.nan, math.inf, math.nan
    got = rms_norm_gated(*(t.to(device) for t in (x, gate, weight)), EPS, **order).cpu()
    broken = got.isnan() | got.isinf()
    assert broken[0, 3] and broken[1, 5] and broken[2].all() and not broken[3].any()
    if not order:  # the others of the row are its neighbours'
        assert broken[0].sum() == 1 and broken[1].sum() == 1


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    "dtypes, options, order, activation, shape",
    pairs(
        [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, FP64), (BF16, FP32), (FP32, BF16)],
        OPTIONS,
        ORDERS,
        ACTIVATIONS,
        [((3, 5), 64, None), ((40,), 192, 64), ((7,), 130, 13), ((17,), 2048, None)],
    ),
    ids=name,
)
def test_gradients(device, dtypes, options, order, activation, shape):
    """Against the formula in fp64, which gradcheck has seen. A gradient is a difference of terms
    and a sum of them, in fp32, and is rounded once: relative to the largest of its row or column.
    """
    rows, cols, group_size = shape
    how = {"group_size": group_size} | options | order | activation
    tensors = operands(rows, cols, dtypes[0], dtypes[1], dtypes[1])
    dy = random(*rows, cols, dtype=dtypes[0])

    def grads(device, dtype):
        leaves = [t.to(dtype or t.dtype).to(device).requires_grad_() for t in tensors]
        y = rms_norm_gated(*leaves, EPS, **how)
        return torch.autograd.grad(y, leaves, dy.to(y.dtype).to(device))

    for i, (got, want) in enumerate(zip(grads(device, None), grads("cpu", FP64))):
        assert got.dtype == tensors[i].dtype and got.shape == want.shape
        relative = 2 * torch.finfo(got.dtype).eps
        if options == LLAMA:  # the gate and the weight see what was rounded
            relative += 4 * torch.finfo(dtypes[0]).eps
        scale = want.abs().amax(-1 if i < 2 else None, keepdim=i < 2)
        error = (got.cpu().double() - want).abs()
        assert (error <= relative * want.abs() + (relative / 4 + 4e-6) * scale).all(), i


# Added in fp32 it would turn a quarter of the products, which are rounded to fp32 on the way.
OFFSET_IN_FP64 = {"weight_offset": -0.37, "cast_before_weight": True}


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_beside_a_gate_in_fp64_the_offset_is_added_in_fp64(device, order):
    x, gate, weight = operands((300,), 64, FP32, FP64)
    how = OFFSET_IN_FP64 | order
    y = rms_norm_gated(*(t.to(device) for t in (x, gate, weight)), EPS, **how)
    want = rms_norm_gated_reference(x, gate, weight, EPS, **how)
    assert (ulp_distance(y.cpu(), want) > 0).double().mean() < 1e-3


def test_the_gradient_of_a_gate_in_fp64_sees_that_offset(device):
    x, gate, weight = operands((300,), 64, FP32, FP64)
    leaf = gate.to(device).requires_grad_()
    y = rms_norm_gated(x.to(device), leaf, weight.to(device), EPS, **OFFSET_IN_FP64)
    (got,) = torch.autograd.grad(y, leaf, torch.ones(y.shape).to(device))
    product = (rms_norm_reference(x, 64, eps=EPS) * (weight.double() - 0.37)).float().double()
    gate.requires_grad_()
    (want,) = torch.autograd.grad((silu(gate) * product).sum(), gate)
    assert torch.isclose(got.cpu(), want, rtol=1e-12, atol=0).double().mean() > 0.999


@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name)
@pytest.mark.parametrize("group_size", [None, 3])
def test_derivatives_of_first_and_second_order(order, activation, group_size):
    tensors = [t.requires_grad_() for t in operands((2,), 6, FP64)]

    def function(*tensors):
        how = {"group_size": group_size, "weight_offset": 1.0} | order | activation
        return rms_norm_gated(*tensors, EPS, **how)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    alone = tensors[0], None, tensors[2]
    if group_size:
        assert torch.autograd.gradcheck(function, alone)
        assert torch.autograd.gradgradcheck(function, alone)


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_only_what_is_asked_for_has_a_gradient(order):
    tensors = operands((3,), 8, FP32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(rms_norm_gated(*leaves, EPS, **order).sin().sum(), leaves)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1)):
        some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = rms_norm_gated(*some, EPS, **order)
        grads = torch.autograd.grad(y.sin().sum(), [some[i] for i in wanted])
        assert all(same_bits(g, want[i]) for i, g in zip(wanted, grads))
    x, gate = leaves[:2]
    y = rms_norm_gated(x, gate, None, EPS, **order)
    ones = rms_norm_gated(x, gate, torch.ones(8), EPS, **order)
    a, b = (torch.autograd.grad(t.sin().sum(), (x, gate)) for t in (y, ones))
    assert all(same_bits(*of) for of in zip(a, b))


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_transforms(order):
    tensors = operands((3,), 8, FP32)

    def loss(*tensors):
        return rms_norm_gated(*tensors, EPS, group_size=4, **order).square().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got, grad in zip(torch.func.grad(loss, (0, 1, 2))(*tensors), want):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(loss, tensors, tensors)
    inner = sum((t * g).sum() for t, g in zip(tensors, want))
    torch.testing.assert_close(tangent, inner, rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("options", [{}, {"norm_before_gate": False, "group_size": 16}], ids=name)
def test_compiled_without_a_break(options):
    x, gate, weight = operands((6,), 64, BF16)

    def function(x, gate, weight):
        y = rms_norm_gated(x * 1, gate, weight, EPS, **options)
        return y, rms_norm(x, 64, weight, EPS, group_size=16)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3):
        leaves = [t.clone().requires_grad_() for t in (x[:rows], gate[:rows], weight)]
        results, want = compiled(*leaves), function(*leaves)
        assert all(map(same_bits, results, want))
        grads, wanted = (
            torch.autograd.grad(sum(t.float().sin().sum() for t in r), leaves)
            for r in (results, want)
        )
        assert all(map(same_bits, grads, wanted))


@pytest.mark.slow
def test_inductor():
    x, gate, weight = operands((6,), 64, FP32)

    def function(x, gate):
        out = torch.empty_like(x)
        rms_norm_gated(x, gate, weight, EPS, norm_before_gate=False, out=out)
        return out, rms_norm_gated(x, gate, weight, EPS, activation="sigmoid") + 1

    torch._dynamo.reset()
    assert all(map(same_bits, torch.compile(function, fullgraph=True)(x, gate), function(x, gate)))


def test_exported_as_one_node():
    module = RMSNormGated(64, EPS, group_size=16, norm_before_gate=False)
    x, gate, _ = operands((6,), 64, FP32)
    dims = ({0: torch.export.Dim("rows")},) * 2
    program = torch.export.export(module, (x, gate), dynamic_shapes=dims)
    nodes = [n.target for n in program.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    assert nodes == [ops.rms_norm_gated.default]
    assert same_bits(program.module()(x[:3], gate[:3]), module(x[:3], gate[:3]))
    decomposed = program.run_decompositions(rmsnorm_cuda.decompositions())
    assert not [n for n in decomposed.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    torch.testing.assert_close(decomposed.module()(x[:3], gate[:3]), module(x[:3], gate[:3]))


# --------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("order", ORDERS, ids=name)
@pytest.mark.parametrize("group_size", [None, 16])
def test_out(device, order, group_size):
    x, gate, weight = (t.to(device) for t in operands((3, 5), 64, BF16))
    how = {"group_size": group_size} | order
    want = rms_norm_gated(x, gate, weight, EPS, **how)
    out = torch.empty_like(x)
    assert rms_norm_gated(x, gate, weight, EPS, **how, out=out) is out and same_bits(out, want)
    wide = torch.empty(3, 5, 96, dtype=BF16, device=device)
    rms_norm_gated(x, gate, weight, EPS, **how, out=wide[..., 16:80])
    assert same_bits(wide.cpu()[..., 16:80], want)
    if device != "cuda":  # a lazy clone gets memory of its own
        lazy = torch._lazy_clone(x)
        rms_norm_gated(lazy, gate, weight, EPS, **how, out=lazy)
        assert same_bits(lazy, want) and not same_bits(x, want)
    rms_norm_gated(x, gate, weight, EPS, **how, out=x)
    assert same_bits(x, want)
    both = torch.cat([gate.cpu(), gate.cpu()], -1).to(device)  # beside the gate, in one memory
    rms_norm_gated(both[..., 64:], both[..., :64], weight, EPS, **how, out=both[..., 64:])
    assert same_bits(both.cpu()[..., 64:], rms_norm_gated(gate, gate, weight, EPS, **how))
    assert same_bits(both.cpu()[..., :64], gate)


def test_errors_of_groups_without_a_gate_name_rms_norm():
    with pytest.raises(RuntimeError, match="^rms_norm of groups: expected rows of whole groups"):
        rms_norm(torch.ones(3, 8), 8, group_size=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "relu"}, "activation to be 'silu' or 'sigmoid', but got 'relu'"),
        ({"group_size": 3}, "group_size to divide hidden_size 8, but got 3"),
        ({"group_size": 0}, "group_size to divide hidden_size 8, but got 0"),
    ],
)
def test_a_module_that_no_call_could_take(options, message):
    with pytest.raises(ValueError, match=f"^RMSNormGated: expected {message}"):
        RMSNormGated(8, **options)


X, W = torch.ones(3, 8), torch.ones(8)
# (arguments that differ, exception, what the message says)
BAD = {
    "activation": ({"activation": "relu"}, ValueError, "'silu' or 'sigmoid', but got 'relu'"),
    "group_size": ({"group_size": 0}, ValueError, "group_size to be positive, but got 0"),
    "a rest": ({"group_size": 3}, RuntimeError, "whole groups of 3 columns"),
    "gate's shape": ({"gate": X[:2]}, RuntimeError, "expected gate of shape [3, 8]"),
    "gate's dtype": ({"gate": X.long()}, NotImplementedError, "expected gate to be float32"),
    "input's dtype": ({"input": X.long()}, NotImplementedError, "expected input to be float32"),
    "weight's shape": ({"weight": W[:4]}, RuntimeError, "expected weight to be of same shape"),
    "weight's device": ({"weight": W.to("meta")}, RuntimeError, "on the same device"),
    "a scalar": ({"input": X[0, 0]}, ValueError, "at least one dimension"),
    "eps": ({"eps": -1.0}, ValueError, "eps to be finite and not negative"),
    "weight_offset": ({"weight_offset": math.inf}, ValueError, "weight_offset to be finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    changed, exception, message = BAD[what]
    args = {"input": X, "gate": X, "weight": W} | changed
    with pytest.raises(exception, match=re.escape(message)):
        rms_norm_gated(**args)
    refused_alike_while_tracing(rms_norm_gated, **args)


OUT = torch.full((3, 16), math.nan)
BAD_OUT = {
    "shape": (lambda: OUT[:2, :8], {}, "expected out of shape [3, 8]"),
    "dtype": (lambda: OUT[:, :8].double(), {}, "expected out of dtype Float"),
    "the gate": (lambda: OUT[:, :8], {"gate": OUT[:, :8]}, "out and gate share memory"),
    "part of the input": (lambda: OUT[:, 4:12], {"input": OUT[:, :8]}, "partly overlaps input"),
    "the weight": (lambda: OUT[:, :8], {"weight": OUT[0, :8]}, "out and weight share memory"),
    "scattered": (lambda: OUT[:, ::2], {}, "expected out with dense rows"),
    "one row": (lambda: OUT[:1, :8].expand(3, 8), {}, "rows that do not overlap"),
}


@pytest.mark.parametrize("what", BAD_OUT)
def test_refused_out(what):
    out, changed, message = BAD_OUT[what]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rms_norm_gated(**{"input": X, "gate": X, "weight": W} | changed, out=out())
    assert OUT.isnan().all()


def test_refused_types():
    for changed, message in (
        ({"gate": 1}, "expected gate to be a Tensor or None, but got int"),
        ({"activation": 1}, "expected activation to be a str, but got int"),
        ({"norm_before_gate": 1}, "expected norm_before_gate to be a bool, but got int"),
        ({"group_size": 1.5}, "expected group_size to be an int or None, but got float"),
        ({"weight": 8}, "takes no normalized_shape"),
        ({"out": 1}, "expected out to be a Tensor or None, but got int"),
    ):
        with pytest.raises(TypeError, match=message):
            rms_norm_gated(**{"input": X, "gate": X} | changed)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        rms_norm_gated(X.clone().requires_grad_(), X, out=torch.empty_like(X))


def test_backward_refuses():
    rstd = torch.ones(3)
    for changed, message in (
        ({"rstd": torch.ones(2)}, "expected rstd of shape [3]"),
        ({"grad_output": X[:2]}, "expected grad_output of shape [3, 8]"),
        ({"group_size": 4}, "expected rstd of shape [2, 3]"),
        ({"rstd": rstd.double()}, "expected rstd of dtype Float"),
    ):
        args = {"grad_output": X, "input": X, "gate": X, "weight": W, "rstd": rstd, "eps": None}
        args |= {"output_mask": [True] * 3} | changed
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.rms_norm_gated_backward(**args)


# ------------------------------------------------------------------------------------------ module


def test_module():
    x, gate, weight = operands((3,), 64, BF16)
    for options in (
        {},
        {"group_size": 16, "norm_before_gate": False, "cast_before_weight": True},
        {"activation": "sigmoid", "weight_offset": 1.0},
    ):
        module = RMSNormGated(64, 1e-5, dtype=BF16, **options)
        want = rms_norm_gated(x, gate, module.weight, 1e-5, **options)
        assert same_bits(module(x, gate).detach(), want.detach())
        assert (module.weight == 1 - options.get("weight_offset", 0)).all()
        module.load_state_dict({"weight": weight})
        want = rms_norm_gated(x, None, weight, 1e-5, **options)
        assert same_bits(module(x).detach(), want)
        told = repr(module)
        assert all(f"{key}={value}" in told for key, value in options.items())
        module(x, gate).float().sum().backward()
        assert module.weight.grad.abs().sum() > 0
    bare = RMSNormGated(64, elementwise_affine=False)
    assert bare.weight is None and not list(bare.parameters())
    assert repr(bare) == "RMSNormGated(64, eps=None, elementwise_affine=False)"
    assert same_bits(bare(x, gate), rms_norm_gated(x, gate))
    meta = RMSNormGated(64, device="meta")
    assert meta(x.to("meta"), gate.to("meta")).shape == x.shape


def test_gemma_offset_is_added_in_fp32():
    x, gate, weight = operands((3,), 64, BF16)
    got = rms_norm_gated(x, gate, weight, EPS, **GEMMA)
    assert same_bits(got, rms_norm_gated(x, gate, weight.float() + 1, EPS))
