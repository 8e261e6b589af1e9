"""Builds rmsnorm_cuda: three shared libraries, each ignorant of the one above.

    rmsnorm_cuda/lib/librmsnorm.so                  kernels; neither torch nor Python
    rmsnorm_cuda/lib/torch2.15/librmsnorm_torch.so  torch ops; no Python
    rmsnorm_cuda/lib/torch2.15/_C.*.so              Python binding

and rmsnorm_cuda/include/rmsnorm.h, a copy of the contract in csrc/, for C++ programs that call the
kernels. A build is for the torch of the Python that runs this, or for several. A wheel carries the
thin upper two once for each torch, and their sources: build_layers.py in rmsnorm_cuda/installation/
builds them for any other torch, and has their flags.

ninja does the work, incrementally and in parallel, through ccache where it is installed.
`python setup.py build_ext --inplace` rebuilds what changed; `--kernels-only` stops at
librmsnorm.so. .ci/README.md lists the environment variables.
"""

import contextlib
import fcntl
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
OLDEST_CUDA = 12, 6  # no torch that this builds for comes with an older one
WITHOUT_CUDA = "set RMSNORM_CUDA_BUILD=0 to leave CUDA out"

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
"""

if sys.version_info < (3, 10):  # noqa: UP036  (no pip is there to refuse it)
    sys.exit(f"rmsnorm_cuda: Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")


# Run, not imported: the package cannot be before it is built.
def run_module(name):
    return SimpleNamespace(**runpy.run_path(str(ROOT / f"rmsnorm_cuda/installation/{name}.py")))


layers, supported = run_module("build_layers"), run_module("supported")
fail, output = layers.fail, layers.output

if int(setuptools.__version__.split(".")[0]) < 77:
    found = f"setuptools {setuptools.__version__} is too old for this pyproject.toml"
    fail(f"{found}; `pip install 'setuptools>=77'`.")


def is_set(variable, default):
    """Whether an environment variable is "1"."""
    value = os.environ.get(variable) or default
    if value not in ("0", "1"):
        fail(f"{variable}={value!r} is not understood; expected 1, 0 or unset.")
    return value == "1"


def through_nvcc(words):
    """Options of g++ for nvcc, which knows -L and -l, and splits at commas what it hands on."""
    for word in words:
        yield from [word] if re.match("-[Ll].", word) else ["-Xcompiler", word.replace(",", "\\,")]


def find_ninja():
    with contextlib.suppress(ImportError):
        import ninja

        if (Path(ninja.BIN_DIR) / "ninja").exists():
            return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja") or fail("ninja was not found; `pip install ninja`.")


def find_torches():
    """The torches to build for. They are not imported: one for another Python will do."""
    folders, requirement = os.environ.get("RMSNORM_CUDA_TORCH"), supported.TORCH
    result = {}
    for folder in folders.split(os.pathsep) if folders else [None]:
        torch = layers.find_torch(requirement, folder)
        if not torch and folder:
            fix = f"`pip install --no-deps --target {folder} '{requirement}'`"
            fail(f"there is no torch in {folder}, which RMSNORM_CUDA_TORCH names; {fix}.")
        if not torch:
            fail(
                "torch is not installed in this build environment, where pip does not show what is "
                f"installed outside; `pip install '{requirement}' ninja 'setuptools>=77'` first, "
                "then build with `pip install --no-build-isolation`."
            )
        result[torch.layer] = torch
    return list(result.values())


def nvcc_or_reason(torches):
    """Path of nvcc, and why CUDA is left out, as the end of a sentence: one of the two is None."""
    unset, asked = not os.environ.get("RMSNORM_CUDA_BUILD"), is_set("RMSNORM_CUDA_BUILD", "0")
    if not unset and not asked:
        return None, "RMSNORM_CUDA_BUILD=0 was set when it was built"
    if unset and torches and not any(torch.cuda for torch in torches):
        kind = "ROCm" if torches[0].hip else "CPU-only"
        version = torches[0].version
        why = f"it was built with torch {version}, a {kind} build; RMSNORM_CUDA_BUILD=1 overrides"
        return None, why
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("NVCC") or (home and str(Path(home) / "bin" / "nvcc"))
    nvcc = shutil.which(named or "nvcc")  # it may be a wrapper script: its folder tells nothing
    if named and not nvcc:
        variable = "NVCC" if os.environ.get("NVCC") else "CUDA_HOME"
        fix = f"correct or unset it, or {WITHOUT_CUDA}"
        fail(f"{named} was not found, which {variable} asks for; {fix}.")
    if asked and not nvcc:
        fail("RMSNORM_CUDA_BUILD=1, but nvcc was not found on PATH, in CUDA_HOME or in NVCC.")
    return nvcc, None if nvcc else "nvcc was not found when it was built"


def architectures(nvcc):
    """[(number, name, is_ptx)] from TORCH_CUDA_ARCH_LIST, or the default ones that nvcc knows."""
    version = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    if not version or tuple(map(int, version.groups())) < OLDEST_CUDA:
        found = f"is of CUDA {version[1]}.{version[2]}" if version else "does not tell its version"
        needed = f"CUDA {'.'.join(map(str, OLDEST_CUDA))} or newer is needed"
        fix = f"name another in NVCC or CUDA_HOME, or {WITHOUT_CUDA}"
        fail(f"{nvcc} {found}, and {needed}; {fix}.")
    known = set(re.findall(r"compute_(\w+)", output(nvcc, "--list-gpu-arch")))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    result = []
    for item in re.split(r"[;,\s]+", (listed or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            expected = "expected items such as 9.0 or 8.6+PTX"
            fail(f"TORCH_CUDA_ARCH_LIST: {item!r} is not understood; {expected}.")
        number = match[1] + match[2]
        if number.rstrip("af") in known:
            result.append((number, item, bool(match[3])))
        elif listed:
            names = " ".join(f"{n[:-1]}.{n[-1]}" for n in sorted(known, key=int))
            fail(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {item}; it knows {names}.")
    if not result:
        none = f"none of the architectures {DEFAULT_ARCHITECTURES}"
        fail(f"{nvcc} knows {none}; set TORCH_CUDA_ARCH_LIST.")
    # An older nvcc does not know the one with PTX: newer devices compile from its newest.
    if not listed and not any(ptx for *_, ptx in result):
        number, item, _ = result.pop()
        result.append((number, f"{item}+PTX", True))
    return result


def sources(pattern):
    """The longest compilation first, with which ninja begins."""
    return sorted(ROOT.glob(pattern), reverse=True)


def long_description():
    """README.md for a package index, which has no repository around it: no pictures, and the path
    of a linked page in place of the link."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https:)([^)#]+)[^)]*\)", r"\1 (`\2`)", text)


