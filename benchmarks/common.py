"""What the benchmarks share beside rmsnorm_cuda/bench/: verification, medians, the chart."""

import statistics
import sys

import rmsnorm_cuda
from rmsnorm_cuda.bench.contenders import EPS
from rmsnorm_cuda.bench.timing import samples
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance


def verify(x, cols, weight):
    want = rms_norm_reference(x.cpu(), cols, weight.cpu(), EPS)
    worst = ulp_distance(rmsnorm_cuda.rms_norm(x, cols, weight, EPS).cpu(), want).max().item()
    assert worst <= 1, f"{worst} ulp from the reference"


def measure(contenders, inputs, seconds):
    """Median microseconds a call of each contender."""
    return {
        name: statistics.median(times)
        for name, times in samples(contenders, inputs, seconds).items()
    }


def pyplot():
    """matplotlib for files, without a display."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(
            "Charts need matplotlib: pip install matplotlib, or this package with its extra "
            '"benchmarks".'
        )
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def size_of(shape):
    rows, cols = map(int, shape.split("x"))
    return rows * cols


def ratio_axis(axis):
    """Across: multiples of our time, with a line where they are equal."""
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def chart(results, file, title, hidden=()):
    """Each contender's time as a multiple of ours: a panel for each mode, a line for each cell.

    Cells of one shape stand together, small shapes first; of these the closest race first.
    """
    plt = pyplot()
    results = [
        result | {"us": {name: us for name, us in result["us"].items() if name not in hidden}}
        for result in results
    ]
    names = list(dict.fromkeys(name for result in results for name in result["us"]))
    names = [name for name in names if not name.startswith("ours")]
    modes = list(dict.fromkeys(result["mode"] for result in results))
    cells = {mode: [result for result in results if result["mode"] == mode] for mode in modes}
    longest = max(map(len, cells.values()))
    fig, axes = plt.subplots(
        1, len(modes), figsize=(6.5 * len(modes), 1.6 + 0.2 * longest), squeeze=False
    )
    for mode, axis in zip(modes, axes[0], strict=True):

        def ratios(cell):
            us = cell["us"]
            return {name: us[name] / us["ours"] for name in names if name in us}

        order = sorted(
            cells[mode],
            key=lambda cell: (size_of(cell["shape"]), cell["shape"], min(ratios(cell).values())),
        )
        shapes = [cell["shape"] for cell in order]
        # Half a line between two shapes.
        places = [at + len(set(shapes[: at + 1])) / 2 for at in range(len(order))]
        for name in names:
            points = [
                (ratios(c)[name], at)
                for c, at in zip(order, places, strict=True)
                if name in ratios(c)
            ]
            axis.plot(*zip(*points, strict=True), "o", markersize=5, label=name)
        for cell, place in zip(order, places, strict=True):
            axis.plot(
                [1, max(ratios(cell).values())], [place] * 2, color="#d8d8d8", linewidth=1, zorder=0
            )
        ratio_axis(axis)
        threads = [
            f", {cell['threads']} thread" + "s" * (cell["threads"] > 1) if "threads" in cell else ""
            for cell in order
        ]
        labels = [
            f"{cell['shape']}  {cell['dtype']}{also}"
            for cell, also in zip(order, threads, strict=True)
        ]
        axis.set_yticks(places, labels, fontsize=8)
        axis.set_ylim(max(places) + 1, min(places) - 1)
        axis.set_title(f"{mode}: time, ours = 1", fontsize=10)
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, fontsize=9, loc="lower center", ncols=len(names), frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout(rect=(0, 0.4 / fig.get_figheight(), 1, 1))
    fig.savefig(file, dpi=90)
