"""replace_rms_norm(model): puts this package's RMSNorm in place of the norms of a model that
already exists.

Nothing here imports transformers but patch_transformers(), which has it build models with ours from
the start.
"""

from __future__ import annotations

import contextlib
import importlib
import numbers
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..again import is_a
from ..modules import RMSNorm, RMSNormGated
from .families import Family, GatedFamily, give_back, twin
from .fuse_residual import fuse
from .fuse_rope import fuser
from .recognize import MODULE_ATTRIBUTES, Recognized, has_buffer_of_ones, recognize
from .rewrite import unfuse


class Replaced(NamedTuple):
    name: str  # as in named_modules(); a module in two places is listed twice, with one `new`
    old: nn.Module
    new: RMSNorm | RMSNormGated
    family: Family | GatedFamily


class Fused(NamedTuple):
    name: str
    layer: nn.Module
    norms: tuple[str, ...]  # the attributes of the layer that take the residual now, or rotate

    def __repr__(self) -> str:  # without all that the layer holds
        return f"<{self.name}, a {type(self.layer).__name__}: {', '.join(self.norms)}>"


class Skipped(NamedTuple):
    name: str
    module: nn.Module
    reason: str

    def __repr__(self) -> str:
        return f"<{self.name}, a {type(self.module).__name__}: {self.reason}>"


class Replacement(list):
    """The swaps that were made, a list of Replaced, and in `.skipped` the RMSNorm look-alikes left
    alone.

    `.fused` are the layers whose residual additions or rotary embeddings happen in our norms.
    restore() undoes all of it, as does leaving a `with` block. Old and new module share their
    parameters, hooks and training flag, so what happened to one in the meantime holds for the
    other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.skipped: list[Skipped] = []
        self.fused: list[Fused] = []
        self._model = model

    def restore(self) -> None:
        """Puts the original modules back, except where somebody else has replaced ours since.
        Idempotent.
        """
        for _, layer, _ in self.fused:
            unfuse(layer)
        modules = dict(self._model.named_modules(remove_duplicate=False))
        swaps = [(name, old, new) for name, old, new, _ in self if modules.get(name) is new]
        old_of = {new: old for _, old, new in swaps}  # once, also where a module is in two places
        for new, old in old_of.items():
            give_back(old, new)
        for name, old, _ in swaps:
            path, _, child = name.rpartition(".")
            setattr(modules[path], child, old)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc_info) -> None:
        self.restore()

    def __repr__(self) -> str:
        kinds = Counter(type(old).__name__ for _, old, _, _ in self)
        swapped = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
        fused = f", {len(self.fused)} layers fused" if self.fused else ""
        return f"<Replacement: {swapped} replaced{fused}, {len(self.skipped)} skipped>"


def replace_rms_norm(
    model: nn.Module,
    match: Callable[[str, nn.Module], bool] | None = None,
    *,
    fuse_residual: bool = False,
    fuse_rope: bool = False,
) -> Replacement:
    """Swaps, in place, the norms of `model` for rmsnorm_cuda.RMSNorm with the same parameters and
    rounding order.

    Which family's norm a module is, and its eps, is found by trying a copy of it, whatever its
    class is called: rounding order, offset and dtypes are those of
    `rmsnorm_cuda.integrations.families.FAMILIES`. That covers the RMSNorms of transformers (Llama,
    Mistral, Qwen, Gemma, Olmo, T5, Phi-3, GLM, DeepSeek and those that are built like them),
    torch.nn.RMSNorm and most that people write themselves. Parameters stay the same objects: an
    optimizer keeps working, and state_dict() keeps its keys. What is named like an RMSNorm and
    computes something else stays, and is listed in `.skipped` with the reason. A model without such
    norms, or swapped before, gives an empty result.

    Args:
        model: changed in place; compiled or not.
        match: ``match(name, module)`` says which modules are meant, for classes that are not called
            ...RMSNorm. Each of them is tried in the same way, and swapped or skipped. Their one
            parameter has to be called `weight`.
        fuse_residual: also let the norms of decoder layers add the residual themselves, where the
            layer's forward is seen to do ``h = residual + h; residual = h; h = self.norm(h)``, or
            ``h = self.norm(h); h = residual + h``, or one after the other. The same bits in the
            forward, fewer passes over memory; in the backward both gradients of the sum are added
            before they are rounded, once instead of twice. A layer whose forward has no such place
            is listed in `.skipped`.
        fuse_rope: also let the norms of q and k do the rotary embedding, where an attention's
            forward is seen to norm both and then to call ``apply_rotary_pos_emb(q, k, cos, sin)``.
            One call of :func:`rms_norm_rope` for all of it. The same bits in the forward; in the
            backward the gradient between the two steps is not rounded. An attention of another
            form, or whose rotary embedding rounds otherwise, is listed in `.skipped`.

        swap = replace_rms_norm(model)        # or: with replace_rms_norm(model): ...
        swap.restore()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_rms_norm: expected a torch.nn.Module, got {type(model).__name__}")
    if match is not None and (not callable(match) or isinstance(match, type)):
        raise TypeError(
            "replace_rms_norm: expected match to be a function of a name and a module, got "
            f"{match!r}"
        )
    result = Replacement(model)
    try:
        _swap(model, match, result)
        if fuse_residual:
            _fuse(model, lambda _, layer: fuse(layer), result)
        if fuse_rope:
            _fuse(model, fuser(model), result)
    except BaseException:
        result.restore()
        raise
    return result


