"""torch.compile: one graph, and the bits of eager."""

import pytest
import torch
from cases import GEMMA, LLAMA, random, random_weight, same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from rmsnorm_cuda import rms_norm

# Inductor compiles C++, seconds a graph: the rest of a compilation is the same with aot_eager.
CASES = {
    "plain": (torch.float32, torch.float32, {}),
    "no weight": (torch.float32, None, {}),
    "offset": (torch.bfloat16, torch.bfloat16, GEMMA),
    "cast, promoted": (torch.bfloat16, torch.float32, LLAMA),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with fresh_cache():  # Inductor's cache on disk does not know that an op has changed
        yield
    torch._dynamo.reset()


def train(function, x, weight, dy, frozen=None):
    """The output, and the gradients of what is not frozen."""
    named = {"x": x, "weight": weight}
    leaves = [t.detach().clone().requires_grad_(name != frozen) for name, t in named.items() if t is not None]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))


@pytest.mark.parametrize("dtype, weight_dtype, options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_same_bits_as_eager(backend, dtype, weight_dtype, options):
    if backend == "inductor" and options is GEMMA:
        pytest.skip("nothing new beside the other inductor cases")

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
    got, want = (train(f, x, weight, dy, frozen) for f in (compiled, lambda x, w: rms_norm(x, 40, w)))
    assert len(got) == 2 and all(map(same_bits, got, want))


def test_dynamic_shapes_compile_once():
    counts = []
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w: rms_norm(x, (x.shape[-1],), w), fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3, 8), (4, 5, 16), (7, 2, 33), (3, 9, 8)):
        x, weight = random(*shape), random_weight(shape[-1], torch.float32)
        assert same_bits(compiled(x, weight), rms_norm(x, shape[-1], weight))
        dy = random(*shape)
        got, want = (train(f, x, weight, dy) for f in (compiled, lambda x, w: rms_norm(x, x.shape[-1:], w)))
        assert all(map(same_bits, got, want))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # all of them for the first shape


def test_batch_sizes_do_not_recompile():
    """The default mode: the second size makes the dimension dynamic, and that is the last compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: rms_norm(x, 40), fullgraph=True, backend=counter)
    for batch in range(2, 9):
        x = random(batch, 40)
        assert same_bits(compiled(x), rms_norm(x, 40))
    assert counter.frame_count == 2


def test_strided_input():
    compiled = torch.compile(lambda t, w: rms_norm(t[..., :16].transpose(1, 2), 16, w), fullgraph=True)
    fused, weight = random(2, 5, 3, 40), random_weight(16, torch.float32)
    assert same_bits(compiled(fused, weight), rms_norm(fused[..., :16].transpose(1, 2), 16, weight))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out(backend):
    compiled = torch.compile(lambda x, w, out: rms_norm(x * 2, 40, w, out=out) + 1, fullgraph=True, backend=backend)
    x, weight, out = random(6, 40), random_weight(40, torch.float32), torch.full((6, 40), torch.nan)
    y = compiled(x, weight, out)
    assert same_bits(out, rms_norm(x * 2, 40, weight)) and same_bits(y, out + 1)


BAD_OUT = {
    "shape": (torch.zeros(2, 40), "expected out of shape"),
    "shape that would broadcast": (torch.zeros(2, 6, 40), "expected out of shape"),
    "dtype": (torch.zeros(6, 40, dtype=torch.float64), "expected out of dtype"),
    "under grad": (torch.zeros(6, 40, requires_grad=True), "out=... arguments"),
}


@pytest.mark.parametrize("out, message", BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out_is_refused_as_in_eager(out, message):
    compiled = torch.compile(lambda x, out: rms_norm(x, 40, out=out), fullgraph=True, backend="aot_eager")
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


def test_compiled_autograd():
    """The backward graph as a whole: the Function is traceable."""
    x, weight, dy = random(6, 40), random_weight(40, torch.float32), random(6, 40)
    want = train(lambda x, w: rms_norm(x, 40, w, 1e-5), x, weight, dy)[1:]
    leaf_x, leaf_w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = rms_norm(leaf_x, 40, leaf_w, 1e-5)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.backward(dy)
    assert same_bits(leaf_x.grad, want[0]) and same_bits(leaf_w.grad, want[1])
