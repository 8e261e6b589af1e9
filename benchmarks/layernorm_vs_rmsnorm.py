"""LayerNorm or RMSNorm: is it "the same quality, 5-15 % faster"? Measured, op by op and in training.

    python benchmarks/layernorm_vs_rmsnorm.py ops   [--device cuda] [--dtypes fp32,bf16] [--shapes 32x4096,...] [--no-compile]
    python benchmarks/layernorm_vs_rmsnorm.py train [--placement pre,post] [--seeds 0,1,2,3] [--steps 200] [--folder FOLDER]
    both: [--json FILE] [--png FILE] [--md FILE]; --from FILE draws and writes these again from a JSON, and measures nothing

ops: forward and forward + backward of LayerNorm (weight and bias) and RMSNorm, in eager torch, under torch.compile, and ours.
Outputs and gradients are verified against fp64, then timed interleaved in one process on random data, which rotates through
buffers once it is large; minimum and median. What counts is LayerNorm's time over RMSNorm's: above 1, RMSNorm is faster.

train: a byte-level transformer language model on the documentation that ships with Python. For each seed the three norms
get the same initial weights and the same batches, so losses are compared in pairs; intervals are Student's, 95 %, over the
seeds. Finished runs and checkpoints lie in --folder: the same command goes on where it was cut off and, on the CPU, ends
with the bits of a run that was not. Steps are timed apart from the runs, the norms taking turns.
"""

import argparse
import ast
import functools
import gc
import hashlib
import json
import math
import os
import random
import shlex
import statistics
import sys
import sysconfig
import time
from pathlib import Path

# Not this folder: torch would take its cuda.py for NVIDIA's package of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]

import torch
import torch.nn.functional as F

import rmsnorm_cuda
from benchmarks.common import DTYPES, EPS, ROTATE_BYTES, machine, norms, pyplot, samples, training_step

TITLES = {"forward": "forward", "training": "forward + backward"}
CLAIM = (1.05, 1.15)  # LayerNorm's time over RMSNorm's, where RMSNorm is "5-15 % faster"


# ---------------------------------------------------------------- ops

PAIRS = {  # LayerNorm beside RMSNorm
    "eager torch": ("F.layer_norm", "F.rms_norm"),
    "torch.compile": ("compile(F.layer_norm)", "compile(F.rms_norm)"),
    "ours": ("F.layer_norm", "ours"),
}
# Of the largest value, for outputs and the gradient of x.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def contenders(mode, weight, bias, gradients, compiled):
    """Name: a run of x, forward or forward and backward; `gradients` maps the id of an x to its dy."""
    if mode == "training":
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    runs = norms(weight.shape, weight, bias, ["F.rms_norm"] if compiled else [])
    if compiled:
        layer_norm = torch.compile(lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS), dynamic=False)
        runs["compile(F.layer_norm)"] = (lambda x: layer_norm(x, weight, bias), [weight, bias])
    return {name: training_step(*run, gradients) if mode == "training" else run[0] for name, run in runs.items()}


def verify(runs, mode, x, weight, bias, gradients):
    """Asserts that each run is right, against eager torch in fp64; the largest error of each result, of its largest value.

    That of the weight's gradient is only reported: torch's LayerNorm sums it in 16 bits on the CPU, and is percents off.
    """
    exact = x.double()
    wanted = contenders(mode, weight.double(), bias.double(), {id(exact): gradients[id(x)].double()}, False)
    errors = {}
    for name, run in runs.items():
        got, want = run(x), wanted["F.layer_norm" if "layer_norm" in name else "F.rms_norm"](exact)
        pairs = zip((got,), (want,)) if mode == "forward" else zip(got, want, strict=True)
        errors[name] = [((result.double() - right).abs().max() / right.abs().max()).item() for result, right in pairs]
        assert errors[name][0] <= TOLERANCE[x.dtype], f"{name}, {mode}, {x.dtype}: {errors[name][0]:.2g} of the largest value off"
    return errors


