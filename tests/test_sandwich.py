"""rms_norm_add and rms_norm_add_rms_norm: the bits of the steps, layouts, in place, what is
refused, gradients, and torch.compile.
"""

import pytest
import torch
from cases import (
    GEMMA,
    LLAMA,
    OPTIONS,
    ROWS,
    Calls,
    formula,
    name,
    ops,
    pairs,
    random,
    random_weight,
    refused_alike_while_tracing,
    same_bits,
)

import rmsnorm_cuda
from rmsnorm_cuda import (
    fused_add_rms_norm,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
)
from rmsnorm_cuda.reference import ulp_distance

EPS = 1e-6
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Of input, residual, input_weight and weight.
DTYPES = (
    *((t, t, t, t) for t in (FP32, FP16, BF16, FP64)),
    (FP16, FP32, FP16, FP16),
    (BF16, FP32, BF16, FP32),
    (BF16, FP32, FP32, BF16),
    (BF16, BF16, FP32, FP32),
    (FP16, FP16, BF16, None),
    (FP32, FP32, None, FP64),
    (BF16, BF16, None, None),
)
SHAPES = [*((rows, 64) for rows in ROWS), (1, 1), (21, 128), (9, 1025), (2, 9000), (100, 2304)]


def operands(rows, cols, dtypes, device="cpu"):
    """(input, residual, input_weight, weight)"""
    x, residual = (random(rows, cols, dtype=t) for t in dtypes[:2])
    weights = (random_weight(cols, t) for t in dtypes[2:])
    return [t if t is None else t.to(device) for t in (x, residual, *weights)]


def fits(dtypes, options):
    """A norm of a wider dtype than the sum's is not added to it."""
    x, residual, weight, _ = dtypes
    if options.get("cast_before_weight") and weight is not None:
        x = torch.promote_types(x, weight)
    return residual == x or (residual == FP32 and x in (FP16, BF16))


def steps(input, residual, input_weight, weight, eps, scale=1.0, **options):
    """(output, residual_out) one step after the other, on the CPU but for the norms."""
    device, cols = input.device, input.shape[-1:]
    norm = rms_norm(input, cols, input_weight, eps, **options).cpu()
    total = (norm + residual.cpu()).to(residual.dtype)
    total = total if scale == 1.0 else total * scale
    # -0 changes no bit of it: what the fused addition makes of the norm's dtype
    zeros = torch.full_like(norm, -0.0).to(device)
    return fused_add_rms_norm(zeros, total.to(device), weight, eps, **options)[0].cpu(), total


def alike(got, want, dtypes, device):
    """The same bits. On CUDA a sum in fp32 beside 16 bits is summed up in another order than in
    the steps, and beside fp64 all is in fp64: one of 10,000 may fall to the other side of a tie.
    """
    if same_bits(got, want):
        return True
    in_double = {t == FP64 for t in dtypes if t is not None}
    if device == "cpu" or (dtypes[0] == dtypes[1] and len(in_double) == 1):
        return False
    distance = ulp_distance(got.cpu(), want)
    return distance.max() <= 1 and (distance > 0).sum() <= 1 + distance.numel() // 10_000


@pytest.mark.parametrize(
    "dtypes, options, scale",
    [c for c in pairs(DTYPES, OPTIONS, (1.0, 0.37)) if fits(c[0], c[1])],
    ids=name,
)
def test_bits_of_the_steps(dtypes, options, scale, device, painted):
    for rows, cols in SHAPES:
        x, residual, input_weight, weight = operands(rows, cols, dtypes, device)
        want = steps(x, residual, input_weight, weight, EPS, scale, **options)
        how = {"scale": scale} | options
        got = rms_norm_add_rms_norm(x, residual, input_weight, weight, EPS, **how)
        near = (alike(a, b, dtypes, device) for a, b in zip(got, want, strict=True))
        assert all(near), (rows, cols)
        want = [t.cpu() for t in got]
        out = [torch.empty_like(t) for t in got]
        returned = rms_norm_add_rms_norm(x, residual, input_weight, weight, EPS, out=out, **how)
        assert all(a is b for a, b in zip(returned, out)) and all(map(same_bits, out, want))
        if scale == 1.0:
            assert same_bits(rms_norm_add(x, residual, input_weight, EPS, **options), want[1])
            out = torch.empty_like(residual)
            assert rms_norm_add(x, residual, input_weight, EPS, out=out, **options) is out
            assert same_bits(out, want[1])
        if want[0].dtype == x.dtype:
            done = rms_norm_add_rms_norm_(x, residual, input_weight, weight, EPS, **how)
            assert done is None and all(map(same_bits, (x, residual), want))


