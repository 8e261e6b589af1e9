"""rms_norm_quant and fused_add_rms_norm_quant: the bits of the steps one by one, out=, errors,
torch.compile.
"""

import itertools
import math

import programs
import pytest
import torch
from cases import (
    GEMMA,
    LLAMA,
    OPTIONS,
    name,
    pairs,
    random,
    random_weight,
    refused_alike_while_tracing,
)

from rmsnorm_cuda import fused_add_rms_norm, fused_add_rms_norm_quant, rms_norm, rms_norm_quant
from rmsnorm_cuda.reference import quantize_reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
FORMATS = (E4M3, E5M2, INT8)


def bits(t):
    return t.cpu().contiguous().view(torch.uint8)


def kinds(cols, device):
    """How scales come about: given, of rows, of blocks in either order, bounded."""
    yield {"scale": torch.tensor([0.0131]).to(device)}
    yield {}
    yield {"scale_ub": 1.25}
    for block in (64, 128):
        if cols % block == 0:
            yield {"block": block}
            yield {"block": block, "column_major": True, "scale_ub": 2.0}


def expected(norm, dtype, kind):
    kind = {
        k: v.cpu() if isinstance(v, torch.Tensor) else v
        for k, v in kind.items()
        if k != "column_major"
    }
    return quantize_reference(norm.cpu(), dtype, **kind)


def check(results, norm, dtype, kind):
    want, want_scale = expected(norm, dtype, kind)
    output, scale = results[:2]
    assert output.dtype == dtype and output.is_contiguous() and output.shape == norm.shape
    assert torch.equal(bits(output), bits(want)), (
        f"{(bits(output) != bits(want)).sum()} codes differ"
    )
    assert torch.equal(scale.cpu(), want_scale)
    if kind.get("column_major"):
        rows, blocks = scale.numel() // scale.shape[-1], scale.shape[-1]
        assert scale.reshape(rows, blocks).stride() == (1, rows) or 1 in (rows, blocks)


@pytest.mark.parametrize(
    "x_dtype, w_dtype, options, dtype",
    pairs((FP32, BF16, FP16), (FP32, BF16, FP16, None), OPTIONS, FORMATS),
    ids=name,
)
def test_bits_of_the_steps(x_dtype, w_dtype, options, dtype, device):
    shapes = ((5, 1), (3, 7), (37, 64), (19, 128), (4, 192), (1, 1000), (9, 1088), (2, 9024))
    for rows, cols in shapes:
        sizes = torch.tensor([[3.0], [1e-4], [0.0]]).repeat(13, 1)[:rows]
        x = (random(rows, cols) * sizes).to(x_dtype).to(device)
        weight = random_weight(cols, w_dtype, device)
        for kind in kinds(cols, device):
            results = rms_norm_quant(
                x, weight, 1e-5, dtype=dtype, return_norm=True, **kind, **options
            )
            norm = rms_norm(x, (cols,), weight, 1e-5, **options)
            assert results[2].dtype == norm.dtype and torch.equal(results[2].cpu(), norm.cpu())
            check(results, norm, dtype, kind)
            alone = rms_norm_quant(x, weight, 1e-5, dtype=dtype, **kind, **options)
            assert (
                len(alone) == 2
                and torch.equal(bits(alone[0]), bits(results[0]))
                and torch.equal(alone[1].cpu(), results[1].cpu())
            )


PAIRS = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32))


@pytest.mark.parametrize(
    "pair, dtype, options, round_sum", pairs(PAIRS, FORMATS, OPTIONS, (True, False)), ids=name
)
def test_bits_of_add_norm_and_quantization(pair, dtype, options, round_sum, device):
    options = options | {"round_sum": round_sum}
    for rows, cols in ((37, 64), (3, 1000), (2, 9024)):
        x, residual = (
            random(rows, cols, dtype=pair[0], device=device),
            random(rows, cols, dtype=pair[1], device=device),
        )
        weight = random_weight(cols, FP32, device)
        norm, total = fused_add_rms_norm(x, residual, weight, 1e-5, **options)
        for kind in kinds(cols, device):
            output, scale, got_total, got_norm = fused_add_rms_norm_quant(
                x, residual, weight, 1e-5, dtype=dtype, return_norm=True, **kind, **options
            )
            assert torch.equal(got_total.cpu(), total.cpu()) and torch.equal(
                got_norm.cpu(), norm.cpu()
            )
            check((output, scale), norm, dtype, kind)
            assert (
                len(
                    fused_add_rms_norm_quant(
                        x, residual, weight, 1e-5, dtype=dtype, **kind, **options
                    )
                )
                == 3
            )


