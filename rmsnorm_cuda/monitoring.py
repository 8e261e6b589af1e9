"""monitor(model): what the norms of a model see while it runs, from the 1 / rms of each row that they compute anyway."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import _C, is_dynamo_compiling
from .integrations.families import _InWeightDtype
from .modules import RMSNorm

_forward_op = torch.ops.rmsnorm_cuda.rms_norm_forward.default
_fused_op = torch.ops.rmsnorm_cuda.fused_add_rms_norm_forward.default


class Thresholds(NamedTuple):
    """What counts as a fault. Lengths of rows are their RMS; None switches a check off."""

    small: float | None = 0.01  # share of a norm's rows whose mean of squares is below eps: there eps decides, not the row
    drift: float | None = 8.0  # a norm's typical row is this many times as long as in the first step, or as short
    headroom: float | None = 8.0  # the longest row is within this factor of the largest number of the input's dtype
    weight: float | None = 8.0  # a weight is this many times as large as in the first step
    non_finite: bool = True  # rows with NaN or Inf
    dead: bool = True  # what is between two norms adds nothing, or a weight is zero
    settings: bool = True  # eps and rounding are not those of the model's config, family, or other norms


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


# Columns of a step's figures, one row for each norm.
_FIGURES = ("rows", "nan", "inf", "small", "least", "mean", "std", "most", "dead", "weight")
_ROWS, _NAN, _INF, _SMALL, _LEAST, _MEAN, _STD, _MOST, _DEAD, _WEIGHT = range(len(_FIGURES))


class Monitor:
    """What was seen: `alarms`, `figures()`, `report()`, `plot()`. Made by monitor()."""

    def __init__(self, model: nn.Module, thresholds: Thresholds, on_alarm: Callable[[Alarm], None] | str | None, every: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor: expected a torch.nn.Module, got {type(model).__name__}")
        if on_alarm not in (None, "raise") and not callable(on_alarm):
            raise TypeError(f"monitor: expected on_alarm to be 'raise', a function or None, got {on_alarm!r}")
        if every < 1:
            raise ValueError(f"monitor: expected every to be positive, but got {every}")
        self.model, self.thresholds, self.alarms = model, thresholds, []
        self._training = False
        self.norms = {name.removeprefix("_orig_mod."): m for name, m in model.named_modules() if isinstance(m, RMSNorm)}
        if not self.norms:
            raise ValueError("monitor: the model holds no rmsnorm_cuda.RMSNorm; call replace_rms_norm(model) first")
        self._list = list(self.norms.values())
        self._eps = [torch.finfo(torch.float32).eps if m.eps is None else m.eps for m in self._list]
        self._on_alarm, self._every = on_alarm, every
        self._calls = 0
        self._steps: list[tuple[int, Tensor]] = []  # (step, [norms, figures] on the CPU)
        self._coming: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._weights: tuple[tuple, Tensor] | None = None
        self._room: tuple[list[torch.dtype], Tensor] | None = None
        self._known_eps: dict[tuple, Tensor] = {}
        self._raised: set[tuple[str, str]] = set()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Monitor:
        for module in self.norms.values():
            _watch(module)
        self._undo = [lambda m=module: _unwatch(m) for module in self.norms.values()]
        compiled = self.model._compiled_call_impl
        if compiled is not None:  # model.compile(): a hook would be compiled with it

            def call(*args, **kwargs):
                result = compiled(*args, **kwargs)
                self.step()
                return result

            self.model._compiled_call_impl = call
            self._undo.append(lambda: setattr(self.model, "_compiled_call_impl", compiled))
        else:
            self._undo.append(self.model.register_forward_hook(lambda *_: self.step()).remove)
        self._room = None
        if self.thresholds.settings:
            self._tell(_faulty_settings(self.model, self.norms))
        return self

    def __exit__(self, *exc_info) -> None:
        while self._undo:
            self._undo.pop()()
        if exc_info[0] is None:
            self._finish()

    def step(self) -> None:
        """Ends a step. Called by itself after each forward of the model; only what calls parts of a model needs to."""
        self._training = torch.is_grad_enabled()
        with torch.no_grad():
            self._step()

    def _step(self) -> None:
        step, self._calls = self._calls, self._calls + 1
        seen = {}
        for i, module in enumerate(self._list):
            watched = module._seen
            if (rstd := watched.rstd) is not None:
                watched.rstd = None
                if step % self._every == 0:
                    seen[i] = rstd
        if not seen:
            return
        self._finish()
        device = next(iter(seen.values())).device
        groups: dict[tuple, list[int]] = {}  # what has as many rows of one width is looked at together
        for i, rstd in seen.items():
            groups.setdefault((rstd.shape, rstd.dtype, rstd.device, self._list[i].normalized_shape), []).append(i)
        parts, order = [], []
        for (shape, *_), members in groups.items():
            if rows := shape.numel():
                order += members
                rstd = torch.stack([seen[i] for i in members]).reshape(len(members), rows)
                parts.append(_figures(rstd, self._eps_of(members, device)).to(device))
        figures = parts[0] if order == list(range(len(self._list))) else _spread(parts, order, len(self._list), device)
        figures = torch.cat([figures, self._weight_sizes(device)[:, None]], 1)
        if device.type == "cuda":  # read in the next step, when it has long been copied
            copy = torch.empty(figures.shape, pin_memory=True)
            copy.copy_(figures, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._coming = step, copy, event
        else:
            self._coming = step, figures, None
            self._finish()

    def figures(self) -> Tensor:
        """``(steps, norms, figures)`` in fp32, steps and norms as in `.steps` and `.norms`. Figures are: rows; how many of them
        have NaN, have Inf, and are shorter than eps; log2 of the RMS of the rest, least, mean, standard deviation and most;
        1 if every row is as long as in the norm before; RMS of the weight. NaN: not seen in that step."""
        return torch.stack([f for _, f in self._steps]) if self._steps else torch.empty(0, len(self.norms), len(_FIGURES))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self._steps]

    def report(self) -> str:
        """A table of all norms and what was found in them; also printed."""
        lines = [f"{len(self._steps)} steps, {len(self.norms)} norms; RMS of rows: least, typical in the first and last step, most"]
        all_figures = self.figures()
        lines.append(f"{'norm':<44}{'rows':>10}{'least':>10}{'first':>10}{'last':>10}{'most':>10}{'small':>8}{'NaN':>8}{'Inf':>8}{'weight':>9}")
        for i, name in enumerate(self.norms):
            f = all_figures[:, i]
            rows = int(f[:, _ROWS].sum())
            if not rows:
                lines.append(f"{name:<44}{0:>10}")
                continue
            f = f[f[:, _ROWS] > 0]
            least, first, last, most = (2.0 ** v.item() for v in (f[:, _LEAST].min(), f[0, _MEAN], f[-1, _MEAN], f[:, _MOST].max()))
            counts = [int(f[:, k].sum()) for k in (_SMALL, _NAN, _INF)]
            grown = (f[-1, _WEIGHT] / f[0, _WEIGHT]).item()
            lines.append(
                f"{name:<44}{rows:>10}{least:>10.3g}{first:>10.3g}{last:>10.3g}{most:>10.3g}{counts[0] / rows:>8.1%}{counts[1]:>8}"
                f"{counts[2]:>8}" + (f"{'x %.3g' % grown:>9}" if math.isfinite(grown) else f"{'-':>9}")
            )
        lines += [f"! step {a.step}, {a.norm}: {a.message}" for a in self.alarms] or ["no alarms"]
        text = "\n".join(lines)
        print(text)
        return text

    def plot(self, path: str | None = None):
        """A heat map, norms by steps, of the typical RMS of rows, alarms marked. Saved to `path` if given; returns the figure.
        Needs matplotlib."""
        figure = heat_map(list(self.norms), self.steps, self.figures()[:, :, _MEAN], [(a.step, a.norm) for a in self.alarms])
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _eps_of(self, members: list[int], device: torch.device) -> Tensor:
        key = tuple(members), device
        if key not in self._known_eps:
            self._known_eps[key] = torch.tensor([[self._eps[i]] for i in members], dtype=torch.float64, device=device)
        return self._known_eps[key]

    def _weight_sizes(self, device: torch.device) -> Tensor:
        """RMS of weight + offset; kept while no weight has been written to, and in inference."""
        if self._weights is not None and not self._training:
            return self._weights[1]
        weights = [m.weight for m in self._list]
        versions = tuple(None if w is None or w.is_inference() else (id(w), w._version) for w in weights)
        if self._weights is None or self._weights[0] != versions:
            plain = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
            offsets = [m.weight_offset for m in self._list]
            with_offset = [None if w is None else w.detach().float() + o for w, o in zip(plain, offsets)]
            sizes = [math.nan if w is None or not w.numel() else w.square().mean().sqrt() for w in with_offset]
            self._weights = versions, torch.stack([torch.as_tensor(s, dtype=torch.float32, device=device) for s in sizes])
        return self._weights[1]

    def _finish(self) -> None:
        """Takes in the figures that were on their way, and looks for faults."""
        if self._coming is None:
            return
        step, figures, event = self._coming
        self._coming = None
        if event is not None:
            event.synchronize()
        self._steps.append((step, figures))
        self._tell(self._faults(step, figures))

    def _faults(self, step: int, figures: Tensor) -> list[Alarm]:
        limits, names, first, rows = self.thresholds, list(self.norms), self._steps[0][1], figures[:, _ROWS]
        f, checks = figures, []  # (what is true of a norm, kind, message of norm i)
        if limits.non_finite:
            checks.append((f[:, _NAN] > 0, "non_finite", lambda i: f"NaN in {int(f[i, _NAN])} of {int(rows[i])} rows"))
            overflows = "Inf in {} of {} rows: what comes before it overflows"
            checks.append((f[:, _INF] > 0, "non_finite", lambda i: overflows.format(int(f[i, _INF]), int(rows[i]))))
        if limits.small is not None:
            small = "{:.0%} of the rows are below eps={}, which decides there"
            checks.append((f[:, _SMALL] > limits.small * rows, "small", lambda i: small.format(f[i, _SMALL] / rows[i], self._eps[i])))
        if limits.drift is not None:
            away = f[:, _MEAN] - first[:, _MEAN]
            drifts = "rows are {:.3g} times as long as in the first step"
            checks.append((away.abs() > math.log2(limits.drift), "drift", lambda i: drifts.format(2 ** away[i].item())))
        if limits.headroom is not None:
            if self._room is None:
                dtypes = [m._seen.dtype for m in self._list]
                self._room = dtypes, torch.tensor([math.log2(torch.finfo(dtype).max / limits.headroom) for dtype in dtypes])
            dtypes, room = self._room
            near = "a row has RMS {:.3g}, near the largest number of {}"
            checks.append((f[:, _MOST] > room, "headroom", lambda i: near.format(2 ** f[i, _MOST].item(), dtypes[i])))
        if limits.weight is not None:
            grown = f[:, _WEIGHT] / first[:, _WEIGHT]
            grows = "the weight is {:.3g} times as large as in the first step"
            checks.append((grown > limits.weight, "weight", lambda i: grows.format(grown[i])))
        if limits.dead:
            adds_nothing = "its rows are exactly as long as in the norm before: what is between adds nothing"
            checks.append((f[:, _DEAD] > 0, "dead", lambda i: adds_nothing))
            checks.append((f[:, _WEIGHT] == 0, "dead", lambda i: "its weight is zero"))
        if not checks:
            return []
        where = torch.stack([mask for mask, *_ in checks], 1).nonzero().tolist()  # where it comes first is told first
        return [Alarm(step, names[i], checks[k][1], checks[k][2](i)) for i, k in where]

    def _tell(self, alarms: list[Alarm]) -> None:
        """Each kind of each norm once."""
        new = [a for a in alarms if (a.norm, a.kind) not in self._raised]
        self._raised.update((a.norm, a.kind) for a in new)
        self.alarms += new
        if new and self._on_alarm == "raise":
            raise RMSNormAlarm(new[0])
        if callable(self._on_alarm):
            for alarm in new:
                self._on_alarm(alarm)


def monitor(
    model: nn.Module,
    *,
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    on_alarm: Callable[[Alarm], None] | str | None = None,
    every: int = 1,
) -> Monitor:
    """Watches the norms of `model` (rmsnorm_cuda.RMSNorm; see replace_rms_norm) while a `with` block runs.

    Every forward of the model is a step. For each norm it keeps how long the rows are that it is given (their RMS: least, mean,
    spread, most), how many are so short that eps decides, how many hold NaN or Inf, and how its weight grows: all from
    1 / rms, which the norm computes anyway, and without a second pass over the data. In training and inference, compiled
    or not: a compiled model is compiled anew on entering. On CUDA nothing waits; a fault is told a step later.

    Args:
        model: what is called. Where it is compiled, the compiled one.
        thresholds: what counts as a fault.
        on_alarm: a function to call with each :class:`Alarm`, or "raise" for :class:`RMSNormAlarm`; None: they are kept in
            ``.alarms``. Each kind is told once for each norm.
        every: look at every so-manieth step only.

        with rmsnorm_cuda.monitor(model) as m:
            train(model)
        m.report()
        m.plot("norms.png")
    """
    return Monitor(model, thresholds, on_alarm, every)


def heat_map(norms: list[str], steps: list[int], values: Tensor, alarms: list[tuple[int, str]]):
    """A figure of ``(steps, norms)`` values, a row for each norm, with a cross at each alarm (step, norm)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.18 * len(norms)), layout="constrained")
    axes = figure.add_subplot()
    edges = (-0.5, len(steps) - 0.5, len(norms) - 0.5, -0.5)
    figure.colorbar(axes.imshow(values.T.tolist(), aspect="auto", interpolation="nearest", extent=edges), label="log2 of the rows' RMS")
    marks = [(steps.index(step), norms.index(norm)) for step, norm in alarms if step in steps]
    if marks:
        axes.plot(*zip(*marks), "rx", label="alarm")
        axes.legend(loc="upper left")
    axes.set(xlabel="step", yticks=range(len(norms)), title="RMS of what each norm is given")
    axes.set_yticklabels(norms, fontsize=7)
    return figure