def test_addition_alone(device):
    for dtypes, options in (((BF16,) * 4, {}), ((FP32,) * 4, GEMMA), ((FP16, FP32) * 2, LLAMA)):
        x, residual, weight, _ = operands(33, 300, dtypes, device)
        weight = weight.to(x.dtype)
        want = steps(x, residual, weight, None, None, **options)[1]
        assert same_bits(rms_norm_add(x, residual, weight, **options), want)
        for out in (x.clone(), residual.clone()):
            if out.dtype != want.dtype:
                continue
            given = (out, residual) if same_bits(out, x) else (x, out)
            assert rms_norm_add(*given, weight, out=out, **options) is out
            assert same_bits(out, want)


@pytest.mark.parametrize("scale", (1.0, 2.5))
def test_hard_rows(device, scale):
    """NaN, infinity, zeros of both signs and what overflows pass as in the steps."""
    for dtype in (FP32, FP16, BF16):
        x, residual = random(6, 130, dtype=dtype), random(6, 130, dtype=dtype)
        x[0, 3], residual[1, 4], residual[2, 5] = torch.nan, torch.inf, -torch.inf
        x[3], residual[3] = -0.0, -0.0
        residual[4] = torch.finfo(dtype).max
        residual[5] = torch.finfo(dtype).tiny / 4
        there = x.to(device), residual.to(device), None, None, EPS
        want = steps(*there, scale)
        got = rms_norm_add_rms_norm(*there, scale=scale)
        assert all(map(same_bits, got, want))
        assert torch.equal(got[1].cpu().signbit()[3], want[1].signbit()[3])


def test_layouts(device, painted, torch_kernels):
    torch_kernels(device)  # for the way back of a strided tensor
    whole = random(5, 7, 3 * 64, dtype=BF16)
    x = whole.to(device)[..., 64:128]
    residual = random(7, 5, 64, dtype=BF16).to(device).transpose(0, 1)
    weights = random(64, dtype=BF16, device=device), random(2, 64, device=device).t()[:, 1]
    want = steps(x, residual, *weights, None)
    for a, b in zip(rms_norm_add_rms_norm(x, residual, *weights), want, strict=True):
        assert a.is_contiguous() and same_bits(a, b)
    assert same_bits(rms_norm_add(x, residual, weights[0]), want[1])
    for given in (
        (x[:1].expand(6, 7, 64), residual[:1].expand(6, 7, 64)),  # rows are repeated
        (random(64, 6, device=device).t(), random(64, 6, device=device).t()),  # not dense
    ):
        want_copied = steps(*given, *weights, None)
        got = rms_norm_add_rms_norm(*given, *weights)
        assert all(map(same_bits, got, want_copied))
    before = whole[..., :64].clone(), whole[..., 128:].clone()
    rms_norm_add_rms_norm_(x, residual, *weights)
    assert same_bits(x, want[0]) and same_bits(residual, want[1])
    if device == "cpu":
        assert torch.equal(whole[..., :64], before[0]) and torch.equal(whole[..., 128:], before[1])


@pytest.mark.parametrize("shape", ((0, 64), (3, 0), (2, 0, 8)), ids=str)
def test_empty(shape, device, torch_kernels):
    x = torch.empty(shape).to(device)
    output, total = rms_norm_add_rms_norm(x, x.clone(), None, None)
    assert output.shape == total.shape == rms_norm_add(x, x.clone()).shape == shape
    assert rms_norm_add_rms_norm(x, x.clone(), None, None, out=(output, total)) == (output, total)
    assert rms_norm_add(x, x.clone(), out=output) is output
    rms_norm_add_rms_norm_(x, x.clone(), None, None)
    torch_kernels(device)  # for the fill of rstd
    for rstds in (
        ops.rms_norm_add_forward(x, x.clone())[1:],
        ops.rms_norm_add_rms_norm_forward(x, x.clone(), None, None)[2:],
    ):
        assert all(t.shape == shape[:-1] and t.isnan().all() for t in rstds)


