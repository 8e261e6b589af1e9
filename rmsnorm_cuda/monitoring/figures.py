"""What a monitor computes from the 1 / rms of each row, and what it keeps of each step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules import RMSNorm

# Columns of a step's figures. A row is a norm.
COLUMNS = 12
ROWS, NAN, INF, SMALL, MIN, MEAN, STD, MAX, MEDIAN, P99, EQUAL, WEIGHT = range(COLUMNS)

KEPT_STEPS = 4096  # a longer run drops every other one
WEIGHT_INTERVAL = 16  # steps; load_state_dict() and .data write without a new version of the weight

Call = tuple[int, Tensor, torch.dtype, bool]  # norm, 1 / rms, dtype of the input, compiled?


class Step(NamedTuple):
    number: int
    figures: Tensor  # [norms, COLUMNS]
    dtypes: dict[int, torch.dtype]  # of what each norm was given
    previous: dict[int, int]  # the norm that a norm's rows were compared with
    compiled: set[int]
    copied: torch.cuda.Event | None  # after this the figures are on the CPU

    def on_cpu(self) -> Step:
        if self.copied is None:
            return self
        self.copied.synchronize()
        return self._replace(figures=self.figures.clone())  # the next step reuses pinned memory


class Meter:
    """Computes the figures of a step, on the device of its first call."""

    def __init__(self, norms: list[RMSNorm]) -> None:
        self._eps, self._shapes = [m.eps for m in norms], [m.normalized_shape for m in norms]
        self._weights = _WeightSizes(norms)
        self._constant = functools.lru_cache(64)(torch.tensor)  # a copy to a GPU takes a while

    def measure(self, number: int, calls: list[Call], training: bool) -> Step:
        rstds: dict[int, Tensor] = {}
        for i, rstd, _, _ in calls:
            if i in rstds:
                rstd = torch.cat([rstds[i].reshape(-1), rstd.reshape(-1)])
            rstds[i] = rstd
        device = calls[0][1].device
        figures, previous = self._of_rows(rstds, device)
        weights = self._weights.at(number, training, device)
        figures, copied = torch.cat([figures, weights[:, None]], 1), None
        if figures.is_cuda:  # the next step reads them; they have arrived long before
            pinned = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True)
            pinned.copy_(figures, non_blocking=True)
            copied, figures = torch.cuda.current_stream(device).record_event(), pinned
        dtypes = {i: dtype for i, _, dtype, _ in calls}
        compiled = {i for i, _, _, is_compiled in calls if is_compiled}
        return Step(number, figures, dtypes, previous, compiled, copied)

    def _of_rows(self, rstds: dict[int, Tensor], device: torch.device) -> tuple[Tensor, dict]:
        """All columns before WEIGHT, and Step.previous."""
        groups: dict[tuple, list[int]] = {}  # norms with as many rows of one width
        for i, rstd in rstds.items():
            key = rstd.shape, rstd.dtype, rstd.device, self._shapes[i]
            groups.setdefault(key, []).append(i)
        parts, order, previous = [], [], {}
        for (shape, dtype, source, _), group in groups.items():
            if rows := shape.numel():
                order += group
                previous |= zip(group[1:], group)
                default = torch.finfo(dtype).eps
                eps = [default if self._eps[i] is None else self._eps[i] for i in group]
                eps = self._constant(tuple(zip(eps)), dtype=torch.float64, device=source)
                rstd = torch.stack([rstds[i] for i in group]).reshape(len(group), rows)
                parts.append(_figures_of(rstd, eps).to(device))
        options = {"dtype": torch.float32, "device": device}
        figures = torch.cat(parts) if parts else torch.empty(0, WEIGHT, **options)
        count = len(self._eps)
        if order != list(range(count)):  # the others have 0 rows; their other columns are NaN
            every_norm = torch.full((count, WEIGHT), math.nan, **options)
            every_norm[:, ROWS] = 0
            index = self._constant(tuple(order), dtype=torch.int64, device=device)
            figures = every_norm.index_copy_(0, index, figures)
        return figures, previous


def _figures_of(rstd: Tensor, eps: Tensor) -> Tensor:
    """[norms, rows] of 1 / rms, [norms, 1] of eps -> [norms, columns before WEIGHT]."""
    squares = rstd.double().pow(-2) - eps
    small = squares < eps
    usual = (squares >= eps) & (squares < math.inf)
    counts = torch.stack([rstd.isnan(), rstd == 0, small, usual]).sum(2, dtype=torch.float64)
    nan, inf, small, count = counts
    equal = (rstd[1:] == rstd[:-1]).all(1)
    log2 = squares.clamp(min=1e-90).log2().div(2)
    rows = rstd.shape[1]
    if rstd.is_cuda or not usual.all():  # on a GPU the question would wait for it
        ordered = torch.where(usual, log2, math.inf).sort(1).values  # the others are last
        ranks = torch.stack([_rank(percent, count) for percent in (0, 50, 99, 100)], 1)
        quantiles = ordered.gather(1, (ranks - 1).clamp(min=0).long())
        low, median, p99, high = torch.where(count[:, None] > 0, quantiles, math.nan).unbind(1)
        mean = torch.where(usual, log2, 0).sum(1) / count
        std = torch.where(usual, log2 - mean[:, None], 0).square().sum(1).div(count).sqrt()
        equal &= usual[1:].any(1)
    elif rows > 1:  # nearly always
        low, high = log2.aminmax(dim=1)
        median, p99 = (log2.kthvalue(_rank(percent, rows), 1).values for percent in (50, 99))
        std, mean = torch.std_mean(log2, 1, correction=0)
    else:  # one token
        low = median = p99 = high = mean = log2[:, 0]
        std = torch.zeros_like(mean)
    equal = nn.functional.pad(equal.double(), (1, 0))
    rows = torch.full_like(count, rows)
    columns = rows, nan, inf, small, low, mean, std, high, median, p99, equal
    return torch.stack(columns, 1).float()


def _rank(percent: int, count: Tensor | int) -> Tensor | int:
    """The nearest rank of a quantile, from 1."""
    return (percent * count + 99) // 100


class _WeightSizes:
    """RMS of each norm's weight + offset. Computed anew only where a weight was written."""

    def __init__(self, norms: list[RMSNorm]) -> None:
        self._norms, self._versions, self._step = norms, [], 0
        self._sizes: Tensor | None = None

    def at(self, step: int, training: bool, device: torch.device) -> Tensor:
        due = self._sizes is None or step - self._step >= WEIGHT_INTERVAL
        if due or training:
            ws = [norm.weight for norm in self._norms]
            versions = [None if w is None or w.is_inference() else (id(w), w._version) for w in ws]
            if due or versions != self._versions:
                self._step, self._versions = step, versions
                self._sizes = self._measure(ws, device)
        return self._sizes

    def _measure(self, weights: list[Tensor | None], device: torch.device) -> Tensor:
        local = {}
        for i, w in enumerate(weights):
            w = w.to_local() if hasattr(w, "to_local") else w
            if w is not None and w.numel() and not w.is_meta:
                offset = self._norms[i].weight_offset
                local[i] = w.detach().float() + offset if offset else w.detach()
        sizes = [torch.full((), math.nan, dtype=torch.float32, device=device)] * len(weights)
        if local:
            norms = torch._foreach_norm(list(local.values()), 2, dtype=torch.float32)
            roots = [w.numel() ** 0.5 for w in local.values()]
            for i, size in zip(local, torch._foreach_div(norms, roots)):
                sizes[i] = size.to(device)
        return torch.stack(sizes)


