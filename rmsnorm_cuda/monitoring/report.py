"""What a monitor says: alarms and their words, the table, the heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import RMSNorm
from .figures import INF, MAX, MEAN, MIN, NAN, ROWS, SMALL, WEIGHT, Step


class Thresholds(NamedTuple):
    """What counts as a fault. Lengths of rows are their RMS; None switches a check off."""

    # Share of a norm's rows, padding say, whose mean of squares is below eps: there eps decides.
    small: float | None = 0.5
    # A norm's typical row is this many times as long as when it was first called, or as short.
    drift: float | None = 8.0
    # The longest row is within this factor of the largest number of the input's dtype.
    headroom: float | None = 8.0
    weight: float | None = 8.0  # a weight is this many times as large as at first
    non_finite: bool = True  # rows with NaN or Inf
    # What is between two norms adds nothing, or a weight is zero. Compiled, a layer that never
    # added anything raises no alarm.
    dead: bool = True
    # eps or rounding are not those of the model's config, of its family, or of the other norms.
    settings: bool = True


class Alarm(NamedTuple):
    step: int  # from 0; -1: as the model was set up, before the first
    norm: str
    kind: str  # a field of Thresholds
    message: str


class RMSNormAlarm(RuntimeError):
    """Raised by a monitor with on_alarm="raise"; `.alarm` has the first one of the step."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(f"{alarm.norm}, step {alarm.step}: {alarm.message}")
        self.alarm = alarm

    def __reduce__(self):  # the default builds an exception from its message
        return type(self), (self.alarm,)


OnAlarm = Callable[[Alarm], None] | str | None  # a function, "raise", or nothing


def find_faults(
    step: Step, first: Tensor, dead: Tensor | None, norms: dict[str, RMSNorm], limits: Thresholds
) -> list[Alarm]:
    """The faults of a step by norm, so that where one comes first is told first.

    Args:
        first: the figures that each norm had first.
        dead: for each norm whether what is before it adds nothing.
    """
    names, checks = list(norms), []
    columns = ROWS, NAN, INF, SMALL, MEAN, MAX, WEIGHT
    rows, nan, inf, small, mean, longest, weight = (step.figures[:, c] for c in columns)

    def check(kind: str, is_fault: Tensor, message: str, *values: Sequence) -> None:
        checks.append((kind, is_fault, lambda i: message.format(*(value[i] for value in values))))

    if limits.non_finite:
        check("non_finite", nan > 0, "NaN in {:.0f} of {:.0f} rows", nan, rows)
        message = "Inf in {:.0f} of {:.0f} rows: what comes before it overflows"
        check("non_finite", inf > 0, message, inf, rows)
    if limits.small is not None:
        eps = [norm.eps for norm in norms.values()]
        message = "the mean of squares of {:.0%} of the rows is below eps={}, which decides there"
        check("small", small > limits.small * rows, message, small / rows, eps)
    if limits.drift is not None:
        drift = mean - first[:, MEAN]
        message = "rows are {:.3g} times as long as in the first step"
        check("drift", drift.abs() > math.log2(limits.drift), message, drift.double().exp2())
    if limits.headroom is not None:
        dtypes = [step.dtypes.get(i, torch.float32) for i in range(len(names))]
        room = {d: math.log2(torch.finfo(d).max / limits.headroom) for d in set(dtypes)}
        room = torch.tensor([room[d] for d in dtypes], dtype=torch.float32, device="cpu")
        message = "a row has RMS {:.3g}, near the largest number of {}"
        check("headroom", longest > room, message, longest.double().exp2(), dtypes)
    if limits.weight is not None:
        growth = weight / first[:, WEIGHT]
        message = "the weight is {:.3g} times as large as in the first step"
        check("weight", growth > limits.weight, message, growth)
    if dead is not None:
        message = "its rows are exactly as long as in the norm before: what is between adds nothing"
        check("dead", dead, message)
        check("dead", weight == 0, "its weight is zero")
    if not checks:
        return []
    faults = torch.stack([is_fault for _, is_fault, _ in checks], 1).nonzero().tolist()
    return [Alarm(step.number, names[i], checks[k][0], checks[k][2](i)) for i, k in faults]


_TABLE_ROW = "{:<44}{:>10}{:>10}{:>10}{:>10}{:>10}{:>8}{:>8}{:>8}{:>9}"
_TABLE_HEAD = "norm", "rows", "least", "first", "last", "most", "small", "NaN", "Inf", "weight"


def table(norms: Iterable[str], skipped: dict, figures: Tensor, alarms: list[Alarm]) -> str:
    """All norms and what was found in them, a line each."""
    lines = [
        f"{len(figures)} steps, {figures.shape[1]} norms; "
        "RMS of rows: least, typical in the first and last step, most",
        _TABLE_ROW.format(*_TABLE_HEAD),
        *(_table_row(name, figures[:, i]) for i, name in enumerate(norms)),
        *(f"{name}: not watched: {reason}" for name, reason in skipped.items()),
        *(f"! step {a.step}, {a.norm}: {a.message}" for a in alarms),
    ]
    return "\n".join(lines if alarms else [*lines, "no alarms"])


def _table_row(name: str, f: Tensor) -> str:
    """From [steps, COLUMNS] of a norm."""
    rows = int(f[:, ROWS].sum())
    if not rows:
        return f"{name:<44}{0:>10}"
    f = f[f[:, ROWS] > 0]
    has_usual = f[:, MEAN].isfinite()  # rows that are not NaN, Inf or small
    usual = f[has_usual] if has_usual.any() else f
    lengths = usual[:, MIN].min(), usual[0, MEAN], usual[-1, MEAN], usual[:, MAX].max()
    small, nan, inf = (int(f[:, column].sum()) for column in (SMALL, NAN, INF))
    growth = (f[-1, WEIGHT] / f[0, WEIGHT]).item()
    growth = f"x {growth:.3g}" if math.isfinite(growth) else "-"
    lengths = (f"{2.0 ** length.item():.3g}" for length in lengths)
    return _TABLE_ROW.format(name, rows, *lengths, f"{small / rows:.1%}", nan, inf, growth)


def heat_map(norms: list[str], steps: list[int], values: Tensor, alarms: list[tuple[int, str]]):
    """A figure of ``(steps, norms)`` values, a row for each norm.

    A cross marks each alarm, (step, norm).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.18 * len(norms)), layout="constrained")
    axes = figure.add_subplot()
    edges = (-0.5, len(steps) - 0.5, len(norms) - 0.5, -0.5)
    image = axes.imshow(values.T.tolist(), aspect="auto", interpolation="nearest", extent=edges)
    figure.colorbar(image, label="log2 of the rows' RMS")
    marks = [(steps.index(step), norms.index(norm)) for step, norm in alarms if step in steps]
    if marks:
        axes.plot(*zip(*marks), "rx", label="alarm")
        axes.legend(loc="upper left")
    axes.set(xlabel="step", yticks=range(len(norms)), title="RMS of what each norm is given")
    axes.set_yticklabels(norms, fontsize=7)
    return figure
