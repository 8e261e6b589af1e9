"""What is wrong with a call is said before anything is written."""

import math
import re

import pytest
import torch
from cases import LLAMA, ops, random, refused_alike_while_tracing

from rmsnorm_cuda import (
    _C,
    RMSNorm,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    rms_norm,
    rms_norm_gated,
    rms_norm_gated_quant,
    rms_norm_quant,
)

X, W = torch.ones(3, 8), torch.ones(8)
NAN, INF = math.nan, math.inf

# (arguments of rms_norm, options, exception, what the message says)
BAD_INPUT = {
    "wrong shape": (
        (X, 7),
        {},
        RuntimeError,
        "given normalized_shape=[7], expected input with shape [*, 7], but got input of size [3, "
        "8]",
    ),
    "wrong shapes": (
        (X, (2, 8)),
        {},
        RuntimeError,
        "expected input with shape [*, 2, 8], but got input of size [3, 8]",
    ),
    "too few dimensions": (
        (X, (1, 3, 8)),
        {},
        ValueError,
        "must have at least 3 dimensions for normalized_shape=[1, 3, 8], but got 2",
    ),
    "0-dimensional": (
        (torch.tensor(1.0), 1),
        {},
        ValueError,
        "must have at least 1 dimensions for normalized_shape=[1], but got 0",
    ),
    "empty normalized_shape": (
        (X, ()),
        {},
        RuntimeError,
        "expected normalized_shape to be at least 1-dimensional",
    ),
    "integers": (
        (torch.ones(3, 8, dtype=torch.int32), 8),
        {},
        NotImplementedError,
        "not implemented for 'Int': expected input to be float32",
    ),
    "booleans": (
        (torch.ones(3, 8, dtype=torch.bool), 8),
        {},
        NotImplementedError,
        "not implemented for 'Bool'",
    ),
    "complex": (
        (torch.ones(3, 8, dtype=torch.complex64), 8),
        {},
        NotImplementedError,
        "not implemented for 'ComplexFloat'",
    ),
    "fp8": (
        (X.to(torch.float8_e4m3fn), 8),
        {},
        NotImplementedError,
        "not implemented for 'Float8_e4m3fn'",
    ),
    "integer weight": (
        (X, 8, torch.ones(8, dtype=torch.int64)),
        {},
        NotImplementedError,
        "'Long': expected weight to be float32",
    ),
    "complex weight": (
        (X, 8, torch.ones(8, dtype=torch.complex128)),
        {},
        NotImplementedError,
        "'ComplexDouble'",
    ),
    "weight too long": (
        (X, 8, torch.ones(9)),
        {},
        RuntimeError,
        "expected weight to be of same shape as normalized_shape, but got weight of shape [9] and "
        "normalized_shape=[8]",
    ),
    "weight of other rank": (
        (X, 8, torch.ones(1, 8)),
        {},
        RuntimeError,
        "but got weight of shape [1, 8]",
    ),
    "weight that would broadcast": (
        (X, 8, torch.ones(1)),
        {},
        RuntimeError,
        "but got weight of shape [1]",
    ),
    "weight elsewhere": (
        (X, 8, W.to("meta")),
        {},
        RuntimeError,
        "expected all tensors to be on the same device, but input is on cpu and weight is on meta",
    ),
    "input elsewhere": (
        (X.to("meta"), 8, W),
        {},
        RuntimeError,
        "expected all tensors to be on the same device, but input is on meta and weight is on cpu",
    ),
    "negative eps": (
        (X, 8, W, -1e-6),
        {},
        ValueError,
        "expected eps to be finite and not negative, but got -1e-06",
    ),
    "NaN eps": (
        (X, 8, W, NAN),
        {},
        ValueError,
        "expected eps to be finite and not negative, but got nan",
    ),
    "infinite eps": (
        (X, 8, W, INF),
        {},
        ValueError,
        "expected eps to be finite and not negative, but got inf",
    ),
    "NaN offset": (
        (X, 8, W),
        {"weight_offset": NAN},
        ValueError,
        "expected weight_offset to be finite, but got nan",
    ),
    "infinite offset": (
        (X, 8, W),
        {"weight_offset": -INF},
        ValueError,
        "expected weight_offset to be finite, but got -inf",
    ),
    "list for input": (([1.0], 1), {}, TypeError, "expected input to be a Tensor, but got list"),
    "list for weight": (
        (X, 8, [1.0] * 8),
        {},
        TypeError,
        "expected weight to be a Tensor or None, but got list",
    ),
    "text for eps": (
        (X, 8, W, "1e-6"),
        {},
        TypeError,
        "expected eps to be a number or None, but got str",
    ),
    "text for normalized_shape": (
        (X, "8"),
        {},
        TypeError,
        "expected normalized_shape to be an int or a tuple of ints, but got str",
    ),
    "float for normalized_shape": (
        (X, 8.0),
        {},
        TypeError,
        "expected normalized_shape to be an int or a tuple of ints, but got float",
    ),
    "no normalized_shape": ((X,), {}, TypeError, "normalized_shape"),
    "option by position": ((X, 8, W, None, 1.0), {}, TypeError, "positional arguments"),
    "unknown option": ((X, 8), {"bias": W}, TypeError, "unexpected keyword argument 'bias'"),
    "text for out": (
        (X, 8),
        {"out": "x"},
        TypeError,
        "expected out to be a Tensor or None, but got str",
    ),
}


