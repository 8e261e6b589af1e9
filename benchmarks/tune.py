"""Searches the numbers of csrc/cuda/tuning.h on the GPU that is here.

    python benchmarks/tune.py [--passes forward,add,backward,quant] [--shapes 8192x4096,...]
                              [--dtype bf16] [--minutes 5] [--json FILE] [--build-only]
                              [--dry-run]

Coordinate descent, a pass at a time: of each number the values in turn, first those that the plan
takes at run time (RMSNORM_TUNE, which builds with RMSNORM_TUNING read), then those that the kernels
are compiled with, each a library of its own in build/tune (made there before, with nvcc, if it is
not up to date). A value is kept if it is faster by 1 %, as a geometric mean over the shapes of the
medians, measured interleaved with the best so far. Calls come from CUDA graphs of 20, over buffers
of more than 150 MB, so that none finds its data in the L2 cache. Before it is timed, every variant
has to give the bits of the usual build: with other slices or clusters within one unit, the
weight's gradient, whose sums go by the grid, within 2^-7 of its largest element.

--dry-run goes through all of it, for a simulated GPU: single calls, whose times mean nothing.
"""

import argparse
import concurrent.futures
import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "native"))

import cuda_check  # noqa: E402

BUILD = ROOT / "build" / "tune"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPES = {"fp32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
SHAPES = "32768x128,16384x1024,8192x4096,8192x8192,4096x16384,64x4096"
BYTES, CALLS = 150 << 20, 20  # of the buffers that a graph's calls go through

# What the plan takes at run time, in the order of what the model says that it is worth.
NUMBERS = {
    "forward": {
        "forward_waves": (1, 2, 4, 8, 16),
        "max_resident": (2, 3, 4, 6, 32),
        "forward_block_threads": (64, 128),
        "slice_bytes": (32 << 10, 48 << 10, 64 << 10, 96 << 10),
        "max_cluster": (1, 2, 4, 8),
    },
    "backward": {
        "backward_min_rows": (1, 2, 4, 8),
        "max_resident": (1, 2, 3, 32),
        "backward_block_threads": (128, 256),
        "slice_bytes": (32 << 10, 48 << 10, 64 << 10, 96 << 10),
        "max_cluster": (1, 2, 4, 8),
    },
}
# A row is summed in another order with these: a near-tie may round to the next number.
TREE = {"slice_bytes", "max_cluster"}
# What is compiled: edits of files in csrc/cuda.
VARIANTS = {
    "usual": [],
    "forward of 64 registers": [("tuning.h", '"forward_rows", 256, 80', '"forward_rows", 256, 64')],
    "forward of 96": [("tuning.h", '"forward_rows", 256, 80', '"forward_rows", 256, 96')],
    "quant of 96": [("tuning.h", '"quant_rows", 256, 128, 128', '"quant_rows", 256, 96, 128')],
    "backward of 64": [("tuning.h", '"backward_rows", 256, 80', '"backward_rows", 256, 64')],
    "backward of 96": [("tuning.h", '"backward_rows", 256, 80', '"backward_rows", 256, 96')],
    "stores first to be evicted": [("vec.cuh", "__stwb(to", "__stcs(to")],
    "loads first to be evicted": [
        ("vec.cuh", "from[i]); });\n  return c;", "__ldcs(from + i)); });\n  return c;")
    ],
}


def build(name, dtype, arch):
    """The library of a variant, with the kernels of one dtype."""
    folder = BUILD / name.replace(" ", "_")
    library = folder / f"{dtype}.so"
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".cu", ".cuh")]
    entry = ROOT / "tests/native/cuda_entry.cu"
    if library.exists() and library.stat().st_mtime > max(
        p.stat().st_mtime for p in [*sources, entry]
    ):
        return library
    for path in (*sources, entry):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        for file, old, new in VARIANTS[name]:
            if path == ROOT / "csrc" / "cuda" / file:
                assert old in text, f"{file} has no {old!r}"
                text = text.replace(old, new)
        # Of the dtypes of x only this one.
        only = f"[](const auto& f) {{ return f({TYPES[dtype]}()); }}([&](auto x) {{"
        text = text.replace("with_type(p.x_dtype, [&](auto x) {", only)
        copy.write_text(text)
    cuda_check.build(library, arch, csrc=folder / "csrc", options=["-DRMSNORM_TUNING"])
    return library


