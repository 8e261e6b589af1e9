"""Op by op: LayerNorm (weight and bias) and RMSNorm in eager torch, under torch.compile, and ours.

Outputs and gradients are verified against fp64, then timed interleaved in one process on random
data, which rotates through buffers once it is large; minimum and median.
"""

import statistics

import torch
import torch.nn.functional as F

from benchmarks.common import pyplot, size_of
from benchmarks.layernorm_vs_rmsnorm.report import CLAIM, describe, title
from rmsnorm_cuda.bench.buffers import ROTATE_BYTES
from rmsnorm_cuda.bench.contenders import DTYPES, EPS, norms, training_step
from rmsnorm_cuda.bench.timing import event_samples, flush_of, samples

TITLES = {"forward": "forward", "training": "forward + backward"}
PAIRS = {  # LayerNorm beside RMSNorm
    "eager torch": ("F.layer_norm", "F.rms_norm"),
    "torch.compile": ("compile(F.layer_norm)", "compile(F.rms_norm)"),
    "ours": ("F.layer_norm", "ours"),
}
# Of the largest value, for outputs and the gradient of x.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def contenders(mode, weight, bias, gradients, compiled):
    """Name: a run of x, forward or with backward; `gradients` maps the id of an x to its dy."""
    if mode == "training":
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    runs = norms(weight.shape, weight, bias, ["F.rms_norm"] if compiled else [])
    if compiled:
        layer_norm = torch.compile(
            lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS), dynamic=False
        )
        runs["compile(F.layer_norm)"] = (lambda x: layer_norm(x, weight, bias), [weight, bias])
    return {
        name: training_step(*run, gradients) if mode == "training" else run[0]
        for name, run in runs.items()
    }


def verify(runs, mode, x, weight, bias, gradients):
    """Asserts that each run is right, against eager torch in fp64.

    Returns the largest error of each result, as a part of its largest value.
    That of the weight's gradient is only reported: torch's LayerNorm sums it in 16 bits on the CPU,
    and is percents off.
    """
    exact = x.double()
    wanted = contenders(
        mode, weight.double(), bias.double(), {id(exact): gradients[id(x)].double()}, False
    )
    errors = {}
    for name, run in runs.items():
        got, want = run(x), wanted["F.layer_norm" if "layer_norm" in name else "F.rms_norm"](exact)
        pairs = zip((got,), (want,)) if mode == "forward" else zip(got, want, strict=True)
        errors[name] = [
            ((result.double() - right).abs().max() / right.abs().max()).item()
            for result, right in pairs
        ]
        assert errors[name][0] <= TOLERANCE[x.dtype], (
            f"{name}, {mode}, {x.dtype}: {errors[name][0]:.2g} of the largest value off"
        )
    return errors


