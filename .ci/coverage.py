"""`make coverage`: the lines and branches of csrc and rmsnorm_cuda that the tests reach.

    python .ci/coverage.py [ARGUMENTS OF PYTEST]

A copy of the tree in build/coverage is built with gcov's counters, and the suite runs there under
coverage.py, without what is slow and without CUDA. A line that nothing reaches, and that
tests/uncovered.md does not give a reason for, makes the command fail. Objects are kept.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "coverage"
TREE = BUILD / "tree"
REASONS = Path("tests", "uncovered.md")
CONFIG = f"""\
[run]
branch = True
parallel = True
relative_files = True
include = */rmsnorm_cuda/*
data_file = {BUILD}/python
patch = subprocess, fork, _exit
disable_warnings = module-not-measured, no-data-collected
[paths]
copies_of_the_tests =
  rmsnorm_cuda
  */rmsnorm_cuda
[report]
exclude_also = if TYPE_CHECKING:
"""
# The forked programs of the tests leave by os._exit(), before gcov has written what it counted.
LEAVES = "os._exit(status)", '__import__("ctypes").PyDLL(None).exit(status)'
# gcov's counters are exported too, and take place.
SKIPPED = "exports_and_types or test_size"


def run(*command, check=True, **environment):
    print("$", *command, flush=True)
    environment = os.environ | environment
    return subprocess.run(list(map(str, command)), cwd=TREE, env=environment, check=check)


def copy_tree():
    """What git knows, with its times: ninja compiles what is newer than its object."""
    TREE.mkdir(parents=True, exist_ok=True)
    for path in TREE.iterdir():
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)
    programs = TREE / "tests" / "programs.py"
    assert LEAVES[0] in programs.read_text()
    programs.write_text(programs.read_text().replace(*LEAVES))


def run_tests(arguments):
    """Whether they passed."""
    for path in [*TREE.rglob("*.gcda"), *BUILD.glob("python*")]:
        path.unlink()
    (BUILD / "coveragerc").write_text(CONFIG)
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={BUILD / 'coveragerc'}"]
    command += ["-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "8", "--dist", "loadfile"]
    command += ["-m", "not slow and not cuda", "-k", f"not ({SKIPPED})", *arguments]
    # The package of an editable install lies elsewhere.
    return not run(*command, check=False, PYTHONPATH=str(TREE)).returncode


class File(NamedTuple):
    lines: dict[int, bool]  # whether something reached it
    branches: dict[int, list[bool]]
    functions: dict[int, str]  # Python's, by the line that each of their lines is on


def python_files():
    options = [f"--rcfile={BUILD / 'coveragerc'}", "-q"]
    run(sys.executable, "-m", "coverage", "combine", *options)
    options += ["--include=rmsnorm_cuda/*", "-o", BUILD / "python.json"]
    run(sys.executable, "-m", "coverage", "json", *options)
    files = json.loads((BUILD / "python.json").read_text())["files"]
    for path in {str(path.relative_to(TREE)) for path in TREE.glob("rmsnorm_cuda/**/*.py")} - {
        *files
    }:
        yield path, File({1: False}, {}, {})
    for path, file in files.items():
        lines = {line: True for line in file["executed_lines"]}
        lines |= {line: False for line in file["missing_lines"]}
        branches = {}
        for kind in ("executed", "missing"):
            for line, _ in file[f"{kind}_branches"]:
                branches.setdefault(line, []).append(kind == "executed")
        functions = {
            line: name.rpartition(".")[2]
            for name, function in file["functions"].items()
            for line in function["missing_lines"]
        }
        yield path, File(lines, branches, functions)


def native_files():
    options = ["--exclude-throw-branches", "--exclude-unreachable-branches", "--root", TREE]
    options += ["--exclude-noncode-lines"]
    options += ["--filter", f"{TREE}/csrc/", "--json", BUILD / "native.json"]
    run(sys.executable, "-m", "gcovr", *options, TREE / "build" / "objects")
    for file in json.loads((BUILD / "native.json").read_text())["files"]:
        lines, branches = {}, {}
        for line in file["lines"]:  # of each instance of a template
            number = line["line_number"]
            lines[number] = lines.get(number, False) or line["count"] > 0
            branches.setdefault(number, []).append(line["branches"])
        yield file["file"], File(lines, {n: merged(copies) for n, copies in branches.items()}, {})


def merged(copies):
    """The branches of a line. Instances of a template are one; where a line has many branches it
    was inlined many times, and what counts is whether some copy went on, and some elsewhere."""
    outcomes = {}
    for branches in copies:
        for i, branch in enumerate(branches):
            key = (len(branches), i) if len(branches) <= 8 else branch["fallthrough"]
            outcomes[key] = outcomes.get(key, False) or branch["count"] > 0
    return list(outcomes.values())


@functools.cache
def reasons():
    """{path: texts} of the items in tests/uncovered.md; no texts: the whole file."""
    items = re.split(r"^- ", (ROOT / REASONS).read_text(), flags=re.M)[1:]
    result = {}
    for item in items:
        path, *texts = re.findall(r"`([^`]+)`", item.partition("\n\n")[0])
        source = (ROOT / path).read_text()
        gone = [t for t in texts if t not in source and f"def {t[:-1]}" not in source]
        if gone:
            sys.exit(f"{REASONS} has what {path} has not: {', '.join(gone)}")
        result.setdefault(path, []).extend(texts)
    return result


def is_explained(path, text, function):
    texts = reasons().get(path)
    if not texts:
        return texts == []
    # A short one, such as `raise`, is in too many lines.
    return {text, f"{function}()"} & {*texts} or any(t in text for t in texts if len(t) > 10)


def share(reached):
    reached = list(reached)
    return f"{100 * sum(reached) / len(reached):7.1f}" if reached else "      -"


def report(files):
    """Prints the figures and what nothing reached; returns how many lines have no reason."""
    print(f"\n{'':48}lines %  branches %  (number of each)")
    groups = {name: [name] for name in files}
    for folder in ("csrc/", "rmsnorm_cuda/"):
        groups[folder] = [name for name in files if name.startswith(folder)]
    for title, names in groups.items():
        lines = [r for name in names for r in files[name].lines.values()]
        branches = [r for name in names for b in files[name].branches.values() for r in b]
        print(f"{title:48}{share(lines)} {share(branches)}     ({len(lines)}, {len(branches)})")
    unexplained = 0
    print("\nNot reached (!: without a reason; ?: a branch):")
    for name, file in files.items():
        source = (TREE / name).read_text().splitlines()
        for number in sorted({*file.lines, *file.branches}):
            reached, text = file.lines.get(number, True), source[number - 1].strip()
            if reached and all(file.branches.get(number, ())):
                continue
            mark = "?"
            if not reached:
                mark = " " if is_explained(name, text, file.functions.get(number)) else "!"
                unexplained += mark == "!"
            print(f"{mark} {name}:{number}: {text}")
    return unexplained


def main(arguments):
    copy_tree()
    # setup.py's own -O3 follows: slow kernels would cost more than their compilation.
    cxx = f"{os.environ.get('CXX', 'g++')} --coverage -fprofile-update=atomic"
    run(sys.executable, *"setup.py -q build_ext --inplace".split(), CXX=cxx, RMSNORM_CUDA_BUILD="0")
    passed = run_tests(arguments)
    files = {**dict(native_files()), **dict(python_files())}
    unexplained = report({path: files[path] for path in sorted(files)})
    if unexplained:
        print(f"\n{unexplained} lines are not reached, and {REASONS} gives no reason.")
    sys.exit(bool(unexplained) or not passed)


if __name__ == "__main__":
    main(sys.argv[1:])
