"""torch.nn.RMSNorm on this package's kernels, and the norm with a gate."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .functional import _C, fused_add_rms_norm, is_dynamo_compiling, rms_norm, rms_norm_gated
from .scriptable import ScriptableRMSNorm


def plain_eps(eps: Any) -> Any:
    """A Python float of a number of numpy, which torch.compile would take for a tensor."""
    return float(eps) if isinstance(eps, numbers.Real) and type(eps) not in (int, float) else eps


class RMSNorm(torch.nn.RMSNorm):
    """A drop-in for `torch.nn.RMSNorm`: same constructor, same parameters, same state_dict.

    Args beyond those of `torch.nn.RMSNorm`:
        weight_offset: added to the weight in fp32; 1.0 is the Gemma family.
        cast_before_weight: round to the input's dtype before the weight is multiplied in, and
            return the promotion of both dtypes: the Llama, Mistral and Qwen families of
            transformers.

    A fresh weight is 1 - weight_offset, so that a new module scales by one: ones by default, zeros
    for the Gemma family.
    """

    weight_offset: float = 0.0
    cast_before_weight: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        """Fills the weight, if ``elementwise_affine`` asks for one; see the class."""
        super().__init__(
            normalized_shape, plain_eps(eps), elementwise_affine, device=device, dtype=dtype
        )
        self.weight_offset = weight_offset
        self.cast_before_weight = cast_before_weight
        if weight_offset != 0.0:  # the base class filled the weight before it knew of the offset
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    if TYPE_CHECKING:
        # The second form is not Tensor, Tensor -> two tensors: then a subclass with the signature
        # of torch's would be an error.
        @overload
        def forward(self, x: Tensor) -> Tensor: ...
        @overload
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the norm of x + residual and that sum, as the layers of
        serving stacks expect.

        Shapes, dtypes and errors are those of :func:`rms_norm` and :func:`fused_add_rms_norm`.
        """
        # self.weight would go through nn.Module.__getattr__. The parameter is not in _parameters
        # where someone replaced it by a tensor or a property: parametrizations, DataParallel
        # replicas, FSDP1 views.
        try:
            weight = self._parameters["weight"]
        except KeyError:
            weight = self.weight
        eps, offset, cast = self.eps, self.weight_offset, self.cast_before_weight
        if residual is not None:
            self._check_residual(x, weight)
            return fused_add_rms_norm(
                x, residual, weight, eps, weight_offset=offset, cast_before_weight=cast
            )
        shape = self.normalized_shape
        if not is_dynamo_compiling():  # what rms_norm does first: a Python call less
            result = _C.rms_norm(x, shape, weight, eps, offset, cast)
            if result is not None:
                return result
        return rms_norm(x, shape, weight, eps, weight_offset=offset, cast_before_weight=cast)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script() takes instead."""
        is_ours = type(self).forward.__code__.co_code == RMSNorm.forward.__code__.co_code
        if not is_ours or "weight" not in self._parameters:
            raise NotImplementedError(
                f"torch.jit.script: {type(self).__name__} computes more than RMSNorm, and "
                "TorchScript cannot compile its forward; use torch.jit.trace or torch.export"
            )
        return ScriptableRMSNorm(self)

    def _check_residual(self, x: Tensor, weight: Tensor | None) -> None:
        shape = self.normalized_shape
        if len(shape) != 1:
            raise ValueError(
                "RMSNorm: a residual needs a normalized_shape of one dimension, but it is "
                f"{tuple(shape)}"
            )
        # Else the op compares it with the weight; torch.fx cannot trace a comparison.
        if weight is None and x.shape[-1:] != shape:
            raise RuntimeError(
                f"RMSNorm: given normalized_shape={list(shape)}, expected input with that shape at "
                f"the end, but got input of size {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset != 0.0 else ""
        cast = ", cast_before_weight=True" if self.cast_before_weight else ""
        return super().extra_repr() + offset + cast


class RMSNormGated(torch.nn.Module):
    """:func:`rms_norm_gated` with its weight: the norm of the linear attentions of Qwen3-Next and
    Kimi-Linear and, with ``norm_before_gate=False``, of the mixers of Mamba 2.

    Args:
        hidden_size: of the last dimension.
        eps, activation, norm_before_gate, group_size, weight_offset, cast_before_weight: as of
            :func:`rms_norm_gated`.
        elementwise_affine: whether there is a weight, ``(hidden_size,)``, which begins as 1 -
            weight_offset. False: ``weight`` is None.
        device, dtype: of the weight.

    Raises:
        ValueError: another activation, or rows that are no whole groups.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        """Fills the weight, if ``elementwise_affine`` asks for one."""
        super().__init__()
        if activation not in ("silu", "sigmoid"):
            raise ValueError(
                "RMSNormGated: expected activation to be 'silu' or 'sigmoid', but got "
                f"{activation!r}"
            )
        if group_size is not None and (group_size <= 0 or hidden_size % group_size):
            raise ValueError(
                f"RMSNormGated: expected group_size to divide hidden_size {hidden_size}, but got "
                f"{group_size}"
            )
        self.hidden_size = hidden_size
        self.eps = plain_eps(eps)
        self.elementwise_affine = elementwise_affine
        self.activation = activation
        self.norm_before_gate = norm_before_gate
        self.group_size = group_size
        self.weight_offset = weight_offset
        self.cast_before_weight = cast_before_weight
        weight = None
        if elementwise_affine:
            weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The norm of x and the gate; without a gate the norm alone, of groups if there are any.

        Shapes, dtypes and errors are those of :func:`rms_norm_gated`.
        """
        return rms_norm_gated(
            x,
            gate,
            self.weight,
            self.eps,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        options = {
            "activation": (self.activation, "silu"),
            "norm_before_gate": (self.norm_before_gate, True),
            "group_size": (self.group_size, None),
            "weight_offset": (self.weight_offset, 0.0),
            "cast_before_weight": (self.cast_before_weight, False),
        }
        told = "".join(f", {k}={value}" for k, (value, usual) in options.items() if value != usual)
        affine = self.elementwise_affine
        return f"{self.hidden_size}, eps={self.eps}, elementwise_affine={affine}{told}"
