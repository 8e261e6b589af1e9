"""What the benchmarks of one op beside its steps share: the command, the loop, the tables."""

import argparse
import json
import statistics
from pathlib import Path

import torch

import rmsnorm_cuda
from benchmarks.common import measure
from rmsnorm_cuda.bench.machine import machine


def options_of(doc):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--modes", default="forward,training")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender in a cell")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--md", metavar="FILE", help="the table that is printed last")
    parser.add_argument("--from", dest="source", metavar="FILE", help="a JSON; measures nothing")
    return parser


def main(parser, cells):
    """cells(args) yields ({what names it}, a cell, {name: run of others}). A cell has `sets` of
    buffers, verify(runs) and, of each mode, a method that takes whether to compile and gives runs
    of a set.
    """
    args = parser.parse_args()
    if args.source:
        results = json.loads(Path(args.source).read_text())["results"]
    else:
        results = [
            result
            for threads in args.threads.split(",")
            for result in measured(args, int(threads), cells)
        ]
        print(f"rmsnorm_cuda {rmsnorm_cuda.__version__}, {rmsnorm_cuda._C.isa()}")
    print(summary(results))
    if args.md:
        Path(args.md).write_text(summary(results) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(machine() | {"results": results}, indent=1))


def measured(args, threads, cells):
    torch.set_num_threads(threads)
    for where, cell, others in cells(args):
        for mode in args.modes.split(","):
            runs = getattr(cell, mode)(not args.no_compile)
            if mode == "forward":
                runs |= others
                cell.verify(runs)
            us = measure(runs, cell.sets, args.seconds)
            shown = ", ".join(f"{name} {t:.4g}" for name, t in us.items())
            print(f"{mode} {label(where)}, {threads} threads: {shown}", flush=True)
            yield {"mode": mode} | where | {"threads": threads, "us": us}


def label(cell):
    """What names a cell in a table: what is told of it beside its mode and its times."""
    threads = f", {cell['threads']} threads" if cell.get("threads", 1) > 1 else ""
    parts = [v for name, v in cell.items() if name not in ("mode", "threads", "us", "dtype")]
    return " ".join(map(str, (*parts, cell["dtype"]))) + threads


def summary(results):
    """Markdown: medians, and the geometric means of times over ours."""
    lines = []
    for mode in dict.fromkeys(cell["mode"] for cell in results):
        cells = [cell for cell in results if cell["mode"] == mode]
        names = list(dict.fromkeys(name for cell in cells for name in cell["us"]))
        told = [n for n in cells[0] if n not in ("mode", "threads", "us", "dtype")]
        lines += [f"{mode}, us:", "", f"| {', '.join(told)} | {' | '.join(names)} |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for cell in cells:
            row = [f"{cell['us'][name]:.4g}" if name in cell["us"] else "" for name in names]
            lines.append(f"| {label(cell)} | {' | '.join(row)} |")
        means = []
        for name in names[1:]:
            ratios = [cell["us"][name] / cell["us"]["ours"] for cell in cells if name in cell["us"]]
            means.append(f"{name} {statistics.geometric_mean(ratios):.2f}")
        lines += ["", f"Times over ours, geometric means: {', '.join(means)}.", ""]
    return "\n".join(lines).rstrip()
