"""The public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _C, config  # _C also registers torch.ops.rmsnorm_cuda
from .arguments import check_out, checked, is_overridden, override

_ops = torch.ops.rmsnorm_cuda


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,  # an int: torch.compile(dynamic=True) takes a float for a variable
    cast_before_weight: bool = False,
    group_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Root mean square layer normalization over the last dimensions.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot
            (\mathrm{weight} + \mathrm{weight\_offset})

    By default exactly :func:`torch.nn.functional.rms_norm`: computed in fp32 (fp64 if an argument
    is fp64), rounded once, to the dtype of ``input``, whatever the dtype of ``weight``. Zhang &
    Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Args:
        input: ``[*, *normalized_shape]``, fp32, fp16, bf16 or fp64, on the CPU or a CUDA device.
            Leading dimensions may have any strides (slices, transposed heads, expanded); only if
            the normalized dimensions are not dense is a copy made.
        normalized_shape: the sizes of the last dimensions, over which the mean is taken; an int is
            a shape of one.
        weight: ``normalized_shape``, any of those dtypes, same device. None: no scale.
        eps: added to the mean of squares, finite and not negative. None: the machine epsilon of the
            type that is computed in, ``1.1920928955078125e-07`` or, for fp64 input,
            ``2.220446049250313e-16``.
        weight_offset: added to the weight in fp32. 1.0 for the Gemma family, whose weights are
            stored minus one.
        cast_before_weight: round ``x / rms`` to the dtype of ``input`` and then multiply: the order
            of the Llama, Mistral and Qwen families. The result has the promoted dtype of ``input``
            and ``weight``, as theirs has.
        group_size: normalize each so many columns by themselves, where ``normalized_shape`` has one
            dimension that is a multiple of it; as :func:`rms_norm_gated` without a gate.
        out: written to and returned instead of a new tensor: same shape, the result's dtype, dense
            rows. May be ``input`` itself. Refused where a gradient would be recorded.

    Returns: ``[*, *normalized_shape]``, contiguous, differentiable with respect to ``input`` and
        ``weight``.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: eps is negative or not finite; ``input`` has too few dimensions; ``group_size``
            is not positive, or beside a ``normalized_shape`` of several dimensions.
        NotImplementedError: a dtype that is not one of the four.
        RuntimeError: shapes or devices do not match; ``out`` does not fit, overlaps ``input``
            partly, or is given where a gradient is recorded. Nothing is written when an error is
            raised.
    """
    if group_size is not None:
        _check_one_dim(input, normalized_shape)
        options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
        return rms_norm_gated(input, None, weight, eps, group_size=group_size, **options, out=out)
    if not is_dynamo_compiling():
        # No tuple of them all, which costs a tenth of a call on one row.
        if out is None:
            y = _C.rms_norm(input, normalized_shape, weight, eps, weight_offset, cast_before_weight)
            if y is not None:
                return y
        else:
            if _C.rms_norm_out(
                input, normalized_shape, weight, eps, weight_offset, cast_before_weight, out
            ):
                return out
    elif isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    args = {"input": input, "normalized_shape": normalized_shape, "weight": weight, "eps": eps}
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    if not is_dynamo_compiling():
        if is_overridden(input, weight, out):
            return override(rms_norm, **args, **options, out=out)
        checked("rms_norm", {"out": out})
    if out is None:
        return _call(_ops.rms_norm, args, options, None)
    _call(_ops.rms_norm, args, options, {"out": out})
    return out


def _check_one_dim(input, normalized_shape):
    """What rms_norm_gated takes: the last dimension of input."""
    shape = normalized_shape
    if not is_dynamo_compiling():
        (arguments,) = checked("rms_norm", {"input": input, "normalized_shape": shape})
        shape = arguments["normalized_shape"]
    shape = (shape,) if isinstance(shape, int | torch.SymInt) else tuple(shape)
    if len(shape) != 1:
        raise ValueError(
            "rms_norm: expected a normalized_shape of one dimension beside group_size, but got "
            f"normalized_shape={list(shape)}"
        )
    if tuple(input.shape[-1:]) != shape:
        raise RuntimeError(
            f"rms_norm: given normalized_shape={list(shape)}, expected input with shape "
            f"[*, {shape[0]}], but got input of size {list(input.shape)}"
        )


