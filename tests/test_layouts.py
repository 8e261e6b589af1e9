"""Strided, sliced, expanded, empty and huge tensors: the bits of the dense copy, and no copy where
none is needed.
"""

import math
import platform

import programs
import pytest
import torch
from cases import assert_forward, name, ops, random, random_weight, same_bits
from torch.autograd.profiler import profile

from rmsnorm_cuda import rms_norm

# name: (shape of a dense tensor, the view of it, how many dimensions are normalized, must a copy be
# made?)
LAYOUTS = {
    "dense": ((3, 5, 16), lambda t: t, 1, False),
    "1-D": ((33,), lambda t: t, 1, False),
    "q heads of a fused qkv": ((2, 5, 128), lambda t: t[..., :64].unflatten(-1, (4, 16)), 1, False),
    "k heads of a fused qkv": (
        (2, 5, 128),
        lambda t: t[..., 64:96].unflatten(-1, (2, 16)),
        1,
        False,
    ),
    "x[..., :d]": ((6, 40), lambda t: t[..., :33], 1, False),
    "x[..., 3:], misaligned": ((6, 40), lambda t: t[..., 3:], 1, False),
    "(B, H, S, D) of (B, S, H, D)": ((2, 7, 3, 16), lambda t: t.transpose(1, 2), 1, False),
    "(S, B, D) of (B, S, D)": ((4, 7, 33), lambda t: t.transpose(0, 1), 1, False),
    "every other row": ((9, 16), lambda t: t[::2], 1, False),
    "expanded batch": ((1, 5, 16), lambda t: t.expand(4, 5, 16), 1, False),
    "expanded rows": ((4, 1, 16), lambda t: t.expand(4, 5, 16), 1, False),
    "one column": ((7, 3), lambda t: t[:, 1:2], 1, False),
    "size-1 dimensions of any stride": (
        (3, 16),
        lambda t: t.as_strided((1, 3, 1, 16), (7, 16, 5, 1)),
        1,
        False,
    ),
    "four unmergeable dimensions": ((4, 4, 4, 4, 8), lambda t: t[::2, ::2, ::2, ::2], 1, False),
    "five unmergeable dimensions": (
        (4, 4, 4, 4, 4, 8),
        lambda t: t[::2, ::2, ::2, ::2, ::2],
        1,
        True,
    ),
    "five dimensions that merge to two": (
        (2, 3, 2, 2, 3, 8),
        lambda t: t[:, :, :, :, :2],
        1,
        False,
    ),
    "last dimension strided": ((4, 32), lambda t: t[:, ::2], 1, True),
    "last dimension transposed": ((16, 4), lambda t: t.t(), 1, True),
    "last dimension expanded": ((4, 1), lambda t: t.expand(4, 16), 1, True),
    "two normalized dimensions": ((3, 4, 5, 6), lambda t: t, 2, False),
    "two of them, sliced outside": ((3, 4, 5, 6), lambda t: t[:, ::2], 2, False),
    "two of them, sliced inside": ((3, 4, 5, 8), lambda t: t[..., :6], 2, True),
    "all dimensions normalized": ((3, 5, 7), lambda t: t, 3, False),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


@pytest.mark.usefixtures("painted")
def test_forward(device, layout, torch_kernels):
    shape, view, normalized, copied = layout
    dtype = (torch.float32, torch.bfloat16, torch.float64)[len(shape) % 3]
    if copied:
        torch_kernels(device)  # which make the dense copy
    base = random(*shape, dtype=dtype)
    x, dense = view(base.to(device)), view(base).contiguous()
    normalized_shape = dense.shape[-normalized:]
    weight = random_weight(normalized_shape, dtype)
    y = rms_norm(x, normalized_shape, weight.to(device))
    assert y.is_contiguous()
    assert_forward(y, dense, normalized_shape, weight, None, {})
    assert same_bits(y, rms_norm(dense.to(device), normalized_shape, weight.to(device)))


@pytest.mark.usefixtures("painted")
def test_backward(device, layout, torch_kernels):
    shape, view, normalized, copied = layout
    if copied:
        torch_kernels(device)  # which make the dense copy
    x, dy = random(*shape), random(*shape)
    dense_x, dense_dy = view(x).contiguous().to(device), view(dy).contiguous().to(device)
    normalized_shape = dense_x.shape[-normalized:]
    weight = random_weight(normalized_shape, torch.float32, device)
    _, rstd = ops.rms_norm_forward(dense_x, normalized_shape, weight)

    def gradients(dy, x):
        return ops.rms_norm_backward(dy, x, normalized_shape, weight, rstd, None, (True, True))

    x, dy, want = view(x.to(device)), view(dy.to(device)), gradients(dense_dy, dense_x)
    for strided in ((dense_dy, x), (dy, dense_x), (dy, x)):
        assert all(map(same_bits, gradients(*strided), want))


def test_copies(layout):
    """A copy is made only where it must be. Seen by the profiler: the kernels' own work has no ATen
    op.
    """
    shape, view, normalized, copied = layout
    x = view(random(*shape))
    with profile() as seen:
        rms_norm(x, x.shape[-normalized:])
    assert copied == any("copy_" in event.name for event in seen.function_events)


def test_out_of_any_layout(device, layout):
    shape, view, normalized, copied = layout
    base = torch.full(shape, math.nan)
    if 0 in view(base).stride():
        pytest.skip("an expanded tensor is no output: test_errors.py")
    x, base = random(*view(base).shape, device=device), base.to(device)
    normalized_shape, out = x.shape[-normalized:], view(base)
    if copied:
        with pytest.raises(RuntimeError, match="expected out with dense rows"):
            rms_norm(x, normalized_shape, out=out)
        return
    assert rms_norm(x, normalized_shape, out=out) is out
    assert same_bits(view(base.cpu()), rms_norm(x, normalized_shape))


WEIGHTS = {
    "every other": lambda t: t[::2],
    "expanded": lambda t: t[:1].expand(32),
    "moved": lambda t: t[1:33],
}


@pytest.mark.parametrize("strided", WEIGHTS.values(), ids=WEIGHTS)
def test_weight_layouts(device, strided, torch_kernels):
    if not strided(torch.empty(64)).is_contiguous():
        torch_kernels(device)  # which make the dense copy
    base, x, dy = random(64), random(5, 32, device=device), random(5, 32, device=device)
    weight, dense = strided(base.to(device)), strided(base).contiguous().to(device)
    assert same_bits(rms_norm(x, 32, weight), rms_norm(x, 32, dense))
    _, rstd = ops.rms_norm_forward(x, (32,), dense)
    got, want = (
        ops.rms_norm_backward(dy, x, (32,), w, rstd, None, (True, True)) for w in (weight, dense)
    )
    assert all(map(same_bits, got, want))
    assert got[1].is_contiguous()


# No rows, no columns, neither
EMPTY = [((0, 8), 1), ((2, 0, 8), 1), ((3, 0), 1), ((2, 0, 3), 2), ((0,), 1), ((0, 0), 1)]


@pytest.mark.parametrize("shape, normalized", EMPTY)
def test_empty(shape, normalized):
    normalized_shape = shape[-normalized:]
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(normalized_shape, requires_grad=True)
    y = rms_norm(x, normalized_shape, weight)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert rms_norm(x.detach(), normalized_shape, out=torch.empty(shape)).shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(normalized_shape))
    _, rstd = ops.rms_norm_forward(x.detach(), normalized_shape)
    assert rstd.shape == shape[: len(shape) - len(normalized_shape)] and rstd.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_rows_farther_apart_than_32_bits(dtype):
    """Offsets beyond 2^31 elements, for input, output and gradient. The memory between the rows is
    never touched.
    """
    cols, far = 129, 2**31 + 5
    try:
        buffers = [
            torch.empty(2 * far + cols, dtype=dtype).as_strided((3, cols), (far, 1))
            for _ in range(3)
        ]
    except RuntimeError:
        pytest.skip("the system grants no such reservation of memory")
    x, dy, out = buffers
    x.copy_(random(3, cols, dtype=dtype))
    dy.copy_(random(3, cols, dtype=dtype))
    dense_x, dense_dy, weight = x.contiguous(), dy.contiguous(), random_weight(cols, dtype)
    want, rstd = ops.rms_norm_forward(dense_x, (cols,), weight)
    assert same_bits(rms_norm(x, cols, weight), want)
    assert same_bits(rms_norm(x, cols, weight, out=out), want)
    got = ops.rms_norm_backward(dy, x, (cols,), weight, rstd, None, (True, True))
    assert all(
        map(
            same_bits,
            got,
            ops.rms_norm_backward(dense_dy, dense_x, (cols,), weight, rstd, None, (True, True)),
        )
    )


