"""What the tests share: dtypes, options, lengths, hard rows, the formula, the tolerances, and
modules that stand in for libraries.
"""

import contextlib
import itertools
import math
import sys
import types

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rmsnorm_cuda.reference import (
    default_eps,
    rms_norm_backward_reference,
    rms_norm_reference,
    round_once,
    ulp_distance,
)

ops = torch.ops.rmsnorm_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHT_DTYPES = [*DTYPES, None]  # None: no weight
GEMMA, LLAMA = {"weight_offset": 1.0}, {"cast_before_weight": True}
OPTIONS = [{}, GEMMA, LLAMA]

# Of a model of transformers that is built in no time.
TINY = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=128,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

# Around: a vector of AVX2, of AVX-512, of 16-bit types; the 64 lanes that a row is summed in, and
# head sizes; the fold of the lanes into double; a tile of the backward, from which on fewer rows
# are a group; sizes of models; more than a tile of weights (8192), with a tail.
LENGTHS = [
    *(1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33),
    *(63, 64, 65, 127, 128, 129),
    *(255, 256, 257, 576),
    *(1023, 1024, 1025),
    *(4095, 4096, 4097),
    *(8193, 20000),
]
# One row, and around the groups that short rows are done in: 4 (AVX2, scalar), 8 (AVX-512), 16 (the
# backward of more than 1024 columns). 19: several of them, and a rest.
ROWS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19]
# The same kinds of boundary for the CUDA kernels (16-byte accesses, a warp, a block), few enough
# for a simulator.
CUDA_LENGTHS = [1, 7, 33, 128, 1000, 4097]


def lengths(device):
    return CUDA_LENGTHS if device == "cuda" else LENGTHS


def pairs(*axes):
    """Few combinations of a value of each axis, in which any two values of two axes meet.

    All combinations of the kernels' dtypes and options are in native/cpu_check.cpp.
    """
    every = list(itertools.product(*map(range, map(len, axes))))
    meetings = [set(itertools.combinations(enumerate(places), 2)) for places in every]
    missing, chosen = set().union(*meetings), []
    while missing:
        best = max(range(len(every)), key=lambda i: len(meetings[i] & missing))
        missing -= meetings[best]
        chosen.append(tuple(axis[place] for axis, place in zip(axes, every[best])))
    return chosen


def name(value):
    """Test ids: float32-bfloat16-cast_before_weight instead of input_dtype0-..."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return "-".join(value) or "default"
    if isinstance(value, tuple) and all(isinstance(v, torch.dtype) for v in value):
        return "+".join(map(name, value))
    return None


def random(*shape, dtype=torch.float32, device="cpu", mean=0.0):
    """Normal values, made on the CPU: a simulated GPU has none of torch's kernels."""
    return (torch.randn(*shape, dtype=torch.float64) + mean).to(dtype).to(device)


def random_weight(shape, dtype, device="cpu"):
    if dtype is None:
        return None
    return random(
        *((shape,) if isinstance(shape, int) else shape), dtype=dtype, device=device, mean=1.0
    )


def same_bits(a, b):
    """Equal in dtype, shape and every bit; NaNs are equal to each other."""
    a, b = a.cpu(), b.cpu()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b))
    )


class Calls(TorchDispatchMode):
    """`with Calls() as calls`: calls.ours are this package's ops that ran on something, below
    autograd.
    """

    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += [func] if func.namespace == "rmsnorm_cuda" and args[0].numel() else []
        return func(*args, **(kwargs or {}))


def formula(
    x, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, cast_before_weight=False
):
    """RMSNorm in differentiable ATen ops: what derivatives of any order are compared with."""
    dims = tuple(range(-len(normalized_shape), 0))
    xhat = x * torch.rsqrt(
        (x * x).mean(dims, keepdim=True) + (default_eps(x) if eps is None else eps)
    )
    return xhat if weight is None else xhat * (weight + weight_offset)


def result_dtype(x, weight, options):
    if options.get("cast_before_weight") and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def assert_forward(y, x, normalized_shape, weight, eps, options, rounds_to=None):
    """`y` is RMSNorm of x and weight (on the CPU), within 1 ulp of the fp64 reference rounded once.

    1 ulp: sum and product are formed so much better than the output's type that only a near-tie
    falls the other way. 8 where the output is fp64: reference and kernel both make a handful of
    roundings of the type they are judged in. cast_before_weight: where the first rounding is a
    near-tie, an ulp of x's dtype more, times the weight. rounds_to: the dtype that x, a sum in
    fp32, was not rounded to.
    """
    dtype = rounds_to or x.dtype
    want = rms_norm_reference(x, normalized_shape, weight, eps, **options, rounds_to=dtype)
    y = y.cpu()
    of_dtype = torch.empty(0, dtype=dtype)
    assert y.dtype == result_dtype(of_dtype, weight, options) and y.shape == x.shape
    distance = ulp_distance(y, want)
    good = distance <= (8 if y.dtype == torch.float64 else 1)
    if y.element_size() == 2 and y.numel() >= 1000:  # 1 in 1000 is a near-tie, in fp16
        assert (distance > 0).float().mean() < 0.01, "it is not rounded to the nearest"
    if options.get("cast_before_weight"):
        xhat = rms_norm_reference(
            x.double(), normalized_shape, None, default_eps(x) if eps is None else eps
        )
        near_tie = round_once(xhat * (1 - 2.0**-22), dtype) != round_once(
            xhat * (1 + 2.0**-22), dtype
        )
        ulp = torch.finfo(dtype).eps * want.double().abs() + torch.finfo(dtype).smallest_normal
        good |= near_tie & (
            (y.double() - want.double()).abs()
            <= ulp + torch.finfo(y.dtype).eps * want.double().abs()
        )
    assert good.all(), (
        f"{(~good).sum()} of {good.numel()} off, by {ulp_distance(y, want)[~good].max()} ulps"
    )


