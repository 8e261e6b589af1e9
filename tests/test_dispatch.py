"""The op in torch's machinery: opcheck, fakes, meta, overrides, autocast, profiler, fork."""

import programs
import pytest
import torch
from cases import GEMMA, LLAMA, Calls, ops, random, random_weight, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from rmsnorm_cuda import rms_norm


def rstd_of(x, normalized_shape, weight=None, eps=None, **options):
    return ops.rms_norm_forward(x.detach(), normalized_shape, weight, eps, **options)[1]


def leaf(t):
    return t.requires_grad_()


def forward_samples():
    yield (random(3, 8), (8,)), {}
    yield (leaf(random(3, 8)), (8,), leaf(random_weight(8, torch.float32)), 1e-5), {}
    yield (random(3, 8), (8,), leaf(random_weight(8, torch.float32))), GEMMA
    promoted = (
        leaf(random(2, 3, 4, dtype=torch.bfloat16)),
        (3, 4),
        random_weight((3, 4), torch.float32),
        1e-5,
    )
    yield promoted, LLAMA
    yield (random(3, 16)[:, :8], (8,), random_weight(8, torch.float16)), {}  # sliced
    yield (leaf(random(3, 8, dtype=torch.float64)), (8,)), LLAMA
    yield (torch.empty(0, 8), (8,)), {}


def backward_samples():
    for mask in ((True, True), (True, False), (False, True)):
        x, weight = random(3, 8), random_weight(8, torch.float32)
        yield (random(3, 8), x, (8,), weight, rstd_of(x, (8,)), None, mask), {}
    x, shape = random(2, 3, 4, dtype=torch.bfloat16), (3, 4)
    weight = random_weight(shape, torch.float32)
    yield (random(2, 3, 4), x, shape, weight, rstd_of(x, shape), None, (True, True)), LLAMA
    x = random(3, 8)
    yield (random(8).expand(3, 8), x, (8,), None, rstd_of(x, (8,)), None, (True, False)), {}
    x = random(3, 8, dtype=torch.bfloat16)
    other = random(3, 8, dtype=torch.bfloat16)
    yield (
        (
            random(3, 8),
            x,
            (8,),
            random_weight(8, torch.float32),
            rstd_of(x, (8,)),
            None,
            (True, True),
            other,
        ),
        {},
    )
    x = random(3, 8, dtype=torch.float64)
    weight = leaf(random_weight(8, torch.float64))
    yield (
        (
            leaf(random(3, 8, dtype=torch.float64)),
            leaf(x),
            (8,),
            weight,
            rstd_of(x, (8,)),
            None,
            (True, True),
        ),
        GEMMA,
    )


def out_samples():
    for dtype, weight_dtype, options in (
        (torch.float32, torch.float32, {}),
        (torch.bfloat16, torch.float32, LLAMA),
    ):
        out = torch.zeros(3, 8, dtype=torch.float32)
        yield (
            (random(3, 8, dtype=dtype), (8,), random_weight(8, weight_dtype)),
            options | {"out": out},
        )


def fused_samples():
    for dtype, residual_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        x, residual = random(4, 32, dtype=dtype), random(4, 32, dtype=residual_dtype)
        weight = random_weight(32, torch.float32)
        yield (x, residual, weight, 1e-6), {}
        yield (x, residual), GEMMA
        yield (x, residual, weight), LLAMA
        yield (x, residual.to(dtype), weight, 1e-6), {"round_sum": False}
    yield (
        (leaf(random(4, 32)), leaf(random(4, 32)), leaf(random_weight(32, torch.float32)), 1e-6),
        {},
    )


def in_place_samples():
    for residual_dtype in (torch.bfloat16, torch.float32):
        yield (
            (
                random(4, 32, dtype=torch.bfloat16),
                random(4, 32, dtype=residual_dtype),
                random_weight(32, torch.float32),
            ),
            GEMMA | {"round_sum": residual_dtype == torch.float32},
        )


def norm_add_samples():
    return (sample for sample in fused_samples() if "round_sum" not in sample[1])