@pytest.mark.parametrize("args, options, error, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(args, options, error, message):
    out = torch.full((3, 8), NAN)
    for destination in ({}, {"out": out}) if "out" not in options else ({},):
        with pytest.raises(error, match=re.escape(message)) as raised:
            rms_norm(*args, **options, **destination)
        assert (
            type(raised.value) is error
        )  # not a subclass: torch raises NotImplementedError for missing kernels too
    assert out.isnan().all()
    refused_alike_while_tracing(rms_norm, *args, **options)


def freed(tensor):
    """As FSDP, offloading and sleep modes leave it: with its sizes, without memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened(tensor):
    """The same with one byte too little; strided, as a view of rows may be."""
    strided = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 8)[..., : tensor.shape[-1]]
    tensor = strided.copy_(tensor) if tensor.dim() > 1 else tensor.clone()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    tensor.untyped_storage().resize_((last + 1) * tensor.itemsize - 1)
    return tensor


Y, RSTD = ops.rms_norm_forward(X, [8], W)
WITHOUT_MEMORY = {  # the tensor's name: what reads or writes it
    "input": [
        lambda t: rms_norm(t(X), 8, W),
        lambda t: ops.rms_norm_forward(t(X), [8], W),
        lambda t: ops.rms_norm_backward(X, t(X), [8], W, RSTD, None, [True, True]),
        lambda t: fused_add_rms_norm(t(X), X, W),
        lambda t: fused_add_rms_norm_(t(X), X.clone(), W),
        lambda t: rms_norm_quant(t(X), W, dtype=torch.int8),
    ],
    "weight": [
        lambda t: rms_norm(X, 8, t(W)),
        lambda t: RMSNorm.forward(module_with(t(W)), X),
        lambda t: fused_add_rms_norm_(X.clone(), X.clone(), t(W)),
        lambda t: rms_norm_quant(X, t(W), dtype=torch.int8),
        lambda t: ops.rms_norm_backward(X, X, [8], t(W), RSTD, None, [True, True]),
    ],
    "gate": [
        lambda t: rms_norm_gated(X, t(X), W),
        lambda t: rms_norm_gated_quant(X, t(X), W, dtype=torch.int8),
    ],
    "residual": [
        lambda t: fused_add_rms_norm(X, t(X), W),
        lambda t: fused_add_rms_norm_(X.clone(), t(X), W),
    ],
    "out": [
        lambda t: rms_norm(X, 8, W, out=t(X)),
        lambda t: rms_norm_quant(
            X, W, dtype=torch.int8, out=(t(X.to(torch.int8)), torch.empty(3, 1))
        ),
    ],
    "residual_out": [lambda t: fused_add_rms_norm(X, X, W, out=(torch.empty(3, 8), t(X)))],
    "scale_out": [
        lambda t: rms_norm_quant(
            X, W, dtype=torch.int8, out=(torch.empty(3, 8, dtype=torch.int8), t(torch.empty(3, 1)))
        )
    ],
    "scale": [lambda t: rms_norm_quant(X, W, dtype=torch.int8, scale=t(torch.ones(1)))],
    "grad_output": [lambda t: ops.rms_norm_backward(t(X), X, [8], W, RSTD, None, [True, True])],
    "rstd": [lambda t: ops.rms_norm_backward(X, X, [8], W, t(RSTD), None, [True, True])],
    "grad_residual": [
        lambda t: ops.rms_norm_backward(X, X, [8], W, RSTD, None, [True, True], t(X))
    ],
}


def module_with(weight):
    module = RMSNorm(8)
    module.weight.data = weight
    return module


@pytest.mark.parametrize("which", WITHOUT_MEMORY)
def test_tensor_without_memory(which):
    """Not taken for one that was not given; no other error, no crash."""
    for call in WITHOUT_MEMORY[which]:
        call(lambda t: t.clone())  # right with memory
        with pytest.raises(
            RuntimeError, match=f"expected {which} to have memory, but its storage was freed"
        ):
            call(freed)
        for short in (shortened, lambda t: shortened(t.flatten()).view(t.shape)):
            with pytest.raises(RuntimeError, match=f"expected {which} of size .* in its storage"):
                call(short)


def test_formula_of_a_tensor_without_memory():
    """With a tangent too, where ATen's ops would read it."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(RuntimeError, match="rms_norm: expected weight to have memory"):
            rms_norm(x, 8, freed(W))


@pytest.mark.parametrize("which", ["grad_output", "rstd", "grad_residual", "weight"])
def test_one_meta_tensor_among_others(which):
    arguments = {"grad_output": X, "input": X, "weight": W, "rstd": RSTD, "grad_residual": X}
    arguments[which] = arguments[which].to("meta")
    grad_output, input, weight, rstd, grad_residual = arguments.values()
    with pytest.raises(
        RuntimeError, match=f"on the same device, but input is on cpu and {which} is on meta"
    ):
        ops.rms_norm_backward(
            grad_output, input, [8], weight, rstd, None, [True, True], grad_residual
        )


def test_saved_tensor_that_comes_back_elsewhere():
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.to("meta") if t.dim() == 1 else t
    ):
        y = rms_norm(x, 8)
    with pytest.raises(RuntimeError, match="input is on cpu and rstd is on meta"):
        y.sum().backward()


