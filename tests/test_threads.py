"""Many threads at once, each with tensors and models of its own: the results are those of one
thread. Where Python has no GIL the extension runs without one."""

import sys
import sysconfig
import threading

import pytest
import torch

import rmsnorm_cuda

THREADS = 8
DTYPES = torch.float32, torch.bfloat16, torch.float16


def work(seed):
    """Results of all kinds of calls, of short and long rows, as tensors."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for i, dtype in enumerate(DTYPES * 4):
        rows, cols = 1 + (seed * 7 + i * 5) % 37, 1 + (seed * 131 + i * 977) % 2500
        x, residual = (
            torch.randn(rows, cols, generator=generator).to(dtype).requires_grad_()
            for _ in range(2)
        )
        norm = rmsnorm_cuda.RMSNorm(cols, 1e-6, dtype=dtype, weight_offset=float(i % 2))
        y, total = norm(x, residual)
        (y.float().square().sum() + total.float().sum()).backward()
        results += [y, total, x.grad, norm.weight.grad]
        with torch.no_grad():
            out = torch.empty_like(x)
            rmsnorm_cuda.rms_norm(x, cols, out=out)
            codes, scale = rmsnorm_cuda.rms_norm_quant(x, dtype=torch.int8)
            batched = torch.func.vmap(lambda row: rmsnorm_cuda.rms_norm(row, cols))(x)
            model = torch.nn.Sequential(torch.nn.RMSNorm(cols, dtype=dtype))
            rmsnorm_cuda.replace_rms_norm(model)
            results += [out, codes, scale, batched, model(x)]
        with pytest.raises(RuntimeError, match="normalized_shape"):
            rmsnorm_cuda.rms_norm(x, cols + 1)
    return [t.detach() for t in results]


def test_many_threads():
    want = [work(seed) for seed in range(THREADS)]
    got, start = {}, threading.Barrier(THREADS)

    def run(seed):
        start.wait()
        got[seed] = [work(seed) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(THREADS):
        for results in got[seed]:  # a KeyError: that thread failed, and said why
            for a, b in zip(results, want[seed], strict=True):
                assert torch.equal(a, b)


def test_thread_with_a_small_stack():
    """Tiles of weights are not on it; torch's norm runs on as little."""
    x, weight = torch.randn(20, 9000, dtype=torch.bfloat16), torch.randn(9000)
    want, got = rmsnorm_cuda.rms_norm(x, 9000, weight), []
    before = threading.stack_size(40 << 10)
    try:
        thread = threading.Thread(target=lambda: got.append(rmsnorm_cuda.rms_norm(x, 9000, weight)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert torch.equal(got[0], want)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_no_gil():
    """Importing the package does not turn it on again."""
    assert not sys._is_gil_enabled()
