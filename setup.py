"""Builds rmsnorm_cuda: three shared libraries, each ignorant of the one above.

    rmsnorm_cuda/lib/librmsnorm.so                  kernels         csrc/cpu csrc/cuda   neither torch nor Python
    rmsnorm_cuda/lib/torch2.13/librmsnorm_torch.so  torch ops       csrc/torch           no Python
    rmsnorm_cuda/lib/torch2.13/_C.*.so              Python binding  csrc/python

and rmsnorm_cuda/include/rmsnorm.h, a copy of the contract in csrc/, for C++ programs that call the kernels. A build is for the
torch of the Python that runs this, or for several: a wheel carries the thin upper two once for each.

ninja does the work, incrementally and in parallel, through ccache where it is installed. Environment:

    RMSNORM_CUDA_BUILD     1: compile the CUDA kernels, also against a CPU-only torch; 0: leave them out;
                           unset: compile them if torch is a CUDA build and nvcc is there
    TORCH_CUDA_ARCH_LIST   e.g. "9.0" or "8.0;9.0+PTX"; default: every architecture below that nvcc knows
    RMSNORM_CUDA_CUDART    static (default) or shared: how the CUDA runtime is linked
    CUDA_HOME, NVCC, CXX   where the compilers are
    MAX_JOBS               how many of them run at once
    RMSNORM_CUDA_DEBUG     1: line tables for debuggers and profilers, which take a sixth more time to compile
    RMSNORM_CUDA_TORCH     folders, separated by colons, that each hold a package torch to build for; it is not imported

`python setup.py build_ext --inplace` rebuilds what changed; `--kernels-only` stops at librmsnorm.so.
"""

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

try:
    import setuptools
    from setuptools import Extension, setup
    from setuptools.command.build import build
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py
except ModuleNotFoundError:
    sys.exit("rmsnorm_cuda: setuptools is not installed; `pip install 'setuptools>=77' ninja`.")

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
LEAST_CUDA = 12, 6  # of the torches that this builds for, none comes with an older one

NINJA_RULES = """\
rule cxx
  command = $cxx -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
# ptxas' report (registers, spills) is kept beside the object.
rule nvcc
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)
  depfile = $out.d
  deps = gcc
  description = NVCC $out
rule link
  command = $linker -shared -o $out $in $flags
  description = LINK $out
rule copy
  command = cp $in $out
  description = COPY $out
"""


def fail(sentence):
    sys.exit(f"rmsnorm_cuda: {sentence}")


