"""The tables, sentences and charts of a training."""

import math
import statistics
from pathlib import Path

from benchmarks.common import pyplot
from benchmarks.layernorm_vs_rmsnorm.intervals import interval
from benchmarks.layernorm_vs_rmsnorm.model import NORMS
from benchmarks.layernorm_vs_rmsnorm.report import CLAIM, describe, title


def paired(report, placement, norm, other, value):
    """value(run) with one norm, less that with the other, for each seed."""
    of = {
        name: {run["seed"]: value(run) for run in select(report, placement, name)}
        for name in (norm, other)
    }
    return [of[norm][seed] - of[other][seed] for seed in of[norm]]


def select(report, placement, norm):
    return [run for run in report["runs"] if (run["placement"], run["norm"]) == (placement, norm)]


def judge_loss(placement, norm, mean, half, layer_norm):
    """A sentence on the difference to LayerNorm's final validation loss."""
    if not math.isfinite(mean):
        return f"{placement}-norm, {norm}: a run diverged."
    if not math.isfinite(half):
        return f"{placement}-norm, {norm}: one seed, so no interval and no statement."
    ends = f"{mean - half:+.4f} to {mean + half:+.4f}"
    where = f"{placement}-norm, {norm}: the difference's interval, {ends},"
    if abs(mean) <= half:
        most = abs(mean) + half
        within = f"{most:.4f} ({most / layer_norm:.2%} of the loss)"
        return f"{where} contains 0: no difference is shown, and none beyond {within} lies in it."
    than = "lower" if mean < 0 else "higher"
    return (
        f"{where} excludes 0: the loss is {than} than LayerNorm's, by {abs(mean) / layer_norm:.2%}."
    )


def judge_step(placement, kind, norm, times):
    """A sentence on a step's time beside LayerNorm's in the same round."""
    low, middle, high = times[norm]["ratio"]
    ratio = f"{middle:.3f}, interval {low:.3f} to {high:.3f}"
    where = f"{placement}-norm, {kind}, {norm}: LayerNorm's time over its, {ratio},"
    if low <= 1 <= high:
        also = ", and 5 % is outside of it" if high < CLAIM[0] else ""
        return f"{where} contains 1: no difference is shown{also}."
    if high < 1:
        return f"{where} is below 1: slower than LayerNorm."
    claimed = (
        "less than 5 %"
        if middle < CLAIM[0]
        else "5-15 %, as claimed"
        if middle <= CLAIM[1]
        else "more than 15 %"
    )
    return f"{where} is above 1: faster, by {claimed}."


def share(times, norm):
    """Norms' share of a step: measured alone (eager only), and what the step loses without them."""
    alone, whole = times.get(f"{norm} alone"), times[norm]
    return (alone["median"] / whole["median"] if alone else None), 1 - whole["ratio"][1] / times[
        "none"
    ]["ratio"][1]


