"""RMSNorm on the CPU, forward and forward + backward, beside F.layer_norm, F.rms_norm and a copy of the same bytes.

    python benchmarks/cpu.py [--threads 1,2] [--dtypes fp32,bf16] [--shapes 1x4096,...] [--json FILE]

Outputs are verified against fp64 before anything is timed. The contenders of a cell run interleaved in one process,
over buffers that rotate once they are large; what is shown is the median, and ratios of medians. Run it on a quiet
machine and take differences under 10 % for noise.
"""

import argparse
import gc
import json
import statistics
import time

import torch
import torch.nn.functional as F

import rmsnorm_cuda
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-6
ROTATE_BYTES = 256 << 20  # beyond any cache here: a large cell finds none of its data in it


class Cell:
    """The tensors of one shape and dtype, as many sets of them as it takes to leave the caches behind."""

    def __init__(self, rows, cols, dtype):
        one = rows * cols * dtype.itemsize
        copies = 1 if one < 1 << 20 else max(2, min(16, ROTATE_BYTES // one))
        self.cols = (cols,)
        self.x = [torch.randn(rows, cols).to(dtype) for _ in range(copies)]
        self.dy = [torch.randn(rows, cols).to(dtype) for _ in range(copies)]
        self.weight = torch.randn(cols).to(dtype)
        self.bias = torch.zeros(cols, dtype=dtype)
        self.out = torch.empty_like(self.x[0])

    def forward(self):
        c = self
        return {
            "ours": lambda x: rmsnorm_cuda.rms_norm(x, c.cols, c.weight, EPS),
            "ours out=": lambda x: rmsnorm_cuda.rms_norm(x, c.cols, c.weight, EPS, out=c.out),
            "F.rms_norm": lambda x: F.rms_norm(x, c.cols, c.weight, EPS),
            "F.layer_norm": lambda x: F.layer_norm(x, c.cols, c.weight, c.bias, EPS),
            "copy": lambda x: x.clone(),
        }

    def training(self):
        weight = self.weight.clone().requires_grad_()
        bias = self.bias.clone().requires_grad_()
        norms = {
            "ours": (lambda x: rmsnorm_cuda.rms_norm(x, self.cols, weight, EPS), [weight]),
            "F.rms_norm": (lambda x: F.rms_norm(x, self.cols, weight, EPS), [weight]),
            "F.layer_norm": (lambda x: F.layer_norm(x, self.cols, weight, bias, EPS), [weight, bias]),
        }
        gradients = dict(zip(map(id, self.x), self.dy))

        def step(norm, parameters):
            def run(x):
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad(norm(leaf), [leaf, *parameters], gradients[id(x)])

            return run

        return {name: step(*norm) for name, norm in norms.items()}


def verify(cell):
    x = cell.x[0][:64]
    want = rms_norm_reference(x, cell.cols, cell.weight, EPS)
    worst = ulp_distance(rmsnorm_cuda.rms_norm(x, cell.cols, cell.weight, EPS), want).max().item()
    assert worst <= 1, f"{worst} ulp from the reference"


def measure(contenders, inputs, seconds):
    """Median microseconds a call of each contender, interleaved in batches of about 200 us."""
    batch = {}
    for name, run in contenders.items():
        run(inputs[0])
        start = time.perf_counter()
        run(inputs[-1])
        batch[name] = max(1, int(200e-6 / (time.perf_counter() - start)))
    samples = {name: [] for name in contenders}
    turn = 0
    gc.disable()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(samples[name]) < 5:
        for name, run in contenders.items():
            start = time.perf_counter()
            for i in range(batch[name]):
                run(inputs[(turn + i) % len(inputs)])
            samples[name].append((time.perf_counter() - start) / batch[name] * 1e6)
            turn += 1
    gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--shapes", default="1x4096,32x4096,2048x4096,8192x128")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each contender in a cell")
    parser.add_argument("--json")
    args = parser.parse_args()
    results = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"torch {torch.__version__}, {rmsnorm_cuda._C.isa()}, {threads} thread(s); us a call, median; x: times ours")
        for dtype in args.dtypes.split(","):
            for shape in args.shapes.split(","):
                rows, cols = map(int, shape.split("x"))
                cell = Cell(rows, cols, DTYPES[dtype])
                verify(cell)
                for mode, contenders in (("forward", cell.forward()), ("fwd+bwd", cell.training())):
                    times = measure(contenders, cell.x, args.seconds)
                    row = "  ".join(f"{name} {us:9.2f} ({us / times['ours']:.2f}x)" for name, us in times.items())
                    print(f"{mode} {dtype} {shape:>10}  {row}", flush=True)
                    results.append({"mode": mode, "dtype": dtype, "shape": shape, "threads": threads, "us": times})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "isa": rmsnorm_cuda._C.isa(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