def _swap(model, match, result: Replacement) -> None:
    new_of: dict[nn.Module, RMSNorm | RMSNormGated] = {}
    known: dict[tuple, Recognized | str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        ours = is_a(module, RMSNorm) or is_a(module, RMSNormGated)
        if ours or not (match or _may_be_rms_norm)(name, module):
            continue
        path, _, child = name.rpartition(".")
        parent = modules[path] if name else None
        found = _reason_to_skip(module, parent) or _recognize_once(module, known)
        if not isinstance(found, str) and parent is None:
            ours = "RMSNormGated" if isinstance(found.family, GatedFamily) else "RMSNorm"
            raise ValueError(
                f"replace_rms_norm: the model is itself a {type(module).__name__}, and a module "
                f"can only be replaced inside a parent; construct rmsnorm_cuda.{ours} instead"
            )
        if not isinstance(found, str) and module not in new_of:
            try:
                new_of[module] = twin(module, *found)
            except TypeError as error:  # a class that does not let others be derived from it
                found = f"no class can be derived from {type(module).__name__}: {error}"
        if not isinstance(found, str):
            setattr(parent, child, new_of[module])
            result.append(Replaced(name, module, new_of[module], found.family))
        elif match or _named_rms_norm(module):
            result.skipped.append(Skipped(name, module, found))


def _fuse(model: nn.Module, fuse_it: Callable, result: Replacement) -> None:
    for name, layer in model.named_modules():
        fused = fuse_it(name, layer)
        if isinstance(fused, str):
            result.skipped.append(Skipped(name, layer, fused))
        elif fused:
            result.fused.append(Fused(name, layer, fused))


@contextlib.contextmanager
def patch_transformers(*model_types: str) -> Iterator[dict[str, type]]:
    """Within the block, from_pretrained() and from_config() of transformers build models of these
    types with our norms.

        with patch_transformers("llama", "gemma3"):  # config.model_type
            model = AutoModelForCausalLM.from_pretrained(...)

    Uses transformers' own register_patch_mapping(). Yields the mapping: every class of the types'
    modeling modules with "Norm" in its name. Each norm is tried as it is built; one that is not
    recognized stays the original. Where from_config() scales fresh weights of norms (T5's
    initializer_factor), ours are 1: replace_rms_norm() afterwards leaves weights as they are.
    """
    from transformers import monkey_patching

    mapping: dict[str, type] = {}
    known: dict[tuple, Recognized | str] = {}
    for model_type in model_types:
        name = f"transformers.models.{model_type}.modeling_{model_type}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            raise ValueError(
                "patch_transformers: expected names such as config.model_type has them, got "
                f"{model_type!r}"
            ) from error
        mapping |= {name: _building_twins(cls, known) for name, cls in norm_classes(module).items()}
    monkey_patching.register_patch_mapping(mapping)
    try:
        yield mapping
    finally:
        monkey_patching.unregister_patch_mapping(list(mapping))


def norm_classes(module: types.ModuleType) -> dict[str, type]:
    """The classes that a modeling module defines and calls a norm."""
    return {
        name: cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and "Norm" in name
        if cls.__module__ == module.__name__
    }


def _building_twins(original: type, known: dict[tuple, Recognized | str]) -> type:
    """A class to call in place of `original`: builds one, and returns its twin if it is of a known
    family.
    """

    class Builder(original):
        def __new__(cls, *args, **kwargs):
            old = original(*args, **kwargs)
            found = _recognize_once(old, known)
            return old if isinstance(found, str) else twin(old, *found)

    Builder.__name__, Builder.__qualname__ = original.__name__, original.__qualname__
    return Builder


def _named_rms_norm(module: nn.Module) -> bool:
    return any("RMSNorm" in cls.__name__ for cls in type(module).__mro__)


def _may_be_rms_norm(name: str, module: nn.Module) -> bool:
    """Named so, or a norm with no bias that torch does not bring: T5 calls its RMSNorm a
    LayerNorm.
    """
    own = not type(module).__module__.startswith("torch.")
    return _named_rms_norm(module) or (
        own and "Norm" in type(module).__name__ and not list(module.children())
    )


def _reason_to_skip(module: nn.Module, parent: nn.Module | None) -> str:
    if "forward" in vars(module):
        return (
            "its forward was replaced on this instance (accelerate hooks, kernels, Liger, ...); "
            "swap before that"
        )
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    if compiled or type(parent).__name__ == "OptimizedModule":
        return "it was compiled by itself; swap first, then compile"
    return ""


def _recognize_once(module: nn.Module, known: dict[tuple, Recognized | str]) -> Recognized | str:
    """recognize(), once for all modules of a class that have the same settings and shape, if these
    are all that they have.
    """
    attributes = {key: value for key, value in vars(module).items() if key not in MODULE_ATTRIBUTES}
    plain = (numbers.Number, str, torch.dtype, type(None))
    values = (value if isinstance(value, tuple) else [value] for value in attributes.values())
    if not all(isinstance(part, plain) for value in values for part in value):
        return recognize(module)
    held = (*module._parameters.items(), *module._buffers.items())
    shapes = ((name, None if t is None else t.shape) for name, t in held)
    key = type(module), *attributes.items(), *shapes, has_buffer_of_ones(module)
    if key not in known:
        known[key] = recognize(module)
    return known[key]