def _figures(rstd: Tensor, eps: Tensor) -> Tensor:
    """[norms, rows] of 1 / rms -> [norms, figures without weight]."""
    rows = rstd.shape[1]
    nan, inf = rstd.isnan(), rstd == 0
    squares = rstd.double().pow(-2) - eps
    small = squares < eps
    log2 = squares.clamp(min=1e-90).log2().div(2)
    usual = ~(nan | inf | small)
    count = usual.sum(1)
    least = torch.where(usual, log2, math.inf).amin(1)
    most = torch.where(usual, log2, -math.inf).amax(1)
    mean = torch.where(usual, log2, 0).sum(1) / count
    std = torch.where(usual, log2 - mean[:, None], 0).square().sum(1).div(count).sqrt()
    dead = torch.zeros(len(rstd), dtype=torch.bool, device=rstd.device)
    dead[1:] = ((rstd[1:] == rstd[:-1]) | (nan[1:] & nan[:-1])).all(1) & usual[1:].any(1)
    least, most = (torch.where(count > 0, t, math.nan) for t in (least, most))
    counts = (torch.full_like(count, rows), nan.sum(1), inf.sum(1), small.sum(1))
    return torch.stack([t.float() for t in (*counts, least, mean, std, most, dead)], 1)


def _spread(parts: list[Tensor], order: list[int], norms: int, device: torch.device) -> Tensor:
    """The parts' rows in their places; those of norms that were not called have 0 rows and are NaN otherwise."""
    figures = torch.full((norms, _WEIGHT), math.nan, device=device)
    figures[:, _ROWS] = 0
    if parts:
        figures[order] = torch.cat(parts)
    return figures