@pytest.mark.parametrize("dtype", FORMATS, ids=name)
def test_every_value_of_16_bits(dtype, device):
    """Each as the norm itself: rows of one element would be 1, so it is the weight that has the
    values.
    """
    for x_dtype, count in ((BF16, 65536), (FP16, 65536)):
        values = torch.arange(count, dtype=torch.int32).to(torch.int16).view(x_dtype)
        values = values[values.isfinite()]
        x = torch.ones(1, len(values), dtype=x_dtype).to(device)
        weight = values.to(device)
        norm = rms_norm(x, (len(values),), weight, 0.0)
        for scale in (1.0, 0.37, 3e-5, 1e-38, 1e30):
            kind = {"scale": torch.tensor([scale]).to(device)}
            check(rms_norm_quant(x, weight, 0.0, dtype=dtype, **kind), norm, dtype, kind)
        for kind in ({}, {"scale_ub": 1e-3}, {"scale_ub": 1e4}):
            check(rms_norm_quant(x, weight, 0.0, dtype=dtype, **kind), norm, dtype, kind)


@pytest.mark.parametrize("dtype", FORMATS, ids=name)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_what_is_no_number(value, dtype, device):
    x = random(3, 128, dtype=BF16)
    x[1, 5] = value
    norm = rms_norm(x, (128,), None, 1e-5)  # the row is NaN, or 0 with one NaN
    for kind in ({}, {"block": 64}, {"scale": torch.tensor([0.02])}):
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kind.items()}
        output, scale = rms_norm_quant(x.to(device), None, 1e-5, dtype=dtype, **there)
        want, want_scale = expected(norm, dtype, kind)
        assert torch.equal(scale.cpu().isnan(), want_scale.isnan())
        if dtype == INT8:
            assert torch.equal(output.cpu(), want)
        else:
            output, want = output.cpu().float(), want.float()
            assert torch.equal(output.isnan(), want.isnan()) and torch.equal(
                output.nan_to_num(), want.nan_to_num()
            )


def test_saturation_and_signs(device):
    x = torch.tensor([[-0.0, 0.0, -1e-9, 1e-9, -100.0, 100.0, 1.0, -1.0]]).to(device)
    for dtype in FORMATS:
        kind = {"scale": torch.tensor([1e-4]).to(device)}
        check(rms_norm_quant(x, dtype=dtype, **kind), rms_norm(x, (8,)), dtype, kind)
        check(rms_norm_quant(x, dtype=dtype), rms_norm(x, (8,)), dtype, {})


def test_layouts(device, torch_kernels):
    torch_kernels(device)  # for the way back of a strided tensor
    whole = random(4, 5, 3 * 128, dtype=BF16).to(device)
    x, residual = whole[..., 128:256], whole[..., 256:].transpose(0, 1).contiguous().transpose(0, 1)
    for kind in kinds(128, device):
        results = rms_norm_quant(x, dtype=E4M3, **kind)
        assert results[0].shape == x.shape
        check(results, rms_norm(x, (128,)), E4M3, kind)
        results = fused_add_rms_norm_quant(x, residual, dtype=INT8, **kind)
        check(results, fused_add_rms_norm(x, residual)[0], INT8, kind)
    not_dense = random(128, 6).to(device).t()
    check(rms_norm_quant(not_dense, dtype=E5M2), rms_norm(not_dense, (128,)), E5M2, {})


@pytest.mark.parametrize("shape", ((0, 64), (3, 0), (2, 0, 8)), ids=str)
def test_empty(shape):
    x = torch.empty(shape)
    for kind in ({}, {"block": 64}, {"block": 64, "column_major": True}):
        if shape[-1] % 64:
            continue
        output, scale, norm = rms_norm_quant(x, dtype=E4M3, return_norm=True, **kind)
        assert output.shape == norm.shape == shape and scale.shape == (
            *shape[:-1],
            shape[-1] // 64 if kind else 1,
        )
        assert scale.isfinite().all()


