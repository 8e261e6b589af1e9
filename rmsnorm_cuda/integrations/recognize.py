"""Which RMSNorm a module is, found by what it computes.

A copy of the module is tried on the CPU, forward and backward, and compared with the twin of each
family. The module itself, its hooks and its weights take no part, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import numbers
import operator
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pickle import dumps
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .families import (
    FAMILIES,
    GATED_FAMILIES,
    GATED_SETTINGS,
    SETTINGS,
    Family,
    GatedFamily,
    gate,
    normalize,
)

MODULE_ATTRIBUTES = vars(nn.Module()).keys()
_TORCH_FORWARD = nn.RMSNorm.forward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_PAIRS = tuple(product(_DTYPES, _DTYPES))  # input and weight
# fp32, bf16 and their mixtures: the families differ in them.
_DECISIVE_PAIRS = tuple(_DTYPE_PAIRS[i] for i in (0, 4, 1, 3))

# For special rows, whose gradients are not compared: among such weights the others' would be lost.
_EXTREME_WEIGHTS = (1.0, -1.0, 0.0, 3000.0, -3000.0)


class Recognized(NamedTuple):
    family: Family | GatedFamily
    eps: float | None
    eps_name: str | None = None  # the attribute that holds it, if one does
    # Attributes whose numbers decide the result too, and are as they are.
    also_read: tuple[str, ...] = ()


def recognize(module: nn.Module) -> Recognized | str:
    """The family and eps with which twin() computes what the module computes, or a sentence why
    there are none.

    It is the same function if results and gradients are, in training and in evaluation, in fp32,
    bf16, fp16 and their mixtures, for rows of all sizes, of zeros, with NaN and with Inf. One whose
    forward takes a second input is tried as a norm with a gate.
    """
    if type(module) is nn.RMSNorm and nn.RMSNorm.forward is _TORCH_FORWARD and _as_built(module):
        return Recognized(FAMILIES[0], number(module.eps), "eps")
    if reason := _structural_reason(module):
        return reason
    # In a thread of its own no mode of torch is on: neither fake tensors nor a transform, autocast
    # or another device.
    with ThreadPoolExecutor(1) as thread, _without_warning():
        return thread.submit(_try, module).result()


def number(value: object) -> float | None:
    """A Python number of what may stand for eps: a number of Python, numpy or torch, or None."""
    if isinstance(value, Tensor):
        is_plain = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu"
        return value.item() if is_plain and value.numel() == 1 else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _as_built(module: nn.RMSNorm) -> bool:
    weight = module._parameters.get("weight")
    if module._modules or module._buffers or getattr(module, "weight", None) is not weight:
        return False
    if module.eps is not None and number(module.eps) is None:
        return False
    return weight is None or weight.shape == module.normalized_shape


def _structural_reason(module: nn.Module) -> str:
    """Why it cannot be a norm with one weight and one input; empty if it may be."""
    cls, name, weight = type(module), type(module).__name__, module._parameters.get("weight")
    if list(module.children()):
        return f"{name} has submodules"
    held = (*module._parameters.items(), *module._buffers.items())
    others = [key for key, value in held if value is not None and key != "weight"]
    if others:
        return f"{name} has {', '.join(others)}, where one parameter is expected, called weight"
    if getattr(module, "weight", None) is not weight and not has_buffer_of_ones(module):
        return (
            f"the weight of {name} is not a parameter; "
            "where it was sharded or parametrized, swap before that"
        )
    if hasattr(weight, "ds_shape"):
        return "its weight is partitioned by DeepSpeed ZeRO-3; swap before deepspeed.initialize()"
    if weight is not None and (weight.shape != _shape(module) or weight.numel() < 2):
        return (
            f"its weight has the shape {list(weight.shape)}, and one number for each column is "
            "expected; where it was sharded, swap before that"
        )
    ours = dict.fromkeys((*SETTINGS, *GATED_SETTINGS))
    properties = [key for key in ours if inspect.isdatadescriptor(getattr(cls, key, None))]
    if properties:
        return f"{name} has a property {', '.join(properties)}"
    parameters = _inputs(cls)
    if parameters is None:
        return f"the signature of {name}.forward cannot be read"
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if len(parameters) not in (1, 2) or not plain:
        return f"{name}.forward takes more than the input: {', '.join(p.name for p in parameters)}"
    return ""


def has_buffer_of_ones(module: nn.Module) -> bool:
    """Whether its `weight` is a buffer of ones, which FalconMamba has for a kernel that wants one.
    The trial shows whether the forward reads it.
    """
    held = module._buffers.get("weight")
    plain = type(held) is Tensor and held.dim() == 1 < held.numel() and not held.is_meta
    return plain and len(_inputs(type(module)) or ()) == 1 and bool((held == 1).all())


def _inputs(cls: type[nn.Module]) -> list[inspect.Parameter] | None:
    try:
        _, *parameters = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return parameters


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    built = getattr(module, "normalized_shape", None)
    shape = built or ((256,) if weight is None else weight.shape)
    return (shape,) if isinstance(shape, int) else tuple(shape)


# A warning of F.rms_norm, as warnings.filterwarnings() would have it.
_MISMATCH = "ignore", re.compile("Mismatch dtype between input and weight"), Warning, None, 0


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Ignores one warning while a trial runs. catch_warnings() would take every filter of the
    process along, and is not for threads.
    """
    filters = warnings.filters
    filters.insert(0, _MISMATCH)  # each trial its own: of several threads one leaves first
    try:
        yield
    finally:
        # Somebody's catch_warnings() may have put a copy of the list there meanwhile.
        for each in {id(held): held for held in (filters, warnings.filters)}.values():
            with contextlib.suppress(ValueError):
                each.remove(_MISMATCH)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the process's generators back if somebody has drawn from them. Held for one call only:
    others draw meanwhile, too.
    """
    generators: list[tuple[Callable, Callable, Callable]] = [
        (torch.get_rng_state, torch.set_rng_state, torch.equal),
        (random.getstate, random.setstate, operator.eq),
    ]
    of_numpy = sys.modules.get("numpy.random")
    if hasattr(of_numpy, "set_state"):
        get_state = functools.partial(of_numpy.get_state, legacy=False)
        generators.append((get_state, of_numpy.set_state, lambda a, b: dumps(a) == dumps(b)))
    before = [get() for get, _, _ in generators]
    try:
        yield
    finally:
        for (get, put, equal), state in zip(generators, before):
            if not equal(get(), state):
                put(state)


class _Trial(NamedTuple):
    batch: dict[str, Tensor]  # rows in fp32, by what they are
    pair: tuple[torch.dtype, torch.dtype]
    training: bool
    grad: bool

    def __str__(self) -> str:
        dtypes = " and ".join(dict.fromkeys(map(_name, self.pair)))
        mode = " while it trains" if self.training else ""
        return f"in {dtypes}{mode}{'' if self.grad else ' without gradients'}"


class _Outcome(NamedTuple):
    result: Tensor
    gradients: tuple[Tensor | None, ...] = ()  # of the inputs and the weight
    wrote: bool = False  # to its input


# Of the inputs, weight and whether it trains.
_Function = Callable[[list[Tensor], "Tensor | None", bool], Tensor]


def _function_of(copied: nn.Module) -> _Function:
    def call(inputs, weight, training):
        copied.training = training
        if weight is not None:
            copied._parameters["weight"] = weight
        with random_state_kept():
            return type(copied).forward(copied, *inputs)

    return call


def _formula(
    shape: tuple[int, ...] | None, family: Family | GatedFamily, eps: float | None
) -> _Function:
    if isinstance(family, GatedFamily):
        return lambda inputs, weight, training: gate(*inputs, weight, eps, family)

    def call(inputs, weight, training):
        (x,) = inputs
        return normalize(x, shape or x.shape[-1:], weight, eps, family)

    return call


class _Laboratory:
    """Rows and a weight to try norms of one shape on."""

    def __init__(
        self, shape: tuple[int, ...], has_weight: bool, values: Iterable[float], has_gate: bool
    ) -> None:
        self.names = ("input", "gate", "weight") if has_gate else ("input", "weight")
        width, generator = torch.Size(shape).numel(), torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        # So many that a near-tie or two is no per cent of the values.
        count = max(2, -(-2048 // max(1, width)))
        # An eps shows in rows whose mean of squares is about as large; a tiny one is left to rows
        # that it does not reach.
        roots = (value**0.5 for value in values if 1e-20 < value < 1)
        sizes = (1.0, 2e-4, *roots, 1e-6, 1e-2, 1e2, 1e4)
        usual = {f"rows of size {size:.2g}": normal(count, *shape) * size for size in sizes}
        usual["rows of zeros"] = torch.zeros(2, *shape)
        large = torch.rand(count, *shape, generator=generator) * 2e4 + 4e4
        special = {"rows near the largest number of fp16": large}
        for what in ("NaN", "Inf", "-Inf"):
            special[f"rows with {what}"] = rows = normal(2, *shape)
            rows.view(2, -1)[:, width // 2] = float(what)
        # Their result reaches the square root of the width, and with the weight beyond what anybody
        # would clamp it to.
        extremes = len(_EXTREME_WEIGHTS)
        special["rows that one element dominates"] = rows = normal(2 * extremes, *shape)
        for row, value, column in zip(rows.flatten(1), cycle((1e4, -1e4)), cycle(range(extremes))):
            row[column % width] = value
        self.usual, self.special, self.special_names = *map(_batches, (usual, special)), {*special}
        self.plain = _Trial(self.usual[0], _DTYPE_PAIRS[0], False, False)
        self.weight = self.extreme_weight = None
        if has_weight:
            self.weight = 1 + normal(shape) / 4
            self.extreme_weight = self.weight.clone()
            self.extreme_weight.view(-1)[:extremes] = torch.tensor(_EXTREME_WEIGHTS[:width])
        # In part along the row: what goes through the root is not lost among what does not.
        self.direction = normal(shape) + 1
        self.pairs = _DTYPE_PAIRS if has_weight else tuple((dtype, dtype) for dtype in _DTYPES)

    def observe(self, function: _Function, trial: _Trial) -> _Outcome:
        inputs = self.inputs_of(torch.cat([*trial.batch.values()]).to(trial.pair[0]))
        x = inputs[0]
        is_special = trial.batch.keys() <= self.special_names
        values = self.extreme_weight if is_special else self.weight
        weight = None if values is None else nn.Parameter(values.to(trial.pair[1]))
        if not trial.grad:
            before = [t.clone() for t in inputs]
            with torch.no_grad():
                result = function(inputs, weight, trial.training)
            return _Outcome(result, wrote=not all(map(_same, before, inputs)))
        result = function([t.requires_grad_() for t in inputs], weight, trial.training)
        if not (isinstance(result, Tensor) and result.requires_grad and result.shape == x.shape):
            return _Outcome(result)
        loss = (result.float() * self.direction * x.detach().float().sign()).sum()
        of = inputs if weight is None else [*inputs, weight]
        return _Outcome(result, torch.autograd.grad(loss, of, allow_unused=True))

    def inputs_of(self, x: Tensor) -> list[Tensor]:
        if "gate" not in self.names:
            return [x]
        values = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return [x, (2 * values).to(x.dtype)]

    def difference(self, ours: _Outcome, theirs: _Outcome, trial: _Trial) -> str:
        """In words; empty if there is none."""

        def by_rows(one: Tensor, other: Tensor):
            counts = [len(rows) for rows in trial.batch.values()]
            return zip(trial.batch, one.split(counts), other.split(counts))

        got, want = ours.result, theirs.result
        if not isinstance(want, Tensor) or want.dtype != got.dtype or want.shape != got.shape:
            return f"its result is {_kind(want)}, not {_kind(got)}"
        if theirs.wrote:
            return "it writes to its input"
        for name, a, b in by_rows(got, want):
            share, far = self.values_off(a, b, trial)
            if share >= 0.01 or far:
                how_many = f"{share:.0%} of the" if share >= 0.01 else "single"
                return f"{how_many} values differ for {name}"
        if not trial.grad:
            return ""
        if got.requires_grad != want.requires_grad:
            return "its result requires no gradient"
        for what, mine, other in zip(self.names, ours.gradients, theirs.gradients):
            if (mine is None) != (other is None):
                return f"its {what} gets no gradient"
            if mine is None or other is None:
                continue
            for name, a, b in by_rows(mine, other) if what != "weight" else [("", mine, other)]:
                if gradients_differ(a, b, trial.pair):
                    return f"the gradient of its {what} differs{name and f' for {name}'}"
        return ""

    def values_off(self, ours: Tensor, theirs: Tensor, trial: _Trial) -> tuple[float, bool]:
        # An activation is a few roundings more on both sides.
        return values_off(ours, theirs, trial.pair, roundings=1 if "gate" not in self.names else 2)


def _batches(rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows in batches so small that no operation wakes a pool of threads."""
    batches: list[dict[str, Tensor]] = [{}]
    for name, part in rows.items():
        if batches[-1] and part.numel() + sum(t.numel() for t in batches[-1].values()) >= 32768:
            batches.append({})
        batches[-1][name] = part
    return batches


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(result: object) -> str:
    if isinstance(result, Tensor):
        return f"{_name(result.dtype)} {list(result.shape)}"
    return f"a {type(result).__name__}"


