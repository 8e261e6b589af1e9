"""How the CUDA kernels would be laid out for a shape: `python -m rmsnorm_cuda --explain`.

Nothing here is measured. The plan is the one that a launch on that kind of GPU makes
(csrc/cuda/plan.h); the rest is arithmetic on it.
"""

from dataclasses import dataclass

import torch

from . import _C

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KEEPS = ("registers", "shared memory", "nowhere: read twice")


@dataclass(frozen=True)
class Device:
    arch: int  # 90: compute capability 9.0
    multiprocessors: int
    shared_kib: int  # that a block may ask for
    gbps: float  # nominal DRAM bandwidth, GB/s
    latency_us: float = 0.8  # of a read under load, assumed


DEVICES = {
    "H100": Device(90, 132, 227, 3350),
    "A100": Device(80, 108, 163, 2039),
    "L4": Device(89, 58, 99, 300),
    "B200": Device(100, 148, 227, 8000),
}


@dataclass(frozen=True)
class Explanation:
    """One pass on one device. Sizes in bytes, times in us."""

    plan: dict  # as _C.cuda_plan gives it
    # Least traffic: tensors once (x and dy twice where the row is kept nowhere), weight, and
    # partial sums of dweight written and read again (not where the row is kept nowhere).
    dram_bytes: int
    least_us: float  # dram_bytes at the nominal bandwidth
    in_flight: int  # per multiprocessor, once the machine is full
    needed: int  # per multiprocessor, for the nominal bandwidth: bandwidth * latency (Little's law)
    waves: float  # launched blocks over those that the machine holds at a time
    tail: float  # part of the machine that is idle in the last wave


def explain(pass_, rows, cols, dtype, device):
    """The layout of one pass.

    Args:
        pass_: "forward" or "backward": dx and dweight, without the small kernel that adds up
            partial sums.
        rows, cols: of the tensor; cols is the normalized length.
        dtype: of x, dy and the weight: torch.float32, torch.float16 or torch.bfloat16.
        device: a :class:`Device`.
    Returns:
        An :class:`Explanation`.
    Raises:
        ValueError: rows or cols below 1, another dtype.
    """
    if rows < 1 or cols < 1:
        got = f"rows={rows} and cols={cols}"
        raise ValueError(f"explain: expected at least one row and one column, but got {got}")
    if dtype not in DTYPES.values():
        expected = ", ".join(map(str, DTYPES.values()))
        raise ValueError(f"explain: expected one of {expected}, but got {dtype}")
    backward = pass_ == "backward"
    limits = device.arch, device.multiprocessors, device.shared_kib << 10
    plan = _C.cuda_plan(backward, rows, cols, dtype, dtype, *limits)
    size = rows * cols * dtype.itemsize
    reads = (2 if backward else 1) * (2 if plan["keep"] == 2 else 1)
    dram_bytes = (reads + 1) * size + cols * dtype.itemsize
    if backward:
        dram_bytes += rows * 4 + cols * dtype.itemsize
        if plan["keep"] != 2:
            dram_bytes += 2 * 4 * cols * plan["blocks"] // plan["cluster"]
    at_once = plan["resident"] * device.multiprocessors
    last = plan["blocks"] % at_once
    return Explanation(
        plan=plan,
        dram_bytes=dram_bytes,
        least_us=dram_bytes / device.gbps / 1e3,
        in_flight=plan["resident"] * plan["threads"] * plan["bytes_in_flight"],
        needed=round(device.gbps * 1e3 * device.latency_us / device.multiprocessors),
        waves=plan["blocks"] / at_once,
        tail=1 - last / at_once if last else 0.0,
    )


def lines(rows, cols, name):
    """The text of `--explain ROWS COLS DTYPE`."""
    for pass_ in ("forward", "backward"):
        yield f"{pass_}, {rows} rows of {cols}, {name}; nothing here is measured"
        for device_name, device in DEVICES.items():
            e = explain(pass_, rows, cols, DTYPES[name], device)
            plan = e.plan
            per_block = plan["threads"] // plan["lanes"]
            place = f"{per_block} row{'s' * (per_block > 1)} a block"
            if plan["cluster"] > 1:
                place = f"{plan['cluster']} blocks a row"
            yield (
                f"  {device_name:5} {plan['kernel']}: {plan['blocks']} blocks of "
                f"{plan['threads']} threads, {place}, {plan['vectors']} x 16 bytes a thread; "
                f"at most {plan['registers']} registers, {plan['shared_bytes'] / 1024:.0f} KiB "
                f"shared; row kept in {KEEPS[plan['keep']]}"
            )
            yield (
                f"        {e.dram_bytes / 1e6:.2f} MB of DRAM traffic, {e.least_us:.1f} us at "
                f"{device.gbps:.0f} GB/s; in flight {e.in_flight / 1024:.0f} KiB a multiprocessor "
                f"({e.needed / 1024:.0f} needed); {e.waves:.2f} waves, {e.tail:.0%} of the machine "
                "idle in the last"
            )
