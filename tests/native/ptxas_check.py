"""Registers, spills and stack of every CUDA kernel, from what `nvcc -Xptxas -v` prints.

    python tests/native/ptxas_check.py BUILD_LOG...        # or - for stdin
    python tests/native/ptxas_check.py --build [ARCH...] [-v]  # compiles csrc/cuda first, for 9.0

Of several architectures the first, which is the oldest, gives the PTX for all.

The exit status is 1 if a kernel spills, or takes more registers than csrc/cuda/tuning.h allows.
"""

import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "csrc", "cuda")


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int


def demangle(names: list[str]) -> list[str]:
    try:
        text = subprocess.run(
            ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
        )
        return [
            re.sub(r"\(anonymous namespace\)::|rmsnorm::cuda::", "", n)
            for n in text.stdout.splitlines()
        ]
    except (OSError, subprocess.CalledProcessError):
        return names


def parse_ptxas(text: str) -> list[Kernel]:
    found = []
    # One block per kernel: "Compiling entry function 'f' for 'sm_90'", "... stack frame ...",
    # "Used n registers, ...".
    for name, arch, body in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'(.*?Used \d+ registers[^\n]*)", text, re.S
    ):

        def number(pattern):
            return sum(int(n) for n in re.findall(pattern, body))

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        stack = number(r"(\d+) bytes stack frame")
        found.append(
            (
                name,
                arch,
                number(r"Used (\d+) registers"),
                spills,
                stack,
                number(r"(\d+) bytes smem"),
            )
        )
    names = demangle([f[0] for f in found])
    return [Kernel(name, *rest[1:]) for name, rest in zip(names, found)]


def registers_allowed(kernel: Kernel, limits: dict[str, tuple[int, int, int]]) -> int:
    """By `limits`, from _C.cuda_limits: more for a residual or partners in other lanes (the last
    flag), for a forward that is not plain (the Form), and for dy of another dtype.
    """
    name, *arguments = re.findall(r"\w+", kernel.name.removeprefix("void "))
    if name not in limits:
        return 255
    _, registers, mixed_registers = limits[name]
    if name.startswith("backward"):
        return mixed_registers if arguments[0] != arguments[1] else registers
    flags = [a for a in arguments if a in ("true", "false")]
    takes_more = flags[-1:] == ["true"] or arguments[1:3] == ["Form", "2"]
    return mixed_registers if takes_more else registers


def failures(kernels: list[Kernel]) -> list[Kernel]:
    from rmsnorm_cuda import _C

    def fails(k):
        limits = _C.cuda_limits(int(re.sub(r"\D", "", k.arch)))
        return k.spill_bytes or k.stack_bytes or k.registers > registers_allowed(k, limits)

    return [k for k in kernels if fails(k)]


def build_log(archs: list[str]) -> str:
    archs = [arch.replace(".", "") for arch in archs]
    code = ",".join(f"sm_{arch}" for arch in archs)
    with tempfile.TemporaryDirectory() as out:
        logs = []
        for source in sorted(f for f in os.listdir(SOURCES) if f.endswith(".cu")):
            command = [
                "nvcc",
                "-std=c++17",
                "-O3",
                "-Xptxas",
                "-v",
                "-gencode",
                f"arch=compute_{archs[0]},code=[{code}]",
            ]
            command += [
                '-DRMSNORM_CUDA_ARCHS=""',
                "-c",
                os.path.join(SOURCES, source),
                "-o",
                os.path.join(out, "out.o"),
            ]
            logs.append(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    return "\n".join(logs)


def main(args: list[str]) -> int:
    verbose = "-v" in args
    args = [a for a in args if a != "-v"]
    if args[:1] == ["--build"]:
        text = build_log(args[1:] or ["9.0"])
    else:
        text = "".join(sys.stdin.read() if a == "-" else open(a).read() for a in args)
    kernels = parse_ptxas(text)
    bad = failures(kernels)
    for k in kernels if verbose else bad:
        print(
            f"{k.arch} {k.registers:4} registers {k.spill_bytes:5} spill {k.stack_bytes:5} stack "
            f"{k.shared_bytes:6} shared  {k.name}"
        )
    most = max((k.registers for k in kernels), default=0)
    print(
        f"{len(kernels)} kernels, at most {most} registers, {len(bad)} with more "
        "than is allowed, spills or local memory"
    )
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
