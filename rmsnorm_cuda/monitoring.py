"""monitor(model): what the norms of a model see while it runs, from the 1 / rms of each row that they compute anyway."""

from __future__ import annotations

import copyreg
import functools
import math
import operator
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .again import is_a
from .functional import _C, is_dynamo_compiling
from .integrations.families import _InWeightDtype, _OfAnyWidth, called_with
from .modules import RMSNorm

_forward_op = torch.ops.rmsnorm_cuda.rms_norm_forward.default
_fused_op = torch.ops.rmsnorm_cuda.fused_add_rms_norm_forward.default


class Thresholds(NamedTuple):
    """What counts as a fault. Lengths of rows are their RMS; None switches a check off."""

    small: float | None = 0.5  # share of a norm's rows whose mean of squares is below eps (padding is): there eps decides, not the row
    drift: float | None = 8.0  # a norm's typical row is this many times as long as when it was first called, or as short
    headroom: float | None = 8.0  # the longest row is within this factor of the largest number of the input's dtype
    weight: float | None = 8.0  # a weight is this many times as large as at first
    non_finite: bool = True  # rows with NaN or Inf
    dead: bool = True  # what is between two norms adds nothing (compiled: not if it never did), or a weight is zero
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

    def __reduce__(self):  # an exception is built again from its message otherwise
        return type(self), (self.alarm,)


# Columns of a step's figures, one row for each norm.
_FIGURES = ("rows", "nan", "inf", "small", "least", "mean", "std", "most", "dead", "weight")
_ROWS, _NAN, _INF, _SMALL, _LEAST, _MEAN, _STD, _MOST, _DEAD, _WEIGHT = range(len(_FIGURES))


_KEPT_STEPS = 4096  # of more, every other one is let go of
_ROWS_TO_BE_SURE = 4  # so many rows are not as long as before by chance: one is, once in a million
_STEPS_TO_FIND_OUT = 3  # whose result a norm is given; in parts that call step() themselves it cannot be
_WEIGHTS_EVERY = 16  # steps: what is written past autograd, as load_state_dict() and .data do, is seen after so many


class _Thread(threading.local):
    """What the norms have told in this thread since its last step."""

    def __init__(self, room: int) -> None:
        self.calls: deque[tuple[int, Tensor, torch.dtype]] = deque(maxlen=room)
        self.depth = 0
        self.provenance: _Provenance | None = None


class _Watch:
    """By which a norm tells its monitor. In eager that is a list of the thread; torch.compile traces an assignment only."""

    __slots__ = ("index", "thread", "rstd", "dtype")

    def __init__(self, index: int, thread: _Thread) -> None:
        self.index, self.thread, self.rstd, self.dtype = index, thread, None, torch.float32

    def saw(self, x: Tensor, output: Tensor, rstd: Tensor) -> None:
        if self.thread.provenance is not None:
            self.thread.provenance.normed(self.index, x, output)
        if type(rstd) is not Tensor:
            rstd = rstd.to_local() if hasattr(rstd, "to_local") else None
        if rstd is None or rstd.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(rstd):
            return  # there is nothing in it
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed layer, once more
        self.thread.calls.append((self.index, rstd, x.dtype))


