"""RMSNorm on the CPU, forward and forward + backward, beside torch's own norms, torch.compile and a copy.

    python benchmarks/cpu.py [--threads 1,2] [--dtypes fp32,bf16,fp16,bf16/fp32] [--shapes 1x4096,...] [--no-compile]
                             [--json FILE] [--png FILE]

Outputs are verified against fp64 before anything is timed. The contenders of a cell run interleaved in one process,
over buffers that rotate once they are large; what is shown is the median, and ratios of medians. Run it on a quiet
machine and take differences under 10 % for noise. GB/s counts x read and y written, for a training step x, dy and x
again read and y and dx written; empty_like is the allocation of y alone. The floor is a copy of x into a buffer that is there already, and for a training step
that and an addition of x and dy.
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

DTYPES = {  # of x and of weight
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}
EPS = 1e-6
ROTATE_BYTES = 256 << 20  # beyond any cache here: a large cell finds none of its data in it
PASSES = {"forward": 2, "training": 5}  # over x: see above


def llama(x, weight):
    """The formula of the Llama family in transformers, whose order of roundings is cast_before_weight."""
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * hidden.to(x.dtype)


class Cell:
    """The tensors of one shape and pair of dtypes, as many sets of them as it takes to leave the caches behind."""

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

    def norms(self, weight, bias, with_compiled):
        """Name: (a norm of x, its parameters)."""
        norms = {
            "ours": (lambda x: rmsnorm_cuda.rms_norm(x, self.cols, weight, EPS), [weight]),
            "F.rms_norm": (lambda x: F.rms_norm(x, self.cols, weight, EPS), [weight]),
            "F.layer_norm": (lambda x: F.layer_norm(x, self.cols, weight, bias, EPS), [weight, bias]),
        }
        if with_compiled:
            torch._dynamo.reset()
            rms_norm = torch.compile(lambda x, weight: F.rms_norm(x, self.cols, weight, EPS), dynamic=False)
            formula = torch.compile(llama, dynamic=False)
            norms["compile(F.rms_norm)"] = (lambda x: rms_norm(x, weight), [weight])
            norms["compile(llama)"] = (lambda x: formula(x, weight), [weight])
        return norms

    def forward(self, with_compiled):
        runs = {name: norm for name, (norm, _) in self.norms(self.weight, self.bias, with_compiled).items()}
        module = rmsnorm_cuda.RMSNorm(self.cols, EPS, dtype=self.weight.dtype).requires_grad_(False)
        runs["ours module"] = module
        runs["empty_like"] = torch.empty_like
        runs["ours out="] = lambda x: rmsnorm_cuda.rms_norm(x, self.cols, self.weight, EPS, out=self.out)
        runs["floor"] = lambda x: self.out.copy_(x)
        return runs

    def training(self, with_compiled):
        gradients = dict(zip(map(id, self.x), self.dy, strict=True))
        leaves = {id(x): x.detach().requires_grad_() for x in self.x}

        def step(norm, parameters):
            def run(x):
                leaf = leaves[id(x)]
                return torch.autograd.grad(norm(leaf), [leaf, *parameters], gradients[id(x)])

            return run

        def floor(x):
            self.out.copy_(x)
            return torch.add(x, gradients[id(x)], out=self.out)

        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        runs = {name: step(*norm) for name, norm in self.norms(weight, bias, with_compiled).items()}
        return runs | {"floor": floor}


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


def show(mode, dtype, shape, size, us):
    speed = PASSES[mode] * size / us["ours"] / 1e3
    others = "".join(f"  {name} {time:.1f} ({time / us['ours']:.2f}x)" for name, time in us.items() if name != "ours")
    print(f"{mode:8} {dtype} {shape:>10}  ours {us['ours']:9.2f} us, {speed:6.1f} GB/s, {us['ours'] / us['floor']:.2f}x floor |"
          + others, flush=True)  # fmt: skip


def chart(results, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in results[0]["us"] if name not in ("floor", "empty_like") and not name.startswith("ours")]
    modes = list(dict.fromkeys(result["mode"] for result in results))
    fig, axes = plt.subplots(len(modes), 1, figsize=(max(8, len(results) / 2), 4 * len(modes)), squeeze=False)
    for mode, axis in zip(modes, axes[:, 0], strict=True):
        cells = [result for result in results if result["mode"] == mode]
        for i, name in enumerate(names):
            places = [at + (i + 0.5) / len(names) * 0.8 - 0.4 for at in range(len(cells))]
            axis.bar(places, [c["us"][name] / c["us"]["ours"] for c in cells], 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel("time, as a multiple of ours")
        axis.set_title(f"{mode}, CPU, {rmsnorm_cuda._C.isa()}")
        labels = [f"{c['shape']}\n{c['dtype']}, {c['threads']}T" for c in cells]
        axis.set_xticks(range(len(cells)), labels, fontsize=6, rotation=90)
        axis.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--shapes", default="1x4096,32x4096,2048x4096,8192x128")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender in a cell")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    parser.add_argument("--json")
    parser.add_argument("--png", help="a bar chart; needs matplotlib")
    args = parser.parse_args()
    results = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"torch {torch.__version__}, {rmsnorm_cuda._C.isa()}, {threads} thread(s); us a call, median; x: times ours")
        for dtype in args.dtypes.split(","):
            for shape in args.shapes.split(","):
                cell = Cell(*map(int, shape.split("x")), *DTYPES[dtype])
                verify(cell)
                for mode in PASSES:
                    us = measure(getattr(cell, mode)(not args.no_compile), cell.x, args.seconds)
                    show(mode, dtype, shape, cell.bytes, us)
                    results.append({"mode": mode, "dtype": dtype, "shape": shape, "threads": threads, "us": us})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "isa": rmsnorm_cuda._C.isa(), "results": results}, file, indent=1)
    if args.png:
        chart(results, args.png)


if __name__ == "__main__":
    main()