class NinjaFile:
    """The text of a build.ninja. ninja's own writer would need its Python package where a system's
    ninja is enough."""

    def __init__(self, build_dir):
        self.build_dir, self.lines = build_dir, [NINJA_RULES]

    def rule(self, rule, output, inputs, implicit=(), **variables):
        def paths(names):
            return " ".join(re.sub(r"([$ :])", r"$\1", str(name)) for name in names)

        text = f"build {paths([output])}: {rule} {paths(inputs)}"
        text += f" | {paths(implicit)}" if implicit else ""
        for name, words in variables.items():
            text += f"\n  {name} = {shlex.join(words).replace('$', '$$')}"
        self.lines.append(text + "\n")
        return output

    def compile(self, rule, sources, folder="", **variables):
        """Objects of the sources, in a folder of the build's."""
        folder = self.build_dir / folder
        objects = [folder / f"{path.relative_to(ROOT)}.o" for path in sources]
        return [self.rule(rule, o, [path], **variables) for o, path in zip(objects, sources)]


class Build(build):
    def run(self):  # an error about what is missing comes before pages of what is copied
        layers.find_compiler(), find_ninja(), nvcc_or_reason(find_torches())
        super().run()


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # what an earlier build left would go into the wheel
            shutil.rmtree(Path(self.build_lib) / "rmsnorm_cuda", ignore_errors=True)
            sources = Path(self.build_lib) / "rmsnorm_cuda" / "csrc"
            for name in ("torch", "python"):
                shutil.copytree(ROOT / "csrc" / name, sources / name)
            shutil.copy2(ROOT / "csrc" / "rmsnorm.h", sources)
        super().run()


