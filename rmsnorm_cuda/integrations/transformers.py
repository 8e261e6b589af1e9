"""replace_rms_norm(model): puts this package's RMSNorm in place of the norms of a model that already exists.

Classes are recognised by their name, so nothing here imports transformers.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from ..modules import RMSNorm

# Exact classes only: a subclass may have a forward of its own. tests/test_replace.py compares every row with
# the class it names. The last two columns: is the normalized value rounded to the input's dtype before it is
# multiplied by the weight, and which attribute holds eps.
_KNOWN = {
    "torch.nn.modules.normalization.RMSNorm": (False, "eps"),
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": (True, "variance_epsilon"),
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm": (True, "variance_epsilon"),
    "transformers.models.mixtral.modeling_mixtral.MixtralRMSNorm": (True, "variance_epsilon"),
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm": (True, "variance_epsilon"),
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeRMSNorm": (True, "variance_epsilon"),
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm": (True, "variance_epsilon"),
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm": (True, "variance_epsilon"),
}


class Replaced(NamedTuple):
    name: str  # as in model.named_modules(); a module that sits in two places is listed twice, with one `new`
    old: nn.Module
    new: RMSNorm


class Skipped(NamedTuple):
    name: str
    module: nn.Module
    reason: str


class Replacement(list):
    """The swaps that were made, a list of Replaced, and in `.skipped` the RMSNorm look-alikes left alone.

    restore() undoes the swap, as does leaving a `with` block. Old and new module share their parameters,
    hooks and training flag, so what happened to one in the meantime holds for the other.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.skipped: list[Skipped] = []
        self._model = model

    def restore(self) -> None:
        """Puts the original modules back, except where somebody else has replaced ours since. Idempotent."""
        for name, old, new in self:
            parent, child = _slot(self._model, name)
            if parent is not None and parent._modules.get(child) is new:
                vars(old).update((key, value) for key, value in vars(new).items() if key in vars(old))
                setattr(parent, child, old)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc_info) -> None:
        self.restore()

    def __repr__(self) -> str:
        kinds = Counter(type(old).__name__ for _, old, _ in self)
        swapped = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
        return f"<Replacement: {swapped} replaced, {len(self.skipped)} skipped>"


def replace_rms_norm(model: nn.Module) -> Replacement:
    """Swaps, in place, the norms of `model` for rmsnorm_cuda.RMSNorm with the same parameters and rounding order.

    Swapped are torch.nn.RMSNorm and the norms of the Llama, Mistral, Mixtral, Qwen2 and Qwen3 models of
    transformers, q/k norms included. Parameters stay the same objects: an optimizer keeps working, and
    state_dict() keeps its keys. Any other module that is named like an RMSNorm stays and is listed in
    `.skipped`. A model without such norms, or swapped before, gives an empty result.

        swap = replace_rms_norm(model)        # or: with replace_rms_norm(model): ...
        swap.restore()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_rms_norm: expected a torch.nn.Module, got {type(model).__name__}")
    result = Replacement(model)
    new_of: dict[nn.Module, RMSNorm] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RMSNorm) or not _looks_like_rms_norm(module):
            continue
        parent, child = _slot(model, name)
        reason = _reason_to_skip(module, parent)
        if reason:
            result.skipped.append(Skipped(name, module, reason))
        elif parent is None:
            raise ValueError(
                f"replace_rms_norm: the model is itself a {type(module).__name__}, and a module can only be replaced "
                "inside a parent; construct rmsnorm_cuda.RMSNorm instead"
            )
        else:
            if module not in new_of:
                new_of[module] = _twin(module)
            setattr(parent, child, new_of[module])
            result.append(Replaced(name, module, new_of[module]))
    return result


def _slot(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that holds the submodule called `name`, and the name it has there; no parent for the root."""
    if not name:
        return None, ""
    path, _, child = name.rpartition(".")
    parent: nn.Module | None = model
    for part in path.split(".") if path else ():
        parent = parent._modules.get(part) if parent is not None else None
    return parent, child


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _looks_like_rms_norm(module: nn.Module) -> bool:
    return any(cls.__name__.endswith("RMSNorm") for cls in type(module).__mro__)


def _reason_to_skip(module: nn.Module, parent: nn.Module | None) -> str:
    if _qualified_name(module) not in _KNOWN:
        return f"{_qualified_name(module)} is not a known class, and its rounding order would be a guess"
    if "forward" in vars(module):
        return "its forward was replaced on this instance (accelerate hooks, kernels, Liger, ...)"
    if getattr(module, "_compiled_call_impl", None) is not None or type(parent).__name__ == "OptimizedModule":
        return "it was compiled by itself; swap first, then compile"
    return ""


def _twin(old: nn.Module) -> RMSNorm:
    """Our module on the very state of `old`: the same dictionaries of parameters and hooks, not copies.

    So a hook handle taken from either one removes the hook from both, and a parameter assigned to one
    (load_state_dict(assign=True), to_empty()) is there in the other.
    """
    cast_before_weight, eps_name = _KNOWN[_qualified_name(old)]
    new = RMSNorm.__new__(RMSNorm)
    vars(new).update(vars(old))
    vars(new).pop("variance_epsilon", None)
    new.normalized_shape = getattr(old, "normalized_shape", None) or tuple(old.weight.shape)
    new.eps = getattr(old, eps_name)
    new.elementwise_affine = old.weight is not None
    new.weight_offset = 0.0
    new.cast_before_weight = cast_before_weight
    return new