KINDS = {  # of the ops whose arguments torch.ops would judge
    "text for input": (
        lambda: rms_norm_quant("x", dtype=torch.int8, out=(X, X)),
        "expected input to be a Tensor, but got str",
    ),
    "list for residual": (
        lambda: fused_add_rms_norm(X, [1.0]),
        "expected residual to be a Tensor, but got list",
    ),
    "text for eps": (
        lambda: fused_add_rms_norm(X, X, W, "a"),
        "expected eps to be a number or None, but got str",
    ),
    "text for eps, in place": (
        lambda: fused_add_rms_norm_(X.clone(), X.clone(), W, "a"),
        "expected eps to be a number or None, but got str",
    ),
    "text for eps, quantized": (
        lambda: rms_norm_quant(X, W, "a", dtype=torch.int8),
        "expected eps to be a number or None, but got str",
    ),
    "text for eps, gated and quantized": (
        lambda: rms_norm_gated_quant(X, X, W, "a", dtype=torch.int8),
        "expected eps to be a number or None, but got str",
    ),
    "normalized_shape for weight": (
        lambda: rms_norm_quant(X, 8, W, dtype=torch.int8),
        "weight to be a Tensor or None, but got int; .* takes no normalized_shape",
    ),
    "int for dtype": (
        lambda: rms_norm_quant(X, dtype=1),
        "expected dtype to be a torch.dtype, but got int",
    ),
}


@pytest.mark.parametrize("what", KINDS)
def test_wrong_kinds(what):
    call, message = KINDS[what]
    with pytest.raises(TypeError, match=message):
        call()


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    want = rms_norm(X, 8, W, 1e-3)
    for width in (numpy.int64(8), numpy.int32(8), (numpy.int64(8),)):
        assert torch.equal(rms_norm(X, width, W, numpy.float64(1e-3)), want)
        assert torch.equal(rms_norm(X, width, W, 1e-3, out=torch.empty(3, 8)), want)
        assert torch.equal(RMSNorm(width, 1e-3)(X), want)
    cast = {"cast_before_weight": numpy.True_, "weight_offset": numpy.float32(0)}
    assert torch.equal(rms_norm(X, 8, W, 1e-3, **cast), want)
    assert torch.equal(fused_add_rms_norm(X, 0 * X, W, 1e-3, **cast)[0], want)
    out = torch.empty(3, 8), torch.empty(3, 8)
    assert fused_add_rms_norm(X, 0 * X, W, 1e-3, out=out, **cast)[0] is out[0]
    assert torch.equal(out[0], want)
    fused_add_rms_norm_(X.clone(), X.clone(), W, 1e-3, **cast)
    rms_norm_quant(X, W, 1e-3, dtype=torch.int8, **cast)
    for width in (numpy.float64(8), numpy.True_, "8"):
        with pytest.raises(TypeError, match="normalized_shape"):
            rms_norm(X, width)


