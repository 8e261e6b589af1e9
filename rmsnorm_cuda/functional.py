"""The public functions, and the fakes (shape functions) of the ops below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _C, config  # _C also registers torch.ops.rmsnorm_cuda
from .again import has_kernel
from .reference import compute_dtype

_ops = torch.ops.rmsnorm_cuda


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,  # as an int, since torch.compile(dynamic=True) takes a float default for a variable
    cast_before_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Root mean square layer normalization over the last dimensions.

    .. math:: y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot (\mathrm{weight} + \mathrm{weight\_offset})

    By default exactly :func:`torch.nn.functional.rms_norm`: computed in fp32 (fp64 if an argument is fp64), rounded
    once, to the dtype of ``input``, whatever the dtype of ``weight``. Zhang & Sennrich, "Root Mean Square Layer
    Normalization", NeurIPS 2019.

    Args:
        input: ``[*, *normalized_shape]``, fp32, fp16, bf16 or fp64, on the CPU or a CUDA device. Leading dimensions may
            have any strides (slices, transposed heads, expanded); only if the normalized dimensions are not dense is a
            copy made.
        normalized_shape: the sizes of the last dimensions, over which the mean is taken; an int is a shape of one.
        weight: ``normalized_shape``, any of those dtypes, same device. None: no scale.
        eps: added to the mean of squares, finite and not negative. None: the machine epsilon of the type that is
            computed in, ``1.1920928955078125e-07`` or, for fp64 input, ``2.220446049250313e-16``.
        weight_offset: added to the weight in fp32. 1.0 for the Gemma family, whose weights are stored minus one.
        cast_before_weight: round ``x / rms`` to the dtype of ``input`` and then multiply: the order of the Llama,
            Mistral and Qwen families. The result has the promoted dtype of ``input`` and ``weight``, as theirs has.
        out: written to and returned instead of a new tensor: same shape, the result's dtype, dense rows. May be
            ``input`` itself. Refused where a gradient would be recorded.

    Returns:
        ``[*, *normalized_shape]``, contiguous, differentiable with respect to ``input`` and ``weight``.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: eps is negative or not finite; ``input`` has too few dimensions.
        NotImplementedError: a dtype that is not one of the four.
        RuntimeError: shapes or devices do not match; ``out`` does not fit, overlaps ``input`` partly, or is given
            where a gradient is recorded. Nothing is written when an error is raised.
    """
    if not is_dynamo_compiling():
        return _C.rms_norm(input, normalized_shape, weight, eps, weight_offset, cast_before_weight, out)
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    arguments = input, normalized_shape, weight, eps
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    if out is None:
        op = _ops.rms_norm_formula if config.decompose else _ops.rms_norm
        # Of the packet's name nested tensors think that it is F.rms_norm. (The overload takes no tensor or numpy number as eps.)
        return (op.default if input.is_nested else op)(*arguments, **options)
    _ops.rms_norm.out(*arguments, **options, out=out)
    return out