class Calls:
    """One shape of one pass: buffers, and the call on each by any library."""

    def __init__(self, which, rows, cols, dtype, dry_run):
        self.which, size = which, rows * cols * dtype.itemsize
        count = 1 if dry_run else min(CALLS, 1 + BYTES // size)

        def there(*shape):
            if not dry_run:
                return torch.randn(*shape, dtype=dtype, device="cuda")
            return torch.randn(*shape, dtype=dtype).cuda()  # a simulator has no kernels of torch

        self.weight, self.sets = there(cols), []
        for _ in range(count):
            tensors = {"x": there(rows, cols)}
            if which == "backward":
                tensors |= {"dy": there(rows, cols), "dx": torch.empty_like(tensors["x"])}
                tensors["dweight"] = torch.empty_like(self.weight)
                # About 1: of rows that the fast way takes, and no more is asked here.
                tensors["rstd"] = torch.ones(rows).cuda()
            else:
                tensors["y"] = torch.empty_like(tensors["x"])
            if which == "add":
                tensors |= {"input": there(rows, cols), "residual": there(rows, cols)}
            if which == "quant":
                tensors["codes"] = torch.empty(rows, cols, dtype=torch.uint8).cuda()
                tensors["scale"] = torch.empty(rows).cuda()
            self.sets.append(tensors)
        self.rows, self.cols, self.dtype = rows, cols, list(DTYPES.values()).index(dtype)

    def parameters(self, library, t):
        """The struct of rmsnorm.h, the function that takes it, and what it points to beside t."""

        def at(name):
            return t[name].data_ptr() if name in t else None

        def rows_of(name):
            dense = (ctypes.c_int64 * 4)(self.rows), (ctypes.c_int64 * 4)(self.cols)
            return cuda_check.Rows(1, *dense) if name in t else cuda_check.Rows()

        struct = cuda_check.STRUCTS[
            "RmsNormBackward" if self.which == "backward" else "RmsNormForward"
        ]
        p = struct(x=at("x"), weight=self.weight.data_ptr(), rstd=at("rstd"), x_rows=rows_of("x"))
        p.rows, p.cols, p.eps = self.rows, self.cols, 1e-6
        p.x_dtype = p.w_dtype = self.dtype
        if self.which == "backward":
            p.dy, p.dx, p.dweight, p.dy_dtype = at("dy"), at("dx"), at("dweight"), self.dtype
            p.dy_rows = rows_of("dy")
            library.k.workspace.restype = ctypes.c_int64
            needed = library.k.workspace(ctypes.byref(p))
            workspace = torch.empty(max(needed, 1), dtype=torch.uint8).cuda()
            p.workspace = workspace.data_ptr()
            return p, library.k.backward, workspace
        p.y_dtype = self.dtype
        if self.which != "quant":
            p.y, p.y_rows = at("y"), rows_of("y")
        else:
            p.quant.data, p.quant.scale = at("codes"), at("scale")
            p.quant.block, p.quant.row_stride, p.quant.block_stride = self.cols, 1, 1
            p.quant.bound, p.quant.least = math.inf, 1 / (512 * 448)
        if self.which == "add":
            p.addends.input, p.addends.residual = at("input"), at("residual")
            p.addends.input_rows, p.addends.residual_rows = rows_of("input"), rows_of("residual")
            p.addends.input_dtype = self.dtype
        return p, library.k.forward, None

    def runs(self, library, numbers):
        """A function that makes one call on each set of buffers, laid out by these numbers."""
        os.environ["RMSNORM_TUNE"] = ",".join(f"{k}={v}" for k, v in numbers.items())
        prepared = [self.parameters(library, t) for t in self.sets]

        def run(count):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for p, function, _ in itertools.islice(itertools.cycle(prepared), count):
                library.check(function(ctypes.byref(p), stream))

        return run

    def results(self, library, numbers):
        """Of the first set, to be compared."""
        t = self.sets[0]
        names = {"backward": ("dx", "dweight"), "quant": ("codes", "scale")}.get(self.which, ("y",))
        for name in names:
            t[name].copy_(torch.full_like(t[name], 77, device="cpu"))
        self.runs(library, numbers)(1)
        return {name: t[name].cpu() for name in names}


def check(got, want, other_tree):
    for name, value in got.items():
        if name == "dweight":
            error = (value.double() - want[name].double()).abs().max()
            assert error <= 2**-7 * want[name].double().abs().max(), f"{name} differs"
        else:
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.itemsize]
            apart = (value.view(bits).long() - want[name].view(bits).long()).abs().max()
            assert apart <= other_tree, f"{name} differs by {apart} units"