def time_op(shape, dtype, mode, args):
    """Minimum and median microseconds of each contender, and the errors of its results."""
    rows, cols = map(int, shape.split("x"))
    x_dtype, weight_dtype = DTYPES[dtype]
    one = rows * cols * x_dtype.itemsize
    # On CUDA what flushes the cache stands between the calls.
    copies = 1 if one < 1 << 20 or args.device != "cpu" else max(2, min(16, ROTATE_BYTES // (2 * one)))
    xs, dys = ([torch.randn(rows, cols).to(x_dtype).to(args.device) for _ in range(copies)] for _ in range(2))
    weight, bias = (torch.randn(cols).to(weight_dtype).to(args.device) for _ in range(2))
    gradients = dict(zip(map(id, xs), dys, strict=True))
    runs = contenders(mode, weight, bias, gradients, not args.no_compile)
    errors = verify(runs, mode, xs[0], weight, bias, gradients)
    if args.device == "cpu":
        times = samples(runs, xs, args.seconds)
    else:
        from benchmarks import cuda

        big = torch.empty(256 << 20, dtype=torch.uint8, device=args.device)
        other = torch.empty_like(big)
        times = cuda.samples(runs, xs[0], lambda: other.copy_(big), args.calls)
    return {name: {"min": min(of_name), "median": statistics.median(of_name)} for name, of_name in times.items()}, errors


def measure_ops(args):
    results = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            for mode in TITLES:
                us, errors = time_op(shape, dtype, mode, args)
                results.append({"mode": mode, "dtype": dtype, "shape": shape, "us": us, "errors": errors})
                print(f"{mode:8} {dtype} {shape:>9}  LayerNorm over RMSNorm:",
                      ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(us, "median").items()), flush=True)  # fmt: skip
    return {"results": results}


def ratios(us, statistic):
    """LayerNorm's time over RMSNorm's, of each pair that was run."""
    return {name: us[of][statistic] / us[to][statistic] for name, (of, to) in PAIRS.items() if of in us and to in us}


def count_claim(name, cells):
    """A sentence on how a pair stands to the claim."""
    low, high = CLAIM
    below, within, above = (sum(map(test, cells)) for test in (lambda r: r < low, lambda r: low <= r <= high, lambda r: r > high))
    slower = sum(ratio < 1 for ratio in cells)
    return (
        f"{name}: LayerNorm takes {min(cells):.2f} to {max(cells):.2f} times as long as RMSNorm, "
        f"{statistics.geometric_mean(cells):.2f} in the geometric mean. Of {len(cells)} cells RMSNorm is 5-15 % faster in {within}, "
        f"more than that in {above}, less in {below}, of which it is slower in {slower}."
    )


def write_ops(report):
    """The Markdown of a report on ops."""
    cells = [(cell, ratios(cell["us"], "median"), ratios(cell["us"], "min")) for cell in report["results"]]
    names = [name for name in PAIRS if name in cells[0][1]]
    lines = ["# LayerNorm over RMSNorm, op by op", "", *describe(report), ""]
    lines += [
        "LayerNorm's time over RMSNorm's, of the medians; of the minima in brackets. Above 1, RMSNorm is faster; the claim "
        f"is {CLAIM[0]} to {CLAIM[1]}. Ours is beside torch's eager LayerNorm.",
        "",
        "| | | LayerNorm, us | ours, us | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for cell, medians, minima in cells:
        both = " | ".join(f"{medians[name]:.2f} ({minima[name]:.2f})" for name in names)
        us = [cell["us"][name]["median"] for name in ("F.layer_norm", "ours")]
        us = [f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in us]
        lines.append(f"| {cell['dtype']} {cell['shape']} | {TITLES[cell['mode']]} | {us[0]} | {us[1]} | {both} |")
    lines += ["", *("- " + count_claim(name, [medians[name] for _, medians, _ in cells]) for name in names)]
    for dtype in dict.fromkeys(cell["dtype"] for cell in report["results"]):
        errors = [cell["errors"] for cell in report["results"] if (cell["dtype"], cell["mode"]) == (dtype, "training")]
        worst = ", ".join(f"{name} {max(error[name][1] for error in errors):.1g}" for name in errors[0])
        lines.append(f"- The weight's gradient in {dtype}, largest error against fp64 as a part of its largest value: {worst}.")
    return "\n".join(lines) + "\n"


def draw_ops(report, file):
    plt = pyplot()
    fig, axes = plt.subplots(len(TITLES), 1, figsize=(max(7, len(report["results"]) * 0.6), 8), squeeze=False)
    for mode, axis in zip(TITLES, axes[:, 0], strict=True):
        cells = [cell for cell in report["results"] if cell["mode"] == mode]
        values = [ratios(cell["us"], "median") for cell in cells]
        for i, name in enumerate(values[0]):
            places = [at + (i + 0.5) / len(values[0]) * 0.8 - 0.4 for at in range(len(cells))]
            # From 1, so that what is slower hangs below the line.
            heights = [value[name] - 1 for value in values]
            axis.bar(places, heights, 0.8 / len(values[0]), bottom=1, label=f"{PAIRS[name][0]} / {PAIRS[name][1]}")
            for place, value in zip(places, values, strict=True):
                offset, side = (2, "bottom") if value[name] >= 1 else (-2, "top")
                axis.annotate(f"{value[name]:.2f}", (place, value[name]), (0, offset), textcoords="offset points", va=side,
                              ha="center", fontsize=6, rotation=90)  # fmt: skip
        axis.axhspan(*CLAIM, color="black", alpha=0.15, label="the claim: 5-15 % faster")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 2 < tick < high * 2]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.margins(y=0.15)
        axis.set_ylabel("LayerNorm's time over RMSNorm's")
        axis.set_title(f"{TITLES[mode]}; above 1: RMSNorm is faster", fontsize=10)
        axis.set_xticks(range(len(cells)), [f"{cell['shape']}\n{cell['dtype']}" for cell in cells], fontsize=7)
        axis.legend(fontsize=7)
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=110)


