"""Which CUDA kernel a row length gets: pure host functions, so all of this runs without a GPU."""

import pytest
import torch

from rmsnorm_cuda import _C
from rmsnorm_cuda import __main__ as command
from rmsnorm_cuda.explain import DEVICES, DTYPES, explain

LENGTHS = [
    *range(1, 600),
    *range(600, 20_000, 37),
    *range(20_000, 1_200_000, 4999),
    65_536,
    131_072,
]
REGISTERS, SHARED, NOWHERE = range(3)
PASSES = ("forward", "backward")


def plan(pass_, cols, dtype, device, rows=4096):
    return _C.cuda_plan(
        pass_ == "backward",
        rows,
        cols,
        dtype,
        dtype,
        dtype,
        device.arch,
        device.multiprocessors,
        device.shared_kib << 10,
    )


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("pass_", PASSES)
def test_every_length_is_covered(pass_, dtype, name):
    device, elems = DEVICES[name], 16 // dtype.itemsize
    for cols in LENGTHS:
        p = plan(pass_, cols, dtype, device)
        kernel_threads, registers, _ = _C.cuda_limits(device.arch)[p["kernel"]]
        assert (
            p["kernel"].startswith(pass_)
            and p["threads"] <= kernel_threads
            and p["registers"] == registers
        ), (cols, p)
        assert p["threads"] % 32 == 0 and p["threads"] <= 1024 and p["threads"] % p["lanes"] == 0, (
            cols,
            p,
        )
        assert p["registers"] * p["threads"] * p["resident"] <= 1 << 16, (cols, p)
        assert (
            p["cluster"] in ((1, 2, 4, 8) if device.arch >= 90 else (1,))
            and p["blocks"] % p["cluster"] == 0
        ), (cols, p)
        assert p["slice"] * p["cluster"] >= cols, (cols, p)
        if p["keep"] == REGISTERS:
            assert p["lanes"] * p["vectors"] * elems >= cols and p["shared_bytes"] == 0, (cols, p)
        elif p["keep"] == SHARED:
            assert (p["shared_bytes"] + 4096) * p["resident"] <= device.shared_kib << 10 and p[
                "slice"
            ] % elems == 0, (cols, p)
            assert (p["cluster"] - 1) * p["slice"] < cols, "a block without columns"


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_number_of_rows_decides_only_the_grid(dtype, pass_):
    for device in DEVICES.values():
        for cols in LENGTHS[::29]:
            plans = [
                plan(pass_, cols, dtype, device, rows) | {"blocks": 0}
                for rows in (1, 7, 128, 1_000_000)
            ]
            assert plans.count(plans[0]) == len(plans), cols


def test_long_rows_are_read_once():
    for device, dtype, pass_, cols in (
        ("H100", torch.bfloat16, "forward", 131_072),
        ("H100", torch.float32, "forward", 131_072),
        ("H100", torch.bfloat16, "backward", 131_072),
        ("H100", torch.float32, "backward", 65_536),
        ("A100", torch.bfloat16, "forward", 65_536),
        ("L4", torch.bfloat16, "forward", 32_768),
    ):
        assert plan(pass_, cols, dtype, DEVICES[device])["keep"] != NOWHERE, (device, dtype, pass_)
    assert plan("forward", 2_000_000, torch.bfloat16, DEVICES["H100"])["keep"] == NOWHERE


@pytest.mark.parametrize("pass_", PASSES)
def test_enough_bytes_in_flight(pass_):
    """As many as bandwidth times latency asks for, on a full machine, with as many bytes of a
    thread as the plan says.
    """
    for name in ("H100", "A100", "L4"):
        for cols in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536):
            e = explain(pass_, 8192, cols, torch.bfloat16, DEVICES[name])
            assert (
                e.in_flight
                == e.plan["resident"] * e.plan["threads"] * e.plan["bytes_in_flight"]
                >= e.needed
            ), (name, cols, e)


def test_explained_traffic():
    e = explain("forward", 1024, 4096, torch.bfloat16, DEVICES["H100"])
    assert e.dram_bytes == 2 * 1024 * 4096 * 2 + 4096 * 2
    assert e.least_us == pytest.approx(e.dram_bytes / 3350e3)
    twice = explain("forward", 16, 2_000_000, torch.bfloat16, DEVICES["H100"])
    assert twice.dram_bytes == 3 * 16 * 2_000_000 * 2 + 2_000_000 * 2


def test_explain_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rmsnorm_cuda", "--explain", "4096", "131072", "bf16"])
    assert command.main() == 0
    text = capsys.readouterr().out
    assert (
        "forward, 4096 rows of 131072, bf16" in text
        and "forward_shared_rows: " in text
        and "4 blocks a row" in text
        and text.count("H100") == 2
    )


@pytest.mark.parametrize("arguments", (["0", "64", "bf16"], ["1", "x", "bf16"], ["1", "64", "fp8"]))
def test_explain_refuses(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rmsnorm_cuda", "--explain", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert "two positive integers and one of fp32, fp16, bf16" in capsys.readouterr().err


def test_explain_errors():
    with pytest.raises(ValueError, match="rows=0"):
        explain("forward", 0, 64, torch.float32, DEVICES["H100"])
    with pytest.raises(ValueError, match="float64"):
        explain("forward", 1, 64, torch.float64, DEVICES["H100"])
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        _C.cuda_plan(False, 1, 64, torch.float64, torch.float64, torch.float64, 90, 132, 227 << 10)
    for rows, cols in ((0, 64), (1, 0)):
        with pytest.raises(ValueError, match="at least one row and one column"):
            _C.cuda_plan(False, rows, cols, *3 * (torch.float32,), 90, 132, 227 << 10)
