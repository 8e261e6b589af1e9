"""Plants each fault of the runbook in SmolLM2-135M, and prints what the monitor says.

    python benchmarks/runbook [CASE ...] [--png FILE]

A case is a script beside this one. FILE shows how the rows of each norm grew, and the alarms. Needs
the demo's weights (`make demo`).
"""

import argparse
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

CASES = ("sound", "overflow", "dead", "eps", "rounding", "shard", "weight")


def draw(monitors, file):
    from matplotlib import cm
    from matplotlib.figure import Figure

    from rmsnorm_cuda.monitoring.figures import MEAN

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, len(monitors), sharey=True, squeeze=False)[0]
    colors = cm.RdBu_r.with_extremes(bad="0.4")
    for axes, (case, m) in zip(panels, monitors.items()):
        lengths, norms = m.figures()[:, :, MEAN], list(m.norms)
        growth = (lengths - lengths[0]).T.tolist()
        image = axes.imshow(growth, colors, aspect="auto", vmin=-8, vmax=8, interpolation="nearest")
        marks = [(max(a.step, 0), norms.index(a.norm)) for a in m.alarms]
        if marks:
            axes.plot(*zip(*marks), "kx", markersize=3)
        axes.set(title=case, xlabel="step", xticks=m.steps)
    panels[0].set(ylabel="norm, the first is on top")
    figure.colorbar(image, label="log2 of the rows' growth since step 0; grey: NaN, Inf, below eps")
    figure.savefig(file, dpi=80)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--png")
    args = parser.parse_args()
    if unknown := {*args.cases} - {*CASES}:
        parser.error(f"expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    from common import load

    load()  # which says what it reads, ahead of the cases
    monitors = {}
    for case in args.cases or CASES:
        print(f"=== {case}", flush=True)
        monitors[case] = runpy.run_path(str(HERE / f"{case}.py"))["m"]
    if args.png:
        draw(monitors, args.png)


if __name__ == "__main__":
    main()
