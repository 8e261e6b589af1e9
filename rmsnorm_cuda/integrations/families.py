"""The RMSNorms that models are built with, and which of them a module is: found by what it computes, not by its name."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import rms_norm
from ..modules import RMSNorm


class Family(NamedTuple):
    name: str
    weight_offset: float  # added to the weight
    cast_before_weight: bool  # is the normalized value rounded before it is multiplied by the weight?
    result: str  # the result's dtype: the input's, the weight's, or the promotion of both
    eps: tuple[str, ...]  # what the attribute is called that holds eps; a module's other numbers are tried after these
    used_by: str


# tests/test_families.py compares every row with classes of transformers.
FAMILIES = (
    Family("torch", 0.0, False, "input", ("eps", "variance_epsilon"), "torch.nn.RMSNorm, Olmo 2/3, GPT-OSS, DeepSeek V4, Gemma 3n/4, Moshi"),
    Family("llama", 0.0, True, "promoted", ("variance_epsilon", "eps"), "Llama, Mistral, Qwen 2/3, Phi-3, GLM, DeepSeek V2/V3, Granite"),
    Family("gemma", 1.0, False, "input", ("eps",), "Gemma 1/2/3, T5Gemma, Qwen3-Next, Qwen 3.5"),
    Family("t5", 0.0, True, "weight", ("variance_epsilon",), "T5, MT5, UMT5, LongT5, Switch Transformers, Idefics"),
)
_OF_NO_WEIGHT = FAMILIES[:1]  # without a weight there is one rounding, whatever the family

# Input and weight, in what models run in. Where a module takes no mixed pair, the other two decide.
_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


class Recognized(NamedTuple):
    family: Family
    eps: float | None


class _OfAnyWidth(RMSNorm):
    """Without a weight, and not told how long its rows are: it takes the last dimension as it comes."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], None, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, elementwise_affine=False"


class _InWeightDtype(RMSNorm):
    """T5: normalized in fp32, rounded to the weight's dtype if that has 16 bits, multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        return _in_weight_dtype(x, self.normalized_shape, self.weight, self.eps)


def _in_weight_dtype(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None) -> Tensor:
    if x.dtype != weight.dtype:
        if weight.dtype.itemsize <= 2:
            return weight * rms_norm(x.float(), shape, None, eps).to(weight.dtype)
        x = x.to(weight.dtype)
    return rms_norm(x, shape, weight, eps, cast_before_weight=True)


def normalize(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None, family: Family) -> Tensor:
    """What the family's twin() computes, as a function."""
    if family.result == "weight":
        return _in_weight_dtype(x, shape, weight, eps)
    return rms_norm(x, shape, weight, eps, weight_offset=family.weight_offset, cast_before_weight=family.cast_before_weight)


def twin(old: nn.Module, family: Family, eps: float | None) -> RMSNorm:
    """Our module on the very state of `old`: the same dictionaries of parameters and hooks, not copies.

    So a hook handle taken from either one removes the hook from both, and a parameter assigned to one
    (load_state_dict(assign=True), to_empty()) is there in the other.
    """
    weight = getattr(old, "weight", None)
    shape = getattr(old, "normalized_shape", None) or (None if weight is None else tuple(weight.shape))
    cls = _OfAnyWidth if shape is None else _InWeightDtype if family.result == "weight" else RMSNorm
    new = cls.__new__(cls)
    vars(new).update(vars(old))
    new._parameters.setdefault("weight", None)
    new.normalized_shape = (shape,) if isinstance(shape, int) else shape
    new.eps = eps
    new.elementwise_affine = weight is not None
    new.weight_offset = family.weight_offset
    new.cast_before_weight = family.cast_before_weight
    return new


