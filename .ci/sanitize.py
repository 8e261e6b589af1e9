"""`make sanitize`: kernels, op layer and binding under sanitizers.

    python .ci/sanitize.py [kernels] [package] [threads] [cuda]
    python .ci/sanitize.py layers

- kernels: cpu_check.cpp under ASan and UBSan: every kernel, guard zones, every length
- package: all three libraries under ASan and UBSan, and pytest's core and the fuzzer with them
- threads: threads_check.cpp and torch_threads_check.cpp under TSan: calls at once, while the
  instruction set, the number of threads and the ops that are registered change
- cuda: cuda_check.cpp under the four tools of compute-sanitizer, where there is a GPU
- layers: for .ci/run: `package` with the kernels as they are, which compile for ten minutes, and
  with a few of the tests

The first four unless some are named. The first finding ends it. Objects are kept in build/sanitize.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
layers = SimpleNamespace(
    **runpy.run_path(str(ROOT / "rmsnorm_cuda" / "installation" / "build_layers.py"))
)
# Of UBSan what is cheap: pointers that are checked at each use (null, alignment, object-size) make
# the kernels' templates compile for more than ten minutes, and ASan sees those that are wrong.
CHEAP = "signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow,bounds"
# Its vptr asks for the type information of torch's classes, which torch hides.
WHOLE = ["-fsanitize=undefined", "-fno-sanitize=vptr"]
ADDRESS = ["-fsanitize=address", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread", "-Wno-tsan"]  # torch has a fence, which TSan does not know
# Not -O0: without inlining, the vectors of the kernels pass through memory.
OPTIONS = "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -fno-math-errno -Wno-psabi".split()
KERNELS = [*(ROOT / "csrc" / "cpu").glob("*.cpp")]
# What calls every op in every way. The rest asks about other things, mostly in other processes.
CORE = "forward backward fused_add quant layouts errors autograd invariance dispatch faults".split()
FEW = "errors layouts faults".split()
# About malloc, limits of memory and signals, which ASan replaces; and a fork while other threads
# allocate: the child waits for ever for a lock of GCC's ASan that one of them held.
NOT_UNDER_ASAN = "no_memory_left or limit_of_memory or keep_their_pages or read_only_memory"
NOT_UNDER_ASAN += " or fork_while_threads_call"


def run(command, **kwargs):
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, **kwargs)


class Ninja:
    """What is compiled and linked in a folder of BUILD."""

    def __init__(self, folder, flags):
        self.folder, self.flags = BUILD / folder, flags
        self.folder.mkdir(parents=True, exist_ok=True)
        cxx = shlex.join(layers.find_compiler())
        self.lines = ["rule cc", f"  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out"]
        self.lines += ["  depfile = $out.d", "rule link", f"  command = {cxx} $in -o $out $flags"]

    def link(self, output, sources, options=OPTIONS, link=(), after=()):
        objects = [f"{Path(output).stem}.{source.stem}.o" for source in sources]
        for name, source in zip(objects, sources):
            self._build(name, "cc", [source], [*options, *self.flags])
        self._build(output, "link", objects, [*self.flags, *link], after)

    def _build(self, output, rule, inputs, flags, after=()):
        flags = shlex.join(map(str, flags)).replace("$", "$$")
        needs = f" | {' '.join(map(str, after))}" if after else ""
        inputs = " ".join(map(str, inputs))
        self.lines += [f"build {output}: {rule} {inputs}{needs}", f"  flags = {flags}"]

    def run(self):
        (self.folder / "build.ninja").write_text("\n".join([*self.lines, ""]))
        run([sys.executable, "-m", "ninja", "-C", self.folder])


def library(ninja):
    """librmsnorm.so of the CPU's kernels."""
    plan = [ROOT / "csrc" / "cuda" / name for name in ("plan.cpp", "absent.cpp")]
    options = [*OPTIONS, '-DRMSNORM_CUDA_ABSENT_REASON="it was built for sanitizers"']
    path = ninja.folder / layers.KERNELS
    ninja.link(path, [*KERNELS, *plan], options, ["-shared", f"-Wl,-soname,{path.name}"])
    return path


