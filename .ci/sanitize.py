"""`make sanitize`: the CPU kernels under sanitizers.

    python .ci/sanitize.py [memory] [threads]

- memory: cpu_check.cpp under ASan and UBSan: every kernel, guard zones, every length
- threads: threads_check.cpp under TSan: calls at once, while the instruction set changes

Both unless one is named. The first finding ends it. Objects are kept in build/sanitize.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
# Of UBSan what is cheap: pointers that are checked at each use (null, alignment, object-size) make
# the kernels' templates compile for more than ten minutes, and ASan sees those that are wrong.
UNDEFINED = "signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow,bounds"
FLAGS = {
    "memory": ["-fsanitize=address", f"-fsanitize={UNDEFINED}", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
PROGRAMS = {"memory": "cpu_check", "threads": "threads_check"}


def run(command):
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def check(name):
    """A program of tests/native with the CPU kernels, all compiled alike, and run."""
    folder, program = BUILD / name, PROGRAMS[name]
    folder.mkdir(parents=True, exist_ok=True)
    # Not -O0: without inlining, the vectors of the kernels pass through memory.
    options = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests" / "native" / f"{program}.cpp"]
    rules = ["cxx = " + " ".join([os.environ.get("CXX", "g++"), *options, *FLAGS[name]])]
    rules += ["rule cc", "  command = $cxx -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d"]
    rules += ["rule link", "  command = $cxx $in -o $out"]
    rules += [f"build {source.stem}.o: cc {source}" for source in sources]
    objects = " ".join(f"{source.stem}.o" for source in sources)
    (folder / "build.ninja").write_text("\n".join([*rules, f"build {program}: link {objects}", ""]))
    run([sys.executable, "-m", "ninja", "-C", folder, program])
    run([folder / program])


def main(names):
    if unknown := set(names) - set(PROGRAMS):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    for name in names or PROGRAMS:
        check(name)


if __name__ == "__main__":
    main(sys.argv[1:])