@pytest.mark.parametrize("round_sum", (True, False))
def test_out(round_sum, device):
    x, residual = (
        random(6, 256, dtype=BF16, device=device),
        random(6, 256, dtype=BF16, device=device),
    )
    weight, rounds = random_weight(256, BF16, device), {"round_sum": round_sum}
    for kind, norm in itertools.product(kinds(256, device), (False, True)):
        want = rms_norm_quant(x, weight, 1e-6, dtype=E4M3, return_norm=norm, **kind)
        out = tuple(torch.empty_like(t) for t in want)
        got = rms_norm_quant(x, weight, 1e-6, dtype=E4M3, return_norm=norm, out=out, **kind)
        for a, b, c in zip(got, want, out, strict=True):
            assert a.data_ptr() == c.data_ptr() or a.numel() == 1
            assert torch.equal(bits(a), bits(b))
        want = fused_add_rms_norm_quant(
            x, residual, weight, 1e-6, dtype=E4M3, return_norm=norm, **kind, **rounds
        )
        total = residual.cpu().to(device)
        out = (
            torch.empty_like(want[0]),
            torch.empty_like(want[1]),
            total,
            *(torch.empty_like(t) for t in want[3:]),
        )
        got = fused_add_rms_norm_quant(
            x, total, weight, 1e-6, dtype=E4M3, return_norm=norm, out=out, **kind, **rounds
        )
        assert got[2] is total
        for a, b in zip(got, want, strict=True):
            assert torch.equal(bits(a), bits(b))
    want = fused_add_rms_norm(x, residual, weight, 1e-6, **rounds)
    out = torch.empty_like(x), torch.empty_like(x)
    got = fused_add_rms_norm(x, residual, weight, 1e-6, **rounds, out=out)
    assert got[0] is out[0] and all(
        torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True)
    )
    got = fused_add_rms_norm(x, residual, weight, 1e-6, **rounds, out=(x, residual))
    assert got[0] is x and all(
        torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True)
    )


X = torch.ones(2, 128)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (
            {"dtype": torch.uint8},
            ValueError,
            "dtype to be float8_e4m3fn, float8_e5m2 or int8, but got Byte",
        ),
        ({"input": X.double()}, NotImplementedError, "not implemented for 'Double'"),
        ({"weight": torch.ones(128).double()}, NotImplementedError, "not implemented for 'Double'"),
        ({"weight": torch.ones(64)}, RuntimeError, r"weight of shape \[64\]"),
        ({"block": (64,)}, TypeError, "block to be an int or None, but got tuple"),
        ({"scale": 0.1}, TypeError, "scale to be a Tensor or None, but got float"),
        ({"block": 32}, ValueError, "block to be 64 or 128, but got 32"),
        (
            {"input": torch.ones(2, 100), "block": 64},
            RuntimeError,
            "a multiple of block=64, but got 100",
        ),
        (
            {"scale": torch.ones(2)},
            RuntimeError,
            r"scale to be one float32, but got Float of shape \[2\]",
        ),
        ({"scale": torch.ones(1).half()}, RuntimeError, "scale to be one float32, but got Half"),
        ({"scale": torch.ones(1, device="meta")}, RuntimeError, "scale is on meta"),
        (
            {"scale": torch.ones(1), "block": 64},
            ValueError,
            "expected neither beside a given scale",
        ),
        (
            {"scale": torch.ones(1), "scale_ub": 1.0},
            ValueError,
            "expected neither beside a given scale",
        ),
        ({"scale_ub": 0.0}, ValueError, "scale_ub to be positive, but got 0"),
        ({"column_major": True}, ValueError, "expected block to be given"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"input": torch.ones(())}, ValueError, "scalar"),
        (
            {"input": X.clone().requires_grad_()},
            RuntimeError,
            "does not support automatic differentiation",
        ),
        ({"out": X}, TypeError, "out to be a tuple of 2 tensors, but got Tensor"),
        ({"out": (X,)}, ValueError, "out to hold 2 tensors, but got 1"),
        ({"out": (X, torch.ones(2, 1))}, RuntimeError, "out of dtype Float8_e4m3fn, but got Float"),
        (
            {"out": (X.to(E4M3), torch.ones(2))},
            RuntimeError,
            r"scale_out of shape \[2, 1\], but got \[2\]",
        ),
        (
            {"out": (torch.ones(128, 2).to(E4M3).t(), torch.ones(2, 1))},
            RuntimeError,
            "out to be contiguous",
        ),
        (
            {"out": (X.to(E4M3), torch.ones(2, 2)), "block": 64, "column_major": True},
            RuntimeError,
            "scale_out to be column-major",
        ),
    ),
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_errors(change, error, message):
    arguments = {"input": X, "weight": None, "eps": 1e-6, "dtype": E4M3} | change
    with pytest.raises(error, match=message):
        rms_norm_quant(**arguments)
    if "out" not in change:
        with pytest.raises(error, match=message):
            fused_add_rms_norm_quant(residual=arguments["input"].detach().clone(), **arguments)
    if "contiguous" not in message and "column-major" not in message:  # which memory alone shows
        refused_alike_while_tracing(rms_norm_quant, **arguments)
    assert (X == 1).all(), "something was written"