def sandwich_samples():
    for (x, residual, *rest), options in norm_add_samples():
        weight, eps = *rest, *(None,) * (2 - len(rest))
        yield (x, residual, None, weight, eps), {"scale": 0.5} | options
    x, residual, weight = random(4, 32), random(4, 32), random_weight(32, torch.float32)
    leaves = [leaf(t) for t in (x, residual, weight, weight.clone())]
    yield (*leaves, 1e-6), {"scale": 0.5} | GEMMA
    yield (x.detach(), residual.detach(), *leaves[2:]), {}
    narrow = [t.detach().bfloat16() for t in leaves]
    yield (narrow[0], narrow[1], narrow[2], leaves[3].detach()), {}


def quant_samples(*more):
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, LLAMA | {"keep_norm": True})):
        options = options | ({"round_sum": False} if more else {})
        tensors = [random(4, 128, dtype=dtype) for _ in range(1 + len(more))]
        for format, kind in (
            (torch.float8_e4m3fn, {}),
            (torch.int8, {"block": 64, "column_major": True, "scale_ub": 1.0}),
        ):
            yield (
                (*tensors, random_weight(128, torch.float32), None, 1e-6),
                {"dtype": format} | kind | options,
            )
        yield (*tensors, None, torch.tensor([0.1])), {"dtype": torch.float8_e5m2} | options


GATE_FIRST = {"norm_before_gate": False, "group_size": 4}


def gated_samples():
    x, gate, weight = random(3, 8), random(3, 16)[:, 8:], random_weight(8, torch.float32)
    yield (x, gate, weight, 1e-5), {}
    leaves = [leaf(t.clone()) for t in (x, gate, weight)]
    yield leaves, {"activation": "sigmoid"} | GEMMA
    yield leaves, GATE_FIRST
    yield (x.bfloat16(), gate.bfloat16(), weight), GATE_FIRST | LLAMA
    yield (leaf(x.bfloat16()), None, leaf(weight.clone())), {"group_size": 2} | LLAMA
    yield (leaf(x.double()), gate), {}


def gated_quant_samples():
    x, gate, weight = random(4, 128), random(4, 256)[:, 128:], random_weight(128, torch.float32)
    yield (x, gate, weight, None, 1e-6), {"dtype": torch.float8_e4m3fn, "keep_norm": True} | GEMMA
    yield (x, gate, weight, torch.tensor([0.1])), {"dtype": torch.int8, "activation": "sigmoid"}
    narrow = x.bfloat16(), gate.bfloat16(), weight
    blocks = {"dtype": torch.int8, "block": 64, "column_major": True, "scale_ub": 1.0}
    yield narrow, blocks | GATE_FIRST | LLAMA
    yield (x, None), {"dtype": torch.float8_e5m2, "group_size": 32}


def gated_backward_samples():
    for (*tensors, eps), options in (
        ((*args, *(None,) * (4 - len(args))), options) for args, options in gated_samples()
    ):
        x, gate, weight = (t if t is None else t.detach() for t in tensors)
        y, rstd = ops.rms_norm_gated_forward(x, gate, weight, eps, **options)
        dy = random(*y.shape, dtype=y.dtype)
        for mask in ((True,) * 3, (False, True, False), (True, False, True)):
            yield (dy, x, gate, weight, rstd, eps, mask), options
        yield (leaf(dy), leaf(x.clone()), gate, weight, rstd, eps, (True,) * 3), options


def rope_samples():
    cos, sin = random(5, 4).cos(), random(5, 4).sin()
    q, k = random(2, 5, 3, 8), random(2, 5, 2, 8)
    weights = random_weight(8, torch.float32), random_weight((2, 8), torch.float32)
    yield (q, k, *weights, cos, sin), {}
    yield (leaf(q.clone()), leaf(k.clone()), *(leaf(w.clone()) for w in weights), cos, sin), GEMMA
    across = random_weight(24, torch.bfloat16)
    first = q.bfloat16().transpose(1, 2), None, across, None, cos, sin, None, 1e-5
    yield first, {"heads_dim": -3, "interleaved": True, "round_each_step": True}
    positions = torch.randint(0, 5, (2, 2, 5))
    leaves = leaf(q.clone()), leaf(k.bfloat16()), leaf(weights[0].clone()), None
    yield (*leaves, cos, sin, positions, 1e-5), {"sections": [3, 1]} | LLAMA