def test_whole_numbers():
    want = rms_norm(X, 8, W, 1.0, weight_offset=1.0)
    assert torch.equal(rms_norm(X, 8, W, 1, weight_offset=1), want)
    for width in (-8, 1 << 40):
        with pytest.raises(RuntimeError, match=rf"given normalized_shape=\[{width}\]"):
            rms_norm(X, width)
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        rms_norm(X, 1 << 70)


def test_entry_point_of_too_few_arguments():
    """It takes none of it, and leaves the error to torch.ops."""
    assert _C.rms_norm(X) is None


def test_name_with_a_nul():
    with pytest.raises(ValueError, match="unknown or unsupported instruction set"):
        _C.set_isa("scalar\0x")


BUFFER = torch.full((40,), NAN)

# (input, out, options, what the message says)
BAD_OUT = {
    "shape": (X, torch.full((3, 9), NAN), {}, "expected out of shape [3, 8], but got [3, 9]"),
    "shape that would broadcast": (
        X,
        torch.full((2, 3, 8), NAN),
        {},
        "expected out of shape [3, 8], but got [2, 3, 8]",
    ),
    "dtype": (
        X,
        torch.full((3, 8), NAN, dtype=torch.float64),
        {},
        "expected out of dtype Float, but got Double",
    ),
    "promoted dtype": (
        X.bfloat16(),
        torch.full((3, 8), NAN, dtype=torch.bfloat16),
        LLAMA,
        "expected out of dtype Float, but got BFloat16",
    ),
    "device": (X, torch.empty(3, 8, device="meta"), {}, "input is on cpu and out is on meta"),
    "rows not dense": (X, torch.full((8, 3), NAN).t(), {}, "expected out with dense rows"),
    "expanded": (
        X,
        torch.full((1, 8), NAN).expand(3, 8),
        {},
        "more than one element of the written-to tensor refers to a single memory location",
    ),
    "rows that overlap": (
        X,
        BUFFER.as_strided((3, 8), (4, 1)),
        {},
        "expected out with rows that do not overlap, but got strides [4, 1]",
    ),
    "rows that interlock": (
        X.view(1, 3, 8).expand(2, 3, 8),
        BUFFER.as_strided((2, 3, 8), (8, 8, 1)),
        {},
        "rows that do not overlap",
    ),
    "one element further": (
        BUFFER[:24].view(3, 8),
        BUFFER[1:25].view(3, 8),
        {},
        "out partly overlaps input",
    ),
    "one row further": (
        BUFFER[:24].view(3, 8),
        BUFFER[8:32].view(3, 8),
        {},
        "out partly overlaps input",
    ),
    "columns of the same row": (
        BUFFER.as_strided((3, 8), (13, 1)),
        BUFFER[4:].as_strided((3, 8), (13, 1)),
        {},
        "out partly overlaps input",
    ),
    "columns of the next row": (
        BUFFER.as_strided((3, 8), (11, 1)),
        BUFFER[9:].as_strided((3, 8), (11, 1)),
        {},
        "out partly overlaps input",
    ),
    "wider elements from the same address on": (
        BUFFER.view(torch.float16)[:24].view(3, 8),
        BUFFER[:24].view(3, 8),
        LLAMA,
        "out partly overlaps input",
    ),
    "dense over strided": (
        BUFFER.as_strided((3, 8), (12, 1)),
        BUFFER[:24].view(3, 8),
        {},
        "out partly overlaps input",
    ),
}


