"""`python -m rmsnorm_cuda bench`: the check of values, then each cell's times; a table and a JSON.

The run ends in --minutes. A part of them is torch.compile's, which takes seconds a cell; the cells
share the rest. A timer stops what does not return by then, and what was left out is named.
"""

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import textwrap
import threading
import time
from pathlib import Path

import torch

from rmsnorm_cuda import _C
from rmsnorm_cuda.bench import cells
from rmsnorm_cuda.bench.buffers import Pools, rotation
from rmsnorm_cuda.bench.cells import COMPILED, Wrong
from rmsnorm_cuda.bench.machine import details
from rmsnorm_cuda.bench.timing import event_samples, flush_of, samples

SCHEMA = 1
COMPILE_SHARE = 0.4  # of the time; a first compilation took 9 s of a core, further ones 1 to 2
LAST = 0.3  # seconds for the table and the JSON
MOST_SECONDS = 3.0  # of a contender in a cell: thousands of calls, or some dozens of the slowest
CALLS = 200  # of a contender on a GPU
COLUMNS = {"F.rms_norm": "F.rms_norm", COMPILED: "compiled", "llama": "formula"}
FIELDS = {  # of a report; checked where one is read
    "schema": int,
    "made": str,
    "minutes": float,
    "seconds": float,
    "machine": dict,
    "rotated_bytes": int,
    "self_check": list,
    "cells": list,
    "left_out": dict,
}

clock = time.perf_counter


class OutOfTime(BaseException):
    """Not an Exception: what catches those would go on."""


@contextlib.contextmanager
def stop_at(deadline):
    """Raises OutOfTime in the block once `clock` is there; not in threads, which get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(deadline - clock(), 1e-3))
    outer = outer and clock() + outer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(outer - clock(), 1e-3) if outer else 0)
        signal.signal(signal.SIGALRM, handler)


class Progress:
    """Lines on stderr; on a terminal one, which is written anew."""

    def __init__(self, stream):
        self.stream, self.rewrites = stream, stream.isatty()

    def say(self, text):
        print(
            f"\r\x1b[K{text[:99]}" if self.rewrites else text,
            file=self.stream,
            flush=True,
            end="" if self.rewrites else "\n",
        )

    def close(self):
        if self.rewrites:
            print("\r\x1b[K", file=self.stream, flush=True, end="")


def reason_of(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


class Compiling:
    """The seconds that are left to torch.compile."""

    def __init__(self, seconds):
        self.seconds = self.left = seconds
        self.last = 0.0

    def reserve(self):
        """What the cells that follow may still take for it."""
        return self.left if self.left > self.last else 0.0

    def run(self, make):
        """(what make() gives, None), or (None, why it gives nothing)."""
        if not self.reserve():
            return None, "no time was left for it; a larger --minutes gives it more"
        began = clock()
        try:
            with stop_at(began + self.left):
                return make(), None
        except OutOfTime:
            return None, f"it took longer than the {self.seconds:.0f} s that are its part"
        except Exception as error:  # no compiler, no Triton, a wrong result
            return None, reason_of(error)
        finally:
            self.last = clock() - began
            self.left -= self.last


def prepare(cell, compiling):
    """({name: run} of what is right, {name: why it is left out}).

    Raises:
        Wrong: ours is.
    """
    runs, left_out = cell.ours(), {}
    for name, run in runs.items():
        cell.verify(name, run)
    for name, run in cell.beside().items():
        try:
            cell.verify(name, run)
            runs[name] = run
        except Exception as error:  # of others: a dtype that they lack here, say
            left_out[name] = reason_of(error)

    def compiled():
        # In processes of its own it would go on after it was stopped, beside what is timed.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        run = cell.compiled()
        cell.verify(COMPILED, run)
        return run

    runs[COMPILED], reason = compiling.run(compiled)
    if reason:
        del runs[COMPILED]
        left_out[COMPILED] = reason
    return runs, left_out


def timer(device):
    """A function of runs, sets, seconds for each and a deadline, to {name: us} and, on a GPU, the
    host's."""
    if device == "cpu":
        return lambda runs, sets, seconds, deadline: (
            samples(runs, sets, seconds, deadline=deadline),
            {},
        )
    flush = flush_of(device)

    def on_gpu(runs, sets, seconds, deadline):
        end = min(deadline, clock() + seconds * len(runs))
        return event_samples(runs, sets[0], flush, CALLS, deadline=end)

    return on_gpu


