"""The pass of Inductor: what it takes has our bits, what is another function stays, and what was
measured decides.
"""

import json
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import GEMMA, LLAMA, TINY, random, random_weight, same_bits
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import rmsnorm_cuda
from rmsnorm_cuda import fused_add_rms_norm, rms_norm, rms_norm_quant
from rmsnorm_cuda.integrations import inductor
from rmsnorm_cuda.integrations.inductor import fuse
from rmsnorm_cuda.reference import ulp_distance

ROOT = Path(__file__).parents[1]
EPS, COLUMNS = 1e-3, 40
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, where="everywhere", dynamic=False):
    """The function as Dynamo records it and the pass leaves it, run by eager; and what was
    explained."""
    lines = []
    fuse_norms = fuse(where, lines.append)

    def backend(module, inputs):
        fuse_norms(module.graph)
        module.graph.lint()
        module.recompile()
        lines.append([n.target for n in module.graph.nodes if ours(n)])
        return module

    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic), lines


def ours(node):
    return (
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "rmsnorm_cuda"
    )


def taken(lines):
    """The ops of the only graph, by name."""
    (found,) = [line for line in lines if isinstance(line, list)]
    return [op._schema.name.partition("::")[2] for op in found]


# ---------------------------------------------------------------- forms of the norm


def scaled(x):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x, w):
    return w * scaled(x).to(x.dtype)


def gemma(x, w):
    return (scaled(x) * (1.0 + w.float())).type_as(x)


def olmo(x, w):
    return (w * scaled(x)).to(x.dtype)


def t5(x, w):
    variance = x.to(FP32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return w * (x.to(w.dtype) if w.dtype in (BF16, FP16) else x)


def gemma_4(x, w):
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).type_as(x)


def divided(x, w):
    wide = x.to(torch.float32)
    return (wide / torch.sqrt(EPS + torch.mean(wide * wide, dim=-1, keepdim=True)) * w).type(
        x.dtype
    )


def squared(x, w):
    wide = x.float()
    return (wide * (wide.square().mean((-1,), True) + EPS).rsqrt() * w.float()).to(dtype=x.dtype)


def power(x, w):
    wide = x.float()
    root = torch.rsqrt(torch.mean(wide**2, dim=x.dim() - 1, keepdim=True).add(EPS))
    return torch.mul(torch.multiply(root, wide), w.float()).to(x)


FORMS = {  # and the options of the norm that it is
    "F.rms_norm": (lambda x, w: F.rms_norm(x, (COLUMNS,), w, EPS), {}),
    "torch.rms_norm": (lambda x, w: torch.rms_norm(x, (COLUMNS,), w, EPS), {}),
    "llama": (llama, LLAMA),
    "gemma": (gemma, GEMMA),
    "olmo": (olmo, {}),
    "gemma 4": (gemma_4, {}),
    "divided": (divided, {}),
    "squared": (squared, {}),
    "power": (power, {}),
}
MIXED = [(FP16, FP16), (BF16, FP32), (FP32, BF16)]


def assert_is(got, want, formula, dtype):
    """Our bits, and those of the formula where no fp32 step of it rounds a near-tie another way."""
    assert same_bits(got, want)
    ulps = ulp_distance(got, formula).double() * torch.finfo(got.dtype).eps / torch.finfo(dtype).eps
    assert ulps.max() <= (6 if dtype == FP32 else 2)  # fp32: a mean, a root and three products
    assert (ulps > 0).double().mean() < 0.05 or dtype == FP32


