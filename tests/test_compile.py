"""torch.compile: one graph, one node per norm, and the bits of eager. (test_export.py:
torch.export.)
"""

from functools import partial

import pytest
import torch
from cases import GEMMA, LLAMA, Calls, ops, random, random_weight, same_bits
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import rmsnorm_cuda
from rmsnorm_cuda import RMSNorm, fused_add_rms_norm, fused_add_rms_norm_, rms_norm, rms_norm_quant

# Inductor compiles C++, seconds a graph: the rest of a compilation is the same with aot_eager.
CASES = {
    "plain": (torch.float32, torch.float32, {}),
    "no weight": (torch.float32, None, {}),
    "offset": (torch.bfloat16, torch.bfloat16, GEMMA),
    "cast, promoted": (torch.bfloat16, torch.float32, LLAMA),
}
INDUCTOR = "plain", "cast, promoted"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with fresh_cache():  # Inductor's cache on disk does not know that an op has changed
        yield
    torch._dynamo.reset()


def train(function, x, weight, dy, frozen=None):
    """The output, and the gradients of what is not frozen."""
    named = {"x": x, "weight": weight}
    leaves = [
        t.detach().clone().requires_grad_(name != frozen)
        for name, t in named.items()
        if t is not None
    ]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))


@pytest.mark.parametrize(
    "backend, case",
    [*(("aot_eager", case) for case in CASES), *(("inductor", case) for case in INDUCTOR)],
)
def test_same_bits_as_eager(backend, case):
    dtype, weight_dtype, options = CASES[case]

    def function(x, weight=None):
        return rms_norm(x, 40, weight, 1e-5, **options)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x, weight = random(6, 40, dtype=dtype), random_weight(40, weight_dtype)
    args = (x,) if weight is None else (x, weight)
    y = function(*args)
    assert same_bits(compiled(*args), y)
    dy = torch.randn_like(y)
    for a, b in zip(train(compiled, x, weight, dy), train(function, x, weight, dy), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen(frozen):
    compiled = torch.compile(lambda x, w: rms_norm(x, 40, w), fullgraph=True, backend="aot_eager")
    x, weight, dy = random(6, 40), random_weight(40, torch.float32), random(6, 40)
    got, want = (
        train(f, x, weight, dy, frozen) for f in (compiled, lambda x, w: rms_norm(x, 40, w))
    )
    assert len(got) == 2 and all(map(same_bits, got, want))


def test_dynamic_shapes_compile_once():
    counts = []
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, w: rms_norm(x, (x.shape[-1],), w), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((2, 3, 8), (4, 5, 16), (7, 2, 33), (3, 9, 8)):
        x, weight = random(*shape), random_weight(shape[-1], torch.float32)
        assert same_bits(compiled(x, weight), rms_norm(x, shape[-1], weight))
        dy = random(*shape)
        got, want = (
            train(f, x, weight, dy) for f in (compiled, lambda x, w: rms_norm(x, x.shape[-1:], w))
        )
        assert all(map(same_bits, got, want))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # all of them for the first shape


def ours(graph):
    return [n.target for n in graph.graph.nodes if "rmsnorm_cuda" in str(n.target)]


class Block(torch.nn.Module):
    """All of it together: module, module with residual, function with heads as strided rows."""

    def __init__(self, width=32, heads=4, **options):
        super().__init__()
        self.heads, self.options = heads, options
        self.before, self.after = RMSNorm(width, 1e-5, **options), RMSNorm(width, 1e-5, **options)
        self.q_weight = torch.nn.Parameter(random_weight(width // heads, torch.float32))
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.before(x)).chunk(3, -1)
        )
        q = rms_norm(q, q.shape[-1:], self.q_weight, 1e-5, **self.options)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        y, x = self.after(self.out(mixed.transpose(1, 2).flatten(2)).to(x.dtype), x)
        return x + torch.tanh(y)


def step(block, x):
    """Output and all gradients of one training step."""
    y = block(x)
    return y, *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])


