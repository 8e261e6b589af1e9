"""`python -m rmsnorm_cuda bench`: values first, the time kept, what it prints and writes."""

import io
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch

from rmsnorm_cuda import __main__ as main
from rmsnorm_cuda.bench import buffers, cells, command, machine, timing
from rmsnorm_cuda.bench.cells import COMPILED

ROOT = Path(__file__).parents[1]
TINY = cells.specs(tokens=(1, 3), cols=64, heads=(2, 1), width=8)
RMS_NORM = cells.FORMULAS["F.rms_norm"]
BESIDE = {"ours", "F.rms_norm", "llama", "copy"}


def bench(capsys, **options):
    """(status, lines on stdout, lines of the progress)."""
    stream = io.StringIO()
    options = {"check": lambda: 0, "specs": TINY, "minutes": 5, "device": "cpu"} | options
    status = command.run(**options, stream=stream)
    return status, capsys.readouterr().out.splitlines(), stream.getvalue().splitlines()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without torch.compile, and with few rounds."""
    monkeypatch.setattr(cells, "compiled_of", lambda steps, names: {COMPILED: steps(RMS_NORM)})
    monkeypatch.setattr(command, "MOST_SECONDS", 0.002)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


def checked():
    print("self-check cpu scalar: 7 comparisons with fp64; worst in ulps: forward 1.00 (limit 1)")
    return 0


def test_table_and_report(capsys, tmp_path):
    file = tmp_path / "report.json"
    status, lines, progress = bench(capsys, check=checked, file=file)
    report = json.loads(file.read_text())
    assert status == 0 and report["schema"] == 1 and not command.problems(report)
    assert report["left_out"] == {} and report["self_check"][0].startswith("self-check cpu scalar")
    told = report["machine"]
    assert told["threads"] == torch.get_num_threads() and told["torch"] == torch.__version__
    assert {"processor", "isa", "commit", "governor", "load", "l3_bytes"} <= set(told)
    assert str(Path.home()) not in file.read_text() and str(ROOT) not in file.read_text()
    assert [(c["mode"], c["dtype"], c["shape"]) for c in report["cells"]] == [
        (s.mode, s.dtype, s.shape) for s in TINY
    ]
    for cell in report["cells"]:
        wanted = BESIDE | {COMPILED} | ({"ours in place"} if cell["mode"] == "fused" else set())
        assert set(cell["us"]) == wanted and cell["left_out"] == {} and not cell["cold"]
        for of in cell["us"].values():
            assert 0 < of["min"] <= of["median"] and of["count"] >= 1
    assert f"{file} is written" in lines[-2] and max(map(len, lines[:-2])) <= 100
    assert any("values: 7 comparisons with fp64 passed" in line for line in lines)
    assert all(f"{title}:" in lines for title in cells.TITLES.values())
    rows = [line for line in lines if line.startswith(("1x", "3x"))]
    assert len(rows) == len(TINY) + 4 and all(row.count("x ") >= 3 for row in rows)  # in place
    assert len(progress) == 1 + len(TINY) and progress[-1].startswith(f"[{len(TINY)}/{len(TINY)}]")


def test_row():
    us = {"ours": 2.0, "F.rms_norm": 25.0, "llama": 1234.5, "copy": 1.0}
    us = {name: {"min": value / 2, "median": value, "count": 5} for name, value in us.items()}
    cell = {"mode": "forward", "dtype": "bf16", "shape": "1x64", "us": us, "left_out": {}}
    (row,) = list(command.table([cell]))[3:]
    fields = "1x64 bf16 2 1 25 12.5x - 1,234 617x 50%".split()  # of 1234.5: half to even
    assert row.split() == fields


def test_numbers():
    assert [command.number(us) for us in (1.234, 12.34, 123.4, 1234, 999_999, 1_100_000)] == [
        *("1.23", "12.3", "123", "1,234", "999,999", "1.10 s")
    ]
    assert [command.multiple(r) for r in (1, 12.34, 123.4)] == ["1.00x", "12.3x", "123x"]


def test_busy_machine_is_told(capsys, monkeypatch):
    said = "Other processes were busy: take no figure from this run."
    for load, busy in ((1.5, True), (0.5, False), (None, False)):
        told = machine.details() | {"load": load, "cores": 2}
        monkeypatch.setattr(command, "details", lambda device, told=told: told)
        assert (said in bench(capsys, specs=TINY[:1])[1]) == busy


def test_shapes_that_people_run():
    names = list(map(str, cells.specs()))
    assert len(names) == len(set(names)) == 21
    assert {"forward bf16 1x4096", "training bf16 2048x4096", "forward fp32 64x4096"} <= set(names)
    assert {f"rope bf16 {n}x(32+8)x128" for n in (1, 64, 2048)} <= set(names)


# ---------------------------------------------------------------- values


def test_failed_self_check(capsys):
    """Its report is what is printed; nothing is timed."""

    def check():
        print("FAILED  cpu scalar")
        return 1

    assert bench(capsys, check=check) == (1, ["FAILED  cpu scalar"], ["values: the self-check"])


def test_failed_self_check_of_the_command():
    arguments = ["bench", "--minutes", "0.01"]
    run = programs.run(module="rmsnorm_cuda", arguments=arguments, RMSNORM_CUDA_ISA="none")
    assert run.returncode == 1 and run.stdout.splitlines()[-1] == "FAILED", run.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", cells.MODES)
def test_wrong_result_is_seen(mode, dtype):
    heads = (2, 1) if mode == "rope" else ()
    cell = cells.MODES[mode](cells.Spec(mode, dtype, 3, 64, heads), buffers.Pools())
    for name, run in (cell.ours() | cell.beside()).items():
        cell.verify(name, run)
        for part in range(0 if name in ("copy", "ours in place") else 1 + (mode != "forward")):

            def wrong(s, run=run, part=part):
                made = run(s)
                made = list(made) if isinstance(made, (tuple, list)) else [made]
                made[part] = (made[part].float() * 1.3).to(made[part].dtype)
                return made

            with pytest.raises(cells.Wrong, match=f"^{name}.* from fp64, where .* is the limit"):
                cell.verify(name, wrong)


def test_wrong_contender(capsys, monkeypatch, tmp_path):
    """One of others is left out, with its reason; of ours the command fails."""
    monkeypatch.setitem(cells.FORMULAS, "llama", lambda x, weight: x)
    file = tmp_path / "report.json"
    status, lines, _ = bench(capsys, specs=TINY[:1], file=file)
    (cell,) = json.loads(file.read_text())["cells"]
    assert status == 0 and set(cell["us"]) == BESIDE - {"llama"} | {COMPILED}
    assert any(
        line.startswith("formula is left out of 1 of 1 cells: Wrong: llama") for line in lines
    )
    monkeypatch.setattr(cells.Forward, "ours", lambda self: {"ours": lambda s: s.x})
    status, (line,), _ = bench(capsys, specs=TINY[:1])
    assert status == 1 and line.startswith("FAILED  ours is ")


def test_large_cell_rotates_over_more_than_the_caches(monkeypatch):
    monkeypatch.setattr(cells, "rotation", lambda: 1 << 20)
    monkeypatch.setattr(cells, "SMALL_BYTES", 1 << 16)
    pools = buffers.Pools()
    small, large = (
        cells.Forward(cells.Spec("forward", "bf16", rows, 64), pools) for rows in (8, 1024)
    )
    assert len(small.sets) == 1 and not small.is_cold
    places = {s.x.data_ptr() for s in large.sets}
    assert large.is_cold and 2 * len(places) * large.sets[0].x.nbytes >= 1 << 20
    assert buffers.ROTATE_BYTES <= buffers.rotation() <= 1 << 30


# ---------------------------------------------------------------- the time


def test_time_is_kept(capsys, monkeypatch, tmp_path):
    """A call that takes too long is stopped, and what was not timed is named."""
    slow, file = cells.Spec("fused", "bf16", 1, 64), tmp_path / "report.json"
    ours = {"ours": lambda s: time.sleep(600)}
    monkeypatch.setattr(cells.FusedAdd, "ours", lambda self: ours)
    specs = [TINY[0], slow, TINY[3]]
    began = time.monotonic()
    status, lines, _ = bench(capsys, specs=specs, minutes=0.02, file=file)
    assert status == 0 and time.monotonic() - began < 20
    report = json.loads(file.read_text())
    assert report["left_out"] == {str(slow): "not finished", str(TINY[3]): "not begun"}
    assert f"not finished within --minutes 0.02: {slow}" in lines
    assert f"not begun within --minutes 0.02: {TINY[3]}" in lines
    assert len(report["cells"]) == 1


def test_deadline_of_a_loop():
    """One round is left of five, and the seconds do not hold."""
    calls = []
    times = timing.samples({"a": lambda x: calls.append(x)}, [1, 2], 60, deadline=0)
    assert len(times["a"]) == 1 and {1, 2} <= set(calls)


def test_compilation_is_stopped():
    compiling = command.Compiling(0.05)
    assert compiling.run(lambda: time.sleep(600))[1].startswith("it took longer than")
    assert compiling.run(lambda: 1)[1].startswith("no time was left for it")
    compiling = command.Compiling(60)
    assert compiling.run(lambda: 1) == (1, None)
    assert compiling.run(lambda: [][0]) == (None, "IndexError: list index out of range")


def test_stops_within_each_other():
    now = command.clock()
    with pytest.raises(command.OutOfTime), command.stop_at(now + 0.05):
        with command.stop_at(now + 600):
            pass
        time.sleep(600)
    ended = []

    def elsewhere():
        with command.stop_at(0):
            ended.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended


def test_compilation_that_fails(capsys, monkeypatch, tmp_path):
    """The reason is told, and the rest is timed."""

    def fails(steps, names):
        raise RuntimeError("no compiler was found\nand more")

    monkeypatch.setattr(cells, "compiled_of", fails)
    file = tmp_path / "report.json"
    status, lines, _ = bench(capsys, specs=TINY[:1], file=file)
    (cell,) = json.loads(file.read_text())["cells"]
    assert status == 0 and set(cell["us"]) == BESIDE
    reason = cell["left_out"][COMPILED]
    assert reason == "RuntimeError: no compiler was found"
    assert f"compiled is left out of 1 of 1 cells: {reason}" in lines


@pytest.mark.slow
def test_no_compiler(tmp_path):
    """As above, of torch.compile itself."""
    code = """if True:
        from rmsnorm_cuda.bench import cells, command
        specs = cells.specs(tokens=(1,), cols=64)[:1]
        command.run(lambda: 0, minutes=0.5, specs=specs, device="cpu", file="report.json")
    """
    none, cache = tmp_path / "none" / "g++", tmp_path / "cache"
    path = {"PYTHONPATH": str(Path(command.__file__).parents[2])}
    run = programs.run(
        code, cwd=tmp_path, CXX=str(none), TORCHINDUCTOR_CACHE_DIR=str(cache), **path
    )
    assert run.returncode == 0, run.stderr
    (cell,) = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert set(cell["us"]) == BESIDE and "compiler" in cell["left_out"][COMPILED].lower()
    assert "compiled is left out of 1 of 1 cells: " in run.stdout


# ---------------------------------------------------------------- a GPU, of stand-ins


class Gpu:
    """torch.cuda as event_samples uses it, on a clock that calls move."""

    def __init__(self):
        self.now, self.flushes = 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, later):
                return (later.at - self.at) * 1e3

        self.Event = Event

    def synchronize(self):
        pass

    def clock(self):
        return self.now

    def taking(self, us):
        def run(x):
            self.now += us * 1e-6

        return run

    def flush(self):
        self.flushes += 1
        self.now += 1e-3


def test_loop_of_events(monkeypatch):
    gpu = Gpu()
    runs = {"ours": gpu.taking(10), "copy": gpu.taking(5)}
    times, host = timing.event_samples(runs, None, gpu.flush, 3, cuda=gpu, clock=gpu.clock)
    assert (
        times == host == {name: pytest.approx([us] * 3) for name, us in (("ours", 10), ("copy", 5))}
    )
    assert gpu.flushes == 6
    # A round takes 2 ms of the clock: flushes.
    options = {"cuda": gpu, "clock": gpu.clock}
    times, _ = timing.event_samples(runs, None, gpu.flush, 99, deadline=gpu.now + 5e-3, **options)
    assert len(times["ours"]) == 3
    times, _ = timing.event_samples(runs, None, gpu.flush, 99, deadline=0, **options)
    assert len(times["ours"]) == 1


def test_timer_of_a_gpu(monkeypatch):
    gpu, loop = Gpu(), timing.event_samples
    monkeypatch.setattr(command, "clock", gpu.clock)
    monkeypatch.setattr(command, "flush_of", lambda device: gpu.flush)
    monkeypatch.setattr(
        command,
        "event_samples",
        lambda *args, deadline: loop(*args, deadline=deadline, cuda=gpu, clock=gpu.clock),
    )
    measure = command.timer("cuda")
    times, host = measure({"ours": gpu.taking(10)}, [None], 0.0035, 100)  # rounds of a millisecond
    assert len(times["ours"]) == len(host["ours"]) == 4
    times, _ = measure({"ours": gpu.taking(10)}, [None], 100, 1000)
    assert len(times["ours"]) == command.CALLS


def test_what_is_told_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(
        L2_cache_size=1, multi_processor_count=132, major=9, minor=0, total_memory=1 << 37
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    told = machine.details("cuda")
    assert told["gpu"].startswith("Some GPU, CUDA") and told["capability"] == "9.0"
    assert command.file_name(told).startswith("some-gpu-cuda-")
    assert timing.flush_of("cpu")().nbytes == 128 << 20


def test_what_a_system_does_not_tell(monkeypatch):
    def fails(*args, **options):
        raise OSError

    monkeypatch.setattr(machine.os, "getloadavg", fails)
    monkeypatch.setattr(machine.subprocess, "run", fails)
    monkeypatch.setattr(machine, "GOVERNOR", "/nowhere/governor")
    told = machine.details()
    assert told["load"] is told["governor"] is told["commit"] is None
    monkeypatch.setattr(machine.rmsnorm_cuda, "__file__", "/nowhere/rmsnorm_cuda/__init__.py")
    assert machine.commit() is None


# ---------------------------------------------------------------- the command and its reports


def test_progress_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = command.Progress(stream)
    progress.say("a" * 200)
    progress.say("b")
    progress.close()
    assert stream.getvalue() == f"\r\x1b[K{'a' * 99}\r\x1b[Kb\r\x1b[K"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--minutes", "0"], "a positive number of minutes"),
        (["--minutes", "nan"], "a positive number of minutes"),
        (["--minutes", "a"], "invalid positive value: 'a'"),
        (["--json", "/nowhere/report.json"], "/nowhere/report.json cannot be written"),
        (["--json", "/"], "/ cannot be written"),
    ],
)
def test_arguments(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rmsnorm_cuda", "bench", *words])
    with pytest.raises(SystemExit) as status:
        main.main()
    assert status.value.code == 2 and said in capsys.readouterr().err


def test_command(monkeypatch, tmp_path):
    """What it gives to run()."""
    asked = {}
    monkeypatch.setattr(command, "run", lambda check, **options: asked.update(options) or 7)
    file = tmp_path / "a.json"
    monkeypatch.setattr(
        sys, "argv", ["rmsnorm_cuda", "bench", "--minutes", "2", "--json", str(file)]
    )
    assert main.main() == 7 and asked == {"minutes": 2.0, "file": file}


@pytest.fixture
def machines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("benchmarks.machines", reason="the benchmarks are not here")


def test_table_of_machines(machines, tmp_path):
    assert machines.table(tmp_path) == "No report is there yet.\n"
    us = {"ours": 2.0, "F.rms_norm": 8.0}
    us = {name: {"min": value, "median": value, "count": 5} for name, value in us.items()}
    one = {"mode": "forward", "shape": "1x64", "us": us}
    told = {"device": "cpu", "processor": "Some (R) CPU", "isa": "avx2", "threads": 2, "torch": "2"}
    told |= {"load": 0.5, "cores": 2}
    report = {name: kind() for name, kind in command.FIELDS.items()}
    report |= {"schema": 1, "machine": told, "cells": [one]}
    file = tmp_path / "some-r-cpu-avx2-2t.json"
    file.write_text(json.dumps(report))
    _, _, row, _, link, rest = machines.table(tmp_path).splitlines()
    assert row.startswith("| 1 | 4.0x, - |")
    assert link == f"1. [Some (R) CPU, avx2](results/machines/{file.name}),"
    assert rest == "   2 threads, torch 2"
    moved = file.rename(tmp_path / "other.json")
    with pytest.raises(SystemExit, match="it should be called some-r-cpu-avx2-2t.json"):
        machines.table(tmp_path)
    moved.rename(file)
    for wrong, said in (
        ({"cells": [one | {"us": {}}]}, "forward 1x64 has no time of ours"),
        ({"machine": told | {"load": 1.5}}, "other processes were busy: a load of 1.5"),
        ({"schema": 2}, "it has no schema 1"),
        ({"cells": {}}, "cells is not of type list"),
    ):
        file.write_text(json.dumps(report | wrong))
        with pytest.raises(SystemExit, match=said):
            machines.table(tmp_path)
