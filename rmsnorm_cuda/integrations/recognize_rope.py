"""Which rotary embedding a function computes, and how the angles that a module makes lie: found by
trying them, on the CPU, on tensors of their own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .recognize import random_state_kept

LARGEST = 512  # columns of a head that the op rotates
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How a function wants cos and sin, one number for a pair of columns, to lie."""

    name: str
    words: str
    widths: int  # of the pairs, that they are wide
    has_to_be_shown: bool  # by the module that makes them

    def rotated(self, width: int) -> int:
        """How many columns they rotate."""
        return 2 * width // self.widths

    def part(self, width: int) -> slice:
        """The columns with one number for each pair."""
        return slice(None, None, 2) if self.name == "pairs" else slice(width // self.widths)

    def spread(self, angles: Tensor) -> Tensor:
        """One number for each pair, as the function wants them."""
        if self.name == "pairs":
            return angles.repeat_interleave(2, -1)
        if self.name == "halves":
            return torch.cat((angles, angles), -1)
        return angles if self.widths == 1 else torch.cat((angles, 2 - angles), -1)


LAYOUTS = (
    Layout("first half", "of which the first half is read", 2, False),
    Layout("halves", "whose halves are alike", 2, True),
    Layout("pairs", "whose neighbours are alike", 2, True),
    Layout("single", "of half the width", 1, False),
)


class Rotation(NamedTuple):
    layout: Layout
    interleaved: bool
    heads_dim: int
    is_partial: bool  # does it leave the columns that the angles do not reach?
    # For q's dtype and that of cos, in which the op with each step rounded has to be given cos.
    cos_dtypes: dict[tuple[torch.dtype, torch.dtype], torch.dtype]


class Angles(NamedTuple):
    made_by: str
    layouts: frozenset[str]
    widths: frozenset[int]
    in_fp32: bool  # or in the input's dtype


@cache
def recognize_rotation(
    function: Callable, keywords: tuple[tuple[str, object], ...], count: int
) -> Rotation | str:
    """What `function(q, k, cos, sin)` computes, or of count 1 `function(q, cos, sin)`; or why it is
    no rotary embedding that the op computes bit for bit.
    """
    # In a thread of its own no mode of torch is on.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_rotation, function, dict(keywords), count).result()


def _try_rotation(function: Callable, keywords: dict[str, object], count: int) -> Rotation | str:
    for layout, interleaved, heads_dim in product(LAYOUTS, (False, True), (-3, -2)):

        def is_this(dtypes, given, rotated=16):
            form = layout, interleaved, heads_dim
            return _rotates(function, keywords, count, *form, dtypes, given, rotated)

        if is_this((torch.float32, torch.float32), torch.float32):
            cos_dtypes = {}
            for dtype in _DTYPES:
                for of_cos, given in product((dtype, torch.float32), repeat=2):
                    if (dtype, of_cos) not in cos_dtypes and is_this((dtype, of_cos), given):
                        cos_dtypes[dtype, of_cos] = given
            partial = all(is_this(dtypes, given, 8) for dtypes, given in cos_dtypes.items())
            return Rotation(layout, interleaved, heads_dim, partial, cos_dtypes)
    return "computes no rotary embedding that is known"


def _rotates(
    function,
    keywords,
    count,
    layout: Layout,
    interleaved: bool,
    heads_dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    given_cos: torch.dtype,
    rotated: int,
) -> bool:
    """Whether it gives the bits of the formula with a cos of dtype `given_cos`, where q and cos
    have `dtypes`. With 16 columns each of the vectors and their rest is used.
    """
    dtype, cos_dtype = dtypes
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, heads, 16) for heads in (3, 2)[:count]]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    angles = torch.rand(2, 5, rotated // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    # Of the first head products cancel: what is left of them tells how they were rounded.
    a, b = _pairs(given[0][:, :, 0].float(), rotated // 2, interleaved)
    cos = torch.where(a.abs() * 2 > b.abs(), sin * b / a, cos)
    cos, sin = cos.to(cos_dtype), sin.to(cos_dtype)
    dim = 1 if heads_dim == -3 else 2
    given = [x.transpose(1, 2) if dim == 1 else x for x in given]
    theirs, ours = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    spread = layout.spread(cos), layout.spread(sin)
    try:
        with random_state_kept():
            results = function(*theirs, *spread, **keywords)
    except Exception:
        return False
    results = (results,) if count == 1 else results
    if not isinstance(results, tuple) or len(results) != count:
        return False
    for x, mine, result in zip(theirs, ours, results):
        ours_cos, ours_sin = (t.to(given_cos).unsqueeze(dim) for t in (cos, sin))
        want = _formula(mine, ours_cos, ours_sin, interleaved)
        if not (isinstance(result, Tensor) and result.requires_grad):
            return False
        if result.dtype != dtype or not torch.equal(result, want) or not torch.equal(x, mine):
            return False
        towards = torch.randn(want.shape, generator=generator).to(dtype)
        gradients = [torch.autograd.grad(y, t, towards)[0] for y, t in ((result, x), (want, mine))]
        few_roundings = 8 * torch.finfo(dtype).eps
        if not torch.allclose(*gradients, rtol=few_roundings, atol=few_roundings):
            return False
    return True


def _pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    rotated = x[..., : 2 * pairs]
    return (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)


def _formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """With each step rounded, and the result to x's dtype."""
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    a, b = _pairs(rotated, cos.shape[-1], interleaved)
    pair = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def recognize_angles(module: nn.Module) -> Angles | str:
    """How cos and sin lie that `module(x, position_ids)` makes, whatever its frequencies are; or
    why that is not known.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_angles, module).result()


def _try_angles(module: nn.Module) -> Angles | str:
    name = type(module).__name__
    try:
        copied = _with_other_frequencies(module)
        parameters = inspect.signature(type(module).forward).parameters
        kinds = [{}]
        if "layer_type" in parameters:
            kinds = [{"layer_type": kind} for kind in _layer_types(copied)] or kinds
        made = [
            _angles(copied, dtype, kind)
            for dtype, kind in product((torch.float32, torch.bfloat16), kinds)
        ]
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return f"{name} cannot be tried: {type(error).__name__}: {line}"
    halves = pairs = in_dtype = in_fp32 = True
    for dtype, angles in made:
        for each in angles:
            if not isinstance(each, Tensor) or each.shape[:-1] != (2, 5) or each.shape[-1] % 2:
                return f"{name} does not make cos and sin by token"
            first, second = each.chunk(2, -1)
            halves = halves and torch.equal(first, second)
            pairs = pairs and torch.equal(each[..., ::2], each[..., 1::2])
            in_dtype = in_dtype and each.dtype == dtype
            in_fp32 = in_fp32 and each.dtype == torch.float32
    if not in_dtype and not in_fp32:
        return f"{name} makes cos and sin neither in its input's dtype nor in fp32"
    layouts = [layout for layout, holds in (("halves", halves), ("pairs", pairs)) if holds]
    widths = (each.shape[-1] for _, angles in made for each in angles)
    return Angles(name, frozenset(layouts), frozenset(widths), in_fp32)


def _angles(module: nn.Module, dtype: torch.dtype, kind: dict[str, str]):
    x = torch.zeros(2, 5, 16, dtype=dtype)
    positions = torch.tensor([[1, 2, 5, 9, 17], [0, 3, 4, 8, 31]])
    with torch.no_grad(), random_state_kept():
        cos, sin = type(module).forward(module, x, positions, **kind)
    return dtype, (cos, sin)


def _layer_types(module: nn.Module) -> list[str]:
    """Of a module that has frequencies for each: `full_attention_inv_freq` and the like."""
    end, originals = "_inv_freq", "original_inv_freq"
    names = [name for name in module._buffers if name.endswith(end)]
    return [name.removesuffix(end) for name in names if not name.endswith(originals)]


def _with_other_frequencies(module: nn.Module) -> nn.Module:
    """A copy on the CPU without hooks. Its own may be on the meta device, or too alike to tell
    halves from neighbours.
    """
    new = object.__new__(type(module))
    nn.Module.__init__(new)
    plain = vars(nn.Module()).keys()
    generator = torch.Generator().manual_seed(0)
    for key, value in vars(module).items():
        if key not in plain and key != "forward":
            vars(new)[key] = copy.deepcopy(value)
    for key, value in module._buffers.items():
        new._buffers[key] = None if value is None else torch.rand(value.shape, generator=generator)
    for key, value in vars(new).items():
        if isinstance(value, Tensor):
            vars(new)[key] = torch.rand(value.shape, generator=generator)
    if module._parameters or module._modules:
        raise ValueError("it has parameters or modules")
    return new.train(module.training)