@pytest.mark.parametrize(
    "form, dtype, weight_dtype",
    [
        *((form, dtype, dtype) for form in FORMS for dtype in (FP32, BF16)),
        *((form, *mixed) for form in ("F.rms_norm", "llama", "gemma") for mixed in MIXED),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own
def test_forms(form, dtype, weight_dtype):
    function, options = FORMS[form]
    x, weight = random(3, 50, COLUMNS, dtype=dtype), random_weight(COLUMNS, weight_dtype)
    run, lines = compiled(function)
    want = rms_norm(x, COLUMNS, weight, EPS, **options)
    assert_is(run(x, weight), want, function(x, weight), dtype)
    assert taken(lines) == ["rms_norm"]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_t5(dtype):
    x, weight = random(50, COLUMNS, dtype=dtype), random_weight(COLUMNS, dtype)
    run, lines = compiled(t5)
    options = {} if dtype == FP32 else LLAMA
    assert_is(run(x, weight), rms_norm(x, COLUMNS, weight, EPS, **options), t5(x, weight), dtype)
    assert taken(lines) == ["rms_norm"]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_without_a_weight(dtype):
    x = random(50, COLUMNS, dtype=dtype)
    for function in (lambda x: scaled(x).to(x.dtype), lambda x: F.rms_norm(x, (COLUMNS,), eps=EPS)):
        run, lines = compiled(function)
        assert_is(run(x), rms_norm(x, COLUMNS, None, EPS), function(x), dtype)
        assert taken(lines) == ["rms_norm"]


def test_a_weight_that_is_rounded_after_one_is_added():
    """In bf16 that is a weight of its own, not Gemma's offset."""
    x, weight = random(50, COLUMNS, dtype=BF16), random_weight(COLUMNS, BF16)
    for function, options in (
        (lambda x, w: (scaled(x) * (1 + w)).to(x.dtype), {}),
        (lambda x, w: (1 + w) * scaled(x).to(x.dtype), LLAMA),
    ):
        run, lines = compiled(function)
        want = rms_norm(x, COLUMNS, 1 + weight, EPS, **options)
        assert_is(run(x, weight), want, function(x, weight), BF16)
        assert taken(lines) == ["rms_norm"]


def test_modules_and_eps_of_its_own():
    module = nn.Sequential(nn.RMSNorm(COLUMNS), nn.Linear(COLUMNS, COLUMNS))
    run, lines = compiled(module)
    x = random(5, COLUMNS)
    torch.testing.assert_close(run(x), module(x))
    assert taken(lines) == ["rms_norm"] and "0: rms_norm of 5x40 fp32, training" in lines[0]


@pytest.mark.parametrize("form", ["llama", "gemma", "olmo", "F.rms_norm"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients(form, dtype):
    """They are ours."""
    function, options = FORMS[form]
    x, weight = random(50, COLUMNS, dtype=dtype), random_weight(COLUMNS, dtype)
    leaves = x.requires_grad_(), weight.requires_grad_()
    dy = random(50, COLUMNS, dtype=dtype)
    run, lines = compiled(function)

    def gradients(y):
        return torch.autograd.grad(y, leaves, dy)

    got = gradients(run(*leaves))
    assert "training" in lines[0] and taken(lines) == ["rms_norm"]
    want = gradients(rms_norm(x, COLUMNS, weight, EPS, **options))
    assert all(map(same_bits, got, want))
    # In bf16 the formula rounds each product, and the weight's gradient of 50 rows after each.
    for a, b in zip(got, gradients(function(*leaves))):
        torch.testing.assert_close(a, b, **({} if dtype == FP32 else {"rtol": 0.02, "atol": 0.1}))


# ---------------------------------------------------------------- what stays


def layer_norm(x, w):
    return F.layer_norm(x, (COLUMNS,), w)


def with_a_sum(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def eps_behind_the_root(x, w):
    return w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS))


def other_dimension(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS))


def all_dimensions(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean() + EPS))


def cube(x, w):
    return w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS))


def in_the_dtype(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def another_scaled(x, w):
    return w * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def root_times(x, w):
    return w * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def root_over(x, w):
    return w * (torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / x)


def other_power(x, w):
    return w * (x * (x.pow(2).mean(-1, keepdim=True) + EPS) ** -0.25)


def no_eps(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def eps_of_a_tensor(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[:1]))


def stays_wide(x, w):
    return w.float() * scaled(x)


def rounded_elsewhere(x, w):
    return w.half() * scaled(x).half()


def rounded_then_widened(x, w):
    return w.float() * scaled(x).to(x.dtype)


def variance_kept(x, w):
    variance = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS)), variance


def two_dimensions(x, w):
    return F.rms_norm(x, x.shape[-2:], None, EPS)