def time_op(shape, dtype, mode, args):
    """Minimum and median microseconds of each contender, and the errors of its results."""
    rows, cols = map(int, shape.split("x"))
    x_dtype, weight_dtype = DTYPES[dtype]
    one = rows * cols * x_dtype.itemsize
    # On CUDA what flushes the cache stands between the calls.
    copies = (
        1 if one < 1 << 20 or args.device != "cpu" else max(2, min(16, ROTATE_BYTES // (2 * one)))
    )
    xs, dys = (
        [torch.randn(rows, cols).to(x_dtype).to(args.device) for _ in range(copies)]
        for _ in range(2)
    )
    weight, bias = (torch.randn(cols).to(weight_dtype).to(args.device) for _ in range(2))
    gradients = dict(zip(map(id, xs), dys, strict=True))
    runs = contenders(mode, weight, bias, gradients, not args.no_compile)
    errors = verify(runs, mode, xs[0], weight, bias, gradients)
    if args.device == "cpu":
        times = samples(runs, xs, args.seconds)
    else:
        times, _ = event_samples(runs, xs[0], flush_of(args.device), args.calls)
    return {
        name: {"min": min(of_name), "median": statistics.median(of_name)}
        for name, of_name in times.items()
    }, errors


def measure_ops(args):
    results = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            for mode in TITLES:
                us, errors = time_op(shape, dtype, mode, args)
                results.append(
                    {"mode": mode, "dtype": dtype, "shape": shape, "us": us, "errors": errors}
                )
                pairs = ratios(us, "median").items()
                text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in pairs)
                print(f"{mode:8} {dtype} {shape:>9}  LayerNorm over RMSNorm: {text}", flush=True)
    return {"results": results}


def ratios(us, statistic):
    """LayerNorm's time over RMSNorm's, of each pair that was run."""
    return {
        name: us[of][statistic] / us[to][statistic]
        for name, (of, to) in PAIRS.items()
        if of in us and to in us
    }


def count_claim(name, cells):
    """A sentence on how a pair stands to the claim."""
    low, high = CLAIM
    below, within, above = (
        sum(map(test, cells))
        for test in (lambda r: r < low, lambda r: low <= r <= high, lambda r: r > high)
    )
    slower = sum(ratio < 1 for ratio in cells)
    return (
        f"{name}: LayerNorm takes {min(cells):.2f} to {max(cells):.2f} times as long as RMSNorm, "
        f"{statistics.geometric_mean(cells):.2f} in the geometric mean. Of {len(cells)} cells "
        f"RMSNorm is 5-15 % faster in {within}, "
        f"more than that in {above}, less in {below}, of which it is slower in {slower}."
    )


def write_ops(report):
    """The Markdown of a report on ops."""
    cells = [
        (cell, ratios(cell["us"], "median"), ratios(cell["us"], "min"))
        for cell in report["results"]
    ]
    names = [name for name in PAIRS if name in cells[0][1]]
    lines = ["# LayerNorm over RMSNorm, op by op", "", *describe(report), ""]
    lines += [
        "LayerNorm's time over RMSNorm's, of the medians; of the minima in brackets. Above 1, "
        "RMSNorm is faster; the claim "
        f"is {CLAIM[0]} to {CLAIM[1]}. Ours is beside torch's eager LayerNorm.",
        "",
        "| | | LayerNorm, us | ours, us | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for cell, medians, minima in cells:
        both = " | ".join(f"{medians[name]:.2f} ({minima[name]:.2f})" for name in names)
        us = [cell["us"][name]["median"] for name in ("F.layer_norm", "ours")]
        us = [f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in us]
        lines.append(
            f"| {cell['dtype']} {cell['shape']} | {TITLES[cell['mode']]} | {us[0]} | {us[1]} | "
            f"{both} |"
        )
    lines += [
        "",
        *("- " + count_claim(name, [medians[name] for _, medians, _ in cells]) for name in names),
    ]
    for dtype in dict.fromkeys(cell["dtype"] for cell in report["results"]):
        errors = [
            cell["errors"]
            for cell in report["results"]
            if (cell["dtype"], cell["mode"]) == (dtype, "training")
        ]
        worst = ", ".join(
            f"{name} {max(error[name][1] for error in errors):.1g}" for name in errors[0]
        )
        lines.append(
            f"- The weight's gradient in {dtype}, largest error against fp64 as a part of its "
            f"largest value: {worst}."
        )
    return "\n".join(lines) + "\n"


def draw_ops(report, file):
    plt = pyplot()
    fig, axes = plt.subplots(
        len(TITLES), 1, figsize=(max(7, len(report["results"]) * 0.6), 8), squeeze=False
    )
    for mode, axis in zip(TITLES, axes[:, 0], strict=True):
        cells = [cell for cell in report["results"] if cell["mode"] == mode]
        cells.sort(key=lambda cell: size_of(cell["shape"]))  # a shape's dtypes stand together
        values = [ratios(cell["us"], "median") for cell in cells]
        for i, name in enumerate(values[0]):
            places = [at + (i + 0.5) / len(values[0]) * 0.8 - 0.4 for at in range(len(cells))]
            # From 1, so that what is slower hangs below the line.
            heights = [value[name] - 1 for value in values]
            axis.bar(
                places,
                heights,
                0.8 / len(values[0]),
                bottom=1,
                label=f"{PAIRS[name][0]} / {PAIRS[name][1]}",
            )
            for place, value in zip(places, values, strict=True):
                offset, side = (2, "bottom") if value[name] >= 1 else (-2, "top")
                style = {"va": side, "ha": "center", "fontsize": 6, "rotation": 90}
                at = {"xy": (place, value[name]), "xytext": (0, offset)}
                axis.annotate(f"{value[name]:.2f}", **at, textcoords="offset points", **style)
        axis.axhspan(*CLAIM, color="black", alpha=0.15, label="the claim: 5-15 % faster")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ticks = [
            tick
            for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
            if low / 2 < tick < high * 2
        ]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.margins(y=0.15)
        axis.set_ylabel("LayerNorm's time over RMSNorm's")
        axis.set_title(f"{TITLES[mode]}; above 1: RMSNorm is faster", fontsize=10)
        axis.set_xticks(
            range(len(cells)), [f"{cell['shape']}\n{cell['dtype']}" for cell in cells], fontsize=7
        )
        axis.legend(fontsize=7)
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=110)
