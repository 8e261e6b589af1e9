"""Which norms of other libraries replace_rms_norm() swaps: each class, its family or why it stays.

    python benchmarks/norm_classes.py transformers diffusers timm torchtitan fla \\
        --md benchmarks/results/norm_classes.md

Each class that is swapped is then compared with what takes its place on random draws of input size,
dtypes, and mode: results and gradients. One that differs is an error. Classes that want more than a
width to be built are listed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import inspect
import io
import pkgutil
import random
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent))
from rmsnorm_cuda.integrations.families import GatedFamily, twin
from rmsnorm_cuda.integrations.recognize import Recognized, gradients_differ, recognize, values_off

WIDTH = 96
ARGUMENTS = ({}, {"eps": 1e-6}, {"group_size": 32})  # beside the width
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTRIBUTIONS = {"fla": "flash-linear-attention"}


def norm_classes(library: str) -> Iterator[type[nn.Module]]:
    """Those that its modules define, as far as they can be imported here."""
    package = importlib.import_module(library)
    for info in pkgutil.walk_packages(package.__path__, f"{library}.", onerror=lambda name: None):
        if library == "transformers" and ".modeling_" not in info.name:
            continue
        if any(
            part.startswith(("test", "_test", "cli")) or part == "__main__"
            for part in info.name.split(".")
        ):
            continue
        try:
            module = importlib.import_module(info.name)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        for name, cls in sorted(vars(module).items()):
            if (
                isinstance(cls, type)
                and issubclass(cls, nn.Module)
                and "Norm" in name
                and cls.__module__ == info.name
            ):
                yield cls


def build(cls: type[nn.Module]) -> nn.Module | str:
    reason = ""
    first = next(iter(inspect.signature(cls).parameters), "")
    ways = [lambda options=options: cls(WIDTH, **options) for options in ARGUMENTS]
    if first == "eps":  # without a weight
        ways = [lambda: cls(eps=1e-6)]
    elif hasattr(cls, "Config"):  # torchtitan's
        ways = [
            lambda: cls.Config(normalized_shape=WIDTH).build(),
            lambda: cls.Config(dim=WIDTH).build(),
        ]
    for build_it in ways:
        try:
            return build_it()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = reason or f"it is not built from a width: {type(error).__name__}"
    return reason


def gradients(
    norm: nn.Module, given: list[torch.Tensor], towards: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    given = [t.clone().requires_grad_() for t in given]
    y = norm(*given)
    inputs = [*given, *norm.parameters()]
    return y.detach(), list(
        torch.autograd.grad((y.float() * towards).sum(), inputs, allow_unused=True)
    )


def compare(old: nn.Module, found: Recognized, draws: int) -> str:
    """In what the module and its twin differ; empty if in nothing."""
    values = unequal = 0
    for draw in range(draws):
        generator, dice = torch.Generator().manual_seed(draw), random.Random(draw)
        pair, training, size = (
            (dice.choice(DTYPES), dice.choice(DTYPES)),
            dice.random() < 0.5,
            10 ** dice.uniform(-6, 4),
        )
        theirs = copy.deepcopy(old).to(pair[1]).train(training)
        for parameter in theirs.parameters():
            parameter.data = (1 + torch.randn(parameter.shape, generator=generator) / 4).to(
                parameter.dtype
            )
        ours = twin(copy.deepcopy(theirs), *found)
        rows = torch.randn(dice.randint(1, 8), WIDTH, generator=generator)
        towards = torch.randn(rows.shape, generator=generator) + rows.sign()
        given, roundings = [(size * rows).to(pair[0])], 1
        if isinstance(found.family, GatedFamily):
            given.append(torch.randn(rows.shape, generator=generator).to(pair[0]))
            roundings = 2  # of an activation
        try:
            want, want_grads = gradients(theirs, given, towards)
        except Exception:
            if pair[0] == pair[1]:
                return f"it raises, for {pair[0]}"
            continue  # it does not take this mixture
        got, got_grads = gradients(ours, given, towards)
        where = f"for {pair[0]} and {pair[1]}, rows of size {size:.2g}, training={training}"
        # Of the values, and whether one is by more than a rounding.
        share, far = values_off(got, want, pair, roundings)
        values, unequal = values + got.numel(), unequal + round(share * got.numel())
        if far:
            return f"results differ {where}"
        grads = [*zip(got_grads, want_grads, strict=True)]
        if any(
            (a is None) != (b is None) or (a is not None and gradients_differ(a, b, pair))
            for a, b in grads
        ):
            return f"gradients differ {where}"
    # Near-ties of a rounding fall the other way in fewer; another order of roundings shows in more.
    return (
        f"{unequal / values:.1%} of the results are rounded otherwise"
        if unequal > 0.01 * values
        else ""
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--md", help="also write the list here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines, wrong = [], 0
    for library in args.libraries:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            classes = list(norm_classes(library))
        rows: dict[tuple[str, str], list[str]] = {}
        swapped = 0
        for cls in classes:
            norm = build(cls)
            if "rmsnorm" not in cls.__name__.lower() and (
                isinstance(norm, str) or any(True for _ in norm.children())
            ):
                continue  # a network, a layer with a norm in it
            found = norm if isinstance(norm, str) else recognize(norm)
            if isinstance(found, str):
                verdict = f"stays: {found}"
            else:
                difference = compare(norm, found, args.draws)
                verdict = (
                    f"**{difference}**" if difference else f"{found.family.name}, eps={found.eps}"
                )
                wrong, swapped = wrong + bool(difference), swapped + 1
            rows.setdefault((cls.__name__, verdict), []).append(cls.__module__)
        version = importlib.metadata.version(DISTRIBUTIONS.get(library, library))
        listed = sum(map(len, rows.values()))
        lines += [
            f"\n## {library} {version}\n",
            f"{listed} classes, {swapped} of them swapped.\n",
        ]
        start = len(lines) - 2
        for (name, verdict), modules in sorted(rows.items()):
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            text = f"- {name} in {modules[0].removeprefix(library + '.')}{more}: {verdict}"
            lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
        print("\n".join(lines[start:]), flush=True)
    if args.md:
        head = [
            "# Norms of other libraries, and what replace_rms_norm() makes of them\n",
            f"`python benchmarks/norm_classes.py {' '.join(args.libraries)}`, torch",
            f"{torch.__version__}, CPU.",
            "Each class that is swapped, named by its family, has been compared with what takes",
            f"its place on {args.draws} random draws of input size (1e-6 to 1e4), dtypes and mode:",
            f"results and gradients. {wrong} differ.",
        ]
        Path(args.md).write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