def transposed(x, w):
    return w * scaled(x.transpose(0, 1))


def batched(x, w):
    return torch.func.vmap(lambda x: F.rms_norm(x, (COLUMNS,), w, EPS))(x)


def scalar(x, w):
    x = x.sum()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


STAYS = {  # a function, the dtype, and what is said
    "sum": (with_a_sum, FP32, None),
    "layer norm": (layer_norm, FP32, None),
    "cube": (cube, FP32, None),
    "eps": (eps_behind_the_root, FP32, "is not used by one add alone"),
    "dimension": (other_dimension, FP32, "not over the last dimension"),
    "dimensions": (all_dimensions, FP32, "not over the last dimension"),
    "in bf16": (in_the_dtype, BF16, "computed in torch.bfloat16"),
    "in fp64": (in_the_dtype, torch.float64, "computed in torch.float64"),
    "another scaled": (another_scaled, FP32, "does not scale in float32 what was squared"),
    "root times": (root_times, FP32, "is not used by one div alone"),
    "root over": (root_over, FP32, "does not scale in float32 what was squared"),
    "other power": (other_power, FP32, "is no power of -0.5"),
    "no eps": (no_eps, FP32, "is not used by one add alone"),
    "eps of a tensor": (eps_of_a_tensor, FP32, "adds no number"),
    "wide": (stays_wide, BF16, "not rounded to torch.bfloat16"),
    "another dtype": (rounded_elsewhere, BF16, "not rounded to torch.bfloat16"),
    "widened": (rounded_then_widened, BF16, "its result is torch.float32, ours would be"),
    "variance kept": (variance_kept, FP32, "is not used by one add alone"),
    "two dimensions": (two_dimensions, FP32, "over the dimensions"),
    "F.rms_norm in fp64": (FORMS["F.rms_norm"][0], torch.float64, "its input is torch.float64"),
    "transposed": (transposed, FP32, "its result is not contiguous"),
    "scalar": (scalar, FP32, "no fixed length"),
    "vmap": (batched, FP32, "under a transform"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case):
    function, dtype, reason = STAYS[case]
    x, weight = random(3, 5, COLUMNS, dtype=dtype), random_weight(COLUMNS, dtype)
    run, lines = compiled(function)
    got, want = run(x, weight), function(x, weight)
    assert not taken(lines)
    assert same_bits(*(t[0] if isinstance(t, tuple) else t for t in (got, want)))
    said = [line for line in lines if isinstance(line, str)]
    assert (reason is None and not said) or (len(said) == 1 and "stays: " in said[0])
    assert reason is None or reason in said[0], said


def written_before_it_is_scaled(x, w):
    x = x * 1
    wide = x.float()
    x.mul_(2)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def weight_written(x, w):
    normalized, w = scaled(x), w * 1
    w.add_(1)
    return w * normalized.to(x.dtype)


def written_by_an_operator(x, w):
    x = x * 1
    wide = x.float()
    x += 1
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def written_by_an_item(x, w):
    x = x * 1
    wide = x.float()
    x[0] = 1
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def written_by_an_argument(x, w):
    x = x * 1
    wide = x.float()
    F.relu(x, True)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def written_by_out(x, w):
    x = x * 1
    wide = x.float()
    torch.add(x, 1, out=x)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize(
    "function",
    [
        written_before_it_is_scaled,
        weight_written,
        written_by_an_operator,
        written_by_an_item,
        written_by_an_argument,
        written_by_out,
    ],
)
def test_writes_in_between(function):
    x, weight = random(5, COLUMNS, dtype=BF16), random_weight(COLUMNS, BF16)
    run, lines = compiled(function)
    got = run(x, weight)
    assert same_bits(got, function(x, weight)) and not taken(lines)
    assert "may write" in lines[0] or "is made behind" in lines[0]


def test_reads_in_between():
    """They do no harm, and the norm's own input in fp32 may have other uses."""

    def function(x, w, linear):
        wide = x.float()
        other = F.silu(F.linear(wide, linear)).view(-1)[:3]
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), other

    x, weight, linear = random(5, COLUMNS, dtype=BF16), random_weight(COLUMNS, BF16), random(8, 40)
    run, lines = compiled(function)
    got, want = run(x, weight, linear), function(x, weight, linear)
    assert taken(lines) == ["rms_norm"] and same_bits(got[1], want[1])
    assert same_bits(got[0], rms_norm(x, COLUMNS, weight, EPS, **LLAMA))