def values_off(
    ours: Tensor, theirs: Tensor, pair: tuple[torch.dtype, ...], roundings: int = 1
) -> tuple[float, bool]:
    """How many of the values are further apart than the roundings of fp32 arithmetic put them, and
    whether one is by far.
    """
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return 1.0, True
    ours, theirs, dtype = ours.detach(), theirs.detach(), theirs.dtype
    apart = (ours - theirs).abs().masked_fill(ours == theirs, 0)
    # fp32: theirs rounds the sum, the mean, the root and two products. 16 bits: a near-tie may fall
    # the other way. So it may where the input has 16 bits, the result 32, and the family rounds
    # between; that is few elements, and an ulp of the 16 bits.
    least = roundings * torch.finfo(dtype).eps * theirs.abs()
    off = apart > 8 * least if dtype == torch.float32 else apart > 0
    coarsest = max(torch.finfo(d).eps for d in (*pair, dtype))
    far = apart > 4 * (roundings * coarsest * theirs.abs() + torch.finfo(dtype).tiny)
    nan = ours.isnan() != theirs.isnan()
    return ((off | nan).float().mean().item() if off.numel() else 0.0), bool((far | nan).any())


def gradients_differ(ours: Tensor, theirs: Tensor, pair: tuple[torch.dtype, ...]) -> bool:
    """By more of their length than the roundings of the way back, which another order of operations
    rounds elsewhere.
    """
    # fp16 has no number for some gradients of small rows.
    finite = ours.isfinite() & theirs.isfinite()
    ours, theirs = ours[finite].double(), theirs[finite].double()
    share = 1e-4 if {*pair} == {torch.float32} else 0.05
    return bool((ours - theirs).norm() > share * theirs.norm())


