"""monitor(model): watches the 1 / rms of each row, which the norms of a model compute anyway."""

from __future__ import annotations

import copyreg
import functools
import operator
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C
from ..again import is_a
from ..integrations import families
from ..integrations.families import RMSNormInWeightDtype, computing_class
from ..modules import RMSNorm, RMSNormGated
from .figures import EQUAL, MEAN, ROWS, Call, History, Meter, Step
from .report import Alarm, OnAlarm, RMSNormAlarm, Thresholds, find_faults, heat_map, table
from .signals import scalars, sender


class Monitor:
    """Watches the norms of `model` (rmsnorm_cuda.RMSNorm; see replace_rms_norm) in a `with` block.

    Every forward of the model is a step. For each norm it keeps how long the rows are that it is
    given (their RMS: least, mean, spread, most), how many are so short that eps decides, how many
    hold NaN or Inf, and how its weight grows. All this comes from 1 / rms, which the norm computes
    anyway, without a second pass over the data.

    It works in training and inference, compiled or not. A compiled model is compiled anew on
    entering, its norms as ops whatever `config.decompose` says. On CUDA nothing waits; a fault is
    told a step later. Threads may call the model at once, each has steps of its own; a compiled
    model one at a time. Norms of classes with a forward of their own are in ``.skipped``. A copy of
    the model made meanwhile is not watched. What was seen is in ``.alarms`` and `figures()`.

    Args:
        model: what is called. Where it is compiled, the compiled one.
        thresholds: what counts as a fault.
        on_alarm: a function to call with each :class:`Alarm`, or "raise" for
            :class:`RMSNormAlarm`; None: they are kept in ``.alarms``. Each kind is told once for
            each norm.
        every: 3 looks at each third step only.

        with rmsnorm_cuda.monitor(model) as m:
            train(model)
        m.report()
        m.plot("norms.png")
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        thresholds: Thresholds = Thresholds(),  # noqa: B008
        on_alarm: OnAlarm = None,
        every: int = 1,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor: expected a torch.nn.Module, got {type(model).__name__}")
        if on_alarm not in (None, "raise") and not callable(on_alarm):
            expected = "expected on_alarm to be 'raise', a function or None"
            raise TypeError(f"monitor: {expected}, got {on_alarm!r}")
        if every < 1:
            raise ValueError(f"monitor: expected every to be positive, but got {every}")
        self.model, self.thresholds = model, thresholds
        self.alarms: list[Alarm] = []
        self._faulty_steps: Counter[tuple[str, str]] = Counter()  # by norm and kind
        self.norms: dict[str, RMSNorm] = {}
        self.skipped: dict[str, str] = {}  # norms that are not watched, and why
        for name, module in model.named_modules():
            if is_a(module, RMSNorm):
                reason = _reason_to_skip(module)
                kept = self.skipped if reason else self.norms
                kept[name.removeprefix("_orig_mod.")] = reason or module
            elif is_a(module, RMSNormGated):
                self.skipped[name.removeprefix("_orig_mod.")] = "norms with a gate are not watched"
        if not self.norms:
            reasons = sorted({*self.skipped.values()}) or ["call replace_rms_norm(model) first"]
            what = "the model holds no rmsnorm_cuda.RMSNorm that can be watched"
            raise ValueError(f"monitor: {what}; {'; '.join(reasons)}")
        norms = list(self.norms.values())
        self._thread = _Thread(64 * len(norms))  # a bound where nothing ends a step
        self._watches = [_Watch(i, self._thread) for i in range(len(norms))]
        self._meter, self._history = Meter(norms), History(len(norms))
        self._dead_layers = _DeadLayers(len(norms))
        self._on_alarm, self._every, self._step_count = on_alarm, every, 0
        self._pending: Step | None = None  # its figures are on their way to the CPU
        self._lock = threading.RLock()  # threads serve at once; each has steps of its own
        self._undo = ExitStack()

    @property
    def steps(self) -> list[int]:
        return [number for number, _ in self._history.steps]

    def figures(self) -> Tensor:
        """``(steps, norms, figures)`` in fp32, steps and norms as in `.steps` and `.norms`.

        Figures are: rows; how many of them have NaN, have Inf, and are shorter than eps; log2 of
        the RMS of the rest, least, mean, standard deviation, most, median and 99th percentile; 1 if
        every row is as long as in the norm before; RMS of the weight. NaN: not seen in that step.
        Of a long run some thousand steps are kept: the latest, those with alarms, and ever fewer of
        the earlier ones.
        """
        return self._history.figures()

    def scalars(self) -> dict[str, float]:
        """What monitoring.SIGNALS lists, as "rmsnorm_row_rms_0.5/layers.0.norm": 1.25.

        Names and units are stable. Gauges are those of the latest step that a norm was called in,
        counters of all steps. Left out are alarms that were not raised, and what never had a value,
        as the growth of a weight that is not there.
        """
        return scalars(self)

    def log(self, to: object, step: int | None = None) -> dict[str, float]:
        """Sends `scalars()`, and returns them.

        Args:
            to: a SummaryWriter of TensorBoard, a run of W&B or `wandb`, `mlflow`, a logger of
                Lightning, or a function of (step, dict).
            step: what they are logged as; None: the monitor's latest step.
        """
        values = scalars(self)
        if values:
            sender(to)(max(self._step_count - 1, 0) if step is None else step, values)
        return values

    def report(self) -> str:
        """A table of all norms and what was found in them; also printed."""
        text = table(self.norms, self.skipped, self.figures(), self.alarms)
        print(text)
        return text

    def plot(self, path: str | None = None):
        """A heat map, norms by steps, of the typical RMS of rows, alarms marked.

        Saved to `path` if given; returns the figure. Needs matplotlib.
        """
        alarms = [(a.step, a.norm) for a in self.alarms]
        figure = heat_map(list(self.norms), self.steps, self.figures()[:, :, MEAN], alarms)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __enter__(self) -> Monitor:
        if self.thresholds.settings:
            args = self.model, self.norms
            faults = *_faulty_eps(*args), *_faulty_rounding(*args)
            self._add_alarms([Alarm(-1, name, "settings", message) for name, message in faults])
        with ExitStack() as undo:
            for norm, watch in zip(self.norms.values(), self._watches):
                _put_on(norm, watch)
                undo.callback(_take_off, norm)
            for module in list(_entries(self.model, set(self.norms.values()))):
                # Not hooks: what Ctrl-C ends calls none of them, and module.compile() would
                # compile them with it.
                compiled = module._compiled_call_impl
                forward = module._call_impl if compiled is None else compiled
                module._compiled_call_impl = self._with_step(forward)
                undo.callback(setattr, module, "_compiled_call_impl", compiled)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind, *_) -> None:
        with self._undo:
            self._finish(may_raise=kind is None)

    def step(self) -> None:
        """Ends a step of this thread.

        Each forward of the model ends one, or of that part of it that holds all norms. So only
        what calls smaller parts needs this.
        """
        self._thread.depth = 0
        training = torch.is_grad_enabled()
        with torch.no_grad(), self._lock:
            calls = self._take_calls()
            number, self._step_count = self._step_count, self._step_count + 1
            if not calls or number % self._every:
                return
            self._finish()
            self._pending = self._meter.measure(number, calls, training)
            if self._pending.copied is None:
                self._finish()

    def _take_calls(self) -> list[Call]:
        """The calls of this thread since they were taken last."""
        calls = [*self._thread.calls]
        self._thread.calls.clear()
        for watch in self._watches:
            if watch.rstd is not None:
                rstd, watch.rstd = watch.rstd, None
                rstd = rstd.to_local() if hasattr(rstd, "to_local") else rstd
                calls.append((watch.index, rstd, watch.dtype, True))
        return calls

    def _with_step(self, forward: Callable) -> Callable:
        """`forward`, whose outermost call ends a step."""
        thread = self._thread

        def call(*args, **kwargs):
            if is_dynamo_compiling():  # whoever compiles more than the model calls step()
                return forward(*args, **kwargs)
            thread.depth += 1
            try:
                with self._dead_layers.traced(thread):
                    return forward(*args, **kwargs)
            finally:
                thread.depth -= 1
                if thread.depth <= 0:
                    self.step()

        return call

    def _finish(self, may_raise: bool = True) -> None:
        """Takes in the figures that were on their way, and looks for faults."""
        with self._lock:
            if self._pending is None:
                return
            step, self._pending = self._pending, None
            step = step.on_cpu()
            self._history.add(step)
            dead = self._dead_layers.find(step) if self.thresholds.dead else None
            faults = find_faults(step, self._history.first, dead, self.norms, self.thresholds)
            self._add_alarms(faults, may_raise)
            self._history.thin(alarm.step for alarm in self.alarms)

    def _add_alarms(self, alarms: list[Alarm], may_raise: bool = True) -> None:
        """Keeps those that are new, one of a kind for each norm, and does what on_alarm says."""
        self._faulty_steps.update({(alarm.norm, alarm.kind) for alarm in alarms})
        known = {(alarm.norm, alarm.kind) for alarm in self.alarms}
        new = [alarm for alarm in alarms if (alarm.norm, alarm.kind) not in known]
        self.alarms += new
        if callable(self._on_alarm):
            with ExitStack() as stack:  # calls each one, also if one raises
                for alarm in reversed(new):
                    stack.callback(self._on_alarm, alarm)
        elif new and self._on_alarm == "raise" and may_raise:
            raise RMSNormAlarm(new[0])


monitor = Monitor  # what a user calls


class _Thread(threading.local):
    """What the norms of this thread computed since its last step."""

    def __init__(self, max_calls: int) -> None:
        self.calls: deque[Call] = deque(maxlen=max_calls)
        self.depth = 0  # of forwards in forwards
        self.trace: _Trace | None = None


class _Watch:
    """Takes the 1 / rms of a norm's rows.

    In eager that goes to a list of the thread. Compiled it stays here until the step ends: a graph
    can assign, not append.
    """

    __slots__ = ("index", "thread", "rstd", "dtype")

    def __init__(self, index: int, thread: _Thread) -> None:
        self.index, self.thread, self.rstd, self.dtype = index, thread, None, torch.float32

    def record(self, x: Tensor, output: Tensor, rstd: Tensor) -> None:
        if self.thread.trace is not None:
            self.thread.trace.normed(self.index, x, output)
        if type(rstd) is not Tensor:
            rstd = rstd.to_local() if hasattr(rstd, "to_local") else None
        if rstd is None or rstd.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(rstd):
            return  # it has no values
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed layer runs again, in the backward
        self.thread.calls.append((self.index, rstd, x.dtype, False))


class _Trace(TorchDispatchMode):
    """Finds out, while one forward runs, which norms' results are in what each norm is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, int] = {}  # norm: a bit for each norm whose result is in its input
        self._held: dict[int, int] = {}  # memory: the same of what it holds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read, written = _memory((args, kwargs)), _memory(result)
        bits = self._held_by(read)
        for memory in written - read:  # new, or freed by somebody and used again
            self._held[memory] = bits
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = [*zip(schema.arguments, args)]
            named += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
            written |= _memory([v for a, v in named if a.alias_info and a.alias_info.is_write])
        for memory in written & read:
            self._held[memory] = self._held.get(memory, 0) | bits
        return result

    def normed(self, norm: int, x: Tensor, output: Tensor) -> None:
        bits = self._held_by(_memory(x))
        self.sources[norm] = self.sources.get(norm, 0) | bits
        self._held.update(dict.fromkeys(_memory(output), bits | 1 << norm))

    def _held_by(self, memory: set[int]) -> int:
        return functools.reduce(operator.or_, (self._held.get(m, 0) for m in memory), 0)