def rms_norm_gated(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""RMSNorm over the last dimension and a gate, in one pass.

    With :math:`\mathrm{act}(z)` = ``z * sigmoid(z)`` or ``sigmoid(z)`` of the gate, by default

    .. math::
        y = \mathrm{norm}(x) \cdot \mathrm{weight} \cdot \mathrm{act}(\mathrm{gate})

    as in Qwen3-Next and Kimi-Linear; with ``norm_before_gate=False``

    .. math::
        y = \mathrm{norm}(x \cdot \mathrm{act}(\mathrm{gate})) \cdot \mathrm{weight}

    as in Mamba 2 (Dao & Gu, "Transformers are SSMs", ICML 2024). All is computed in fp32 (fp64 if
    an argument is fp64) and rounded once. ``cast_before_weight`` rounds where eager code does:

    * the norm first: ``x / rms`` to the dtype of ``input``; times the weight, to the promotion of
      both dtypes; times ``act(gate)``, in fp32, to the dtype of ``input``: Qwen3-Next, Qwen 3.5,
      Olmo Hybrid. Without it Kimi-Linear and Bailing;
    * the gate first: ``x * act(gate) / rms`` to the dtype of ``input``; times the weight, to the
      promotion of both: Mamba 2, Bamba, Nemotron-H, Zamba 2, Granite. Without it Falcon-H1.

    Differentiable in ``input``, ``gate`` and ``weight``, where these roundings count as the
    identity. The backward reads ``input``, ``gate`` and one number of each row or group, which the
    forward has kept.

    Args:
        input: ``(*, N)``, fp32, fp16, bf16 or fp64; rows may be strided.
        gate: ``(*, N)`` in any of these dtypes; rows may be strided, as those of a slice of a
            projection. None: the norm alone.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: the machine epsilon of the type computed in
            (that of ``input``).
        activation: "silu" or "sigmoid", of the gate.
        norm_before_gate: see above.
        group_size: normalize each so many columns by themselves; N is a multiple of it. None: all.
        weight_offset: added to the weight in fp32; 1.0 is the Gemma family.
        cast_before_weight: see above.
        out: written to and returned instead of a new tensor: same shape, the result's dtype, dense
            rows. May be ``input`` itself. Refused where a gradient would be recorded.

    Returns: ``(*, N)``, contiguous, of the dtype of ``input``; of a gate that comes first, or none,
        with ``cast_before_weight`` the promotion of that and the weight's.

    Raises:
        NotImplementedError: a dtype that is not one of the four.
        TypeError: an argument is of the wrong Python type.
        ValueError: another ``activation``; ``group_size`` is not positive; ``eps`` or
            ``weight_offset`` out of range; ``input`` is a scalar.
        RuntimeError: shapes or devices do not match; N is no multiple of ``group_size``; ``out``
            does not fit, or overlaps what is read. Nothing is written when an error is raised.
    """
    if not is_dynamo_compiling():
        if out is None:
            y = _C.rms_norm_gated(
                input, gate, weight, eps, activation, norm_before_gate, group_size,
                weight_offset, cast_before_weight,
            )  # fmt: skip
            if y is not None:
                return y
        else:
            if _C.rms_norm_gated_out(
                input, gate, weight, eps, activation, norm_before_gate, group_size,
                weight_offset, cast_before_weight, out,
            ):  # fmt: skip
                return out
            checked("rms_norm_gated", {"out": out})
    args = {"input": input, "gate": gate, "weight": weight, "eps": eps}
    options = {
        "activation": activation,
        "norm_before_gate": norm_before_gate,
        "group_size": group_size,
        "weight_offset": weight_offset,
        "cast_before_weight": cast_before_weight,
    }
    if out is None:
        return _call(_ops.rms_norm_gated, args, options, None)
    _call(_ops.rms_norm_gated, args, options, {"out": out})
    return out


def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    round_sum: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual addition before a norm and the norm, in one pass: `input + residual`, and the
    norm of that over the last dimension.

    The same bits as the two steps: the sum is formed in fp32 (fp64 if both are fp64) and rounded
    once, to the dtype of ``residual``. This rounded sum is normalized as :func:`rms_norm` would,
    and rounded once, to the dtype of ``input`` also where ``residual`` is wider. Differentiable in
    all three tensors. The gradient that flows into the sum is added in the pass that forms that of
    the norm, and rounded once with it.

    With ``round_sum=False`` the norm is that of the sum before it is rounded: with ``s = input +
    residual`` in fp32, ``residual_out`` is ``round(s)`` and the output ``round(norm(s))``, as vLLM
    defines its op and SGLang's CUDA kernels compute it; with ``cast_before_weight`` ``x / rms`` of
    ``s`` is rounded to ``residual``'s dtype. In the gradients roundings count as the identity: they
    are those of the norm of ``residual_out``, by the rstd of ``s``.

    Args:
        input: ``(*, N)``, fp32, fp16, bf16 or fp64.
        residual: the same shape; ``input``'s dtype or, beside a 16-bit ``input``, fp32.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: the machine epsilon of the type computed in.
        weight_offset: added to the weight in fp32; 1.0 is the Gemma family.
        cast_before_weight: round to ``residual``'s dtype before the weight is multiplied in.
        round_sum: normalize the sum as it is rounded for ``residual_out``. Where ``residual`` is
            fp32 or fp64 there is no such rounding, and False changes nothing.
        out: ``(output, residual_out)`` to write to and return instead of new tensors, with dense
            rows; they may be ``input`` and ``residual``. Refused where a gradient would be
            recorded.

    Returns:
        ``(output, residual_out)``: the norm, ``(*, N)`` in ``input``'s dtype (with
        ``cast_before_weight`` the promotion of that and the weight's), and the sum, ``(*, N)`` in
        ``residual``'s.

    Raises:
        NotImplementedError: another dtype.
        TypeError: ``out`` is no tuple.
        ValueError: ``eps`` or ``weight_offset`` is not finite, or ``eps`` negative; ``input`` is a
            scalar; ``out`` holds another number of tensors.
        RuntimeError: shapes, dtypes or devices do not match; ``out`` does not fit, or overlaps what
            is read partly. Nothing is written then.
    """
    if out is None and not is_dynamo_compiling():
        results = _C.fused_add_rms_norm(
            input, residual, weight, eps, weight_offset, cast_before_weight, round_sum
        )
        if results is not None:
            return results
    if out is not None:
        check_out("fused_add_rms_norm", out, 2)
        if not is_dynamo_compiling():
            if _C.fused_add_rms_norm_out(
                input, residual, weight, eps, weight_offset, cast_before_weight, round_sum, *out
            ):
                return tuple(out)
    args = {"input": input, "residual": residual, "weight": weight, "eps": eps}
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    options["round_sum"] = round_sum
    if out is None:
        return _call(_ops.fused_add_rms_norm, args, options, None)
    _call(_ops.fused_add_rms_norm, args, options, dict(zip(("out", "residual_out"), out)))
    return tuple(out)


def fused_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    round_sum: bool = True,
) -> None:
    """:func:`fused_add_rms_norm` in place, for inference: ``input`` becomes the norm and
    ``residual`` the sum.

    Rows may be strided; the last dimension has to be contiguous. Arguments as there.

    Raises:
        RuntimeError: one of the tensors requires grad; ``input`` and ``residual`` share memory;
            rows overlap or are not contiguous; the result would not have ``input``'s dtype
            (``cast_before_weight`` beside a wider weight). Nothing is written then.
    """
    if not is_dynamo_compiling():
        if _C.fused_add_rms_norm_(
            input, residual, weight, eps, weight_offset, cast_before_weight, round_sum
        ):
            return
    args = {"input": input, "residual": residual, "weight": weight, "eps": eps}
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    options["round_sum"] = round_sum
    if not is_dynamo_compiling():
        args, options = checked("fused_add_rms_norm_", args, options)
    _ops.fused_add_rms_norm_(*args.values(), **options)


