"""LayerNorm or RMSNorm: "the same quality, 5-15 % faster"? Measured, op by op and in training.

    python benchmarks/layernorm_vs_rmsnorm ops   [--device cuda] [--dtypes fp32,bf16]
                                                 [--shapes 32x4096,...] [--no-compile]
    python benchmarks/layernorm_vs_rmsnorm train [--placement pre,post] [--seeds 0,1,2,3]
                                                 [--steps 200] [--folder FOLDER]
    both: [--json FILE] [--png FILE] [--md FILE]; --from FILE draws and writes these again from a
    JSON, and measures nothing

What counts is LayerNorm's time over RMSNorm's: above 1, RMSNorm is faster. README.md has the
results.
"""

import argparse
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import torch

from benchmarks.layernorm_vs_rmsnorm.ops import draw_ops, measure_ops, write_ops
from benchmarks.layernorm_vs_rmsnorm.train import measure_train, write_json
from benchmarks.layernorm_vs_rmsnorm.train_report import draw_train, write_train
from rmsnorm_cuda.bench.machine import machine


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ops, train = (
        commands.add_parser("ops", help="op by op"),
        commands.add_parser("train", help="end to end"),
    )
    for command in (ops, train):
        command.add_argument("--device", default="cpu")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--json")
        command.add_argument(
            "--png", help="charts, of train two: NAME-loss.png and NAME-steps.png; needs matplotlib"
        )
        command.add_argument("--md", help="a table, and sentences made from its numbers")
        command.add_argument(
            "--from", dest="source", metavar="FILE", help="a JSON to make --png and --md from again"
        )
    ops.add_argument("--dtypes", default="fp32,bf16")
    ops.add_argument("--shapes", default="1x4096,64x1024,2048x128,2048x768,2048x4096,8192x128")
    ops.add_argument("--seconds", type=float, default=1.0, help="for each contender in a cell")
    ops.add_argument("--calls", type=int, default=50, help="on CUDA, instead")
    ops.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out, which takes most of the time",
    )
    train.add_argument("--placement", default="pre,post")
    train.add_argument("--seeds", default="0,1,2,3")
    train.add_argument("--steps", type=int, default=200)
    train.add_argument("--width", type=int, default=128)
    train.add_argument("--layers", type=int, default=3)
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--context", type=int, default=128)
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--rate", type=float, default=1e-3, help="of learning, at its highest")
    train.add_argument("--validate", type=int, default=65536, help="bytes of the final validation")
    train.add_argument("--evaluate-every", type=int, default=20)
    train.add_argument("--checkpoint-every", type=int, default=50)
    train.add_argument("--rounds", type=int, default=40, help="of timed steps")
    train.add_argument("--compile", action="store_true", help="time steps under torch.compile too")
    train.add_argument(
        "--folder",
        type=Path,
        default=Path("build/layernorm-vs-rmsnorm"),
        help="of finished runs and checkpoints",
    )
    return parser.parse_args(argv)


def wrapped(line):
    """A line of Markdown in 100 columns; a row of a table stays one. A command goes on by
    backslashes.
    """
    if len(line) <= 101 or line.startswith("|"):
        return line
    indent = re.match(r"(- | *)", line)[0]
    is_command = indent.startswith("    ")
    more = indent + "  " if is_command else " " * len(indent)
    width = 98 if is_command else 100
    parts = textwrap.wrap(
        line, width, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
    return (" \\\n" if is_command else "\n").join(parts) + "\n"


def main(argv=None):
    args = arguments(argv)
    ops = args.command == "ops"
    measure, write, draw = (
        (measure_ops, write_ops, draw_ops) if ops else (measure_train, write_train, draw_train)
    )
    if args.source:
        report = json.loads(Path(args.source).read_text())
    else:
        torch.set_num_threads(args.threads)
        line = "python benchmarks/layernorm_vs_rmsnorm " + shlex.join(
            sys.argv[1:] if argv is None else argv
        )
        report = {"command": line, "machine": machine(args.device)} | measure(args)
    markdown = "".join(map(wrapped, write(report).splitlines(keepends=True)))
    if args.json:
        write_json(args.json, report)
    if args.png:
        draw(report, args.png)
    if args.md:
        Path(args.md).write_text(markdown)
    else:
        print(markdown, end="")


if __name__ == "__main__":
    main()
