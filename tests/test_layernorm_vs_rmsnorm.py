"""benchmarks/layernorm_vs_rmsnorm/: its statistics, its text, and runs that are cut off."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import rmsnorm_cuda

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("pydoc_data.topics", reason="this Python came without its documentation")
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.layernorm_vs_rmsnorm import __main__ as command
from benchmarks.layernorm_vs_rmsnorm import intervals, model, ops, train_report
from benchmarks.layernorm_vs_rmsnorm import text as data_of
from benchmarks.layernorm_vs_rmsnorm import train as training

TINY = (
    "--steps 6 --width 16 --layers 1 --heads 2 --context 16 --batch 2 "
    "--validate 512 --evaluate-every 2 --checkpoint-every 2 --rounds 2"
)


def train(folder, *more):
    """The report of a tiny training, its runs and checkpoints in `folder`."""
    command.main(
        [
            "train",
            *TINY.split(),
            "--folder",
            str(folder),
            "--json",
            f"{folder}.json",
            "--md",
            f"{folder}.md",
            *more,
        ]
    )
    return json.loads(Path(f"{folder}.json").read_text())


@pytest.fixture(autouse=True)
def restored():
    """Whatever the seeds and threads of a benchmark, the tests after it have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- statistics

QUANTILES = [
    (1, 12.7062),
    (2, 4.30265),
    (4, 2.77645),
    (10, 2.22814),
    (30, 2.04227),
    (100, 1.98397),
]  # of a printed table


@pytest.mark.parametrize("degrees, want", QUANTILES)
def test_student_t(degrees, want):
    assert intervals.student_t(degrees) == pytest.approx(want, rel=1e-5)


def test_interval():
    mean, half = intervals.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-5)
    assert intervals.interval([1.0]) == (1.0, math.inf)


def test_interval_of_the_median():
    values = [float(value) for value in range(1, 41)]
    assert intervals.median_interval(values[::-1]) == (14.0, 20.5, 27.0)  # ranks of a printed table
    assert intervals.median_interval([1.0, 2.0]) == (0.0, 1.5, math.inf)


def test_sentences_follow_the_numbers():
    def loss(mean, half):
        return train_report.judge_loss("pre", "RMSNorm", mean, half, 2.0)

    assert "contains 0" in loss(0.01, 0.02)
    assert "excludes 0: the loss is higher" in loss(0.03, 0.02)
    assert "excludes 0: the loss is lower" in loss(-0.03, 0.02)
    assert "one seed" in loss(0.01, math.inf)
    assert "diverged" in loss(math.nan, math.nan)

    def step(*ratio):
        return train_report.judge_step("pre", "eager", "RMSNorm", {"RMSNorm": {"ratio": ratio}})

    assert "slower" in step(0.8, 0.9, 0.95)
    assert step(0.9, 1.02, 1.04).endswith("no difference is shown, and 5 % is outside of it.")
    assert step(0.9, 1.02, 1.2).endswith("no difference is shown.")
    assert "faster, by less than 5 %" in step(1.01, 1.02, 1.03)
    assert "as claimed" in step(1.01, 1.1, 1.2)
    assert "more than 15 %" in step(1.2, 1.3, 1.4)


# ---------------------------------------------------------------- text


def test_text_is_python_documentation():
    from pydoc_data.topics import topics

    train, validation = data_of.text()
    assert len(train) > 300_000 and len(validation) > 30_000
    for known in (topics["assert"].split("\n\n")[1], topics["while"].split("\n\n")[1]):
        assert known.rstrip().encode() in train + validation


def test_split_is_disjoint():
    train, validation = (set(part.split(b"\n\n")) for part in data_of.text())
    assert not train & validation