def rope_backward_samples():
    for (q, k, q_weight, k_weight, cos, sin, *rest), options in rope_samples():
        positions, eps = rest or (None, None)
        tensors = [
            t if t is None else t.detach() for t in (q, k, q_weight, k_weight, cos, sin, positions)
        ]
        *y, q_rstd, k_rstd = ops.rms_norm_rope_forward(*tensors, eps, **options)
        grads = [random(*t.shape, dtype=t.dtype) if t.numel() else None for t in y]
        for mask in ((True,) * 4, (False, True, True, False)):
            yield (*grads, *tensors, q_rstd, k_rstd, eps, mask), options
    yield (None, grads[1], *tensors, q_rstd, k_rstd, eps, (True,) * 4), options


def without_grad(samples):
    for args, options in samples:
        yield tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), options


def with_out(op, samples, names):
    """The same with what `op` returns, to be written to; int8 only, since opcheck multiplies what
    an op may write.
    """

    def of(results):
        return (results,) if isinstance(results, torch.Tensor) else results

    for args, options in samples:
        if "dtype" in options:
            options |= {"dtype": torch.int8}
        yield (
            args,
            options
            | dict(
                zip(names, (torch.zeros_like(t) for t in of(op(*args, **options))), strict=True)
            ),
        )


QUANT_OUT = ("out", "scale_out", "norm_out")
FUSED_QUANT_OUT = ("out", "scale_out", "residual_out", "norm_out")

DIFFERENTIABLE = {
    "rms_norm": forward_samples,
    "rms_norm_forward": forward_samples,
    "rms_norm_backward": backward_samples,
    "fused_add_rms_norm": fused_samples,
    "fused_add_rms_norm_forward": fused_samples,
    "rms_norm_add": norm_add_samples,
    "rms_norm_add_forward": norm_add_samples,
    "rms_norm_add_rms_norm": sandwich_samples,
    "rms_norm_add_rms_norm_forward": sandwich_samples,
    "rms_norm_gated": gated_samples,
    "rms_norm_gated_forward": gated_samples,
    "rms_norm_gated_backward": gated_backward_samples,
    "rms_norm_rope": rope_samples,
    "rms_norm_rope_forward": rope_samples,
    "rms_norm_rope_backward": rope_backward_samples,
}
SAMPLES = [
    *(
        (getattr(ops, op).default, sample)
        for op, samples in DIFFERENTIABLE.items()
        for sample in samples()
    ),
    *(
        (getattr(ops, f"{op}_formula").default, sample)
        for op, samples in DIFFERENTIABLE.items()
        for sample in list(samples())[1::3]
    ),
    *((ops.rms_norm.out, sample) for sample in out_samples()),
    *((ops.fused_add_rms_norm_.default, sample) for sample in in_place_samples()),
    *(
        (ops.fused_add_rms_norm.out, sample)
        for sample in with_out(
            ops.fused_add_rms_norm, list(fused_samples())[:-1], ("out", "residual_out")
        )
    ),
    *(
        (ops.rms_norm_add.out, sample)
        for sample in with_out(ops.rms_norm_add, without_grad(norm_add_samples()), ("out",))
    ),
    *(
        (ops.rms_norm_add_rms_norm_.default, sample)
        for sample in list(without_grad(sandwich_samples()))[-3:]
    ),
    *(
        (ops.rms_norm_add_rms_norm.out, sample)
        for sample in with_out(
            ops.rms_norm_add_rms_norm, without_grad(sandwich_samples()), ("out", "residual_out")
        )
    ),
    *(
        (ops.rms_norm_gated.out, sample)
        for sample in with_out(ops.rms_norm_gated, without_grad(gated_samples()), ("out",))
    ),
    *((ops.rms_norm_gated_quant.default, sample) for sample in gated_quant_samples()),
    *(
        (ops.rms_norm_gated_quant.out, sample)
        for sample in with_out(ops.rms_norm_gated_quant, gated_quant_samples(), QUANT_OUT)
    ),
    *((ops.rms_norm_rope_.default, sample) for sample in list(without_grad(rope_samples()))[:2]),
    *(
        (ops.rms_norm_rope.out, sample)
        for sample in with_out(ops.rms_norm_rope, without_grad(rope_samples()), ("q_out", "k_out"))
    ),
    *((ops.rms_norm_quant.default, sample) for sample in quant_samples()),
    *(
        (ops.rms_norm_quant.out, sample)
        for sample in with_out(ops.rms_norm_quant, quant_samples(), QUANT_OUT)
    ),
    *((ops.fused_add_rms_norm_quant.default, sample) for sample in quant_samples("residual")),
    *(
        (ops.fused_add_rms_norm_quant.out, sample)
        for sample in with_out(
            ops.fused_add_rms_norm_quant, quant_samples("residual"), FUSED_QUANT_OUT
        )
    ),
]


