"""What figures depend on beside the code that is timed."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C
from rmsnorm_cuda.bench.buffers import cache_bytes

GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


def text_of(path):
    """Of a file that a system may not have; None there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def processor():
    name = re.search(r"^model name\s*:\s*(.+)", text_of("/proc/cpuinfo") or "", re.M)
    return name[1] if name else platform.processor() or platform.machine()


def machine(device="cpu"):
    """What the numbers of a report depend on beside the code that made them."""
    found = {"processor": processor(), "isa": _C.isa()}
    if torch.device(device).type == "cuda":
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rmsnorm_cuda": rmsnorm_cuda.__version__,
    }
    return found | {"threads": torch.get_num_threads()} | versions


def commit():
    """Of the clone that the package lies in; None for an installed wheel, or without git."""
    root = Path(rmsnorm_cuda.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def load():
    """Processes that want a core, over one minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def governor():
    """Of the first core's clock, such as "performance"; None where it cannot be read."""
    return (text_of(GOVERNOR) or "").strip() or None


def details(device="cpu"):
    """machine(), and what a report of another's machine has to tell. No host name and no path."""
    found = machine(device) | {
        "device": torch.device(device).type,
        "commit": commit(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "governor": governor(),
        "load": load(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_l2_bytes": properties.L2_cache_size,
            "gpu_bytes": properties.total_memory,
            "cuda_runtime_driver": list(_C.cuda_versions()),
        }
    return found