@pytest.mark.parametrize("options", [{}, GEMMA, LLAMA], ids=["torch", "gemma", "llama"])
def test_block_in_training(options):
    block, x = Block(**options), random(2, 5, 32).requires_grad_()
    graphs = AotEagerAndRecordGraphs()
    got, want = step(torch.compile(block, fullgraph=True, backend=graphs), x), step(block, x)
    assert len(graphs.graphs) == 1
    assert ours(graphs.fw_graphs[0]) == [
        ops.rms_norm_forward.default,
        ops.rms_norm_forward.default,
        ops.fused_add_rms_norm_forward.default,
    ]
    assert ours(graphs.bw_graphs[0]) == [ops.rms_norm_backward.default] * 3
    for a, b in zip(got, want, strict=True):
        assert same_bits(a.detach(), b.detach())


def test_block_under_autocast():
    block, x = Block(), random(2, 5, 32).requires_grad_()

    def under_autocast(block):
        with torch.autocast("cpu", torch.bfloat16):
            return step(block, x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(under_autocast(compiled), under_autocast(block), strict=True):
        assert same_bits(a.detach(), b.detach())


def in_place(x, w):
    y, total = x.detach().clone(), x.detach() * 2
    fused_add_rms_norm_(y, total, w.detach())
    return y + total


NORM = RMSNorm(40)
FUNCTIONS = {
    "function": lambda x, w: rms_norm(x, 40, w),
    "module": lambda x, w: NORM(x) + w,
    "fused": lambda x, w: fused_add_rms_norm(x, x * 2, w)[0],
    "in place": in_place,
    "out": lambda x, w: rms_norm(x.detach(), 40, w.detach(), out=torch.empty_like(x)),
    "quantized": lambda x, w: rms_norm_quant(x.detach(), w.detach(), dtype=torch.int8)[0],
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_batch_sizes_compile_twice_at_most(function, training):
    """The default mode: the second size makes the dimension dynamic, and that is the last
    compilation, but for the sizes 1 and 0, which torch compiles for by themselves."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    weight = random_weight(40, torch.float32).requires_grad_(training)
    counts = []
    for batch in (2, 3, 4, 5, 6, 7, 8, 1, 9, 1, 0, 10):
        x = random(batch, 40).requires_grad_(training)
        assert same_bits(compiled(x, weight).detach(), function(x, weight).detach())
        counts.append(counter.frame_count)
    assert counts[6] == 2 and counts[-3] <= 3 and counts[-1] <= 4


def test_no_clone_around_what_writes():
    """Inductor hands the in-place op and `out` the buffers themselves."""
    from torch._inductor.utils import run_and_get_code

    def function(x, residual, weight, out):
        fused_add_rms_norm_(x, residual, weight)
        rms_norm(x * 2, 40, weight, out=out)

    x, residual, weight, out = (
        random(6, 40),
        random(6, 40),
        random_weight(40, torch.float32),
        torch.empty(6, 40),
    )
    want = fused_add_rms_norm(x, residual, weight)
    _, code = run_and_get_code(torch.compile(function, fullgraph=True), x, residual, weight, out)
    assert (
        same_bits(x, want[0])
        and same_bits(residual, want[1])
        and same_bits(out, rms_norm(x * 2, 40, weight))
    )
    call = code[0][code[0].index("def call(") :]
    assert call.count("empty_strided_cpu(") == 1 and "clone" not in call and "copy_" not in call, (
        call
    )  # x * 2


FORWARD_OPS = ops.rms_norm_forward.default, ops.fused_add_rms_norm_forward.default


def save_norms(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in FORWARD_OPS else CheckpointPolicy.MUST_RECOMPUTE


def save_nothing(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


class Checkpointed(torch.nn.Module):
    def __init__(self, block, **options):
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False, **self.options)


@pytest.mark.parametrize(
    "policy, again",
    [(None, 3), (save_nothing, 3), (save_norms, 0)],
    ids=["plain", "recompute", "save"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_activation_checkpoint(compiled, policy, again):
    """A policy that lists our forward ops decides whether they run again in the backward pass; the
    bits are the same.
    """
    options = (
        {}
        if policy is None
        else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    )
    block, x = Block(), random(2, 5, 32).requires_grad_()
    want, checkpointed = step(block, x), Checkpointed(block, **options)
    if compiled:
        graphs = AotEagerAndRecordGraphs()
        got = step(torch.compile(checkpointed, fullgraph=True, backend=graphs), x)
        ran = ours(graphs.bw_graphs[0])
    else:
        y = checkpointed(x)
        with Calls() as calls:
            got = y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        ran = calls.ours
    assert sum(op in FORWARD_OPS for op in ran) == again
    for a, b in zip(got, want, strict=True):
        assert same_bits(a.detach(), b.detach())


def test_aot_autograd():
    """Ahead of time, without Dynamo in front."""
    from functorch.compile import aot_function, nop

    x, weight, dy = random(6, 40), random_weight(40, torch.float32), random(6, 40)

    def function(x, w):
        y, total = fused_add_rms_norm(x, x, w, 1e-5)
        return rms_norm(y, 40, w) + total

    got, want = (train(f, x, weight, dy) for f in (aot_function(function, nop), function))
    assert all(map(same_bits, got, want))


@pytest.fixture
def decomposed():
    rmsnorm_cuda.config.decompose = True
    yield
    rmsnorm_cuda.config.decompose = False


def test_config_decompose(decomposed):
    """Inductor gets the formula instead of the op, forward and backward; the default is back after
    a recompilation.
    """
    block, x = Block(), random(2, 5, 32).requires_grad_()
    want = step(block, x)
    graphs = AotEagerAndRecordGraphs()
    compiled = torch.compile(block, fullgraph=True, backend=graphs)
    got = step(compiled, x)
    assert not ours(graphs.fw_graphs[0]) and not ours(graphs.bw_graphs[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)  # another formula, in fp32
    rmsnorm_cuda.config.decompose = False
    for a, b in zip(step(compiled, x), want, strict=True):
        assert same_bits(a.detach(), b.detach())
    assert len(ours(graphs.fw_graphs[1])) == 3


def test_config_decompose_in_inductor(decomposed):
    """One loop for the norm and what stands around it; only ATen's usual tolerance, since Inductor
    rounds as it likes.
    """
    from torch._inductor.utils import run_and_get_code

    x, gate, weight = random(6, 40), random(6, 40), random_weight(40, torch.float32)

    def function(x, gate, weight):
        return rms_norm(x * torch.sigmoid(gate), 40, weight, 1e-5) * gate

    y, code = run_and_get_code(torch.compile(function, fullgraph=True), x, gate, weight)
    torch.testing.assert_close(y, function(x, gate, weight))
    assert "rmsnorm_cuda" not in code[0] and code[0].count("async_compile.cpp") == 1


def test_config_decompose_leaves_the_others(decomposed):
    graphs = AotEagerAndRecordGraphs()

    def function(x, residual, out):
        fused_add_rms_norm_(x, residual)
        rms_norm(x, 40, out=out)
        return rms_norm_quant(x, dtype=torch.int8)

    torch.compile(function, fullgraph=True, backend=graphs)(
        random(6, 40), random(6, 40), random(6, 40)
    )
    assert len(ours(graphs.graphs[0])) == 3
    assert rms_norm(random(6, 40), 40).shape == (6, 40)  # eager has the kernel


def test_decompositions():
    """The same as a table, for the ops as AOTAutograd leaves them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, weight, dy = random(6, 40), random_weight(40, torch.float32), random(6, 40)

    def function(x, weight, dy):
        y, total = fused_add_rms_norm(x, x, weight, 1e-5)
        z = rms_norm(y, 40, weight, 1e-5)
        return z, *torch.autograd.grad([z, total], [x, weight], [dy, dy])

    leaves = x.requires_grad_(), weight.requires_grad_(), dy
    assert ours(make_fx(function)(*leaves))
    traced = make_fx(function, decomposition_table=rmsnorm_cuda.decompositions())(*leaves)
    assert not ours(traced)
    for a, b in zip(traced(*leaves), function(*leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own
def test_decompositions_of_an_exported_program():
    model, x = Block(), random(3, 5, 32)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    formula = program.run_decompositions(rmsnorm_cuda.decompositions())
    assert ours(program.graph_module) and not ours(formula.graph_module)
    for batch in (3, 7):
        x = random(batch, 5, 32)
        torch.testing.assert_close(formula.module()(x), model(x))


def test_strided_input():
    compiled = torch.compile(
        lambda t, w: rms_norm(t[..., :16].transpose(1, 2), 16, w), fullgraph=True
    )
    fused, weight = random(2, 5, 3, 40), random_weight(16, torch.float32)
    assert same_bits(compiled(fused, weight), rms_norm(fused[..., :16].transpose(1, 2), 16, weight))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out(backend):
    compiled = torch.compile(
        lambda x, w, out: rms_norm(x * 2, 40, w, out=out) + 1, fullgraph=True, backend=backend
    )
    x, weight, out = random(6, 40), random_weight(40, torch.float32), torch.full((6, 40), torch.nan)
    y = compiled(x, weight, out)
    assert same_bits(out, rms_norm(x * 2, 40, weight)) and same_bits(y, out + 1)


BAD_OUT = {
    "shape": (torch.zeros(2, 40), "expected out of shape"),
    "shape that would broadcast": (torch.zeros(2, 6, 40), "expected out of shape"),
    "dtype": (torch.zeros(6, 40, dtype=torch.float64), "expected out of dtype"),
    "under grad": (
        torch.zeros(6, 40, requires_grad=True),
        "does not support automatic differentiation",
    ),
}


@pytest.mark.parametrize("out, message", BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out_is_refused_as_in_eager(out, message):
    compiled = torch.compile(
        lambda x, out: rms_norm(x, 40, out=out), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=message):
        compiled(random(6, 40), out)
    assert not out.any()


def test_bad_shape_is_refused():
    compiled = torch.compile(lambda x: rms_norm(x, 39), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="given normalized_shape="):
        compiled(random(6, 40))


def test_compile_of_transform():
    def loss_grad(x, w):
        return torch.func.grad(lambda x: rms_norm(x, 40, w).square().sum())(x)

    x, weight = random(6, 40, dtype=torch.float64), random_weight(40, torch.float64)
    got = torch.compile(loss_grad, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(got, loss_grad(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [FUNCTIONS["function"], FUNCTIONS["fused"], Block.forward],
    ids=["function", "fused", "block"],
)
def test_compiled_autograd(function):
    """The backward graph as a whole: the Functions are traceable."""
    if function is Block.forward:
        block, x = Block(), random(2, 5, 32).requires_grad_()
        y, leaves = block(x), (x, *block.parameters())
    else:
        leaves = random(6, 40).requires_grad_(), random_weight(40, torch.float32).requires_grad_()
        y = function(*leaves)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        y.backward(dy)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    assert all(same_bits(leaf.grad, w) for leaf, w in zip(leaves, want, strict=True))


def test_eps_of_other_kinds():
    """What eager takes for eps, a compiled module takes."""
    numpy = pytest.importorskip("numpy")
    x = torch.randn(4, 16)
    for eps in (
        numpy.float32(1e-3),
        numpy.float64(1e-3),
        torch.tensor(1e-3),
        torch.tensor(1e-3, dtype=torch.float64),
    ):
        torch._dynamo.reset()
        norm = rmsnorm_cuda.RMSNorm(16, eps)
        assert torch.equal(torch.compile(norm, backend="aot_eager")(x), norm(x))