class _Provenance(TorchDispatchMode):
    """Finds out, while one forward runs, which norms' results are in what each norm is given.

    Two norms see rows of one length where what is between them adds nothing, and also where both are given the same by design:
    parallel branches, a context that each layer norms anew. Then the result of the one is not in what the other is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.within: dict[int, int] = {}  # memory: a bit for each norm whose result is in it
        self.given: dict[int, int] = {}  # norm: the same of what it was given

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read, written = _memory((args, kwargs)), _memory(result)
        bits = functools.reduce(operator.or_, (self.within.get(memory, 0) for memory in read), 0)
        for memory in written - read:  # new, or somebody's that is free again
            self.within[memory] = bits
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = [*zip(schema.arguments, args), *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs)]
            written |= _memory([value for a, value in named if a.alias_info is not None and a.alias_info.is_write])
        for memory in written & read:
            self.within[memory] = self.within.get(memory, 0) | bits
        return result

    def normed(self, norm: int, x: Tensor, output: Tensor) -> None:
        bits = functools.reduce(operator.or_, (self.within.get(memory, 0) for memory in _memory(x)), 0)
        self.given[norm] = self.given.get(norm, 0) | bits
        self.within.update(dict.fromkeys(_memory(output), bits | 1 << norm))


def _memory(tensors: object) -> set[int]:
    """The storages of all tensors in it; a tensor that has none stands for itself."""
    found = set()
    for tensor in torch.utils._pytree.tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            try:
                found.add(tensor.untyped_storage()._cdata)
            except Exception:
                found.add(id(tensor))
    return found


class _Step(NamedTuple):
    number: int
    figures: Tensor  # [norms, figures]
    dtypes: dict[int, torch.dtype]  # of what the norms were given
    before: dict[int, int]  # the norm that a norm's rows were compared with
    compiled: set[int]
    copied: torch.cuda.Event | None  # figures are there when this has happened


class Monitor:
    """What was seen: `alarms`, `skipped`, `figures()`, `report()`, `plot()`. Made by monitor()."""

    def __init__(self, model: nn.Module, thresholds: Thresholds, on_alarm: Callable[[Alarm], None] | str | None, every: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor: expected a torch.nn.Module, got {type(model).__name__}")
        if on_alarm not in (None, "raise") and not callable(on_alarm):
            raise TypeError(f"monitor: expected on_alarm to be 'raise', a function or None, got {on_alarm!r}")
        if every < 1:
            raise ValueError(f"monitor: expected every to be positive, but got {every}")
        self.model, self.thresholds, self.alarms = model, thresholds, []
        self.norms: dict[str, RMSNorm] = {}
        self.skipped: dict[str, str] = {}  # norms that are not watched, and why
        for name, module in model.named_modules():
            if is_a(module, RMSNorm):
                reason = _reason_to_skip(module)
                (self.skipped if reason else self.norms)[name.removeprefix("_orig_mod.")] = reason or module
        if not self.norms:
            raise ValueError(
                "monitor: the model holds no rmsnorm_cuda.RMSNorm that can be watched; "
                + ("; ".join(sorted(set(self.skipped.values()))) or "call replace_rms_norm(model) first")
            )
        self._list = list(self.norms.values())
        self._eps, self._shapes = [m.eps for m in self._list], [m.normalized_shape for m in self._list]
        self._on_alarm, self._every = on_alarm, every
        self._thread = _Thread(64 * len(self._list))
        self._watches = [_Watch(i, self._thread) for i in range(len(self._list))]
        self._lock = threading.RLock()  # threads serve at once; each has steps of its own
        self._calls, self._training = 0, False
        self._steps: list[tuple[int, Tensor]] = []  # (step, [norms, figures] on the CPU)
        self._first = torch.full((len(self._list), len(_FIGURES)), math.nan, dtype=torch.float32, device="cpu")
        self._first_is_open = True
        self._equal = torch.zeros(len(self._list), dtype=torch.float32, device="cpu")  # rows in turn as long as in the norm before
        self._alike: set[int] = set()  # compiled norms that were so from the beginning
        self._given: dict[int, int] = {}  # a bit for each norm whose result is in what a norm is given, once that was asked
        self._asked: Counter[int] = Counter()  # norms of which it is to be found out, and for how many steps
        self._before: dict[int, int] = {}
        self._coming: _Step | None = None
        self._weights: tuple[int, tuple, Tensor] | None = None  # step, versions, sizes
        self._constants: dict[tuple, Tensor] = {}
        self._raised: set[tuple[str, str]] = set()
        self._undo = ExitStack()

    def __enter__(self) -> Monitor:
        if self.thresholds.settings:
            self._tell(_faulty_settings(self.model, self.norms))
        with ExitStack() as undo:
            for module, watch in zip(self._list, self._watches, strict=True):
                _start(module, watch)
                undo.callback(_stop, module)
            for module in _entries(self.model, self._list):
                # Not hooks: what Ctrl-C ends calls none of them, and module.compile() would compile them with it.
                compiled = module._compiled_call_impl
                module._compiled_call_impl = self._stepping(module._call_impl if compiled is None else compiled)
                undo.callback(setattr, module, "_compiled_call_impl", compiled)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind, *_) -> None:
        with self._undo:
            self._finish(may_raise=kind is None)

    def step(self) -> None:
        """Ends a step of this thread. Called by itself after each forward of the model, or of that part of it that holds all
        norms; only what calls smaller parts needs to."""
        self._thread.depth = 0
        self._training = torch.is_grad_enabled()
        with torch.no_grad():
            self._step()

    def _stepping(self, forward: Callable) -> Callable:
        def call(*args, **kwargs):
            if is_dynamo_compiling():  # somebody compiles more than the model, and has to call step()
                return forward(*args, **kwargs)
            thread = self._thread
            thread.depth += 1
            try:
                with self._provenance() if self._asked else nullcontext():
                    return forward(*args, **kwargs)
            finally:
                thread.depth -= 1
                if thread.depth <= 0:
                    self.step()

        return call

    @contextmanager
    def _provenance(self) -> Iterator[None]:
        thread = self._thread
        if thread.provenance is not None:
            yield
            return
        thread.provenance = _Provenance()
        try:
            with thread.provenance:
                yield
            with self._lock:
                self._given.update(thread.provenance.given)
                self._asked = Counter({norm: steps for norm, steps in self._asked.items() if norm not in self._given})
        finally:
            thread.provenance = None

    def _step(self) -> None:
        thread = self._thread
        calls = list(thread.calls)
        thread.calls.clear()
        compiled = set()
        for watch in self._watches:
            if watch.rstd is not None:
                (rstd, watch.rstd), dtype = (watch.rstd, None), watch.dtype
                calls.append((watch.index, rstd.to_local() if hasattr(rstd, "to_local") else rstd, dtype))
                compiled.add(watch.index)
        with self._lock:
            step, self._calls = self._calls, self._calls + 1
            if not calls or step % self._every:
                return
            self._finish()
            seen: dict[int, Tensor] = {}
            for i, rstd, *_ in calls:
                seen[i] = torch.cat([seen[i].reshape(-1), rstd.reshape(-1)]) if i in seen else rstd
            figures = self._figures(seen, step)
            dtypes = {i: dtype for i, _, dtype in calls}
            copied = None
            if figures.is_cuda:  # read in the next step, when it has long been copied
                there = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True)
                there.copy_(figures, non_blocking=True)
                copied, figures = torch.cuda.current_stream(figures.device).record_event(), there
            self._coming = _Step(step, figures, dtypes, self._before, compiled, copied)
            if copied is None:
                self._finish()

    def _figures(self, seen: dict[int, Tensor], step: int) -> Tensor:
        """[norms, figures] on the device of the first norm."""
        device = next(iter(seen.values())).device
        groups: dict[tuple, list[int]] = {}  # what has as many rows of one width is looked at together
        for i, rstd in seen.items():
            groups.setdefault((rstd.shape, rstd.dtype, rstd.device, self._shapes[i]), []).append(i)
        parts, order, self._before = [], [], {}
        for (shape, dtype, there, _), members in groups.items():
            if rows := shape.numel():
                order += members
                self._before |= dict(zip(members[1:], members))
                rstd = torch.stack([seen[i] for i in members]).reshape(len(members), rows)
                parts.append(_figures(rstd, self._eps_of(members, dtype, there)).to(device))
        figures = torch.cat(parts) if parts else torch.empty(0, _WEIGHT, dtype=torch.float32, device=device)
        count = len(self._list)
        if order != list(range(count)):  # the others have 0 rows, and are NaN otherwise
            spread = torch.full((count, _WEIGHT), math.nan, dtype=torch.float32, device=device)
            spread[:, _ROWS] = 0
            figures = spread.index_copy_(0, self._constant(("order", *order), order, torch.int64, device), figures)
        return torch.cat([figures, self._weight_sizes(device, step)[:, None]], 1)

    def _constant(self, key: tuple, values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of the values, made once: to bring them to a GPU takes a while."""
        if (key, device) not in self._constants:
            if len(self._constants) >= 64:
                self._constants.clear()
            self._constants[key, device] = torch.tensor(values, dtype=dtype, device=device)
        return self._constants[key, device]

    def _eps_of(self, members: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        eps = [[torch.finfo(dtype).eps if self._eps[i] is None else self._eps[i]] for i in members]
        return self._constant(("eps", dtype, *members), eps, torch.float64, device)

    def _weight_sizes(self, device: torch.device, step: int) -> Tensor:
        """RMS of weight + offset."""
        late = self._weights is None or step - self._weights[0] >= _WEIGHTS_EVERY
        if not (late or self._training):
            return self._weights[2]
        weights = [m._parameters["weight"] if "weight" in m._parameters else m.weight for m in self._list]
        versions = tuple(None if w is None or w.is_inference() else (id(w), w._version) for w in weights)
        if late or self._weights[1] != versions:
            plain = {i: w.to_local() if hasattr(w, "to_local") else w for i, w in enumerate(weights) if w is not None}
            plain = {i: w.detach().float() + o if (o := self._list[i].weight_offset) else w.detach() for i, w in plain.items() if w.numel() and not w.is_meta}
            sizes = [torch.full((), math.nan, dtype=torch.float32, device=device)] * len(weights)
            if plain:
                norms = torch._foreach_norm(list(plain.values()), 2, dtype=torch.float32)
                for i, size in zip(plain, torch._foreach_div(norms, [w.numel() ** 0.5 for w in plain.values()]), strict=True):
                    sizes[i] = size.to(device)
            self._weights = step, versions, torch.stack(sizes)
        return self._weights[2]

    def figures(self) -> Tensor:
        """``(steps, norms, figures)`` in fp32, steps and norms as in `.steps` and `.norms`. Figures are: rows; how many of them
        have NaN, have Inf, and are shorter than eps; log2 of the RMS of the rest, least, mean, standard deviation and most;
        1 if every row is as long as in the norm before; RMS of the weight. NaN: not seen in that step. Of a long run some
        thousand steps are kept: the latest, those with alarms, and ever fewer of the earlier ones."""
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
            usual = f[f[:, _MEAN].isfinite()] if f[:, _MEAN].isfinite().any() else f  # some rows that are no NaN, Inf, or small
            least, first, last, most = (2.0 ** v.item() for v in (usual[:, _LEAST].min(), usual[0, _MEAN], usual[-1, _MEAN], usual[:, _MOST].max()))
            counts = [int(f[:, k].sum()) for k in (_SMALL, _NAN, _INF)]
            grown = (f[-1, _WEIGHT] / f[0, _WEIGHT]).item()
            lines.append(
                f"{name:<44}{rows:>10}{least:>10.3g}{first:>10.3g}{last:>10.3g}{most:>10.3g}{counts[0] / rows:>8.1%}{counts[1]:>8}"
                f"{counts[2]:>8}" + (f"{'x %.3g' % grown:>9}" if math.isfinite(grown) else f"{'-':>9}")
            )
        lines += [f"{name}: not watched: {reason}" for name, reason in self.skipped.items()]
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

    def _finish(self, may_raise: bool = True) -> None:
        """Takes in the figures that were on their way, and looks for faults."""
        with self._lock:
            if self._coming is None:
                return
            step, self._coming = self._coming, None
            if step.copied is not None:
                step.copied.synchronize()
                step = step._replace(figures=step.figures.clone())  # pinned memory is for the next
            if self._first_is_open:
                self._first = torch.where(self._first.isnan(), step.figures, self._first)
                self._first_is_open = bool(self._first[:, [_MEAN, _WEIGHT]].isnan().any())
            self._steps.append((step.number, step.figures))
            alarms = self._faults(step)
            self._tell(alarms, may_raise)
            if len(self._steps) > _KEPT_STEPS:
                marked = {alarm.step for alarm in self.alarms}
                self._steps = [s for i, s in enumerate(self._steps) if i % 2 == 0 or s[0] in marked]

    def _faults(self, step: _Step) -> list[Alarm]:
        limits, names, first, f, rows = self.thresholds, list(self.norms), self._first, step.figures, step.figures[:, _ROWS]
        checks = []  # (what is true of a norm, kind, message of norm i)
        if limits.non_finite:
            checks.append((f[:, _NAN] > 0, "non_finite", lambda i: f"NaN in {int(f[i, _NAN])} of {int(rows[i])} rows"))
            overflows = "Inf in {} of {} rows: what comes before it overflows"
            checks.append((f[:, _INF] > 0, "non_finite", lambda i: overflows.format(int(f[i, _INF]), int(rows[i]))))
        if limits.small is not None:
            small = "the mean of squares of {:.0%} of the rows is below eps={}, which decides there"
            checks.append((f[:, _SMALL] > limits.small * rows, "small", lambda i: small.format(f[i, _SMALL] / rows[i], self._eps[i])))
        if limits.drift is not None:
            away = f[:, _MEAN] - first[:, _MEAN]
            drifts = "rows are {:.3g} times as long as in the first step"
            checks.append((away.abs() > math.log2(limits.drift), "drift", lambda i: drifts.format(2 ** away[i].item())))
        if limits.headroom is not None:
            dtypes = [step.dtypes.get(i, torch.float32) for i in range(len(names))]
            largest = [math.log2(torch.finfo(dtype).max / limits.headroom) for dtype in dtypes]
            room = self._constant(("room", *dtypes), largest, torch.float32, torch.device("cpu"))
            near = "a row has RMS {:.3g}, near the largest number of {}"
            checks.append((f[:, _MOST] > room, "headroom", lambda i: near.format(2 ** f[i, _MOST].item(), dtypes[i])))
        if limits.weight is not None:
            grown = f[:, _WEIGHT] / first[:, _WEIGHT]
            grows = "the weight is {:.3g} times as large as in the first step"
            checks.append((grown > limits.weight, "weight", lambda i: grows.format(grown[i])))
        if limits.dead:
            equal = f[:, _DEAD] > 0
            if len(self._steps) == 1:
                self._alike = {i for i in step.compiled if equal[i]}
            unsure = []
            for i in equal.nonzero().flatten().tolist():
                if i in step.compiled:
                    equal[i] = i not in self._alike
                elif i in self._given:
                    equal[i] = bool(self._given[i] >> step.before[i] & 1)
                elif self._asked[i] < _STEPS_TO_FIND_OUT:
                    self._asked[i] += 1
                    unsure.append(i)
            self._equal = torch.where(equal, self._equal + rows, 0)
            adds_nothing = "its rows are exactly as long as in the norm before: what is between adds nothing"
            is_dead = self._equal >= _ROWS_TO_BE_SURE
            is_dead[unsure] = False
            checks.append((is_dead, "dead", lambda i: adds_nothing))
            checks.append((f[:, _WEIGHT] == 0, "dead", lambda i: "its weight is zero"))
        if not checks:
            return []
        where = torch.stack([mask for mask, *_ in checks], 1).nonzero().tolist()  # where it comes first is told first
        return [Alarm(step.number, names[i], checks[k][1], checks[k][2](i)) for i, k in where]

    def _tell(self, alarms: list[Alarm], may_raise: bool = True) -> None:
        """Each kind of each norm once."""
        new = [a for a in alarms if (a.norm, a.kind) not in self._raised]
        self._raised.update((a.norm, a.kind) for a in new)
        self.alarms += new
        if callable(self._on_alarm):
            with ExitStack() as stack:  # each is called, also if one raises
                for alarm in reversed(new):
                    stack.callback(self._on_alarm, alarm)
        elif new and self._on_alarm == "raise" and may_raise:
            raise RMSNormAlarm(new[0])


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
    or not: a compiled model is compiled anew on entering, its norms as ops whatever `config.decompose` says. On CUDA nothing
    waits; a fault is told a step later. Threads may call the model at once, each has steps of its own; a compiled model one
    at a time. Norms of classes with a forward of their own are in ``.skipped``. A copy of the model made meanwhile is not watched.

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
    squares = rstd.double().pow(-2) - eps
    small = squares < eps
    usual = (squares >= eps) & (squares < math.inf)
    nan, inf, small, count = torch.stack([rstd.isnan(), rstd == 0, small, usual]).sum(2, dtype=torch.float64)
    dead = (rstd[1:] == rstd[:-1]).all(1)
    log2 = squares.clamp(min=1e-90).log2().div(2)
    if not rstd.is_cuda and usual.all():  # as nearly always; on a GPU it would have to be waited for
        least, most = log2.aminmax(dim=1)
        std, mean = torch.std_mean(log2, 1, correction=0)
    else:
        least = torch.where(usual, log2, math.inf).amin(1)
        most = torch.where(usual, log2, -math.inf).amax(1)
        mean = torch.where(usual, log2, 0).sum(1) / count
        std = torch.where(usual, log2 - mean[:, None], 0).square().sum(1).div(count).sqrt()
        least, most = (torch.where(count > 0, t, math.nan) for t in (least, most))
        dead &= usual[1:].any(1)
    rows = torch.full_like(count, rstd.shape[1])
    dead = nn.functional.pad(dead.double(), (1, 0))
    return torch.stack([rows, nan, inf, small, least, mean, std, most, dead], 1).float()


def _entries(model: nn.Module, norms: list[RMSNorm]) -> list[nn.Module]:
    """Where a forward begins: the model, and what is in it and still holds all norms, as generate() calls it."""
    entries, held = [model], set(norms)
    while entries[-1]._compiled_call_impl is None and type(entries[-1]).__name__ != "OptimizedModule":
        inner = [child for child in entries[-1].children() if held <= set(child.modules())]
        if len(inner) != 1 or inner[0] in held:
            break
        entries.append(inner[0])
    return entries


# A norm that is watched has a class that tells its rstd.


def _forward(self, x: Tensor, residual: Tensor | None = None):
    watch = self._watch
    if watch is None:  # FSDP made a class of ours while it was watched, and it is not any more
        return self._original.forward(self, x) if residual is None else self._original.forward(self, x, residual)
    weight = self._parameters["weight"] if "weight" in self._parameters else self.weight
    if residual is None:
        args = x, self.normalized_shape or x.shape[-1:], weight, self.eps
        op, entry = _forward_op, _C.rms_norm_forward
    else:
        self._check_residual(x, weight)
        args = x, residual, weight, self.eps
        op, entry = _fused_op, _C.fused_add_rms_norm_forward
    compiling = is_dynamo_compiling()
    results = NotImplemented if compiling else entry(*args, self.weight_offset, self.cast_before_weight)
    if results is NotImplemented:
        results = op(*args, weight_offset=self.weight_offset, cast_before_weight=self.cast_before_weight)
    given = x if residual is None else results[1]
    if compiling:
        watch.rstd, watch.dtype = results[-1], given.dtype
    else:
        watch.saw(given, results[0], results[-1])
    return results[0] if residual is None else results[:2]


def _forward_in_weight_dtype(self, x: Tensor):
    if x.dtype != self.weight.dtype:  # done in two steps, which have no one rstd
        return _InWeightDtype.forward(self, x)
    return _forward(self, x)


def _new(cls: type) -> RMSNorm:
    return cls.__new__(cls)


def _reduce_ex(self, protocol):
    """A copy is of the original class."""
    function, arguments, state, *rest = self._original.__reduce_ex__(self, max(protocol, 2))
    state = {key: value for key, value in state.items() if key != "_watch"}
    function = _new if function is copyreg.__newobj__ else function  # which asks for its argument's class
    return function, tuple(self._original if argument is type(self) else argument for argument in arguments), state, *rest


# By code, which the classes of an earlier import of the package have as well.
_FORWARDS = {
    RMSNorm.forward.__code__: _forward,
    _OfAnyWidth.forward.__code__: _forward,
    _InWeightDtype.forward.__code__: _forward_in_weight_dtype,
}
_WATCHED: dict[type, type] = {}


def _computes(cls: type) -> type:
    """The class whose forward this is; a twin's is the same by another name of its input."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return vars(owner).get("_computes", cls)


def _reason_to_skip(module: RMSNorm) -> str:
    if "forward" in vars(module):
        return "its forward was replaced on this instance (accelerate hooks, kernels, ...)"
    if getattr(module, "_watch", None) is not None:
        return ""  # _start() tells that it is being watched
    known = (*_FORWARDS, *(forward.__code__ for forward in _FORWARDS.values()))
    if getattr(_computes(type(module)).forward, "__code__", None) not in known:
        return f"{type(module).__name__} has a forward of its own"
    return ""


def _start(module: RMSNorm, watch: _Watch) -> None:
    cls = type(module)
    if getattr(module, "_watch", None) is not None:
        raise RuntimeError("monitor: this model is being monitored already")
    if hasattr(cls, "_watch"):  # FSDP's
        module._watch = watch
        return
    if cls not in _WATCHED:
        forward = called_with(_FORWARDS[_computes(cls).forward.__code__], cls.forward)
        body = {"forward": forward, "_original": cls, "_watch": None, "__reduce_ex__": _reduce_ex}
        _WATCHED[cls] = type(cls.__name__, (cls,), body | {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    module.__class__ = _WATCHED[cls]
    module._watch = watch


def _stop(module: RMSNorm) -> None:
    vars(module).pop("_watch", None)
    if "_original" in vars(type(module)):
        module.__class__ = type(module)._original


def _faulty_settings(model: nn.Module, norms: dict[str, RMSNorm]) -> list[Alarm]:
    """Norms whose eps or rounding is not what the model's config, its family in transformers, or the other norms say."""
    found, parts = [], _parts(model, norms)
    alike: dict[tuple, list[float | None]] = {}  # the eps of norms of one name in a part: in all its layers
    for name, module in norms.items():
        alike.setdefault((parts[name][0], name.rpartition(".")[2]), []).append(module.eps)
    for name, module in norms.items():
        part, config = parts[name]
        written = {getattr(config, key, None) for key in _EPS_OF_CONFIGS} - {None}
        hidden = getattr(config, "hidden_size", None)
        says, others = written, alike[part, name.rpartition(".")[2]]
        if not written or (hidden is not None and module.normalized_shape != (hidden,)):  # DeepSeek's inner norms do not heed the config
            usual, count = Counter(others).most_common(1)[0]
            says = {usual} if 2 * count > len(others) else {module.eps}
        if module.eps not in says:
            where = "the model's config says" if says is written else "that of the other layers is"
            found.append(Alarm(-1, name, "settings", f"eps is {module.eps}, and {where} {', '.join(map(str, sorted(says, key=str)))}"))
    ways = {name: (m.weight_offset, m.cast_before_weight) for name, m in norms.items() if m.weight is not None}
    known = _ways_of_the_family(model) or {way for way, n in Counter(ways.values()).items() if 2 * n > len(ways)}
    for name, way in ways.items():
        if known and way not in known:
            says = " or ".join(f"weight_offset={o}, cast_before_weight={c}" for o, c in sorted(known))
            found.append(Alarm(-1, name, "settings", f"it has weight_offset={way[0]}, cast_before_weight={way[1]}; its model has {says}"))
    return found


_EPS_OF_CONFIGS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def _parts(model: nn.Module, norms: dict[str, RMSNorm]) -> dict[str, tuple[int, object]]:
    """For each norm the part of the model that it is in, and that part's config: the text, the images, what is between them."""
    configs = {name.removeprefix("_orig_mod."): m.config for name, m in model.named_modules() if getattr(m, "config", None) is not None}
    parts = {}
    for name in norms:
        part = max((p for p in configs if not p or name.startswith(f"{p}.")), key=len, default="")
        config = configs.get(part)
        text = getattr(config, "text_config", config)
        parts[name] = id(text), text
    return parts


def _ways_of_the_family(model: nn.Module) -> set[tuple[float, bool]]:
    """How the RMSNorms round that transformers has for this kind of model; empty if that is not what it is."""
    from .integrations.transformers import norm_classes

    modules = {sys.modules[type(m).__module__] for m in model.modules() if "transformers.models" in type(m).__module__}
    ways = {_way_of(cls) for module in modules for cls in norm_classes(module).values()}
    return {way for way in ways if way is not None}


@functools.cache
def _way_of(cls: type[nn.Module]) -> tuple[float, bool] | None:
    from .integrations.recognize import recognize

    try:
        found = recognize(cls(64))
    except Exception:  # it wants something else to be built
        return None
    return None if isinstance(found, str) else (found.family.weight_offset, found.family.cast_before_weight)
