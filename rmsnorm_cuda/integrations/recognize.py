"""Which RMSNorm a module is, found by what it computes.

A copy of the module is tried on the CPU, forward and backward, and compared with the twin of each
family. The module itself, its hooks and its weights take no part, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import numbers
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .families import _SETTINGS, FAMILIES, Family, normalize

_OF_NO_WEIGHT = FAMILIES[:1]  # without a weight there is one rounding, whatever the family
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_TORCHS_FORWARD = nn.RMSNorm.forward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PAIRS = tuple(product(_DTYPES, _DTYPES))  # input and weight
_TELLING = _PAIRS[0], _PAIRS[4], _PAIRS[1], _PAIRS[3]  # fp32 and bf16: the families differ in them


# For special rows, whose gradients are not compared: among such weights the others' would be lost.
_EXTREME_WEIGHTS = (1.0, -1.0, 0.0, 3000.0, -3000.0)


class Recognized(NamedTuple):
    family: Family
    eps: float | None
    eps_name: str | None = None  # the attribute that holds it, if one does
    also_read: tuple[
        str, ...
    ] = ()  # attributes whose numbers decide the result too, and are as they are


def recognize(module: nn.Module) -> Recognized | str:
    """The family and eps with which twin() computes what the module computes, or a sentence why
    there are none.

    It is the same function if results and gradients are, in training and in evaluation, in fp32,
    bf16, fp16 and their mixtures, for rows of all sizes, of zeros, with NaN and with Inf.
    """
    if type(module) is nn.RMSNorm and nn.RMSNorm.forward is _TORCHS_FORWARD and _as_built(module):
        return Recognized(FAMILIES[0], number(module.eps), "eps")
    reason = _another_structure(module)
    if reason:
        return reason
    # In a thread of its own no mode of torch is on: neither fake tensors nor a transform, autocast
    # or another device.
    with ThreadPoolExecutor(1) as thread, _without_warning:
        return thread.submit(_try, module).result()


def number(value: object) -> float | None:
    """A Python number of what may stand for eps: a number of Python, numpy or torch, or None."""
    if isinstance(value, Tensor):
        return (
            value.item()
            if value.numel() == 1
            and value.device.type == "cpu"
            and type(value) in (Tensor, nn.Parameter)
            else None
        )
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _as_built(module: nn.RMSNorm) -> bool:
    weight = module._parameters.get("weight")
    if module._modules or module._buffers or getattr(module, "weight", None) is not weight:
        return False
    if module.eps is not None and number(module.eps) is None:
        return False
    return weight is None or weight.shape == module.normalized_shape


def _another_structure(module: nn.Module) -> str:
    cls, name = type(module), type(module).__name__
    if any(True for _ in module.children()):
        return f"{name} has submodules"
    others = [
        key
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and key != "weight"
    ]
    if others:
        return f"{name} has {', '.join(others)}, where one parameter is expected, called weight"
    weight = module._parameters.get("weight")
    if getattr(module, "weight", None) is not weight:
        return (
            f"the weight of {name} is not a parameter; "
            "where it was sharded or parametrized, swap before that"
        )
    if hasattr(weight, "ds_shape"):
        return "its weight is partitioned by DeepSpeed ZeRO-3; swap before deepspeed.initialize()"
    shape = _shape(module)
    if weight is not None and (weight.shape != shape or weight.numel() < 2):
        return (
            f"its weight has the shape {list(weight.shape)}, and one number for each column is "
            "expected; "
            "where it was sharded, swap before that"
        )
    if properties := [
        key for key in _SETTINGS if inspect.isdatadescriptor(getattr(cls, key, None))
    ]:
        return f"{name} has a property {', '.join(properties)}"
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return f"the signature of {name}.forward cannot be read"
    if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
        return f"{name}.forward takes more than the input: {', '.join(p.name for p in parameters)}"
    return ""


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = module._parameters.get("weight")
    shape = getattr(module, "normalized_shape", None) or (
        (256,) if weight is None else weight.shape
    )
    return (shape,) if isinstance(shape, int) else tuple(shape)


class _Filter:
    """One warning is ignored while trials run, in any number of threads: the first one puts the
    filter there, the last one takes it away. catch_warnings() would take every filter of the
    process along, and is not for threads."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.filters = warnings.filters
                warnings.filterwarnings(
                    "ignore", message="Mismatch dtype between input and weight"
                )  # of F.rms_norm
                self.filter = warnings.filters[0]

    def __exit__(self, *_) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                for filters in (self.filters, warnings.filters):
                    with contextlib.suppress(ValueError):
                        filters.remove(self.filter)