def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual addition before a norm and the norm, in one pass: `input + residual`, and the norm of that over the last
    dimension.

    The same bits as the two steps: the sum is formed in fp32 (fp64 if both are fp64), rounded once to the dtype of
    ``residual``, and this rounded sum is normalized as :func:`rms_norm` would, and rounded once, to the dtype of ``input``
    also where ``residual`` is wider. Differentiable in all three tensors; the
    gradient that flows into the sum is added in the pass that forms that of the norm, and rounded once with it.

    Args:
        input: ``(*, N)``, fp32, fp16, bf16 or fp64.
        residual: the same shape; ``input``'s dtype or, beside a 16-bit ``input``, fp32.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: the machine epsilon of the type that is computed in.
        weight_offset: added to the weight in fp32; 1.0 is the Gemma family.
        cast_before_weight: round to ``residual``'s dtype before the weight is multiplied in.
        out: ``(output, residual_out)`` to write to and return instead of new tensors, with dense rows; they may be ``input``
            and ``residual``. Refused where a gradient would be recorded.

    Returns:
        ``(output, residual_out)``: the norm, ``(*, N)`` in ``input``'s dtype (with ``cast_before_weight`` the promotion of
        that and the weight's), and the sum, ``(*, N)`` in ``residual``'s.

    Raises:
        NotImplementedError: another dtype.
        TypeError: ``out`` is no tuple.
        ValueError: ``eps`` or ``weight_offset`` is not finite, or ``eps`` negative; ``input`` is a scalar; ``out`` holds another
            number of tensors.
        RuntimeError: shapes, dtypes or devices do not match; ``out`` does not fit, or overlaps what is read partly. Nothing is
            written then.
    """
    if out is None and not is_dynamo_compiling():
        results = _C.fused_add_rms_norm(input, residual, weight, eps, weight_offset, cast_before_weight)
        if results is not NotImplemented:
            return results
        _check_kinds("fused_add_rms_norm", eps, input=input, residual=residual)
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    if out is None:
        decompose = config.decompose and is_dynamo_compiling()
        op = _ops.fused_add_rms_norm_formula if decompose else _ops.fused_add_rms_norm
        return op(input, residual, weight, eps, **options)
    _check_count("fused_add_rms_norm", out, 2)
    output, total = out
    _ops.fused_add_rms_norm.out(input, residual, weight, eps, **options, out=output, residual_out=total)
    return output, total


def fused_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
) -> None:
    """:func:`fused_add_rms_norm` in place, for inference: ``input`` becomes the norm and ``residual`` the sum.

    Rows may be strided; the last dimension has to be contiguous. Arguments as there.

    Raises:
        RuntimeError: one of the tensors requires grad; ``input`` and ``residual`` share memory; rows overlap or are not
            contiguous; the result would not have ``input``'s dtype (``cast_before_weight`` beside a wider weight). Nothing
            is written then.
    """
    if not is_dynamo_compiling():
        if _C.fused_add_rms_norm_(input, residual, weight, eps, weight_offset, cast_before_weight) is None:
            return
        _check_kinds("fused_add_rms_norm_", eps, input=input, residual=residual)
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    _ops.fused_add_rms_norm_(input, residual, weight, eps, **options)


def rms_norm_quant(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    return_norm: bool = False,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    r"""RMSNorm over the last dimension, quantized to 8 bits for the matrix product that follows. For inference.

    The bits of the steps one by one: first the norm, rounded to its dtype as :func:`rms_norm` returns it; then, in fp32 from
    that, with :math:`M` = 448 (``float8_e4m3fn``), 57344 (``float8_e5m2``) or 127 (``int8``),

    * with a given ``scale``: :math:`q = y \cdot (1 / \mathrm{scale})`;
    * without: :math:`\mathrm{scale} = \max(\min(\max|y|, \mathrm{scale\_ub}) / M, \mathrm{least})` for each row (token) or
      ``block`` of columns, and :math:`q = y / \mathrm{scale}`, in ``int8`` :math:`q = y \cdot (1 / \mathrm{scale})`;

    and ``q`` is saturated (``int8``: to -128..127) and rounded to nearest even. The least scale is ``1 / (512 * M)``, in
    ``int8`` fp32's epsilon. NaN stays NaN, and is 0 in ``int8``. With ``cast_before_weight`` and all of one dtype these are
    the conventions of vLLM's ``rms_norm_dynamic_per_token_quant`` and, with a given scale, ``rms_norm_static_fp8_quant``.

    Args:
        input: ``(*, N)``, fp32, fp16 or bf16; rows may be strided.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: fp32's epsilon.
        dtype: ``torch.float8_e4m3fn``, ``torch.float8_e5m2`` or ``torch.int8``.
        scale: a tensor of one fp32 value, for all of the output; None: scales are found and returned.
        block: 64 or 128: consecutive columns with a scale of their own, where N is a multiple of it; None: all of a row.
        scale_ub: an upper bound, above 0, of the ``max|y|`` that a scale is found from.
        column_major: the scales of blocks with those of one column of blocks side by side, as fp8 GEMMs ask for.
        return_norm: also return the norm itself.
        weight_offset, cast_before_weight: as of :func:`rms_norm`.
        out: what to write to instead of new tensors: as many as are returned, contiguous (scales of ``column_major``: as
            they would be returned); with a given ``scale`` its place is not looked at.

    Returns:
        ``(output, scale)`` or ``(output, scale, norm)``: ``(*, N)`` of ``dtype``; fp32 ``(*, 1)``, with ``block``
        ``(*, N / block)``, or the given scale; ``(*, N)`` of the norm's dtype.

    Raises:
        NotImplementedError: another dtype of ``input`` or ``weight``.
        TypeError: ``out`` is no tuple.
        ValueError: another ``dtype`` or ``block``; ``block`` or ``scale_ub`` beside ``scale``; ``column_major`` without
            ``block``; ``eps`` or ``scale_ub`` out of range; ``out`` holds another number of tensors.
        RuntimeError: shapes or devices do not match; N is no multiple of ``block``; a gradient would be recorded; ``out`` does
            not fit or overlaps what is read. Nothing is written then.
    """
    options = (dtype, block, scale_ub, column_major, return_norm, weight_offset, cast_before_weight)
    return _quantized("rms_norm_quant", (input,), weight, scale, eps, options, out)


def fused_add_rms_norm_quant(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    return_norm: bool = False,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`rms_norm_quant` of ``input + residual``, the sum formed and rounded as in :func:`fused_add_rms_norm`.

    Arguments and errors as of these two. ``out`` may hold ``residual`` itself in the place of
    ``residual_out`` if that is contiguous.

    Returns:
        ``(output, scale, residual_out)`` or ``(output, scale, residual_out, norm)``.
    """
    options = (dtype, block, scale_ub, column_major, return_norm, weight_offset, cast_before_weight)
    return _quantized("fused_add_rms_norm_quant", (input, residual), weight, scale, eps, options, out)


