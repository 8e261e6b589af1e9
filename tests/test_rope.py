"""rms_norm_rope: values, bits beside the steps, layouts, gradients, what is written and refused."""

import math
import re

import pytest
import torch
from cases import (
    GEMMA,
    LLAMA,
    OPTIONS,
    name,
    ops,
    pairs,
    random,
    random_weight,
    refused_alike_while_tracing,
    result_dtype,
    same_bits,
)

import rmsnorm_cuda
from rmsnorm_cuda import rms_norm, rms_norm_rope, rms_norm_rope_
from rmsnorm_cuda.reference import rms_norm_rope_reference, round_once

EPS = 1e-6
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BATCH, TOKENS, Q_HEADS, K_HEADS = 2, 5, 6, 2


def angles(*shape, dtype=FP32, device="cpu"):
    """(cos, sin)"""
    t = random(*shape, dtype=FP64) * 3
    return t.cos().to(dtype).to(device), t.sin().to(dtype).to(device)


def heads_of(count, width, dtype=FP32, device="cpu", heads_dim=-2):
    shape = (BATCH, TOKENS, count, width) if heads_dim == -2 else (BATCH, count, TOKENS, width)
    return random(*shape, dtype=dtype, device=device)


def weight_of(kind, heads, width, dtype, device="cpu"):
    shapes = {"shared": (width,), "own": (heads, width), "across": (heads * width,)}
    return None if kind == "none" else random_weight(shapes[kind], dtype, device)


def assert_near(got, x, weight, cos, sin, dtype, **options):
    """Within 1 ulp of fp64 rounded once, and of what the difference of two products cancels: a
    rounding of the norm and one of the product, relative to the products."""
    want = rms_norm_rope_reference(x, weight, cos, sin, EPS, **options)
    largest = rms_norm_rope_reference(
        x, weight, torch.ones_like(cos), torch.zeros_like(sin), EPS, **options
    ).abs()
    partner = rms_norm_rope_reference(
        x, weight, torch.zeros_like(cos), torch.ones_like(sin), EPS, **options
    ).abs()
    got = got.cpu()
    assert got.dtype == dtype and got.shape == x.shape
    computes = (
        FP64 if FP64 in (x.dtype, dtype, weight.dtype if weight is not None else None) else FP32
    )
    inner = 8 * torch.finfo(computes).eps * (largest + partner)
    if options.get("cast_before_weight"):  # a near-tie of the first rounding
        inner = inner + torch.finfo(x.dtype).eps * (largest + partner)
    once = round_once(want, dtype).double()
    error = (got.double() - once).abs()
    assert (error <= inner + torch.finfo(dtype).eps * want.abs()).all()
    if not options.get("cast_before_weight") and got.element_size() == 2:
        assert (error > 0).float().mean() < 0.02, "it is not rounded to the nearest"


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    "dtypes, options, kinds, width, share, interleaved, heads_dim",
    pairs(
        [(FP32, FP32), (BF16, BF16), (FP16, FP32), (BF16, FP32), (FP64, FP64), (FP32, FP64)],
        OPTIONS,
        [("shared", "shared"), ("own", "none"), ("across", "across"), ("none", "own")],
        [8, 32, 64, 80, 128, 256, 512],
        [1.0, 0.5, 0.25],
        [False, True],
        [-2, -3],
    ),
    ids=name,
)
def test_values(
    device, torch_kernels, dtypes, options, kinds, width, share, interleaved, heads_dim
):
    if "across" in kinds and heads_dim == -3:
        torch_kernels(device)  # all heads of a token are put side by side
    dtype, other = dtypes
    q, k = (
        heads_of(n, width, t, heads_dim=heads_dim) for n, t in ((Q_HEADS, dtype), (K_HEADS, dtype))
    )
    weights = [weight_of(*of, width, other) for of in zip(kinds, (Q_HEADS, K_HEADS))]
    cos, sin = angles(BATCH, TOKENS, int(width * share) // 2, dtype=other)
    how = {"heads_dim": heads_dim, "interleaved": interleaved} | options
    on_device = [None if t is None else t.to(device) for t in (q, k, *weights, cos, sin)]
    results = rms_norm_rope(*on_device, EPS, **how)
    for got, x, weight in zip(results, (q, k), weights, strict=True):
        assert_near(got, x, weight, cos, sin, result_dtype(x, weight, options), **how)


@pytest.mark.parametrize(
    "dtypes, turned, interleaved, options, kind",
    pairs(
        [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP16, BF16)],
        [48, 64],
        [False, True],
        OPTIONS,
        ["shared", "own", "across"],
    ),
    ids=name,
)
def test_each_step_rounded_has_the_bits_of_the_steps(
    device, torch_kernels, dtypes, turned, interleaved, options, kind
):
    """Our norm, and then what transformers' apply_rotary_pos_emb does; Olmo 2's cos is in fp32."""
    torch_kernels(device)
    width, pairs = 64, turned // 2
    dtype, angle_dtype = dtypes
    q, k = (heads_of(n, width, dtype, device) for n in (Q_HEADS, K_HEADS))
    cos, sin = angles(BATCH, TOKENS, pairs, dtype=angle_dtype, device=device)
    weights = [weight_of(kind, n, width, dtype, device) for n in (Q_HEADS, K_HEADS)]
    how = {"interleaved": interleaved, "round_each_step": True} | options
    for x, weight, got in zip((q, k), weights, rms_norm_rope(q, k, *weights, cos, sin, EPS, **how)):
        if kind == "across":
            norm = rms_norm(x.flatten(-2), len(weight), weight, EPS, **options).view_as(x)
        elif kind == "own":
            each = [rms_norm(a, width, w, EPS, **options) for a, w in zip(x.unbind(-2), weight)]
            norm = torch.stack(each, -2)
        else:
            norm = rms_norm(x, width, weight, EPS, **options)
        c, s = (
            torch.stack([t, t], -1).flatten(-2) if interleaved else torch.cat([t, t], -1)
            for t in (cos, sin)
        )
        turned, rest = norm[..., : 2 * pairs], norm[..., 2 * pairs :]
        if interleaved:
            half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            half = torch.cat([-turned[..., pairs:], turned[..., :pairs]], -1)
        turned = turned * c.unsqueeze(-2) + half * s.unsqueeze(-2)
        assert same_bits(got, torch.cat([turned.to(dtype), rest], -1))


