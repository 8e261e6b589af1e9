"""RMSNorm on the CPU beside torch's norms, torch.compile, other libraries' kernels and a copy.

    python benchmarks/cpu.py [--threads 1,2] [--dtypes fp32,bf16,fp16,bf16/fp32]
                             [--shapes 1x4096,...] [--modes forward,fused,training,quantized]
                             [--states warm,l2,cold] [--no-compile] [--json FILE] [--png FILE]
                             [--vllm FILE] [--sglang FILE]

Outputs are verified against fp64 before anything is timed. The contenders of a cell run interleaved
in one process; what is shown is the median, and ratios of medians. Run it on a quiet machine and
take differences under 10 % for noise.

A cell is timed in up to three states: warm, where a call finds the data of the one before it in the
caches; l2, over a rotation of buffers of twice the L2 cache, as between the layers of a model; and
cold, over a rotation that no L3 cache holds.

A name that ends in "out=" writes into a buffer that is there, one that ends in "in place" over its
inputs; the others make new tensors. GB/s counts x read and y written, for a training step x, dy and
x again read and y and dx written, for a fused addition x and the residual read and both results
written; empty_like is the allocation of y alone. The floor is a copy of x into a buffer that is
there already, for a training step that and an addition of x and dy, for a fused addition that of x
and the residual into such a buffer and a copy of it, for 8 bits a copy that moves as many bytes.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

import rmsnorm_cuda
from benchmarks.common import chart, measure, pyplot, ratio_axis
from benchmarks.peers import runs_of_peers
from rmsnorm_cuda.bench import buffers
from rmsnorm_cuda.bench.contenders import (
    DTYPES,
    EPS,
    FORMULAS,
    MOST_ULP,
    PASSES,
    fused_adds,
    norms,
    quantized,
    training_step,
)
from rmsnorm_cuda.bench.machine import machine
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance

KINDS = " out=", " in place"  # the ends of names; what has neither makes new tensors
L2_BYTES = buffers.cache_bytes(2)
# The bytes that a rotation has at least.
ROTATIONS = {"warm": 0, "l2": 2 * (L2_BYTES or 2 << 20), "cold": buffers.ROTATE_BYTES}
STATES = list(ROTATIONS)
MOST_SETS = 1 << 14  # of tensors in Python


class Buffers(NamedTuple):
    x: torch.Tensor
    other: torch.Tensor  # dy, or the residual
    out: torch.Tensor
    total: torch.Tensor


class Pools(buffers.Pools):
    def buffers(self, rows, cols, dtype, count):
        """`count` sets of buffers."""
        made = (self.tensors(name, (rows, cols), dtype, count) for name in Buffers._fields)
        return [Buffers(*fields) for fields in zip(*made, strict=True)]


def of_x(run):
    return lambda s: run(s.x)


class Cell:
    """The tensors of one shape, pair of dtypes and state."""

    def __init__(self, pools, rows, cols, dtype, weight_dtype, state):
        self.rows, self.cols, self.dtype = rows, (cols,), dtype
        self.bytes = rows * cols * dtype.itemsize
        # Every mode reads or writes two of the four at least.
        count = -(-ROTATIONS[state] // (2 * self.bytes))
        self.sets = pools.buffers(rows, cols, dtype, min(max(count, 1), MOST_SETS))
        # In place a sum grows by its norm with each call. A small weight keeps it in fp16's range,
        # an even one its direction: by others few elements would become nearly all of a row.
        self.weight = ((1 + torch.randn(cols) / 64) / 64).to(weight_dtype)
        self.bias = torch.zeros(cols, dtype=weight_dtype)

    def forward(self, compiled):
        functions = norms(self.cols, self.weight, self.bias, compiled)
        runs = {name: of_x(norm) for name, (norm, _) in functions.items()}
        module = rmsnorm_cuda.RMSNorm(self.cols, EPS, dtype=self.weight.dtype).requires_grad_(False)
        module.weight.copy_(self.weight)
        return runs | {
            "ours module": of_x(module),
            "empty_like": of_x(torch.empty_like),
            "ours out=": lambda s: rmsnorm_cuda.rms_norm(
                s.x, self.cols, self.weight, EPS, out=s.out
            ),
            "floor": lambda s: s.out.copy_(s.x),
        }

    def fused(self, compiled):
        def of_both(run):
            return lambda s: run(s.x, s.other)

        def floor(s):
            torch.add(s.x, s.other, out=s.total)
            return s.out.copy_(s.total)

        functions = fused_adds(self.cols, self.weight, compiled)
        return {name: of_both(run) for name, run in functions.items()} | {
            "ours in place": lambda s: rmsnorm_cuda.fused_add_rms_norm_(
                s.out, s.total, self.weight, EPS
            ),
            "floor": floor,
        }

    def quantized(self, compiled):
        count = self.bytes * (1 + self.dtype.itemsize) // (2 * self.dtype.itemsize)

        def floor(s):
            parts = (t.view(torch.uint8).view(-1)[:count] for t in (s.out, s.x))
            return next(parts).copy_(next(parts))

        functions = quantized(self.cols, self.weight, compiled)
        return {name: of_x(run) for name, run in functions.items()} | {"floor": floor}

    def training(self, compiled):
        def floor(s):
            s.out.copy_(s.x)
            return torch.add(s.x, s.other, out=s.out)

        gradients = {id(s.x): s.other for s in self.sets}
        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        runs = {}
        for name, norm in norms(self.cols, weight, bias, compiled).items():
            step = training_step(*norm, gradients)
            runs[name] = lambda s, step=step: step(s.x)
        return runs | {"floor": floor}


OTHER_FUNCTIONS = "floor", "empty_like", "F.layer_norm"


def verify(cell, mode, runs):
    """The first rows of each norm and sum beside fp64."""
    s = cell.sets[0]
    x = s.x[:64]
    if mode == "fused":
        x = x + s.other[:64]
    want = rms_norm_reference(x, cell.cols, cell.weight, EPS)
    for name, run in runs.items():
        if name in OTHER_FUNCTIONS:
            continue
        s.out.copy_(s.x)
        s.total.copy_(s.other)
        made = run(s)
        if name.endswith(KINDS):
            made = s.out, s.total
        y, total = made if isinstance(made, tuple) else (made, None)
        is_ours = name.startswith("ours")
        most = MOST_ULP["ours" if is_ours else cell.dtype]
        worst = ulp_distance(y[:64], want).max().item()
        assert worst <= most, f"{name}: {worst} ulp from the reference"
        if mode == "fused":
            worst = ulp_distance(total[:64], x).max().item()
            assert worst <= (0 if is_ours else 1), f"{name}: {worst} ulp from the sum"


def kind_of(name):
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def rivals(us, kind):
    """Name and time of those that do what ours of this kind does, in the same way."""
    hidden = "ours", *OTHER_FUNCTIONS
    return {n: t for n, t in us.items() if kind_of(n) == kind and not n.startswith(hidden)}


def show(mode, dtype, shape, state, size, us):
    speed = PASSES[mode] * size / us["ours"] / 1e3
    others = "".join(
        f"  {name} {time:.1f} ({time / us['ours' + kind_of(name)]:.2f}x)"
        for name, time in us.items()
        if name != "ours"
    )
    ours = f"ours {us['ours']:9.2f} us, {speed:6.1f} GB/s, {us['ours'] / us['floor']:.2f}x floor"
    print(f"{mode:8} {dtype} {shape:>10} {state:4}  {ours} |{others}", flush=True)


def table(cells, column_of):
    """Markdown: a row for each use and state, the geometric mean of each column's ratios."""
    names = list(dict.fromkeys(name for cell in cells for name in column_of(cell)))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in dict.fromkeys((cell.use, cell.state) for cell in cells):
        columns = [column_of(cell) for cell in cells if (cell.use, cell.state) == row]
        means = []
        for name in names:
            found = [column[name] for column in columns if name in column]
            means.append(f"{statistics.geometric_mean(found):.2f}" if found else "")
        lines.append(f"| {', '.join(row)} | {' | '.join(means)} |")
    return lines


