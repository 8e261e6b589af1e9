"""The ops in ONNX, for both exporters of torch.onnx.export(): opset 23's RMSNormalization where
that computes the same, else the formula. Registered by itself, as soon as an exporter is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .when_imported import when_imported

_FLOAT, _DOUBLE = 1, 11  # of ONNX's TensorProto.DataType


class _Ops:
    """ONNX's ops in the current exporter, which traces functions over onnxscript's."""

    def __init__(self, opset: Any, has_norm: bool) -> None:
        self.opset, self.has_norm = opset, has_norm

    def __call__(self, name: str, *inputs: Any, **attributes: Any) -> Any:
        return getattr(self.opset, name)(*inputs, **attributes)

    def dtype(self, x: Any) -> int:
        return int(x.dtype)

    def number(self, value: float) -> Any:
        return self.opset.Constant(value_float=float(value))

    def mean(self, x: Any, axes: list[int]) -> Any:
        return self.opset.ReduceMean(x, self.opset.Constant(value_ints=axes), keepdims=1)


class _Graph(_Ops):
    """The same in the older exporter, which adds nodes to TorchScript's graph."""

    def __init__(self, graph: Any, opset_version: int) -> None:
        super().__init__(graph, has_norm=False)
        self.opset_version = opset_version

    def __call__(self, name: str, *inputs: Any, **attributes: Any) -> Any:
        suffix = {int: "_i", float: "_f"}
        typed = {key + suffix[type(value)]: value for key, value in attributes.items()}
        return self.opset.op(name, *inputs, **typed)

    def dtype(self, x: Any) -> int:
        return int(torch.onnx.JitScalarType.from_value(x).onnx_type())

    def number(self, value: float) -> Any:
        return self.opset.op("Constant", value_t=torch.tensor(float(value), dtype=torch.float32))

    def mean(self, x: Any, axes: list[int]) -> Any:
        if self.opset_version < 18:
            return self.opset.op("ReduceMean", x, axes_i=axes, keepdims_i=1)
        constant = self.opset.op("Constant", value_t=torch.tensor(axes))
        return self.opset.op("ReduceMean", x, constant, keepdims_i=1)


def _formula(op, x, x_dtype, axes, weight, eps, weight_offset, cast_before_weight, cast_to=None):
    dtypes = {x_dtype} if weight is None else {x_dtype, op.dtype(weight)}
    compute, result = _DOUBLE if _DOUBLE in dtypes else _FLOAT, x_dtype

    def constant(value):
        return op("Cast", op.number(value), to=compute)

    wide = op("Cast", x, to=compute)
    y = op("Div", wide, op("Sqrt", op("Add", op.mean(op("Mul", wide, wide), axes), constant(eps))))
    if weight is not None:
        if cast_before_weight:
            y = op("Cast", op("Cast", y, to=cast_to or result), to=compute)
            result = result if len(dtypes) == 1 else compute
        gain = op("Cast", weight, to=compute)
        y = op("Mul", y, gain if weight_offset == 0 else op("Add", gain, constant(weight_offset)))
    return op("Cast", y, to=result)


def _norm(op, x, x_dtype, axes, weight, eps, weight_offset, cast_before_weight, cast_to=None):
    if eps is None:
        eps = torch.finfo(torch.float64 if x_dtype == _DOUBLE else torch.float32).eps
    # RMSNormalization rounds once, in the weight's dtype, and computes in fp32.
    rounds_once = not cast_before_weight or (cast_to or x_dtype) == _FLOAT
    has_op = op.has_norm and weight_offset == 0 and rounds_once and x_dtype != _DOUBLE
    if has_op and weight is not None and op.dtype(weight) == x_dtype:
        return op("RMSNormalization", x, weight, axis=axes[0], epsilon=eps, stash_type=_FLOAT)
    return _formula(op, x, x_dtype, axes, weight, eps, weight_offset, cast_before_weight, cast_to)


def _fused_add(op, input, residual, weight, eps, weight_offset, cast_before_weight, round_sum):
    dtype, total_dtype = op.dtype(input), op.dtype(residual)
    compute = _DOUBLE if dtype == _DOUBLE else _FLOAT
    total = op("Add", op("Cast", input, to=compute), op("Cast", residual, to=compute))
    rounded = op("Cast", total, to=total_dtype)
    x, x_dtype = (rounded, total_dtype) if round_sum else (total, compute)
    options = weight_offset, cast_before_weight, total_dtype
    y = _norm(op, x, x_dtype, [-1], weight, eps, *options)
    promoted = cast_before_weight and weight is not None and op.dtype(weight) != dtype
    return op("Cast", y, to=compute if promoted else dtype), rounded


def _added_dtype(op, input, weight, cast_before_weight):
    """Of the norm of an input."""
    dtype = op.dtype(input)
    if not cast_before_weight or weight is None or op.dtype(weight) == dtype:
        return dtype
    return _DOUBLE if _DOUBLE in (dtype, op.dtype(weight)) else _FLOAT