def test_autocast():
    def function(x, w):
        with torch.autocast("cpu", BF16):
            return llama(x @ x.mT @ x, w)

    x, weight = random(COLUMNS, COLUMNS), random_weight(COLUMNS, FP32)
    run, lines = compiled(function)
    got = run(x, weight)
    assert taken(lines) == ["rms_norm"] and got.dtype == FP32
    with torch.autocast("cpu", BF16):
        assert same_bits(got, rms_norm(x @ x.mT @ x, COLUMNS, weight, EPS, **LLAMA))


# ---------------------------------------------------------------- the addition before


def adds(x, z, w):
    total = x + z
    return llama(total, w), total


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_addition(dtype):
    x, z, weight = *(random(5, COLUMNS, dtype=dtype) for _ in "xz"), random_weight(COLUMNS, dtype)
    run, lines = compiled(adds)
    for got, want in zip(run(x, z, weight), fused_add_rms_norm(x, z, weight, EPS, **LLAMA)):
        assert same_bits(got, want)
    assert taken(lines) == ["fused_add_rms_norm"]


def test_gradients_of_the_addition():
    leaves = [random(5, COLUMNS).requires_grad_() for _ in "xz"]
    leaves.append(random_weight(COLUMNS, FP32).requires_grad_())
    run, lines = compiled(adds)

    def gradients(function):
        y, total = function(*leaves)
        return torch.autograd.grad((y.square() + total).sum(), leaves)

    ours = gradients(lambda *args: fused_add_rms_norm(*args, EPS, **LLAMA))
    assert all(map(same_bits, gradients(run), ours))
    assert taken(lines) == ["fused_add_rms_norm"] and "training" in lines[0]
    for got, want in zip(ours, gradients(adds)):
        torch.testing.assert_close(got, want)


def test_a_layer():
    """The sum is read before the norm has ended, and two norms read another one."""

    def function(x, z, w):
        total = x + z
        doubled = total * 2
        first = llama(total, w)
        total = total + first
        return llama(total, w), llama(total, 2 * w), doubled

    x, z, weight = random(5, COLUMNS), random(5, COLUMNS), random_weight(COLUMNS, FP32)
    run, lines = compiled(function)
    for got, want in zip(run(x, z, weight), function(x, z, weight)):
        torch.testing.assert_close(got, want)
    assert taken(lines) == ["fused_add_rms_norm", "fused_add_rms_norm", "rms_norm"]


NOT_ADDED = {
    "in place": lambda x, z, w: llama((x * 1).add_(z), w),
    "iadd": lambda x, z, w: llama(operator.iadd(x * 1, z), w),
    "broadcast": lambda x, z, w: llama(x + z[0], w),
    "a number": lambda x, z, w: llama(x + 1, w),
    "scaled": lambda x, z, w: llama(torch.add(x, z, alpha=2), w),
    "promoted": lambda x, z, w: llama(x + z.bfloat16(), w),
    "weight behind": lambda x, z, w: (lambda t: llama(t, w * t[0]))(x + z),
    "written": lambda x, z, w: (lambda t: (z.add_(1), llama(t, w))[1])(x + z),
}


@pytest.mark.parametrize("case", NOT_ADDED)
def test_other_additions(case):
    """The norm is ours, the addition stays."""
    x, z, weight = random(5, COLUMNS), random(5, COLUMNS), random_weight(COLUMNS, FP32)
    run, lines = compiled(NOT_ADDED[case])
    torch.testing.assert_close(run(x, z.clone(), weight), NOT_ADDED[case](x, z.clone(), weight))
    assert taken(lines) == ["rms_norm"]


# ---------------------------------------------------------------- the quantization behind


