"""In training: runs that can be cut off, and the times of their steps.

For each seed the three norms get the same initial weights and the same batches, so losses are
compared in pairs. Finished runs and checkpoints lie in --folder: the same command goes on where it
was cut off and, on the CPU, ends with the bits of a run that was not. Steps are timed apart from
the runs, the norms taking turns.
"""

import functools
import gc
import hashlib
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import pyplot
from benchmarks.layernorm_vs_rmsnorm.intervals import median_interval
from benchmarks.layernorm_vs_rmsnorm.model import NORMS, Model, build, evaluate, rate_of, step_once
from benchmarks.layernorm_vs_rmsnorm.text import batch, text, tokens, windows
from rmsnorm_cuda.bench.machine import machine


def write_whole(file, write):
    """A file that is there has all of its content, whenever the process dies."""
    unfinished = file.with_name(file.name + ".part")
    write(unfinished)
    os.replace(unfinished, file)


def write_json(file, value):
    write_whole(Path(file), lambda path: path.write_text(json.dumps(value) + "\n"))


def train_run(norm, placement, seed, args, bar):
    """The losses of one run, from where the folder says that it stands."""
    done, checkpoint = (
        args.folder / f"{placement}-{norm}-{seed}.{ending}" for ending in ("json", "pt")
    )
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
        losses.append(
            step_once(model, optimizer, batch(train, seed, step, args), rate_of(step, args))
        )
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

    All take turns, in an order that is shuffled every round. A step has a learning rate of 0, so
    that the model without norms stays what it was. Norms alone are as many modules as the model
    has, forward and then backward, each over activations of its own.
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
        calls[norm] = lambda turn, runs=runs, optimizer=optimizer: step_once(
            runs, optimizer, batch(train, 0, turn, args), 0.0
        )
        if norm != "none" and not compiled:
            calls[f"{norm} alone"] = norms_alone(
                [part for part in model.modules() if isinstance(part, NORMS[norm])], args
            )
        calls[norm](0)
    times = {name: [] for name in calls}
    order = list(calls)
    shuffled = random.Random(0)
    gc.disable()
    for turn in progress(
        range(-2, args.rounds), desc=f"{placement}: timing {'compiled ' * compiled}steps"
    ):
        shuffled.shuffle(order)
        for name in order:
            start = clock(args)
            calls[name](turn + 2)
            if turn >= 0:  # the first two warm up
                times[name].append((clock(args) - start) * 1e3)
        gc.collect()
    gc.enable()
    result = {
        name: {"min": min(of_name), "median": statistics.median(of_name)}
        for name, of_name in times.items()
    }
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
    xs = [
        torch.randn(args.batch, args.context, args.width, device=args.device, requires_grad=True)
        for _ in modules
    ]
    dys = [torch.randn_like(x) for x in xs]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return lambda turn: torch.autograd.grad(
        [module(x) for module, x in zip(modules, xs, strict=True)], [*xs, *parameters], dys
    )


# What a result depends on; a folder holds results of one such setting, and of any seeds and
# placements.
SETTINGS = (
    "steps",
    "width",
    "layers",
    "heads",
    "context",
    "batch",
    "rate",
    "validate",
    "evaluate_every",
    "device",
    "rounds",
)


def claim_folder(args):
    """The settings, written to the folder, or compared with those that are there."""
    settings = {name: getattr(args, name) for name in SETTINGS} | machine(args.device)
    settings["text"] = hashlib.sha256(b"\0".join(text())).hexdigest()[:16]
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "settings.json"
    if not file.exists():
        write_json(file, settings)
    there = json.loads(file.read_text())
    different = [
        f"{name} was {there.get(name)!r}, is {now!r}"
        for name, now in settings.items()
        if there.get(name) != now
    ]
    if different:
        sys.exit(
            f"{args.folder} holds runs of other settings: {'; '.join(different)}. Choose another "
            "--folder."
        )
    return settings


def measure_train(args):
    try:
        from tqdm import tqdm
    except ImportError:
        sys.exit(
            "Progress bars need tqdm: pip install tqdm, or this package with its extra "
            '"benchmarks".'
        )
    if args.png:
        pyplot()  # or it would be missed after the runs
    settings = claim_folder(args)
    placements, seeds = args.placement.split(","), [int(seed) for seed in args.seeds.split(",")]
    runs = [(norm, placement, seed) for seed in seeds for placement in placements for norm in NORMS]
    with tqdm(total=len(runs) * args.steps, unit="step", mininterval=5) as bar:
        runs = [train_run(*run, args, bar) for run in runs]
    progress = functools.partial(tqdm, mininterval=5)
    kinds = ["eager", "compiled"] if args.compile else ["eager"]
    steps = {
        place: {kind: time_steps(place, kind == "compiled", args, progress) for kind in kinds}
        for place in placements
    }
    for run in runs:  # more digits than a chart shows would be most of the file
        run["train"] = [round(loss, 4) for loss in run["train"]]
        run["validation"] = [[step, round(loss, 5)] for step, loss in run["validation"]]
    sizes = dict(zip(("train_bytes", "validation_bytes"), map(len, text()), strict=True))
    sizes["parameters"] = sum(
        p.numel() for p in Model(torch.nn.LayerNorm, "pre", args).parameters()
    )
    return {"settings": settings | sizes, "runs": runs, "steps": steps}
