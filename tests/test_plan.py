"""Which CUDA kernel a row length gets: pure host functions, so all of this runs without a GPU."""

import shutil
import subprocess
from pathlib import Path

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
        device.arch,
        device.multiprocessors,
        device.shared_kib << 10,
    )


# At both sides of each boundary: of the vectors and lanes, of the registers, of a cluster, of the
# shared memory, of the number of blocks; mixed dtypes; and machines that are hardly there.
# pass, dtypes of dy and x; arch, multiprocessors, shared KiB; rows, cols -> kernel, keep,
# vectors, lanes, threads, registers, cluster, slice, shared_bytes, resident, blocks
PLANS = """
forward bf16 90 132 227 100000 1 rows 0 1 1 128 80 1 1 0 6 782
forward bf16 90 132 227 100000 128 rows 0 1 16 128 80 1 128 0 6 782
forward bf16 90 132 227 32768 128 rows 0 1 16 128 80 1 128 0 6 512
forward bf16 90 132 227 6336 128 rows 0 1 16 128 80 1 128 0 6 792
forward bf16 90 132 227 5000 128 rows 0 1 16 128 80 1 128 0 6 625
forward bf16 90 132 227 100000 129 rows 0 1 32 128 80 1 129 0 6 782
forward fp32 90 132 227 1 128 rows 0 1 32 128 80 1 128 0 6 1
forward bf16 90 132 227 100000 256 rows 0 1 32 128 80 1 256 0 6 782
forward bf16 90 132 227 100000 257 rows 0 2 32 128 80 1 257 0 6 1563
forward bf16 90 132 227 100000 512 rows 0 2 32 128 80 1 512 0 6 1563
forward bf16 90 132 227 100000 513 rows 0 4 32 128 80 1 513 0 6 3125
forward bf16 90 132 227 100000 2048 rows 0 4 64 64 80 1 2048 0 12 6250
forward bf16 90 132 227 100000 8192 rows 0 4 256 256 80 1 8192 0 3 1563
forward bf16 90 132 227 100000 8193 shared_rows 1 4 288 288 64 1 8448 16896 3 1563
forward fp32 90 132 227 100000 16384 shared_rows 1 4 512 512 64 1 16384 65536 2 1053
forward fp32 90 132 227 100000 16385 shared_rows 1 4 288 288 64 2 8320 33280 3 1528
forward fp32 90 132 227 64 262144 shared_rows 1 4 512 512 64 8 32768 131072 1 512
forward bf16 90 132 227 100000 2000000 long_rows 2 4 512 512 128 1 2000000 0 1 527
forward fp32 80 108 163 100000 16384 shared_rows 1 4 512 512 64 1 16384 65536 2 863
forward fp32 89 58 99 100000 24320 shared_rows 1 4 512 512 64 1 24320 97280 1 232
forward fp32 89 58 99 100000 24321 long_rows 2 4 512 512 128 1 24321 0 1 232
backward bf16 90 132 227 100000 64 rows 0 1 8 256 80 1 64 0 3 391
backward bf16 90 132 227 100000 256 rows 0 1 32 256 80 1 256 0 3 391
backward bf16 90 132 227 100000 257 rows 0 2 32 256 80 1 257 0 3 391
backward bf16 90 132 227 100000 1400 rows 0 2 96 192 80 1 1400 0 4 527
backward bf16 90 132 227 101 4096 rows 0 2 256 256 80 1 4096 0 3 101
backward bf16 90 132 227 396 4096 rows 0 2 256 256 80 1 4096 0 3 198
backward bf16 90 132 227 64 8192 shared_rows 1 2 256 256 80 1 8192 98304 2 64
backward bf16 90 132 227 100000 4097 shared_rows 1 2 288 288 80 1 4352 52224 2 264
backward fp32,bf16 90 132 227 100000 4096 rows 0 2 256 256 120 1 4096 0 2 264
backward bf16,fp32 90 132 227 100000 4000 shared_rows 1 2 256 256 80 1 4096 49152 3 396
backward fp32,bf16 90 132 227 100000 16384 shared_rows 1 2 256 256 80 4 4096 40960 3 384
backward bf16 90 132 227 100000 131072 shared_rows 1 2 512 512 80 8 16384 196608 1 128
backward bf16 90 132 227 100000 100000 shared_rows 1 2 288 288 80 8 12544 100352 2 256
backward fp32,bf16 90 132 227 80 16384 shared_rows 1 2 256 256 80 4 4096 40960 3 160
backward bf16 90 132 227 150 16384 shared_rows 1 2 256 256 80 2 8192 98304 2 150
backward fp32 80 108 163 100000 8192 shared_rows 1 2 512 512 80 1 8192 98304 1 108
backward bf16 89 58 99 100000 60000 long_stats 2 2 384 384 80 1 60000 0 2 116
backward bf16 89 58 99 100 60000 long_stats 2 2 384 384 80 1 60000 0 2 100
forward fp32 90 8 227 100 131072 shared_rows 1 4 512 512 64 8 16384 65536 2 32
backward fp32 80 1 163 100 8192 shared_rows 1 2 512 512 80 1 8192 98304 1 1
"""