def _memory(tensors: object) -> set[int]:
    """The storages of all tensors in it; a tensor without one stands for itself."""
    memory = set()
    for tensor in torch.utils._pytree.tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            try:
                memory.add(tensor.untyped_storage()._cdata)
            except Exception:
                memory.add(id(tensor))
    return memory


_ROWS_TO_BE_SURE = 4  # one row is as long as before by chance once in a million; so many are not
_STEPS_TO_TRACE = 3  # for one norm; no trace runs in parts that call step() themselves


class _DeadLayers:
    """Finds norms whose rows are as long as in the norm before: what is between adds nothing.

    Rows are also equal where both norms are given the same by design: parallel branches, a context
    that each layer norms anew. Then the result of the one is not in what the other is given. In
    eager a trace of one forward tells. Compiled, rows that were equal in the first step are taken
    to be so by design.
    """

    def __init__(self, norms: int) -> None:
        self._rows = torch.zeros(norms, dtype=torch.float32, device="cpu")  # equal ones in turn
        self._equal_by_design: set[int] | None = None  # compiled norms
        self._sources: dict[int, int] = {}  # of the traced norms, as in _Trace
        self._asked: Counter[int] = Counter()  # norms to trace, and for how many steps

    def find(self, step: Step) -> Tensor:
        equal = step.figures[:, EQUAL] > 0
        if self._equal_by_design is None:
            self._equal_by_design = {i for i in step.compiled if equal[i]}
        unsure = []
        for i in equal.nonzero().flatten().tolist():
            if i in step.compiled:
                equal[i] = i not in self._equal_by_design
            elif i in self._sources:
                equal[i] = bool(self._sources[i] >> step.previous[i] & 1)
            elif self._asked[i] < _STEPS_TO_TRACE:
                self._asked[i] += 1
                unsure.append(i)
        self._rows = torch.where(equal, self._rows + step.figures[:, ROWS], 0)
        dead = self._rows >= _ROWS_TO_BE_SURE
        dead[unsure] = False
        return dead

    @contextmanager
    def traced(self, thread: _Thread) -> Iterator[None]:
        """Traces a forward if a norm is asked for."""
        if not self._asked or thread.trace is not None:
            yield
            return
        thread.trace = _Trace()
        try:
            with thread.trace:
                yield
            self._sources.update(thread.trace.sources)
            for norm in thread.trace.sources:
                self._asked.pop(norm, None)
        finally:
            thread.trace = None


