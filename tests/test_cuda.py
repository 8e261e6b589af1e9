"""What only a GPU shows: CUDA graphs, streams, several devices, launches that overlap. Most needs
torch's own kernels.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import random, random_weight, same_bits

from rmsnorm_cuda import (
    _C,
    RMSNorm,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    rms_norm,
    rms_norm_quant,
)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu():
    if not (torch.cuda.is_available() and _C.cuda_built()):
        pytest.skip("no CUDA device or no CUDA kernels")


@pytest.fixture
def real_gpu(torch_kernels):
    torch_kernels("cuda")


def every_function(x, residual, weight):
    y = rms_norm(x, x.shape[-1:], weight)
    both = fused_add_rms_norm(x, residual, weight)
    return y, *both, *rms_norm_quant(x, weight, dtype=torch.int8)


def test_variable_that_is_not_understood():
    code = "import torch, rmsnorm_cuda; rmsnorm_cuda.rms_norm(torch.ones(64, 1024).cuda(), 1024)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RMSNORM_CUDA_PDL": "yes"},
        capture_output=True,
        text=True,
    )
    assert "RuntimeError: RMSNORM_CUDA_PDL is 'yes': expected 1, 0 or unset" in run.stderr


def test_streams_without_kernels_of_torch():
    """On a stream of their own, made on another; the host copy waits for it."""
    x, residual, weight = random(5, 300), random(5, 300), random_weight(300, torch.float32)
    on_device = [t.cuda() for t in (x, residual, weight)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    want = [t.cpu() for t in every_function(*on_device)]
    with torch.cuda.stream(stream):
        got = every_function(*on_device)
        event = stream.record_event()
    event.synchronize()
    assert all(map(same_bits, got, want))


def test_current_device_is_kept():
    """The kernels run where the tensors are, and leave the current device as it was."""
    before = torch.cuda.current_device()
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    x, residual, weight = (
        t.to(last) for t in (random(5, 300), random(5, 300), random_weight(300, torch.float32))
    )
    results = every_function(x, residual, weight)
    assert {t.device for t in results} == {last} and torch.cuda.current_device() == before
    if last.index == before:
        pytest.skip(
            "one device: it kept being the current one; that another is left alone needs two"
        )
    first = every_function(*(t.to("cuda:0") for t in (x, residual, weight)))
    assert all(map(same_bits, results, first))


def test_devices_that_differ():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, weight = random(5, 300).to("cuda:0"), random_weight(300, torch.float32).to("cuda:1")
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        rms_norm(x, 300, weight)


def test_autocast_on_cuda():
    x, weight = (
        random(5, 300, dtype=torch.bfloat16).cuda(),
        random_weight(300, torch.float32).cuda(),
    )
    want = every_function(x, x, weight)
    with torch.autocast("cuda", torch.float16):
        got = every_function(x, x, weight)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize(
    "cols, where",
    ((64, "rows"), (4096, "rows"), (40_000, "shared_rows"), (2_000_000, "long_rows")),
)
def test_last_plan(cols, where):
    """Names the kernel that ran and its layout, which is the planner's; of this thread and of CUDA
    alone.
    """
    x = random(3, cols, dtype=torch.bfloat16)
    on_device = x.cuda()
    here = torch.cuda.get_device_properties(on_device.device)
    machine = (
        here.major * 10 + here.minor,
        here.multi_processor_count,
        here.shared_memory_per_block_optin,
    )
    types = (torch.bfloat16,) * 2

    rms_norm(on_device, cols)
    plan = _C.last_plan()
    assert plan["kernel"] == "forward_" + where and plan == _C.cuda_plan(
        False, 3, cols, *types, *machine
    )
    _, rstd = torch.ops.rmsnorm_cuda.rms_norm_forward(on_device, [cols])
    torch.ops.rmsnorm_cuda.rms_norm_backward(
        on_device, on_device, [cols], None, rstd, None, [True, False]
    )
    assert _C.last_plan() == _C.cuda_plan(True, 3, cols, *types, *machine)
    rms_norm_quant(on_device, dtype=torch.int8)
    plan = _C.last_plan()
    assert plan["kernel"] == "quant_" + where
    rms_norm(x, cols)
    assert _C.last_plan() == plan
    with ThreadPoolExecutor() as pool:
        assert pool.submit(_C.last_plan).result()["kernel"] == ""
    rms_norm(on_device[:, :8], 8, torch.ones(8, dtype=torch.float64).cuda())
    assert _C.last_plan()["kernel"] == "forward_double"


@pytest.mark.parametrize("training", [False, True])
def test_compile_reduce_overhead(real_gpu, training):
    """Inductor records CUDA graphs of the whole: no op of ours keeps it from that."""
    norms = torch.nn.ModuleList(RMSNorm(512, device="cuda") for _ in range(2))

    def function(x):
        y, x = norms[1](norms[0](x) * 2, x)
        if not training:
            fused_add_rms_norm_(y, x)
        return y + x

    def run(function, x):
        y = function(x)
        return (
            (
                y.clone(),
                *(g.clone() for g in torch.autograd.grad(y.sum(), [x, *norms.parameters()])),
            )
            if training
            else (y.clone(),)
        )

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    with torch.set_grad_enabled(training):
        for _ in range(4):
            x = torch.randn(32, 512, device="cuda").requires_grad_(training)
            torch.compiler.cudagraph_mark_step_begin()
            for a, b in zip(run(compiled, x), run(function, x), strict=True):
                torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_manager(
        torch.cuda.current_device(), create_if_none_exists=False
    )
    assert manager is not None and manager.new_graph_id().id > 0, "no graph was recorded"


@pytest.mark.parametrize("cols", (64, 4096, 12_000, 100_000))
def test_graph_capture_and_replay(real_gpu, cols):
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


def test_runs_on_the_current_stream(real_gpu):
    x = torch.randn(4096, 4096, device="cuda")
    want = rms_norm(x, 4096)
    stream = torch.cuda.Stream()
    y = torch.empty_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            100_000_000
        )  # what follows on this stream is late; a launch on another would be seen as wrong
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


def test_overlapping_launches_wait_for_their_input(real_gpu, monkeypatch):
    """Each of 200 norms reads what the one before it wrote: the bits are those of launches that do
    not overlap.
    """
    results = []
    for overlap in ("0", "1"):
        monkeypatch.setenv("RMSNORM_CUDA_PDL", overlap)
        done = subprocess.run([sys.executable, "-c", CHAIN], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(done.stdout)
    assert results[0] == results[1]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_search_of_the_numbers(tmp_path):
    """benchmarks/tune.py, as far as a simulated GPU goes: builds, layouts, results, the report."""
    script = Path(__file__).parents[1] / "benchmarks" / "tune.py"
    if not script.exists():
        pytest.skip("the benchmarks are not here")
    options = ["--dry-run", "--shapes", "4x512,2x9000", "--variants", "usual,backward of 96"]
    options += ["--passes", "forward,backward", "--json", tmp_path / "tune.json"]
    subprocess.run([sys.executable, script, *options], check=True)
    report = json.loads((tmp_path / "tune.json").read_text())
    for which in ("forward", "backward"):
        trials = report[which]["trials"]
        assert len(trials) > 10 and not any("error" in trial for trial in trials)
        assert {trial["library"] for trial in trials} == {"usual", "backward of 96"}