if sys.version_info < (3, 10):
    fail(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
if int(setuptools.__version__.split(".")[0]) < 77:
    fail(f"setuptools {setuptools.__version__} is too old for this pyproject.toml; `pip install 'setuptools>=77'`.")


def find_compiler():
    """The words of the command, without ccache: that is put before every compiler where it is installed."""
    cxx = os.environ.get("CXX") or "g++"
    try:
        words = shlex.split(cxx)
    except ValueError as error:
        fail(f"CXX={cxx!r} is not understood: {error}.")
    if words and Path(words[0]).name == "ccache":
        words = words[1:]
    if not words or not shutil.which(words[0]):
        fail(f"the C++ compiler {cxx!r} was not found; install g++ 11 or newer, or name one in CXX.")
    version = output(*words, "-dumpversion").strip()
    if re.match(r"\d+", version) and int(re.match(r"\d+", version)[0]) < 11:
        fail(f"{cxx} is of version {version}, and g++ or clang++ 11 or newer is needed; name another in CXX.")
    return words


def find_ninja():
    try:
        import ninja

        if (Path(ninja.BIN_DIR) / "ninja").exists():
            return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        pass
    return shutil.which("ninja") or fail("ninja was not found; `pip install ninja`.")


def find_nvcc():
    """Path of nvcc, or None. It may be a wrapper script: nothing is concluded from where it lies."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("NVCC") or (home and str(Path(home) / "bin" / "nvcc"))
    if named and not shutil.which(named):
        variable = "NVCC" if os.environ.get("NVCC") else "CUDA_HOME"
        fail(f"{named} was not found, which {variable} asks for; correct or unset it, or set RMSNORM_CUDA_BUILD=0 to leave CUDA out.")
    return shutil.which(named or "nvcc")


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # what it was built with
    hip: str | None

    @property
    def minor(self):
        return ".".join(self.version.split(".")[:2])


def find_torches():
    """The torches to build for, by version. They are not imported: the headers and libraries of one for another Python do."""
    wanted = re.search(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text())[1].replace(".0a0", "")
    least, below = (tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", wanted))
    named = os.environ.get("RMSNORM_CUDA_TORCH")
    result = {}
    for where in named.split(os.pathsep) if named else [None]:
        spec = importlib.machinery.PathFinder.find_spec("torch", [where]) if where else importlib.util.find_spec("torch")
        if not spec or not spec.origin:
            fail(
                f"there is no torch in {where}, which RMSNORM_CUDA_TORCH names; `pip install --no-deps --target {where} '{wanted}'`."
                if where
                else f"torch is not installed in this build environment, where pip does not show what is installed outside; `pip install "
                f"'{wanted}' ninja 'setuptools>=77'` first, then build with `pip install --no-build-isolation`."
            )
        folder = Path(spec.origin).parent
        try:
            version = runpy.run_path(str(folder / "version.py"))
        except OSError:
            fail(f"torch in {folder} is not complete: it has no version.py; `pip install --force-reinstall '{wanted}'`.")
        torch = Torch(folder, version["__version__"], version.get("cuda"), version.get("hip"))
        if not least <= tuple(map(int, torch.minor.split("."))) < below:
            fail(f"torch {torch.version} was found, and {wanted} is needed; `pip install '{wanted}'`.")
        result[torch.minor] = torch
    return list(result.values())


def nvcc_or_reason(torches):
    """Path of nvcc, and why CUDA is left out, as the end of a sentence: one of the two is None."""
    wish = os.environ.get("RMSNORM_CUDA_BUILD", "")
    if wish not in ("", "0", "1"):
        fail(f"RMSNORM_CUDA_BUILD={wish!r} is not understood; expected 1, 0 or unset.")
    if wish == "0":
        return None, "RMSNORM_CUDA_BUILD=0 was set when it was built"
    if wish == "" and torches and not any(torch.cuda for torch in torches):
        kind = "ROCm" if torches[0].hip else "CPU-only"
        return None, f"it was built with torch {torches[0].version}, a {kind} build; RMSNORM_CUDA_BUILD=1 overrides"
    nvcc = find_nvcc()
    if wish == "1" and not nvcc:
        fail("RMSNORM_CUDA_BUILD=1, but nvcc was not found on PATH, in CUDA_HOME or in NVCC.")
    return nvcc, None if nvcc else "nvcc was not found when it was built"


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:  # not a program
        return ""


def architectures(nvcc):
    """[(number, is_ptx)] from TORCH_CUDA_ARCH_LIST, or the default ones that this nvcc knows."""
    version = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    if not version or tuple(map(int, version.groups())) < LEAST_CUDA:
        fail(
            f"{nvcc} {'is of CUDA ' + '.'.join(version.groups()) if version else 'does not tell its version'}, and CUDA "
            f"{'.'.join(map(str, LEAST_CUDA))} or newer is needed; name another in NVCC or CUDA_HOME, or set RMSNORM_CUDA_BUILD=0 to leave CUDA out."
        )
    known = set(re.findall(r"compute_(\w+)", output(nvcc, "--list-gpu-arch")))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    result = []
    for item in re.split(r"[;,\s]+", (listed or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST: {item!r} is not understood; expected items such as 9.0 or 8.6+PTX.")
        number = match[1] + match[2]
        if number.rstrip("af") in known:
            result.append((number, item, bool(match[3])))
        elif listed:
            fail(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {item}; it knows {' '.join(f'{n[:-1]}.{n[-1]}' for n in sorted(known, key=int))}.")
    if not result:
        fail(f"{nvcc} knows none of the architectures {DEFAULT_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST.")
    if not listed and not any(ptx for *_, ptx in result):  # of an older nvcc: newer devices compile from its newest
        number, item, _ = result.pop()
        result.append((number, f"{item}+PTX", True))
    return result


def sources(pattern):
    """In this order the longest compilations come first, as ninja begins with what it reads first."""
    return sorted((str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)), reverse=True)


class NinjaFile:
    """The text of a build.ninja."""

    def __init__(self, build_dir):
        self.build_dir = build_dir
        self.lines = [NINJA_RULES]

    @staticmethod
    def escape(path):
        return re.sub(r"([$ :])", r"$\1", str(path))

    def rule(self, rule, output, inputs, implicit=(), **variables):
        text = f"build {self.escape(output)}: {rule} {' '.join(map(self.escape, inputs))}"
        if implicit:
            text += " | " + " ".join(map(self.escape, implicit))
        for name, words in variables.items():
            text += f"\n  {name} = {shlex.join(words).replace('$', '$$')}"
        self.lines.append(text + "\n")
        return output

    def compile(self, rule, sources, folder="", **variables):
        """Objects of the sources, which are relative to ROOT, in a folder of the build's."""
        return [self.rule(rule, self.build_dir / folder / f"{s}.o", [ROOT / s], **variables) for s in sources]


class Build(build):
    def run(self):  # what is missing is told before pages of what is copied
        find_compiler(), find_ninja(), nvcc_or_reason(find_torches())
        super().run()


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # what an earlier build left would go into the wheel
            shutil.rmtree(Path(self.build_lib) / "rmsnorm_cuda", ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    user_options = build_ext.user_options + [("kernels-only", None, "build librmsnorm.so alone; needs no torch")]
    boolean_options = build_ext.boolean_options + ["kernels-only"]

    def initialize_options(self):
        super().initialize_options()
        self.kernels_only = False

    def finalize_options(self):
        # One build folder for all Pythons, for editable installs (whose own is thrown away) and direct calls. A wheel for
        # several torches has another: all of CUDA's architectures take a quarter of an hour.
        build_temp = self.build_temp or ROOT / "build" / ("wheel/objects" if os.environ.get("RMSNORM_CUDA_TORCH") else "objects")
        super().finalize_options()
        self.build_temp = str(build_temp)

    @functools.cached_property
    def torches(self):
        return [] if self.kernels_only else find_torches()

    def run(self):
        self.build_extensions()

    def package_dir(self):
        return ROOT / "rmsnorm_cuda" if self.inplace else Path(self.build_lib).resolve() / "rmsnorm_cuda"

    def outputs(self):
        """The header, librmsnorm.so, and for each torch librmsnorm_torch.so and the binding."""
        package = self.package_dir()
        binding = Path(self.get_ext_filename("rmsnorm_cuda._C")).name
        layers = [package / "lib" / f"torch{torch.minor}" for torch in self.torches]
        return package / "include" / "rmsnorm.h", package / "lib" / "librmsnorm.so", [(d / "librmsnorm_torch.so", d / binding) for d in layers]

    def get_outputs(self):
        header, kernels, layers = self.outputs()
        return [str(path) for path in (header, kernels, *(path for pair in layers for path in pair))]

    def get_output_mapping(self):
        return {}

    def build_extensions(self):
        header, kernels, layers = self.outputs()
        build_dir = Path(self.build_temp).resolve()
        built = {Path(path) for path in self.get_outputs()}
        try:
            for folder in {build_dir, *(path.parent for path in built)}:
                folder.mkdir(parents=True, exist_ok=True)
            lock = open(build_dir / "lock", "w")
        except OSError as error:
            fail(f"{error.filename} cannot be written ({error.strerror}); copy the sources to where you may write, and build there.")
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: of two builds in one folder the second waits
        self.cxx = find_compiler()
        self.launcher = ["ccache"] if shutil.which("ccache") else []
        # The folder of the build does not show in them.
        self.debug = ["-g1", f"-ffile-prefix-map={ROOT}=."] if os.environ.get("RMSNORM_CUDA_DEBUG") == "1" else []
        file = NinjaFile(build_dir)
        file.rule("copy", header, [ROOT / "csrc" / "rmsnorm.h"])
        self.add_kernels(file, kernels)
        for torch, (ops, binding) in zip(self.torches, layers):
            self.add_torch_layers(file, kernels, ops, binding, torch)
        (build_dir / "build.ninja").write_text("\n".join(file.lines))
        command, jobs = [find_ninja(), "-C", str(build_dir)], os.environ.get("MAX_JOBS")
        if jobs:
            command += ["-j", jobs if jobs.isdecimal() else fail(f"MAX_JOBS={jobs!r} is not understood; expected a number.")]
        if subprocess.run(command).returncode:
            fail("the build failed; the compiler's message is above.")
        # Those of another torch or Python that are older than what they load are of other sources, most likely.
        for path in set(self.package_dir().rglob("*.so")) - built if self.torches else ():
            loads = [p.stat().st_mtime for p in (kernels, path.with_name("librmsnorm_torch.so")) if p.exists()]
            if path.stat().st_mtime < max(loads):
                path.unlink()

    def add_kernels(self, file, output_file):
        common = ["-O3", *self.debug, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # -ffp-contract=off: an FMA only where the source says so, or the bits would depend on the compiler.
        cxx_flags = ["-std=c++17", *common, "-ffp-contract=off", "-fno-math-errno"]
        machine = output(*self.cxx, "-dumpmachine").strip()
        if not re.match(r"(x86_64|amd64)-.*linux(-gnu)?$", machine):
            print(f"rmsnorm_cuda: scalar kernels only: {shlex.join(self.cxx)} compiles for {machine}, and the others are for x86-64 Linux with glibc")
            cxx_flags.append("-DRMSNORM_X86=0")
        nvcc, absent = nvcc_or_reason(self.torches)
        if absent:
            print(f"rmsnorm_cuda: without CUDA kernels: {absent}")
            define = f'-DRMSNORM_CUDA_ABSENT_REASON="{absent}"'
            objects = file.compile("cxx", ["csrc/cuda/absent.cpp"], cxx=self.launcher + self.cxx, flags=[*cxx_flags, define])
            linker, link_flags = self.cxx, []
        else:
            chosen = architectures(nvcc)
            print(f"rmsnorm_cuda: CUDA kernels for {' '.join(item for _, item, _ in chosen)}, by {nvcc}")
            # -objtemp: what is between has the object's name; elsewhere it has the process's number, which ends up in the object.
            flags = ["-std=c++17", "-O3", "-lineinfo", "-objtemp", "-Xptxas", "-v", "-Xfatbin", "-compress-all"]
            host = ["-ccbin", self.cxx[0], *(word for option in self.cxx[1:] for word in ("-Xcompiler", option))]
            flags += [*host, "-Xcompiler", ",".join(common[1:])]
            flags += [f'-DRMSNORM_CUDA_ARCHS="{" ".join(item for _, item, _ in chosen)}"']
            for number, _, is_ptx in chosen:
                flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
                if is_ptx:
                    flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
            objects = file.compile("nvcc", sources("csrc/cuda/*.cu"), nvcc=[*self.launcher, nvcc], flags=flags)
            cudart = os.environ.get("RMSNORM_CUDA_CUDART", "static")
            if cudart not in ("static", "shared"):
                fail(f"RMSNORM_CUDA_CUDART={cudart!r} is not understood; expected static or shared.")
            # nvcc links, since only it knows where its runtime lies; what is static stays hidden from torch's copy.
            linker = [nvcc, *host]
            link_flags = ["-cudart", cudart, "-nodlink", "-Xlinker", "--exclude-libs,ALL"]
        objects += file.compile("cxx", [*sources("csrc/cpu/*.cpp"), "csrc/cuda/plan.cpp"], cxx=self.launcher + self.cxx, flags=cxx_flags)
        wl = "-Xlinker {}" if not absent else "-Wl,{}"
        for option in ("-soname,librmsnorm.so", "--no-undefined"):
            link_flags += wl.format(option).split(" ", 1)
        file.rule("link", output_file, objects, linker=linker, flags=link_flags)

    def add_torch_layers(self, file, kernels, ops, binding, torch):
        # at::parallel_for is inline and serial without -fopenmp; the runtime is libgomp.so.1, torch's own.
        flags = ["-std=c++20", "-O2", *self.debug, "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += ["-isystem", str(torch.folder / "include")]
        library_dirs = [f"-L{kernels.parent}", f"-L{torch.folder / 'lib'}", "-Wl,--no-as-needed", "-Wl,--no-undefined"]
        cxx, name = self.launcher + self.cxx, f"torch{torch.minor}"

        objects = file.compile("cxx", sources("csrc/torch/*.cpp"), name, cxx=cxx, flags=flags)
        # $ORIGIN/../../../torch/lib is where torch lies beside an installed package; in Python it is loaded already.
        link = [*library_dirs, "-fopenmp", "-lrmsnorm", "-ltorch_cpu", "-lc10", "-Wl,-soname,librmsnorm_torch.so"]
        link += ["-Wl,-rpath,$ORIGIN/..:$ORIGIN/../../../torch/lib"]
        file.rule("link", ops, objects, implicit=[kernels], linker=self.cxx, flags=link)

        # pybind11 is the one that torch was built with: its type casters are torch's.
        # The argument parser's header takes fmt's functions inline, as torch itself was compiled.
        python = ["-DFMT_HEADER_ONLY=1", "-isystem", sysconfig.get_paths()["include"], f'-DRMSNORM_TORCH_VERSION="{torch.version}"']
        where = f"{name}/{sys.implementation.cache_tag}"
        objects = file.compile("cxx", ["csrc/python/bindings.cpp"], where, cxx=cxx, flags=[*flags, *python])
        # A Python module leaves Python's own symbols to the interpreter.
        link = [flag for flag in library_dirs if flag != "-Wl,--no-undefined"]
        link += [f"-L{ops.parent}", "-lrmsnorm_torch", "-lrmsnorm", "-ltorch_python", "-ltorch_cpu", "-lc10"]
        link += ["-Wl,-rpath,$ORIGIN:$ORIGIN/..:$ORIGIN/../../../torch/lib"]
        file.rule("link", binding, objects, implicit=[kernels, ops], linker=self.cxx, flags=link)


setup(ext_modules=[Extension("rmsnorm_cuda._C", sources=[])], cmdclass={"build": Build, "build_py": BuildPy, "build_ext": BuildExt})