def _entries(model: nn.Module, norms: set[RMSNorm]) -> Iterator[nn.Module]:
    """Where a forward begins: the model, and what in it holds all norms, as generate() calls it."""
    yield model
    if model._compiled_call_impl is None and type(model).__name__ != "OptimizedModule":
        inner = [child for child in model.children() if norms <= set(child.modules())]
        if len(inner) == 1 and inner[0] not in norms:
            yield from _entries(inner[0], norms)


# A norm that is watched has a class whose forward hands over its 1 / rms.


def _forward(self, x: Tensor, residual: Tensor | None = None):
    watch = self._watch
    if watch is None:  # FSDP derived its class from ours meanwhile, and the watch is off
        return self._original.forward(self, *((x,) if residual is None else (x, residual)))
    weight = self._parameters["weight"] if "weight" in self._parameters else self.weight
    if residual is None:
        op, args = "rms_norm_forward", (x, self.normalized_shape or x.shape[-1:], weight, self.eps)
    else:
        self._check_residual(x, weight)
        op, args = "fused_add_rms_norm_forward", (x, residual, weight, self.eps)
    options = {"weight_offset": self.weight_offset, "cast_before_weight": self.cast_before_weight}
    compiling = is_dynamo_compiling()
    results = None if compiling else getattr(_C, op)(*args, *options.values())
    if results is None:
        results = getattr(torch.ops.rmsnorm_cuda, op).default(*args, **options)
    normed = x if residual is None else results[1]
    if compiling:
        watch.rstd, watch.dtype = results[-1], normed.dtype
    else:
        watch.record(normed, results[0], results[-1])
    return results[0] if residual is None else results[:2]