def write_train(report):
    """The Markdown of a report on training."""
    s = report["settings"]
    seeds = sorted({run["seed"] for run in report["runs"]})
    lines = ["# LayerNorm or RMSNorm, in training", "", *describe(report), ""]
    lines += [
        f"A decoder of {s['parameters']:,} parameters (width {s['width']}, {s['layers']} layers, "
        f"{s['heads']} heads, context {s['context']}), {s['steps']} steps of {s['batch']} x "
        f"{s['context']} bytes, AdamW with a rate of {s['rate']:g}, fp32. Text: Python's topics "
        f"and docstrings, {s['train_bytes']:,} bytes to train on and {s['validation_bytes']:,} "
        f"others to validate with (sha256 {s['text']}). "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; a seed's weights and batches are the same for "
        "all norms. Losses are nats a byte.",
        "",
        "| placement | norm | final validation loss | less LayerNorm's | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    quality, speed = [], []
    for place in report["steps"]:
        finals = {norm: [run["final"] for run in select(report, place, norm)] for norm in NORMS}
        for norm in NORMS:
            deviation = f" ± {statistics.stdev(finals[norm]):.4f}" if len(seeds) > 1 else ""
            cells = [place, norm, f"{statistics.fmean(finals[norm]):.4f}{deviation}", "", ""]
            if norm != "LayerNorm":
                mean, half = interval(
                    paired(report, place, norm, "LayerNorm", lambda run: run["final"])
                )
                cells[3:] = (
                    f"{mean:+.4f}",
                    f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "",
                )
                quality.append(
                    judge_loss(place, norm, mean, half, statistics.fmean(finals["LayerNorm"]))
                )
            lines.append("| " + " | ".join(cells) + " |")
        ours = paired(
            report, place, "rmsnorm_cuda.RMSNorm", "torch.nn.RMSNorm", lambda run: run["final"]
        )
        apart = max(map(abs, ours))
        quality.append(
            f"{place}-norm: our RMSNorm and torch's, two kernels of one formula, end at most "
            f"{apart:.5f} apart."
        )
    lines += [
        "",
        "± is the standard deviation over the seeds.",
        "",
        *("- " + sentence for sentence in quality),
        "",
    ]
    lines += [
        "| placement | | norm | ms: median | least | LayerNorm's / it | 95 % "
        "| share: alone | left out |",
        "|---" * 9 + "|",
    ]
    for place, kinds in report["steps"].items():
        for kind, times in kinds.items():
            for norm in [*NORMS, "none"]:
                low, middle, high = times[norm]["ratio"]
                alone, without = ("", "")
                if norm != "none":
                    alone, without = (
                        f"{part:.1%}" if part is not None else "" for part in share(times, norm)
                    )
                    if norm != "LayerNorm":
                        speed.append(judge_step(place, kind, norm, times))
                ms = f"{times[norm]['median']:.1f} | {times[norm]['min']:.1f}"
                ratio = f"{middle:.3f} | {low:.3f} to {high:.3f}"
                lines.append(
                    f"| {place} | {kind} | {norm} | {ms} | {ratio} | {alone} | {without} |"
                )
            low, middle, high = times["none"]["ratio"]
            ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
            speed.append(
                f"{place}-norm, {kind}: LayerNorm's step takes {ratio} times as long as one "
                "without norms: no norm can gain more."
            )
    lines += [
        "",
        f"Times are of a step. Steps and norms alone take turns in one process, {s['rounds']} "
        "rounds in shuffled order; the interval (95 %) is that of the median of the rounds' "
        "ratios, by ranks. Norms' share, alone: the step's norm modules, forward and backward over "
        "activations of their own, over the step; "
        'left out: what a step of the same model without norms ("none") takes less, '
        "which differs from the former by what else the norms push out of the caches, and by "
        "noise.",
        "",
        *("- " + sentence for sentence in speed),
    ]
    return "\n".join(lines) + "\n"


def draw_loss(report, file):
    """Validation losses with the range over seeds; below, the paired difference to LayerNorm."""
    plt = pyplot()
    places = list(report["steps"])
    fig, axes = plt.subplots(
        2, len(places), figsize=(5.5 * len(places), 7.5), squeeze=False, sharex=True, sharey="row"
    )
    for place, (top, bottom) in zip(places, axes.T, strict=True):
        for norm, dashes in zip(NORMS, ("-", "--", ":"), strict=True):
            runs = select(report, place, norm)
            steps = [step for step, _ in runs[0]["validation"]]
            values = list(
                zip(*([loss for _, loss in run["validation"]] for run in runs), strict=True)
            )
            (line,) = top.plot(steps, list(map(statistics.fmean, values)), dashes, label=norm)
            band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            top.fill_between(steps, list(map(min, values)), list(map(max, values)), **band)
            if norm == "LayerNorm":
                bottom.axhline(0, color=line.get_color(), label=norm)
                continue
            values = [
                paired(report, place, norm, "LayerNorm", lambda run, i=i: run["validation"][i][1])
                for i in range(len(steps))
            ]
            pairs = list(map(interval, values))
            bottom.plot(
                steps, [mean for mean, _ in pairs], dashes, color=line.get_color(), label=norm
            )
            if math.isfinite(pairs[0][1]):
                low, high = zip(*((mean - half, mean + half) for mean, half in pairs), strict=True)
                bottom.fill_between(steps, low, high, **band)
        top.set_title(
            f"{place}-norm: loss on a part of the validation text; mean and range, {len(runs)} "
            "seeds",
            fontsize=9,
        )
        bottom.set_title("less LayerNorm's, paired by seed, 95 % interval", fontsize=9)
        bottom.set_xlabel("step")
        top.legend(fontsize=8)
        bottom.legend(fontsize=8)
    axes[0, 0].set_ylabel("nats a byte")
    axes[1, 0].set_ylabel("difference, nats a byte")
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def draw_steps(report, file):
    """A step's median time with each norm, the norms' own part of it, and its minimum."""
    plt = pyplot()
    panels = [
        (f"{place}-norm, {kind}", times)
        for place, kinds in report["steps"].items()
        for kind, times in kinds.items()
    ]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.4), squeeze=False)
    names = [*NORMS, "none"]
    for (heading, times), axis in zip(panels, axes[0], strict=True):
        axis.bar(
            names, [times[name]["median"] for name in names], color="#9db8d2", label="step, median"
        )
        alone = [
            times[f"{name} alone"]["median"] if f"{name} alone" in times else 0 for name in names
        ]
        if any(alone):
            axis.bar(names, alone, color="#c44e52", label="its norms alone, median")
        axis.plot(
            names,
            [times[name]["min"] for name in names],
            "_",
            color="black",
            markersize=18,
            label="step, minimum",
        )
        for place, name in enumerate(names):
            label = f"{times[name]['ratio'][1]:.2f}x"
            axis.annotate(
                label, (place, times[name]["median"]), ha="center", va="bottom", fontsize=7
            )
        axis.set_title(f"{heading}\n(x: LayerNorm's time over it)", fontsize=8)
        axis.set_xticks(
            range(len(names)), [name.replace(".RMS", "\n.RMS") for name in names], fontsize=6
        )
        axis.margins(y=0.1)
    axes[0, 0].set_ylabel("ms")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="lower center", ncols=3)
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.savefig(file, dpi=110)


def draw_train(report, file):
    """Two charts beside `file`: NAME-loss.png and NAME-steps.png."""
    file = Path(file)
    draw_loss(report, file.with_name(f"{file.stem}-loss{file.suffix}"))
    draw_steps(report, file.with_name(f"{file.stem}-steps{file.suffix}"))
