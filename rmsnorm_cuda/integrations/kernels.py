"""Layers for the `kernels` library: `kernelize(model)` puts them in place of the forwards of a
model's norms.

    from kernels import Mode
    from rmsnorm_cuda.integrations.kernels import kernelize

    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

A layer's name says nothing of the rounding order: transformers has "RMSNorm" on the norms of Llama,
Olmo and GPT-OSS alike. So the layer finds out whose forward it takes the place of, as
replace_rms_norm() does, when that is first called. What is not recognized runs its own forward, and
a warning tells why. Nothing here imports `kernels`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from .families import gate as normalize_and_gate
from .families import normalize
from .recognize import Recognized, recognize

# The names that transformers decorates its norms with.
LAYER_NAMES = ("RMSNorm", "RMSNormZeroCentered", "RMSNormGated")


@dataclass(frozen=True)
class Repository:
    """What a mapping of `kernels` holds for a device: where a layer is loaded from. Here nothing is
    downloaded.
    """

    layer_name: str = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return RMSNormGated if self.layer_name == "RMSNormGated" else RMSNorm

    def __str__(self) -> str:
        return f"rmsnorm_cuda (layer `{self.layer_name}`)"


def mapping(
    layer_names: Iterable[str] = LAYER_NAMES, devices: Iterable[str] = ("cpu", "cuda")
) -> dict[str, dict[str, Repository]]:
    """For use_kernel_mapping() and register_kernel_mapping(): our layer for these names on these
    devices, in every mode.
    """
    return {name: dict.fromkeys(devices, Repository(name)) for name in layer_names}


def kernelize(
    model: nn.Module, *, layer_names: Iterable[str] = LAYER_NAMES, **options
) -> nn.Module:
    """`kernels.kernelize(model, **options)` with our mapping, and a warning where that changes
    nothing.

    It changes the modules whose class carries one of the names. transformers gives them where it
    accepts the version of `kernels` that is installed; where it does not, no norm has one, and
    `kernels` says nothing.
    """
    import kernels

    names = set(layer_names)
    marks = {getattr(type(module), "kernel_layer_name", None) for module in model.modules()}
    if not marks & names:
        warnings.warn(
            f"rmsnorm_cuda: no module of this {type(model).__name__} is marked as one of "
            f"{', '.join(sorted(names))}, so that kernelize() changes none: does this transformers "
            "accept this version of `kernels`? replace_rms_norm(model) does not need the marks",
            stacklevel=2,
        )
    with kernels.use_kernel_mapping(mapping(names)):
        return kernels.kernelize(model, **options)


class RMSNorm(nn.Module):
    """Only its forward is used, bound to the model's own module. `kernels` allows it no constructor
    and no other members.
    """

    # From 2.12 on Dynamo reads a module's __dict__, which tells whose forward this stands for.
    can_torch_compile = torch.__version__ >= "2.12.dev0"
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = _found(self)
        if isinstance(found, str):
            return type(self).forward(self, hidden_states)
        weight = getattr(self, "weight", None)
        shape = self.__dict__.get("normalized_shape") or (
            hidden_states.shape[-1:] if weight is None else weight.shape
        )
        return normalize(hidden_states, shape, weight, found.eps, found.family)


class RMSNormGated(nn.Module):
    """The same of norms with a gate."""

    can_torch_compile = RMSNorm.can_torch_compile
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        found = _found(self)
        if isinstance(found, str):
            return type(self).forward(self, hidden_states, gate)
        weight = getattr(self, "weight", None)
        return normalize_and_gate(hidden_states, gate, weight, found.eps, found.family)


def _found(module: nn.Module) -> Recognized | str:
    # Compiled, the module's settings are read each time and guarded: one graph serves all layers,
    # and another eps is another graph. In eager that would take as long as a short norm.
    if torch.compiler.is_compiling():
        return _recognize(type(module), *_settings(module))
    # eps may be set again.
    numbers = [value for value in module.__dict__.values() if type(value) is float]
    before, found = module.__dict__.get("_rmsnorm_cuda_family", (None, None))
    if before != numbers:
        found = _recognize(type(module), *_settings(module))
        module.__dict__["_rmsnorm_cuda_family"] = numbers, found
    return found


def _settings(module):
    """(attributes, shape of the weight, what else it holds): all that recognize() has to know of a
    module beside its class.
    """
    simple = (int, float, str, tuple, torch.dtype, type(None))
    # Of a float that differs between calls Dynamo makes a variable; guard_scalar() makes it a
    # constant again, with a guard.
    attributes = [
        (k, guard_scalar(v) if isinstance(v, float) else v)
        for k, v in module.__dict__.items()
        if k[0] != "_" and k != "training" and isinstance(v, simple)
    ]
    held = [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]
    weight = getattr(module, "weight", None)
    shape = None if weight is None else tuple([*weight.shape])
    return tuple(attributes), shape, tuple([k for k, v in held if v is not None and k != "weight"])


_known: dict[tuple, Recognized | str] = {}


@torch.compiler.assume_constant_result
def _recognize(cls, attributes, shape, others) -> Recognized | str:
    """recognize(), once for all modules of a class with these settings, also while Dynamo traces.

    The module that is tried is a new one, since Dynamo would tie a graph to the identity of one
    that is handed over. A class whose forward reads more of its module than numbers, strings and
    dtypes cannot be tried so, and keeps its own.
    """
    key = cls, attributes, shape, others
    if key not in _known:
        # In a thread of its own, where no mode of torch is on: torch.export would record what is
        # made there.
        with ThreadPoolExecutor(1) as thread:
            _known[key] = found = thread.submit(_try, *key).result()
        if isinstance(found, str):
            message = f"rmsnorm_cuda: {cls.__name__} keeps its own forward: {found}"
            warnings.warn(message, stacklevel=3)
    return _known[key]


def _try(cls, attributes, shape, others) -> Recognized | str:
    module = object.__new__(cls)  # without the constructor, whose arguments nobody knows
    nn.Module.__init__(module)
    vars(module).update(attributes)
    weight = None if shape is None else nn.Parameter(torch.empty(shape, device="meta"))
    module.register_parameter("weight", weight)
    module._buffers.update((name, torch.empty(0)) for name in others)
    return recognize(module)