def times(runs, dry_run, rounds=15):
    """Median microseconds of a call of each, interleaved."""
    samples = {name: [] for name in runs}
    graphs = {}
    for name, run in runs.items():
        run(1)
        if not dry_run:
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                run(CALLS)
    for _ in range(2 if dry_run else rounds):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(1) if dry_run else graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / (1 if dry_run else CALLS))
    return {name: statistics.median(s) for name, s in samples.items()}


class Search:
    def __init__(self, which, cells, libraries, deadline, dry_run):
        self.which, self.cells, self.libraries = which, cells, libraries
        self.deadline, self.dry_run, self.trials = deadline, dry_run, []
        self.best = "usual", {}
        self.wants = [c.results(libraries["usual"], {}) for c in cells]

    def try_out(self, library, numbers):
        """Is it faster than the best? It is the best from then on."""
        if time.monotonic() > self.deadline:
            return
        ratios, us = [], {}
        try:
            for cell, want in zip(self.cells, self.wants, strict=True):
                check(cell.results(self.libraries[library], numbers), want, bool(TREE & {*numbers}))
                pair = {"best": self.best, "this": (library, numbers)}
                runs = {k: cell.runs(self.libraries[n], m) for k, (n, m) in pair.items()}
                now = times(runs, self.dry_run)
                ratios.append(now["this"] / max(now["best"], 1e-9))
                us[f"{cell.rows}x{cell.cols}"] = now
        except (RuntimeError, AssertionError) as error:  # it asks for too much, or is wrong
            self.trials.append({"library": library, "numbers": numbers, "error": str(error)})
            print(f"{self.which}: {library} {numbers}: LEFT OUT: {error}", flush=True)
            return
        ratio = math.exp(statistics.fmean(math.log(max(r, 1e-9)) for r in ratios))
        kept = ratio < 0.99
        self.trials.append(
            {"library": library, "numbers": numbers, "ratio": ratio, "kept": kept, "us": us}
        )
        if kept:
            self.best = library, numbers
        mark = " <- kept" if kept else ""
        print(f"{self.which}: {library} {numbers}: {ratio:.3f} of the best{mark}", flush=True)

    def run(self):
        kind = "backward" if self.which == "backward" else "forward"
        for name, values in NUMBERS[kind].items():
            for value in values:
                library, numbers = self.best
                if numbers.get(name) != value:
                    self.try_out(library, numbers | {name: value})
        for library in self.libraries:
            if library != self.best[0]:
                self.try_out(library, self.best[1])
        library, numbers = self.best
        print(f"{self.which}: best is {library} {numbers}", flush=True)
        return {"best": {"library": library, "numbers": numbers}, "trials": self.trials}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", default="forward,add,backward,quant")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--arch", help="of the machine code, 9.0; default: of the GPU")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="usual comes first")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--json")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    names = args.variants.split(",")
    arch = args.arch
    if not arch and not args.dry_run:  # a simulator wants PTX
        arch = "{}.{}".format(*torch.cuda.get_device_capability())
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(lambda name: build(name, args.dtype, arch), names))
    if args.build_only:
        return
    libraries = {name: cuda_check.Gpu(path) for name, path in zip(names, paths, strict=True)}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"cuda": torch.version.cuda, "commit": commit.stdout.strip(), "dtype": args.dtype}
    report["clusters"] = list(libraries[names[0]].k.device().clusters)
    began, passes = time.monotonic(), args.passes.split(",")
    for i, which in enumerate(passes, 1):
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        cells = [Calls(which, *shape, DTYPES[args.dtype], args.dry_run) for shape in shapes]
        deadline = began + 60 * args.minutes * i / len(passes)
        report[which] = Search(which, cells, libraries, deadline, args.dry_run).run()
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
