"""What is installed, and what is not: each thing that can be missing or wrong is told in one sentence, with what mends it."""

import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C, binary

PACKAGE = Path(rmsnorm_cuda.__file__).parent
ROOT = Path(__file__).parents[1]
MINOR = ".".join(torch.__version__.split(".")[:2])
SETUPTOOLS = Path(pytest.importorskip("setuptools").__file__).parents[1]


def last_line(code, *path, cwd, without_site=False, **environment):
    """What `python -c code` says last, with `path` ahead of everything; there is no other error above it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    python = [sys.executable, *(["-S"] if without_site else [])]
    run = subprocess.run([*python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and len(re.findall(r"^\w*Error: ", run.stderr, re.M)) == 1, run.stdout + run.stderr
    return run.stderr.strip().splitlines()[-1]


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be spoilt; `import rmsnorm_cuda` takes it if its parent is ahead in sys.path."""
    shutil.copytree(PACKAGE, tmp_path / "there" / "rmsnorm_cuda", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "there" / "rmsnorm_cuda"


def fake_torch(folder, version):
    """A package torch of this version, with nothing in it."""
    (folder / "torch").mkdir(parents=True)
    text = f"__version__ = {version!r}\ncuda = None\n"
    (folder / "torch" / "__init__.py").write_text(text)
    (folder / "torch" / "version.py").write_text(text)
    return folder


# At import


def test_range_of_torch_is_written_alike():
    assert f'dependencies = ["{binary.TORCH.replace(",", ".0a0,")}"]' in (ROOT / "pyproject.toml").read_text()
    assert MINOR in binary.carried()
    if (ROOT / ".ci" / "wheels.py").exists():
        torches = runpy.run_path(str(ROOT / ".ci" / "wheels.py"))["TORCHES"]
        least, below = ([int(n) for n in re.findall(r"\d+", part)] for part in binary.TORCH.split(","))
        assert [v.rpartition(".")[0] for v in torches] == [f"2.{minor}" for minor in range(least[1], below[1])]


def test_no_torch(tmp_path, package):
    (tmp_path / "torch").mkdir()
    said = last_line("import rmsnorm_cuda", tmp_path, package.parent, cwd=tmp_path, without_site=True)
    assert said == f"ImportError: rmsnorm_cuda needs torch, and the folder {tmp_path / 'torch'} is not that; `pip install '{binary.TORCH}'`."
    said = last_line("import sys; sys.modules['torch'] = None; import rmsnorm_cuda", PACKAGE.parent, cwd=tmp_path)
    assert said == f"ImportError: rmsnorm_cuda needs torch, which is not installed; `pip install '{binary.TORCH}'`."


@pytest.mark.parametrize("version, mend", [("2.10.1+cu128", ""), ("unknown", ""), ("3.0.0", ""), ("2.11.0", ", or build it for this one by `")])
def test_another_torch(version, mend, tmp_path, package):
    """Too old, too new, or one that it was not built for."""
    for folder in package.glob("lib/torch2.1*"):
        if folder.name != f"torch{MINOR}" or version.startswith(MINOR):
            shutil.rmtree(folder)
    for name in ("torch2.9", "torch2.9.old"):
        (package / "lib" / name).mkdir()
        (package / "lib" / name / "librmsnorm_torch.so").touch()
    said = last_line("import rmsnorm_cuda", fake_torch(tmp_path / "other", version), package.parent, cwd=tmp_path)
    assert f"was built for torch 2.9{'' if version.startswith(MINOR) else ', ' + MINOR}, and this is torch {version}; `pip install" in said
    assert re.search(r"`pip install 'torch==2\.\d+\.\*'`" + re.escape(mend or "."), said)


def test_another_python(tmp_path, package):
    for file in package.glob(f"lib/torch{MINOR}/_C.*"):
        file.rename(file.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert "was built for another Python (cpython-39-x86_64-linux-gnu), and this is CPython 3." in said


@pytest.mark.parametrize("what", ["no library", "not there", "no binding", "cut", "of another torch"])
def test_build_that_went_wrong(what, tmp_path, package):
    """Never an undefined symbol."""
    ops, binding = package / "lib" / f"torch{MINOR}" / "librmsnorm_torch.so", next(package.glob(f"lib/torch{MINOR}/_C.*"))
    if what == "no library":
        ops.write_bytes(b"<html>")
    elif what == "not there":
        (package / "lib" / "librmsnorm.so").unlink()
    elif what == "no binding":
        binding.unlink()
    elif what == "cut":  # loaded, it would kill the process
        ops.write_bytes(ops.read_bytes()[: ops.stat().st_size // 2])
    else:
        if not shutil.which("g++"):
            pytest.skip("g++ is not installed")
        code = 'extern "C" int symbol_of_another_torch(); extern "C" void* PyInit__C() { return (void*)(long)symbol_of_another_torch(); }'
        subprocess.run(["g++", "-shared", "-fPIC", "-Wl,-z,now", "-xc++", "-", "-o", binding], input=code, text=True, check=True)
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert re.match(f"ImportError: rmsnorm_cuda's build for torch {MINOR} in .* does not load beside torch {re.escape(torch.__version__)}", said)
    assert re.search(r"build it anew by `/\S+ -m pip install --force-reinstall --no-cache-dir", said) and "symbol" not in said


def test_nothing_compiled(tmp_path, package):
    """In a wheel that is damaged, and in a checkout, where another command helps."""
    shutil.rmtree(package / "lib")
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert f"is not compiled in {package}" in said and "pip install --force-reinstall" in said
    (package.parent / "setup.py").touch()
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert re.search(rf"`cd {package.parent} && /\S+ setup\.py build_ext --inplace`", said)


def test_site_packages_that_cannot_be_written(tmp_path, package):
    """Nothing is written beside the package, neither by importing nor by running it."""
    code = f"""if True:
        import os, sys
        sys.dont_write_bytecode = True
        def audit(event, args):
            if event == "open" and str(args[0]).startswith({str(package)!r}) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise PermissionError(args[0])
            if event in ("os.mkdir", "os.rename", "os.remove") and str(args[0]).startswith({str(package)!r}):
                raise PermissionError(args[0])
        sys.addaudithook(audit)
        import torch, rmsnorm_cuda, rmsnorm_cuda.__main__
        assert rmsnorm_cuda.__file__.startswith({str(package)!r})
        sys.argv = ["rmsnorm_cuda"]
        torch.compile(rmsnorm_cuda.RMSNorm(8), backend="aot_eager")(torch.ones(2, 8))
        sys.exit(rmsnorm_cuda.__main__.main())
    """
    for path in [package, *package.rglob("*")]:
        path.chmod(stat.S_IREAD | (stat.S_IEXEC if path.is_dir() else 0))  # the superuser may write there all the same
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(package.parent)}, capture_output=True, text=True)
    for path in [package, *package.rglob("*")]:
        path.chmod(stat.S_IRWXU)
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "OK", run.stdout + run.stderr


# While it is built


needs_sources = pytest.mark.skipif(not (ROOT / "rmsnorm_cuda").exists() or not shutil.which("g++"), reason="there are no sources, or no g++")


def setup(*command, tmp_path, fails=True, without_site=False, **environment):
    """What `python setup.py build_ext` prints; its last line if it fails, which is all of stderr then."""
    ours = {k for k in os.environ if k.startswith("RMSNORM_CUDA_")} | {"NVCC", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS"}
    environment = {k: v for k, v in os.environ.items() if k not in ours} | environment
    folders = "--build-temp", str(tmp_path / "objects"), "--build-lib", str(tmp_path / "lib")
    python = [sys.executable, *(["-S"] if without_site else [])]
    run = subprocess.run([*python, "setup.py", "-q", "build_ext", *folders, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode != 0) == fails, run.stdout + run.stderr
    if fails:
        assert run.stderr.startswith("rmsnorm_cuda: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr if fails else run.stdout


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def only_setuptools(folder):
    """Fills it with what a build needs but torch."""
    for pattern in ("setuptools*", "_distutils_hack", "ninja*", "wheel*", "pkg_resources"):
        for path in SETUPTOOLS.glob(pattern):
            (folder / path.name).symlink_to(path)


@needs_sources
def test_build_without_a_compiler(tmp_path):
    for missing in ("/nowhere/g++", " ", "ccache"):
        said = setup("--kernels-only", tmp_path=tmp_path, CXX=missing)
        assert f"the C++ compiler {missing!r} was not found; install g++ 11 or newer" in said
    assert "No closing quotation" in setup("--kernels-only", tmp_path=tmp_path, CXX="g++ '")
    old = script(tmp_path / "g++", "echo 9.4.0")
    assert f"{old} is of version 9.4.0, and g++ or clang++ 11 or newer is needed" in setup("--kernels-only", tmp_path=tmp_path, CXX=old)
    assert "MAX_JOBS='many' is not understood" in setup("--kernels-only", tmp_path=tmp_path, MAX_JOBS="many", RMSNORM_CUDA_BUILD="0")


@needs_sources
def test_build_without_setuptools(tmp_path):
    said = setup(tmp_path=tmp_path, without_site=True, PYTHONPATH=str(tmp_path))
    assert said == "rmsnorm_cuda: setuptools is not installed; `pip install 'setuptools>=77' ninja`.\n"


@needs_sources
def test_build_where_nothing_can_be_written(tmp_path):
    (tmp_path / "objects").touch()
    assert f"{tmp_path / 'objects'} cannot be written" in setup("--kernels-only", tmp_path=tmp_path)


@needs_sources
def test_build_without_torch(tmp_path):
    """As with build isolation, which is what pip does if it is not told otherwise."""
    only_setuptools(tmp_path)
    said = setup(tmp_path=tmp_path, without_site=True, PYTHONPATH=str(tmp_path))
    assert "torch is not installed in this build environment" in said and "`pip install --no-build-isolation`" in said
    assert f"`pip install '{binary.TORCH}' ninja" in said
    said = setup(tmp_path=tmp_path, RMSNORM_CUDA_TORCH=str(tmp_path / "nothing"))
    assert f"there is no torch in {tmp_path / 'nothing'}, which RMSNORM_CUDA_TORCH names" in said


@needs_sources
@pytest.mark.parametrize("version", ["2.10.0", "2.14.0a0+git123"])
def test_build_for_another_torch(version, tmp_path):
    said = setup(tmp_path=tmp_path, RMSNORM_CUDA_TORCH=str(fake_torch(tmp_path / "other", version)))
    assert f"torch {version} was found, and {binary.TORCH} is needed; `pip install '{binary.TORCH}'`." in said


@needs_sources
def test_build_by_another_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="rmsnorm_cuda: Python 3.10 or newer is needed; this is "):
        runpy.run_path(str(ROOT / "setup.py"))


@needs_sources
def test_build_without_nvcc(tmp_path):
    """Asked for, it is missed; not asked for, CUDA is left out, and the build says so."""
    for tool in ("g++", "gcc", "as", "ld", "cc1plus", "cp", "sh", "readelf"):
        if shutil.which(tool):
            (tmp_path / tool).symlink_to(shutil.which(tool))
    said = setup("--kernels-only", tmp_path=tmp_path, PATH=str(tmp_path), RMSNORM_CUDA_BUILD="1")
    assert "RMSNORM_CUDA_BUILD=1, but nvcc was not found on PATH, in CUDA_HOME or in NVCC" in said
    said = setup("--kernels-only", tmp_path=tmp_path, CUDA_HOME="/nowhere")
    assert "/nowhere/bin/nvcc was not found, which CUDA_HOME asks for" in said


@needs_sources
def test_build_by_an_old_nvcc(tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    said = setup("--kernels-only", tmp_path=tmp_path, NVCC=nvcc)
    assert f"{nvcc} is of CUDA 11.8, and CUDA 12.6 or newer is needed" in said and "RMSNORM_CUDA_BUILD=0" in said


@needs_sources
@pytest.mark.slow
def test_build_for_another_machine(tmp_path):
    """By this machine's compiler, which says that it is another's: the scalar kernels alone are built, and they work."""

    def compiler(machine, otherwise):
        return script(tmp_path / "c++", f'if [ "$1" = -dumpmachine ]; then echo {machine}; else {otherwise}; fi')

    for machine, works in (("x86_64-alpine-linux-musl", False), ("aarch64-linux-gnu", True)):
        cxx = compiler(machine, 'exec g++ "$@"' if works else "exit 1")
        command = [sys.executable, "setup.py", "build_ext", "--kernels-only", "--build-temp", tmp_path / machine, "--build-lib", tmp_path / "lib"]
        environment = os.environ | {"CXX": cxx, "RMSNORM_CUDA_BUILD": "0"}
        run = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert f"scalar kernels only: {cxx} compiles for {machine}" in run.stdout and (run.returncode == 0) == works, run.stderr
    library = tmp_path / "lib" / "rmsnorm_cuda" / "lib"
    program = tmp_path / "check.cpp"
    program.write_text('#include <cstdio>\n#include "rmsnorm.h"\nint main() { std::printf("%d %s", rmsnorm::cpu::isa_count(), rmsnorm::cpu::isa()); }')
    link = [f"-I{ROOT / 'csrc'}", f"-L{library}", "-lrmsnorm", f"-Wl,-rpath,{library}"]
    subprocess.run(["g++", "-std=c++17", program, *link, "-o", tmp_path / "check"], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "RMSNORM_CUDA_ISA"}
    assert subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=True, env=environment).stdout == "1 scalar"


# The wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Those in dist/ that are of these sources; and one for this torch alone, as setuptools makes it, from objects that are there."""
    if not (ROOT / "build" / "objects" / "build.ninja").exists() or not (ROOT / "rmsnorm_cuda").exists():
        pytest.skip("the package was not built here from its sources")
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "lib" / "rmsnorm_cuda").mkdir(parents=True)
    (folder / "lib" / "rmsnorm_cuda" / "_of_an_earlier_build.py").touch()
    command = ["build", "--build-lib", folder / "lib", "bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "bdist"]
    environment = os.environ | {"RMSNORM_CUDA_BUILD": str(int(_C.cuda_built()))}
    if _C.cuda_built():
        environment["TORCH_CUDA_ARCH_LIST"] = _C.cuda_architectures()
    run = subprocess.run([sys.executable, "setup.py", "-q", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    sources = [path for name in ("csrc", "rmsnorm_cuda") for path in (ROOT / name).rglob("*.[chip]*") if path.suffix != ".pyc"]
    changed = max(path.stat().st_mtime for path in sources if path.parent.name != "include")
    return [*folder.glob("*.whl"), *(wheel for wheel in ROOT.glob("dist/*.whl") if wheel.stat().st_mtime > changed)]


def test_wheel_holds_what_it_needs_and_no_more(wheels):
    for wheel in wheels:
        python, abi, platform = wheel.stem.split("-")[2:]
        names = set(zipfile.ZipFile(wheel).namelist())
        finished = platform.startswith("manylinux")
        assert python == abi and re.fullmatch(r"cp31\d", python) and (finished or platform == "linux_x86_64"), wheel
        assert wheel.stat().st_size < 60e6
        libraries = {name for name in names if re.search(r"\.so\b", name)}
        minors = {re.search(r"/torch(\d\.\d+)/", name)[1] for name in libraries if "/torch" in name}
        assert finished or minors == {MINOR}, wheel
        binding = f"_C.cpython-{python[2:]}-x86_64-linux-gnu.so"
        wanted = {f"rmsnorm_cuda/lib/torch{minor}/{name}" for minor in minors for name in ("librmsnorm_torch.so", binding)}
        assert libraries == wanted | {"rmsnorm_cuda/lib/librmsnorm.so"}  # and nothing of torch, CUDA or the compiler
        others = {"py.typed", "_C.pyi", "ops.pyi", "include/rmsnorm.h", "cmake/rmsnorm_cuda-config.cmake", "integrations/vllm.py"}
        assert {f"rmsnorm_cuda/{name}" for name in others} <= names
        assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks", "build")) or "earlier" in name]
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())
        needed = [r for r in metadata.get_all("Requires-Dist") if "extra" not in r]
        versions = sorted(int(minor[2:]) for minor in minors) if finished else (11, 13)
        (needed,) = (re.sub(r"\s", "", r).removeprefix("torch").split(",") for r in needed)
        assert set(needed) == {f">=2.{versions[0]}.0a0", f"<2.{versions[-1] + 1}"}
        assert metadata["Requires-Python"] == ">=3.10" and metadata["Version"] == rmsnorm_cuda.__version__


def test_libraries_of_the_wheel(wheels, tmp_path):
    """What they need is there or is torch's; nothing newer than the tag says; no debug symbols in a finished one."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    ours, torchs = {"librmsnorm.so", "librmsnorm_torch.so"}, {"libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so.1"}
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
    for wheel in wheels:
        platform = wheel.stem.split("-")[-1]
        folder = tmp_path / wheel.stem
        zipfile.ZipFile(wheel).extractall(folder)
        for library in folder.rglob("*.so"):
            text = subprocess.run(["readelf", "-W", "-d", "-V", "-S", library], capture_output=True, text=True, check=True).stdout
            assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", text)) <= ours | torchs | system, library
            paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", text)
            assert all(part.startswith("$ORIGIN") for path in paths for part in path.split(":"))
            if tag := re.match(r"manylinux_2_(\d+)_", platform):
                glibc = max(int(v) for v in re.findall(r"Name: GLIBC_2\.(\d+)", text))
                assert glibc <= int(tag[1]), (library, glibc)
                assert ".debug_info" not in text and ".gnu_debuglink" in text and ".symtab" not in text


def test_wheel_runs_away_from_the_sources(wheels, tmp_path):
    """Each wheel that is for this Python: installed elsewhere, where nothing of the source tree is found."""
    tag = f"-cp{sys.version_info[0]}{sys.version_info[1]}-"
    assert any(tag in wheel.name for wheel in wheels)
    for i, wheel in enumerate(wheel for wheel in wheels if tag in wheel.name):
        there = tmp_path / f"site{i}"
        zipfile.ZipFile(wheel).extractall(there)
        environment = os.environ | {"PYTHONPATH": str(there)}
        run = subprocess.run([sys.executable, "-m", "rmsnorm_cuda"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0 and str(there) in run.stdout.splitlines()[0], run.stdout + run.stderr


@needs_sources
def test_source_distribution(tmp_path):
    """It has what a build needs; the wheel's sources and nothing built. Making it takes no torch."""
    (tmp_path / "site").mkdir()
    only_setuptools(tmp_path / "site")
    command, environment = ["setup.py", "-q", "sdist", "-d", str(tmp_path)], os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import tarfile

    (archive,) = tmp_path.glob("rmsnorm_cuda-*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    tracked = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("rmsnorm_cuda/**/*.py*"), *ROOT.glob("rmsnorm_cuda/cmake/*"), *ROOT.glob("tests/*.py")]
    tracked = {str(path.relative_to(ROOT)) for path in tracked if "__pycache__" not in path.parts}
    assert tracked <= names and {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", ".ci/wheels.py"} <= names
    assert not [name for name in names if re.search(r"\.(so|o|pyc)$", name)]


