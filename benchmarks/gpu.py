"""RMSNorm on a GPU, forward and with backward, beside torch's norms, other packages and a copy.

    python benchmarks/gpu.py [--dtypes bf16,fp32] [--shapes 4096x4096,...] [--no-compile]
                             [--calls 30] [--minutes 4] [--json FILE] [--png FILE]
    python benchmarks/gpu.py --sanitize   # nothing but compute-sanitizer's four tools over the
                                          # native CUDA test

Outputs are verified against fp64 before anything is timed. Each call finds a cold L2 cache: a copy
larger than it runs in between, during which the host queues the call. Times are medians of CUDA
events, contenders interleaved. GB/s counts each byte that has to move once: x and y, for a training
step x, dy and x again and y and dx (what is in between stays in the L2 cache or not, as it may),
for a fused addition x and the residual read and both results written, for 8 bits x read and as many
bytes as elements written. The roof is a device copy that moves as many bytes, measured in the same
way.

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
from benchmarks.common import (
    DTYPES,
    EPS,
    PASSES,
    chart,
    fused_adds,
    norms,
    quantized,
    training_step,
    verify,
)

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
            return torch.randn(*shape).to(dtype).to(device)

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
                "copy": self.copy(PASSES[mode])
            }
        if mode == "quantized":
            return quantized(self.cols, self.weight, compiled) | {
                "copy": self.copy(1 + 1 / self.x.itemsize)
            }
        weight, bias = self.weight, self.bias
        if mode == "training":
            weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        all_norms = norms(self.cols, weight, bias, compiled) | dict(others(self.cols, weight))
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
        return runs | {"copy": self.copy(PASSES[mode])}


def samples(contenders, x, flush, calls):
    """Microseconds of each call of each contender, interleaved."""
    times = {name: [] for name in contenders}
    for name, run in contenders.items():
        try:
            run(x)  # compiles what has to be compiled
        except Exception as error:  # one of the other packages: it is left out, with its reason
            if name.startswith("ours"):
                raise
            print(
                f"  {name} left out: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}",
                flush=True,
            )
            del times[name]
    torch.cuda.synchronize()
    for _ in range(calls):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in times}
        for name, (start, end) in events.items():
            flush()
            start.record()
            contenders[name](x)
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3)
    return times


def measure(contenders, x, flush, calls):
    """Median microseconds of each contender."""
    return {
        name: statistics.median(times)
        for name, times in samples(contenders, x, flush, calls).items()
    }


def show(mode, dtype, shape, size, us):
    speed = PASSES[mode] * size / us["ours"] / 1e3
    rest = "".join(
        f"  {name} {time:.1f} ({time / us['ours']:.2f}x)"
        for name, time in us.items()
        if name != "ours"
    )
    ours = (
        f"ours {us['ours']:8.2f} us, {speed:6.0f} GB/s, {us['copy'] / us['ours']:.1%} of the roof"
    )
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
    big = torch.empty(2 * max(properties.L2_cache_size, 64 << 20), dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    machine = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    machine += f", CUDA {torch.version.cuda}"
    print(f"torch {torch.__version__}, {machine}; us a call, median of {args.calls}; x: times ours")
    results, left_out, began = [], [], time.monotonic()
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            if time.monotonic() - began > 60 * args.minutes:
                left_out.append(f"{dtype} {shape}")
                continue
            cell = Cell(*map(int, shape.split("x")), *DTYPES[dtype], device)
            verify(cell.x[:64], cell.cols, cell.weight)
            for mode in PASSES:
                late = time.monotonic() - began > 30 * args.minutes
                runs = cell.contenders(
                    mode, () if args.no_compile or late else args.compile.split(",")
                )
                if args.only:
                    wanted = ("ours", "copy", *args.only.split(","))
                    runs = {name: run for name, run in runs.items() if name.startswith(wanted)}
                us = measure(runs, cell.x, lambda: other.copy_(big), args.calls)
                show(mode, dtype, shape, cell.bytes, us)
                results.append({"mode": mode, "dtype": dtype, "shape": shape, "us": us})
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
