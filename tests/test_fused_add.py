"""fused_add_rms_norm: the bits of add-then-norm, its gradients, in place, its errors, and
torch.compile.
"""

import itertools

import pytest
import torch
from cases import (
    GEMMA,
    LLAMA,
    OPTIONS,
    ROWS,
    assert_forward,
    hard_rows,
    name,
    ops,
    pairs,
    random,
    random_weight,
    refused_alike_while_tracing,
    same_bits,
)

import rmsnorm_cuda
from rmsnorm_cuda import RMSNorm, fused_add_rms_norm, fused_add_rms_norm_, rms_norm

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = (
    (FP32, FP32),
    (FP16, FP16),
    (BF16, BF16),
    (FP16, FP32),
    (BF16, FP32),
    (FP64, FP64),
)  # of input and residual


def add_then_norm(input, residual, weight, eps, **options):
    compute = FP64 if input.dtype == FP64 else FP32
    total = (input.cpu().to(compute) + residual.cpu().to(compute)).to(residual.dtype)
    y = rms_norm(total.to(input.device), total.shape[-1:], weight, eps, **options).cpu()
    dtype = input.dtype
    if options.get("cast_before_weight") and weight is not None:
        dtype = torch.promote_types(input.dtype, weight.dtype)
    return y.to(dtype), total


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_bits_of_add_then_norm(pair, options, device, painted):
    shapes = [*((rows, 64) for rows in ROWS), (1, 1), (21, 128), (9, 1025), (2, 9000)]
    for (rows, cols), weight_dtype in zip(shapes, itertools.cycle((pair[0], FP32, None))):
        input, residual = (random(rows, cols, dtype=dtype, device=device) for dtype in pair)
        weight = None if weight_dtype is None else random(cols, dtype=weight_dtype, device=device)
        want = add_then_norm(input, residual, weight, 1e-6, **options)
        got = fused_add_rms_norm(input, residual, weight, 1e-6, **options)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b), (rows, cols, weight_dtype)
        if want[0].dtype == input.dtype:
            assert fused_add_rms_norm_(input, residual, weight, 1e-6, **options) is None
            assert torch.equal(input.cpu(), want[0]) and torch.equal(residual.cpu(), want[1])


UNROUNDED = {"round_sum": False}


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=name)
def test_norm_of_the_unrounded_sum(dtype, options, device, painted):
    shapes = [*((rows, 64) for rows in ROWS), (1, 1), (21, 128), (9, 1025), (1, 4096), (2, 9000)]
    others = 0
    for (rows, cols), weight_dtype in zip(shapes, itertools.cycle((dtype, FP32, None))):
        input, residual = (random(rows, cols, dtype=dtype, device=device) for _ in range(2))
        weight = random_weight(cols, weight_dtype, device)
        args = input, residual, weight, 1e-6
        output, total, rstd = ops.fused_add_rms_norm_forward(*args, **options, **UNROUNDED)
        exact = input.cpu().float() + residual.cpu().float()
        assert torch.equal(total.cpu(), exact.to(dtype))
        on_cpu = None if weight is None else weight.cpu()
        assert_forward(output, exact, (cols,), on_cpu, 1e-6, options, rounds_to=dtype)
        want = (exact.double().square().mean(-1) + 1e-6).rsqrt().float()
        torch.testing.assert_close(rstd.cpu(), want, rtol=4e-7, atol=0)
        others += (output != fused_add_rms_norm(*args, **options)[0]).sum().item()
        for got in (
            fused_add_rms_norm(*args, **options, **UNROUNDED),
            fused_add_rms_norm(
                *args,
                **options,
                **UNROUNDED,
                out=(torch.empty_like(output), torch.empty_like(total)),
            ),
        ):
            assert torch.equal(got[0], output) and torch.equal(got[1], total)
        if output.dtype == dtype:
            assert fused_add_rms_norm_(*args, **options, **UNROUNDED) is None
            assert torch.equal(input, output) and torch.equal(residual, total)
    assert others > 1000


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=name)
def test_the_unrounded_sum_is_that_of_two_steps(dtype, options, device):
    """The norm of the fp32 sum, rounded: other bits where that is nearly a tie, and nowhere else.
    Rows that fp32 cannot sum, NaN and Inf are among them, and the sum of two near each other."""
    cols = 320
    rows = hard_rows(cols, dtype)
    residual = torch.stack(list(rows.values()) * 3).to(device)
    input = (residual.cpu().roll(1, 0) * 0.75).to(dtype).to(device)
    input[3] = -residual[3]
    for weight_dtype in (dtype, FP32, None):
        weight = random_weight(cols, weight_dtype, device)
        exact = input.float() + residual.float()
        if weight is not None and "cast_before_weight" in options:
            xhat = rms_norm(exact, (cols,), None, 1e-6).to(dtype)
            want = (xhat.float() * weight.float()).to(torch.promote_types(dtype, weight_dtype))
        else:
            want = rms_norm(exact, (cols,), weight, 1e-6, **options).to(dtype)
        got, total = fused_add_rms_norm(input, residual, weight, 1e-6, **options, **UNROUNDED)
        assert same_bits(total, exact.to(dtype)) and torch.equal(got.isnan(), want.isnan())
        # By an ulp of x / rms, where that is rounded first.
        other = (got != want) & ~want.isnan()
        step = torch.finfo(dtype).eps * want[other].double().abs() + torch.finfo(dtype).tiny
        assert ((got[other].double() - want[other].double()).abs() <= 1.01 * step).all()
        assert other.sum() <= want.numel() / (200 if dtype == FP16 else 2000)