@pytest.mark.parametrize(
    "op, sample", SAMPLES, ids=[f"{op}-{i}" for i, (op, _) in enumerate(SAMPLES)]
)
def test_opcheck(op, sample):
    torch.library.opcheck(op, *sample)


X, W = torch.empty(3, 8), torch.empty(8)
BAD_ON_META = {
    "input's dtype": (ops.rms_norm.default, (X.long(), [8]), {}, RuntimeError),
    "weight's dtype": (ops.rms_norm.default, (X, [8], W.int()), {}, RuntimeError),
    "eps": (ops.rms_norm.default, (X, [8], W, -1.0), {}, ValueError),
    "nan eps": (ops.fused_add_rms_norm.default, (X, X, W, float("nan")), {}, ValueError),
    "offset": (
        ops.rms_norm_quant.default,
        (X, W),
        {"dtype": torch.int8, "weight_offset": float("inf")},
        ValueError,
    ),
    "scale_ub": (
        ops.rms_norm_quant.default,
        (X, W),
        {"dtype": torch.int8, "scale_ub": 0.0},
        ValueError,
    ),
    "grad_output": (
        ops.rms_norm_backward.default,
        (X[:2], X, [8], W, X[:, 0], None, (True, True)),
        {},
        RuntimeError,
    ),
    "rstd": (
        ops.rms_norm_backward.default,
        (X, X, [8], W, X[0], None, (True, True)),
        {},
        RuntimeError,
    ),
    "grad_residual": (
        ops.rms_norm_backward.default,
        (X, X, [8], W, X[:, 0], None, (True, True), X[:1]),
        {},
        RuntimeError,
    ),
}


@pytest.mark.parametrize("what", BAD_ON_META)
def test_fakes_refuse_what_the_ops_refuse(what):
    op, args, options, error = BAD_ON_META[what]
    for device in ("cpu", "meta"):
        with pytest.raises(error):
            op(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args), **options)


def test_every_op_is_checked():
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rmsnorm_cuda::")
    }
    assert names == {op._name.removesuffix(".default") for op, _ in SAMPLES}


# ---------------------------------------------------------------- without data


def test_meta():
    x, weight = (
        torch.empty(3, 8, dtype=torch.bfloat16, device="meta"),
        torch.empty(8, device="meta"),
    )
    y = rms_norm(x, 8, weight)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 8), torch.bfloat16)
    assert rms_norm(x, 8, weight, cast_before_weight=True).dtype == torch.float32
    y, rstd = ops.rms_norm_forward(x, (8,), weight)
    assert (y.dtype, rstd.shape, rstd.dtype) == (torch.bfloat16, (3,), torch.float32)
    leaf(x), leaf(weight)
    rms_norm(x, 8, weight).backward(torch.empty_like(x))
    assert (x.grad.dtype, weight.grad.dtype, weight.grad.shape) == (
        torch.bfloat16,
        torch.float32,
        (8,),
    )


def test_fakes_say_what_the_kernels_return():
    """Shape, dtype, strides and absence of every result, for samples of every op."""
    for op, (args, options) in SAMPLES:
        real = op(*args, **options)
        with FakeTensorMode() as mode:

            def fake(value):
                return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

            pretended = op(*map(fake, args), **{key: fake(value) for key, value in options.items()})
        for a, b in zip(
            *(r if isinstance(r, tuple) else (r,) for r in (real, pretended)), strict=True
        ):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                assert a.requires_grad == b.requires_grad