def _check_kinds(op, eps, **tensors):
    """What torch.ops says of an argument of the wrong Python type names its schema; this names the argument."""
    for name, value in tensors.items():
        if not hasattr(value, "__torch_function__"):
            raise TypeError(f"{op}: expected {name} to be a Tensor, but got {type(value).__name__}")
    if not (eps is None or hasattr(eps, "__float__")):
        raise TypeError(f"{op}: expected eps to be a number or None, but got {type(eps).__name__}")


def _check_count(op, out, count):
    if not isinstance(out, (tuple, list)):
        raise TypeError(f"{op}: expected out to be a tuple of {count} tensors, but got {type(out).__name__}")
    if len(out) != count:
        raise ValueError(f"{op}: expected out to hold {count} tensors, but got {len(out)}")


_QUANT_OPTIONS = ("dtype", "block", "scale_ub", "column_major", "keep_norm", "weight_offset", "cast_before_weight")


def _quantized(op, tensors, weight, scale, eps, options, out):
    """What both functions do: `tensors` is the input and, if one is added, the residual."""
    if not is_dynamo_compiling():
        results = getattr(_C, op)(*tensors, weight, scale, eps, *options, out)
        if results is not NotImplemented:
            return results
        _check_kinds(op, eps, **dict(zip(("input", "residual"), tensors)))
        if not isinstance(options[0], torch.dtype):
            raise TypeError(f"{op}: expected dtype to be a torch.dtype, but got {type(options[0]).__name__}")
    arguments, keywords = (*tensors, weight, scale, eps), dict(zip(_QUANT_OPTIONS, options))
    added = len(tensors) - 1
    if out is None:
        output, found, *rest = getattr(_ops, op)(*arguments, **keywords)
    else:
        count = 2 + added + keywords["keep_norm"]
        _check_count(op, out, count)
        output, found, *rest = out
        # What is not wanted is a tensor without elements.
        if scale is not None:
            found = tensors[0].new_empty(0, dtype=torch.float32)
        if len(rest) == added:
            norm_dtype = _output_dtype(tensors[0], weight, keywords["cast_before_weight"])
            rest = *rest, tensors[0].new_empty(0, dtype=norm_dtype)
        names = ("scale_out", *(("residual_out",) if added else ()), "norm_out")
        getattr(_ops, op).out(*arguments, **keywords, out=output, **dict(zip(names, (found, *rest))))
    if not keywords["keep_norm"]:
        rest = rest[:added]
    return output, found if scale is None else scale, *rest


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The ops as formulas of ATen ops, for `ExportedProgram.run_decompositions` and other compilers that take such a table.

    Holds the differentiable ops, their forwards and the backward; those that write to their arguments and those that quantize
    have no entry, and stay as they are. Within 1 ulp of the kernels where no intermediate result is out of fp32's range.
    """
    names = ("rms_norm", "rms_norm_forward", "rms_norm_backward", "fused_add_rms_norm", "fused_add_rms_norm_forward")
    # Past the dispatcher, where torch.export keeps composite ops whole.
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return {getattr(_ops, name).default: partial(getattr(_ops, f"{name}_formula").default._op_dk, composite) for name in names}


# Fakes: what the ops return, as shapes. What csrc/torch/checks.h refuses, they refuse: a wrong program does not trace.


def _fake(op):
    """torch.library.register_fake asks every module of the process for its file, and somebody's may
    fail. This is what it does besides."""

    def register(function):
        if not has_kernel(op, "Meta"):
            # The function lives for ever then, and with it the library, by which it is registered.
            function.library = torch.library.Library("rmsnorm_cuda", "FRAGMENT")
            fake = torch._library.simple_registry.singleton.find(f"rmsnorm_cuda::{op}").fake_impl
            source = f"{__file__}:{function.__code__.co_firstlineno}"
            # Overrides one whose registration was interrupted.
            fake.register(function, source, function.library, allow_override=True)
        return function

    return register


def _check_sizes(have, want, message):
    torch._check(len(have) == len(want), message)
    for a, b in zip(have, want):
        torch._check(a == b, message)


def _check_dtype(name, tensor):
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise NotImplementedError(
            f'rms_norm: "rms_norm" not implemented for {tensor.dtype}: expected {name} to be float32, float16, bfloat16 or float64'
        )


def _check(input, normalized_shape, weight, eps, weight_offset):
    _check_dtype("input", input)
    if weight is not None:
        _check_dtype("weight", weight)
    if eps is not None and not 0 <= eps < float("inf"):
        raise ValueError(f"rms_norm: expected eps to be finite and not negative, but got {eps}")
    if not abs(weight_offset) < float("inf"):
        raise ValueError(f"rms_norm: expected weight_offset to be finite, but got {weight_offset}")
    lead = input.dim() - len(normalized_shape)
    torch._check(len(normalized_shape) > 0 and lead >= 0, lambda: "rms_norm: input has too few dimensions")
    _check_sizes(
        input.shape[lead:],
        normalized_shape,
        lambda: f"rms_norm: given normalized_shape={list(normalized_shape)}, expected input with that shape at the end, "
        f"but got input of size {list(input.shape)}",
    )
    if weight is not None:
        _check_sizes(
            weight.shape,
            normalized_shape,
            lambda: "rms_norm: expected weight to be of same shape as normalized_shape, but got weight of shape "
            f"{list(weight.shape)} and normalized_shape={list(normalized_shape)}",
        )
        _check_device("rms_norm", "weight", weight, input)
    return lead


def _check_device(op, name, tensor, input):
    torch._check(
        tensor.device == input.device,
        lambda: f"{op}: expected all tensors to be on the same device, but input is on {input.device} and {name} is on {tensor.device}",
    )


def _output_dtype(input, weight, cast_before_weight):
    return torch.promote_types(input.dtype, weight.dtype) if cast_before_weight and weight is not None else input.dtype


@_fake("rms_norm")
def _(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False):
    _check(input, normalized_shape, weight, eps, weight_offset)
    return input.new_empty(input.shape, dtype=_output_dtype(input, weight, cast_before_weight))


@_fake("rms_norm.out")
def _(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False, out):
    _check(input, normalized_shape, weight, eps, weight_offset)
    dtype = _output_dtype(input, weight, cast_before_weight)
    torch._check(out.dtype == dtype, lambda: f"rms_norm: expected out of dtype {dtype}, but got {out.dtype}")
    _check_sizes(
        out.shape, input.shape, lambda: f"rms_norm: expected out of shape {list(input.shape)}, but got {list(out.shape)}"
    )
    _check_device("rms_norm", "out", out, input)


@_fake("rms_norm_forward")
def _(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False):
    lead = _check(input, normalized_shape, weight, eps, weight_offset)
    return (
        input.new_empty(input.shape, dtype=_output_dtype(input, weight, cast_before_weight)),
        input.new_empty(input.shape[:lead], dtype=compute_dtype(input)),
    )


@_fake("rms_norm_backward")
def _(
    grad_output,
    input,
    normalized_shape,
    weight,
    rstd,
    eps,
    output_mask,
    grad_residual=None,
    *,
    weight_offset=0.0,
    cast_before_weight=False,
):
    lead = _check(input, normalized_shape, weight, eps, weight_offset)
    for name, tensor, shape in (
        ("grad_output", grad_output, input.shape),
        ("rstd", rstd, input.shape[:lead]),
        ("grad_residual", grad_residual, input.shape),
    ):
        if tensor is not None:
            message = f"rms_norm_backward: expected {name} of shape {list(shape)}, but got {list(tensor.shape)}"
            _check_sizes(tensor.shape, shape, lambda message=message: message)
            _check_device("rms_norm_backward", name, tensor, input)
    grad_input = input.new_empty(input.shape) if output_mask[0] else None
    grad_weight = weight.new_empty(weight.shape) if output_mask[1] and weight is not None else None
    return grad_input, grad_weight


def _check_fused(input, residual, weight, eps, weight_offset):
    torch._check(input.dim() > 0, lambda: "fused_add_rms_norm: expected input with at least one dimension, but got a scalar")
    _check_sizes(
        residual.shape,
        input.shape,
        lambda: f"fused_add_rms_norm: expected residual of input's shape {list(input.shape)}, but got {list(residual.shape)}",
    )
    wide = input.dtype in (torch.float16, torch.bfloat16) and residual.dtype == torch.float32
    torch._check(
        residual.dtype == input.dtype or wide,
        lambda: f"fused_add_rms_norm: expected residual of input's dtype {input.dtype}, but got {residual.dtype}",
    )
    _check_device("fused_add_rms_norm", "residual", residual, input)
    _check(input, input.shape[-1:], weight, eps, weight_offset)


@_fake("fused_add_rms_norm")
def _(input, residual, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False):
    _check_fused(input, residual, weight, eps, weight_offset)
    output = input.new_empty(input.shape, dtype=_output_dtype(input, weight, cast_before_weight))
    return output, residual.new_empty(residual.shape)


@_fake("fused_add_rms_norm_forward")
def _(input, residual, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False):
    _check_fused(input, residual, weight, eps, weight_offset)
    return (
        input.new_empty(input.shape, dtype=_output_dtype(input, weight, cast_before_weight)),
        residual.new_empty(residual.shape),
        input.new_empty(input.shape[:-1], dtype=compute_dtype(input)),
    )


@_fake("fused_add_rms_norm_")
def _(input, residual, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False):
    _check_fused(input, residual, weight, eps, weight_offset)
    dtype = _output_dtype(input, weight, cast_before_weight)
    torch._check(
        dtype == input.dtype,
        lambda: f"fused_add_rms_norm_: the result has dtype {dtype} and cannot take the place of input, which has {input.dtype}",
    )


@_fake("fused_add_rms_norm.out")
def _(input, residual, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False, out, residual_out):
    _check_fused(input, residual, weight, eps, weight_offset)
    for name, have, dtype in (
        ("out", out, _output_dtype(input, weight, cast_before_weight)),
        ("residual_out", residual_out, residual.dtype),
    ):
        _check_given("fused_add_rms_norm", name, have, input.shape, dtype, input)


def _check_given(op, name, have, shape, dtype, input):
    torch._check(have.dtype == dtype, lambda: f"{op}: expected {name} of dtype {dtype}, but got {have.dtype}")
    _check_sizes(have.shape, shape, lambda: f"{op}: expected {name} of shape {list(shape)}, but got {list(have.shape)}")
    _check_device(op, name, have, input)


def _quant_results(
    op, input, residual, weight, scale, eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset, cast_before_weight
):
    """What a quantizing op returns: {name: tensor}."""
    if residual is None:
        torch._check(input.dim() > 0, lambda: f"{op}: expected input with at least one dimension, but got a scalar")
        _check(input, input.shape[-1:], weight, eps, weight_offset)
    else:
        _check_fused(input, residual, weight, eps, weight_offset)
    known = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    if dtype not in known:
        raise ValueError(f"{op}: expected dtype to be float8_e4m3fn, float8_e5m2 or int8, but got {dtype}")
    if torch.float64 in (input.dtype, weight.dtype if weight is not None else None):
        raise NotImplementedError(f'{op}: "{op}" not implemented for \'Double\'')
    if scale is not None and (block is not None or scale_ub is not None):
        raise ValueError(f"{op}: block and scale_ub are for scales that are found; expected neither beside a given scale")
    if scale is not None:
        torch._check(
            scale.dtype == torch.float32 and scale.numel() == 1,
            lambda: f"{op}: expected scale to be one float32, but got {scale.dtype} of shape {list(scale.shape)}",
        )
        _check_device(op, "scale", scale, input)
    if block not in (None, 64, 128):
        raise ValueError(f"{op}: expected block to be 64 or 128, but got {block}")
    if scale_ub is not None and not scale_ub > 0:
        raise ValueError(f"{op}: expected scale_ub to be positive, but got {scale_ub}")
    if column_major and block is None:
        raise ValueError(f"{op}: column-major scales are those of blocks; expected block to be given")
    lead, cols = input.shape[:-1], input.shape[-1]
    if block is not None:
        torch._check(cols % block == 0, lambda: f"{op}: expected a last dimension that is a multiple of block={block}, but got {cols}")
    if scale is not None:
        found = input.new_empty(0, dtype=torch.float32)
    elif column_major:
        found = input.new_empty((cols // block, *lead), dtype=torch.float32).movedim(0, -1)
    else:
        found = input.new_empty((*lead, 1 if block is None else cols // block), dtype=torch.float32)
    norm = input.new_empty(input.shape if keep_norm else 0, dtype=_output_dtype(input, weight, cast_before_weight))
    results = {"out": input.new_empty(input.shape, dtype=dtype), "scale_out": found}
    return results | ({} if residual is None else {"residual_out": residual.new_empty(residual.shape)}) | {"norm_out": norm}


@_fake("rms_norm_quant")
def _(input, weight=None, scale=None, eps=None, *, dtype, block=None, scale_ub=None, column_major=False, keep_norm=False,
      weight_offset=0.0, cast_before_weight=False):  # fmt: skip
    options = eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset, cast_before_weight
    return tuple(_quant_results("rms_norm_quant", input, None, weight, scale, *options).values())


@_fake("rms_norm_quant.out")
def _(input, weight=None, scale=None, eps=None, *, dtype, block=None, scale_ub=None, column_major=False, keep_norm=False,
      weight_offset=0.0, cast_before_weight=False, **given):  # fmt: skip
    options = eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset, cast_before_weight
    for name, want in _quant_results("rms_norm_quant", input, None, weight, scale, *options).items():
        _check_given("rms_norm_quant", name, given[name], want.shape, want.dtype, input)


@_fake("fused_add_rms_norm_quant")
def _(input, residual, weight=None, scale=None, eps=None, *, dtype, block=None, scale_ub=None, column_major=False,
      keep_norm=False, weight_offset=0.0, cast_before_weight=False):  # fmt: skip
    options = eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset, cast_before_weight
    return tuple(_quant_results("fused_add_rms_norm_quant", input, residual, weight, scale, *options).values())


@_fake("fused_add_rms_norm_quant.out")
def _(input, residual, weight=None, scale=None, eps=None, *, dtype, block=None, scale_ub=None, column_major=False,
      keep_norm=False, weight_offset=0.0, cast_before_weight=False, **given):  # fmt: skip
    options = eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset, cast_before_weight
    for name, want in _quant_results("fused_add_rms_norm_quant", input, residual, weight, scale, *options).items():
        _check_given("fused_add_rms_norm_quant", name, given[name], want.shape, want.dtype, input)
