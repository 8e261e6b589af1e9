"""The same row has the same bits: on every run, in any batch, at any address, with any number of
threads.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import programs
import pytest
import torch
from cases import DTYPES, OPTIONS, ROWS, name, ops, random, random_weight, same_bits

from rmsnorm_cuda import _C, rms_norm, rms_norm_quant
from rmsnorm_cuda.reference import ulp_distance

# Two and a half MB and more in and out, at 256 KB a thread: enough for eight threads. Many short
# rows, few long ones.
LARGE = [(5000, 129), (40, 20000), (1000, 640)]


def gradients(dy, x, weight, **options):
    cols = x.shape[-1]
    y, rstd = ops.rms_norm_forward(x, (cols,), weight, 1e-6, **options)
    return (
        y,
        rstd,
        *ops.rms_norm_backward(dy, x, (cols,), weight, rstd, 1e-6, (True, True), **options),
    )


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_threads(threads, dtype, shape):
    dy, x, weight = (
        random(*shape, dtype=dtype),
        random(*shape, dtype=dtype),
        random_weight(shape[1], torch.float32),
    )
    threads(1)
    want = gradients(dy, x, weight)
    for count in (2, 3, 8):
        threads(count)
        for a, b in zip(gradients(dy, x, weight), want, strict=True):
            assert same_bits(a, b)


def test_large_tensors_are_split_and_small_ones_are_not():
    """Else test_threads would compare a thread with itself. OpenMP starts its threads at the first
    region that has several.
    """
    code = """if True:
        import os, torch, rmsnorm_cuda
        threads = lambda: len(os.listdir("/proc/self/task"))
        torch.set_num_threads(4)
        before = threads()
        rmsnorm_cuda.rms_norm(torch.ones(4, 4096), 4096)
        small = threads()
        x = torch.empty(512, 4096)
        assert threads() == before, "torch.empty started threads"
        rmsnorm_cuda.rms_norm(x, 4096)
        print(small - before, threads() - before)
    """
    run = programs.run(code)
    assert run.stdout.split() == ["0", "3"], run.stdout + run.stderr


def test_runs(device):
    for shape in [(300, 65), (9, 4097)] if device == "cpu" else [(20, 65)]:
        args = [
            t.to(device)
            for t in (random(*shape), random(*shape), random_weight(shape[1], torch.bfloat16))
        ]
        want = gradients(*args)
        for _ in range(5 if device == "cpu" else 1):
            for a, b in zip(gradients(*args), want, strict=True):
                assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_row_alone_and_in_any_batch(device, dtype):
    """At 0 to 16 elements from an aligned address (all that a vector of 16-bit elements can be
    off), any stride, any row of as many as fill the groups that rows are done in.
    """
    offsets = range(17) if device == "cpu" else (0, 1, 3)
    for cols in (5, 64, 129, 1000) if device == "cpu" else (64, 129):
        weight = random_weight(cols, dtype, device)
        for offset, rows in zip(offsets, itertools.cycle(ROWS)):
            gap = (0, 1, 16)[offset % 3]
            batch = random(offset + rows * (cols + gap), dtype=dtype, device=device)
            view = batch.as_strided((rows, cols), (cols + gap, 1), offset)
            alone = [rms_norm(row.cpu().clone().to(device), cols, weight).cpu() for row in view]
            assert same_bits(rms_norm(view, cols, weight), torch.stack(alone)), (cols, rows, offset)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_dx_of_a_row_alone_and_in_any_batch(device, dtype):
    for cols in (129, 1031):
        dy, x = (random(50, cols, dtype=dtype, device=device) for _ in range(2))
        weight = random_weight(cols, dtype, device)
        want = gradients(dy, x, weight)[2].cpu()
        for rows in (slice(0, 1), slice(49, 50), slice(7, 23), slice(7, 24), slice(3, None, 5)):
            assert same_bits(gradients(dy[rows], x[rows], weight)[2], want[rows])


@pytest.mark.parametrize(
    "cols", [2048, 1001]
)  # rows that lie on lines of the cache, and rows that do not
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_large_outputs(dtype, cols):
    """These are written past the caches (see stream_bytes in tuning.h), but for the one in place:
    same bits.
    """
    rows = (9 << 20) // (cols * dtype.itemsize)
    weight = random_weight(cols, dtype)
    dy, x = (random(64, cols, dtype=dtype).repeat(-(-rows // 64), 1)[:rows] for _ in range(2))
    want = [
        part.repeat(-(-rows // 64), *[1] * (part.dim() - 1))[:rows]
        for part in gradients(dy[:64], x[:64], weight)[:3]
    ]
    y, rstd, dx, _ = gradients(dy, x, weight)
    assert same_bits(y, want[0]) and same_bits(rstd, want[1]) and same_bits(dx, want[2])
    buffer = torch.full((rows + 2, cols + 64), torch.nan, dtype=dtype)
    rms_norm(x, cols, weight, 1e-6, out=buffer[1:-1, :cols])
    assert same_bits(buffer[1:-1, :cols], want[0])
    buffer[1:-1, :cols] = torch.nan
    assert buffer.isnan().all()
    assert same_bits(rms_norm(x, cols, weight, 1e-6, out=x), want[0])


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_weight_and_out(device, offset):
    x, weight = (
        random(4, 129, dtype=torch.bfloat16, device=device),
        random(140, dtype=torch.bfloat16, device=device),
    )
    moved = weight[offset : offset + 129]
    want = rms_norm(x, 129, moved.clone() if device == "cpu" else moved.cpu().to(device))
    assert same_bits(rms_norm(x, 129, moved), want)
    buffer = torch.zeros(4, 140, dtype=torch.bfloat16).to(device)
    rms_norm(x, 129, moved, out=buffer[:, offset : offset + 129])
    assert same_bits(buffer.cpu()[:, offset : offset + 129], want)


def test_callers_in_threads():
    """Eight threads call at once, forward and backward: the same bits as one after another."""
    x, weight, dy = random(64, 333), random_weight(333, torch.float32), random(64, 333)

    def run(_):
        leaf = x.clone().requires_grad_()
        y = rms_norm(leaf, 333, weight)
        return y.detach(), *torch.autograd.grad(y, [leaf], dy)

    want = run(0)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(run, range(64)):
            assert all(map(same_bits, result, want))


# ---------------------------------------------------------------- instruction sets

ISAS = ["fp64", "scalar", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture
def restore_isa():
    yield
    _C.set_isa(None)


@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa_is_the_one_that_runs(restore_isa, isa):
    if not _C.isas().get(isa):
        with pytest.raises(ValueError, match=f"instruction set '{isa}'"):
            _C.set_isa(isa)
        pytest.skip(f"this machine or build has no {isa}")
    _C.set_isa(isa)
    assert _C.isa() == isa
    gradients(random(3, 20), random(3, 20), random_weight(20, torch.float32))
    assert _C.last_isa() == isa  # of the backward; the forward:
    for dtype in DTYPES[:3]:  # for Half, the best one of a Zen 4 is another
        rms_norm(random(3, 20, dtype=dtype), 20)
        assert _C.last_isa() == isa


def test_best_isa_is_the_default(restore_isa):
    best = [isa for isa, supported in _C.isas().items() if supported][-1]
    _C.set_isa("scalar")
    _C.set_isa(None)
    assert _C.isa() == best
    assert best != "fp64"
    with pytest.raises(ValueError, match="'mmx': expected one of fp64 scalar"):
        _C.set_isa("mmx")
    assert _C.isa() == best


@pytest.mark.parametrize("isa", [*ISAS, "mmx", ""])
def test_isa_from_the_environment(isa):
    code = (
        "import torch, rmsnorm_cuda; rmsnorm_cuda.rms_norm(torch.ones(2, 8), 8); "
        "print(rmsnorm_cuda._C.last_isa())"
    )
    run = programs.run(code, RMSNORM_CUDA_ISA=isa)
    supported = [isa for isa, has in _C.isas().items() if has]
    if isa in supported or isa == "":
        assert run.stdout.split() == [isa or supported[-1]], run.stderr
    else:
        message = (
            f"RuntimeError: RMSNORM_CUDA_ISA is '{isa}', but this machine and build have only: "
        )
        assert run.returncode and message in run.stderr


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_fp64_rounds_once(restore_isa, dtype):
    """Every tensor that an op writes is the formula in double, as torch computes it, rounded
    once.
    """
    _C.set_isa("fp64")
    shape = 300, 200  # two blocks of the backward
    dy, x = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    weight = random_weight(200, torch.float32)
    y, rstd, dx, dweight = gradients(dy, x, weight)
    assert _C.last_isa() == "fp64"
    r = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    xhat, g = x.double() * r, dy.double() * weight.double()
    want_dx = r * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    want = xhat * weight.double(), r[:, 0], want_dx, (dy.double() * xhat).sum(0)
    for got, exact in zip((y, rstd, dx, dweight), want, strict=True):
        half_ulp = torch.finfo(got.dtype).eps / 2 * (1 + 1e-6)
        smallest = torch.finfo(got.dtype).smallest_normal * half_ulp * 1.01 + 1e-14
        torch.testing.assert_close(got.double(), exact, rtol=half_ulp, atol=smallest)
    output, scale = rms_norm_quant(x, weight, 1e-6, dtype=torch.int8)
    want_scale = y.float().abs().amax(-1, keepdim=True) / 127
    assert same_bits(scale, want_scale) and _C.last_isa() == "fp64"
    assert torch.equal(output, (y.float() * (1 / scale)).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_isas_agree(restore_isa, dtype, options):
    """AVX2 and AVX-512 share one reduction tree: equal bits. Scalar shares it too but rounds each
    product of the sum: of 16-bit values that is exact, so equal bits again; of fp32 values 1 ulp.
    The backward's products are never exact."""
    results = {}
    for isa in [isa for isa, supported in _C.isas().items() if supported]:
        _C.set_isa(isa)
        torch.manual_seed(1)
        results[isa] = []
        for cols in (7, 64, 129, 1000, 4097):
            dy, x = random(5, cols, dtype=dtype), random(5, cols, dtype=dtype)
            weight = random_weight(cols, torch.float32)
            results[isa].append(gradients(dy, x, weight, **options))
    del results["fp64"]
    scalar = results.pop("scalar")
    for other in results.values():
        for got, want in zip(other, next(iter(results.values())), strict=True):
            assert all(map(same_bits, got, want))
        for got, want in zip(other, scalar, strict=True):
            if dtype == torch.float32:
                if not options.get("cast_before_weight"):
                    assert ulp_distance(got[0], want[0]).max() <= 1
            else:
                assert same_bits(got[0], want[0])