def op_nodes(graph):
    return [
        node.target
        for node in graph.nodes
        if node.op == "call_function" and "rmsnorm_cuda" in str(node.target)
    ]


def test_one_node_per_norm():
    x, weight = random(3, 8), random_weight(8, torch.float32)
    for shape in (lambda x: 8, lambda x: x.shape[-1]):  # the latter is symbolic there
        norm = lambda x, w: rms_norm(x, shape(x), w)  # noqa: E731
        traced = make_fx(norm, tracing_mode="symbolic")(x, weight)
        assert op_nodes(traced.graph) == [ops.rms_norm.default]
        assert same_bits(traced(x, weight), rms_norm(x, 8, weight))

    def step(x, w, dy):
        y = rms_norm(x, 8, w)
        return torch.autograd.grad(y, [x, w], dy)

    traced = make_fx(step)(leaf(x), leaf(weight), random(3, 8))
    assert op_nodes(traced.graph) == [ops.rms_norm_forward.default, ops.rms_norm_backward.default]


# ---------------------------------------------------------------- overrides


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, len(args), sorted(kwargs or {})))
        return func(*args, **(kwargs or {}))


def test_torch_function_mode():
    """The override is handed the public function, with arguments that it takes: calling it again
    works.
    """
    x, weight = random(3, 8), random_weight(8, torch.float32)
    with Recorder() as mode:
        y = rms_norm(x, 8, weight, 1e-5, weight_offset=1.0)
    assert [call[0] for call in mode.calls] == [rms_norm]
    assert same_bits(y, rms_norm(x, 8, weight, 1e-5, weight_offset=1.0))


class Tagged(torch.Tensor):
    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "weight", "out"])
def test_torch_function_subclass(which):
    tensors = {
        "input": random(3, 8),
        "weight": random_weight(8, torch.float32),
        "out": torch.zeros(3, 8),
    }
    want = rms_norm(tensors["input"], 8, tensors["weight"])
    tensors[which] = tensors[which].as_subclass(Tagged)
    Tagged.seen.clear()
    y = rms_norm(tensors["input"], 8, tensors["weight"], out=tensors["out"])
    assert rms_norm in Tagged.seen
    assert same_bits(y.as_subclass(torch.Tensor), want)


def test_subclass_that_declines():
    class Declines(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    with pytest.raises(TypeError, match="rmsnorm_cuda.functional.rms_norm"):
        rms_norm(random(3, 8).as_subclass(Declines), 8)


def test_dispatch_mode_sees_the_op():
    x = leaf(random(3, 8))
    with Calls() as calls:
        rms_norm(x.detach(), 8)
        rms_norm(x, 8).backward(torch.ones(3, 8))
    assert calls.ours == [
        ops.rms_norm.default,
        ops.rms_norm_forward.default,
        ops.rms_norm_backward.default,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_inputs_alone(dtype):
    """Every dtype is computed in fp32 anyway: autocast has nothing to add, and takes no precision
    away.
    """
    for x_dtype in (torch.float32, torch.bfloat16):
        x, weight = random(3, 8, dtype=x_dtype), random_weight(8, torch.float32)
        with torch.autocast("cpu", dtype):
            y = rms_norm(x, 8, weight)
        assert same_bits(y, rms_norm(x, 8, weight))


def test_profiler_names_the_op():
    with torch.autograd.profiler.profile() as seen:
        rms_norm(random(3, 8), 8)
    assert "rmsnorm_cuda::rms_norm" in {event.name for event in seen.function_events}


def test_fork_after_import():
    """As data loaders do. The parent has run the op in its pool of threads before."""
    code = """if True:
        import os, sys, torch, rmsnorm_cuda
        want = rmsnorm_cuda.rms_norm(torch.ones(4, 8), 8)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rmsnorm_cuda.rms_norm(torch.ones(4, 8), 8), want) else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert programs.run(code, timeout=60).returncode == 0