def rms_norm_add(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The norm of what a sublayer returned, and the residual addition: `residual + norm(input)`, as
    in Olmo 2 and 3 and behind the MLP of Gemma 2 to 4.

    The same bits as the two steps: `input` is normalized over the last dimension and rounded as
    :func:`rms_norm` does it; the sum is formed in fp32 (fp64 if both are fp64) and rounded once, to
    the dtype of ``residual``. Differentiable in all three tensors; the roundings count as the
    identity. One pass: on the CPU a few rows at a time, on CUDA one launch.

    Args:
        input: ``(*, N)``, fp32, fp16, bf16 or fp64; rows may be strided.
        residual: the same shape; the norm's dtype (that of ``input``; with ``cast_before_weight``
            the promotion of that and the weight's) or, beside 16 bits, fp32.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: the machine epsilon of the type computed in.
        weight_offset, cast_before_weight: as of :func:`rms_norm`.
        out: written to and returned instead of a new tensor: same shape, ``residual``'s dtype,
            dense rows. May be ``input`` or ``residual``. Refused where a gradient would be
            recorded.

    Returns: ``(*, N)`` in ``residual``'s dtype, contiguous.

    Raises:
        NotImplementedError: a dtype that is not one of the four.
        TypeError: an argument is of the wrong Python type.
        ValueError: ``eps`` or ``weight_offset`` is not finite, or ``eps`` negative; ``input`` is a
            scalar.
        RuntimeError: shapes, dtypes or devices do not match; ``out`` does not fit, or overlaps what
            is read partly. Nothing is written when an error is raised.
    """
    if not is_dynamo_compiling():
        if out is None:
            y = _C.rms_norm_add(input, residual, weight, eps, weight_offset, cast_before_weight)
            if y is not None:
                return y
        else:
            if _C.rms_norm_add_out(
                input, residual, weight, eps, weight_offset, cast_before_weight, out
            ):
                return out
            checked("rms_norm_add", {"out": out})
    args = {"input": input, "residual": residual, "weight": weight, "eps": eps}
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    if out is None:
        return _call(_ops.rms_norm_add, args, options, None)
    _call(_ops.rms_norm_add, args, options, {"out": out})
    return out


def rms_norm_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1,  # an int, as weight_offset of rms_norm
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What stands between two sublayers that have norms on both sides, as those of Gemma 2 to 4:
    the norm of what the one returned, the residual addition, and the norm for the next.

    ``residual_out = (residual + norm(input) * input_weight) * scale`` and ``output =
    norm(residual_out) * weight``, to the bits of the steps: :func:`rms_norm`; the sum in fp32 (fp64
    if both are fp64), rounded once, to the dtype of ``residual``; unless it is 1 times ``scale``,
    rounded again; then the norm, as :func:`fused_add_rms_norm` forms it. Both norms are over the
    last dimension, with the same eps and options. Differentiable in all four tensors; the roundings
    count as the identity. The gradient that flows into the sum is added in the pass that forms that
    of its norm.

    On the CPU all of it happens to a few rows at a time, which stay in the caches between the
    steps. A ``scale`` costs a pass of them more, and in 16 bits takes longer than the steps. On
    CUDA it is one launch. There a sum in fp32 beside 16 bits is summed up in another order than in
    the steps: its norm is rarely an ulp off theirs.

    Args:
        input: ``(*, N)``, fp32, fp16, bf16 or fp64; rows may be strided.
        residual: the same shape; the dtype of ``input``'s norm (that of ``input``; with
            ``cast_before_weight`` the promotion of that and ``input_weight``'s) or, beside 16 bits,
            fp32.
        input_weight: of the norm of ``input``, ``(N,)`` in any of these dtypes, or None.
        weight: of the norm of the sum, alike.
        eps: added to both means of squares; None: the machine epsilon of the type computed in.
        scale: what the sum is multiplied by, finite.
        weight_offset: added to both weights in fp32; 1.0 is the Gemma family.
        cast_before_weight: round before the weight is multiplied in, as of :func:`rms_norm` and
            :func:`fused_add_rms_norm`.
        out: ``(output, residual_out)`` to write to and return instead of new tensors, with dense
            rows; they may be ``input`` and ``residual``. Refused where a gradient would be
            recorded.

    Returns:
        ``(output, residual_out)``: ``(*, N)`` in the dtype of ``input``'s norm (with
        ``cast_before_weight`` the promotion of that and the weight's), and ``(*, N)`` in
        ``residual``'s.

    Raises:
        NotImplementedError: a dtype that is not one of the four.
        TypeError: an argument is of the wrong Python type; ``out`` is no tuple.
        ValueError: ``eps``, ``scale`` or ``weight_offset`` is not finite, or ``eps`` negative;
            ``input`` is a scalar; ``out`` holds another number of tensors.
        RuntimeError: shapes, dtypes or devices do not match; ``out`` does not fit, or overlaps what
            is read partly. Nothing is written then.
    """
    if out is None and not is_dynamo_compiling():
        results = _C.rms_norm_add_rms_norm(
            input, residual, input_weight, weight, eps, scale, weight_offset, cast_before_weight
        )
        if results is not None:
            return results
    if out is not None:
        check_out("rms_norm_add_rms_norm", out, 2)
        if not is_dynamo_compiling():
            if _C.rms_norm_add_rms_norm_out(
                input, residual, input_weight, weight, eps, scale, weight_offset,
                cast_before_weight, *out,
            ):  # fmt: skip
                return tuple(out)
    args, options = _sandwich_arguments(
        input, residual, input_weight, weight, eps, scale, weight_offset, cast_before_weight
    )
    if out is None:
        return _call(_ops.rms_norm_add_rms_norm, args, options, None)
    written = dict(zip(("out", "residual_out"), out))
    _call(_ops.rms_norm_add_rms_norm, args, options, written)
    return tuple(out)


def rms_norm_add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    input_weight: Tensor | None,
    weight: Tensor | None,
    eps: float | None = None,
    *,
    scale: float = 1,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
) -> None:
    """:func:`rms_norm_add_rms_norm` in place, for inference: ``input`` becomes the output and
    ``residual`` the sum.

    Rows may be strided; the last dimension has to be contiguous. Arguments as there.

    Raises:
        RuntimeError: one of the tensors requires grad; ``input`` and ``residual`` share memory;
            rows overlap or are not contiguous; the result would not have ``input``'s dtype
            (``cast_before_weight`` beside a wider weight). Nothing is written then.
    """
    if not is_dynamo_compiling():
        if _C.rms_norm_add_rms_norm_(
            input, residual, input_weight, weight, eps, scale, weight_offset, cast_before_weight
        ):
            return
    args, options = _sandwich_arguments(
        input, residual, input_weight, weight, eps, scale, weight_offset, cast_before_weight
    )
    if not is_dynamo_compiling():
        args, options = checked("rms_norm_add_rms_norm_", args, options)
    _ops.rms_norm_add_rms_norm_(*args.values(), **options)


