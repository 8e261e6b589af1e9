"""What only a GPU shows: capture into CUDA graphs, streams, launches that overlap. Skipped where torch's own kernels do not run."""

import subprocess
import sys

import pytest
import torch

from rmsnorm_cuda import _C, rms_norm

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def real_gpu(torch_kernels):
    if not (torch.cuda.is_available() and _C.cuda_built()):
        pytest.skip("no CUDA device or no CUDA kernels")
    torch_kernels("cuda")


@pytest.mark.parametrize("cols", (64, 4096, 12_000, 100_000))
def test_graph_capture_and_replay(cols):
    x = torch.randn(33, cols, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(cols, device="cuda").requires_grad_()
    dy = torch.randn_like(x)

    def step():
        y = rms_norm(x, cols, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
    for _ in range(2):
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)


def test_runs_on_the_current_stream():
    x = torch.randn(4096, 4096, device="cuda")
    want = rms_norm(x, 4096)
    stream = torch.cuda.Stream()
    y = torch.empty_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what follows on this stream is late; a launch on another would be seen as wrong
        y.copy_(x)
        rms_norm(y, 4096, out=y)
    stream.synchronize()
    assert torch.equal(y, want)


CHAIN = """
import hashlib, torch
from rmsnorm_cuda import rms_norm
torch.manual_seed(0)
y = torch.randn(512, 4096).bfloat16().cuda()
weight = (torch.rand(4096) + 0.5).cuda()
for _ in range(200):
    y = rms_norm(y, 4096, weight)
print(hashlib.sha256(y.cpu().view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_overlapping_launches_wait_for_their_input(monkeypatch):
    """Each of 200 norms reads what the one before it wrote: the bits are those of launches that do not overlap."""
    results = []
    for overlap in ("0", "1"):
        monkeypatch.setenv("RMSNORM_CUDA_PDL", overlap)
        done = subprocess.run([sys.executable, "-c", CHAIN], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(done.stdout)
    assert results[0] == results[1]