# ----------------------------------------------------------------------------------- which angles


def plain_call(width=32, dtype=FP32):
    """(q, k, weights), and (cos, sin) of each token."""
    q, k = heads_of(Q_HEADS, width, dtype), heads_of(K_HEADS, width, dtype)
    weights = random_weight(width, FP32), random_weight(width, FP32)
    return (q, k, *weights), angles(BATCH, TOKENS, width // 2)


def same(results, wanted):
    return all(same_bits(a, b) for a, b in zip(results, wanted, strict=True))


def test_angles_are_broadcast_and_may_have_any_strides(device, torch_kernels):
    torch_kernels(device)  # some are copied
    args, (cos, sin) = plain_call()
    args = [t.to(device) for t in args]

    def rotated(cos, sin):
        return rms_norm_rope(*args, cos, sin, EPS)

    for part in (cos[0], cos[:1], cos[:1, :1], cos[0, 0], cos[:, :1]):
        c, s = part.contiguous().to(device), (part * 0.5).contiguous().to(device)
        whole = [t.expand(BATCH, TOKENS, 16).contiguous() for t in (c, s)]
        assert same(rotated(c, s), rotated(*whole))
    cos, sin = cos.to(device), sin.to(device)
    want = rotated(cos, sin)
    both = torch.cat([cos, cos, sin, sin], -1)  # as models have them, halves alike
    assert same(rotated(both[..., :16], both[..., 32:48]), want)
    strided = torch.stack([cos, sin], -1)  # elements apart
    assert same(rotated(*strided.unbind(-1)), want)
    assert same(rotated(cos.transpose(0, 1).contiguous().transpose(0, 1), sin), want)


@pytest.mark.parametrize("positions_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_are_rows_of_a_cache(device, torch_kernels, positions_dtype, interleaved):
    args, _ = plain_call()
    cache = torch.cat(angles(11, 16), -1)  # as vLLM keeps it
    positions = torch.randint(0, 11, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    of_tokens = [t.contiguous().to(device) for t in cache[positions].chunk(2, -1)]
    args, cos_sin = [t.to(device) for t in args], cache.to(device).chunk(2, -1)
    want = rms_norm_rope(*args, *of_tokens, EPS, interleaved=interleaved)
    if positions_dtype == torch.int32:
        torch_kernels(device)  # they are converted
    given = positions.to(positions_dtype).to(device)
    assert same(rms_norm_rope(*args, *cos_sin, EPS, positions=given, interleaved=interleaved), want)
    torch_kernels(device)  # those for all of a batch are spread
    one_for_all = [t[:1] for t in of_tokens]
    want = rms_norm_rope(*args, *one_for_all, EPS)
    assert same(rms_norm_rope(*args, *cos_sin, EPS, positions=given[0]), want)


def axes_of(sections, interleaved):
    """As Qwen2-VL and Qwen3-VL choose: blocks, or every third pair."""
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in range(1, len(sections)):
        for i in range(axis, sections[axis] * len(sections), len(sections)):
            axes[i] = axis
    return axes


@pytest.mark.parametrize("interleaved_sections", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("sections", [[6, 5, 5], [16], [2, 14], [16, 0]])
def test_sections(device, sections, cached, interleaved_sections):
    if interleaved_sections and sections != [6, 5, 5]:
        sections = [8, 8] if len(sections) > 1 else sections
    args, _ = plain_call()
    count, axes = len(sections), axes_of(sections, interleaved_sections)
    cache = angles(11, 16)
    positions = torch.randint(0, 11, (count, BATCH, TOKENS))
    by_axis = [t[positions] for t in cache]
    chosen = [torch.stack([t[a][..., i] for i, a in enumerate(axes)], -1) for t in by_axis]
    args, chosen = [t.to(device) for t in args], [t.to(device) for t in chosen]
    want = rms_norm_rope(*args, *chosen, EPS)
    how = {"sections": sections, "interleaved_sections": interleaved_sections}
    if cached:
        cos_sin, how["positions"] = [t.to(device) for t in cache], positions.to(device)
    else:
        cos_sin = [t.to(device) for t in by_axis]
    assert same(rms_norm_rope(*args, *cos_sin, EPS, **how), want)
    if not cached:  # the same for all of a batch
        one = [t[:, 0] for t in cos_sin]
        spread = [t[:, :1].expand(count, BATCH, TOKENS, 16) for t in cos_sin]
        assert same(
            rms_norm_rope(*args, *one, EPS, **how), rms_norm_rope(*args, *spread, EPS, **how)
        )


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("kind", ["shared", "own", "across"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_slices_of_a_fused_projection(device, dtype, kind):
    """They are read and written where they lie: k, v and the memory around keep their bits."""
    width, heads = 32, Q_HEADS + 2 * K_HEADS
    fused = random(BATCH, TOKENS, heads, width, dtype=dtype)
    cos, sin = (t.to(device) for t in angles(TOKENS, 16))
    weights = [weight_of(kind, n, width, FP32, device) for n in (Q_HEADS, K_HEADS)]
    qkv = fused.to(device)
    q, k, _ = qkv.split([Q_HEADS, K_HEADS, K_HEADS], -2)
    parts = fused.split([Q_HEADS, K_HEADS, K_HEADS], -2)[:2]
    dense = [t.contiguous().to(device) for t in parts]
    want = rms_norm_rope(*dense, *weights, cos, sin, EPS)
    assert same(rms_norm_rope(q, k, *weights, cos, sin, EPS), want)
    if kind != "across":
        turned = rms_norm_rope(
            q.transpose(1, 2), k.transpose(1, 2), *weights, cos, sin, EPS, heads_dim=-3
        )
        assert all(t.is_contiguous() for t in turned)
        assert same([t.transpose(1, 2) for t in turned], want)
    assert rms_norm_rope_(q, k, *weights, cos, sin, EPS) is None
    *written, v = qkv.cpu().split([Q_HEADS, K_HEADS, K_HEADS], -2)
    assert same(written, want) and same_bits(v, fused[..., -K_HEADS:, :])


def test_heads_first_across():
    args, (cos, sin) = plain_call()
    q, k = args[:2]
    weights = random_weight(Q_HEADS * 32, FP32), random_weight(K_HEADS * 32, FP32)
    want = rms_norm_rope(q, k, *weights, cos, sin, EPS)
    for layout in (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()):
        got = rms_norm_rope(layout(q), layout(k), *weights, cos, sin, EPS, heads_dim=-3)
        assert same([t.transpose(1, 2) for t in got], want)


def test_layouts_that_have_to_be_copied():
    args, (cos, sin) = plain_call()
    want = rms_norm_rope(*args, cos, sin, EPS)
    q, k, *weights = args
    scattered = [torch.stack([t, t], -1)[..., 0] for t in (q, k)]
    assert same(rms_norm_rope(*scattered, *weights, cos, sin, EPS), want)
    six = q[:, None, :, None].expand(2, 2, 5, 2, 6, 32).transpose(1, 3)  # more than rows can walk
    got, _ = rms_norm_rope(six, None, weights[0], None, cos[0, 0], sin[0, 0], EPS)
    dense, _ = rms_norm_rope(six.contiguous(), None, weights[0], None, cos[0, 0], sin[0, 0], EPS)
    assert same_bits(got, dense)


@pytest.mark.parametrize(
    "shape", [(5, 3, 8), (2, 2, 5, 3, 8), (1, 1, 8), (0, 3, 8), (5, 0, 8), (2, 5, 3, 0)]
)
def test_shapes(shape):
    q = random(*shape)
    cos, sin = angles(shape[-3], shape[-1] // 2)
    y, none = rms_norm_rope(q, None, None, None, cos, sin, EPS)
    assert none is None and y.shape == q.shape and y.is_contiguous()
    if q.numel():
        assert_near(y, q, None, cos, sin, FP32)
    y, k = rms_norm_rope(q, q[..., :1, :] if q.shape[-2] else q, None, None, cos, sin, EPS)
    assert k.shape[-1] == q.shape[-1]


def test_other_dtypes_and_no_heads_of_k():
    (q, k, w, _), (cos, sin) = plain_call()
    got = rms_norm_rope(q.half(), k.bfloat16(), w.double(), None, cos, sin, EPS)
    assert [t.dtype for t in got] == [FP16, BF16]
    assert_near(got[0], q.half(), w.double(), cos, sin, FP16)
    assert_near(got[1], k.bfloat16(), None, cos, sin, BF16)
    q_out, k_out = rms_norm_rope(q, k[..., :0, :], w, None, cos, sin, EPS)
    assert k_out.numel() == 0 and same_bits(
        q_out, rms_norm_rope(q, None, w, None, cos, sin, EPS)[0]
    )


def test_no_weight_and_no_pairs_is_the_norm():
    q = heads_of(4, 32)
    cos = torch.empty(TOKENS, 0)
    assert same_bits(
        rms_norm_rope(q, None, None, None, cos, cos, EPS)[0], rms_norm(q, 32, None, EPS)
    )


# ------------------------------------------------------------------------------------ invariance


@pytest.mark.parametrize("kind", ["shared", "own", "across"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_do_not_depend_on_threads_or_batch(threads, dtype, kind):
    q, k = random(2, 300, 8, 64, dtype=dtype), random(2, 300, 2, 64, dtype=dtype)
    cos, sin = angles(300, 32)
    weights = [weight_of(kind, n, 64, FP32) for n in (8, 2)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.clone().requires_grad_() for t in (q, k, *weights)]
        y = rms_norm_rope(*leaves, cos, sin, EPS)
        results.append([*y, *torch.autograd.grad([t.float().sin().sum() for t in y], leaves)])
    assert same(results[0], results[1]) and same(results[0], results[2])
    alone = rms_norm_rope(q[1, 7:8], k[1, 7:8], *weights, cos[7], sin[7], EPS)
    assert same(alone, [t.detach()[1, 7:8] for t in results[0][:2]])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_instruction_sets_agree(dtype):
    (q, k, *weights), (cos, sin) = plain_call(80, dtype)
    by_isa = {}
    for isa, supported in rmsnorm_cuda._C.isas().items():
        if supported and isa not in ("scalar", "fp64"):
            rmsnorm_cuda._C.set_isa(isa)
            by_isa[isa] = rms_norm_rope(q, k, *weights, cos, sin, EPS)
    rmsnorm_cuda._C.set_isa(None)
    first = next(iter(by_isa.values()))
    assert all(same(results, first) for results in by_isa.values())


def test_rows_out_of_range_are_rescued(device):
    """Squares that overflow or vanish in fp32, and what is no number."""
    q = heads_of(4, 64, FP32)
    cos, sin = angles(BATCH, TOKENS, 32)
    for scale in (1e19, 1e-25):
        got, _ = rms_norm_rope(
            (q * scale).to(device), None, None, None, cos.to(device), sin.to(device), 0.0
        )
        want = rms_norm_rope_reference(q * scale, None, cos, sin, 0.0)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6)
    q[0, 0, 0, 3] = math.nan
    got, _ = rms_norm_rope(q.to(device), None, None, None, cos.to(device), sin.to(device), EPS)
    got = got.cpu()
    assert got[0, 0, 0].isnan().all() and not got[0, 0, 1:].isnan().any()


# -------------------------------------------------------------------------------------- gradients


def gradients(function, leaves, upstream):
    results = [t for t in function(*leaves) if t is not None]
    return torch.autograd.grad(results, [t for t in leaves if t is not None], upstream)


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    "dtype, kinds, options, width, interleaved, heads_dim",
    pairs(
        [FP32, BF16, FP16, FP64],
        [("shared", "shared"), ("own", "none"), ("across", "across"), ("none", "own")],
        OPTIONS,
        [8, 64, 128, 256],
        [False, True],
        [-2, -3],
    ),
    ids=name,
)
def test_gradients(device, torch_kernels, dtype, kinds, options, width, interleaved, heads_dim):
    """Against the same function of fp64 tensors, which gradcheck has seen. Terms: a dot product of
    a head, or of a sum over tokens and heads, in fp32, and one rounding."""
    if "across" in kinds and heads_dim == -3:
        torch_kernels(device)
    q, k = (heads_of(n, width, dtype, heads_dim=heads_dim) for n in (Q_HEADS, K_HEADS))
    weights = [weight_of(*of, width, dtype) for of in zip(kinds, (Q_HEADS, K_HEADS))]
    cos, sin = angles(TOKENS, width // 4)
    upstream = [heads_of(n, width, dtype, heads_dim=heads_dim) for n in (Q_HEADS, K_HEADS)]
    how = {"heads_dim": heads_dim, "interleaved": interleaved} | options

    def grads(device, dtype):
        leaves = [
            None if t is None else t.to(dtype).to(device).requires_grad_() for t in (q, k, *weights)
        ]
        c, s = cos.to(device), sin.to(device)
        upward = [t.to(dtype).to(device) for t in upstream]
        return gradients(lambda *t: rms_norm_rope(*t, c, s, EPS, **how), leaves, upward)

    for got, want in zip(grads(device, dtype), grads("cpu", FP64)):
        assert got.dtype == dtype and got.shape == want.shape
        relative = 4 * torch.finfo(dtype).eps
        if options == LLAMA and dtype != FP64:  # weights see what was rounded first
            relative *= 4
        error = (got.cpu().double() - want).abs()
        scale = want.abs().amax()
        assert (error <= relative * want.abs() + (relative + 1e-6) * scale).all()


@pytest.mark.parametrize("kind", ["shared", "own", "across", "none"])
@pytest.mark.parametrize("heads_dim", [-2, -3])
@pytest.mark.parametrize("options", [GEMMA | {"interleaved": True}, {"sections": [2, 1]}], ids=name)
def test_derivatives_of_first_and_second_order(kind, heads_dim, options):
    """Of cos and sin too; of few elements, since each of them is moved."""
    tokens = 2
    by_token = [random(tokens, n, 8, dtype=FP64) for n in (3, 2)]
    q, k = (t if heads_dim == -2 else t.transpose(0, 1).contiguous() for t in by_token)
    q.requires_grad_(), k.requires_grad_()
    weights = [weight_of(kind, n, 8, FP64) for n in (3, 2)]
    axes = (2,) if "sections" in options else ()
    cos, sin = angles(*axes, tokens, 3, dtype=FP64)
    for recorded in ((), (cos, sin)):
        leaves = [t.requires_grad_() for t in (*weights, *recorded) if t is not None]

        def function(q, k, *_):
            return rms_norm_rope(q, k, *weights, cos, sin, EPS, heads_dim=heads_dim, **options)

        assert torch.autograd.gradcheck(function, (q, k, *leaves))
        assert torch.autograd.gradgradcheck(function, (q, k, *leaves))


def test_only_what_is_asked_for_has_a_gradient():
    (q, k, w, v), (cos, sin) = plain_call()
    for wanted in ((q,), (k,), (w,), (v,), (q, v), (k, w)):
        leaves = [t.requires_grad_() for t in wanted]
        results = rms_norm_rope(q, k, w, v, cos, sin, EPS)
        grads = torch.autograd.grad([t.square().sum() for t in results], leaves)
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
        for t in leaves:
            t.requires_grad_(False)
    q.requires_grad_(), k.requires_grad_()
    q_out, k_out = rms_norm_rope(q, k, w, v, cos, sin, EPS)
    (of_q,) = torch.autograd.grad(q_out.sum(), q, retain_graph=True)
    alone = torch.autograd.grad(rms_norm_rope(q, None, w, None, cos, sin, EPS)[0].sum(), q)[0]
    assert same_bits(of_q, alone)
    assert torch.autograd.grad(k_out.sum(), q, allow_unused=True) == (None,)


def test_transforms():
    (q, k, w, v), (cos, sin) = plain_call(8)

    def loss(q, k, w):
        return sum(t.square().sum() for t in rms_norm_rope(q, k, w, v, cos, sin, EPS))

    leaves = [t.clone().requires_grad_() for t in (q, k, w)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got, grad in zip(torch.func.grad(loss, (0, 1, 2))(q, k, w), want):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(loss, (q, k, w), (q, k, w))
    inner = sum((t * g).sum() for t, g in zip((q, k, w), want))
    torch.testing.assert_close(tangent, inner, rtol=1e-3, atol=1e-2)


# ------------------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("heads_dim", [-2, -3])
def test_compiled_without_a_break(heads_dim):
    (q, k, w, v), (cos, sin) = plain_call()
    if heads_dim == -3:
        q, k = q.transpose(1, 2), k.transpose(1, 2)

    def function(q, k, w, v, cos, sin):
        a, b = rms_norm_rope(q * 1, k * 1, w, v, cos, sin, EPS, heads_dim=heads_dim)
        return a, b + 1, rms_norm_rope(q, None, w, None, cos, sin, EPS, heads_dim=heads_dim)[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (TOKENS, 3):
        dim = 1 if heads_dim == -2 else 2
        leaves = [t.narrow(dim, 0, tokens).clone().requires_grad_() for t in (q, k)]
        args = *leaves, w, v, cos[:, :tokens], sin[:, :tokens]
        results, want = compiled(*args), function(*args)
        assert same(results, want)
        grads, wanted = (
            torch.autograd.grad([t.sin().sum() for t in r], leaves) for r in (results, want)
        )
        assert same(grads, wanted)


@pytest.mark.slow
def test_inductor():
    (q, k, w, v), (cos, sin) = plain_call()

    def function(q, k):
        rms_norm_rope_(q, k, w, v, cos, sin, EPS)
        return rms_norm_rope(q, None, w, None, cos, sin, EPS, round_each_step=True)

    want = function(q.clone(), k.clone())
    torch._dynamo.reset()
    q1, k1 = q.clone(), k.clone()
    got = torch.compile(function, fullgraph=True)(q1, k1)
    rms_norm_rope_(q, k, w, v, cos, sin, EPS)
    assert same_bits(got[0], want[0]) and got[1] is None and same((q1, k1), (q, k))


def test_exported_as_one_node():
    (q, k, w, v), (cos, sin) = plain_call()

    class Rotate(torch.nn.Module):
        def forward(self, q, k, cos, sin):
            return rms_norm_rope(q, k, w, v, cos, sin, EPS)

    tokens = torch.export.Dim("tokens")
    dims = ({1: tokens},) * 4
    program = torch.export.export(Rotate(), (q, k, cos, sin), dynamic_shapes=dims)
    nodes = [n.target for n in program.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    assert nodes == [ops.rms_norm_rope.default]
    short = q[:, :3], k[:, :3], cos[:, :3], sin[:, :3]
    assert same(program.module()(*short), Rotate()(*short))
    decomposed = program.run_decompositions(rmsnorm_cuda.decompositions())
    assert not [n for n in decomposed.graph.nodes if "rmsnorm_cuda" in str(n.target)]
    for got, want in zip(decomposed.module()(*short), Rotate()(*short)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------- what is written to


def test_out():
    args, (cos, sin) = plain_call()
    want = rms_norm_rope(*args, cos, sin, EPS)
    out = tuple(torch.full_like(t, math.nan) for t in want)
    assert all(a is b for a, b in zip(rms_norm_rope(*args, cos, sin, EPS, out=out), out))
    assert same(out, want)
    alone = torch.full_like(want[0], math.nan), None
    result = rms_norm_rope(args[0], None, args[2], None, cos, sin, EPS, out=alone)
    assert result == alone and same_bits(alone[0], want[0])
    q, k = args[0].clone(), args[1].clone()
    rms_norm_rope(q, k, *args[2:], cos, sin, EPS, out=(q, k))
    assert same((q, k), want)
    sections = {"sections": [10, 6]}
    cos, sin = torch.stack([cos, sin]), torch.stack([sin, cos])
    want = rms_norm_rope(*args, cos, sin, EPS, **sections)
    assert same(rms_norm_rope(*args, cos, sin, EPS, **sections, out=out), want)


def test_lazy_clones():
    args, (cos, sin) = plain_call()
    want = rms_norm_rope(*args, cos, sin, EPS)
    lazy = [torch._lazy_clone(t) for t in args[:2]]
    before = [t.clone() for t in args[:2]]
    rms_norm_rope_(*lazy, *args[2:], cos, sin, EPS)
    assert same(lazy, want) and same(args[:2], before)


def test_versions_are_counted():
    (q, k, w, v), (cos, sin) = plain_call()
    versions = q._version, k._version
    rms_norm_rope_(q, k, w, v, cos, sin, EPS)
    assert (q._version, k._version) == (versions[0] + 1, versions[1] + 1)


Q, K, W = torch.ones(2, 5, 4, 8), torch.ones(2, 5, 2, 8), torch.ones(8)
C = torch.ones(5, 4)
CACHE = torch.ones(11, 4)
POSITIONS = torch.zeros(5, dtype=torch.int64)
# (arguments that differ, exception, what the message says)
BAD = {
    "D is odd": ({"q": Q[..., :7], "k": None, "q_weight": None, "cos": C[:, :3], "sin": C[:, :3]},
                 RuntimeError, "heads of q with an even number of elements"),
    "R > D": ({"cos": torch.ones(5, 5), "sin": torch.ones(5, 5)}, RuntimeError,
              "at most 4 pairs, half the elements of a head"),
    "too many pairs": ({"q": torch.ones(5, 1, 1024), "k": None, "q_weight": None,
                        "cos": torch.ones(5, 257), "sin": torch.ones(5, 257)}, RuntimeError,
                       "at most 256 pairs"),
    "another count of tokens": ({"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, RuntimeError,
                                "of shape [..., tokens, R/2] that broadcasts to q's [2, 5]"),
    "too many dimensions": ({"cos": torch.ones(1, 2, 5, 4), "sin": torch.ones(1, 2, 5, 4)},
                            RuntimeError, "that broadcasts to q's [2, 5], but got [1, 2, 5, 4]"),
    "sin's shape": ({"sin": torch.ones(4)}, RuntimeError, "expected sin of shape [5, 4]"),
    "sin's dtype": ({"sin": C.double()}, RuntimeError, "expected sin of dtype Float"),
    "cos of integers": ({"cos": C.long(), "sin": C.long()}, NotImplementedError, "expected cos"),
    "no heads": ({"q": Q[0, 0], "k": None, "q_weight": None}, ValueError,
                 "expected q with dimensions of tokens, heads"),
    "k's tokens": ({"k": K[:, :4]}, RuntimeError, "expected k of q's shape"),
    "k's dimensions": ({"k": K[0]}, RuntimeError, "expected k of q's shape"),
    "k's width": ({"k": torch.ones(2, 5, 2, 6), "k_weight": None}, RuntimeError,
                  "expected k of q's shape"),
    "a weight too long": ({"q_weight": torch.ones(9)}, RuntimeError,
                          "[8], of each head its own [4, 8], or across heads [32]"),
    "a weight of too many heads": ({"k_weight": torch.ones(4, 8)}, RuntimeError,
                                   "k_weight of shape [8], of each head its own [2, 8]"),
    "a weight of integers": ({"q_weight": W.long()}, NotImplementedError, "expected q_weight"),
    "q of integers": ({"q": Q.long()}, NotImplementedError, "expected q to be"),
    "a weight of no k": ({"k": None, "k_weight": W}, RuntimeError, "expected k to be given too"),
    "heads_dim": ({"heads_dim": -1}, ValueError, "heads_dim to be -2 or -3, but got -1"),
    "eps": ({"eps": -1.0}, ValueError, "eps to be finite and not negative"),
    "weight_offset": ({"weight_offset": math.inf}, ValueError, "weight_offset to be finite"),
    "positions of floats": ({"cos": CACHE, "sin": CACHE, "positions": POSITIONS.float()},
                            RuntimeError, "positions of dtype int64 or int32"),
    "positions of another shape": ({"cos": CACHE, "sin": CACHE, "positions": POSITIONS[:4]},
                                   RuntimeError, "positions of shape [..., tokens]"),
    "no cache": ({"cos": torch.ones(2, 5, 4), "sin": torch.ones(2, 5, 4), "positions": POSITIONS},
                 RuntimeError, "a cache of shape [max_position, R/2]"),
    "sections that add up to another number": (
        {"cos": torch.ones(2, 5, 4), "sin": torch.ones(2, 5, 4), "sections": [1, 2]},
        ValueError, "sections that add up to the 4 pairs"),
    "sections below 0": (
        {"cos": torch.ones(2, 5, 4), "sin": torch.ones(2, 5, 4), "sections": [5, -1]},
        ValueError, "sections that are not negative"),
    "interleaved sections that are not given": ({"interleaved_sections": True}, ValueError,
                                                "expected these to be given too"),
    "interleaved sections that do not fit": (
        {"cos": torch.ones(2, 5, 4), "sin": torch.ones(2, 5, 4), "sections": [1, 3],
         "interleaved_sections": True}, ValueError, "that of axis 1 in [1, 3] is 5"),
    "no sections": ({"sections": []}, ValueError, "sections of one axis at least"),
    "another count of axes": (
        {"cos": torch.ones(3, 5, 4), "sin": torch.ones(3, 5, 4), "sections": [2, 2]},
        RuntimeError, "a first dimension of the 2 axes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_errors(what):
    given, error, message = BAD[what]
    args = {"q": Q, "k": K, "q_weight": W, "k_weight": W, "cos": C, "sin": C}
    if "k" in given and given["k"] is None:
        args["k_weight"] = None
    args |= given
    q, k = args["q"].clone(), None if args["k"] is None else args["k"].clone()
    for function in (rms_norm_rope, rms_norm_rope_):
        with pytest.raises(error, match=re.escape(message)):
            function(**args)
    assert torch.equal(args["q"], q) and (k is None or torch.equal(args["k"], k))
    refused_alike_while_tracing(rms_norm_rope, **args)


@pytest.mark.parametrize("position", [-1, 11, 1 << 40])
def test_positions_out_of_range(position):
    positions = torch.tensor([0, 10, position, 3, 4])
    q = Q.clone()
    for function in (rms_norm_rope, rms_norm_rope_):
        with pytest.raises(IndexError, match=f"positions from 0 to 10, .* but got {position}"):
            function(q, K, W, W, CACHE, CACHE, positions=positions)
    assert torch.equal(q, Q)


BUFFER = torch.ones(2, 5, 6, 8)
BAD_OUT = {
    "q and k share memory": ((BUFFER[..., :4, :], BUFFER[..., 3:5, :]), "q and k share memory"),
    "heads that overlap": ((torch.ones(5, 1, 8).expand(2, 5, 4, 8), K), "rows that do not overlap"),
    "heads that are not dense": ((torch.ones(2, 5, 4, 16)[..., ::2], K), "with dense rows"),
}


@pytest.mark.parametrize("what", BAD_OUT)
def test_refused_in_place(what):
    (q, k), message = BAD_OUT[what]
    before = q.clone(), k.clone()
    with pytest.raises(RuntimeError, match=message):
        rms_norm_rope_(q, k, W, W, C, C)
    assert same((q, k), before)


def test_refused_out():
    def refused(error, message, out, **options):
        with pytest.raises(error, match=message):
            rms_norm_rope(Q, K, W, W, C, C, out=out, **options)

    q, k = torch.empty_like(Q), torch.empty_like(K)
    refused(RuntimeError, "q_out of shape", (q[:1], k))
    refused(RuntimeError, "k_out of dtype Float", (q, k.half()))
    refused(RuntimeError, "k_out of shape", (q, torch.empty(0)))
    refused(ValueError, "out to hold 2 tensors, but got 1", (q,))
    refused(TypeError, "out to be a tuple of 2 tensors", q)
    refused(RuntimeError, "q_out and k_out share memory", (BUFFER[..., :4, :], BUFFER[..., 3:5, :]))
    both = torch.ones(3, 5, 4, 8)
    with pytest.raises(RuntimeError, match="q_out partly overlaps q"):
        rms_norm_rope(both[:2], K, W, W, C, C, out=(both[1:], k))
    weight = torch.ones(2, 5, 4, 8)
    with pytest.raises(RuntimeError, match="q_out and q_weight share memory"):
        rms_norm_rope(Q, K, weight[0, 0, 0], W, C, C, out=(weight, k))
    with pytest.raises(RuntimeError, match="cannot take the place of q"):
        rms_norm_rope_(Q.half(), K.half(), W, W, C, C, **LLAMA)
    leaf = Q.clone().requires_grad_()
    for call in (
        lambda: rms_norm_rope(leaf, K, W, W, C, C, out=(q, k)),
        lambda: rms_norm_rope_(leaf, K.clone(), W, W, C, C),
    ):
        with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
            call()


KINDS = {
    "q": (lambda: rms_norm_rope([1.0], K, W, W, C, C), "expected q to be a Tensor, but got list"),
    "k": (
        lambda: rms_norm_rope(Q, 3, W, W, C, C),
        "expected k to be a Tensor or None, but got int",
    ),
    "heads_dim": (lambda: rms_norm_rope(Q, K, W, W, C, C, heads_dim="a"), "heads_dim to be an int"),
    "sections": (
        lambda: rms_norm_rope(Q, K, W, W, C, C, sections="ab"),
        "sections to be an int or",
    ),
    "interleaved": (
        lambda: rms_norm_rope_(Q, K, W, W, C, C, interleaved=1),
        "interleaved to be a bool",
    ),
}


@pytest.mark.parametrize("what", KINDS)
def test_wrong_kinds(what):
    call, message = KINDS[what]
    with pytest.raises(TypeError, match=message):
        call()


def test_devices_and_freed_memory():
    with pytest.raises(RuntimeError, match="but q is on cpu and cos is on meta"):
        rms_norm_rope(Q, K, W, W, C.to("meta"), C)
    freed = Q.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected q to have memory"):
        rms_norm_rope(freed, K, W, W, C, C)