def figures(times):
    return {
        name: {
            "min": round(min(of), 3),
            "median": round(statistics.median(of), 3),
            "count": len(of),
        }
        for name, of in times.items()
    }


def timed(spec, pools, compiling, measure, seconds, end):
    """A cell of the report; `seconds` for all of it but torch.compile."""
    began, before = clock(), compiling.left
    cell = cells.MODES[spec.mode](spec, pools)
    runs, left_out = prepare(cell, compiling)
    took = clock() - began - (before - compiling.left)
    seconds = min(max(seconds - took, seconds / 4) / len(runs), MOST_SECONDS)
    us, host = measure(runs, cell.sets, seconds, end)
    return {
        "mode": spec.mode,
        "dtype": spec.dtype,
        "shape": spec.shape,
        "bytes": cell.bytes,
        "cold": cell.is_cold,
        "us": figures(us),
        "left_out": left_out,
    } | ({"host_us": figures(host)} if host else {})


def measured(specs, device, began, minutes, progress):
    """(cells of the report, {spec: why it is not among them})."""
    pools, measure = Pools(device), timer(device)
    compiling = Compiling(COMPILE_SHARE * 60 * minutes)
    hard = began + 60 * minutes - LAST
    end = hard - 0.02 * 60 * minutes
    results, left_out = [], {}
    for i, spec in enumerate(specs):
        now = clock()
        if now >= end:
            left_out[str(spec)] = "not begun"
            continue
        progress.say(f"[{i + 1}/{len(specs)}] {spec}; {now - began:.0f} of {60 * minutes:.0f} s")
        seconds = max(end - now - compiling.reserve(), 0) / (len(specs) - i)
        if i and spec.dtype != specs[i - 1].dtype:
            pools = Pools(device)  # the memory of the other dtype goes
        try:
            with stop_at(hard):
                results.append(timed(spec, pools, compiling, measure, seconds, end))
        except OutOfTime:
            left_out[str(spec)] = "not finished"
    progress.close()
    return results, left_out


# ---------------------------------------------------------------- what is printed


def number(us):
    if us >= 999_999.5:
        return f"{us / 1e6:.2f} s"
    return f"{us:,.0f}" if us >= 999.5 else f"{us:.3g}"


def multiple(ratio):
    return (
        f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.3g}x" if ratio >= 9.95 else f"{ratio:.2f}x"
    )


def row(cell, ours):
    us = {name: of["median"] for name, of in cell["us"].items()}
    text = f"{cell['shape']} {cell['dtype']}{ours.removeprefix('ours')}"
    text = f"{text:24}{number(us[ours]):>9}{number(cell['us'][ours]['min']):>9}"
    for name in COLUMNS:
        beside = "-"
        if name in us:
            beside = f"{number(us[name])} {multiple(us[name] / us[ours]):>6}"
        text += f"{beside:>16}"
    return f"{text}{us['copy'] / us[ours]:>9.0%}" if "copy" in us else text + f"{'-':>9}"


def table(results):
    """Lines: a block for each op, a row for each cell."""
    for mode, title in cells.TITLES.items():
        here = [cell for cell in results if cell["mode"] == mode]
        if here:
            yield ""
            yield f"{title}:"
            names = "".join(f"{name:>16}" for name in COLUMNS.values())
            yield f"{'':24}{'ours':>9}{'fastest':>9}{names}{'of copy':>9}"
        for cell in here:
            yield from (row(cell, name) for name in cell["us"] if name.startswith("ours"))


def reasons(report):
    """Lines: what was left out, and why."""
    why = {}
    for cell in report["cells"]:
        for name, reason in cell["left_out"].items():
            why.setdefault((COLUMNS.get(name, name), reason), []).append(cell)
    for (name, reason), where in why.items():
        yield f"{name} is left out of {len(where)} of {len(report['cells'])} cells: {reason}"
    for kind in dict.fromkeys(report["left_out"].values()):
        names = ", ".join(spec for spec, why in report["left_out"].items() if why == kind)
        yield f"{kind} within --minutes {report['minutes']:g}: {names}"


def name_of(machine):
    return machine.get("gpu") or f"{machine['processor']}, {machine['isa']}"


def is_busy(machine):
    """Other processes took a part of the cores that shows in the CPU's times."""
    return machine["device"] == "cpu" and (machine["load"] or 0) > max(
        1, (machine["cores"] or 1) / 8
    )