def assert_near(got, want, tolerance):
    """|got - want| <= tolerance, or got is `want` rounded once (which settles Inf, NaN and
    denormals).
    """
    got, rounded = got.cpu(), round_once(want, got.dtype)
    good = (got.double() - want).abs() <= tolerance
    good |= (got == rounded) | (got.isnan() & rounded.isnan())
    assert good.all(), (
        f"{(~good).sum()} of {good.numel()} off, by up to "
        f"{(got.double() - want).abs()[~good].max()}"
    )


def assert_backward(dx, dweight, dy, x, normalized_shape, weight, eps, options):
    """dx and dweight (None: not wanted) are the gradients of RMSNorm; dy, x and weight are on the
    CPU.

    With u = eps / 2 of the type computed in, dx = rstd * (g - xhat * c), c = mean(g * xhat) and M =
    mean|g * xhat|: g, the subtraction, the last product and rstd bring one u of rstd * |g| each: 4
    u. The other term brings as much, and the error of c, all of it of M: 3 u of its factors and one
    u for each addition that a term goes through, some 20 in the longest of the trees. Then dx is
    rounded once: 1 ulp, which is at most eps of its dtype times |dx|. dweight: a term dy * xhat
    brings 3 u and is added in fp32 in blocks of at most 256 rows. Roundings of a sum of random
    signs grow as the square root of the number of terms, and so does the sum: some u of S = sum|dy
    * xhat|. cast_before_weight: where x * rstd is near a tie, it may fall the other way by an ulp
    of x's dtype; one such term a column is allowed for.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    lead = tuple(range(x.dim() - len(normalized_shape)))
    dtypes = [
        t.dtype for t in (x, weight) if t is not None
    ]  # weight + offset is in fp32 or not whatever dy is
    eps_compute = torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32).eps
    want_dx, want_dweight = rms_norm_backward_reference(
        dy, x, normalized_shape, weight, eps, **options
    )
    x64, dy64 = x.double(), dy.double()
    rstd = ((x64 * x64).mean(dims, keepdim=True) + (default_eps(x) if eps is None else eps)).rsqrt()
    if dx is not None:
        assert dx.dtype == x.dtype and dx.shape == x.shape
        g = dy64 if weight is None else dy64 * (weight.double() + options.get("weight_offset", 0.0))
        xhat = x64 * rstd
        mean = (g * xhat).abs().mean(dims, keepdim=True)
        tolerance = eps_compute * rstd * (2 * g.abs() + 14 * xhat.abs() * mean)
        assert_near(dx, want_dx, tolerance + torch.finfo(dx.dtype).eps * want_dx.abs())
    if dweight is not None:
        assert dweight.dtype == weight.dtype and dweight.shape == weight.shape
        terms = (dy64 * x64 * rstd).abs()
        tolerance = torch.finfo(
            dweight.dtype
        ).eps * want_dweight.abs() + 4 * eps_compute * terms.sum(lead)
        if options.get("cast_before_weight"):
            tolerance += torch.finfo(x.dtype).eps * (terms.amax(lead) if lead else terms)
        assert_near(dweight, want_dweight, tolerance)


def hard_rows(cols, dtype):
    """{kind: row}: rows that a plain fp32 kernel gets wrong."""
    info = torch.finfo(dtype)
    row = random(cols).double().clamp(-3, 3)
    scaled = {
        "plain": 1.0,
        # fp32 and bf16: squares overflow fp32. fp16: squares overflow fp16. fp64: its own range is
        # test_fp64_range.
        "huge": 1e19 if info.max > 1e5 else info.max / 4,
        "largest": info.max / 4 if info.max < 1e300 else 1e150,
        "tiny": 1e-25 if info.tiny < 1e-25 else info.tiny,  # squares underflow fp32
        "denormal": info.tiny / 4 if info.tiny > 1e-300 else 1e-150,
        "zero": 0.0,
    }
    rows = {kind: (row * scale).to(dtype) for kind, scale in scaled.items()}
    for kind, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        rows[kind] = row.to(dtype)
        rows[kind][cols // 2] = value
    # Between broken rows an ordinary one: it must not notice.
    rows["plain again"] = row.flip(0).to(dtype)
    return rows


def refused_alike_while_tracing(function, *args, **options):
    """A compiler's fake tensors are refused by the same words, and kind of exception."""
    tensors = [t for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor)]
    if len({t.device for t in tensors}) > 1:
        return  # which FakeTensor itself refuses, before it asks the op
    told = []
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=False)):
        of = (args, options)
        if isinstance(mode, FakeTensorMode):
            of = tree_map_only(torch.Tensor, mode.from_tensor, of)
        with mode:
            try:
                function(*of[0], **of[1])
            except Exception as error:
                # FakeTensor takes NotImplementedError of a Meta kernel for "there is none".
                kind = RuntimeError if type(error) is NotImplementedError else type(error)
                told.append((kind, str(error).replace("FakeTensor", "Tensor")))
            else:
                told.append(None)
    assert told[0] == told[1] and told[0] is not None


def close(got, want, ulps):
    """Within so many ulp, and in 16 bits the same but for near-ties of a rounding."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert ulp_distance(got, want).max() <= ulps
    if got.dtype != torch.float32:
        assert (got == want).float().mean() > 0.99


def stub_modules(monkeypatch, modules):
    """{name: contents} in sys.modules, with the packages that they lie in."""
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(
                sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end]))
            )
        vars(sys.modules[name]).update(contents)
