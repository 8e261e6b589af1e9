"""What the benchmarks share: contenders, verification, timing on the CPU, the chart."""

import gc
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import rmsnorm_cuda
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance

DTYPES = {  # of x and of weight
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}
EPS = 1e-6
# How often the bytes of x (of 16 bits) have to move at least: see the head of cpu.py and of gpu.py.
PASSES = {"forward": 2, "training": 5, "fused": 4, "quantized": 1.5}
OWN_THREADS = "onnxruntime"  # has a pool of threads beside torch's
ROTATE_BYTES = 256 << 20  # beyond any cache here: a large cell finds none of its data in it


def llama(x, weight):
    """The formula of the Llama family in transformers: the rounding order of cast_before_weight."""
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * hidden.to(x.dtype)


FORMULAS = {
    "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    "llama": llama,
}


def norms(cols, weight, bias, compiled):
    """Name: (a norm of x, its parameters). compiled: those of FORMULAS under torch.compile too."""
    result = {
        "ours": (lambda x: rmsnorm_cuda.rms_norm(x, cols, weight, EPS), [weight]),
        "F.rms_norm": (lambda x: F.rms_norm(x, cols, weight, EPS), [weight]),
        "F.layer_norm": (lambda x: F.layer_norm(x, cols, weight, bias, EPS), [weight, bias]),
    }
    if compiled:
        torch._dynamo.reset()
    for name in compiled:
        formula = torch.compile(FORMULAS[name], dynamic=False)
        result[f"compile({name})"] = (lambda x, formula=formula: formula(x, weight), [weight])
    return result


def fused_adds(cols, weight, compiled):
    """Name: a function of x and residual, to the norm of their sum and the sum."""

    def add_then_norm(x, residual):
        total = x + residual
        return F.rms_norm(total, cols, weight, EPS), total

    result = {
        "ours": lambda x, residual: rmsnorm_cuda.fused_add_rms_norm(x, residual, weight, EPS),
        "F.rms_norm": add_then_norm,
    }
    if "F.rms_norm" in compiled:
        torch._dynamo.reset()
        result["compile(F.rms_norm)"] = torch.compile(add_then_norm, dynamic=False)
    return result


def quantized(cols, weight, compiled):
    """Name: a function of x, to the norm in float8_e4m3fn (or int8) and per-token scales.

    "ours unquantized" leaves the norm as it is.
    """

    def then_torch(norm, dtype=torch.float8_e4m3fn, most=448.0):
        y = norm.float()
        scale = (y.abs().amax(-1, keepdim=True) / most).clamp(min=1 / (512 * most))
        return (y / scale).clamp(-most, most).to(dtype), scale

    def steps(x):
        return then_torch(F.rms_norm(x, cols, weight, EPS))

    given = torch.tensor([0.02]).to(weight.device)
    e4m3 = torch.float8_e4m3fn
    result = {
        "ours": lambda x: rmsnorm_cuda.rms_norm_quant(x, weight, EPS, dtype=e4m3),
        "ours int8": lambda x: rmsnorm_cuda.rms_norm_quant(x, weight, EPS, dtype=torch.int8),
        "ours blocks of 128": lambda x: rmsnorm_cuda.rms_norm_quant(
            x, weight, EPS, dtype=e4m3, block=128
        ),
        "ours scale given": lambda x: rmsnorm_cuda.rms_norm_quant(
            x, weight, EPS, dtype=e4m3, scale=given
        ),
        "ours fused add": lambda x: rmsnorm_cuda.fused_add_rms_norm_quant(
            x, x, weight, EPS, dtype=e4m3
        ),
        "ours unquantized": lambda x: rmsnorm_cuda.rms_norm(x, cols, weight, EPS),
        "ours, then torch": lambda x: then_torch(rmsnorm_cuda.rms_norm(x, cols, weight, EPS)),
        "F.rms_norm, then torch": steps,
    }
    if "F.rms_norm" in compiled:
        torch._dynamo.reset()
        result["compile(F.rms_norm)"] = torch.compile(steps, dynamic=False)
    return result


def training_step(norm, parameters, gradients):
    """A run of forward and backward; `gradients` maps the id of an x to its dy."""
    leaves = {}

    def run(x):
        leaf = leaves.setdefault(id(x), x.detach().requires_grad_())
        return torch.autograd.grad(norm(leaf), [leaf, *parameters], gradients[id(x)])

    return run


def verify(x, cols, weight):
    want = rms_norm_reference(x.cpu(), cols, weight.cpu(), EPS)
    worst = ulp_distance(rmsnorm_cuda.rms_norm(x, cols, weight, EPS).cpu(), want).max().item()
    assert worst <= 1, f"{worst} ulp from the reference"