@pytest.mark.slow
def test_more_than_2_to_31_elements(threads):
    """A dense tensor of so many, 4 GiB and as much of output: the last rows are the ones that a
    32-bit count would miss.
    """
    rows, cols = 2**21 + 3, 1024
    try:
        x = torch.empty(rows, cols, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of memory are not to be had")
    if _free_memory() < 10 * 2**30:
        pytest.skip("less than 10 GiB of memory are free")
    threads(2)
    x[:5], x[-5:] = random(5, cols), random(5, cols)  # between them it stays as the system gave it
    y = rms_norm(x, cols)
    for part in (slice(0, 8), slice(2**20, 2**20 + 8), slice(-8, None)):
        assert same_bits(y[part], rms_norm(x[part].clone(), cols))


def _free_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


KEPT = """
import resource, torch
from rmsnorm_cuda import rms_norm

torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
weight, worst = torch.ones(1024), 0
for rows in (40, 100, 200, 300, 400, 700, 1000, 1500, 2000, 3000, 4500, 6000, 7000):
    x = torch.ones(rows, 1024)  # a page each
    for turn in range(24):
        if turn == 12:
            before = faults()
        y = rms_norm(x, 1024, weight)
    worst = max(worst, (faults() - before) / (12 * rows))
print(worst)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is glibc's malloc")
def test_new_outputs_keep_their_pages():
    """A call has no page faults of its own: see keep_freed_memory() in layout.cpp."""
    done = programs.run(KEPT)
    assert done.returncode == 0 and float(done.stdout) < 0.1, done