def program(ninja, name, libraries, options=OPTIONS, link=()):
    """One of tests/native."""
    link = [*libraries, *link, *(f"-Wl,-rpath,{path.parent}" for path in libraries)]
    source = ROOT / "tests" / "native" / f"{name}.cpp"
    ninja.link(ninja.folder / name, [source], options, link, libraries)
    return ninja.folder / name


def torch_layers(ninja, torch, lib, folder):
    """librmsnorm_torch.so and the binding, in a folder."""
    after = [lib / layers.KERNELS]
    for layer in layers.both_layers(torch, ROOT / "csrc", lib, folder):
        options = [*layer.flags, "-O1", "-g1"]
        ninja.link(layer.library, layer.sources, options, ["-shared", *layer.link], after)
        after.append(layer.library)
    return layer


def kernels():
    """librmsnorm.so for `package`, and the program that checks it."""
    ninja = Ninja("kernels", [*ADDRESS, f"-fsanitize={CHEAP}"])
    check = program(ninja, "cpu_check", [library(ninja)])
    ninja.run()
    return check


def package(folder, kernels):
    """A copy of the package with that librmsnorm.so and two libraries of its own."""
    torch = layers.find_torch("torch>=0")
    copy = BUILD / folder / "rmsnorm_cuda"
    lib, ignored = copy / "lib", shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "rmsnorm_cuda", copy, ignore=ignored, dirs_exist_ok=True)
    (lib / torch.layer).mkdir(parents=True, exist_ok=True)
    shutil.copy2(kernels, lib)
    ninja = Ninja(folder, [*ADDRESS, *WHOLE])
    torch_layers(ninja, torch, lib, lib / torch.layer)
    ninja.run()


def check_kernels():
    run([kernels()])


def check_package(folder="package", library=BUILD / "kernels" / layers.KERNELS, names=CORE):
    if folder == "package":
        kernels()
    package(folder, library)
    cxx = layers.find_compiler()
    # The interpreter is not built for them: their runtimes come before all others, and libstdc++
    # with them, of which they wrap what throws.
    runtimes = [
        layers.output(*cxx, f"-print-file-name={name}").strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # what Python keeps until it ends
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = [ROOT / "tests" / f"test_{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not cuda"]
    options += ["-k", f"not ({NOT_UNDER_ASAN})", "-c", ROOT / "pyproject.toml"]
    pytest = [sys.executable, "-m", "pytest", *options]
    run([*pytest, *tests, ROOT / "tests" / "fuzz"], cwd=BUILD / folder, env=environment)


def check_threads():
    ninja, torch = Ninja("threads", THREAD), layers.find_torch("torch>=0")
    path = library(ninja)
    programs = [program(ninja, "threads_check", [path])]
    layer = torch_layers(ninja, torch, ninja.folder, ninja.folder)
    lib = torch.folder / "lib"
    link = [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}", "-rdynamic"]
    options = [*layer.flags, "-O1", "-g1", "-fvisibility=default"]  # it stands for libgomp
    libraries = [path, ninja.folder / layers.OPS]
    programs += [program(ninja, "torch_threads_check", libraries, options, link)]
    ninja.run()
    for path in programs:
        run([path])


def check_layers():
    check_package("layers", ROOT / "rmsnorm_cuda" / "lib" / layers.KERNELS, FEW)


def check_cuda():
    tool, devices = shutil.which("compute-sanitizer"), layers.output("nvidia-smi", "-L")
    if not (tool and shutil.which("nvcc") and "GPU 0" in devices):
        return print("cuda: left out: there is no GPU, no nvcc or no compute-sanitizer")
    program = BUILD / "cuda_check"
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), ROOT / "tests" / "native" / "cuda_check.cpp"]
    options = ["-std=c++17", "-O3", "-lineinfo", "-arch=native", '-DRMSNORM_CUDA_ARCHS="native"']
    BUILD.mkdir(parents=True, exist_ok=True)
    run(["nvcc", *options, *sources, "-o", program])
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        run([tool, "--tool", name, "--error-exitcode", "1", program])


PARTS = {
    "kernels": check_kernels,
    "package": check_package,
    "threads": check_threads,
    "cuda": check_cuda,
    "layers": check_layers,  # by name alone: `package` has more
}


def main(names):
    if unknown := set(names) - set(PARTS):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in names or [*PARTS][:-1]:
        PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