def samples(contenders, inputs, seconds):
    """Microseconds a call of each contender, many of them, interleaved in batches of about 200 us.

    Every round has an order of its own: who follows a contender of the same kind finds its code in
    the caches.
    """
    batch = {}
    for name, run in contenders.items():
        run(inputs[0])
        start = time.perf_counter()
        run(inputs[-1])
        batch[name] = max(1, int(200e-6 / (time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    turn, order, shuffled, own_threads = 0, list(contenders), random.Random(0), False
    gc.disable()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(times[name]) < 5:
        shuffled.shuffle(order)
        for name in order:
            run = contenders[name]
            if name.startswith(OWN_THREADS) != own_threads:
                # Idle threads turn round for a while, on the cores of those that are timed next.
                own_threads = not own_threads
                time.sleep(0.02)
                run(inputs[turn % len(inputs)])
            start = time.perf_counter()
            for i in range(batch[name]):
                run(inputs[(turn + i) % len(inputs)])
            times[name].append((time.perf_counter() - start) / batch[name] * 1e6)
            turn += 1
    gc.enable()
    return times


def measure(contenders, inputs, seconds):
    """Median microseconds a call of each contender."""
    return {
        name: statistics.median(times)
        for name, times in samples(contenders, inputs, seconds).items()
    }


def machine(device="cpu"):
    """What the numbers of a report depend on beside the code that made them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    found = {"processor": models[0] if models else platform.machine(), "isa": rmsnorm_cuda._C.isa()}
    if torch.device(device).type == "cuda":
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rmsnorm_cuda": rmsnorm_cuda.__version__,
    }
    return found | {"threads": torch.get_num_threads()} | versions


def pyplot():
    """matplotlib for files, without a display."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(
            "Charts need matplotlib: pip install matplotlib, or this package with its extra "
            '"benchmarks".'
        )
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def size_of(shape):
    rows, cols = map(int, shape.split("x"))
    return rows * cols


def ratio_axis(axis):
    """Across: multiples of our time, with a line where they are equal."""
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def chart(results, file, title, hidden=()):
    """Each contender's time as a multiple of ours: a panel for each mode, a line for each cell.

    Cells of one shape stand together, small shapes first; of these the closest race first.
    """
    plt = pyplot()
    results = [
        result | {"us": {name: us for name, us in result["us"].items() if name not in hidden}}
        for result in results
    ]
    names = list(dict.fromkeys(name for result in results for name in result["us"]))
    names = [name for name in names if not name.startswith("ours")]
    modes = list(dict.fromkeys(result["mode"] for result in results))
    cells = {mode: [result for result in results if result["mode"] == mode] for mode in modes}
    longest = max(map(len, cells.values()))
    fig, axes = plt.subplots(
        1, len(modes), figsize=(6.5 * len(modes), 1.6 + 0.2 * longest), squeeze=False
    )
    for mode, axis in zip(modes, axes[0], strict=True):

        def ratios(cell):
            us = cell["us"]
            return {name: us[name] / us["ours"] for name in names if name in us}

        order = sorted(
            cells[mode],
            key=lambda cell: (size_of(cell["shape"]), cell["shape"], min(ratios(cell).values())),
        )
        shapes = [cell["shape"] for cell in order]
        # Half a line between two shapes.
        places = [at + len(set(shapes[: at + 1])) / 2 for at in range(len(order))]
        for name in names:
            points = [
                (ratios(c)[name], at)
                for c, at in zip(order, places, strict=True)
                if name in ratios(c)
            ]
            axis.plot(*zip(*points, strict=True), "o", markersize=5, label=name)
        for cell, place in zip(order, places, strict=True):
            axis.plot(
                [1, max(ratios(cell).values())], [place] * 2, color="#d8d8d8", linewidth=1, zorder=0
            )
        ratio_axis(axis)
        threads = [
            f", {cell['threads']} thread" + "s" * (cell["threads"] > 1) if "threads" in cell else ""
            for cell in order
        ]
        labels = [
            f"{cell['shape']}  {cell['dtype']}{also}"
            for cell, also in zip(order, threads, strict=True)
        ]
        axis.set_yticks(places, labels, fontsize=8)
        axis.set_ylim(max(places) + 1, min(places) - 1)
        axis.set_title(f"{mode}: time, ours = 1", fontsize=10)
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, fontsize=9, loc="lower center", ncols=len(names), frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout(rect=(0, 0.4 / fig.get_figheight(), 1, 1))
    fig.savefig(file, dpi=90)