_without_warning = _Filter()


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Puts the process's generators back if somebody has drawn from them. Held for one call only:
    others draw meanwhile, too.
    """
    of_numpy = getattr(sys.modules.get("numpy"), "random", None)
    if hasattr(of_numpy, "get_bit_generator") and not isinstance(
        of_numpy.get_bit_generator(), of_numpy.MT19937
    ):
        of_numpy = None  # of another kind that somebody has put there, whose state is no tuple
    before = torch.get_rng_state(), random.getstate(), of_numpy and of_numpy.get_state()
    try:
        yield
    finally:
        if not torch.equal(torch.get_rng_state(), before[0]):
            torch.set_rng_state(before[0])
        if random.getstate() != before[1]:
            random.setstate(before[1])
        if of_numpy is not None:
            after = of_numpy.get_state()
            if after[2:] != before[2][2:] or (after[1] != before[2][1]).any():
                of_numpy.set_state(before[2])


class _Trial(NamedTuple):
    batch: dict[str, Tensor]  # rows in fp32, by what they are
    pair: tuple[torch.dtype, torch.dtype]
    training: bool
    grad: bool

    def __str__(self) -> str:
        dtypes = " and ".join(
            dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.pair)
        )
        mode = " while it trains" if self.training else ""
        return f"in {dtypes}{mode}{'' if self.grad else ' without gradients'}"


class _Outcome(NamedTuple):
    result: Tensor
    gradients: tuple[Tensor | None, Tensor | None]  # of input and weight
    wrote: bool  # to its input


_Function = Callable[
    [Tensor, "Tensor | None", bool], Tensor
]  # of input, weight and whether it trains


def _their(copied: nn.Module) -> _Function:
    def call(x, weight, training):
        copied.training = training
        if weight is not None:
            copied._parameters["weight"] = weight
        with _random_state_kept():
            return type(copied).forward(copied, x)

    return call


def _our(shape: tuple[int, ...] | None, family: Family, eps: float | None) -> _Function:
    return lambda x, weight, training: normalize(x, shape or x.shape[-1:], weight, eps, family)


class _Laboratory:
    """Rows and a weight to try norms of one shape on."""

    def __init__(self, shape: tuple[int, ...], has_weight: bool, values: Iterable[float]) -> None:
        generator = torch.Generator().manual_seed(0)
        width = torch.Size(shape).numel()
        count = max(
            2, -(-2048 // max(1, width))
        )  # so many that a near-tie or two is no per cent of the values
        # An eps shows in rows whose mean of squares is about as large; a tiny one is left to rows
        # that it does not reach.
        sizes = [
            1.0,
            2e-4,
            *(value**0.5 for value in values if 1e-20 < value < 1),
            1e-6,
            1e-2,
            1e2,
            1e4,
        ]
        usual = {
            f"rows of size {size:.2g}": torch.randn(count, *shape, generator=generator) * size
            for size in sizes
        }
        usual["rows of zeros"] = torch.zeros(2, *shape)
        special = {
            "rows near the largest number of fp16": torch.rand(count, *shape, generator=generator)
            * 2e4
            + 4e4
        }
        for what in ("NaN", "Inf", "-Inf"):
            special[f"rows with {what}"] = torch.randn(2, *shape, generator=generator)
            special[f"rows with {what}"].view(2, -1)[:, width // 2] = float(what)
        # Their result reaches the square root of the width, and with the weight beyond what anybody
        # would clamp it to.
        dominated = torch.randn(2 * len(_EXTREME_WEIGHTS), *shape, generator=generator)
        for row, sign, column in zip(
            dominated.flatten(1), cycle((1e4, -1e4)), cycle(range(len(_EXTREME_WEIGHTS)))
        ):
            row[column % width] = sign
        special["rows that one element dominates"] = dominated
        self.usual, self.special, self.special_names = (
            _batches(usual),
            _batches(special),
            special.keys(),
        )
        self.gain = 1 + torch.randn(shape, generator=generator) / 4 if has_weight else None
        self.extreme_gain = None
        if has_weight:
            self.extreme_gain = self.gain.clone()
            self.extreme_gain.view(-1)[: len(_EXTREME_WEIGHTS)] = torch.tensor(
                _EXTREME_WEIGHTS[:width]
            )
        # In part along the row: what goes through the root is not lost among what does not.
        self.direction = torch.randn(shape, generator=generator) + 1
        self.pairs = _PAIRS if has_weight else tuple((dtype, dtype) for dtype in _DTYPES)

    def observe(self, function: _Function, trial: _Trial) -> _Outcome:
        x = torch.cat([*trial.batch.values()]).to(trial.pair[0])
        gain = self.extreme_gain if trial.batch.keys() <= self.special_names else self.gain
        weight = None if gain is None else nn.Parameter(gain.to(trial.pair[1]))
        if not trial.grad:
            with torch.no_grad():
                before = x.clone()
                return _Outcome(
                    function(x, weight, trial.training), (None, None), not _same(before, x)
                )
        result = function(x.requires_grad_(), weight, trial.training)
        gradients: tuple[Tensor | None, ...] = (None, None)
        if isinstance(result, Tensor) and result.requires_grad and result.shape == x.shape:
            loss = (result.float() * self.direction * x.detach().float().sign()).sum()
            gradients = torch.autograd.grad(
                loss, [x, weight][: 1 + (weight is not None)], allow_unused=True
            )
        return _Outcome(result, (*gradients, None)[:2], False)

    def difference(self, ours: _Outcome, theirs: _Outcome, trial: _Trial) -> str:
        """In words; empty if there is none."""
        got, want = ours.result, theirs.result
        if not isinstance(want, Tensor) or want.dtype != got.dtype or want.shape != got.shape:
            return f"its result is {_kind(want)}, not {_kind(got)}"
        if theirs.wrote:
            return "it writes to its input"
        counts = [len(rows) for rows in trial.batch.values()]
        for name, a, b in zip(trial.batch, got.split(counts), want.split(counts), strict=True):
            share, far = values_off(a, b, trial.pair)
            if share >= 0.01 or far:
                how_many = f"{share:.0%} of the" if share >= 0.01 else "single"
                return f"{how_many} values differ for {name}"
        if not trial.grad:
            return ""
        if got.requires_grad != want.requires_grad:
            return "its result requires no gradient"
        for what, mine, other in zip(
            ("input", "weight"), ours.gradients, theirs.gradients, strict=True
        ):
            if (mine is None) != (other is None):
                return f"its {what} gets no gradient"
            if mine is None or other is None:
                continue
            parts = [("", mine, other)]
            if what == "input":
                parts = [
                    (f" for {name}", a, b)
                    for name, a, b in zip(
                        trial.batch, mine.split(counts), other.split(counts), strict=True
                    )
                ]
            for where, a, b in parts:
                if gradients_differ(a, b, trial.pair):
                    return f"the gradient of its {what} differs{where}"
        return ""


def _batches(rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """So small that no operation wakes a pool of threads."""
    batches: list[dict[str, Tensor]] = [{}]
    for name, part in rows.items():
        if batches[-1] and part.numel() + sum(t.numel() for t in batches[-1].values()) >= 32768:
            batches.append({})
        batches[-1][name] = part
    return batches


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )


def _kind(result: object) -> str:
    return (
        f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
        if isinstance(result, Tensor)
        else f"a {type(result).__name__}"
    )


def values_off(ours: Tensor, theirs: Tensor, pair: tuple[torch.dtype, ...]) -> tuple[float, bool]:
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
    off = apart > 8 * torch.finfo(dtype).eps * theirs.abs() if dtype == torch.float32 else apart > 0
    coarsest = max(torch.finfo(d).eps for d in (*pair, dtype))
    far = apart > 4 * coarsest * theirs.abs() + 4 * torch.finfo(dtype).tiny
    nan = ours.isnan() != theirs.isnan()
    return ((off | nan).float().mean().item() if off.numel() else 0.0), bool((far | nan).any())


def gradients_differ(ours: Tensor, theirs: Tensor, pair: tuple[torch.dtype, ...]) -> bool:
    """By more of their length than the roundings of the way back, which another order of operations
    rounds elsewhere.
    """
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return True
    finite = (
        ours.isfinite() & theirs.isfinite()
    )  # fp16 has no number for some gradients of small rows
    ours, theirs = ours[finite].double(), theirs[finite].double()
    share = 1e-4 if {*pair} == {torch.float32} else 0.05
    return bool((ours - theirs).norm() > share * theirs.norm())


def _try(module: nn.Module) -> Recognized | str:
    copied, has_weight = _copy(module), module._parameters.get("weight") is not None
    named = {
        key: value
        for key, of in vars(copied).items()
        if key not in _OF_EVERY_MODULE and (value := number(of)) is not None
    }
    shape = _shape(module)
    laboratory, their = _Laboratory(shape, has_weight, named.values()), _their(copied)
    known_shape = shape if has_weight or getattr(module, "normalized_shape", None) else None
    wants, errors = [], []
    for pair, batch in product(
        [pair for pair in _TELLING if pair in laboratory.pairs], laboratory.usual
    ):
        trial = _Trial(batch, pair, False, True)
        try:
            wants.append((trial, laboratory.observe(their, trial).result))
        except Exception as error:
            errors.append(error)
    if not {(dtype, dtype) for dtype in (torch.float32, torch.bfloat16)} <= {
        trial.pair for trial, _ in wants
    }:
        return f"it could not be tried on the CPU: {_in_a_line(errors[0])}"
    if not isinstance(wants[0][1], Tensor):
        return f"its result is {_kind(wants[0][1])}, not a tensor"
    # Of the families and numbers the one that comes nearest.
    nearest = 2.0, ""
    for family in FAMILIES if has_weight else _OF_NO_WEIGHT:
        for eps, names in _candidates(copied, family, named).items():
            our = _our(known_shape, family, eps)
            offs = [
                (values_off(laboratory.observe(our, trial).result, want, trial.pair)[0], trial)
                for trial, want in wants
            ]
            off, where = max(offs, key=lambda pair: pair[0])
            if off < nearest[0]:
                nearest = (
                    off,
                    f"{family.name!r} with eps={eps}: {off:.0%} of its values differ {where}",
                )
            if off < 0.01:
                reason = _difference(laboratory, our, their)
                if reason:
                    return f"it is like {family.name!r} with eps={eps}, but {reason}"
                eps_name = _heeded(laboratory, copied, known_shape, family, eps, names)
                return Recognized(
                    family, eps, eps_name, _also_read(laboratory, copied, named.keys() - {eps_name})
                )
    if not nearest[1]:
        return "it has no attribute that could be its eps"
    return f"it computes what no known family computes; the nearest is {nearest[1]}"


def _difference(laboratory: _Laboratory, our: _Function, their: _Function) -> str:
    """Between the two functions, in words; empty if there is none."""
    batches = (
        *((batch, True) for batch in laboratory.usual),
        *((batch, False) for batch in laboratory.special),
    )
    for pair in laboratory.pairs:
        for training, (batch, usual), grad in product((False, True), batches, (True, False)):
            if grad and not usual:
                continue  # of NaN there is no gradient
            trial = _Trial(batch, pair, training, grad)
            try:
                want = laboratory.observe(their, trial)
            except Exception as error:
                if trial[2:] == (False, True) and pair not in _TELLING[:2]:
                    break  # it does not take these dtypes
                return f"{trial} it raises {_in_a_line(error)}"
            reason = laboratory.difference(laboratory.observe(our, trial), want, trial)
            if reason:
                return f"{reason} {trial}"
    x, weight = torch.cat([*laboratory.usual[0].values()]), laboratory.gain
    x = x[: len(x) // 2 * 2]
    with torch.no_grad():
        once = their(x, weight, False)
        if not _same(their(x, weight, False), once):
            return "its result is another at each call"
        for t, want in (
            (x[None], once[None]),
            (x.reshape(2, -1, *x.shape[1:]), None),
            (x[0], once[0]),
            (x[:0], once[:0]),
        ):
            try:
                got = their(t, weight, False)
            except Exception as error:
                return f"of input of the shape {list(t.shape)} it raises {_in_a_line(error)}"
            want = once.reshape(t.shape) if want is None else want
            if got.shape != t.shape or values_off(got, want, _PAIRS[0])[1]:
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
    names = [name for name in family.eps if name in named or getattr(module, name, "") is None]
    names += [
        name
        for name, value in named.items()
        if 0 <= value < 1 and not isinstance(vars(module)[name], int)
    ]
    candidates: dict[float | None, list[str]] = {}
    for name in dict.fromkeys(names):
        if named.get(name) is None or 0 <= named[name] < math.inf:
            candidates.setdefault(named.get(name), []).append(name)
    return candidates


def _heeded(laboratory, copied, shape, family, eps, names) -> str | None:
    """The one of these attributes that the module reads its eps from."""
    other, trial = 2e-3 + 2 * (eps or 0), _Trial(laboratory.usual[0], _PAIRS[0], False, False)
    want = laboratory.observe(_our(shape, family, other), trial).result
    for name in names:
        before = vars(copied).get(name)
        vars(copied)[name] = other
        with contextlib.suppress(Exception):
            if not values_off(laboratory.observe(_their(copied), trial).result, want, trial.pair)[
                1
            ]:
                return name
        vars(copied)[name] = before
    return None


def _also_read(laboratory: _Laboratory, copied: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of these attributes on whose numbers the result depends."""
    trial, their = _Trial(laboratory.usual[0], _PAIRS[0], False, False), _their(copied)
    want, read = laboratory.observe(their, trial).result, []
    for name in sorted(names):
        before = vars(copied)[name]
        try:
            vars(copied)[name] = 2 * before + 1
            same = _same(laboratory.observe(their, trial).result, want)
        except Exception:
            same = False
        if not same:
            read.append(name)
        vars(copied)[name] = before
    return tuple(read)


def _copy(module: nn.Module) -> nn.Module:
    """Without the module's parameters and hooks, and with lists and tensors of its own."""
    new = object.__new__(type(module))
    nn.Module.__init__(new)
    memo = {id(module): new}
    for key, value in vars(module).items():
        if key not in _OF_EVERY_MODULE:
            try:
                vars(new)[key] = copy.deepcopy(value, memo)
            except Exception:  # a lock, a generator
                vars(new)[key] = value
    for name in module._parameters:
        new.register_parameter(name, None)
    for name in module._buffers:
        new.register_buffer(name, None)
    return new


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