@pytest.mark.parametrize("x, out, options, message", BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out(x, out, options, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rms_norm(x, 8, W, **options, out=out)
    assert out.is_meta or out.isnan().all()


def test_out_over_the_weight():
    weight = torch.ones(8)
    with pytest.raises(
        RuntimeError, match="some elements of the input tensor and the written-to tensor"
    ):
        rms_norm(torch.full((1, 8), 2.0), 8, weight, out=weight.view(1, 8))
    assert weight.eq(1).all()


@pytest.mark.parametrize("which", ["input", "weight", "out"])
def test_out_under_grad(which):
    tensors = {"input": torch.ones(3, 8), "weight": torch.ones(8), "out": torch.full((3, 8), NAN)}
    tensors[which].requires_grad_()
    message = "rms_norm.*: it does not support automatic differentiation"
    with pytest.raises(RuntimeError, match=message):
        rms_norm(tensors["input"], 8, tensors["weight"], out=tensors["out"])
    assert tensors["out"].isnan().all()
    with torch.no_grad():  # nothing is recorded: fine
        rms_norm(tensors["input"], 8, tensors["weight"], out=tensors["out"])
    assert not tensors["out"].isnan().any()


# (what replaces an argument of the raw backward, message)
BAD_BACKWARD = {
    "gradient's shape": (
        {"grad_output": torch.ones(3, 1)},
        RuntimeError,
        "expected grad_output of shape [3, 8], but got [3, 1]",
    ),
    "gradient's dtype": (
        {"grad_output": torch.ones(3, 8, dtype=torch.int32)},
        NotImplementedError,
        "'Int': expected grad_output",
    ),
    "rstd's shape": (
        {"rstd": torch.ones(3, 1)},
        RuntimeError,
        "expected rstd of shape [3], but got [3, 1]",
    ),
    "rstd's dtype": (
        {"rstd": torch.ones(3, dtype=torch.float64)},
        RuntimeError,
        "expected rstd of dtype Float, but got Double",
    ),
    "weight's shape": ({"weight": torch.ones(1)}, RuntimeError, "but got weight of shape [1]"),
    "eps": (
        {"eps": -1.0},
        ValueError,
        "rms_norm_backward: expected eps to be finite and not negative",
    ),
    "normalized_shape": (
        {"normalized_shape": (3,)},
        RuntimeError,
        "expected input with shape [*, 3]",
    ),
}


@pytest.mark.parametrize("replaced, error, message", BAD_BACKWARD.values(), ids=BAD_BACKWARD)
def test_bad_backward(replaced, error, message):
    args = dict(
        grad_output=X, input=X, normalized_shape=(8,), weight=W, rstd=torch.ones(3), eps=None
    )
    args["output_mask"] = (True, True)
    with pytest.raises(error, match=re.escape(message)):
        ops.rms_norm_backward(**args | replaced)
    refused_alike_while_tracing(ops.rms_norm_backward, **args | replaced)


@pytest.mark.parametrize("op", [ops.rms_norm, ops.rms_norm_forward])
def test_messages_name_the_public_function(op):
    with pytest.raises(RuntimeError, match="^rms_norm: given normalized_shape"):
        op(X, (7,))


# Those that pass the argument parser and could have a gradient.
CALLS = {
    kind: case
    for kind, case in BAD_INPUT.items()
    if case[2] is not TypeError and case[0][0].dtype is torch.float32
}


@pytest.mark.parametrize("args, options, error, message", CALLS.values(), ids=CALLS)
def test_bad_input_on_the_other_ways(args, options, error, message):
    """With gradients, and under a transform, where the formula stands in for the kernels: checked
    all the same.
    """
    with pytest.raises(error, match=re.escape(message)):
        rms_norm(args[0].clone().requires_grad_(), *args[1:], **options)
    with pytest.raises(error, match=re.escape(message)):
        torch.func.grad(lambda x: rms_norm(x, *args[1:], **options).sum())(args[0])


@pytest.mark.skipif(
    _C.cuda_built() or not torch.cuda.is_available(), reason="needs a GPU and a build without CUDA"
)
def test_cuda_tensor_without_cuda_kernels():
    with pytest.raises(RuntimeError, match="rmsnorm_cuda was built without CUDA"):
        rms_norm(X.cuda(), 8)


def test_last_good_call_after_errors():
    """An error leaves nothing behind."""
    x = random(3, 8)
    want = rms_norm(x, 8)
    with pytest.raises(RuntimeError):
        rms_norm(x, 7)
    assert torch.equal(rms_norm(x, 8), want)