@pytest.mark.parametrize("line", PLANS.strip().splitlines())
def test_plans(line):
    pass_, names, *numbers = line.split()
    arch, multiprocessors, shared_kib, rows, cols = map(int, numbers[:5])
    dtypes = [DTYPES[name] for name in names.split(",")]
    dtypes = dtypes if len(dtypes) == 2 else dtypes * 2
    device = arch, multiprocessors, shared_kib << 10
    p = _C.cuda_plan(pass_ == "backward", rows, cols, *dtypes, *device)
    assert p.pop("bytes_in_flight") == 64
    p["kernel"] = p["kernel"].removeprefix(f"{pass_}_")
    assert [str(value) for value in p.values()] == numbers[5:]


# What launches alone ask for: plans of the kernels with quant, of the backward's second pass, of
# rows with a gate, and of the norms on both sides of a sublayer.
PROGRAM = """
#include <cstdio>
#include "cuda/plan.h"
using namespace rmsnorm;
using namespace rmsnorm::cuda;
int main() {
  const Device h100{90, 132, 227 << 10}, l4{89, 58, 99 << 10};
  for (int64_t cols : {64, 8193, 2000000}) {
    const Plan p = plan_forward(4096, cols, DType::kBFloat16, h100, false, true);
    std::printf("%s %d %ld; ", p.kernel, p.registers, p.resident);
  }
  for (const StripPlan& p :
       {plan_strips(1000, 2000000, DType::kBFloat16, h100),
        plan_strips(1000, 20000, DType::kFloat32, l4), plan_strips(5, 60000, DType::kBFloat16, l4)})
    std::printf("%ld x %ld; ", p.strips, p.blocks);
  // A machine that holds fewer clusters of 8 than are reckoned, and more of 2.
  const Device asked{90, 132, 227 << 10, {66, 33, 15, 132, 66, 31, 198, 98, 46}};
  for (int64_t cols : {16384, 32768, 131072}) {
    const Plan p = plan_backward(100000, cols, DType::kBFloat16, DType::kBFloat16, asked);
    std::printf("%d of %d, %ld; ", p.cluster, int(p.resident), p.blocks);
  }
  const Plan p = plan_backward(100000, 16384, DType::kFloat32, DType::kBFloat16, asked);
  std::printf("%d of %d, %ld; ", p.cluster, int(p.resident), p.blocks);
  for (int64_t cols : {128, 8192, 100000}) {
    const Plan p = plan_quantize(100000, cols, DType::kBFloat16, h100);
    std::printf("%s %d x %ld; ", p.kernel, p.threads, p.blocks);
  }
  const Device a100{80, 108, 163 << 10};
  const DType bf16 = DType::kBFloat16, fp32 = DType::kFloat32;
  for (const GatedPlan& p :
       {plan_gated_forward(524288, 1, 128, bf16, h100),
        plan_gated_forward(8192, 8, 1024, bf16, h100),
        plan_gated_forward(3, 8, 1024, bf16, h100),
        plan_gated_forward(8192, 1, 4097, bf16, h100),
        plan_gated_forward(8192, 1, 40000, fp32, h100),
        plan_gated_forward(100, 1, 3000000, bf16, h100),
        plan_gated_forward(8192, 8, 1024, bf16, h100, true),
        plan_gated_forward(8192, 1, 5120, bf16, h100, true),
        plan_gated_backward(8192, 1, 256, bf16, h100),
        plan_gated_backward(8192, 8, 1024, bf16, h100),
        plan_gated_backward(8192, 1, 5120, bf16, h100),
        plan_gated_backward(8192, 1, 8192, bf16, h100),
        plan_gated_backward(100, 1, 16384, bf16, h100),
        plan_gated_backward(8192, 1, 20000, bf16, a100),
        plan_gated_backward(7, 300, 64, fp32, h100)})
    std::printf("\\n%s %d of %d/%d %d of %ld %ld %ld in %ld", p.kernel, p.vectors, p.lanes,
                p.threads, p.cluster, p.slice, p.shared_bytes, p.group_blocks, p.blocks);
  const auto print = [](const Plan& p) {
    std::printf("\\n%s %d of %d/%d %d of %ld %ld, %d: %ld in %ld", p.kernel, p.vectors, p.lanes,
                p.threads, p.cluster, p.slice, p.shared_bytes, p.registers, p.resident, p.blocks);
  };
  for (int64_t cols : {128, 4096, 8200, 131072, 1000000}) {
    const Plan p = plan_sandwich(8192, cols, bf16, h100);
    print(p);
    print(of_any_rows(p, kLimits[kSandwichAnyRows], h100));
  }
}
"""