class _Seen:
    """Of a norm in this step. Assigning to it is all that a forward does for the monitor."""

    __slots__ = ("rstd", "dtype")

    def __init__(self) -> None:
        self.rstd, self.dtype = None, torch.float32


# A norm that is watched has a class that keeps its rstd. That is an assignment only, which torch.compile traces.


def _forward(self, x: Tensor, residual: Tensor | None = None):
    seen, weight = self._seen, self._parameters["weight"] if "weight" in self._parameters else self.weight
    seen.dtype = x.dtype
    if residual is None:
        args = x, self.normalized_shape or x.shape[-1:], weight, self.eps
        op, entry = _forward_op, _C.rms_norm_forward
    else:
        args = x, residual, weight, self.eps
        op, entry = _fused_op, _C.fused_add_rms_norm_forward
    results = NotImplemented if is_dynamo_compiling() else entry(*args, self.weight_offset, self.cast_before_weight)
    if results is NotImplemented:
        results = op(*args, weight_offset=self.weight_offset, cast_before_weight=self.cast_before_weight)
    seen.rstd = results[-1]
    return results[0] if residual is None else results[:2]


def _forward_in_weight_dtype(self, x: Tensor):
    if x.dtype != self.weight.dtype:  # done in two steps, which have no one rstd
        return _InWeightDtype.forward(self, x)
    return _forward(self, x)


