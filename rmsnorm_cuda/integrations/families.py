"""The RMSNorms that models are built with, and our module in place of one of them."""

from __future__ import annotations

import functools
import inspect
import types
from typing import NamedTuple

from torch import Tensor, nn

from ..again import is_a, same
from ..functional import rms_norm, rms_norm_gated
from ..modules import RMSNorm, RMSNormGated, plain_eps


class Family(NamedTuple):
    name: str
    weight_offset: float  # added to the weight
    cast_before_weight: bool  # is the normalized value rounded before the weight is multiplied in?
    result: str  # the result's dtype: the input's, the weight's, or the promotion of both
    # What the attribute is called that holds eps; a module's other numbers are tried after these.
    eps: tuple[str, ...]


# tests/test_families.py compares every row with classes of transformers; README.md lists who uses
# which.
FAMILIES = (
    Family("torch", 0.0, False, "input", ("eps", "variance_epsilon")),
    Family("llama", 0.0, True, "promoted", ("variance_epsilon", "eps")),
    Family("gemma", 1.0, False, "input", ("eps",)),
    Family("t5", 0.0, True, "weight", ("variance_epsilon",)),
)


class GatedFamily(NamedTuple):
    """Of two inputs; the result has the dtype that rms_norm_gated() gives it."""

    name: str
    norm_before_gate: bool
    cast_before_weight: bool
    activation: str = "silu"
    group_size: int | None = None
    eps: tuple[str, ...] = ("variance_epsilon", "eps")

    def options(self) -> dict[str, object]:
        return {key: getattr(self, key) for key in _GATED_OPTIONS}


_GATED_OPTIONS = ("activation", "norm_before_gate", "group_size", "cast_before_weight")

GATED_FAMILIES = (
    GatedFamily("qwen3-next", True, True),
    GatedFamily("kimi", True, False),
    GatedFamily("mamba2", False, True),
    GatedFamily("falcon-h1", False, False),
)


class RMSNormOfAnyWidth(RMSNorm):
    """Without a weight, and not told how long its rows are: it takes the last dimension as it
    comes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], None, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, elementwise_affine=False"


class RMSNormInWeightDtype(RMSNorm):
    """T5: normalized in fp32, rounded to the weight's dtype if that has 16 bits, multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        return _in_weight_dtype(x, self.normalized_shape, self.weight, self.eps)


def _in_weight_dtype(
    x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None
) -> Tensor:
    if x.dtype != weight.dtype:
        if weight.dtype.itemsize <= 2:
            return weight * rms_norm(x.float(), shape, None, eps).to(weight.dtype)
        x = x.to(weight.dtype)
    return rms_norm(x, shape, weight, eps, cast_before_weight=True)


def normalize(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None, family: Family
) -> Tensor:
    """What the family's twin() computes, as a function."""
    if family.result == "weight":
        return _in_weight_dtype(x, shape, weight, eps)
    offset, cast = family.weight_offset, family.cast_before_weight
    return rms_norm(x, shape, weight, eps, weight_offset=offset, cast_before_weight=cast)


def gate(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    family: GatedFamily,
) -> Tensor:
    """The same of a gated family."""
    return rms_norm_gated(
        x,
        gate,
        weight,
        eps,
        activation=family.activation,
        norm_before_gate=family.norm_before_gate,
        group_size=family.group_size,
        cast_before_weight=family.cast_before_weight,
    )


def twin(
    old: nn.Module,
    family: Family | GatedFamily,
    eps: float | None,
    eps_name: str | None = None,
    also_read: tuple[str, ...] = (),
) -> RMSNorm | RMSNormGated:
    """Our module on the very state of `old`: the same dictionaries of parameters and hooks, not
    copies.

    So a hook handle taken from either one removes the hook from both, and a parameter assigned to
    one (load_state_dict(assign=True), to_empty()) is there in the other. It is an instance of the
    class of `old` too, is called with the same parameter name, and has its other methods; what it
    calls eps, `eps_name`, is another name of eps. The other numbers that its forward reads,
    `also_read`, cannot be set any more: that would change nothing.
    """
    new = object.__new__(type(old))
    vars(new).update(vars(old))
    _become_twin(new, family, eps, eps_name, also_read)
    return new


def _become_twin(module, family, eps, eps_name, also_read) -> None:
    """twin(), made of the module itself."""
    state, weight = vars(module), module._parameters.get("weight")
    if isinstance(family, GatedFamily):
        return _become_gated_twin(module, family, eps, eps_name, also_read)
    shape = getattr(module, "normalized_shape", None) or None
    of_its_weight = "normalized_shape" not in state and weight is not None
    base = RMSNormInWeightDtype if family.result == "weight" else RMSNorm
    if weight is None and (shape is None or "weight" in module._buffers):
        base = RMSNormOfAnyWidth
    elif shape is None:
        shape = tuple(weight.shape)
    if eps_name is not None and eps_name != "eps":
        state.pop(eps_name)  # the class has it
    module.__class__ = twin_class(type(module), base, eps_name, of_its_weight, also_read)
    if "weight" not in module._buffers:  # of ones, which nothing reads
        module._parameters.setdefault("weight", None)
    state.update(
        normalized_shape=(shape,) if isinstance(shape, int) else shape,
        eps=eps,
        elementwise_affine=weight is not None,
        weight_offset=family.weight_offset,
        cast_before_weight=family.cast_before_weight,
    )