# kernel, vectors of lanes/threads, cluster of slice, shared bytes, blocks of a group in all
GATED_PLANS = """
gated_rows 1 of 16/128 1 of 128 0 1561 in 1561
gated_rows 2 of 64/64 1 of 1024 0 745 in 5960
gated_rows 2 of 64/64 1 of 1024 0 3 in 24
gated_shared_rows 2 of 288/288 1 of 4352 17408 1024 in 1024
gated_shared_rows 2 of 320/320 8 of 5120 40960 128 in 1024
gated_any_rows 2 of 512/512 1 of 3000000 0 100 in 100
gated_quant_rows 2 of 64/64 1 of 1024 0 745 in 5960
gated_quant_shared_rows 2 of 320/320 1 of 5120 20480 1024 in 1024
gated_backward_rows 1 of 32/256 1 of 256 0 256 in 256
gated_backward_rows 2 of 64/256 1 of 1024 0 33 in 264
gated_backward_shared_rows 2 of 320/320 1 of 5120 81920 256 in 256
gated_backward_shared_rows 2 of 256/256 1 of 8192 81920 256 in 256
gated_backward_shared_rows 2 of 256/256 2 of 8192 81920 100 in 200
gated_backward_any_rows 2 of 768/768 1 of 20000 0 108 in 108
gated_backward_rows 1 of 16/256 1 of 64 0 1 in 300"""

# kernel, vectors of lanes/threads, cluster of slice, shared bytes, registers: blocks of a
# multiprocessor in all; and the same of a launch that is not plain
SANDWICH_PLANS = """
sandwich_rows 1 of 16/128 1 of 128 0, 128: 4 in 256
sandwich_any_rows 1 of 16/128 1 of 128 0, 128: 4 in 256
sandwich_rows 4 of 128/128 1 of 4096 0, 128: 4 in 2048
sandwich_any_rows 4 of 128/128 1 of 4096 0, 128: 4 in 2048
sandwich_shared_rows 4 of 288/288 1 of 8448 16896, 64: 3 in 1366
sandwich_any_rows 4 of 288/288 1 of 8448 0, 128: 1 in 1366
sandwich_shared_rows 4 of 512/512 4 of 32768 65536, 64: 2 in 1024
sandwich_any_rows 4 of 512/512 4 of 32768 0, 128: 1 in 1024
sandwich_any_rows 4 of 512/512 1 of 1000000 0, 128: 1 in 512
sandwich_any_rows 4 of 512/512 1 of 1000000 0, 128: 1 in 512"""


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")
def test_plans_of_launches(tmp_path):
    csrc = Path(__file__).parents[1] / "csrc"
    if not csrc.exists():
        pytest.skip("the sources of the package are not here")
    (tmp_path / "plans.cpp").write_text(PROGRAM)
    program = tmp_path / "plans"
    command = ["g++", "-std=c++17", f"-I{csrc}", tmp_path / "plans.cpp", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == (
        "quant_rows 128 4; quant_shared_rows 64 3; quant_long_rows 128 1; 977 x 1; 20 x 6; 30 x 2; "
        "2 of 2, 264; 4 of 2, 264; 8 of 1, 120; 4 of 3, 392; quantize_rows 32 x 16667; "
        "quantize_rows 512 x 1053; quantize_rows 512 x 1053; " + GATED_PLANS + SANDWICH_PLANS
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
        _C.cuda_plan(False, 1, 64, torch.float64, torch.float64, 90, 132, 227 << 10)
    for rows, cols in ((0, 64), (1, 0)):
        with pytest.raises(ValueError, match="at least one row and one column"):
            _C.cuda_plan(False, rows, cols, *2 * (torch.float32,), 90, 132, 227 << 10)


def test_edits_of_the_search_apply():
    """What benchmarks/tune.py compiles is made of the sources as they are."""
    csrc = Path(__file__).parents[1] / "csrc"
    if not csrc.exists():
        pytest.skip("the sources of the package are not here")
    tune = pytest.importorskip("benchmarks.tune", reason="the benchmarks are not here")
    edits = [edit for variant in tune.VARIANTS.values() for edit in variant]
    assert len(edits) > 5
    for file, old, new in edits:
        assert (csrc / "cuda" / file).read_text().count(old) == 1 and new != old, (file, old)