_WATCHED: dict[type, type] = {}


def _watch(module: RMSNorm) -> None:
    cls = type(module)
    if hasattr(cls, "_original"):
        raise RuntimeError("monitor: this model is being monitored already")
    if cls not in _WATCHED:
        forward = _forward_in_weight_dtype if issubclass(cls, _InWeightDtype) else _forward
        body = {"forward": forward, "_original": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _WATCHED[cls] = type(cls.__name__, (cls,), body)
    module.__class__ = _WATCHED[cls]
    module._seen = _Seen()


def _unwatch(module: RMSNorm) -> None:
    module.__class__ = type(module)._original
    del module._seen


def _faulty_settings(model: nn.Module, norms: dict[str, RMSNorm]) -> list[Alarm]:
    """Norms whose eps or rounding is not what the model's config, its family in transformers, or the other norms say."""
    found, config = [], getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    written = {getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")} - {None}
    for name, module in norms.items():
        if written and module.eps not in written:
            found.append(Alarm(-1, name, "settings", f"eps is {module.eps}, and the model's config says {', '.join(map(str, sorted(written)))}"))
    ways = {name: (m.weight_offset, m.cast_before_weight) for name, m in norms.items() if m.weight is not None}
    known = _ways_of_the_family(model) or {way for way, n in Counter(ways.values()).items() if 2 * n > len(ways)}
    for name, way in ways.items():
        if known and way not in known:
            says = " or ".join(f"weight_offset={o}, cast_before_weight={c}" for o, c in sorted(known))
            found.append(Alarm(-1, name, "settings", f"it has weight_offset={way[0]}, cast_before_weight={way[1]}; its model has {says}"))
    return found


def _ways_of_the_family(model: nn.Module) -> set[tuple[float, bool]]:
    """How the RMSNorms round that transformers has for this kind of model; empty if that is not what it is."""
    from .integrations.families import recognize
    from .integrations.transformers import norm_classes

    ways = set()
    for module in {sys.modules[type(m).__module__] for m in model.modules() if "transformers.models" in type(m).__module__}:
        for cls in norm_classes(module).values():
            try:
                found = recognize(cls(64))
            except TypeError:  # it wants more to be built
                continue
            if not isinstance(found, str):
                ways.add((found.family.weight_offset, found.family.cast_before_weight))
    return ways
