"""An op that Inductor cannot look into, beside the formula that it fuses with its neighbours.

    python benchmarks/fusion.py [--threads 1,2] [--dtypes fp32,bf16] [--shapes 1x4096,...]
                                [--json FILE]

Each pattern is compiled twice: with our op, and with rmsnorm_cuda.config.decompose; "eager" is not
compiled at all, with our op. Results are verified against each other, then timed interleaved in one
process over buffers that rotate once they are large; medians, and ratios of medians. On a CUDA
device (--device cuda) the same, each call waited for.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import rmsnorm_cuda
from benchmarks.common import measure
from rmsnorm_cuda import fused_add_rms_norm, rms_norm
from rmsnorm_cuda.bench.buffers import ROTATE_BYTES
from rmsnorm_cuda.bench.contenders import DTYPES, EPS


def norm(x, weight):
    return rms_norm(x, weight.shape, weight, EPS)


def gate_after(x, z, weight):
    return norm(x, weight) * F.silu(z)


PATTERNS = {  # functions of x, z of the same shape, and the weight
    "norm alone": lambda x, z, weight: norm(x, weight),
    "gate before": lambda x, z, weight: norm(x * torch.sigmoid(z), weight),
    "gate after": gate_after,
    "before and after": lambda x, z, weight: norm(F.gelu(x) + z, weight) * 2 + z,
    "added residual": lambda x, z, weight: fused_add_rms_norm(x, z, weight, EPS),
    "residual, gate after": lambda x, z, weight: (lambda y, total: (y * F.silu(total), total))(
        *fused_add_rms_norm(x, z, weight, EPS)
    ),
    "two norms, summed": lambda x, z, weight: norm(x, weight) + norm(z, weight),
    "then a linear layer": None,
}


def linear_after(cols, dtype, device):
    matrix = torch.randn(cols, cols, device=device).to(dtype) / cols**0.5
    return lambda x, z, weight: F.linear(norm(x, weight), matrix)


def contenders(function, inputs, weight):
    """Both of one compiled function: what it runs follows the setting at the call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def run(decompose, pair):
        rmsnorm_cuda.config.decompose = decompose
        return compiled(*pair, weight)

    runs = {
        "op": partial(run, False),
        "formula": partial(run, True),
        "eager": lambda pair: function(*pair, weight),
    }
    # Inductor leaves out the roundings between the steps, each half an eps of values below 8.
    tolerance = {"rtol": 0.02, "atol": 16 * torch.finfo(inputs[0][0].dtype).eps}
    want, *others = (run(inputs[0]) for run in runs.values())
    for other in others:
        torch.testing.assert_close(other, want, **tolerance)
    return runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--shapes", default="1x4096,32x4096,2048x4096,8192x128")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender in a cell")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    results = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"torch {torch.__version__}, {threads} thread(s), {args.device}; us a call, median")
        for dtype in args.dtypes.split(","):
            for shape in args.shapes.split(","):
                rows, cols = map(int, shape.split("x"))
                x_dtype, weight_dtype = DTYPES[dtype]
                one = rows * cols * x_dtype.itemsize
                copies = 1 if one < 1 << 20 else max(2, min(16, ROTATE_BYTES // (2 * one)))
                inputs = [
                    torch.randn(2, rows, cols, device=args.device).to(x_dtype).unbind()
                    for _ in range(copies)
                ]
                weight = torch.randn(cols, device=args.device).to(weight_dtype)
                for name, function in PATTERNS.items():
                    with torch.no_grad():
                        runs = contenders(
                            function or linear_after(cols, x_dtype, args.device), inputs, weight
                        )
                        if args.device == "cuda":
                            runs = {
                                key: lambda pair, run=run: (run(pair), torch.cuda.synchronize())
                                for key, run in runs.items()
                            }
                        us = measure(runs, inputs, args.seconds)
                    results.append(
                        {
                            "pattern": name,
                            "dtype": dtype,
                            "shape": shape,
                            "threads": threads,
                            "us": us,
                        }
                    )
                    times = "  ".join(
                        f"{kind} {us[kind]:9.1f}" for kind in ("op", "formula", "eager")
                    )
                    ratio = f"formula over op {us['formula'] / us['op']:.2f}"
                    print(f"{dtype} {shape:>9} {name:22} {times}  {ratio}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "isa": rmsnorm_cuda._C.isa(), "results": results},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