def test_overlaps():
    memory = torch.ones(4, 128)
    for out in (
        (memory.view(E4M3).view(-1)[: 2 * 128].view(2, 128), torch.ones(2, 1)),
        (torch.ones(2, 128).to(E4M3), memory[0, :2].view(2, 1)),
    ):
        with pytest.raises(RuntimeError, match="share memory"):
            rms_norm_quant(memory[:2], dtype=E4M3, out=out)
    x = torch.ones(2, 128)
    with pytest.raises(RuntimeError, match="share memory"):
        fused_add_rms_norm_quant(x, x.clone(), dtype=E4M3, out=(x.to(E4M3), torch.ones(2, 1), x))
    with pytest.raises(RuntimeError, match="share memory"):
        fused_add_rms_norm(x, x.clone(), out=(torch.ones(2, 128), x))
    assert (memory == 1).all() and (x == 1).all()


def test_memory_that_is_apart():
    """Rows of input and residual in turns, and layouts that differ only where there is one row."""
    whole = random(4, 256)
    x, residual = whole[:, :128], whole[:, 128:]
    want = fused_add_rms_norm(x, residual)
    got = fused_add_rms_norm(x, residual, out=(x, residual))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and torch.equal(
        whole[:, :128], want[0]
    )
    with pytest.raises(
        RuntimeError,
        match="residual_out partly overlaps residual; expected residual_out to be residual itself",
    ):
        fused_add_rms_norm(
            x.clone(),
            whole[:3].view(-1)[:512].view(4, 128),
            out=(x.clone(), whole.view(-1)[64:576].view(4, 128)),
        )
    memory = random(1, 300)
    one, x = memory[:1, :128], random(1, 128)
    want = fused_add_rms_norm_quant(x, one, dtype=E4M3)
    out = torch.empty(1, 128).to(E4M3), torch.empty(1, 1), memory[0, :128].view(1, 128)
    got = fused_add_rms_norm_quant(x, one, dtype=E4M3, out=out)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))
    rms_norm_quant(x, dtype=E4M3, block=64, column_major=True, out=(out[0], torch.empty(1, 2)))


def test_negative_bit():
    negative = torch._neg_view(torch.ones(2, 128))
    assert torch.equal(
        rms_norm_quant(negative, dtype=INT8)[0], rms_norm_quant(-torch.ones(2, 128), dtype=INT8)[0]
    )
    for call in (
        lambda: rms_norm(torch.ones(2, 128), 128, out=negative),
        lambda: fused_add_rms_norm(
            torch.ones(2, 128), torch.ones(2, 128), out=(negative, torch.ones(2, 128))
        ),
        lambda: rms_norm_quant(
            negative, dtype=INT8, out=(torch.ones(2, 128, dtype=INT8), torch.ones(2, 1))
        ),
    ):
        with pytest.raises(RuntimeError, match="without the negative bit"):
            call()


def test_what_is_overwritten_gets_a_new_version():
    x = torch.ones(2, 128)
    out = x.to(E4M3), torch.ones(2, 1)
    versions = [t._version for t in out]
    with torch.inference_mode():
        rms_norm_quant(x, dtype=E4M3, out=out)
    assert all(t._version > before for t, before in zip(out, versions, strict=True))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    def layer(x, residual, weight):
        q, scale = rms_norm_quant(x * 2, weight, 1e-6, dtype=E4M3)
        r, scale2, total = fused_add_rms_norm_quant(x, residual, weight, 1e-6, dtype=INT8, block=64)
        return q.float() * scale, r.float() * scale2.repeat_interleave(64, -1), total

    arguments = random(4, 128), random(4, 128), random_weight(128, FP32)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*arguments), layer(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("used", range(3))
def test_compiled_code_may_use_one_result_alone(used):
    def layer(x, residual):
        return fused_add_rms_norm_quant(x + 1, residual, dtype=E4M3)[used], *fused_add_rms_norm(
            x, residual
        )[used % 2 :][:1]

    arguments = random(4, 128), random(4, 128)
    for got, want in zip(
        torch.compile(layer, fullgraph=True)(*arguments), layer(*arguments), strict=True
    ):
        assert torch.equal(bits(got), bits(want))


def test_compiled_out():
    """Into memory that the caller owns, without a clone."""

    def layer(x, residual, out):
        fused_add_rms_norm_quant(x * 2, residual, dtype=E4M3, out=out)

    from torch._inductor.utils import run_and_get_code

    x, residual = random(4, 128), random(4, 128)
    want = fused_add_rms_norm_quant(x * 2, residual, dtype=E4M3)
    out = tuple(torch.zeros_like(t) for t in want)
    _, code = run_and_get_code(torch.compile(layer, fullgraph=True), x, residual, out)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(out, want, strict=True))
    assert code[0].count("fused_add_rms_norm_quant.out(") == 1 and "clone" not in code[0], code[0]