class Compared(NamedTuple):
    """A cell, of what ours and others do in the same way."""

    use: str
    state: str
    dtype: str
    threads: int
    shape: str
    ratios: dict  # their times over ours
    floor: float  # ours over the floor


def compared(results):
    for cell in results:
        us = cell["us"]
        for kind in sorted({kind_of(name) for name in us}):
            if others := rivals(us, kind):
                ours = us["ours" + kind]
                ratios = {name.removesuffix(kind): time / ours for name, time in others.items()}
                where = (cell[name] for name in ("state", "dtype", "threads", "shape"))
                use = cell["mode"] + (kind or " new")
                yield Compared(use, *where, ratios, ours / us["floor"])


def summary(results):
    """Markdown: their times over ours, and each cell where ours is behind."""
    cells = sorted(compared(results), key=lambda cell: cell.use)
    lines = ["The time of the fastest other one, ours = 1, geometric means:", ""]
    lines += table(
        cells, lambda cell: {f"{cell.dtype} {cell.threads} T": min(cell.ratios.values())}
    )
    lines += ["", "Of each one; and ours beside the floor, floor = 1:", ""]
    lines += table(cells, lambda cell: {**cell.ratios, "ours / floor": cell.floor})
    behind = {}
    for cell in cells:
        best = min(cell.ratios, key=cell.ratios.get)
        if cell.ratios[best] < 0.97:
            where = f"{cell.use} {cell.dtype} {cell.shape}, {cell.threads} T, {cell.state}"
            behind[f"- {cell.ratios[best]:.2f} {best}: {where}"] = cell.ratios[best]
    lines += ["", f"Behind by more than 3 %: {len(behind)} of {len(cells)} cells.", ""]
    lines += sorted(behind, key=behind.get)
    return "\n".join(lines).rstrip()