def test_one_dimension():
    x, residual, *weights = (random(40) for _ in range(4))
    got = rms_norm_add_rms_norm(x, residual, *weights, EPS)
    assert all(map(same_bits, got, steps(x, residual, *weights, EPS)))
    assert same_bits(rms_norm_add(x, residual, weights[0], EPS), got[1])


def test_rstd():
    x, residual, *weights = operands(9, 64, (BF16, FP32, BF16, FP32))
    output, total, first, second = ops.rms_norm_add_rms_norm_forward(
        x, residual, *weights, EPS, scale=0.5
    )
    assert same_bits(first, ops.rms_norm_forward(x, [64], weights[0], EPS)[1])
    assert same_bits(second, ops.rms_norm_forward(total, [64], weights[1], EPS)[1])
    total, rstd = ops.rms_norm_add_forward(x, residual, weights[0], EPS)
    assert same_bits(rstd, first)


def test_large():
    """More than the caches hold: new pages, and writes past the caches."""
    x, residual, *weights = operands(1200, 8192, (FP32,) * 4)
    want = steps(x, residual, *weights, EPS)
    got = rms_norm_add_rms_norm(x, residual, *weights, EPS)
    assert all(map(same_bits, got, want))
    assert same_bits(rms_norm_add(x, residual, weights[0], EPS), want[1])
    rms_norm_add_rms_norm_(x, residual, *weights, EPS)
    assert same_bits(x, want[0]) and same_bits(residual, want[1])


@pytest.mark.parametrize("scale", (1, 0.5))
def test_threads_give_the_same_bits(threads, scale):
    x, residual, *weights = operands(600, 1000, (BF16,) * 4)
    results = []
    for count in (1, 2, 3):
        threads(count)
        pair = rms_norm_add_rms_norm(x, residual, *weights, scale=scale)
        results.append((*pair, rms_norm_add(x, residual, weights[0])))
    assert all(all(map(same_bits, result, results[0])) for result in results[1:])


# --------------------------------------------------------------------------------------- errors

F32 = torch.ones(2, 8)
WRONG = (
    ({"residual": torch.zeros(2, 9)}, RuntimeError, r"residual of input's shape \[2, 8\]"),
    ({"residual": F32.bfloat16()}, RuntimeError, "residual of input's dtype Float, but got BFloat"),
    ({"residual": F32.to("meta")}, RuntimeError, "residual is on meta"),
    ({"weight": torch.zeros(9)}, RuntimeError, r"weight of shape \[9\]"),
    ({"weight": torch.zeros(8, dtype=torch.int32)}, NotImplementedError, "expected weight to be"),
    ({"input": F32.int(), "residual": F32.int()}, NotImplementedError, "Int"),
    ({"input": torch.zeros(()), "residual": torch.zeros(())}, ValueError, "scalar"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"weight_offset": torch.inf}, ValueError, "weight_offset"),
)
WRONG_PAIR = (
    *WRONG,
    ({"input_weight": torch.zeros(9)}, RuntimeError, r"input_weight of shape \[8\], but got \[9\]"),
    ({"input_weight": torch.zeros(8).int()}, NotImplementedError, "input_weight"),
    ({"scale": torch.nan}, ValueError, "expected scale to be finite"),
    ({"scale": "1"}, TypeError, "expected scale to be a number, but got str"),
    ({"input_weight": 8}, TypeError, "expected input_weight to be a Tensor or None, but got int"),
)
CASES = [(rms_norm_add, *wrong) for wrong in WRONG]
CASES += [(f, *w) for f in (rms_norm_add_rms_norm, rms_norm_add_rms_norm_) for w in WRONG_PAIR]