def test_batches_are_a_function_of_seed_and_step():
    args = command.arguments(["train", *TINY.split()])
    data = data_of.tokens(data_of.text()[0])
    first, again, other, next_one = (
        training.batch(data, seed, step, args)[0] for seed, step in ((0, 1), (0, 1), (1, 1), (0, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, next_one)
    inputs, targets = training.batch(data, 3, 5, args)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


# ---------------------------------------------------------------- training


def test_weights_are_the_same_for_every_norm():
    args = command.arguments(["train", *TINY.split()])
    for placement in ("pre", "post"):
        states = [model.build(norm, placement, 3, args)[0].state_dict() for norm in model.NORMS]
        for state in states[1:]:  # LayerNorm has biases besides
            assert state.keys() <= states[0].keys()
            assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_cut_off_and_resumed(tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole", "--seeds", "0,1", "--png", str(tmp_path / "whole.png"))
    # Of the same text each time; losses of single batches may rise in 6 steps.
    curves = [[loss for _, loss in run["validation"]] for run in whole["runs"]]
    assert len(curves) == 2 * 2 * 3 and all(len(run["train"]) == 6 for run in whole["runs"])
    assert all(curve[-1] < curve[0] for curve in curves)

    batch, steps = training.batch, []

    def cut_off(data, seed, step, args):
        if len(steps) == 11:  # in the second run, between two checkpoints
            raise KeyboardInterrupt
        steps.append(step)
        return batch(data, seed, step, args)

    monkeypatch.setattr(training, "batch", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", "--seeds", "0,1")
    # The settings, one run, half of one.
    assert sorted(file.suffix for file in (tmp_path / "cut").iterdir()) == [".json", ".json", ".pt"]

    steps.clear()
    monkeypatch.setattr(training, "time_steps", lambda *args: whole["steps"]["pre"]["eager"])
    monkeypatch.setattr(training, "batch", lambda *args: steps.append(args[2]) or batch(*args))
    resumed = train(tmp_path / "cut", "--seeds", "0,1")
    assert steps[:3] == [4, 5, 0] and len(steps) == 2 + 10 * 6
    assert resumed["runs"] == whole["runs"]
    for file in (tmp_path / "whole").glob("*-[01].json"):  # every digit
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()

    # Finished runs are reused, also beside new ones, and other settings are kept apart from them.
    steps.clear()
    train(tmp_path / "cut", "--seeds", "0,2", "--placement", "post")
    assert len(steps) == 3 * 6
    with pytest.raises(SystemExit, match="steps was 6, is 8"):
        train(tmp_path / "cut", "--steps", "8")

    # Charts and Markdown come from the JSON alone.
    charts = ("whole-loss.png", "whole-steps.png")
    drawn = [(tmp_path / name).stat().st_size for name in charts]
    text = (tmp_path / "whole.md").read_text()
    assert (
        "| pre | rmsnorm_cuda.RMSNorm |" in text
        and "| post | eager | none |" in text
        and " 0: " in text
    )
    for name in (*charts, "whole.md"):
        (tmp_path / name).unlink()
    again = ["--png", str(tmp_path / "whole.png"), "--md", str(tmp_path / "whole.md")]
    command.main(["train", "--from", str(tmp_path / "whole.json"), *again])
    assert [(tmp_path / name).stat().st_size for name in charts] == drawn
    assert (tmp_path / "whole.md").read_text() == text


# ---------------------------------------------------------------- ops


def test_ops(tmp_path, capsys):
    files = {ending: str(tmp_path / f"ops.{ending}") for ending in ("json", "png", "md")}
    out = [f"--{ending}={file}" for ending, file in files.items()]
    command.main(["ops", "--shapes", "4x64", "--seconds", "0.005", "--no-compile", *out])
    report = json.loads(Path(files["json"]).read_text())
    cells = [(cell["dtype"], cell["mode"]) for cell in report["results"]]
    assert cells == [
        (dtype, mode) for dtype in ("fp32", "bf16") for mode in ("forward", "training")
    ]
    for cell in report["results"]:
        assert set(cell["us"]) == {"ours", "F.rms_norm", "F.layer_norm"}
        assert all(0 < us["min"] <= us["median"] for us in cell["us"].values())
    text = Path(files["md"]).read_text()
    assert (
        report["command"] in " ".join(text.replace("\\\n", "").split())  # it goes on by backslashes
        and "| fp32 4x64 | forward |" in text
        and "eager torch: LayerNorm takes" in text
    )
    assert Path(files["png"]).stat().st_size > 10_000
    command.main(["ops", "--from", files["json"], "--md", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text() == text


def test_ops_are_verified(monkeypatch, tmp_path):
    args = command.arguments(["ops", "--no-compile", "--seconds", "0.005"])
    monkeypatch.setattr(rmsnorm_cuda, "rms_norm", lambda x, *rest: x)
    with pytest.raises(AssertionError, match="ours, forward"):
        ops.time_op("4x64", "fp32", "forward", args)