def _try(module: nn.Module) -> Recognized | str:
    copied, has_weight = _copy(module), module._parameters.get("weight") is not None
    own = {key: value for key, value in vars(copied).items() if key not in MODULE_ATTRIBUTES}
    named = {key: n for key, value in own.items() if (n := number(value)) is not None}
    shape, has_gate = _shape(module), len(_inputs(type(module))) == 2
    laboratory, their = (
        _Laboratory(shape, has_weight, named.values(), has_gate),
        _function_of(copied),
    )
    known_shape = shape if has_weight or getattr(module, "normalized_shape", None) else None
    wants, errors = [], []
    for pair, batch in product(_DECISIVE_PAIRS, laboratory.usual):
        if pair in laboratory.pairs:
            trial = _Trial(batch, pair, False, True)
            try:
                wants.append((trial, laboratory.observe(their, trial).result))
            except Exception as error:
                errors.append(error)
    if not {*_DECISIVE_PAIRS[:2]} <= {trial.pair for trial, _ in wants}:
        return f"it could not be tried on the CPU: {_in_a_line(errors[0])}"
    if not isinstance(wants[0][1], Tensor):
        return f"its result is {_kind(wants[0][1])}, not a tensor"
    # Of the families and numbers the one that comes nearest. Without a weight there is one
    # rounding, whatever the family.
    least, nearest = 2.0, ""
    families = _gated_families(own, shape[-1]) if has_gate else FAMILIES
    for family in families if has_weight or has_gate else FAMILIES[:1]:
        for eps, names in _candidates(copied, family, named).items():
            our, says = _formula(known_shape, family, eps), f"{family.name!r} with eps={eps}"
            results = [laboratory.observe(our, trial).result for trial, _ in wants]
            shares = [laboratory.values_off(y, want, t)[0] for y, (t, want) in zip(results, wants)]
            off, (where, _) = max(zip(shares, wants), key=operator.itemgetter(0))
            if off < 0.01:
                if reason := _difference(laboratory, our, their):
                    return f"it is like {says}, but {reason}"
                eps_name = _eps_attribute(laboratory, copied, known_shape, family, eps, names)
                others = _other_numbers(laboratory, copied, named.keys() - {eps_name})
                return Recognized(family, eps, eps_name, others)
            if off < least:
                least, nearest = off, f"{says}: {off:.0%} of its values differ {where}"
    if not nearest:
        return "it has no attribute that could be its eps"
    if has_gate:
        names = ", ".join(p.name for p in _inputs(type(module)))
        says = (
            f"{type(module).__name__}.forward takes more than the input: {names}; tried as a norm"
        )
        return f"{says} with a gate, the nearest is {nearest}"
    return f"it computes what no known family computes; the nearest is {nearest}"