def quantize(y, dtype=torch.float8_e4m3fn, most=None):
    limit = torch.finfo(dtype).max
    largest, _ = y.abs().max(dim=-1)
    largest = largest.unsqueeze(-1).to(FP32)
    if most is not None:
        largest = largest.clamp(max=most)
    scale = (largest / limit).clamp(min=1 / (limit * 512))
    return (y.to(FP32) / scale).clamp(-limit, limit).to(dtype), scale


def quantize_differently(y):
    wide = y.float()
    largest = torch.amax(torch.abs(wide), dim=-1, keepdim=True)
    scale = torch.clamp(largest / 448.0, min=1.0 / (448.0 * 512.0))
    return torch.clamp(wide / scale, min=-448.0, max=448.0).to(torch.float8_e4m3fn), scale


QUANTIZED = {
    "vLLM": (quantize, {"dtype": torch.float8_e4m3fn}),
    "e5m2": (lambda y: quantize(y, torch.float8_e5m2), {"dtype": torch.float8_e5m2}),
    "bounded": (lambda y: quantize(y, most=1.5), {"dtype": torch.float8_e4m3fn, "scale_ub": 1.5}),
    "amax": (quantize_differently, {"dtype": torch.float8_e4m3fn}),
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantization(case, dtype):
    """Our op's bits, which are those of the steps behind our norm."""
    function, options = QUANTIZED[case]
    x, weight = random(6, COLUMNS, dtype=dtype), random_weight(COLUMNS, dtype)
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, 1e-30
    run, lines = compiled(lambda x, w: function(llama(x, w)))
    got = run(x, weight)
    assert taken(lines) == ["rms_norm_quant"]
    ours = rms_norm_quant(x, weight, EPS, **LLAMA, **options)
    steps = function(rms_norm(x, COLUMNS, weight, EPS, **LLAMA))
    for want in (ours, steps):
        assert same_bits(got[0].float(), want[0].float()) and same_bits(got[1], want[1])


def test_addition_norm_and_quantization():
    def function(x, z, w):
        total = x + z
        return *quantize(llama(total, w)), total

    x, z, weight = *(random(5, COLUMNS, dtype=BF16) for _ in "xz"), random_weight(COLUMNS, BF16)
    run, lines = compiled(function)
    got, want = run(x, z, weight), function(x, z, weight)
    assert taken(lines) == ["fused_add_rms_norm_quant"] and same_bits(got[2], want[2])
    norm = fused_add_rms_norm(x, z, weight, EPS, **LLAMA)[0]
    for a, b in zip(got, quantize(norm)):
        assert same_bits(a.float(), b.float())


def by_the_reciprocal(y):
    scale = (y.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1 / (448 * 512))
    return (y.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def without_a_least(y):
    scale = y.abs().amax(-1, keepdim=True).float() / 448
    return (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def of_another_least(y):
    scale = (y.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-12)
    return (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def bounded_twice(y):
    largest = y.abs().amax(-1, keepdim=True).float().clamp(max=1.0).clamp(max=2.0)
    scale = (largest / 448).clamp(min=1 / (448 * 512))
    return (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def of_columns(y):
    scale = (y.abs().amax(0, keepdim=True).float() / 448).clamp(min=1 / (448 * 512))
    return (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def also_unquantized(y):
    return *quantize(y), y


@pytest.mark.parametrize(
    "function",
    [
        by_the_reciprocal,
        without_a_least,
        of_another_least,
        bounded_twice,
        of_columns,
        also_unquantized,
    ],
)
def test_other_quantizations(function):
    """The norm is ours, the quantization stays."""
    x, weight = random(5, COLUMNS, dtype=BF16), random_weight(COLUMNS, BF16)
    run, lines = compiled(lambda x, w: function(llama(x, w)))
    got, want = run(x, weight), function(rms_norm(x, COLUMNS, weight, EPS, **LLAMA))
    assert taken(lines) == ["rms_norm"]
    for a, b in zip(got, want):
        assert same_bits(a.float(), b.float())


# ---------------------------------------------------------------- what was measured


def gains_of(tmp_path, cells, kind="rms_norm forward fp32"):
    file = tmp_path / "gains.json"
    file.write_text(json.dumps({f"cpu {rmsnorm_cuda._C.isa()}": {kind: cells}}))
    return file


CELLS = {"1x32": 1.0, "1x64": 1.2, "16x32": 1.3, "16x64": 1.4, "64x32": 2.0, "64x64": 3.0}


@pytest.mark.parametrize(
    "rows, columns, said",
    [
        (16, 32, "1.30 times as fast"),
        (20, 40, "rms_norm of 20x40 fp32, forward, 1.30 times as fast"),
        (16, 40, "1.30 times as fast"),
        (1, 64, "1.20 times as fast"),
        (4096, 64, "3.00 times as fast"),  # as the most rows
        (2, 40, "only 1.00 times as fast"),
        (1, 32, "only 1.00 times as fast"),
        (20, 16, "was not measured"),
        (20, 128, "was not measured"),
    ],
)
def test_the_cells_around_decide(tmp_path, rows, columns, said):
    run, lines = compiled(lambda x: F.rms_norm(x, (columns,), eps=EPS), gains_of(tmp_path, CELLS))
    run(random(rows, columns))
    assert said in lines[0], lines[0]
    assert bool(taken(lines)) == (said.endswith("fast") and "only" not in said)


def test_as_much_as_gains(tmp_path):
    """The norm alone where the addition was not measured."""
    run, lines = compiled(adds, gains_of(tmp_path, CELLS))
    x, z, weight = random(20, COLUMNS), random(20, COLUMNS), random_weight(COLUMNS, FP32)
    run(x, z, weight)
    assert taken(lines) == ["rms_norm"]
    assert "no more, since fused_add_rms_norm of 20x40 fp32, forward was not measured" in lines[0]


def test_another_device_or_dtype(tmp_path):
    run, lines = compiled(lambda x: F.rms_norm(x, (COLUMNS,)), gains_of(tmp_path, CELLS))
    run(random(20, COLUMNS, dtype=BF16))
    assert not taken(lines) and "was not measured on cpu " in lines[0]


def test_dynamic_rows(tmp_path):
    """The number that was traced decides."""
    run, lines = compiled(
        lambda x: F.rms_norm(x, (x.shape[-1],)), gains_of(tmp_path, CELLS), dynamic=True
    )
    x = random(20, COLUMNS)
    torch._dynamo.mark_static(x, 1)
    run(x)
    assert taken(lines) == ["rms_norm"] and "20x40" in lines[0]
    for rows in (2, 100):
        other = random(rows, COLUMNS)
        torch._dynamo.mark_static(other, 1)
        torch.testing.assert_close(run(other), F.rms_norm(other, (COLUMNS,)))
    assert len(lines) == 2


def test_dynamic_columns():
    run, lines = compiled(lambda x: F.rms_norm(x, (x.shape[-1],)), dynamic=True)
    run(random(20, COLUMNS))
    assert not taken(lines) and "its rows have no fixed length" in lines[0]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_depend_on_data():
    run, lines = compiled(lambda x, keep: F.rms_norm(x[keep], (COLUMNS,)))
    x, keep = random(5, COLUMNS), torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(run(x, keep), F.rms_norm(x[keep], (COLUMNS,)))
    assert not taken(lines) and "the number of its rows depends on data" in lines[0]


def test_the_table_is_that_of_the_results():
    if not (ROOT / "benchmarks").exists():
        pytest.skip("there are no sources")
    sys.path.append(str(ROOT))
    from benchmarks.inductor import table

    files = sorted((ROOT / "benchmarks" / "results").glob("inductor-cells-*.json"))
    assert inductor.GAINS.read_text() == table(files)


# ---------------------------------------------------------------- Inductor


def test_uuid(tmp_path, monkeypatch):
    """The same in another process; another for another table, version or instruction set."""
    one = gains_of(tmp_path, CELLS)
    keys = {fuse(where).uuid() for where in ("measured", "everywhere", one)}
    same = fuse().uuid()
    code = "from rmsnorm_cuda.integrations.inductor import fuse; print(fuse().uuid())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == same and same in keys and len(keys) == 3
    one.write_text(one.read_text().replace("1.2", "1.3"))
    keys.add(fuse(one).uuid())
    monkeypatch.setattr(inductor, "__version__", "another")
    keys.add(fuse().uuid())
    monkeypatch.setattr(inductor._C, "isa", lambda: "another")
    keys.add(fuse().uuid())
    assert len(keys) == 6
    assert len({fuse(explain=print).uuid() for _ in range(3)}) == 3


def compile_with(fuse_norms, function):
    torch._dynamo.reset()
    return torch.compile(function, options={"pre_grad_custom_pass": fuse_norms}, fullgraph=True)


def train(function, x, z, weight):
    leaves = [t.clone().requires_grad_() for t in (x, z, weight)]
    y, total = function(*leaves)
    return y.detach(), total.detach(), *torch.autograd.grad(y.sum() + total.sum(), leaves)


def test_in_inductor():
    """The bits of our ops, forward and backward; and its cache on disk tells passes apart."""
    x, z, weight = *(random(5, COLUMNS, dtype=BF16) for _ in "xz"), random_weight(COLUMNS, BF16)
    lines = []
    with fresh_cache():
        want = fused_add_rms_norm(x, z, weight, EPS, **LLAMA)
        assert all(map(same_bits, compile_with(fuse("everywhere"), adds)(x, z, weight), want))
        counters.clear()
        assert all(map(same_bits, compile_with(fuse("everywhere"), adds)(x, z, weight), want))
        hits = (
            counters["inductor"]["fxgraph_cache_hit"]
            + counters["aot_autograd"]["autograd_cache_hit"]
        )
        assert hits >= 1
        # An earlier result would not be explained.
        compile_with(fuse("everywhere", lines.append), adds)(x, z, weight)
        assert len(lines) == 1
        run = compile_with(fuse("everywhere", lines.append), adds)
        got = train(run, x, z, weight)
        assert "training" in lines[1] and len(lines) == 2
        want = train(lambda *args: fused_add_rms_norm(*args, EPS, **LLAMA), x, z, weight)
        assert all(map(same_bits, got, want))


def test_checkpointed_in_inductor():
    """A region that is run again is a graph of its own."""
    from torch.utils.checkpoint import checkpoint

    lines, x, weight = [], random(5, COLUMNS).requires_grad_(), random_weight(COLUMNS, FP32)

    def function(x, w):
        return checkpoint(lambda x: llama(x.sin(), w), x, use_reentrant=False)

    with fresh_cache():
        y = compile_with(fuse("everywhere", lines.append), function)(x, weight)
    assert len(lines) == 1 and ": rms_norm of 5x40 fp32, training" in lines[0]
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(function(x, weight).sum(), x)[0])


def test_exported():
    """The spellings of ATen."""

    class Model(nn.Module):
        def forward(self, x, z, w):
            total = x + z
            return gemma(llama(total, w), w), total

    args = *(random(5, COLUMNS, dtype=BF16) for _ in "xz"), random_weight(COLUMNS, BF16)
    module = torch.export.export(Model(), args).module()
    lines = []
    fuse("everywhere", lines.append)(module.graph)
    module.recompile()
    norm, total = fused_add_rms_norm(*args, EPS, **LLAMA)
    want = rms_norm(norm, COLUMNS, args[2], EPS, **GEMMA), total
    assert all(map(same_bits, module(*args), want)) and len(lines) == 2


MODELS = {  # of transformers: norms that are taken, those with the addition before them
    "Llama": (5, 4),
    "Qwen3": (9, 4),
    "Gemma2": (9, 4),
    "Olmo2": (9, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    """Unchanged, trained: the norms are ours, logits and gradients are the model's."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).train()
    tokens, lines = torch.arange(6).repeat(2, 1), []

    def step(function):
        loss = function(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    with fresh_cache():
        options = {"pre_grad_custom_pass": fuse("everywhere", lines.append)}
        got = step(torch.compile(model, options=options))
    assert not [line for line in lines if "stays" in line]
    added = sum(": fused_add_rms_norm of" in line for line in lines)
    assert (len(lines), added) == MODELS[name], lines
    for a, b in zip(got, step(model)):
        error = (a - b).float().norm() / b.float().norm()
        assert error < (1e-5 if dtype == FP32 else 0.03)