@pytest.mark.parametrize("function, change, error, message", CASES, ids=range(len(CASES)))
def test_errors(function, change, error, message):
    arguments = {"input": F32.clone(), "residual": F32.clone(), "weight": torch.ones(8)}
    if function is not rms_norm_add:
        arguments["input_weight"] = torch.ones(8)
    arguments |= {"eps": EPS} | change
    with pytest.raises(error, match=message):
        function(**arguments)
    if error is not TypeError:
        refused_alike_while_tracing(function, **arguments)
    first = arguments["input"]
    assert (first == first.flatten()[0]).all(), "something was written"


def test_a_norm_that_is_wider_than_the_residual():
    """Its sum would be of the norm's dtype."""
    x, wide = torch.ones(4, 8, dtype=BF16), torch.ones(8)
    for call in (
        lambda: rms_norm_add(x, x.clone(), wide, **LLAMA),
        lambda: rms_norm_add_rms_norm(x, x.clone(), wide, None, **LLAMA),
        lambda: rms_norm_add_rms_norm_(x, x.clone(), wide, None, **LLAMA),
    ):
        with pytest.raises(RuntimeError, match="residual of the norm's dtype Float, but got BFl"):
            call()
    assert rms_norm_add(x, x.float(), wide, **LLAMA).dtype == FP32
    output, total = rms_norm_add_rms_norm(x, x.float(), wide, None, **LLAMA)
    assert output.dtype == total.dtype == FP32


def test_errors_of_what_is_written():
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    args = None, None
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        rms_norm_add_rms_norm_(x.clone().requires_grad_(), y, *args)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        rms_norm_add(x, y, torch.ones(8, requires_grad=True), out=torch.empty(4, 8))
    with pytest.raises(RuntimeError, match="input and residual share memory"):
        rms_norm_add_rms_norm_(x, x, *args)
    with pytest.raises(RuntimeError, match="rows that do not overlap"):
        rms_norm_add_rms_norm_(torch.ones(1, 8).expand(4, 8), y, *args)
    with pytest.raises(RuntimeError, match="the normalized dimensions contiguous"):
        rms_norm_add_rms_norm_(torch.ones(8, 4).t(), y, *args)
    with pytest.raises(RuntimeError, match="cannot take the place of input"):
        rms_norm_add_rms_norm_(x.bfloat16(), y.bfloat16(), None, torch.ones(8), **LLAMA)
    whole = torch.ones(4, 16)
    for weights in ((whole[1, :8], None), (None, whole[1, :8])):
        with pytest.raises(RuntimeError, match="weight share memory"):
            rms_norm_add_rms_norm_(whole[:, :8], y, *weights)
    with pytest.raises(RuntimeError, match="out and weight share memory"):
        rms_norm_add(x, y, whole[1, :8], out=whole[:, :8])
    with pytest.raises(RuntimeError, match="out partly overlaps input"):
        rms_norm_add(whole.flatten()[8:40].view(4, 8), y, out=whole.flatten()[:32].view(4, 8))
    with pytest.raises(RuntimeError, match="out partly overlaps residual"):
        rms_norm_add(y, whole.flatten()[8:40].view(4, 8), out=whole.flatten()[:32].view(4, 8))
    with pytest.raises(RuntimeError, match="out of dtype Float, but got BFloat16"):
        rms_norm_add(x, y, out=x.bfloat16())
    with pytest.raises(RuntimeError, match="residual_out of dtype Float, but got Double"):
        rms_norm_add_rms_norm(x, y, *args, out=(x.clone(), x.double()))
    with pytest.raises(RuntimeError, match="out and residual_out share memory"):
        rms_norm_add_rms_norm(x.clone(), y.clone(), *args, out=(x, x))
    with pytest.raises(ValueError, match="expected out to hold 2 tensors, but got 1"):
        rms_norm_add_rms_norm(x, y, *args, out=(x,))
    with pytest.raises(TypeError, match="expected out to be a tuple of 2 tensors"):
        rms_norm_add_rms_norm(x, y, *args, out=x)
    with pytest.raises(TypeError, match="expected out to be a Tensor"):
        rms_norm_add(x, y, out=(x,))
    assert (x == 1).all() and (y == 1).all() and (whole == 1).all()


