"""What the cases share: SmolLM2-135M with our norms, text to read, and what is printed of a run."""

import copy
import functools
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import torch

import rmsnorm_cuda
from benchmarks import generate

TOKENS, STEPS = 32, 6
TEXT = ROOT / "LICENSE"  # nobody edits it


@functools.cache
def _model_and_text():
    torch.set_num_threads(1)
    tokenizer, weights = generate.load()
    model = generate.build(weights, torch.float32, torch.device("cpu"))
    rmsnorm_cuda.replace_rms_norm(model)
    return model, tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, 64:]


def load(dtype=torch.float32):
    """The model, to be spoilt, and a batch of text for each step."""
    model, ids = _model_and_text()
    return copy.deepcopy(model).to(dtype), list(ids[:, : STEPS * TOKENS].split(TOKENS, 1))


def show(m, losses):
    """Prints the loss of each step, and the first alarm of each kind."""
    print("loss", *(f"{loss.item():.2f}" for loss in losses))
    for kind in dict.fromkeys(alarm.kind for alarm in m.alarms):
        first, *others = (alarm for alarm in m.alarms if alarm.kind == kind)
        more = f" (and {len(others)} more)" if others else ""
        print(f"step {first.step}: {kind}: {first.norm.removeprefix('model.')}{more}:")
        print(textwrap.indent(textwrap.fill(first.message, 90), "  "))
    if not m.alarms:
        print("no alarms")