def test_recompiles_little():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda x: rms_norm_quant(x * 1, dtype=E4M3, block=64)[0], backend=counter, fullgraph=True
    )
    for rows in (2, 3, 4, 5, 6):
        compiled(torch.ones(rows, 128))
    assert counter.frame_count <= 2


def test_threads_give_the_same_bits(threads):
    x = random(700, 1024, dtype=BF16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(rms_norm_quant(x, dtype=E4M3, block=128, **GEMMA))
    assert all(
        torch.equal(bits(a), bits(b))
        for got in results[1:]
        for a, b in zip(got, results[0], strict=True)
    )


def test_llama_order_is_that_of_vllm(device):
    """All in bf16: x * rstd rounded, times the weight rounded, the largest of it over 448:
    csrc/quantization of vLLM.
    """
    x, weight = random(5, 256, dtype=BF16, device=device), random_weight(256, BF16, device)
    output, scale = rms_norm_quant(x, weight, 1e-6, dtype=E4M3, **LLAMA)
    xs, ws = x.cpu().double(), weight.cpu().double()
    rounded = (xs * (xs.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).float().to(BF16)
    norm = (rounded.double() * ws).float().to(BF16).float()
    want_scale = (norm.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(bits(output), bits((norm / want_scale).clamp(-448, 448).to(E4M3)))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=name)
@pytest.mark.parametrize("cols", [24, 64, 1000])
def test_nan_is_the_same_in_any_batch(cols, dtype):
    """Rows with NaNs of both signs, alone and among others: one NaN, in the norm and in 8 bits."""
    x = random(40, cols, dtype=dtype)
    integers = x.view({4: torch.int32, 2: torch.int16}[x.element_size()])
    sign = torch.iinfo(integers.dtype).min
    for row in range(0, 40, 3):
        x[row, torch.randint(0, cols, (4,))] = math.nan
        integers[row, ::2] ^= sign
    y, (codes, _) = rms_norm(x, cols), rms_norm_quant(x, dtype=E4M3)
    for row in range(40):
        assert torch.equal(bits(y[row]), bits(rms_norm(x[row], cols)))
        assert torch.equal(
            bits(codes[row]), bits(rms_norm_quant(x[row : row + 1], dtype=E4M3)[0][0])
        )


def test_no_memory_left():
    """The workspace is allocated before anything is written: an error leaves out= and the residual
    as they were.
    """
    code = """if True:
        import gc, resource, torch, rmsnorm_cuda as R
        torch.set_num_threads(2)
        rows, cols = 64, 1 << 18
        x, residual, w = torch.randn(rows, cols), torch.randn(rows, cols), torch.randn(cols)
        codes, scale = torch.zeros(rows, cols, dtype=torch.int8), torch.zeros(rows, 1)
        before = residual.clone()
        out = codes, scale, residual
        run = lambda: R.fused_add_rms_norm_quant(x, residual, w, dtype=torch.int8, out=out)
        run()  # the threads are there now
        residual.copy_(before), codes.zero_(), scale.zero_()
        gc.collect()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        # Takes the freed blocks that malloc still has, so that the workspace has to come from the
        # system.
        kept = []
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
        try:
            while True:
                kept.append(torch.empty(1 << 20, dtype=torch.uint8))
        except RuntimeError:
            pass
        try:
            run()
        except RuntimeError as error:
            assert "memory" in str(error), error
        else:
            raise SystemExit("no error")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert torch.equal(residual, before) and not codes.any() and not scale.any()
    """
    run = programs.run(code)
    assert run.returncode == 0, run.stderr