def heading(report):
    m = report["machine"]
    commit = f" ({m['commit']})" if m["commit"] else ""
    yield f"rmsnorm_cuda {m['rmsnorm_cuda']}{commit}, torch {m['torch']}, Python {m['python']}"
    yield f"{name_of(m)}; threads {m['threads']}, cores {m['cores']}"
    load = "unknown" if m["load"] is None else m["load"]
    yield f"load before it {load}, governor {m['governor'] or 'unknown'}"
    if is_busy(m):
        yield "Other processes were busy: take no figure from this run."
    counts = sum(int(n) for line in report["self_check"] for n in re.findall(r": (\d+) comp", line))
    yield f"values: {counts} comparisons with fp64 passed; so did each contender that was timed"
    yield ""
    if m["device"] == "cpu":
        yield "us a call: the median of interleaved rounds. Tensors of 1 MiB and more are cold."
    else:
        yield "us a call: the median of interleaved CUDA events. Each call finds a cold L2 cache."
    yield "Others with their multiple of ours. compiled: torch.compile of F.rms_norm and the steps"
    yield "around it; formula: that of transformers' Llama, eager. of copy: the speed of ours as a"
    yield "share of that of a copy which moves as many bytes."


def text_of(report):
    lines = [*heading(report), *table(report["cells"]), ""]
    for line in reasons(report):
        lines += textwrap.wrap(line, 99, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).rstrip()


def file_name(machine):
    """What a report is called among those of other machines."""
    what = name_of(machine)
    if machine["device"] == "cpu":
        what += f" {machine['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-") + ".json"


def problems(report):
    """What keeps JSON from being a report of this schema."""
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        return [f"it has no schema {SCHEMA}"]
    found = [
        f"{name} is not of type {kind.__name__}"
        for name, kind in FIELDS.items()
        if not isinstance(report.get(name), kind)
    ]
    return found or [
        f"{cell.get('mode')} {cell.get('shape')} has no time of ours"
        for cell in report["cells"]
        if not cell.get("us", {}).get("ours", {}).get("count")
    ]


# ---------------------------------------------------------------- the command


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("a positive number of minutes is expected")
    return value


def new_file(text):
    """Known before a minute was spent."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def add_parser(commands):
    summary = "times, beside torch's, in a minute"
    what = (
        "The self-check of values, then times: the norm, its backward, the fused add, quantized "
        "output and q/k norm with RoPE, beside eager torch, torch.compile and Llama's formula. On "
        "the GPU if there is one and the kernels for it were built, else on the CPU."
    )
    parser = commands.add_parser("bench", help=summary, description=what)
    minutes = "that it takes at most, once torch is imported (default 1)"
    parser.add_argument("--minutes", type=positive, default=1.0, metavar="M", help=minutes)
    file = "a report: the machine and each cell's figures. It holds no host name and no path"
    parser.add_argument("--json", type=new_file, metavar="FILE", help=file)


def run(check, *, minutes, file=None, specs=None, device=None, stream=None):
    """The command; the exit status.

    Args:
        check: prints the self-check; its exit status.
        minutes: that all of it takes at most.
        file: where the JSON goes.
        specs: the cells; default cells.specs().
        device: "cpu" or "cuda"; default the GPU if both torch and the kernels can use one.
        stream: for the progress; default stderr.
    """
    began, progress = clock(), Progress(stream or sys.stderr)
    if device is None:
        device = "cuda" if _C.cuda_built() and torch.cuda.is_available() else "cpu"
    progress.say("values: the self-check")
    with contextlib.redirect_stdout(io.StringIO()) as checked:
        failed = check()
    if failed:
        progress.close()
        print(checked.getvalue(), end="")
        return 1
    machine = details(device)
    try:
        results, left_out = measured(specs or cells.specs(), device, began, minutes, progress)
    except Wrong as error:
        progress.close()
        print(f"FAILED  {error}; nothing was timed after that")
        return 1
    report = {
        "schema": SCHEMA,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": float(minutes),
        "seconds": round(clock() - began, 1),
        "machine": machine,
        "rotated_bytes": rotation() if device == "cpu" else 0,
        "self_check": [s for s in checked.getvalue().splitlines() if s.startswith("self-check")],
        "cells": results,
        "left_out": left_out,
    }
    print(text_of(report))
    if file:
        Path(file).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{file} is written. benchmarks/README.md says how to share it, as")
        print(file_name(machine))
    return 0