class BuildExt(build_ext):
    kernels_option = "kernels-only", None, "build librmsnorm.so alone; needs no torch"
    user_options = [*build_ext.user_options, kernels_option]
    kernels_only = False

    def finalize_options(self):
        # One build folder for all Pythons, for editable installs (whose own is thrown away) and
        # direct calls. A wheel for several torches has another: all of CUDA's architectures take a
        # quarter of an hour.
        objects = "wheel/objects" if os.environ.get("RMSNORM_CUDA_TORCH") else "objects"
        build_temp = self.build_temp or ROOT / "build" / objects
        super().finalize_options()
        self.build_temp = str(build_temp)

    @functools.cached_property
    def torches(self):
        return [] if self.kernels_only else find_torches()

    def get_outputs(self):
        """The header, librmsnorm.so, and for each torch librmsnorm_torch.so and the binding."""
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "rmsnorm_cuda"
        paths = [package / "include" / "rmsnorm.h", package / "lib" / layers.KERNELS]
        for torch in self.torches:
            folder = package / "lib" / torch.layer
            paths += folder / layers.OPS, folder / layers.binding_name()
        return [str(path) for path in paths]

    def get_output_mapping(self):
        return {}

    def run(self):
        build_dir = Path(self.build_temp).resolve()
        header, kernels, *built = map(Path, self.get_outputs())
        try:
            for path in (build_dir / "lock", header, kernels, *built):
                path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(build_dir / "lock", "w")
            # Until it is closed: of two builds in one folder the second waits.
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.copy2(ROOT / "csrc" / "rmsnorm.h", header)
        except OSError as error:
            reason = f"{error.filename} cannot be written ({error.strerror})"
            fail(f"{reason}; copy the sources to where you may write, and build there.")
        self.cxx = layers.find_compiler()
        self.launcher = ["ccache"] if shutil.which("ccache") else []
        # Debug symbols do not name the folder of the build.
        debug = is_set("RMSNORM_CUDA_DEBUG", "0")
        self.debug = ["-g1", f"-ffile-prefix-map={ROOT}=."] if debug else []
        file = NinjaFile(build_dir)
        self.add_kernels(file, kernels)
        for torch in self.torches:
            self.add_torch_layers(file, kernels, torch)
        (build_dir / "build.ninja").write_text("\n".join(file.lines), encoding="utf-8")
        jobs = ["-j", layers.jobs()] if layers.jobs() else []
        if subprocess.run([find_ninja(), "-C", str(build_dir), *jobs]).returncode:
            fail("the build failed; the compiler's message is above.")
        # Layers of another torch or Python that are older than what they load are of other sources,
        # most likely.
        for path in {*kernels.parent.rglob("*.so")} - {kernels, *built} if self.torches else ():
            loaded = [p for p in (kernels, path.with_name(layers.OPS)) if p.exists()]
            if path.stat().st_mtime < max(p.stat().st_mtime for p in loaded):
                path.unlink()

    def add_kernels(self, file, output_file):
        common = ["-O3", *self.debug, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # -ffp-contract=off: an FMA only where the source says so, or the bits would depend on the
        # compiler.
        cxx_flags = ["-std=c++17", *common, "-ffp-contract=off", "-fno-math-errno"]
        machine = output(*self.cxx, "-dumpmachine").strip()
        if not re.match(r"(x86_64|amd64)-.*linux(-gnu)?$", machine):
            why = f"{shlex.join(self.cxx)} compiles for {machine}"
            others = "the others are for x86-64 Linux with glibc"
            print(f"rmsnorm_cuda: scalar kernels only: {why}, and {others}")
            cxx_flags.append("-DRMSNORM_X86=0")
        cxx = self.launcher + self.cxx
        options = f"-Wl,-soname,{layers.KERNELS}", "-Wl,--no-undefined"
        link_flags = [*layers.words_of("LDFLAGS"), *options]
        nvcc, absent = nvcc_or_reason(self.torches)
        if absent:
            print(f"rmsnorm_cuda: without CUDA kernels: {absent}")
            flags = [*cxx_flags, f'-DRMSNORM_CUDA_ABSENT_REASON="{absent}"']
            objects = file.compile("cxx", sources("csrc/cuda/absent.cpp"), cxx=cxx, flags=flags)
            linker = self.cxx
        else:
            chosen = architectures(nvcc)
            names = " ".join(item for _, item, _ in chosen)
            print(f"rmsnorm_cuda: CUDA kernels for {names}, by {nvcc}")
            # -objtemp: intermediate files have the object's name. Elsewhere they have the process's
            # number, which ends up in the object.
            flags = ["-std=c++17", "-O3", "-objtemp", "-Xptxas", "-v", "-Xfatbin", "-compress-all"]
            flags += ["-t", "2"]  # two architectures at once: one source takes half of the time
            flags += ["-lineinfo"] if is_set("RMSNORM_CUDA_LINEINFO", "1") else []
            host = ["-ccbin", self.cxx[0], *through_nvcc(self.cxx[1:])]
            flags += [*host, "-Xcompiler", ",".join(common[1:]), f'-DRMSNORM_CUDA_ARCHS="{names}"']
            for number, _, is_ptx in chosen:
                flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
                if is_ptx:
                    flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
            command = [*self.launcher, nvcc]
            objects = file.compile("nvcc", sources("csrc/cuda/*.cu"), nvcc=command, flags=flags)
            cudart = os.environ.get("RMSNORM_CUDA_CUDART", "static")
            if cudart not in ("static", "shared"):
                expected = "expected static or shared"
                fail(f"RMSNORM_CUDA_CUDART={cudart!r} is not understood; {expected}.")
            # nvcc links, since only it knows where its runtime lies. A static runtime stays hidden
            # from torch's copy.
            linker = [nvcc, *host, "-cudart", cudart, "-nodlink"]
            link_flags = through_nvcc([*link_flags, "-Wl,--exclude-libs,ALL"])
        cpu_sources = [*sources("csrc/cpu/*.cpp"), ROOT / "csrc/cuda/plan.cpp"]
        objects += file.compile("cxx", cpu_sources, cxx=cxx, flags=cxx_flags)
        file.rule("link", output_file, objects, linker=linker, flags=link_flags)

    def add_torch_layers(self, file, kernels, torch):
        cxx, lib, needs = self.launcher + self.cxx, kernels.parent, [kernels]
        for layer in layers.both_layers(torch, ROOT / "csrc", lib, lib / torch.layer):
            folder, flags = f"{torch.layer}/{layer.library.stem}", [*layer.flags, *self.debug]
            objects = file.compile("cxx", layer.sources, folder, cxx=cxx, flags=flags)
            options = {"implicit": [*needs], "linker": self.cxx, "flags": layer.link}
            needs.append(file.rule("link", layer.library, objects, **options))


setup(
    ext_modules=[Extension("rmsnorm_cuda._C", sources=[])],
    cmdclass={"build": Build, "build_py": BuildPy, "build_ext": BuildExt},
    install_requires=[supported.TORCH],
    python_requires=supported.PYTHON,
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