def _forward_in_weight_dtype(self, x: Tensor):
    if x.dtype != self.weight.dtype:  # two steps, which have no 1 / rms in common
        return RMSNormInWeightDtype.forward(self, x)
    return _forward(self, x)


# By code: so the classes of an earlier import of the package are known as well.
_FORWARDS = {
    RMSNorm.forward.__code__: _forward,
    families.RMSNormOfAnyWidth.forward.__code__: _forward,
    RMSNormInWeightDtype.forward.__code__: _forward_in_weight_dtype,
}


def _new(cls: type) -> RMSNorm:
    return cls.__new__(cls)


def _reduce_ex(self, protocol):
    """Makes a copy an instance of the original class."""
    plain = _new(self._original)
    vars(plain).update((name, value) for name, value in vars(self).items() if name != "_watch")
    function, *rest = plain.__reduce_ex__(max(protocol, 2))
    # copyreg.__newobj__ accepts its argument's class only.
    return _new if function is copyreg.__newobj__ else function, *rest


@functools.cache
def _watched_class(cls: type[RMSNorm]) -> type[RMSNorm]:
    forward = _FORWARDS[computing_class(cls).forward.__code__]
    body = {
        "forward": families.called_with(forward, cls.forward),
        "_original": cls,
        "_watch": None,
        "__reduce_ex__": _reduce_ex,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), body)