def _gated_families(own: dict[str, object], width: int) -> Iterator[GatedFamily]:
    """Each activation and size of groups; the latter, or their count, is one of its integers."""
    whole = [n for n in own.values() if type(n) is int and n > 1 and width % n == 0]
    sizes = dict.fromkeys([None, *whole, *(width // n for n in whole)])
    for family, activation, size in product(GATED_FAMILIES, ("silu", "sigmoid"), sizes):
        size = None if size == width else size
        yield family._replace(activation=activation, group_size=size)


def _difference(laboratory: _Laboratory, our: _Function, their: _Function) -> str:
    """Between the two functions, in words; empty if there is none."""
    # Of NaN there is no gradient.
    batches = [(batch, grad) for batch in laboratory.usual for grad in (True, False)]
    batches += [(batch, False) for batch in laboratory.special]
    for pair in laboratory.pairs:
        for training, (batch, grad) in product((False, True), batches):
            trial = _Trial(batch, pair, training, grad)
            try:
                want = laboratory.observe(their, trial)
            except Exception as error:
                if grad and not training and pair not in _DECISIVE_PAIRS[:2]:
                    break  # it does not take these dtypes
                return f"{trial} it raises {_in_a_line(error)}"
            reason = laboratory.difference(laboratory.observe(our, trial), want, trial)
            if reason:
                return f"{reason} {trial}"
    x, weight = torch.cat([*laboratory.usual[0].values()]), laboratory.weight
    x = x[: len(x) // 2 * 2]
    inputs = laboratory.inputs_of(x)
    with torch.no_grad():
        if len(inputs) == 2:
            with contextlib.suppress(Exception):  # it may want one
                alone = their([x, None], weight, False)
                if laboratory.values_off(our([x, None], weight, False), alone, laboratory.plain)[1]:
                    return "without a gate it computes something else"
        once = their(inputs, weight, False)
        if not _same(their(inputs, weight, False), once):
            return "its result is another at each call"
        views = [(t[None], t.reshape(2, -1, *t.shape[1:]), t[:0], t[0]) for t in (*inputs, once)]
        # Some with a gate count on rows of a batch, and refuse one alone.
        for *given, want in list(zip(*views))[: 3 if len(inputs) == 2 else 4]:
            try:
                got = their(given, weight, False)
            except Exception as error:
                return f"of input of the shape {[*given[0].shape]} it raises {_in_a_line(error)}"
            if values_off(want, got, _DTYPE_PAIRS[0])[1]:
                return (
                    "its result depends on how many dimensions there are before the normalized ones"
                )
    return ""


def _candidates(
    module: nn.Module, family: Family, named: dict[str, float]
) -> dict[float | None, list[str]]:
    """What may be eps, and the attributes that hold it. None is for torch.nn.RMSNorm's eps=None,
    that of the type computed in.
    """
    own = vars(module)
    names = [name for name in family.eps if name in named or getattr(module, name, "") is None]
    names += [name for name, n in named.items() if n < 1 and not isinstance(own[name], int)]
    candidates: dict[float | None, list[str]] = {}
    for name in dict.fromkeys(names):
        eps = named.get(name)
        if eps is None or 0 <= eps < math.inf:
            candidates.setdefault(eps, []).append(name)
    return candidates


def _result_with(laboratory, copied: nn.Module, name: str, value: object) -> Tensor | None:
    """The result of the copy with another value of an attribute; None where it raises."""
    before = vars(copied).get(name)
    vars(copied)[name] = value
    try:
        return laboratory.observe(_function_of(copied), laboratory.plain).result
    except Exception:
        return None
    finally:
        vars(copied)[name] = before


def _eps_attribute(laboratory, copied, shape, family, eps, names) -> str | None:
    """The one of these attributes that the module reads its eps from."""
    other = 2e-3 + 2 * (eps or 0)
    want = laboratory.observe(_formula(shape, family, other), laboratory.plain).result
    for name in names:
        got = _result_with(laboratory, copied, name, other)
        if not laboratory.values_off(want, got, laboratory.plain)[1]:
            return name
    return None


def _other_numbers(laboratory, copied: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of these attributes on whose numbers the result depends."""
    want = laboratory.observe(_function_of(copied), laboratory.plain).result

    def is_read(name: str) -> bool:
        got = _result_with(laboratory, copied, name, 2 * vars(copied)[name] + 1)
        return getattr(got, "dtype", None) != want.dtype or not _same(got, want)

    return tuple(filter(is_read, sorted(names)))


def _copy(module: nn.Module) -> nn.Module:
    """Without the module's parameters and hooks, and with lists and tensors of its own; ones of a
    buffer are other values, which show if they are read.
    """
    new = object.__new__(type(module))
    nn.Module.__init__(new)
    memo = {id(module): new}
    for key, value in vars(module).items():
        if key not in MODULE_ATTRIBUTES:
            try:
                vars(new)[key] = copy.deepcopy(value, memo)
            except Exception:  # a lock, a generator
                vars(new)[key] = value
    new._parameters.update(dict.fromkeys(module._parameters))
    new._buffers.update(dict.fromkeys(module._buffers))
    if has_buffer_of_ones(module):
        new._buffers["weight"] = torch.linspace(-1, 3, len(module.weight))
    return new


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
