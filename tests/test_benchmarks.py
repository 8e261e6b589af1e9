"""The benchmark of the CPU: what it runs, and what it says of the figures."""

import argparse
import json
from pathlib import Path

import programs
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import cpu

    return cpu


def test_every_mode_in_every_state(tmp_path):
    file = tmp_path / "cells.json"
    words = ["--shapes", "3x128", "--dtypes", "fp32,bf16/fp32", "--states", "warm,l2"]
    words += ["--seconds", "0.001", "--no-compile", "--json", file, "--md", tmp_path / "table.md"]
    run = programs.run(file=ROOT / "benchmarks" / "cpu.py", arguments=words, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    cells = json.loads(file.read_text())["results"]
    modes = ("forward", "training", "fused", "quantized")
    assert len(cells) == 2 * 2 * len(modes)
    for mode in modes:
        for state in ("warm", "l2"):
            here = [cell["us"] for cell in cells if (cell["mode"], cell["state"]) == (mode, state)]
            assert len(here) == 2 and all(us["ours"] > 0 and us["floor"] > 0 for us in here)
    assert (tmp_path / "table.md").read_text().strip() in run.stdout
    for peer in ("vLLM", "SGLang"):
        assert f"without {peer}: no file of its kernels was named" in run.stdout


def test_buffers_of_a_cell_do_not_overlap_and_lie_alike_in_their_pages(cpu):
    sets = cpu.Pools().buffers(5, 72, torch.float32, 3)
    starts = sorted(t.data_ptr() for s in sets for t in s)
    assert all(
        later - start >= 5 * 72 * 4 for start, later in zip(starts, starts[1:], strict=False)
    )
    for name in ("x", "other", "out", "total"):
        places = {getattr(s, name).data_ptr() % 4096 for s in sets}
        assert len(places) == 1


def test_cold_cell_is_larger_than_the_caches(cpu):
    pools = cpu.Pools()
    bytes_of = {}
    for state in ("warm", "l2", "cold"):
        cell = cpu.Cell(pools, 256, 1024, torch.float32, torch.float32, state)
        bytes_of[state] = 2 * len(cell.sets) * cell.bytes
    assert len(cpu.Cell(pools, 256, 1024, torch.float32, torch.float32, "warm").sets) == 1
    assert bytes_of["l2"] >= 2 * cpu.L2_BYTES and bytes_of["cold"] >= 256 << 20


def test_summary_compares_what_is_made_alike_and_names_the_losses(cpu):
    us = {"ours": 10, "ours out=": 5, "vLLM": 9, "vLLM out=": 20, "F.rms_norm": 40, "floor": 4}
    us |= {"F.layer_norm": 1, "empty_like": 1, "ours module": 11}
    cell = {"mode": "forward", "dtype": "fp32", "state": "cold", "threads": 2, "us": us}
    other = cell | {"shape": "2x2", "us": us | {"vLLM": 40}}
    text = cpu.summary([cell | {"shape": "1x1"}, other])
    assert "| | fp32 2 T |\n|---|---|\n| forward new, cold | 1.90 |\n" in text
    assert "| forward out=, cold | 4.00 |" in text
    assert "| | vLLM | F.rms_norm | ours / floor |" in text
    assert "| forward new, cold | 1.90 | 4.00 | 2.50 |" in text
    assert "Behind by more than 3 %: 1 of 4 cells." in text
    assert "- 0.90 vLLM: forward new fp32 1x1, 2 T, cold" in text


def test_chart_has_a_dot_for_each_cell_and_library(cpu, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    us = {"ours": 10, "ours out=": 5, "vLLM": 9, "vLLM out=": 20, "F.rms_norm": 40, "floor": 4}
    cell = {"mode": "forward", "dtype": "fp32", "shape": "1x1", "threads": 2, "us": us}
    cells = [cell | {"state": state} for state in ("cold", "warm")]
    cpu.report(cells, "avx2", argparse.Namespace(md=None, png=str(tmp_path / "chart.png")))
    axis = plt.gcf().axes[0]
    dots = {line.get_label(): sorted(line.get_xdata()) for line in axis.get_lines()[:2]}
    assert dots == {"vLLM": [0.9, 0.9, 4, 4], "F.rms_norm": [4, 4]}
    lines = [text.get_text() for text in axis.get_yticklabels()]
    assert lines == [f"forward {kind}, {s}" for kind in ("new", "out=") for s in ("warm", "cold")]
    assert (tmp_path / "chart.png").stat().st_size > 0


def test_wrong_peer_is_found_before_it_is_timed(cpu):
    cell = cpu.Cell(cpu.Pools(), 4, 64, torch.float32, torch.float32, "warm")
    runs = cell.forward(())
    cpu.verify(cell, "forward", runs)
    with pytest.raises(AssertionError, match="wrong: .* ulp"):
        cpu.verify(cell, "forward", runs | {"wrong": lambda s: s.x * 1.01})
    fused = cell.fused(())
    cpu.verify(cell, "fused", fused)
    with pytest.raises(AssertionError, match="wrong"):
        cpu.verify(cell, "fused", fused | {"wrong in place": lambda s: s.out.mul_(1.01)})


def test_rope(monkeypatch):
    """Each contender gives what fp64 gives, and a wrong one is seen."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import families, rope

    cell = rope.Cell(3, [2, 1], 64, torch.bfloat16, torch.float32)
    runs = cell.forward(compiled=())
    cell.verify(runs)
    shifted = {"shifted": lambda s: [t + 0.25 for t in runs["ours"](s)]}
    with pytest.raises(AssertionError, match="shifted"):
        cell.verify(shifted)
    training = cell.training(compiled=())
    grads = {name: run(cell.sets[0]) for name, run in training.items()}
    for ours, steps in zip(grads["ours"], grads["steps"], strict=True):
        torch.testing.assert_close(ours, steps, rtol=0.05, atol=0.1)
    us = {"ours": 2.0, "steps": 8.0}
    cells = [
        {"mode": "forward", "dtype": "bf16", "tokens": n, "threads": n, "us": us} for n in (1, 2)
    ]
    told = families.summary(cells)
    assert "| 1 bf16 | 2 | 8 |" in told and "| 2 bf16, 2 threads |" in told
    assert "geometric means: steps 4.00." in told


@pytest.mark.parametrize("family", ["qwen3-next", "mamba2", "nemotron-h"])
def test_gated(family, monkeypatch):
    """Eager code of the family gives what fp64 gives, and a wrong one is seen."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import families, gated

    cell = gated.Cell(family, 3, torch.bfloat16, torch.float32)
    runs = cell.forward(compiled=False)
    cell.verify(runs)
    with pytest.raises(AssertionError, match="wrong"):
        cell.verify({"wrong": lambda s: runs["ours"](s) * 1.05})
    training = cell.training(compiled=False)
    grads = {name: run(cell.sets[0]) for name, run in training.items()}
    for ours, eager in zip(grads["ours"], grads["eager"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.1)
    values = {}
    for name, run in cell.quantized(compiled=False).items():
        codes, scale = run(cell.sets[0])
        values[name] = codes.float() * scale
    for name in ("ours, then torch", "eager"):  # a tie may fall to the other of two codes
        torch.testing.assert_close(values["ours"], values[name], rtol=0.13, atol=0.01)
    where = {"family": family, "tokens": 3, "dtype": "bf16", "threads": 1}
    told = families.summary([{"mode": "forward"} | where | {"us": {"ours": 2.0, "eager": 6.0}}])
    assert "| family, tokens | ours | eager |" in told and f"| {family} 3 bf16 | 2 | 6 |" in told
    assert "geometric means: eager 3.00." in told