def _become_gated_twin(module, family, eps, eps_name, also_read) -> None:
    state, weight = vars(module), getattr(module, "weight", None)
    if eps_name is not None and eps_name != "eps":
        state.pop(eps_name)  # the class has it
    module.__class__ = twin_class(type(module), RMSNormGated, eps_name, False, also_read)
    module._parameters.setdefault("weight", None)
    width = None if weight is None else len(weight)
    state.update(hidden_size=width, eps=eps, elementwise_affine=weight is not None)
    state.update(family.options(), weight_offset=0.0)


def computing_class(cls: type[RMSNorm]) -> type[RMSNorm]:
    """The class whose forward this is; a twin's differs from it by the name of its input."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return vars(owner).get("_computes", cls)


def give_back(old: nn.Module, new: RMSNorm | RMSNormGated) -> None:
    """Gives the module that `new` is the twin of what happened to `new` since: a hook, a
    parametrization, another eps.
    """
    state = vars(old)
    made = next(cls for cls in type(new).__mro__ if "_twin_of" in vars(cls) or same(cls, RMSNorm))
    eps_name = getattr(made, "_eps_name", None) or "eps"
    settings = GATED_SETTINGS if is_a(new, RMSNormGated) else SETTINGS
    kept = {key: state[key] for key in (*settings, eps_name) if key in state}
    before = kept.get(eps_name)
    if eps_name in kept and (None if before is None else float(before)) != new.eps:
        kept[eps_name] = new.eps
    state.clear()
    state.update({key: value for key, value in vars(new).items() if key not in settings} | kept)
    if type(new) is not made:  # somebody derived a class from it
        old.__class__ = rebased(type(new), made, type(old))


# The attributes that are ours.
SETTINGS = ("normalized_shape", "eps", "elementwise_affine", "weight_offset", "cast_before_weight")
GATED_SETTINGS = ("hidden_size", "eps", "elementwise_affine", "weight_offset", *_GATED_OPTIONS)


def rebased(cls: type, made: type, original: type) -> type:
    """`cls`, which parametrize, FSDP or somebody else derived from the class `made`, as it would be
    derived from `original`.
    """
    if cls is made:
        return original
    bases = (rebased(b, made, original) if issubclass(b, made) else b for b in cls.__bases__)
    body = {k: value for k, value in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(bases), body)


@functools.cache
def twin_class(
    original: type,
    base: type[RMSNorm] | type[RMSNormGated],
    eps_name: str | None,
    of_its_weight: bool,
    also_read: tuple[str, ...],
) -> type[RMSNorm]:
    """The class of the twins of `original`: it computes what `base` does, and else is an
    `original`.
    """
    if original is nn.RMSNorm:
        return base
    settings = GATED_SETTINGS if base is RMSNormGated else SETTINGS

    class Twin(base, original):
        __doc__, __module__, __qualname__ = original.__doc__, base.__module__, base.__qualname__
        _twin_of, _computes, _eps_name = original, base, eps_name
        forward = called_with(base.forward, original.forward)
        vars().update({name: _fixed(name) for name in also_read if name not in settings})
        if eps_name is not None and eps_name != "eps":
            vars()[eps_name] = property(
                lambda self: self.eps,
                lambda self, eps: setattr(self, "eps", plain_eps(eps)),
                doc="Another name of eps.",
            )
        if hasattr(original, "reset_parameters"):
            reset_parameters = original.reset_parameters
        if hasattr(original, "kernel_layer_name"):
            # A mark of the `kernels` library, which would put another kernel there.
            kernel_layer_name = _Absent()

        def __init__(self, *args, **kwargs):
            """What type(norm)(...) calls: builds an `original`, and makes a twin of it if it is
            one."""
            from .recognize import recognize

            self.__class__ = original
            self.__init__(*args, **kwargs)
            found = recognize(self)
            if not isinstance(found, str):
                _become_twin(self, *found)

        def __reduce_ex__(self, protocol):
            _, _, *rest = super().__reduce_ex__(max(protocol, 2))
            return _new, (original, base, eps_name, of_its_weight, also_read), *rest

        if of_its_weight:

            def __setattr__(self, name, value):
                super().__setattr__(name, value)
                if name == "weight" and isinstance(value, Tensor):
                    # The original is as wide as its weight, whichever it is given.
                    self.normalized_shape = tuple(value.shape)

    Twin.__name__ = base.__name__
    return Twin


def _new(*args) -> RMSNorm:
    return object.__new__(twin_class(*args))


def _fixed(name: str) -> property:
    """A number of the instance that may be read only."""

    def refuse(self, value):
        raise AttributeError(
            f"{type(self).__name__}.{name} decided what the original computes, and is not read "
            "here: setting it would change nothing; set it before replace_rms_norm(), or "
            "restore() first"
        )

    return property(lambda self: vars(self)[name], refuse)


class _Absent:
    """An attribute that the class has and is not to show."""

    def __get__(self, instance, owner):
        raise AttributeError


def called_with(forward: types.FunctionType, other: types.FunctionType) -> types.FunctionType:
    """`forward`, whose inputs have the names that they have in `other`: norm(hidden_states=x)."""
    code, (_, *given) = forward.__code__, inspect.signature(other).parameters
    names = code.co_varnames
    count = min(len(given), code.co_argcount - 1)
    new_names = dict(zip(names[1 : count + 1], given))
    if all(name in names for name in new_names.values()):
        return forward
    code = code.replace(co_varnames=tuple(new_names.get(name, name) for name in names))
    new = types.FunctionType(
        code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    new.__doc__, new.__qualname__ = forward.__doc__, forward.__qualname__
    new.__annotations__ = {
        new_names.get(key, key): value for key, value in forward.__annotations__.items()
    }
    return new
