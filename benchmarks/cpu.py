"""RMSNorm on the CPU, forward and with backward, beside torch's norms, torch.compile and a copy.

    python benchmarks/cpu.py [--threads 1,2] [--dtypes fp32,bf16,fp16,bf16/fp32]
                             [--shapes 1x4096,...] [--no-compile] [--json FILE] [--png FILE]

Outputs are verified against fp64 before anything is timed. The contenders of a cell run interleaved
in one process, over buffers that rotate once they are large; what is shown is the median, and
ratios of medians. Run it on a quiet machine and take differences under 10 % for noise. GB/s counts
x read and y written, for a training step x, dy and x again read and y and dx written, for a fused
addition x and the residual read and both results written; empty_like is the allocation of y alone.
The floor is a copy of x into a buffer that is there already, for a training step that and an
addition of x and dy, for a fused addition that of x and the residual into such a buffer and a copy
of it, for 8 bits a copy that moves as many bytes.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

import rmsnorm_cuda
from benchmarks.common import (
    DTYPES,
    EPS,
    FORMULAS,
    PASSES,
    ROTATE_BYTES,
    chart,
    fused_adds,
    measure,
    norms,
    quantized,
    training_step,
    verify,
)


class Cell:
    """The tensors of one shape and pair of dtypes, as many sets as it takes to leave the caches."""

    def __init__(self, rows, cols, dtype, weight_dtype):
        one = rows * cols * dtype.itemsize
        copies = 1 if one < 1 << 20 else max(2, min(16, ROTATE_BYTES // one))
        self.cols = (cols,)
        self.bytes = one
        self.x = [torch.randn(rows, cols).to(dtype) for _ in range(copies)]
        self.dy = [torch.randn(rows, cols).to(dtype) for _ in range(copies)]
        self.weight = torch.randn(cols).to(weight_dtype)
        self.bias = torch.zeros(cols, dtype=weight_dtype)
        self.out = torch.zeros_like(self.x[0])

    def forward(self, compiled):
        runs = {
            name: norm
            for name, (norm, _) in norms(self.cols, self.weight, self.bias, compiled).items()
        }
        module = rmsnorm_cuda.RMSNorm(self.cols, EPS, dtype=self.weight.dtype).requires_grad_(False)
        runs["ours module"] = module
        runs["empty_like"] = torch.empty_like
        runs["ours out="] = lambda x: rmsnorm_cuda.rms_norm(
            x, self.cols, self.weight, EPS, out=self.out
        )
        runs["floor"] = lambda x: self.out.copy_(x)
        return runs

    def fused(self, compiled):
        residuals = dict(zip(map(id, self.x), self.dy, strict=True))
        totals, outs = [torch.zeros_like(x) for x in self.x], [torch.zeros_like(x) for x in self.x]
        own = dict(zip(map(id, self.x), zip(totals, outs, strict=True), strict=True))
        runs = {
            name: lambda x, run=run: run(x, residuals[id(x)])
            for name, run in fused_adds(self.cols, self.weight, compiled).items()
        }

        def floor(x):
            total, out = own[id(x)]
            torch.add(x, residuals[id(x)], out=total)
            return out.copy_(total)

        # In place the values drift, but stay numbers: the sum grows by a norm with each call.
        runs["ours in place"] = lambda x: rmsnorm_cuda.fused_add_rms_norm_(
            own[id(x)][1], own[id(x)][0], self.weight, EPS
        )
        return runs | {"floor": floor}

    def quantized(self, compiled):
        count = self.bytes * (1 + self.x[0].itemsize) // (2 * self.x[0].itemsize)
        parts = {id(x): x.view(torch.uint8).view(-1)[:count] for x in self.x}
        to = torch.empty(count, dtype=torch.uint8)
        return quantized(self.cols, self.weight, compiled) | {
            "floor": lambda x: to.copy_(parts[id(x)])
        }

    def training(self, compiled):
        gradients = dict(zip(map(id, self.x), self.dy, strict=True))

        def floor(x):
            self.out.copy_(x)
            return torch.add(x, gradients[id(x)], out=self.out)

        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        contenders = norms(self.cols, weight, bias, compiled)
        return {name: training_step(*norm, gradients) for name, norm in contenders.items()} | {
            "floor": floor
        }


def show(mode, dtype, shape, size, us):
    speed = PASSES[mode] * size / us["ours"] / 1e3
    others = "".join(
        f"  {name} {time:.1f} ({time / us['ours']:.2f}x)"
        for name, time in us.items()
        if name != "ours"
    )
    ours = f"ours {us['ours']:9.2f} us, {speed:6.1f} GB/s, {us['ours'] / us['floor']:.2f}x floor"
    print(f"{mode:8} {dtype} {shape:>10}  {ours} |{others}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--shapes", default="1x4096,32x4096,2048x4096,8192x128")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender in a cell")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out, which takes most of the time",
    )
    parser.add_argument("--modes", default=",".join(PASSES))
    parser.add_argument("--json")
    parser.add_argument("--png", help="a chart; needs matplotlib")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="a JSON to draw --png from; measures nothing"
    )
    args = parser.parse_args()
    if args.source:
        with open(args.source) as file:
            saved = json.load(file)
        return chart(
            saved["results"], args.png, f"CPU, {saved['isa']}", hidden=("floor", "empty_like")
        )
    results = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(
            f"torch {torch.__version__}, {rmsnorm_cuda._C.isa()}, {threads} thread(s); us a call, "
            "median; x: times ours"
        )
        for dtype in args.dtypes.split(","):
            for shape in args.shapes.split(","):
                cell = Cell(*map(int, shape.split("x")), *DTYPES[dtype])
                verify(cell.x[0][:64], cell.cols, cell.weight)
                for mode in args.modes.split(","):
                    us = measure(
                        getattr(cell, mode)(() if args.no_compile else FORMULAS),
                        cell.x,
                        args.seconds,
                    )
                    show(mode, dtype, shape, cell.bytes, us)
                    results.append(
                        {"mode": mode, "dtype": dtype, "shape": shape, "threads": threads, "us": us}
                    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "isa": rmsnorm_cuda._C.isa(), "results": results},
                file,
                indent=1,
            )
    if args.png:
        chart(results, args.png, f"CPU, {rmsnorm_cuda._C.isa()}", hidden=("floor", "empty_like"))


if __name__ == "__main__":
    main()
