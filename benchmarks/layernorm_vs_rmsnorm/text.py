"""The text that is trained on: the documentation that ships with Python, in bytes."""

import ast
import functools
import sys
import sysconfig
from pathlib import Path

import torch


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
            strings = (
                ast.get_docstring(node)
                for node in nodes
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            )
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
    """Inputs and targets, by seed and step alone: a run that goes on sees the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # which heeds 32 bits of it
    starts = torch.randint(len(train) - args.context, (args.batch,), generator=generator)
    rows = train[(starts[:, None] + torch.arange(args.context + 1)).to(train.device)]
    return rows[:, :-1], rows[:, 1:]


def windows(validation, size, args):
    """About `size` bytes of rows that do not overlap, spread over the text."""
    rows = validation[: (len(validation) - 1) // args.context * args.context + 1].unfold(
        0, args.context + 1, args.context
    )
    return rows[:: max(1, len(rows) * args.context // size)]