# ---------------------------------------------------------------- train: text


@functools.cache
def text():
    """Python's own documentation in bytes, to train on and to validate with: every tenth document.

    A paragraph counts where it comes first, so none of the validation stands in the training text.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if file.stem in sys.stdlib_module_names:
            nodes = ast.walk(ast.parse(file.read_bytes()))
            strings = (ast.get_docstring(node) for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
            documents.append("\n\n".join(filter(None, strings)))
    seen, parts = set(), ([], [])
    for i, document in enumerate(documents):
        for paragraph in map(str.rstrip, document.split("\n\n")):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                parts[i % 10 == 9].append(paragraph)
    return tuple("\n\n".join(part).encode() for part in parts)


def tokens(part, device="cpu"):
    return torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device, torch.int64)


def batch(train, seed, step, args):
    """Inputs and targets: a function of seed and step alone, so a run that goes on sees what it would have seen."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # which heeds 32 bits of it
    starts = torch.randint(len(train) - args.context, (args.batch,), generator=generator)
    rows = train[(starts[:, None] + torch.arange(args.context + 1)).to(train.device)]
    return rows[:, :-1], rows[:, 1:]


def windows(validation, size, args):
    """About `size` bytes of rows that do not overlap, spread over the text."""
    rows = validation[: (len(validation) - 1) // args.context * args.context + 1].unfold(0, args.context + 1, args.context)
    return rows[:: max(1, len(rows) * args.context // size)]


# ---------------------------------------------------------------- train: model

NORMS = {"LayerNorm": torch.nn.LayerNorm, "torch.nn.RMSNorm": torch.nn.RMSNorm, "rmsnorm_cuda.RMSNorm": rmsnorm_cuda.RMSNorm}


class Block(torch.nn.Module):
    """Attention and an MLP, each with its norm before it (pre) or behind the residual addition (post)."""

    def __init__(self, norm, placement, width, heads):
        super().__init__()
        self.placement, self.heads = placement, heads
        self.norms = torch.nn.ModuleList([norm(width), norm(width)])
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        for norm, layer in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = x + layer(norm(x)) if self.placement == "pre" else norm(x + layer(x))
        return x


class Model(torch.nn.Module):
    """A decoder over bytes.

    Its initial weights let post-norm leave the plateau of guessing by frequency within the steps that there are: matrices of
    Xavier's, and embeddings of the size that norms give.
    """

    def __init__(self, norm, placement, args):
        super().__init__()
        self.embedding, self.position = torch.nn.Embedding(256, args.width), torch.nn.Embedding(args.context, args.width)
        self.blocks = torch.nn.Sequential(*(Block(norm, placement, args.width, args.heads) for _ in range(args.layers)))
        self.norm = norm(args.width) if placement == "pre" else torch.nn.Identity()
        self.head = torch.nn.Linear(args.width, 256)
        for part in self.modules():
            if isinstance(part, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(part.weight)
                torch.nn.init.zeros_(part.bias)
        torch.nn.init.normal_(self.position.weight, std=0.3)
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, x):
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def build(norm, placement, seed, args):
    """The model, its weights the same for every norm, and AdamW, which decays matrices only."""
    torch.manual_seed(seed)
    make = functools.partial(NORMS[norm], eps=EPS) if norm in NORMS else lambda width: torch.nn.Identity()
    model = Model(make, placement, args).to(args.device)
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def step_once(model, optimizer, pair, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, *pair)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def rate_of(step, args):
    """Up in the first tenth, then down a cosine to a tenth."""
    rise = max(1, args.steps // 10)
    if step < rise:
        return args.rate * (step + 1) / rise
    return args.rate * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / (args.steps - rise)))


@torch.no_grad()
def evaluate(model, rows, args):
    losses = [(loss_of(model, part[:, :-1], part[:, 1:]).item(), len(part)) for part in rows.split(args.batch)]
    return sum(loss * count for loss, count in losses) / len(rows)


# ---------------------------------------------------------------- train: runs that can be cut off


def write_whole(file, write):
    """A file that is there has all of its content, whenever the process dies."""
    unfinished = file.with_name(file.name + ".part")
    write(unfinished)
    os.replace(unfinished, file)


def write_json(file, value):
    write_whole(Path(file), lambda path: path.write_text(json.dumps(value) + "\n"))


def train_run(norm, placement, seed, args, bar):
    """The losses of one run, from where the folder says that it stands."""
    done, checkpoint = (args.folder / f"{placement}-{norm}-{seed}.{ending}" for ending in ("json", "pt"))
    if done.exists():
        bar.update(args.steps)
        return json.loads(done.read_text())
    train, validation = (tokens(part, args.device) for part in text())
    few, many = windows(validation, 4096, args), windows(validation, args.validate, args)
    model, optimizer = build(norm, placement, seed, args)
    step, losses, curve = 0, [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, losses, curve = state["step"], state["train"], state["validation"]
        bar.update(step)
    bar.set_description(f"{placement} {norm} seed {seed}")
    while step < args.steps:
        losses.append(step_once(model, optimizer, batch(train, seed, step, args), rate_of(step, args)))
        step += 1
        bar.update()
        if step % args.evaluate_every == 0:
            curve.append([step, evaluate(model, few, args)])
        if step % args.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "train": losses, "validation": curve}
            write_whole(checkpoint, functools.partial(torch.save, state))
    run = {"norm": norm, "placement": placement, "seed": seed}
    run |= {"train": losses, "validation": curve, "final": evaluate(model, many, args)}
    write_json(done, run)
    checkpoint.unlink(missing_ok=True)
    return run


def time_steps(placement, compiled, args, progress):
    """Milliseconds of a training step with each norm and with none, and of a step's norms alone.

    Minimum and median, and the ratio of LayerNorm's step to the others' in the same round.

    All take turns, in an order that is shuffled every round. A step has a learning rate of 0, so that the model without norms
    stays what it was. Norms alone are as many modules as the model has, forward and then backward, each over activations
    of its own.
    """
    file = args.folder / f"steps-{placement}-{'compiled' if compiled else 'eager'}.json"
    if file.exists():
        return json.loads(file.read_text())
    train = tokens(text()[0], args.device)
    calls = {}
    torch._dynamo.reset()
    for norm in [*NORMS, "none"]:
        model, optimizer = build(norm, placement, 0, args)
        runs = torch.compile(model, dynamic=False) if compiled else model
        calls[norm] = lambda turn, runs=runs, optimizer=optimizer: step_once(runs, optimizer, batch(train, 0, turn, args), 0.0)
        if norm != "none" and not compiled:
            calls[f"{norm} alone"] = norms_alone([part for part in model.modules() if isinstance(part, NORMS[norm])], args)
        calls[norm](0)
    times = {name: [] for name in calls}
    order = list(calls)
    shuffled = random.Random(0)
    gc.disable()
    for turn in progress(range(-2, args.rounds), desc=f"{placement}: timing {'compiled ' * compiled}steps"):
        shuffled.shuffle(order)
        for name in order:
            start = clock(args)
            calls[name](turn + 2)
            if turn >= 0:  # the first two warm up
                times[name].append((clock(args) - start) * 1e3)
        gc.collect()
    gc.enable()
    result = {name: {"min": min(of_name), "median": statistics.median(of_name)} for name, of_name in times.items()}
    for norm in [*NORMS, "none"]:
        rounds = zip(times["LayerNorm"], times[norm], strict=True)
        result[norm]["ratio"] = median_interval([first / other for first, other in rounds])
    write_json(file, result)
    return result


def clock(args):
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def norms_alone(modules, args):
    xs = [torch.randn(args.batch, args.context, args.width, device=args.device, requires_grad=True) for _ in modules]
    dys = [torch.randn_like(x) for x in xs]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return lambda turn: torch.autograd.grad([module(x) for module, x in zip(modules, xs, strict=True)], [*xs, *parameters], dys)


# What a result depends on; a folder holds results of one such setting, and of any seeds and placements.
SETTINGS = ("steps", "width", "layers", "heads", "context", "batch", "rate", "validate", "evaluate_every", "device", "rounds")


def claim_folder(args):
    """The settings, written to the folder, or compared with those that are there."""
    settings = {name: getattr(args, name) for name in SETTINGS} | machine(args.device)
    settings["text"] = hashlib.sha256(b"\0".join(text())).hexdigest()[:16]
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "settings.json"
    if not file.exists():
        write_json(file, settings)
    there = json.loads(file.read_text())
    different = [f"{name} was {there.get(name)!r}, is {now!r}" for name, now in settings.items() if there.get(name) != now]
    if different:
        sys.exit(f"{args.folder} holds runs of other settings: {'; '.join(different)}. Choose another --folder.")
    return settings


def measure_train(args):
    try:
        from tqdm import tqdm
    except ImportError:
        sys.exit('Progress bars need tqdm: pip install tqdm, or this package with its extra "benchmarks".')
    if args.png:
        pyplot()  # or it would be missed after the runs
    settings = claim_folder(args)
    placements, seeds = args.placement.split(","), [int(seed) for seed in args.seeds.split(",")]
    runs = [(norm, placement, seed) for seed in seeds for placement in placements for norm in NORMS]
    with tqdm(total=len(runs) * args.steps, unit="step", mininterval=5) as bar:
        runs = [train_run(*run, args, bar) for run in runs]
    progress = functools.partial(tqdm, mininterval=5)
    kinds = ["eager", "compiled"] if args.compile else ["eager"]
    steps = {place: {kind: time_steps(place, kind == "compiled", args, progress) for kind in kinds} for place in placements}
    for run in runs:  # more digits than a chart shows would be most of the file
        run["train"] = [round(loss, 4) for loss in run["train"]]
        run["validation"] = [[step, round(loss, 5)] for step, loss in run["validation"]]
    sizes = dict(zip(("train_bytes", "validation_bytes"), map(len, text()), strict=True))
    sizes["parameters"] = sum(p.numel() for p in Model(torch.nn.LayerNorm, "pre", args).parameters())
    return {"settings": settings | sizes, "runs": runs, "steps": steps}


# ---------------------------------------------------------------- train: statistics


def student_t(degrees, probability=0.975):
    """The quantile of Student's distribution: with t = sqrt(degrees) tan(u) its density is a power of cos(u)."""

    def area(t):
        n, end = 400, math.atan(t / math.sqrt(degrees))
        weights = [1, *([4, 2] * (n // 2 - 1)), 4, 1]  # Simpson's
        total = sum(weight * math.cos(end * i / n) ** (degrees - 1) for i, weight in enumerate(weights)) * end / n / 3
        return total * math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < probability - 0.5 else (low, middle)
    return low


def interval(differences):
    """Mean and half the width of its 95 % confidence interval, which one value does not have."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.inf
    return mean, student_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))


def median_interval(values):
    """The median with the ends of its 95 % confidence interval, which are ranks: outliers do not matter."""
    values, rank, tail = sorted(values), 0, 0.0
    while (tail := tail + math.comb(len(values), rank) / 2 ** len(values)) <= 0.025:
        rank += 1
    ends = (values[rank - 1], values[-rank]) if rank else (0.0, math.inf)
    return ends[0], statistics.median(values), ends[1]


def paired(report, placement, norm, other, value):
    """value(run) with one norm, less that with the other, for each seed."""
    of = {name: {run["seed"]: value(run) for run in select(report, placement, name)} for name in (norm, other)}
    return [of[norm][seed] - of[other][seed] for seed in of[norm]]


def select(report, placement, norm):
    return [run for run in report["runs"] if (run["placement"], run["norm"]) == (placement, norm)]


# ---------------------------------------------------------------- train: report


def judge_loss(placement, norm, mean, half, layer_norm):
    """A sentence on the difference to LayerNorm's final validation loss."""
    if not math.isfinite(mean):
        return f"{placement}-norm, {norm}: a run diverged."
    if not math.isfinite(half):
        return f"{placement}-norm, {norm}: one seed, so no interval and no statement."
    where = f"{placement}-norm, {norm}: the difference's interval, {mean - half:+.4f} to {mean + half:+.4f},"
    if abs(mean) <= half:
        most = abs(mean) + half
        within = f"{most:.4f} ({most / layer_norm:.2%} of the loss)"
        return f"{where} contains 0: no difference is shown, and none beyond {within} lies in it."
    than = "lower" if mean < 0 else "higher"
    return f"{where} excludes 0: the loss is {than} than LayerNorm's, by {abs(mean) / layer_norm:.2%}."


def judge_step(placement, kind, norm, times):
    """A sentence on a step's time beside LayerNorm's in the same round."""
    low, middle, high = times[norm]["ratio"]
    where = f"{placement}-norm, {kind}, {norm}: LayerNorm's time over its, {middle:.3f}, interval {low:.3f} to {high:.3f},"
    if low <= 1 <= high:
        return f"{where} contains 1: no difference is shown{', and 5 % is outside of it' if high < CLAIM[0] else ''}."
    if high < 1:
        return f"{where} is below 1: slower than LayerNorm."
    claimed = "less than 5 %" if middle < CLAIM[0] else "5-15 %, as claimed" if middle <= CLAIM[1] else "more than 15 %"
    return f"{where} is above 1: faster, by {claimed}."


def share(times, norm):
    """Norms' share of a step: measured alone (eager only), and what the step loses without them."""
    alone, whole = times.get(f"{norm} alone"), times[norm]
    return (alone["median"] / whole["median"] if alone else None), 1 - whole["ratio"][1] / times["none"]["ratio"][1]


def write_train(report):
    """The Markdown of a report on training."""
    s = report["settings"]
    seeds = sorted({run["seed"] for run in report["runs"]})
    lines = ["# LayerNorm or RMSNorm, in training", "", *describe(report), ""]
    lines += [
        f"A decoder of {s['parameters']:,} parameters (width {s['width']}, {s['layers']} layers, {s['heads']} heads, context "
        f"{s['context']}), {s['steps']} steps of {s['batch']} x {s['context']} bytes, AdamW with a rate of {s['rate']:g}, fp32. "
        "Text: Python's topics and docstrings, "
        f"{s['train_bytes']:,} bytes to train on and {s['validation_bytes']:,} others to validate with (sha256 {s['text']}). "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; a seed's weights and batches are the same for all norms. "
        "Losses are nats a byte.",
        "",
        "| placement | norm | final validation loss | less LayerNorm's | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    quality, speed = [], []
    for place in report["steps"]:
        finals = {norm: [run["final"] for run in select(report, place, norm)] for norm in NORMS}
        for norm in NORMS:
            deviation = f" ± {statistics.stdev(finals[norm]):.4f}" if len(seeds) > 1 else ""
            cells = [place, norm, f"{statistics.fmean(finals[norm]):.4f}{deviation}", "", ""]
            if norm != "LayerNorm":
                mean, half = interval(paired(report, place, norm, "LayerNorm", lambda run: run["final"]))
                cells[3:] = f"{mean:+.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else ""
                quality.append(judge_loss(place, norm, mean, half, statistics.fmean(finals["LayerNorm"])))
            lines.append("| " + " | ".join(cells) + " |")
        ours = paired(report, place, "rmsnorm_cuda.RMSNorm", "torch.nn.RMSNorm", lambda run: run["final"])
        apart = max(map(abs, ours))
        quality.append(f"{place}-norm: our RMSNorm and torch's, two kernels of one formula, end at most {apart:.5f} apart.")
    lines += ["", "± is the standard deviation over the seeds.", "", *("- " + sentence for sentence in quality), ""]
    lines += [
        "| placement | | norm | step, ms: median | minimum | LayerNorm's over it: median of rounds | 95 % interval "
        "| norms' share: alone | by leaving them out |",
        "|---" * 9 + "|",
    ]
    for place, kinds in report["steps"].items():
        for kind, times in kinds.items():
            for norm in [*NORMS, "none"]:
                low, middle, high = times[norm]["ratio"]
                alone, without = ("", "")
                if norm != "none":
                    alone, without = (f"{part:.1%}" if part is not None else "" for part in share(times, norm))
                    if norm != "LayerNorm":
                        speed.append(judge_step(place, kind, norm, times))
                lines.append(f"| {place} | {kind} | {norm} | {times[norm]['median']:.1f} | {times[norm]['min']:.1f} | "
                             f"{middle:.3f} | {low:.3f} to {high:.3f} | {alone} | {without} |")  # fmt: skip
            low, middle, high = times["none"]["ratio"]
            speed.append(f"{place}-norm, {kind}: LayerNorm's step takes {middle:.3f} ({low:.3f} to {high:.3f}) times as long as one "
                         "without norms: no norm can gain more.")  # fmt: skip
    lines += [
        "",
        f"Steps and norms alone take turns in one process, {s['rounds']} rounds in shuffled order; the interval is that "
        "of the median of the rounds' ratios, by ranks. Share, alone: the step's norm "
        "modules, forward and backward over activations of their own, over the step; by leaving them out: what a step of the same "
        "model without norms (\"none\") takes less, which differs from the former by what else the norms push out of the caches, "
        "and by noise.",
        "",
        *("- " + sentence for sentence in speed),
    ]
    return "\n".join(lines) + "\n"


def draw_loss(report, file):
    """Validation losses with the range over seeds; below them the paired difference to LayerNorm, with its interval."""
    plt = pyplot()
    places = list(report["steps"])
    fig, axes = plt.subplots(2, len(places), figsize=(5.5 * len(places), 7.5), squeeze=False, sharex=True, sharey="row")
    for place, (top, bottom) in zip(places, axes.T, strict=True):
        for norm, dashes in zip(NORMS, ("-", "--", ":"), strict=True):
            runs = select(report, place, norm)
            steps = [step for step, _ in runs[0]["validation"]]
            values = list(zip(*([loss for _, loss in run["validation"]] for run in runs), strict=True))
            (line,) = top.plot(steps, list(map(statistics.fmean, values)), dashes, label=norm)
            band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            top.fill_between(steps, list(map(min, values)), list(map(max, values)), **band)
            if norm == "LayerNorm":
                bottom.axhline(0, color=line.get_color(), label=norm)
                continue
            values = [paired(report, place, norm, "LayerNorm", lambda run, i=i: run["validation"][i][1]) for i in range(len(steps))]
            pairs = list(map(interval, values))
            bottom.plot(steps, [mean for mean, _ in pairs], dashes, color=line.get_color(), label=norm)
            if math.isfinite(pairs[0][1]):
                low, high = zip(*((mean - half, mean + half) for mean, half in pairs), strict=True)
                bottom.fill_between(steps, low, high, **band)
        top.set_title(f"{place}-norm: loss on a part of the validation text; mean and range, {len(runs)} seeds", fontsize=9)
        bottom.set_title("less LayerNorm's, paired by seed, 95 % interval", fontsize=9)
        bottom.set_xlabel("step")
        top.legend(fontsize=8)
        bottom.legend(fontsize=8)
    axes[0, 0].set_ylabel("nats a byte")
    axes[1, 0].set_ylabel("difference, nats a byte")
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def draw_steps(report, file):
    """A step's median time with each norm, the norms' own part of it, and its minimum."""
    plt = pyplot()
    panels = [(f"{place}-norm, {kind}", times) for place, kinds in report["steps"].items() for kind, times in kinds.items()]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.4), squeeze=False)
    names = [*NORMS, "none"]
    for (heading, times), axis in zip(panels, axes[0], strict=True):
        axis.bar(names, [times[name]["median"] for name in names], color="#9db8d2", label="step, median")
        alone = [times[f"{name} alone"]["median"] if f"{name} alone" in times else 0 for name in names]
        if any(alone):
            axis.bar(names, alone, color="#c44e52", label="its norms alone, median")
        axis.plot(names, [times[name]["min"] for name in names], "_", color="black", markersize=18, label="step, minimum")
        for place, name in enumerate(names):
            label = f"{times[name]['ratio'][1]:.2f}x"
            axis.annotate(label, (place, times[name]["median"]), ha="center", va="bottom", fontsize=7)
        axis.set_title(f"{heading}\n(x: LayerNorm's time over it)", fontsize=8)
        axis.set_xticks(range(len(names)), [name.replace(".RMS", "\n.RMS") for name in names], fontsize=6)
        axis.margins(y=0.1)
    axes[0, 0].set_ylabel("ms")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="lower center", ncols=3)
    fig.suptitle(title(report), fontsize=8)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.savefig(file, dpi=110)


def draw_train(report, file):
    """Two charts beside `file`: NAME-loss.png and NAME-steps.png."""
    file = Path(file)
    draw_loss(report, file.with_name(f"{file.stem}-loss{file.suffix}"))
    draw_steps(report, file.with_name(f"{file.stem}-steps{file.suffix}"))


# ---------------------------------------------------------------- both


def describe(report):
    m = report["machine"]
    where = f"{m['gpu']}; " if "gpu" in m else ""
    return [
        f"    {report['command']}",
        "",
        f"{where}{m['processor']}, {m['isa']}, {m['threads']} thread(s); torch {m['torch']}, Python {m['python']}, "
        f"rmsnorm_cuda {m['rmsnorm_cuda']}. On a shared machine take differences under 10 % for noise.",
    ]


def title(report):
    m = report["machine"]
    return f"{m.get('gpu', m['processor'] + ', ' + m['isa'])}, {m['threads']} thread(s), torch {m['torch']}"


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ops, train = commands.add_parser("ops", help="op by op"), commands.add_parser("train", help="end to end")
    for command in (ops, train):
        command.add_argument("--device", default="cpu")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--json")
        command.add_argument("--png", help="charts, of train two: NAME-loss.png and NAME-steps.png; needs matplotlib")
        command.add_argument("--md", help="a table, and sentences made from its numbers")
        command.add_argument("--from", dest="source", metavar="FILE", help="a JSON to make --png and --md from again")
    ops.add_argument("--dtypes", default="fp32,bf16")
    ops.add_argument("--shapes", default="1x4096,64x1024,2048x128,2048x768,2048x4096,8192x128")
    ops.add_argument("--seconds", type=float, default=1.0, help="for each contender in a cell")
    ops.add_argument("--calls", type=int, default=50, help="on CUDA, instead")
    ops.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    train.add_argument("--placement", default="pre,post")
    train.add_argument("--seeds", default="0,1,2,3")
    train.add_argument("--steps", type=int, default=200)
    train.add_argument("--width", type=int, default=128)
    train.add_argument("--layers", type=int, default=3)
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--context", type=int, default=128)
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--rate", type=float, default=1e-3, help="of learning, at its highest")
    train.add_argument("--validate", type=int, default=65536, help="bytes of the final validation")
    train.add_argument("--evaluate-every", type=int, default=20)
    train.add_argument("--checkpoint-every", type=int, default=50)
    train.add_argument("--rounds", type=int, default=40, help="of timed steps")
    train.add_argument("--compile", action="store_true", help="time steps under torch.compile too")
    train.add_argument("--folder", type=Path, default=Path("build/layernorm-vs-rmsnorm"), help="of finished runs and checkpoints")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    ops = args.command == "ops"
    measure, write, draw = (measure_ops, write_ops, draw_ops) if ops else (measure_train, write_train, draw_train)
    if args.source:
        report = json.loads(Path(args.source).read_text())
    else:
        torch.set_num_threads(args.threads)
        line = "python benchmarks/layernorm_vs_rmsnorm.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        report = {"command": line, "machine": machine(args.device)} | measure(args)
    markdown = write(report)
    if args.json:
        write_json(args.json, report)
    if args.png:
        draw(report, args.png)
    if args.md:
        Path(args.md).write_text(markdown)
    else:
        print(markdown, end="")


if __name__ == "__main__":
    main()
