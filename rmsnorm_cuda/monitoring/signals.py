"""What a monitor tells others: names, units and values. Each exporter sends these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .figures import INF, MAX, MEDIAN, MIN, NAN, P99, ROWS, SMALL, WEIGHT
from .report import Thresholds

if TYPE_CHECKING:
    from .watch import Monitor

Send = Callable[[int, dict[str, float]], object]  # step, values by name
Values = dict[tuple[str, ...], float]  # by the labels' values


class Signal(NamedTuple):
    """Name, labels and unit are stable: dashboards and alerts ask for them."""

    name: str
    kind: str  # gauge: of the latest step; counter: over all steps
    unit: str  # in UCUM, as OpenTelemetry has it; "1" also where it is that of the model's numbers
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[Monitor], Values]

    @property
    def prometheus(self) -> str:
        return f"rmsnorm_{self.name}" + "_total" * (self.kind == "counter")

    @property
    def opentelemetry(self) -> str:
        return f"rmsnorm.{self.name}"

    def samples(self, monitor: Monitor) -> list[tuple[dict[str, str], float]]:
        """Values by labels, of all that have one. From any thread, while the model runs."""
        with monitor._lock:
            values = self.read(monitor)
        return [
            (dict(zip(self.labels, labels)), float(value))
            for labels, value in values.items()
            if not math.isnan(value)
        ]


def _counts(column: int) -> Callable[[Monitor], Values]:
    return lambda m: _by_norm(m, m._history.counts[:, column])


def _by_norm(monitor: Monitor, values: Tensor, *labels: str) -> Values:
    return {(norm, *labels): value for norm, value in zip(monitor.norms, values.tolist())}


def _row_rms(monitor: Monitor) -> Values:
    values: Values = {}
    for quantile, column in {"0": MIN, "0.5": MEDIAN, "0.99": P99, "1": MAX}.items():
        values |= _by_norm(monitor, monitor._history.latest[:, column].double().exp2(), quantile)
    return values


def _weight_growth(monitor: Monitor) -> Values:
    history = monitor._history
    return _by_norm(monitor, history.latest[:, WEIGHT] / history.first[:, WEIGHT])


def _alarms(monitor: Monitor) -> Values:
    """Those of 0 as well: Prometheus sees an increase only from what was there before."""
    steps, kinds = monitor._faulty_steps, Thresholds._fields
    return {(norm, kind): steps[norm, kind] for norm in monitor.norms for kind in kinds}


_GAUGE, _COUNTER = "gauge", "counter"
_NORM = ("norm",)
SIGNALS = (
    Signal(
        "steps",
        _COUNTER,
        "{step}",
        (),
        "steps that were looked at",
        lambda m: {(): m._history.count},
    ),
    Signal("rows", _COUNTER, "{row}", _NORM, "rows that the norm was given", _counts(ROWS)),
    Signal("nan_rows", _COUNTER, "{row}", _NORM, "rows with NaN", _counts(NAN)),
    Signal("inf_rows", _COUNTER, "{row}", _NORM, "rows with Inf", _counts(INF)),
    Signal(
        "small_rows",
        _COUNTER,
        "{row}",
        _NORM,
        "rows whose mean square is below eps",
        _counts(SMALL),
    ),
    Signal(
        "row_rms",
        _GAUGE,
        "1",
        ("norm", "quantile"),
        "RMS of rows without NaN and Inf, above eps",
        _row_rms,
    ),
    Signal(
        "weight_rms",
        _GAUGE,
        "1",
        _NORM,
        "RMS of weight + offset",
        lambda m: _by_norm(m, m._history.latest[:, WEIGHT]),
    ),
    Signal(
        "weight_growth",
        _GAUGE,
        "1",
        _NORM,
        "weight_rms over that of the first step",
        _weight_growth,
    ),
    Signal("alarms", _COUNTER, "{step}", ("norm", "kind"), "steps with the fault", _alarms),
)


def scalars(monitor: Monitor) -> dict[str, float]:
    """`Monitor.scalars()`."""
    values = {}
    for signal in SIGNALS:
        for labels, value in signal.samples(monitor):
            norm = labels.pop("norm", None)
            name = "_".join((f"rmsnorm_{signal.name}", *labels.values()))
            if value or signal.name != "alarms":
                values[name if norm is None else f"{name}/{norm}"] = value
    return values


def sender(to: object) -> Send:
    """How `to` takes the values of a step.

    Raises:
        TypeError: it takes them in none of the known ways.
    """
    if hasattr(to, "log_metrics"):  # mlflow, the loggers of Lightning
        return lambda step, values: to.log_metrics(values, step=step)
    if hasattr(to, "add_scalar"):  # SummaryWriter
        return lambda step, values: [to.add_scalar(k, v, step) for k, v in values.items()]
    if hasattr(to, "log"):  # wandb, its runs
        return lambda step, values: to.log(values, step=step)
    if callable(to):
        return to
    expected = "a function of (step, dict), or what has log_metrics, add_scalar or log"
    raise TypeError(f"monitor: log: expected {expected}, got {type(to).__name__}")


def names_table() -> str:
    """The names, as a page shows them."""
    lines = ["| Prometheus | kind | unit | labels | what it is |", "|---|---|---|---|---|"]
    for s in SIGNALS:
        labels = ", ".join(s.labels) or "-"
        cells = f"`{s.prometheus}`", s.kind, f"`{s.unit}`", labels, s.meaning
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