def _put_on(norm: RMSNorm, watch: _Watch) -> None:
    if getattr(norm, "_watch", None) is not None:
        raise RuntimeError("monitor: this model is being monitored already")
    if not hasattr(norm, "_watch"):  # a class that FSDP derived from ours has it
        norm.__class__ = _watched_class(type(norm))
    norm._watch = watch


def _take_off(norm: RMSNorm) -> None:
    vars(norm).pop("_watch", None)
    if "_original" in vars(type(norm)):
        norm.__class__ = type(norm)._original


def _reason_to_skip(norm: RMSNorm) -> str:
    if "forward" in vars(norm):
        return "its forward was replaced on this instance (accelerate hooks, kernels, ...)"
    if getattr(norm, "_watch", None) is not None:
        return ""  # _put_on() raises an error
    known = (*_FORWARDS, *(forward.__code__ for forward in _FORWARDS.values()))
    if getattr(computing_class(type(norm)).forward, "__code__", None) not in known:
        return f"{type(norm).__name__} has a forward of its own"
    return ""


_NAMES_OF_EPS = "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"
_rounding = operator.attrgetter("weight_offset", "cast_before_weight")  # of a norm or a family


def _faulty_eps(model: nn.Module, norms: dict[str, RMSNorm]) -> Iterator[tuple[str, str]]:
    """Norms whose eps is not what the model's config says, or the other layers; and a message."""
    configs = dict.fromkeys(norms)  # of their part of the model: the text, the images, ...
    for part, module in model.named_modules():  # what holds others comes before them
        config = getattr(module, "config", None)
        if config is not None:
            prefix = f"{part.removeprefix('_orig_mod.')}." if part else ""
            of_text = getattr(config, "text_config", config)
            configs |= {name: of_text for name in norms if name.startswith(prefix)}
    keys = {name: (id(configs[name]), name.rpartition(".")[2]) for name in norms}
    same_name = defaultdict(list)  # eps of the norms of that name in all layers
    for name, norm in norms.items():
        same_name[keys[name]].append(norm.eps)
    for name, norm in norms.items():
        config, source = configs[name], "the model's config says"
        expected = {getattr(config, key, None) for key in _NAMES_OF_EPS} - {None}
        width = getattr(config, "hidden_size", None)
        # DeepSeek's inner norms are of another width, and have an eps that is not in the config.
        if not expected or (width is not None and norm.normalized_shape != (width,)):
            source = "that of the other layers is"
            expected = _majority(same_name[keys[name]]) or {norm.eps}
        if norm.eps not in expected:
            values = ", ".join(map(str, sorted(expected, key=str)))
            yield name, f"eps is {norm.eps}, and {source} {values}"


def _faulty_rounding(model: nn.Module, norms: dict[str, RMSNorm]) -> Iterator[tuple[str, str]]:
    """Norms that round otherwise than the model's family, or most other norms; and a message."""
    roundings = {n: _rounding(norm) for n, norm in norms.items() if norm.weight is not None}
    expected = _roundings_of_the_family(model) or _majority([*roundings.values()])
    words = "weight_offset={}, cast_before_weight={}"
    says = " or ".join(words.format(*rounding) for rounding in sorted(expected))
    for name, rounding in roundings.items():
        if expected and rounding not in expected:
            yield name, f"it has {words.format(*rounding)}; its model has {says}"


def _majority(values: list) -> set:
    """What more than half of them are; empty if nothing is."""
    return {value for value, count in Counter(values).items() if 2 * count > len(values)}


def _roundings_of_the_family(model: nn.Module) -> set[tuple[float, bool]]:
    """Those of the RMSNorms that transformers has for this kind of model; empty if it has none."""
    from ..integrations.transformers import norm_classes

    names = {type(module).__module__ for module in model.modules()}
    modules = [sys.modules[name] for name in names if "transformers.models" in name]
    classes = [cls for module in modules for cls in norm_classes(module).values()]
    return {rounding for rounding in map(_rounding_of, classes) if rounding is not None}


@functools.cache
def _rounding_of(cls: type[nn.Module]) -> tuple[float, bool] | None:
    from ..integrations.recognize import recognize

    try:
        found = recognize(cls(64))
    except Exception:  # its constructor takes something else
        return None
    return None if isinstance(found, str) else _rounding(found.family)
