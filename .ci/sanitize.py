"""`make sanitize`: the kernels, the op layer and the binding under sanitizers.

    python .ci/sanitize.py [native] [threads] [torch]

- native: cpu_check.cpp under ASan and UBSan: every kernel, guard zones, every length
- threads: threads_check.cpp under TSan: calls at once, while the instruction set changes
- torch: the package built with ASan and UBSan, and the core of the suite in it

All three unless some are named. The first finding ends it. Objects are kept in build/sanitize.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREADS = ["-fsanitize=thread"]
# A new op is in them by the tables that these files draw from.
CORE = [
    *("test_forward.py", "test_backward.py", "test_autograd.py", "test_fused_add.py"),
    *("test_quant.py", "test_errors.py", "test_layouts.py", "test_invariance.py"),
    *("test_threads.py", "test_dispatch.py", "fuzz"),
]


def run(command, **environment):
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=os.environ | environment)


def compiler():
    return os.environ.get("CXX", "g++").split()


def native(program, flags, name):
    """`program` of tests/native with the CPU kernels, all compiled with `flags`, and run."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    # Not -O0: without inlining, the vectors of the kernels pass through memory.
    options = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests" / "native" / f"{program}.cpp"]
    rules = ["cxx = " + " ".join([*compiler(), *options, *flags])]
    rules += ["rule cc", "  command = $cxx -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d"]
    rules += ["rule link", "  command = $cxx $in -o $out"]
    rules += [f"build {source.stem}.o: cc {source}" for source in sources]
    objects = " ".join(f"{source.stem}.o" for source in sources)
    (folder / "build.ninja").write_text("\n".join([*rules, f"build {program}: link {objects}", ""]))
    run([sys.executable, "-m", "ninja", "-C", folder, program])
    run([folder / program])


def runtime(name):
    """The sanitizer's library, which has to be loaded before Python's own."""
    done = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def in_torch():
    """The package, built into a folder of its own, and the suite's core."""
    target = BUILD / "torch"
    flags = " ".join([*compiler(), *MEMORY, "-O1", "-g1"])
    build = ["build_ext", "--build-temp", target / "objects", "--build-lib", target / "lib"]
    run([sys.executable, "setup.py", "-q", *build], CXX=flags, RMSNORM_CUDA_BUILD="0")
    run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not cuda",
        ]
        + [f"tests/{name}" for name in CORE],
        PYTHONPATH=str(target / "lib"),
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python and torch leave memory to the end of the process.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


PARTS = {
    "native": lambda: native("cpu_check", MEMORY, "memory"),
    "threads": lambda: native("threads_check", THREADS, "threads"),
    "torch": in_torch,
}


def main(names):
    unknown = set(names) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