def test_wider_residuals_have_no_unrounded_sum(device):
    for pair in ((FP32, FP32), (FP64, FP64), (BF16, FP32), (FP16, FP32)):
        input, residual = (random(5, 300, dtype=dtype, device=device) for dtype in pair)
        want = fused_add_rms_norm(input, residual, **LLAMA)
        got = fused_add_rms_norm(input, residual, **LLAMA, **UNROUNDED)
        assert all(map(same_bits, got, want))


def test_rows_of_an_unrounded_sum(device, painted, torch_kernels):
    """Strided, expanded and misaligned, beside dense ones; alone, as among others."""
    torch_kernels(device)
    for cols in (64, 100, 3000):
        whole = random(5, 7, 3 * cols, dtype=BF16).to(device)
        heads = whole[..., cols : 2 * cols]
        residual = random(7, 5, cols, dtype=BF16).to(device).transpose(0, 1)
        weight = random_weight(cols, BF16, device)
        dense = heads.contiguous(), residual.contiguous()
        want = fused_add_rms_norm(*dense, weight, **GEMMA, **UNROUNDED)
        got = fused_add_rms_norm(heads, residual, weight, **GEMMA, **UNROUNDED)
        assert all(map(torch.equal, got, want))
        alone = fused_add_rms_norm(dense[0][3, 2], dense[1][3, 2], weight, **GEMMA, **UNROUNDED)
        assert torch.equal(alone[0], want[0][3, 2]) and torch.equal(alone[1], want[1][3, 2])
        fused_add_rms_norm_(heads, residual, weight, **GEMMA, **UNROUNDED)
        assert torch.equal(heads, want[0]) and torch.equal(residual, want[1])