def test_versions():
    x = torch.ones(4, 8)
    with torch.no_grad():
        leaf, before = x.clone().requires_grad_(), 0
        rms_norm_add_rms_norm_(leaf, x.clone(), None, None)
        assert leaf._version > before


# ------------------------------------------------------------------------------------ gradients


def in_double(leaves, options, scale=1.0):
    """The pair in ATen ops and fp64, roundings aside: leaves, output, sum."""
    there = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    x, residual, input_weight, weight = there
    total = (residual + formula(x, x.shape[-1:], input_weight, EPS, **options)) * scale
    return there, formula(total, x.shape[-1:], weight, EPS, **options), total


def assert_close(got, want, dtypes, casts):
    """A few roundings of each dtype on the way, relative to the largest."""
    for a, b, dtype in zip(got, want, dtypes, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.dtype == dtype
        eps = max(torch.finfo(t).eps for t in dtypes if t is not None)
        bound = 8 * eps * (2 if casts else 1)
        assert (a.double() - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize(
    "dtypes, used, options, scale",
    pairs(
        ((FP32,) * 4, (BF16,) * 4, (BF16, FP32, BF16, FP32), (FP32, FP32, None, None)),
        ("both", "output", "residual_out"),
        OPTIONS,
        (1.0, 0.37),
    ),
    ids=name,
)
def test_gradients(dtypes, used, options, scale, device, torch_kernels):
    """Beside the formula in fp64."""
    if scale != 1.0:
        torch_kernels(device)
    leaves = operands(9, 300, dtypes)
    there = [None if t is None else t.to(device).requires_grad_() for t in leaves]
    results = rms_norm_add_rms_norm(*there, EPS, scale=scale, **options)
    wants, *want = in_double(leaves, options, scale)
    names = ("output", "residual_out")
    use = [i for i, n in enumerate(names) if used in ("both", n)]
    upstream = [random(9, 300, dtype=results[i].dtype) for i in use]
    given = [t for t in there if t is not None]
    got = torch.autograd.grad(
        [results[i] for i in use], given, [t.to(device) for t in upstream], allow_unused=True
    )
    want = torch.autograd.grad(
        [want[i] for i in use],
        [t for t in wants if t is not None],
        [t.double() for t in upstream],
        allow_unused=True,
    )
    got = [None if t is None else t.cpu() for t in got]
    assert_close(got, want, [t.dtype for t in given], options.get("cast_before_weight"))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtypes", ((FP32,) * 3, (BF16,) * 3, (BF16, FP32, BF16)), ids=name)
def test_gradients_of_the_addition(dtypes, options, device):
    leaves = operands(9, 300, (*dtypes, None))
    there = [t.to(device).requires_grad_() for t in leaves[:3]]
    total = rms_norm_add(*there, EPS, **options)
    wants, _, want = in_double(leaves, options)
    upstream = random(9, 300, dtype=total.dtype)
    got = torch.autograd.grad(total, there, upstream.to(device))
    want = torch.autograd.grad(want, wants[:3], upstream.double())
    assert_close([t.cpu() for t in got], want, dtypes, options.get("cast_before_weight"))


@pytest.mark.parametrize("which", range(4))
def test_one_gradient_alone(which):
    """And no other is computed: the rest of what is recorded needs none."""
    leaves = operands(5, 64, (FP32,) * 4)
    everything = [t.clone().requires_grad_() for t in leaves]
    output, total = rms_norm_add_rms_norm(*everything, EPS)
    (output.sin().sum() + total.cos().sum()).backward()
    leaves[which].requires_grad_()
    output, total = rms_norm_add_rms_norm(*leaves, EPS)
    assert output.requires_grad and total.requires_grad == (which != 3)
    with Calls() as calls:
        (output.sin().sum() + total.cos().sum()).backward()
    assert same_bits(leaves[which].grad, everything[which].grad)
    assert len(calls.ours) == (2 if which in (0, 2) else 1)
    leaves[which].requires_grad_(False)
    if which == 3:
        return
    leaf = leaves[which].clone().requires_grad_()
    given = [leaf if i == which else t for i, t in enumerate(leaves)][:3]
    got = torch.autograd.grad(rms_norm_add(*given, EPS).sum(), leaf)[0]
    whole = [t.clone().requires_grad_() for t in leaves[:3]]
    assert same_bits(got, torch.autograd.grad(rms_norm_add(*whole, EPS).sum(), whole)[which])


@pytest.mark.parametrize("scale", (1, 0.5))
def test_gradcheck_and_second_derivatives(scale):
    leaves = [t.requires_grad_() for t in operands(3, 5, (FP64,) * 4)]

    def pair(x, residual, input_weight, weight):
        options = {"weight_offset": 0.5, "scale": scale}
        return rms_norm_add_rms_norm(x, residual, input_weight, weight, 1e-3, **options)

    def add(x, residual, weight):
        return rms_norm_add(x, residual, weight, 1e-3, weight_offset=0.5)

    for function, inputs in ((pair, leaves), (add, leaves[:3])):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda i, r: pair(i, r, *leaves[2:])[0].sum()), in_dims=(0, 0)
    )
    want = torch.autograd.grad(pair(*leaves)[0].sum(), leaves[0])[0]
    torch.testing.assert_close(per_sample(leaves[0].detach(), leaves[1].detach()), want)