def _sandwich_arguments(*values):
    """By the names of the schema: arguments and options."""
    names = "input", "residual", "input_weight", "weight", "eps"
    flags = "scale", "weight_offset", "cast_before_weight"
    return dict(zip(names, values)), dict(zip(flags, values[len(names) :]))


def rms_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    positions: Tensor | None = None,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The RMSNorm of the heads of q and k, and then their rotary position embedding, in one pass.

    Each head of ``D`` elements is normalized as :func:`rms_norm` does. Then the pair ``(a, b)`` of
    its first ``R`` elements is turned by the angle of the head's token; the others stay:

    .. math::
        a' = a \cdot \cos - b \cdot \sin, \quad b' = b \cdot \cos + a \cdot \sin

    By default the norm is kept in fp32, as are cos, sin and the rotation, and the result is rounded
    once: to the dtype that the norm has (fp64 if an argument of the norm is fp64). With
    ``round_each_step`` it rounds where eager code does, to the same bits, with
    ``cast_before_weight`` as the model's norm has it (Llama's and Qwen's: True):

    1. the norm, to its dtype ``T``, as :func:`rms_norm` returns it;
    2. the products ``a * cos``, ``b * sin``, ``b * cos`` and ``a * sin``, each to ``S``: cos' dtype
       if that is ``T``, as in most models; else fp32, as in Olmo 2, whose cos is in fp32 (fp64 if
       ``T`` is fp64);
    3. their difference and their sum, to ``S``, and then to ``T``.

    Differentiable in q, k and the weights, where these roundings count as the identity; where cos
    or sin require a gradient, by the formula in ATen ops. Su et al., "RoFormer: Enhanced
    Transformer with Rotary Position Embedding", 2021.

    Args:
        q: ``(..., tokens, heads, D)``, or with ``heads_dim=-3`` ``(..., heads, tokens, D)``; fp32,
            fp16, bf16 or fp64. D is even. Any strides with dense heads are read as they lie, such
            as a slice of a fused projection.
        k: the same with any number of heads and any of these dtypes; None: q alone.
        q_weight, k_weight: ``(D,)``; of each head its own, ``(heads, D)``; or ``(heads * D,)``: all
            heads of a token are normalized as one row. Any of these dtypes. None: no scale.
        cos, sin: ``(..., tokens, R / 2)`` of one dtype and shape, that broadcasts to q's leading
            dimensions and tokens; R <= D and R <= 512. Models of transformers make ``(batch,
            tokens, R)``: take one of the halves that are alike, ``cos[..., : R // 2]``, or of
            neighbours that are ``cos[..., ::2]``. (All of a partial one cannot be told from a
            larger R.) With ``positions`` a cache ``(max_position, R / 2)``.
        eps: added to the mean of the squares; None: the machine epsilon of the type computed in.
        heads_dim: where the heads are, -2 or -3.
        positions: ``(..., tokens)``, int64 or int32: rows of the cache. On the CPU they are
            checked; on CUDA one that is out of range reads what it should not.
        interleaved: pairs are neighbours, ``(x[2 * i], x[2 * i + 1])``, as of GPT-J. Else halves,
            ``(x[i], x[i + R / 2])``, as of GPT-NeoX and Llama.
        sections: of a multimodal embedding (time, height, width) how many pairs each axis has; cos
            and sin, or positions, have a first dimension of the axes. The pairs of an axis are a
            block, as in Qwen2-VL. (What a model of transformers makes is composed of them by now.)
        interleaved_sections: axis ``a`` has ``sections[a]`` pairs ``a``, ``a + axes``, ``a + 2 *
            axes``, ...; the first axis has all others, as in Qwen3-VL.
        weight_offset, cast_before_weight: as of :func:`rms_norm`.
        round_each_step: see above.
        out: ``(q, k)`` to write to and return instead of new tensors, with dense rows. They may be
            q and k. Refused where a gradient would be recorded.

    Returns: ``(q, k)`` of q's and k's shapes, and of the dtypes that :func:`rms_norm` returns; k is
        None if none was given. Contiguous, but for heads first with a weight across them.

    Raises:
        NotImplementedError: a dtype that is not one of the four.
        TypeError: an argument is of the wrong Python type.
        ValueError: ``heads_dim`` is another number; fewer than three dimensions; ``sections`` do
            not add up to R / 2, or are not given beside ``interleaved_sections``; ``eps`` or
            ``weight_offset`` out of range.
        IndexError: a position that cos and sin do not have.
        RuntimeError: D is odd; R > D; shapes, dtypes or devices do not match; ``out`` does not fit,
            or overlaps what is read. Nothing is written when an error is raised.
    """
    if not is_dynamo_compiling():
        # As in rms_norm: tuples of them would take a sixth of a call on one token.
        if out is None:
            results = _C.rms_norm_rope(
                q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved,
                sections, interleaved_sections, weight_offset, cast_before_weight, round_each_step,
            )  # fmt: skip
            if results is not None:
                return results if k is not None else (results[0], None)
        else:
            check_out("rms_norm_rope", out, 2)
            if _C.rms_norm_rope_out(
                q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved,
                sections, interleaved_sections, weight_offset, cast_before_weight, round_each_step,
                out[0], out[1],
            ):  # fmt: skip
                return tuple(out)
    args, options = _rope_arguments(
        q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved,
        sections, interleaved_sections, weight_offset, cast_before_weight, round_each_step,
    )  # fmt: skip
    if out is None:
        q_out, k_out = _call(_ops.rms_norm_rope, args, options, None)
        return q_out, None if k is None else k_out
    k_out = q.new_empty(0) if out[1] is None else out[1]
    _call(_ops.rms_norm_rope, args, options, {"q_out": out[0], "k_out": k_out})
    return tuple(out)


def rms_norm_rope_(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float | None = None,
    *,
    heads_dim: int = -2,
    positions: Tensor | None = None,
    interleaved: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    round_each_step: bool = False,
) -> None:
    """:func:`rms_norm_rope` in place, for inference: q and k become the results.

    They may be slices of one fused projection. Each head has to be dense; with a weight across
    heads all heads of a token. Arguments as there.

    Raises:
        RuntimeError: one of the tensors requires grad; q and k share memory, or share it with what
            is read; heads overlap or are not dense; a result would have another dtype
            (``cast_before_weight`` beside a wider weight). Nothing is written then.
    """
    if not is_dynamo_compiling():
        if _C.rms_norm_rope_(
            q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved,
            sections, interleaved_sections, weight_offset, cast_before_weight, round_each_step,
        ):  # fmt: skip
            return
    args, options = _rope_arguments(
        q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved,
        sections, interleaved_sections, weight_offset, cast_before_weight, round_each_step,
    )  # fmt: skip
    if not is_dynamo_compiling():
        args, options = checked("rms_norm_rope_", args, options)
    _ops.rms_norm_rope_(*args.values(), **options)


def _rope_arguments(*values):
    """By the names of the schema: arguments and options."""
    names = "q", "k", "q_weight", "k_weight", "cos", "sin", "positions", "eps"
    flags = "heads_dim", "interleaved", "sections", "interleaved_sections"
    flags = *flags, "weight_offset", "cast_before_weight", "round_each_step"
    return dict(zip(names, values)), dict(zip(flags, values[len(names) :]))


def _call(packet, args, options, written):
    """A differentiable op, compiled or with other than plain arguments. `written` is what it writes
    to, by the names of the schema."""
    if not is_dynamo_compiling():
        args, options = checked(packet.__name__, args, options)
    if written:
        return packet.out(*args.values(), **options, **written)
    if config.decompose and is_dynamo_compiling():
        packet = getattr(_ops, f"{packet.__name__}_formula")
    # Of the packet's name nested tensors think that it is F.rms_norm. (The overload takes no number
    # of torch as eps. A proxy of torch.fx is nested neither way.)
    is_nested = next(iter(args.values())).is_nested is True
    return (packet.default if is_nested else packet)(*args.values(), **options)


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
    r"""RMSNorm over the last dimension, quantized to 8 bits for the matrix product that follows.

    For inference. Bit-identical to the steps one by one: first the norm, rounded to its dtype as
    :func:`rms_norm` returns it; then, in fp32 from that, with :math:`M` = 448 (``float8_e4m3fn``),
    57344 (``float8_e5m2``) or 127 (``int8``),

    * with a static ``scale``: :math:`q = y \cdot (1 / \mathrm{scale})`;
    * with dynamic scales, per token (row) or per ``block`` of columns:
      :math:`\mathrm{scale} = \max(\min(\max|y|, \mathrm{scale\_ub}) / M, \mathrm{least})`, and
      :math:`q = y / \mathrm{scale}`, in ``int8`` :math:`q = y \cdot (1 / \mathrm{scale})`;

    and ``q`` is saturated (``int8``: to -128..127) and rounded to nearest even. The least scale is
    ``1 / (512 * M)``, in ``int8`` fp32's epsilon. NaN stays NaN, and is 0 in ``int8``. With
    ``cast_before_weight`` and all of one dtype these are the conventions of vLLM's
    ``rms_norm_dynamic_per_token_quant`` and, with a static scale, ``rms_norm_static_fp8_quant``.

    Args:
        input: ``(*, N)``, fp32, fp16 or bf16; rows may be strided.
        weight: ``(N,)`` in any of these dtypes, or None.
        eps: added to the mean of the squares; None: fp32's epsilon.
        dtype: ``torch.float8_e4m3fn``, ``torch.float8_e5m2`` or ``torch.int8``.
        scale: static: a tensor of one fp32 value, for all of the output. None: scales are dynamic,
            and returned.
        block: 64 or 128: consecutive columns with a scale of their own, where N is a multiple of
            it. None: a scale per token.
        scale_ub: an upper bound, above 0, of the ``max|y|`` that a dynamic scale comes from.
        column_major: the scales of blocks with those of one column of blocks side by side, as fp8
            GEMMs ask for.
        return_norm: also return the norm itself.
        weight_offset, cast_before_weight: as of :func:`rms_norm`.
        out: what to write to instead of new tensors: as many as are returned, contiguous (scales of
            ``column_major``: as they would be returned); with a static ``scale`` its place is
            ignored.

    Returns: ``(output, scale)`` or ``(output, scale, norm)``: ``(*, N)`` of ``dtype``; fp32 ``(*,
        1)``, with ``block`` ``(*, N / block)``, or the static scale; ``(*, N)`` of the norm's
        dtype.

    Raises:
        NotImplementedError: another dtype of ``input`` or ``weight``.
        TypeError: ``out`` is no tuple.
        ValueError: another ``dtype`` or ``block``; ``block`` or ``scale_ub`` beside ``scale``;
            ``column_major`` without ``block``; ``eps`` or ``scale_ub`` out of range; ``out`` holds
            another number of tensors.
        RuntimeError: shapes or devices do not match; N is no multiple of ``block``; a gradient
            would be recorded; ``out`` does not fit or overlaps what is read. Nothing is written
            then.
    """
    quant = dtype, block, scale_ub, column_major, return_norm, weight_offset, cast_before_weight
    if out is None and not is_dynamo_compiling():
        results = _C.rms_norm_quant(input, weight, scale, eps, *quant)
        if results is not None:
            output, dynamic, norm = results
            scale = dynamic if scale is None else scale
            return (output, scale, norm) if return_norm else (output, scale)
    args = {"input": input, "weight": weight, "scale": scale, "eps": eps}
    return _quantized("rms_norm_quant", args, quant, out, ("out", "scale_out", "norm_out"))


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
    round_sum: bool = True,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`rms_norm_quant` of ``input + residual``, the sum formed and rounded as in
    :func:`fused_add_rms_norm`, and with ``round_sum=False`` normalized as there.

    Arguments and errors as of these two. ``out`` may hold ``residual`` itself in the place of
    ``residual_out`` if that is contiguous.

    Returns:
        ``(output, scale, residual_out)`` or ``(output, scale, residual_out, norm)``.
    """
    quant = dtype, block, scale_ub, column_major, return_norm, weight_offset, cast_before_weight
    quant = *quant, round_sum
    if out is None and not is_dynamo_compiling():
        results = _C.fused_add_rms_norm_quant(input, residual, weight, scale, eps, *quant)
        if results is not None:
            output, dynamic, total, norm = results
            scale = dynamic if scale is None else scale
            return (output, scale, total, norm) if return_norm else (output, scale, total)
    args = {"input": input, "residual": residual, "weight": weight, "scale": scale, "eps": eps}
    names = "out", "scale_out", "residual_out", "norm_out"
    return _quantized("fused_add_rms_norm_quant", args, quant, out, names)


def rms_norm_gated_quant(
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    block: int | None = None,
    scale_ub: float | None = None,
    column_major: bool = False,
    return_norm: bool = False,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0,
    cast_before_weight: bool = False,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`rms_norm_quant` of a norm with a gate, or of groups of columns: of what
    :func:`rms_norm_gated` returns, rounded as there. For inference.

    The dynamic scale of a row is that of all of its groups. Arguments and errors as of these two;
    ``input``, ``gate`` and ``weight`` are fp32, fp16 or bf16. ``scale`` and ``block`` are about the
    result, ``group_size`` is about the norm: neither needs to divide the other.

    Returns: as :func:`rms_norm_quant`.
    """
    quant = dtype, block, scale_ub, column_major, return_norm
    quant = *quant, activation, norm_before_gate, group_size, weight_offset, cast_before_weight
    if out is None and not is_dynamo_compiling():
        results = _C.rms_norm_gated_quant(input, gate, weight, scale, eps, *quant)
        if results is not None:
            output, dynamic, norm = results
            scale = dynamic if scale is None else scale
            return (output, scale, norm) if return_norm else (output, scale)
    args = {"input": input, "gate": gate, "weight": weight, "scale": scale, "eps": eps}
    return _quantized("rms_norm_gated_quant", args, quant, out, ("out", "scale_out", "norm_out"))


def _quantized(op, args, quant, out, names_of_out):
    """What all three do while compiling, with `out`, or with other than plain arguments."""
    scale, return_norm, done = args["scale"], quant[4], None
    count = len(names_of_out) - 1 + return_norm
    if out is not None:
        check_out(op, out, count)
        output, dynamic, *rest = out
        written = output, dynamic if scale is None else None, *rest
        written = written if return_norm else (*written, None)
        if not is_dynamo_compiling():
            done = getattr(_C, f"{op}_out")(*args.values(), *quant, *written)
    if not done:
        names = "dtype", "block", "scale_ub", "column_major", "keep_norm"
        if "gate" in args:
            names = *names, "activation", "norm_before_gate", "group_size"
        names = *names, "weight_offset", "cast_before_weight", "round_sum"
        options = dict(zip(names, quant))
        if not is_dynamo_compiling():
            args, options = checked(op, args, options)
        if out is None:
            output, dynamic, *rest = getattr(_ops, op)(*args.values(), **options)
        else:
            # A result that is not asked for has no elements.
            nothing = args["input"].new_empty(0, dtype=torch.float32)
            written = (nothing if t is None else t for t in written)
            written = dict(zip(names_of_out, written))
            getattr(_ops, op).out(*args.values(), **options, **written)
    return (output, dynamic if scale is None else scale, *rest)[:count]


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The ops as formulas of ATen ops, for `ExportedProgram.run_decompositions` and other compilers
    that take such a table.

    Holds the differentiable ops, their forwards and the backward. Those that write to their
    arguments and those that quantize have no entry, and stay as they are. Within 1 ulp of the
    kernels where no intermediate result is out of fp32's range.
    """
    from . import ops

    # Past the dispatcher, where torch.export keeps composite ops whole.
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    formulas = [name for name in dir(ops) if name.endswith("_formula")]
    return {
        getattr(_ops, name.removesuffix("_formula")).default: partial(
            getattr(_ops, name).default._op_dk, key
        )
        for name in formulas
    }