def _norm_add(op, input, residual, weight, eps, scale, weight_offset, cast_before_weight):
    options = weight, eps, weight_offset, cast_before_weight
    norm = _norm(op, input, op.dtype(input), [-1], *options)
    total_dtype = op.dtype(residual)
    compute = _DOUBLE if total_dtype == _DOUBLE else _FLOAT
    total = op("Add", op("Cast", norm, to=compute), op("Cast", residual, to=compute))
    total = op("Cast", total, to=total_dtype)
    if scale != 1:
        factor = op("Cast", op.number(scale), to=compute)
        total = op("Cast", op("Mul", op("Cast", total, to=compute), factor), to=total_dtype)
    return total


def _norm_add_norm(op, input, residual, input_weight, weight, eps, scale, *options):
    total = _norm_add(op, input, residual, input_weight, eps, scale, *options)
    y = _norm(op, total, op.dtype(residual), [-1], weight, eps, *options)
    dtype = _added_dtype(op, input, input_weight, options[1])
    if options[1] and weight is not None and op.dtype(weight) != dtype:
        dtype = _DOUBLE if _DOUBLE in (dtype, op.dtype(weight)) else _FLOAT
    return op("Cast", y, to=dtype), total


def _register() -> None:
    from onnxscript.onnx_opset import opset18, opset23
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

    # The exporter reads names, types and defaults off the functions.
    def implement(op, introduced):
        def rms_norm(
            input,
            normalized_shape: Sequence[int],
            weight=None,
            eps: float | None = None,
            weight_offset: float = 0.0,
            cast_before_weight: bool = False,
        ):
            axes, options = [*range(-len(normalized_shape), 0)], (weight_offset, cast_before_weight)
            return _norm(op, input, op.dtype(input), axes, weight, eps, *options)

        def fused_add_rms_norm(
            input,
            residual,
            weight=None,
            eps: float | None = None,
            weight_offset: float = 0.0,
            cast_before_weight: bool = False,
            round_sum: bool = True,
        ):
            options = weight_offset, cast_before_weight, round_sum
            return _fused_add(op, input, residual, weight, eps, *options)

        def rms_norm_add(
            input,
            residual,
            weight=None,
            eps: float | None = None,
            weight_offset: float = 0.0,
            cast_before_weight: bool = False,
        ):
            options = weight_offset, cast_before_weight
            return _norm_add(op, input, residual, weight, eps, 1, *options)

        def rms_norm_add_rms_norm(
            input,
            residual,
            input_weight,
            weight,
            eps: float | None = None,
            scale: float = 1.0,
            weight_offset: float = 0.0,
            cast_before_weight: bool = False,
        ):
            options = eps, scale, weight_offset, cast_before_weight
            return _norm_add_norm(op, input, residual, input_weight, weight, *options)

        functions = rms_norm, fused_add_rms_norm, rms_norm_add, rms_norm_add_rms_norm
        for function in functions:
            overload = getattr(torch.ops.rmsnorm_cuda, function.__name__).default
            onnx_impl(overload, trace_only=True, opset_introduced=introduced)(function)

    implement(_Ops(opset18, has_norm=False), 18)
    implement(_Ops(opset23, has_norm=True), 23)


def _register_symbolic() -> None:
    from torch.onnx import register_custom_op_symbolic, symbolic_helper

    constant = symbolic_helper._maybe_get_const

    def given(weight, eps, weight_offset, *flags):
        """As Python has them, without nodes of the graph that stand for None."""
        if weight is not None and symbolic_helper._is_none(weight):
            weight = None
        eps = constant(eps, "f")
        eps = eps if isinstance(eps, float) else None
        return weight, eps, constant(weight_offset, "f"), *(constant(flag, "b") for flag in flags)

    def implement(opset_version):
        def rms_norm(g, input, normalized_shape, *options):
            op = _Graph(g, opset_version)
            shape = symbolic_helper._get_const(normalized_shape, "is", "normalized_shape")
            return _norm(op, input, op.dtype(input), [*range(-len(shape), 0)], *given(*options))

        def fused_add_rms_norm(g, input, residual, *options):
            return _fused_add(_Graph(g, opset_version), input, residual, *given(*options))

        def rms_norm_add(g, input, residual, *options):
            weight, eps, *rest = given(*options)
            return _norm_add(_Graph(g, opset_version), input, residual, weight, eps, 1, *rest)

        def rms_norm_add_rms_norm(g, input, residual, input_weight, weight, eps, scale, *rest):
            op, scale = _Graph(g, opset_version), constant(scale, "f")
            weight, eps, *rest = given(weight, eps, *rest)
            input_weight = None if symbolic_helper._is_none(input_weight) else input_weight
            return _norm_add_norm(op, input, residual, input_weight, weight, eps, scale, *rest)

        functions = rms_norm, fused_add_rms_norm, rms_norm_add, rms_norm_add_rms_norm
        for function in functions:
            name = function.__name__
            register_custom_op_symbolic(f"rmsnorm_cuda::{name}", function, opset_version)

    implement(9)
    implement(18)  # where the axes of ReduceMean have become an input


def register_when_imported() -> None:
    registry = "torch.onnx._internal.exporter._registration"
    when_imported((registry,), _register, "translation of its ops into ONNX")
    when_imported(("torch.onnx",), _register_symbolic, "symbolics of its ops")