# ------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(backend, dynamic):
    def layer(x, residual, input_weight, weight):
        y, residual = rms_norm_add_rms_norm(x, residual, input_weight, weight, EPS)
        return y * 2, rms_norm_add(y, residual, weight, EPS)

    leaves = [t.requires_grad_() for t in operands(4, 64, (FP32,) * 4)]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for got, want in zip(compiled(*leaves), layer(*leaves), strict=True):
        assert torch.equal(got, want)
    want = torch.autograd.grad([t.sum() for t in layer(*leaves)], leaves)
    got = torch.autograd.grad([t.sum() for t in compiled(*leaves)], leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_what_is_written():
    def layer(x, residual, weight):
        y, out = x * 2, torch.empty_like(x)
        rms_norm_add_rms_norm_(y, residual, weight, None, EPS, scale=0.5)
        rms_norm_add(y, residual, weight, EPS, out=out)
        pair = rms_norm_add_rms_norm(y, out, None, weight, out=(torch.empty_like(x), x * 1))
        return y + 1, out, *pair

    x, residual, weight, _ = operands(4, 64, (FP32,) * 4)
    want_residual = residual.clone()
    want = layer(x, want_residual, weight)
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True)(x, residual, weight)
    assert all(map(same_bits, got, want)) and same_bits(residual, want_residual)


class Layer(torch.nn.Module):
    def forward(self, x, residual, input_weight, weight):
        y, total = rms_norm_add_rms_norm(x, residual, input_weight, weight, EPS, **GEMMA)
        return y, rms_norm_add(y, total, weight, EPS)


def test_export_and_decompose():
    """A node each; and the formula, within an ulp of its intermediate results."""
    args = tuple(operands(4, 64, (FP32,) * 4))
    exported = torch.export.export(Layer(), args)
    mine = [n.target for n in exported.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    assert mine == [ops.rms_norm_add_rms_norm.default, ops.rms_norm_add.default]
    assert all(map(same_bits, exported.module()(*args), Layer()(*args)))
    table = torch.export.default_decompositions() | rmsnorm_cuda.decompositions()
    decomposed = exported.run_decompositions(table)
    assert not any("rmsnorm_cuda" in str(n.target) for n in decomposed.graph.nodes)
    for a, b in zip(decomposed.module()(*args), Layer()(*args)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_formula_under_compile(monkeypatch):
    monkeypatch.setattr(rmsnorm_cuda.config, "decompose", True)
    args = operands(4, 64, (FP32,) * 4)
    torch._dynamo.reset()
    got = torch.compile(Layer(), fullgraph=True)(*args)
    for a, b in zip(got, Layer()(*args)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_public():
    names = {"rms_norm_add", "rms_norm_add_rms_norm", "rms_norm_add_rms_norm_"}
    assert names <= set(rmsnorm_cuda.__all__)