def recognize(module: nn.Module) -> Recognized | str:
    """The family and eps with which twin() computes what the module computes, or a sentence why there are none.

    A copy of the module with a random weight is called on rows of several sizes in fp32, bf16 and their mixtures, on
    the CPU, and compared with the twin of each family. The module itself, its hooks and its weights take no part.
    """
    reason = _another_structure(module)
    if reason:
        return reason
    weight = module._parameters.get("weight")
    shape = getattr(module, "normalized_shape", None) or ((256,) if weight is None else weight.shape)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if weight is not None and (weight.shape != shape or weight.numel() < 2):
        return f"its weight has the shape {list(weight.shape)}, and one number for each column is expected"
    numbers = {name: value for name, value in vars(module).items() if type(value) is float and 0 <= value < 1}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, *shape, generator=generator, device="cpu")  # even where torch.device("meta") is set
    # An eps shows in rows whose mean of squares is about as large; a tiny one is left to rows that it does not reach.
    scales = [1.0, 2e-4, *(value**0.5 for value in numbers.values() if 1e-20 < value < 1)]
    x = torch.cat([rows * scale for scale in scales])
    gain = None if weight is None else 1 + torch.randn(shape, generator=generator, device="cpu") / 4
    theirs, error = {}, None
    for pair in _PAIRS if gain is not None else [(torch.float32,) * 2, (torch.bfloat16,) * 2]:
        try:
            theirs[pair] = _call(type(module), _copy(module, gain, pair[1]), x.to(pair[0]))
        except Exception as exception:
            error = error or exception
    if not {(dtype, dtype) for dtype in (torch.float32, torch.bfloat16)} <= theirs.keys():
        return f"it could not be tried on the CPU: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    nearest = 2.0, ""  # the share that differs, and a sentence
    for family in FAMILIES if gain is not None else _OF_NO_WEIGHT:
        for eps in _candidates(module, family, numbers):
            off, where = 0.0, ""
            for pair, want in theirs.items():
                ours = twin(_copy(module, gain, pair[1]), family, eps)
                share = _share_off(_call(type(ours), ours, x.to(pair[0])), want)
                if share > off:
                    off, where = share, " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in pair))
            if off < 0.01:
                if _heeds_leading_dimensions(module, gain, x):
                    return "its result depends on how many dimensions there are before the normalized ones"
                return Recognized(family, eps)
            if off < nearest[0]:
                nearest = off, f"{family.name!r} with eps={eps}: {off:.0%} of its values differ in {where}"
    if not nearest[1]:
        return "it has no attribute that could be its eps"
    return f"it computes what no known family computes; the nearest is {nearest[1]}"


def _heeds_leading_dimensions(module: nn.Module, weight: Tensor | None, x: Tensor) -> bool:
    try:
        one, two = (_call(type(module), _copy(module, weight, x.dtype), t) for t in (x, x.reshape(2, -1, *x.shape[1:])))
        return not torch.equal(one.reshape(two.shape), two)
    except Exception:
        return True


def _another_structure(module: nn.Module) -> str:
    name = type(module).__name__
    if any(True for _ in module.children()):
        return f"{name} has submodules"
    others = [key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None and key != "weight"]
    if others:
        return f"{name} has {', '.join(others)}, where one parameter is expected, called weight"
    if getattr(module, "weight", None) is not module._parameters.get("weight"):
        return f"the weight of {name} is not a parameter"
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return f"the signature of {name}.forward cannot be read"
    if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
        return f"{name}.forward takes more than the input: {', '.join(p.name for p in parameters)}"
    return ""


def _candidates(module: nn.Module, family: Family, numbers: dict[str, float]) -> list[float | None]:
    """None is one for torch.nn.RMSNorm, whose eps=None means that of the type computed in."""
    named = [getattr(module, name) for name in family.eps if isinstance(getattr(module, name, ""), (float, type(None)))]
    return list(dict.fromkeys([*named, *numbers.values()]))


def _copy(module: nn.Module, weight: Tensor | None, dtype: torch.dtype) -> nn.Module:
    new = copy.copy(module)
    new._parameters = {} if weight is None else {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
    if weight is None and "weight" in module._parameters:
        new._parameters["weight"] = None
    return new


@torch.no_grad()
def _call(cls: type, module: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn.RMSNorm on mixed dtypes
        return cls.forward(module, x)


def _share_off(ours: Tensor, theirs: Tensor) -> float:
    """How many of the values are further apart than the roundings of fp32 arithmetic put them."""
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return 1.0
    if theirs.dtype == torch.float32:
        # Theirs rounds the sum, the mean, the root and two products. Where the input has 16 bits and the family rounds to it,
        # a near-tie may fall the other way, but in few elements.
        off = (ours - theirs).abs() > 8 * torch.finfo(torch.float32).eps * theirs.abs()
    else:
        off = ours != theirs
    return off.float().mean().item()
