"""RMSNorm on a GPU, forward and with backward, beside torch's norms, other packages and a copy.

    python benchmarks/gpu.py [--dtypes bf16,fp32] [--shapes 4096x4096,...] [--no-compile]
                             [--calls 30] [--minutes 4] [--json FILE] [--png FILE]
    python benchmarks/gpu.py --sanitize   # nothing but compute-sanitizer's four tools over the
                                          # native CUDA test

    python benchmarks/gpu.py --roofs      # what the memory and a launch allow, and no more

Outputs and gradients are verified against fp64 before anything is timed. Each call finds a cold L2
cache: a copy larger than it runs in between, during which the host queues the call. Times are
medians of CUDA events, contenders interleaved; "host" is what Python and the launch take
meanwhile. Small cells are timed once more in CUDA graphs of 20 calls, which have no host in
between, and a warm L2 cache. GB/s counts each byte that has to move once: x and y, for a backward
x, dy and dx, for a training step x, dy and x again and y and dx (what is in between stays in the L2
cache or not, as it may), for a fused addition x and the residual read and both results written, for
8 bits x read and as many bytes as elements written. The roof is a device copy that moves as many
bytes, measured in the same way.

It ends in --minutes: torch.compile, which takes seconds a cell, is left out from half of them on,
and the cells that are not begun by then are named.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch

import rmsnorm_cuda
from benchmarks.common import chart, verify
from rmsnorm_cuda.bench.contenders import (
    DTYPES,
    EPS,
    PASSES,
    fused_adds,
    norms,
    quantized,
    training_step,
)
from rmsnorm_cuda.bench.timing import event_samples, flush_of
from rmsnorm_cuda.reference import rms_norm_backward_reference

MODES = PASSES | {"backward": 3}
SMALL = 4 << 20  # bytes of x, up to which a cell is timed in graphs too
SHAPES = (
    "1x4096,64x4096,65536x64,65536x128,32768x256,16384x512,16384x1024,8192x2048,8192x4096,"
    "4096x8192,4096x16384,2048x32768,1024x65536,1024x131072"
)


def others(cols, weight):
    """The norms of other packages that are installed here, as common.norms gives them."""

    def installed(name):
        return importlib.util.find_spec(name) is not None

    if installed("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        yield (
            "Liger",
            (lambda x: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False), [weight]),
        )
    if installed("quack"):
        from quack import rmsnorm

        yield "QuACK", (lambda x: rmsnorm(x, weight, eps=EPS), [weight])
    if installed("apex"):
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        yield "apex", (lambda x: fused_rms_norm_affine(x, weight, cols, EPS), [weight])


class Cell:
    """The tensors of one shape and pair of dtypes."""

    def __init__(self, rows, cols, dtype, weight_dtype, device):
        def there(*shape, dtype):
            try:
                return torch.randn(*shape, dtype=dtype, device=device)
            except RuntimeError:  # a simulated device, without kernels of torch
                return torch.randn(*shape, dtype=dtype).to(device)

        self.cols = (cols,)
        self.bytes = rows * cols * dtype.itemsize
        self.x, self.dy = there(rows, cols, dtype=dtype), there(rows, cols, dtype=dtype)
        self.weight = there(cols, dtype=weight_dtype)
        self.bias = torch.zeros(cols, dtype=weight_dtype).to(device)
        self.rows = rows

    def copy(self, passes):
        half = torch.empty(
            max(1, int(self.bytes * passes) // 2), dtype=torch.uint8, device=self.x.device
        )
        to = torch.empty_like(half)
        return lambda x: to.copy_(half)

    def contenders(self, mode, compiled):
        if mode == "fused":
            adds = fused_adds(self.cols, self.weight, compiled)
            return {name: lambda x, run=run: run(x, self.dy) for name, run in adds.items()} | {
                "copy": self.copy(MODES[mode])
            }
        if mode == "quantized":
            return quantized(self.cols, self.weight, compiled) | {
                "copy": self.copy(1 + 1 / self.x.itemsize)
            }
        weight, bias = self.weight, self.bias
        if mode in ("training", "backward"):
            weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        all_norms = norms(self.cols, weight, bias, compiled) | dict(others(self.cols, weight))
        if mode == "backward":
            return self.backwards(all_norms) | {"copy": self.copy(MODES[mode])}
        gradients = {id(self.x): self.dy}
        runs = {
            name: training_step(norm, parameters, gradients) if mode == "training" else norm
            for name, (norm, parameters) in all_norms.items()
        }
        if mode == "forward":
            out = torch.empty_like(self.x)
            runs["ours out="] = lambda x: rmsnorm_cuda.rms_norm(
                x, self.cols, self.weight, EPS, out=out
            )
        return runs | {"copy": self.copy(MODES[mode])}

    def backwards(self, all_norms):
        """The gradients of x and of the parameters, of forwards that were run before."""
        leaf = self.x.detach().requires_grad_()
        runs = {}
        for name, (norm, parameters) in all_norms.items():
            try:
                y, inputs = norm(leaf), [leaf, *parameters]
            except Exception:  # which samples() tells of the forward
                continue
            runs[name] = lambda x, y=y, inputs=inputs: torch.autograd.grad(
                y, inputs, self.dy, retain_graph=True
            )
        return runs

    def verify(self):
        """Forward and backward of some rows, against fp64."""
        verify(self.x[:64], self.cols, self.weight)
        x, weight = self.x[:64].detach().requires_grad_(), self.weight.detach().requires_grad_()
        y = rmsnorm_cuda.rms_norm(x, self.cols, weight, EPS)
        grads = torch.autograd.grad(y, [x, weight], self.dy[:64])
        wants = rms_norm_backward_reference(
            self.dy[:64].cpu(), x.detach().cpu(), self.cols, weight.detach().cpu(), EPS
        )
        for got, want in zip(grads, wants, strict=True):
            error = (got.cpu().double() - want).abs().max() / want.abs().max()
            assert error <= 4 * torch.finfo(got.dtype).eps, f"a gradient is {error:.1e} off"


def samples(contenders, x, flush, calls):
    """Those of timing.event_samples, without contenders that do not run."""
    runs = dict(contenders)
    for name, run in contenders.items():
        try:
            run(x)  # compiles what has to be compiled
        except Exception as error:  # one of the other packages: it is left out, with its reason
            if name.startswith("ours") and "torch" not in name:
                raise
            print(
                f"  {name} left out: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}",
                flush=True,
            )
            del runs[name]
    return event_samples(runs, x, flush, calls)


def measure(contenders, x, flush, calls):
    """Median microseconds of each contender: of the GPU, and of the host."""
    times, host = samples(contenders, x, flush, calls)
    return tuple(
        {name: statistics.median(found[name]) for name in times} for found in (times, host)
    )


def in_graphs(contenders, x, calls):
    """Median microseconds of a call in a CUDA graph of 20, of those that can be captured."""
    graphs, times = {}, {}
    for name, run in contenders.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(20):
                    run(x)
        except RuntimeError as error:
            print(f"  {name} not as a graph: {str(error).splitlines()[0]}", flush=True)
        else:
            graphs[name], times[name] = graph, []
    for _ in range(calls):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / 20)
    return {name: statistics.median(found) for name, found in times.items()}


def roofs(device, flush):
    """Prints what the memory gives to a copy, a kernel that copies and one that adds, and what a
    launch takes."""
    a, b, c = (torch.empty(256 << 20, dtype=torch.uint8, device=device) for _ in range(3))
    a32, b32, c32 = (t.view(torch.int32) for t in (a, b, c))
    runs = {
        "cudaMemcpy, 1 read and 1 write": (2, lambda x: b.copy_(a)),
        "a kernel, 1 read and 1 write": (2, lambda x: torch.neg(a32, out=b32)),
        "a kernel, 2 reads and 1 write": (3, lambda x: torch.add(a32, b32, out=c32)),
    }
    us, _ = measure({name: run for name, (_, run) in runs.items()}, a, flush, 20)
    for name, time_us in us.items():
        print(f"{name}: {runs[name][0] * a.numel() / time_us / 1e3:.0f} GB/s")
    little = torch.empty(64, dtype=torch.uint8, device=device)
    for name, time_us in in_graphs({"a launch": lambda x: little.copy_(a[:64])}, a, 20).items():
        print(f"{name}, in a graph: {time_us:.2f} us")


def show(mode, dtype, shape, size, us, host):
    speed = MODES[mode] * size / us["ours"] / 1e3
    rest = "".join(
        f"  {name} {time:.1f} ({time / us['ours']:.2f}x)"
        for name, time in us.items()
        if name != "ours"
    )
    ours = (
        f"ours {us['ours']:8.2f} us, {speed:6.0f} GB/s, {us['copy'] / us['ours']:.1%} of the roof"
    )
    ours += f", host {host['ours']:.1f} us"
    print(f"{mode:8} {dtype} {shape:>11}  {ours} |{rest}", flush=True)


def sanitize():
    """compute-sanitizer over the native test, built for the GPU that is here; the exit status."""
    for tool in ("nvcc", "compute-sanitizer"):
        if not shutil.which(tool):
            sys.exit(
                f"benchmarks/gpu.py: {tool} was not found on PATH; it comes with the CUDA toolkit."
            )
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cuda_check"
        options = [
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-arch=native",
            '-DRMSNORM_CUDA_ARCHS="native"',
            "-t",
            "0",
        ]
        subprocess.run(
            [
                "nvcc",
                *options,
                ROOT / "tests/native/cuda_check.cpp",
                *ROOT.glob("csrc/cuda/*.cu"),
                "-o",
                program,
            ],
            check=True,
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            print(f"compute-sanitizer --tool {tool}", flush=True)
            status |= subprocess.run(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", program]
            ).returncode
    return status


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="bf16", help="fp32, fp16, bf16/fp32 too")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument(
        "--compile", default="F.rms_norm", help="formulas under torch.compile: F.rms_norm, llama"
    )
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--only",
        default="",
        help="contenders whose name starts with one of these, besides ours and copy",
    )
    parser.add_argument("--json")
    parser.add_argument("--png", help="a bar chart; needs matplotlib")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--roofs", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py: torch sees no CUDA device; `python -m rmsnorm_cuda --explain` "
            "needs none."
        )
    if args.sanitize:
        return sanitize()
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    flush = flush_of(device)
    machine = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    machine += f", CUDA {torch.version.cuda}"
    print(f"torch {torch.__version__}, {machine}; us a call, median of {args.calls}; x: times ours")

    if args.roofs:
        return roofs(device, flush)
    results, left_out, began = [], [], time.monotonic()
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            if time.monotonic() - began > 60 * args.minutes:
                left_out.append(f"{dtype} {shape}")
                continue
            cell = Cell(*map(int, shape.split("x")), *DTYPES[dtype], device)
            cell.verify()
            for mode in MODES:
                late = time.monotonic() - began > 30 * args.minutes
                runs = cell.contenders(
                    mode, () if args.no_compile or late else args.compile.split(",")
                )
                if args.only:
                    wanted = ("ours", "copy", *args.only.split(","))
                    runs = {name: run for name, run in runs.items() if name.startswith(wanted)}
                us, host = measure(runs, cell.x, flush, args.calls)
                show(mode, dtype, shape, cell.bytes, us, host)
                result = {"mode": mode, "dtype": dtype, "shape": shape, "us": us, "host_us": host}
                if cell.bytes <= SMALL:
                    captured = {name: run for name, run in runs.items() if name in us}
                    result["graph_us"] = in_graphs(captured, cell.x, args.calls)
                results.append(result)
    if left_out:
        print(f"left out, since {args.minutes:g} minutes are over: {', '.join(left_out)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {
                    "torch": torch.__version__,
                    "machine": machine,
                    "results": results,
                    "left_out": left_out,
                },
                file,
                indent=1,
            )
    if args.png:
        chart(results, args.png, properties.name, hidden=("copy",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