class History:
    """The steps that were seen, and the figures that each norm had first."""

    def __init__(self, norms: int) -> None:
        self.steps: list[tuple[int, Tensor]] = []  # number, [norms, COLUMNS] on the CPU
        self.first = torch.full((norms, COLUMNS), math.nan, dtype=torch.float32, device="cpu")
        self.latest = self.first  # of each norm, whichever step it was last called in
        # Over all steps, those that were dropped too; counts are [norms, ROWS to SMALL].
        self.count = 0
        self.counts = torch.zeros(norms, SMALL + 1, dtype=torch.float64, device="cpu")

    def add(self, step: Step) -> None:
        self.first = torch.where(self.first.isnan(), step.figures, self.first)
        self.latest = torch.where(step.figures.isnan(), self.latest, step.figures)
        self.count += 1
        self.counts += step.figures[:, : SMALL + 1]
        self.steps.append((step.number, step.figures))

    def thin(self, alarmed: Iterable[int]) -> None:
        """Drops every other step of a long run, but not those with alarms."""
        if len(self.steps) > KEPT_STEPS:
            kept = {number for number, _ in self.steps[::2]}.union(alarmed)
            self.steps = [step for step in self.steps if step[0] in kept]

    def figures(self) -> Tensor:
        return torch.stack([f for _, f in self.steps]) if self.steps else self.first[None][:0]