def test_gradients_of_an_unrounded_sum():
    """Roundings are the identity: those of the norm of residual_out, by the rstd of the sum."""
    for options in OPTIONS:
        leaves = [random(9, 300, dtype=BF16).requires_grad_() for _ in range(2)]
        leaves.append(random_weight(300, BF16).requires_grad_())
        outputs = fused_add_rms_norm(*leaves, 1e-6, **options, **UNROUNDED)
        dy, dsum = (random(9, 300, dtype=BF16) for _ in range(2))
        got = torch.autograd.grad(outputs, leaves, (dy, dsum))
        with torch.no_grad():
            _, total, rstd = ops.fused_add_rms_norm_forward(*leaves, 1e-6, **options, **UNROUNDED)
            want_sum, want_weight = ops.rms_norm_backward(
                dy, total, (300,), leaves[2], rstd, 1e-6, (True, True), dsum, **options
            )
        assert all(map(torch.equal, got, (want_sum, want_sum, want_weight)))

        # By the formula, as functorch has it.
        def loss(*leaves, options=options):
            y, total = fused_add_rms_norm(*leaves, 1e-6, **options, **UNROUNDED)
            return (y * dy).float().sum() + (total * dsum).float().sum()

        by_formula = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in leaves))
        for a, b in zip(by_formula, got, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
        tangents = tuple(torch.zeros_like(t) for t in leaves)
        (y, total), _ = torch.func.jvp(
            lambda *t, options=options: fused_add_rms_norm(*t, 1e-6, **options, **UNROUNDED),
            tuple(t.detach() for t in leaves),
            tangents,
        )
        assert torch.equal(total, outputs[1].detach())
        exact = leaves[0].detach().float() + leaves[1].detach().float()
        assert_forward(y, exact, (300,), leaves[2].detach(), 1e-6, options, rounds_to=BF16)


def test_layouts(device, painted, torch_kernels):
    torch_kernels(device)  # for the way back of a strided tensor
    whole = random(5, 7, 3 * 64, dtype=BF16)
    heads = whole.to(device)[..., 64:128]
    residual = random(7, 5, 64, dtype=BF16).to(device).transpose(0, 1)
    weight = random(64, dtype=BF16, device=device)
    want = add_then_norm(heads, residual, weight, None)
    for a, b in zip(fused_add_rms_norm(heads, residual, weight), want, strict=True):
        assert a.is_contiguous() and torch.equal(a.cpu(), b)
    before = whole[..., :64].clone(), whole[..., 128:].clone()
    fused_add_rms_norm_(heads, residual, weight)
    assert torch.equal(heads.cpu(), want[0]) and torch.equal(residual.cpu(), want[1])
    if device == "cpu":
        assert torch.equal(whole[..., :64], before[0]) and torch.equal(whole[..., 128:], before[1])


def test_layouts_that_are_copied(device, torch_kernels):
    torch_kernels(device)  # for the copy
    expanded = (
        random(1, 64, dtype=BF16).to(device).expand(6, 64)
    )  # a functional input may repeat rows
    for a, b in zip(
        fused_add_rms_norm(expanded, expanded),
        add_then_norm(expanded, expanded, None, None),
        strict=True,
    ):
        assert torch.equal(a.cpu(), b)
    not_dense = random(64, 6, dtype=FP32).to(device).t()
    for a, b in zip(
        fused_add_rms_norm(not_dense, not_dense),
        add_then_norm(not_dense, not_dense, None, None),
        strict=True,
    ):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("shape", ((0, 64), (3, 0), (2, 0, 8)), ids=str)
def test_empty(shape, device):
    input = torch.empty(shape).to(device)
    output, total = fused_add_rms_norm(input, input.clone())
    assert output.shape == total.shape == shape
    assert fused_add_rms_norm(input, input.clone(), out=(output, total)) == (output, total)
    fused_add_rms_norm_(input, input.clone())


@pytest.mark.parametrize(
    "pair, used, options",
    pairs(((FP32, FP32), (BF16, BF16), (BF16, FP32)), ("both", "output", "residual_out"), OPTIONS),
    ids=name,
)
def test_gradients(pair, used, options, device, torch_kernels):
    """Beside the formula in fp64; the sum of both gradients is rounded once."""
    if pair[0] != pair[1]:
        torch_kernels(device)  # the gradient of input is that of residual in another dtype
    rows, cols = 9, 300
    leaves = [
        random(rows, cols, dtype=pair[0]),
        random(rows, cols, dtype=pair[1]),
        random(cols, dtype=FP32),
    ]
    dy, dsum = (
        random(rows, cols, dtype=FP32 if "cast_before_weight" in options else pair[0]),
        random(rows, cols, dtype=pair[1]),
    )
    there = [t.to(device).requires_grad_() for t in leaves]
    output, total = fused_add_rms_norm(*there, 1e-6, **options)
    outputs = [
        t for t, name in ((output, "output"), (total, "residual_out")) if used in ("both", name)
    ]
    upstream = [
        t.to(device)
        for t, name in ((dy, "output"), (dsum, "residual_out"))
        if used in ("both", name)
    ]
    got = torch.autograd.grad(outputs, there, upstream, allow_unused=True)
    s = total.detach().cpu().double().requires_grad_()
    w = leaves[2].double().requires_grad_()
    y = (
        s
        * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
        * (w + options.get("weight_offset", 0.0))
    )
    want_s, want_w = torch.zeros_like(s), None
    if used != "residual_out":
        want_s, want_w = torch.autograd.grad(y, (s, w), dy.double())
    if used != "output":
        want_s = want_s + dsum.double()
    for grad, leaf in zip(got[:2], leaves):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(
            grad.cpu().double(), want_s, rtol=torch.finfo(leaf.dtype).eps, atol=1e-5
        )
    if want_w is None:
        assert got[2] is None
    else:  # a rounded xhat goes into dweight where it did into the output
        torch.testing.assert_close(
            got[2].cpu().double(),
            want_w,
            rtol=1e-5,
            atol=0.1 if options.get("cast_before_weight") else 1e-4,
        )


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_what_autograd_saved_is_not_overwritten_unseen(mode):
    x, w = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    for overwrite in (
        lambda: fused_add_rms_norm_(x, torch.zeros(4, 8)),
        lambda: rms_norm(x, 8, out=x),
    ):
        loss = (x * w).sum()
        with mode():
            overwrite()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_only_the_weight_requires_grad():
    weight = torch.ones(8, requires_grad=True)
    output, total = fused_add_rms_norm(torch.randn(2, 8), torch.randn(2, 8), weight)
    assert output.requires_grad and not total.requires_grad
    output.sum().backward()
    assert weight.grad is not None


def test_only_the_residual_requires_grad():
    input, residual, weight = random(4, 32), random(4, 32), random(32)
    grads = []
    for leaf in (input, residual):
        leaf.requires_grad_()
        output, total = fused_add_rms_norm(input, residual, weight)
        grads += torch.autograd.grad((output * residual.detach()).sum() + total.sum(), leaf)
        leaf.requires_grad_(False)
    assert torch.equal(*grads)


def test_frozen_weight_and_one_gradient_only():
    input, residual, weight = (
        random(4, 32, dtype=FP32).requires_grad_(),
        random(4, 32, dtype=FP32),
        random(32, dtype=FP32),
    )
    output, total = fused_add_rms_norm(input, residual, weight)
    (grad,) = torch.autograd.grad(output.sum() + total.sum(), input)
    assert grad.shape == input.shape and total.requires_grad and not weight.requires_grad


def test_gradcheck_and_second_derivatives():
    leaves = [
        random(3, 5, dtype=FP64).requires_grad_(),
        random(3, 5, dtype=FP64).requires_grad_(),
        random(5, dtype=FP64).requires_grad_(),
    ]

    def function(input, residual, weight):
        return fused_add_rms_norm(input, residual, weight, 1e-3, weight_offset=0.5)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda i, r: function(i, r, leaves[2])[0].sum()), in_dims=(0, 0)
    )
    want = torch.autograd.grad(function(*leaves)[0].sum(), leaves[0])[0]
    torch.testing.assert_close(per_sample(leaves[0].detach(), leaves[1].detach()), want)