def chart_by_state(results, file, title):
    """A line for each use and state, on it a dot for each cell and other library."""
    plt = pyplot()
    cells = [cell for cell in compared(results) if cell.use != "fused new"]  # torch's alone
    lines = sorted(
        {(cell.use, cell.state) for cell in cells},
        key=lambda line: (line[0], STATES.index(line[1])),
    )
    names = list(dict.fromkeys(name for cell in cells for name in cell.ratios))
    fig, axis = plt.subplots(figsize=(9, 1.4 + 0.5 * len(lines)))
    for number, name in enumerate(names):
        points = []
        for at, line in enumerate(lines):
            ratios = [
                c.ratios[name] for c in cells if (c.use, c.state) == line and name in c.ratios
            ]
            # Each library has a track of its own, in which dots spread.
            track = at - 0.35 + 0.7 * number / max(len(names) - 1, 1)
            points += [(ratio, track + 0.03 * (i % 3 - 1)) for i, ratio in enumerate(ratios)]
        axis.plot(*zip(*points, strict=True), "o", markersize=3, alpha=0.6, label=name)
    ratio_axis(axis)
    axis.set_yticks(range(len(lines)), [", ".join(line) for line in lines], fontsize=9)
    axis.invert_yaxis()
    axis.set_title(f"{title}: time, ours = 1; a dot is a cell", fontsize=10)
    fig.legend(fontsize=9, loc="lower center", ncols=len(names), frameon=False)
    fig.tight_layout(rect=(0, 0.4 / fig.get_figheight(), 1, 1))
    fig.savefig(file, dpi=90)


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
    parser.add_argument("--states", default="warm,cold", help="warm, l2, cold")
    parser.add_argument("--vllm", metavar="FILE", help="vLLM's kernels for the CPU")
    parser.add_argument("--sglang", metavar="FILE", help="SGLang's")
    parser.add_argument("--json")
    parser.add_argument("--md", metavar="FILE", help="the table that is printed last")
    parser.add_argument("--png", help="a chart; needs matplotlib")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="a JSON to make --png and --md from; measures nothing",
    )
    args = parser.parse_args()
    if args.source:
        with open(args.source) as file:
            saved = json.load(file)
        return report(saved["results"], saved["isa"], args)
    results, pools, absent = [], Pools(), {}
    files = {"vLLM": args.vllm, "SGLang": args.sglang}
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(
            f"torch {torch.__version__}, {rmsnorm_cuda._C.isa()}, {threads} thread(s); us a call, "
            "median; x: times ours"
        )
        for dtype, shape, state in itertools.product(
            args.dtypes.split(","), args.shapes.split(","), args.states.split(",")
        ):
            cell = Cell(pools, *map(int, shape.split("x")), *DTYPES[dtype], state)
            if state == "l2" and len(cell.sets) == 1:
                continue  # as warm: one set is as large
            for mode in args.modes.split(","):
                runs = getattr(cell, mode)(() if args.no_compile else FORMULAS)
                if dtype in ("fp32", "bf16", "fp16"):
                    runs |= runs_of_peers(cell, mode, files, absent.setdefault)
                if mode in ("forward", "fused"):
                    verify(cell, mode, runs)
                us = measure(runs, cell.sets, args.seconds)
                show(mode, dtype, shape, state, cell.bytes, us)
                where = {"mode": mode, "dtype": dtype, "shape": shape, "state": state}
                results.append(where | {"threads": threads, "us": us})
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    print(summary(results))
    report(results, rmsnorm_cuda._C.isa(), args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(machine() | {"results": results}, file, indent=1)


def report(results, isa, args):
    if args.md:
        Path(args.md).write_text(summary(results) + "\n")
    if args.png and len({cell.get("state") for cell in results}) > 1:
        chart_by_state(results, args.png, f"CPU, {isa}")
    elif args.png:
        chart(results, args.png, f"CPU, {isa}", hidden=("floor", "empty_like"))


if __name__ == "__main__":
    main()