@pytest.mark.parametrize("round_sum", (True, False))
def test_compile_of_16_bits(round_sum):
    def layer(x, residual, weight):
        y, residual = fused_add_rms_norm(x, residual, weight, 1e-6, round_sum=round_sum)
        fused_add_rms_norm_(y, residual, weight, 1e-6, round_sum=round_sum)
        return y, residual

    args = [random(4, 64, dtype=BF16), random(4, 64, dtype=BF16), random_weight(64, BF16)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*args), layer(*args)))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    def layer(x, residual, weight):
        y, residual = fused_add_rms_norm(x, residual, weight, 1e-6)
        return y * 2, residual

    leaves = [
        random(4, 64, dtype=FP32).requires_grad_(),
        random(4, 64, dtype=FP32).requires_grad_(),
        random(64, dtype=FP32).requires_grad_(),
    ]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*leaves), layer(*leaves), strict=True):
        assert torch.equal(got, want)
    want = torch.autograd.grad([t.sum() for t in layer(*leaves)], leaves)
    got = torch.autograd.grad([t.sum() for t in compiled(*leaves)], leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_in_place():
    """The code that Inductor writes hands the op the graph's own buffer and the caller's residual:
    no clone of either.
    """
    from torch._inductor.utils import run_and_get_code

    def layer(x, residual, weight):
        y = x * 2
        fused_add_rms_norm_(y, residual, weight, 1e-6)
        return y + 1

    x, residual, weight = (
        random(4, 64, dtype=FP32),
        random(4, 64, dtype=FP32),
        random(64, dtype=FP32),
    )
    want_residual = residual.clone()
    want = layer(x, want_residual, weight)
    got, code = run_and_get_code(torch.compile(layer, fullgraph=True), x, residual, weight)
    assert torch.equal(got, want) and torch.equal(residual, want_residual)
    call = code[0][code[0].index("def call(") : code[0].index("return (")]
    assert "fused_add_rms_norm_.default(buf0, arg1_1, arg2_1" in call, call
    assert call.count("empty_strided_cpu(") == 2, call  # x * 2, and the result


def test_module():
    for options in ({}, {"weight_offset": 1.0}, {"cast_before_weight": True}):
        module = RMSNorm(64, 1e-5, dtype=BF16, **options)
        x, residual = random(3, 64, dtype=BF16), random(3, 64, dtype=BF16)
        got = module(x, residual)
        want = fused_add_rms_norm(x, residual, module.weight, 1e-5, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(module(want[1]), got[0])
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[8\].*size \[2, 4\]"):
        RMSNorm(8, elementwise_affine=False)(torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="one dimension"):
        RMSNorm((2, 32))(torch.randn(3, 2, 32), torch.randn(3, 2, 32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (
            {"residual": torch.zeros(2, 9)},
            RuntimeError,
            r"residual of input's shape \[2, 8\], but got \[2, 9\]",
        ),
        (
            {"residual": torch.zeros(2, 8, dtype=BF16)},
            RuntimeError,
            "residual of input's dtype Float, but got BFloat16",
        ),
        ({"residual": torch.zeros(2, 8, device="meta")}, RuntimeError, "residual is on meta"),
        ({"weight": torch.zeros(9)}, RuntimeError, r"weight of shape \[9\]"),
        (
            {
                "input": torch.zeros(2, 8, dtype=torch.int32),
                "residual": torch.zeros(2, 8, dtype=torch.int32),
            },
            NotImplementedError,
            "Int",
        ),
        ({"input": torch.zeros(()), "residual": torch.zeros(())}, ValueError, "scalar"),
        ({"eps": -1.0}, ValueError, "eps"),
    ),
    ids=lambda value: None if not isinstance(value, str) else value[:20],
)
@pytest.mark.parametrize("function", (fused_add_rms_norm, fused_add_rms_norm_))
def test_errors(function, change, error, message):
    arguments = {
        "input": torch.ones(2, 8),
        "residual": torch.ones(2, 8),
        "weight": torch.ones(8),
        "eps": 1e-6,
    } | change
    with pytest.raises(error, match=message):
        function(**arguments)
    refused_alike_while_tracing(function, **arguments)
    if arguments["input"].device.type == "cpu":
        assert (arguments["input"] == arguments["input"].flatten()[0]).all(), (
            "something was written"
        )


@pytest.mark.parametrize("function", (fused_add_rms_norm, fused_add_rms_norm_))
def test_round_sum_is_a_bool(function):
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match="round_sum to be a bool, but got str"):
        function(x, x.clone(), round_sum="no")
    assert (x == 1).all()


def test_errors_in_place():
    x = torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        fused_add_rms_norm_(x.clone().requires_grad_(), x.clone())
    with pytest.raises(RuntimeError, match="input and residual share memory"):
        fused_add_rms_norm_(x, x)
    with pytest.raises(RuntimeError, match="input and residual share memory"):
        fused_add_rms_norm_(x[:3], x[1:])
    with pytest.raises(RuntimeError, match="rows that do not overlap"):
        fused_add_rms_norm_(torch.ones(1, 8).expand(4, 8), x.clone())
    with pytest.raises(RuntimeError, match="the normalized dimensions contiguous"):
        fused_add_rms_norm_(torch.ones(8, 4).t(), x.clone())
    with pytest.raises(RuntimeError, match="cannot take the place of input"):
        fused_add_rms_norm_(x.bfloat16(), x.bfloat16(), torch.ones(8), cast_before_weight=True)
    whole = torch.ones(4, 16)
    with pytest.raises(RuntimeError, match="input and weight share memory"):
        fused_add_rms_norm_(whole[:, :8], x, whole[1, :8])
    assert (x == 1).all() and (whole == 1).all()
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        version = leaf._version
        fused_add_rms_norm_(leaf, x.clone())
        assert leaf._version > version


def test_threads_give_the_same_bits(threads):
    input, residual = random(600, 1000, dtype=BF16), random(600, 1000, dtype=BF16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(fused_add_rms_norm(input, residual))
    assert all(
        torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)
    )


def test_public():
    assert {"fused_add_rms_norm", "fused_add_rms_norm_"} <= set(rmsnorm_cuda.__all__)


class DecoderLayer(torch.nn.Module):
    """Of the Llama family, in two ways: with the residual added by itself, and by the norm that
    follows.
    """

    def __init__(self, width, heads, dtype):
        super().__init__()
        self.heads = heads
        self.input_norm, self.post_norm = (
            RMSNorm(width, 1e-6, dtype=dtype, cast_before_weight=True) for _ in range(2)
        )
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False, dtype=dtype)
        self.out = torch.nn.Linear(width, width, bias=False, dtype=dtype)
        self.up = torch.nn.Linear(width, 4 * width, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(2 * width, width, bias=False, dtype=dtype)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1).unbind(-2)
        return self.out(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(-2)
        )

    def feed_forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up)

    def forward(self, x):
        x = x + self.attention(self.input_norm(x))
        return x + self.feed_forward(self.post_norm(x))

    def fused(self, x, residual):
        x, residual = (self.input_norm(x), x) if residual is None else self.input_norm(x, residual)
        x, residual = self.post_norm(self.attention(x), residual)
        return self.feed_forward(x), residual


@pytest.mark.parametrize("dtype, tolerance", ((FP64, 1e-12), (FP32, 1e-5), (BF16, 0.03)), ids=str)
def test_decoder_layers(dtype, tolerance):
    """The bits of the layers as they were, and their gradients, whose sums are rounded once less:
    eps of dtype, a few times.
    """
    layers = torch.nn.ModuleList(DecoderLayer(64, 4, dtype) for _ in range(3))
    final = RMSNorm(64, 1e-6, dtype=dtype, cast_before_weight=True)
    leaves = [
        torch.randn(2, 9, 64, dtype=FP64).to(dtype).requires_grad_(),
        *layers.parameters(),
        *final.parameters(),
    ]
    plain = leaves[0]
    for layer in layers:
        plain = layer(plain)
    plain = final(plain)
    hidden, residual = leaves[0], None
    for layer in layers:
        hidden, residual = layer.fused(hidden, residual)
    fused, _ = final(hidden, residual)
    assert torch.equal(plain, fused)
    upstream = torch.randn_like(plain)
    for got, want in zip(
        torch.autograd.grad(fused, leaves, upstream),
        torch.autograd.grad(plain, leaves, upstream),
        strict=True,
    ):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
