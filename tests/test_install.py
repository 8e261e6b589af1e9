"""What is installed, and what is not: an error names the problem and the command that fixes it."""

import ctypes
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import programs
import pytest
import torch

import rmsnorm_cuda
import rmsnorm_cuda_plugins
from rmsnorm_cuda import _C
from rmsnorm_cuda.installation import build_layers, load, supported

PACKAGE = Path(rmsnorm_cuda.__file__).parent
ROOT = Path(__file__).parents[1]
LAYER = build_layers.layer_name(torch.__version__)
IN_USE = Path(
    rmsnorm_cuda.torch_library_dir()
)  # called LAYER, or as what build_layers.py has made here
SCRIPT = "installation/build_layers.py"
COMMAND = f"{sys.executable} {{}}/{SCRIPT}"
SETUPTOOLS = Path(pytest.importorskip("setuptools").__file__).parents[1]

SOURCES = [
    path
    for path in (
        ROOT / "csrc" / "rmsnorm.h",
        *(ROOT / "csrc").glob("torch/*"),
        *(ROOT / "csrc").glob("python/*"),
    )
]
needs_sources = pytest.mark.skipif(
    not (ROOT / "rmsnorm_cuda").exists() or not shutil.which("g++"),
    reason="there are no sources, or no g++",
)


def python(code, *path, cwd, start=None, **environment):
    """`python -c code` with `path` ahead of everything. start: what Python is started with, where
    the process is not to come with torch in it."""
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    if start is None:
        return programs.run(code, cwd=cwd, **environment)
    return subprocess.run(
        [sys.executable, *start, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def last_line(code, *path, **options):
    """What it says last, which is its only error."""
    run = python(code, *path, **options)
    assert run.returncode == 1 and len(re.findall(r"^\w*Error: ", run.stderr, re.M)) == 1, (
        run.stdout + run.stderr
    )
    return run.stderr.strip().splitlines()[-1]


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be spoilt; it is imported if its parent is ahead in sys.path."""
    there = tmp_path / "there" / "rmsnorm_cuda"
    shutil.copytree(
        PACKAGE, there, ignore=shutil.ignore_patterns("__pycache__", f"torch{torch.__version__}-*")
    )
    if not (there / "lib" / LAYER).exists():  # as if it had come with this layer
        shutil.copytree(IN_USE, there / "lib" / LAYER)
    for path in SOURCES if not (there / "csrc").exists() else ():  # a wheel has them there
        (there / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there / path.relative_to(ROOT))
    return there


def fake_torch(folder, version):
    """A package torch of this version, with nothing in it."""
    (folder / "torch").mkdir(parents=True)
    text = f"__version__ = {version!r}\ncuda = None\n"
    (folder / "torch" / "__init__.py").write_text(text)
    (folder / "torch" / "version.py").write_text(text)
    return folder


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


# At import


def test_what_is_supported_is_written_once():
    """And what cannot read it says the same."""
    assert (
        'dynamic = ["version", "readme", "dependencies", "requires-python"]'
        in (ROOT / "pyproject.toml").read_text()
    )
    assert LAYER.removeprefix("torch") in [
        version.rpartition(".")[0] for version in supported.TORCHES
    ]
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in supported.PYTHONS
    assert f">= {supported.PYTHONS[0]}" in (ROOT / "Makefile").read_text()


def test_no_torch(tmp_path, package):
    (tmp_path / "torch").mkdir()
    said = last_line("import rmsnorm_cuda", tmp_path, package.parent, cwd=tmp_path, start=["-S"])
    assert (
        said
        == f"ImportError: rmsnorm_cuda needs torch, and the folder {tmp_path / 'torch'} is not "
        f"that; `pip install '{supported.TORCH}'`."
    )
    said = last_line(
        "import sys; sys.modules['torch'] = None; import rmsnorm_cuda", PACKAGE.parent, cwd=tmp_path
    )
    assert (
        said == "ImportError: rmsnorm_cuda needs torch, which is not installed; "
        f"`pip install '{supported.TORCH}'`."
    )


def test_torch_that_lacks_a_module(tmp_path, package):
    other = fake_torch(tmp_path / "other", "2.13.0")
    (other / "torch" / "__init__.py").write_text("import nothing_there")
    said = last_line("import rmsnorm_cuda", other, package.parent, cwd=tmp_path, start=[])
    assert said == "ModuleNotFoundError: No module named 'nothing_there'"


def test_binding_that_is_another_library(tmp_path):
    for name in (build_layers.OPS, build_layers.binding_name()):
        shutil.copy(PACKAGE / "lib" / build_layers.KERNELS, tmp_path / name)
    with pytest.raises(ImportError, match="PyInit__C"):
        load._load_binding("another._C", tmp_path)
    assert "another._C" not in sys.modules


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.1", "2.9.0a0"])
def test_torch_that_is_too_old(version, tmp_path, package):
    other = fake_torch(tmp_path / "other", version)
    said = last_line("import rmsnorm_cuda", other, package.parent, cwd=tmp_path, start=[])
    assert (
        said == f"ImportError: rmsnorm_cuda needs {supported.TORCH}, and this is torch {version}; "
        f"`pip install '{supported.TORCH}'`."
    )


@pytest.mark.parametrize(
    "version",
    [
        "2.99.0",
        "2.99.0+cu140",
        "2.11.0a0+vendor",
        "2.13.0.dev20260101",
        "2.14.0rc2",
        "3.0.0",
        "unknown",
    ],
)
def test_torch_that_is_not_carried(version, tmp_path, package):
    """A newer one, and what is no release: the error names the command that builds for it."""
    (package / "lib" / "torch2.9").mkdir()
    (package / "lib" / "torch2.9" / build_layers.OPS).touch()
    other = fake_torch(tmp_path / "other", version)
    said = last_line("import rmsnorm_cuda", other, package.parent, cwd=tmp_path, start=[])
    carried = ", ".join(dict.fromkeys(["2.9", *load.carried(), LAYER.removeprefix("torch")]))
    assert (
        f"carries builds for torch {carried}, and this is torch {version}; build it for this one by"
        in said
    )
    assert COMMAND.format(package) in said


def test_another_python(tmp_path, package):
    for file in package.glob(f"lib/{LAYER}/_C.*"):
        file.rename(file.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert (
        "was built for another Python (cpython-39-x86_64-linux-gnu), and this is CPython 3." in said
    )
    assert COMMAND.format(package) in said


def compile_library(code, file, *flags):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-xc++", "-", "-o", file, *flags],
        input=code,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("what", ["no library", "no binding", "cut", "of another torch"])
def test_build_that_went_wrong(what, tmp_path, package):
    """One sentence, with what the loader said in it."""
    ops, binding = (
        package / "lib" / LAYER / build_layers.OPS,
        package / "lib" / LAYER / build_layers.binding_name(),
    )
    reason = "librmsnorm_torch.so is not there, or was cut"
    if what == "no library":
        ops.write_bytes(b"<html>")
    elif what == "no binding":
        binding.unlink()
        reason = f"{binding.name} is not there, or was cut"
    elif what == "cut":  # loaded, it would kill the process
        ops.write_bytes(ops.read_bytes()[: ops.stat().st_size // 2])
    else:
        code = """
            extern "C" int symbol_of_another_torch();
            extern "C" void* PyInit__C() { return (void*)(long)symbol_of_another_torch(); }
        """
        compile_library(code, binding, "-Wl,-z,now")
        reason = f"{binding}: undefined symbol: symbol_of_another_torch"
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    said_of = (
        f"ImportError: rmsnorm_cuda's build for torch {LAYER[5:]} in {binding.parent} does not "
        f"load beside torch {torch.__version__}"
    )
    assert (
        said.startswith(said_of)
        and f"The loader said: {reason}. Build it anew by `{COMMAND.format(package)}`" in said
    )


# Libraries by their path

RUN = (
    "import torch, rmsnorm_cuda; x = torch.full((1, 4), 2.0); "
    "assert rmsnorm_cuda.rms_norm(x, 4, eps=0.0).tolist() == [[1.0] * 4]; "
)
FILES = RUN + "print(*map(__import__('os').path.realpath, rmsnorm_cuda._C.libraries()), sep='\\n')"


def runs(code, *path, **options):
    """What it prints, in lines."""
    run = python(code, *path, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("what", ["namesake", "another copy"])
def test_ld_library_path_is_not_asked(what, tmp_path, package):
    """Neither for another project's library of the name nor for another copy of ours."""
    other, lib = tmp_path / "other", package / "lib"
    if what == "namesake":
        other.mkdir()
        for name in (build_layers.KERNELS, build_layers.OPS):
            compile_library(
                "int of_another_project() { return 1; }", other / name, f"-Wl,-soname,{name}"
            )
    else:
        shutil.copytree(lib, other)
    path = f"{other}:{other / LAYER}"
    assert runs(FILES, package.parent, cwd=tmp_path, start=[], LD_LIBRARY_PATH=path) == [
        str(lib / LAYER / build_layers.OPS),
        str(lib / build_layers.KERNELS),
    ]


def test_nothing_is_loaded_from_the_working_directory(tmp_path, package):
    """Neither libraries, where the loader's paths name it, nor modules."""
    here = tmp_path / "here"
    here.mkdir()
    for name in (build_layers.KERNELS, build_layers.OPS, build_layers.binding_name()):
        (here / name).write_bytes(b"not a library")
    modules = {path.stem for path in package.glob("*.py")} | {"numpy", "rmsnorm_cuda_plugins", "_C"}
    for name in modules - {"__init__", "__main__"}:
        (here / f"{name}.py").write_text("import os; os._exit(9)")
    code = f"""if True:
        import runpy, sys
        sys.path.insert(0, {str(package.parent)!r})
        try:
            runpy.run_module("rmsnorm_cuda", run_name="__main__", alter_sys=True)
        except SystemExit as status:
            assert not status.code
        with open("/proc/self/maps") as maps:
            print([line for line in maps if {str(here)!r} in line])
    """
    # -I: without it Python itself looks for modules in the working directory.
    assert runs(code, cwd=here, start=["-I"], LD_LIBRARY_PATH=":.:")[-1] == "[]"


@needs_sources
def test_sums_of_a_release(tmp_path):
    """sha256sum reads them, and finds a byte that has changed."""
    write_sums = runpy.run_path(str(ROOT / ".ci" / "wheels.py"))["write_sums"]
    for name in ("b.whl", "a.tar.gz", "not_ours.txt"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    check = ["sha256sum", "--check", "SHA256SUMS"]
    said = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["a.tar.gz:", "OK", "b.whl:", "OK"]
    (tmp_path / "b.whl").write_text("c.whl")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1


@needs_sources
def test_source_archives_are_alike(tmp_path):
    """Whenever, by whom and in which order their files were written."""
    repack = runpy.run_path(str(ROOT / ".ci" / "wheels.py"))["repack"]
    written = []
    for folder, names in (("one", "ab"), ("two", "ba")):
        files = tmp_path / folder / "package"
        files.mkdir(parents=True)
        archive = tmp_path / folder / "package.tar.gz"
        with tarfile.open(archive, "w:gz") as opened:
            for i, name in enumerate(names):
                (files / name).write_text(name)
                (files / name).chmod(0o755 if name == "a" else 0o600 + 0o44 * i)
                os.utime(files / name, (i, i))
                opened.add(files / name, f"package/{name}")
        repack(archive, 10**9)
        written.append(archive.read_bytes())
    assert written[0] == written[1]
    with tarfile.open(archive) as opened:
        assert [(m.name, oct(m.mode), m.mtime) for m in opened] == [
            ("package/a", "0o755", 10**9),
            ("package/b", "0o644", 10**9),
        ]
        assert opened.extractfile("package/b").read() == b"b"


def test_namesake_that_is_loaded_already(tmp_path, package):
    """What the loader takes in place of ours is named; nothing runs with it."""
    other = tmp_path / "other" / build_layers.KERNELS
    other.parent.mkdir()
    shutil.copy(package / "lib" / build_layers.KERNELS, other)
    code = f"import ctypes; ctypes.CDLL({str(other)!r}); import rmsnorm_cuda"
    said = last_line(code, package.parent, cwd=tmp_path)
    assert (
        f"{other} was loaded before, and is used in place of "
        f"{package / 'lib' / build_layers.KERNELS}" in said
    )


def test_another_copy_of_the_ops(tmp_path, package):
    """Registered once: the second copy is an error for a package, a warning for a program."""
    path = str(package / "lib" / LAYER / build_layers.OPS)
    code = f"import torch; torch.ops.load_library({path!r}); "
    said = last_line(code + "import rmsnorm_cuda", PACKAGE.parent, cwd=tmp_path)
    other, ours = (folder / build_layers.OPS for folder in (package / "lib" / LAYER, IN_USE))
    assert f"The loader said: {other} was loaded before, and is used in place of {ours}. " in said
    runs(RUN + code + RUN, PACKAGE.parent, cwd=tmp_path)
    runs(code + RUN, package.parent, cwd=tmp_path)  # its own copy


@pytest.mark.parametrize("farm", ["same structure", "named by content"])
def test_installation_of_links(farm, tmp_path, package):
    """uv's link mode, setuptools' strict editable mode, Bazel, Nix: every file is a link."""
    site, store = tmp_path / "site", tmp_path / "store"
    store.mkdir()
    for number, file in enumerate(path for path in package.rglob("*") if path.is_file()):
        link = site / file.relative_to(package.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        kept = store / (
            str(number) if farm == "named by content" else file.relative_to(package.parent)
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept)
        link.symlink_to(kept)
    shutil.rmtree(package)
    where = "print(rmsnorm_cuda.torch_library_dir(), rmsnorm_cuda.include_dir())"
    lib = site / "rmsnorm_cuda" / "lib"
    assert runs(RUN + where, site, cwd=tmp_path) == [
        f"{lib / LAYER} {site / 'rmsnorm_cuda' / 'include'}"
    ]


@pytest.mark.slow
def test_frozen_application(tmp_path):
    """PyInstaller takes the libraries along, by the package's hook. Torch, which takes minutes,
    stays outside."""
    pytest.importorskip("PyInstaller")
    if torch.version.cuda:
        pytest.skip("gigabytes of CUDA's libraries would be copied")
    (point,) = (
        e for e in entry_points(group="pyinstaller40") if e.value.startswith("rmsnorm_cuda")
    )
    (tmp_path / "app.py").write_text(f"import sys; sys.path += sys.argv[1:]; {FILES}")
    outside = (
        "torch",
        "transformers",
        "numpy",
        "unittest",
        "kernels",
        "vllm",
        "torchtitan",
        "megatron",
        "setuptools",
        "pytest",
    )
    options = [
        f"--additional-hooks-dir={point.load()()[0]}",
        *(f"--exclude-module={name}" for name in outside),
    ]
    command = [
        sys.executable,
        "-m",
        "PyInstaller",
        "--noconfirm",
        "--log-level=ERROR",
        *options,
        "app.py",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    shutil.rmtree(
        tmp_path / "dist" / "app" / "_internal" / "torch", ignore_errors=True
    )  # libraries of its alone
    path = [p for p in sys.path if p and Path(p) != PACKAGE.parent]
    run = subprocess.run(
        [tmp_path / "dist" / "app" / "app", *path], cwd="/", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lib = tmp_path / "dist" / "app" / "_internal" / "rmsnorm_cuda" / "lib"
    assert run.stdout.splitlines() == [
        str(lib / LAYER / build_layers.OPS),
        str(lib / build_layers.KERNELS),
    ]


def test_folder_of_any_name(tmp_path, package):
    folder = tmp_path / "mein Ordner \u00e9 \u4e2d"
    package.parent.rename(folder)
    runs(RUN, folder, cwd=tmp_path, start=[], LC_ALL="C")


@pytest.mark.parametrize("what", ["cut", "nothing compiled"])
def test_kernels_that_are_not_there(what, tmp_path, package):
    """To build the layers does not help: the package is to be installed again, or built."""
    kernels = package / "lib" / build_layers.KERNELS
    if what == "cut":
        kernels.write_bytes(kernels.read_bytes()[:-1000])
    else:
        shutil.rmtree(package / "lib")
    for checkout in (False, True):
        (package.parent / "setup.py").touch() if checkout else None
        said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
        assert (
            f"rmsnorm_cuda was cut: {kernels} ends too early." in said
            if what == "cut"
            else f"is not compiled in {package}." in said
        )
        mend = (
            rf"`cd {package.parent} && /\S+ setup\.py build_ext --inplace`"
            if checkout
            else r"`/\S+ -m pip install --force-reinstall "
        )
        assert re.search(mend, said)
    said, succeeds = build(package)
    assert (
        not succeeds
        and said
        == f"rmsnorm_cuda: {kernels} is not there, or was cut: "
        "install or build the package first.\n"
    )


# What vLLM and SGLang do with the entry points of a group, without what they catch; their own call.
LOAD = """if True:
    from importlib.metadata import entry_points
    for plugin in entry_points(group="{}"):
        if plugin.name == "rmsnorm_cuda":
            plugin.load()()
"""
SERVERS = {
    "vLLM": (
        LOAD.format("vllm.general_plugins"),
        "vllm",
        "from vllm.plugins import load_general_plugins; load_general_plugins()",
    ),
    "SGLang": (
        LOAD.format("sglang.srt.plugins"),
        "sglang",
        "from sglang.srt.plugins import load_plugins; load_plugins()",
    ),
}


def load_plugins(code, package, *path, **environment):
    """What a server prints that has our entry points, and this package."""
    groups = re.findall(
        r'^\[project\.entry-points\."(.*)"\]\n(.*) = "(.*)"',
        (ROOT / "pyproject.toml").read_text(),
        re.M,
    )
    assert len(groups) == len(SERVERS)
    info = package.parent / f"rmsnorm_cuda-{rmsnorm_cuda.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: rmsnorm_cuda\nVersion: {rmsnorm_cuda.__version__}\n"
    )
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{name} = {target}\n" for group, name, target in groups)
    )
    shutil.copy(rmsnorm_cuda_plugins.__file__, package.parent)
    start = [] if path else None
    run = python(code, *path, package.parent, cwd=package.parent, start=start, **environment)
    assert run.returncode == 0 and "Traceback" not in run.stdout + run.stderr, (
        run.stdout + run.stderr
    )
    return run.stdout + run.stderr


@pytest.mark.parametrize("spoilt", ["nothing compiled", "another torch", "an error"])
@pytest.mark.parametrize("server", SERVERS)
def test_server_that_cannot_import_the_package(server, spoilt, tmp_path, package):
    """It logs one line and goes on."""
    other = [fake_torch(tmp_path / "other", "3.0.0")] if spoilt == "another torch" else []
    if spoilt == "nothing compiled":
        shutil.rmtree(package / "lib")
    elif spoilt == "an error":
        (package / "__init__.py").write_text("raise RuntimeError('this\\nand that')")
    asked = dict.fromkeys(("SGLANG_PLUGINS", "VLLM_PLUGINS"), "rmsnorm_cuda")
    said = load_plugins(SERVERS[server][0], package, *other, **asked)
    reason = {
        "nothing compiled": f"ImportError: rmsnorm_cuda is not compiled in {package}. ",
        "another torch": f"ImportError: rmsnorm_cuda in {package} carries builds for torch ",
        "an error": "RuntimeError: this\n",
    }[spoilt]
    assert (
        said.startswith(f"rmsnorm_cuda: {server} keeps its own norms: {reason}")
        and said.count("\n") == 1
    ), said


def test_sglang_that_did_not_ask_for_the_package(package):
    shutil.rmtree(package / "lib")
    assert load_plugins(SERVERS["SGLang"][0], package, SGLANG_PLUGINS="") == ""


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS)
def test_real_server_that_cannot_import_the_package(server, package):
    _, name, code = SERVERS[server]
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{server} is not installed")
    shutil.rmtree(package / "lib")
    lines = load_plugins(code, package, SGLANG_PLUGINS="rmsnorm_cuda").splitlines()
    assert (
        len(
            [
                line
                for line in lines
                if f"rmsnorm_cuda: {server} keeps its own norms: ImportError: " in line
            ]
        )
        == 1
    ), lines


def test_site_packages_that_cannot_be_written(tmp_path, package):
    """Nothing is written beside the package, neither by importing nor by running it."""
    code = f"""if True:
        import os, sys
        sys.dont_write_bytecode = True
        def audit(event, args):
            writes = event in ("os.mkdir", "os.rename", "os.remove")
            if event == "open":
                writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and str(args[0]).startswith({str(package)!r}):
                raise PermissionError(args[0])
        sys.addaudithook(audit)
        import torch, rmsnorm_cuda, rmsnorm_cuda.__main__
        assert rmsnorm_cuda.__file__.startswith({str(package)!r})
        sys.argv = ["rmsnorm_cuda"]
        torch.compile(rmsnorm_cuda.RMSNorm(8), backend="aot_eager")(torch.ones(2, 8))
        sys.exit(rmsnorm_cuda.__main__.main())
    """
    for path in [package, *package.rglob("*")]:
        path.chmod(
            stat.S_IREAD | (stat.S_IEXEC if path.is_dir() else 0)
        )  # the superuser may write there all the same
    run = python(code, package.parent, cwd=tmp_path)
    for path in [package, *package.rglob("*")]:
        path.chmod(stat.S_IRWXU)
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "OK", run.stdout + run.stderr


# Layers for any torch


WITHOUT_RIGHTS = """if True:
    import runpy, tempfile
    make = tempfile.mkdtemp
    def mkdtemp(suffix=None, prefix=None, dir=None):
        if "rmsnorm_cuda/lib" in str(dir):
            raise PermissionError(13, "Permission denied", str(dir))
        return make(suffix, prefix, dir)
    tempfile.mkdtemp = mkdtemp
    runpy.run_path({!r}, run_name="__main__")
"""


@pytest.fixture
def stand_in(tmp_path):
    """A compiler that takes no time: what it links are the layers that are installed."""
    text = f"""
        case $1 in -dumpversion) echo 12; exit;; esac
        for word in "$@"; do
          case $last in -o) out=$word;; esac
          case $word in -shared) shared=1;; esac
          last=$word
        done
        if [ $shared ]; then cp "{IN_USE}/$(basename $out)" $out; else touch $out; fi
    """
    return script(tmp_path / "stand-in", text)


def build(package, code=None, background=False, **environment):
    """What the command of the ImportError prints, and whether it succeeds."""
    ours = {k for k in os.environ if k.startswith("RMSNORM_CUDA_")} | {
        "CXX",
        "MAX_JOBS",
        "LDFLAGS",
        "PYTHONPATH",
    }
    environment = {k: v for k, v in os.environ.items() if k not in ours} | environment
    command = [sys.executable, *(["-c", code] if code else [package / SCRIPT])]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    if background:
        return process
    said, _ = process.communicate()
    return said, process.returncode == 0


def made_in(folder):
    """The only thing there whose name is of this very torch. Nothing half done lies about."""
    (made,) = folder.glob(f"torch{torch.__version__}-*")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return made


@pytest.mark.parametrize("way", ["not carried", "vendor's", "older", "cut"])
def test_layers_are_built(way, tmp_path, package, stand_in):
    """The command that the ImportError names fixes it: for a torch that is not carried, for a build
    of a carried one with an ABI of its own, beside what an older package left, and where a build
    was cut."""
    lib = package / "lib"
    if way == "vendor's":
        code = 'extern "C" int gone(); extern "C" void* PyInit__C() { return (void*)(long)gone(); }'
        compile_library(code, lib / LAYER / build_layers.binding_name(), "-Wl,-z,now")
    else:
        shutil.rmtree(lib / LAYER)
    if way == "older":
        shutil.copytree(IN_USE, lib / f"torch{torch.__version__}-0123456789abcdef")
    if way == "cut":
        build(package, CXX=stand_in)
        library = made_in(lib) / build_layers.OPS
        library.write_bytes(library.read_bytes()[:-4096])
    said = last_line("import rmsnorm_cuda", package.parent, cwd=tmp_path)
    assert COMMAND.format(package) in said
    said, succeeds = build(package, CXX=stand_in)
    assert succeeds and said.splitlines()[0].startswith(
        f"rmsnorm_cuda: building the layers for torch {torch.__version__}, which takes"
    ), said
    shutil.rmtree(lib / f"torch{torch.__version__}-0123456789abcdef", ignore_errors=True)
    assert said.splitlines()[-1] == f"rmsnorm_cuda: built in {made_in(lib)}"
    assert runs(RUN + "print(rmsnorm_cuda.torch_library_dir())", package.parent, cwd=tmp_path) == [
        str(made_in(lib))
    ]
    if way == "not carried" and shutil.which("cmake"):  # CMake finds them too
        (tmp_path / "CMakeLists.txt").write_text("""
            cmake_minimum_required(VERSION 3.18)
            project(server LANGUAGES CXX)
            find_package(rmsnorm_cuda CONFIG REQUIRED)
            get_target_property(ops rmsnorm_cuda::rmsnorm_torch IMPORTED_LOCATION)
            message("ops: ${ops}")
        """)
        options = (
            f"-Drmsnorm_cuda_DIR={package / 'installation/cmake'}",
            f"-Drmsnorm_cuda_TORCH={'.'.join(torch.__version__.split('.')[:2])}",
        )
        run = subprocess.run(
            ["cmake", "-B", "cmake", *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert f"ops: {made_in(lib) / build_layers.OPS}" in run.stderr, run.stdout + run.stderr


def test_layers_are_built_by_two_at_once(tmp_path, package, stand_in):
    shutil.rmtree(package / "lib" / LAYER)
    for _ in range(2):
        builders = [build(package, CXX=stand_in, background=True) for _ in range(2)]
        said = [builder.communicate()[0] for builder in builders]
        assert not any(builder.returncode for builder in builders), said
        assert runs(
            RUN + "print(rmsnorm_cuda.torch_library_dir())", package.parent, cwd=tmp_path
        ) == [str(made_in(package / "lib"))]
        (made_in(package / "lib") / build_layers.OPS).write_bytes(
            b""
        )  # the next two put theirs in the place of this one
    said, _ = build(package, CXX=stand_in)
    assert build(package, CXX="/nowhere") == (
        f"rmsnorm_cuda loads beside torch {torch.__version__} as it is; nothing is to be built.\n",
        True,
    )


def test_layers_that_cannot_be_built(tmp_path, package, stand_in):
    shutil.rmtree(package / "lib" / LAYER)
    before = sorted((package / "lib").iterdir())
    said, succeeds = build(package, CXX="/nowhere/g++")
    assert (
        not succeeds
        and said
        == "rmsnorm_cuda: the C++ compiler '/nowhere/g++' was not found; install g++ 11 or newer, "
        "or name one in CXX.\n"
    )
    said, succeeds = build(
        package,
        CXX=script(
            tmp_path / "g++",
            "[ $1 = -dumpversion ] && echo 12 || { echo 'no such function' >&2; exit 1; }",
        ),
    )
    assert (
        not succeeds
        and "no such function" in said
        and said.splitlines()[-1].endswith(
            f"g++` does not build the layers for torch {torch.__version__}; what it said is above."
        )
    )
    said, succeeds = build(
        package, CXX=script(tmp_path / "empty", "[ $1 = -dumpversion ] && echo 12 || : >/dev/null")
    )
    assert (
        not succeeds and f"what was built does not load beside torch {torch.__version__}:" in said
    )
    code = "import sysconfig; sysconfig.get_paths = lambda *_: {'include': '/nowhere'}; "
    code += "import runpy; runpy.run_path(%r, run_name='__main__')"
    said, succeeds = build(package, code % str(package / SCRIPT), CXX=stand_in)
    assert not succeeds and "Python.h of " in said and "install Python's headers" in said
    (tmp_path / "file").touch()
    code = WITHOUT_RIGHTS.format(str(package / SCRIPT))
    said, succeeds = build(package, code, CXX=stand_in, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (
        not succeeds
        and f"{package / 'lib'} cannot be written (Permission denied); "
        f"{tmp_path / 'file' / 'rmsnorm_cuda'} cannot be written"
        in said
    )
    said, succeeds = build(package, code, CXX=stand_in, RMSNORM_CUDA_CACHE="here")
    assert (
        not succeeds
        and "RMSNORM_CUDA_CACHE='here' is not understood; expected an absolute path" in said
    )
    assert sorted((package / "lib").iterdir()) == before
    code = f"import runpy; runpy.run_path({str(package / SCRIPT)!r}, run_name='__main__')"
    assert build(package, code, CXX="'")[0].count("\n") == 1


def test_folder_that_others_may_write_to(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    assert build_layers.why_not_trusted(folder) is None
    assert build_layers.why_not_trusted(folder / "gone") == f"{folder / 'gone'} cannot be read"
    folder.chmod(0o770)
    assert build_layers.why_not_trusted(folder) == f"{folder} may be written to by others"
    user, status = os.geteuid(), os.stat_result
    real = Path.stat

    def of_another(path, **options):
        values = list(real(path, **options))
        values[stat.ST_UID] = user + 1
        return status(values)

    monkeypatch.setattr(Path, "stat", of_another)
    assert build_layers.why_not_trusted(folder) == f"{folder} belongs to another user"


def test_torch_that_is_not_complete(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    with pytest.raises(SystemExit, match="is not complete: it has no version.py"):
        build_layers.find_torch(supported.TORCH, str(tmp_path))


def test_program_that_does_not_run():
    assert build_layers.output("/nowhere/g++", "-dumpversion") == ""


def test_help_of_the_script():
    run = programs.run(file=PACKAGE / SCRIPT, arguments=["--help"])
    assert run.returncode == 0 and "CXX names another compiler" in run.stdout
    assert programs.run(file=PACKAGE / SCRIPT, arguments=["--nothing"]).returncode == 1


@needs_sources
@pytest.mark.slow
def test_layers_in_the_cache(tmp_path, package):
    """Where the package cannot be written, they are compiled into the user's cache. They are taken
    from there if nobody else may write to it."""
    shutil.rmtree(package / "lib" / LAYER)
    cache = tmp_path / "cache"
    said, succeeds = build(
        package, WITHOUT_RIGHTS.format(str(package / SCRIPT)), RMSNORM_CUDA_CACHE=str(cache)
    )
    assert succeeds and str(made_in(cache)) in said, said
    run = {"cwd": tmp_path, "RMSNORM_CUDA_CACHE": str(cache)}
    assert runs(FILES, package.parent, **run) == [
        str(made_in(cache) / build_layers.OPS),
        str(package / "lib" / build_layers.KERNELS),
    ]
    environment = {"PYTHONPATH": str(package.parent), "RMSNORM_CUDA_CACHE": str(cache)}
    checked = programs.run(module="rmsnorm_cuda", cwd=tmp_path, **environment)
    assert checked.returncode == 0 and str(package) in checked.stdout.splitlines()[0], (
        checked.stdout + checked.stderr
    )
    (
        package / "lib" / made_in(cache).name
    ).mkdir()  # of a build that was killed, say: it does not hide the one in the cache
    runs(RUN, package.parent, **run)
    for folder, mode, what in (
        (made_in(cache), 0o770, "may be written to by others"),
        (cache, 0o777, "may be written to by others"),
    ):
        before = folder.stat().st_mode
        folder.chmod(mode)
        said = last_line("import rmsnorm_cuda", package.parent, **run)
        assert (
            f"What was built for it before is not loaded: {folder} {what}." in said
            and COMMAND.format(package) in said
        )
        folder.chmod(before)
    if os.geteuid() == 0:
        os.chown(made_in(cache), 12345, 0)
        assert f"{made_in(cache)} belongs to another user" in last_line(
            "import rmsnorm_cuda", package.parent, **run
        )
        os.chown(made_in(cache), 0, 0)
    runs(RUN, package.parent, **run)
    said = last_line(
        "import rmsnorm_cuda", package.parent, cwd=tmp_path, RMSNORM_CUDA_CACHE="cache"
    )
    assert (
        said == "ImportError: rmsnorm_cuda: RMSNORM_CUDA_CACHE='cache' is not understood; "
        "expected an absolute path."
    )


# While it is built


def setup(*command, tmp_path, fails=True, without_site=False, **environment):
    """What `python setup.py build_ext` prints; if it fails, its error, which is one line."""
    ours = {k for k in os.environ if k.startswith("RMSNORM_CUDA_")} | {
        "NVCC",
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
        "CXX",
        "MAX_JOBS",
    }
    environment = {k: v for k, v in os.environ.items() if k not in ours} | environment
    folders = "--build-temp", str(tmp_path / "objects"), "--build-lib", str(tmp_path / "lib")
    python = [sys.executable, *(["-S"] if without_site else [])]
    run = subprocess.run(
        [*python, "setup.py", "-q", "build_ext", *folders, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (run.returncode != 0) == fails, run.stdout + run.stderr
    if fails:
        assert run.stderr.startswith("rmsnorm_cuda: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr if fails else run.stdout


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
    assert f"{old} is of version 9.4.0, and g++ or clang++ 11 or newer is needed" in setup(
        "--kernels-only", tmp_path=tmp_path, CXX=old
    )


@needs_sources
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"RMSNORM_CUDA_{name}", "'yes") for name in ("BUILD", "DEBUG", "LINEINFO")),
        ("LDFLAGS", "'yes"),
        *(
            ("MAX_JOBS", value)
            for value in ("'yes", "0", "-1", "1.5", "\N{ARABIC-INDIC DIGIT TWO}")
        ),
    ],
)
def test_build_with_variables_that_are_not_understood(name, value, tmp_path):
    nvcc = script(
        tmp_path / "nvcc",
        "case $1 in --version) echo release 13.0;; --list-gpu-arch) echo compute_90;; esac",
    )
    environment = {"NVCC": nvcc, "RMSNORM_CUDA_BUILD": "1", name: value}
    said = setup("--kernels-only", tmp_path=tmp_path, **environment)
    assert f"{name}={value!r} is not understood" in said


@needs_sources
def test_build_without_setuptools(tmp_path):
    said = setup(tmp_path=tmp_path, without_site=True, PYTHONPATH=str(tmp_path))
    assert (
        said == "rmsnorm_cuda: setuptools is not installed; `pip install 'setuptools>=77' ninja`.\n"
    )


@needs_sources
def test_build_where_nothing_can_be_written(tmp_path):
    (tmp_path / "objects").touch()
    assert f"{tmp_path / 'objects'} cannot be written" in setup("--kernels-only", tmp_path=tmp_path)


@needs_sources
def test_build_without_torch(tmp_path):
    """As with build isolation, which is what pip does if it is not told otherwise."""
    only_setuptools(tmp_path)
    said = setup(tmp_path=tmp_path, without_site=True, PYTHONPATH=str(tmp_path))
    assert (
        "torch is not installed in this build environment" in said
        and "`pip install --no-build-isolation`" in said
    )
    assert f"`pip install '{supported.TORCH}' ninja" in said
    said = setup(tmp_path=tmp_path, RMSNORM_CUDA_TORCH=str(tmp_path / "nothing"))
    assert f"there is no torch in {tmp_path / 'nothing'}, which RMSNORM_CUDA_TORCH names" in said


@needs_sources
def test_build_for_another_torch(tmp_path):
    said = setup(
        tmp_path=tmp_path, RMSNORM_CUDA_TORCH=str(fake_torch(tmp_path / "other", "2.10.0"))
    )
    assert (
        f"torch 2.10.0 was found, and {supported.TORCH} is needed; "
        f"`pip install '{supported.TORCH}'`." in said
    )


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
def test_ldflags_reach_the_linker(tmp_path):
    """By compilers that write down what they are asked."""
    record = f"""
        for word; do
          test "$last" = -o && mkdir -p "$(dirname "$word")" && : >"$word"
          last=$word
        done
        echo "$@" >>{tmp_path}/asked
    """
    cxx = script(
        tmp_path / "g++",
        "case $1 in -dumpversion) echo 12;; -dumpmachine) echo x86_64-linux-gnu;; "
        f"*) {record};; esac",
    )
    nvcc = script(
        tmp_path / "nvcc",
        "case $1 in --version) echo release 13.0;; --list-gpu-arch) echo compute_90;; "
        f"*) {record};; esac",
    )
    flags = [f"-L{tmp_path}/a b", "-lm", "-Wl,-z,now"]
    for build, linker in ("0", cxx), ("1", nvcc):
        setup(
            "--kernels-only",
            tmp_path=tmp_path,
            fails=False,
            CXX=cxx,
            NVCC=nvcc,
            RMSNORM_CUDA_BUILD=build,
            LDFLAGS=shlex.join(flags),
        )
        asked = (tmp_path / "asked").read_text().splitlines()[-1]
        words = flags if linker == cxx else [*flags[:2], "-Xcompiler", "-Wl\\,-z\\,now"]
        assert " ".join(words) in asked, asked


@needs_sources
def test_build_by_an_old_nvcc(tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    said = setup("--kernels-only", tmp_path=tmp_path, NVCC=nvcc)
    assert (
        f"{nvcc} is of CUDA 11.8, and CUDA 12.6 or newer is needed" in said
        and "RMSNORM_CUDA_BUILD=0" in said
    )


@needs_sources
@pytest.mark.slow
def test_build_for_another_machine(tmp_path):
    """By this machine's compiler, which says that it is another's: the scalar kernels alone are
    built, and they work."""

    def compiler(machine, otherwise):
        return script(
            tmp_path / "c++",
            f'if [ "$1" = -dumpmachine ]; then echo {machine}; else {otherwise}; fi',
        )

    for machine, works in (("x86_64-alpine-linux-musl", False), ("aarch64-linux-gnu", True)):
        cxx = compiler(machine, 'exec g++ "$@"' if works else "exit 1")
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            "--kernels-only",
            "--build-temp",
            tmp_path / machine,
            "--build-lib",
            tmp_path / "lib",
        ]
        environment = os.environ | {"CXX": cxx, "RMSNORM_CUDA_BUILD": "0"}
        run = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (
            f"scalar kernels only: {cxx} compiles for {machine}" in run.stdout
            and (run.returncode == 0) == works
        ), run.stderr
    library = tmp_path / "lib" / "rmsnorm_cuda" / "lib"
    program = tmp_path / "check.cpp"
    program.write_text(
        '#include <cstdio>\n#include "rmsnorm.h"\n'
        'int main() { std::printf("%d %s", rmsnorm::cpu::isa_count(), rmsnorm::cpu::isa()); }'
    )
    link = [f"-I{ROOT / 'csrc'}", f"-L{library}", "-lrmsnorm", f"-Wl,-rpath,{library}"]
    subprocess.run(["g++", "-std=c++17", program, *link, "-o", tmp_path / "check"], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "RMSNORM_CUDA_ISA"}
    assert (
        subprocess.run(
            [tmp_path / "check"], capture_output=True, text=True, check=True, env=environment
        ).stdout
        == "2 scalar"
    )


# The wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Those in dist/ that are of these sources; and one for this torch alone, as setuptools makes
    it, from objects that are there."""
    if (
        not (ROOT / "build" / "objects" / "build.ninja").exists()
        or not (ROOT / "rmsnorm_cuda").exists()
    ):
        pytest.skip("the package was not built here from its sources")
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "lib" / "rmsnorm_cuda").mkdir(parents=True)
    (folder / "lib" / "rmsnorm_cuda" / "_of_an_earlier_build.py").touch()
    command = [
        "build",
        "--build-lib",
        folder / "lib",
        "bdist_wheel",
        "--dist-dir",
        folder,
        "--bdist-dir",
        folder / "bdist",
    ]
    environment = os.environ | {"RMSNORM_CUDA_BUILD": str(int(_C.cuda_built()))}
    if _C.cuda_built():
        environment["TORCH_CUDA_ARCH_LIST"] = _C.cuda_architectures()
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    sources = [
        path
        for name in ("csrc", "rmsnorm_cuda")
        for path in (ROOT / name).rglob("*.[chip]*")
        if path.suffix != ".pyc"
    ]
    changed = max(path.stat().st_mtime for path in sources if path.parent.name != "include")
    return [
        *folder.glob("*.whl"),
        *(wheel for wheel in ROOT.glob("dist/*.whl") if wheel.stat().st_mtime > changed),
    ]


@pytest.mark.slow
def test_wheel_holds_what_it_needs_and_no_more(wheels):
    for wheel in wheels:
        python, abi, platform = wheel.stem.split("-")[2:]
        names = set(zipfile.ZipFile(wheel).namelist())
        finished = platform.startswith("manylinux")
        assert (
            re.fullmatch(r"cp31\dt?", abi)
            and python == abi.rstrip("t")
            and (finished or platform == "linux_x86_64")
        ), wheel
        assert wheel.stat().st_size < 60e6
        libraries = {name for name in names if re.search(r"\.so\b", name)}
        layers = {re.search(r"/(torch\d\.\d+)/", name)[1] for name in libraries if "/torch" in name}
        assert finished or layers == {LAYER}, wheel
        binding = f"_C.cpython-{abi[2:]}-x86_64-linux-gnu.so"
        wanted = {
            f"rmsnorm_cuda/lib/{layer}/{name}"
            for layer in layers
            for name in ("librmsnorm_torch.so", binding)
        }
        assert libraries == wanted | {
            "rmsnorm_cuda/lib/librmsnorm.so"
        }  # and nothing of torch, CUDA or the compiler
        others = {"py.typed", "_C.pyi", "ops.pyi", "include/rmsnorm.h", SCRIPT}
        others |= {
            str(path.relative_to(ROOT / "rmsnorm_cuda"))
            for pattern in ("*.py", "*.cmake", "*.json")
            for path in (ROOT / "rmsnorm_cuda").rglob(pattern)
        }
        others |= {*(f"csrc/{path.relative_to(ROOT / 'csrc')}" for path in SOURCES)}
        assert {f"rmsnorm_cuda/{name}" for name in others} | {"rmsnorm_cuda_plugins.py"} <= names
        assert not [
            name
            for name in names
            if name.startswith(("tests", "csrc", "benchmarks", "build")) or "earlier" in name
        ]
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())
        needed = [r for r in metadata.get_all("Requires-Dist") if "extra" not in r]
        assert [re.sub(r"\s", "", r) for r in needed] == [supported.TORCH]
        assert (
            metadata["Requires-Python"] == supported.PYTHON
            and metadata["Version"] == rmsnorm_cuda.__version__
        )


@pytest.mark.slow
def test_libraries_of_the_wheel(wheels, tmp_path):
    """What they need is there or is torch's; nothing newer than the tag says; no debug symbols in a
    finished one."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    ours, torchs = (
        {"librmsnorm.so", "librmsnorm_torch.so"},
        {"libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so.1"},
    )
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    for wheel in wheels:
        platform = wheel.stem.split("-")[-1]
        folder = tmp_path / wheel.stem
        zipfile.ZipFile(wheel).extractall(folder)
        for library in folder.rglob("*.so"):
            text = subprocess.run(
                ["readelf", "-W", "-d", "-V", "-S", library],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", text)) <= ours | torchs | system, library
            paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", text)
            assert all(part.startswith("$ORIGIN") for path in paths for part in path.split(":"))
            if tag := re.match(r"manylinux_2_(\d+)_", platform):
                glibc = max(int(v) for v in re.findall(r"Name: GLIBC_2\.(\d+)", text))
                assert glibc <= int(tag[1]) == 28, (library, glibc)  # that of torch's wheels
                assert (
                    ".debug_info" not in text and ".gnu_debuglink" in text and ".symtab" not in text
                )


def images(library):
    """(is machine code, ABI or PTX version, architecture, flags) of each part of its CUDA code; the
    layout is fatbinary's."""
    data = library.read_bytes()
    for start in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        at = start.start() + 16
        (size,) = struct.unpack_from("<Q", data, at - 8)
        end = at + size
        while at < end:
            kind, _, header, size, _, _, minor, major, arch = struct.unpack_from(
                "<HHIQIIHHI", data, at
            )
            (flags,) = struct.unpack_from("<Q", data, at + 40)
            yield kind == 2, (major, minor), arch, flags
            at += header + size


@pytest.mark.slow
def test_cuda_code_of_the_wheel_is_for_drivers_of_cuda_12(wheels, tmp_path):
    """What a driver of CUDA 13 alone can read would be an error at the first launch elsewhere; no
    test sees it here."""
    found = 0
    for wheel in wheels:
        if wheel.stem.endswith("linux_x86_64") and "manylinux" not in wheel.stem:
            continue  # by this machine's own nvcc
        zipfile.ZipFile(wheel).extract("rmsnorm_cuda/lib/librmsnorm.so", tmp_path / wheel.stem)
        library = tmp_path / wheel.stem / "rmsnorm_cuda" / "lib" / "librmsnorm.so"
        for machine_code, version, arch, flags in images(library):
            found += 1
            assert not flags & 0x8000  # zstd
            # 8 is that of ptxas 13; of ptxas 12.9 too from 10.0 on, which no older driver knows.
            assert version <= ((1, 7 if arch < 100 else 8) if machine_code else (8, 8)), (
                arch,
                version,
            )
        assert ctypes.CDLL(str(library))["_ZN7rmsnorm4cuda15runtime_versionEv"]() // 1000 in (0, 12)
    if not found:
        pytest.skip("there is no finished wheel with CUDA kernels in dist/")


@pytest.mark.slow
def test_wheel_runs_away_from_the_sources(wheels, tmp_path):
    """Each wheel that is for this Python: installed elsewhere, away from the source tree."""
    tag = f"-cp{sys.version_info[0]}{sys.version_info[1]}-"
    assert any(tag in wheel.name for wheel in wheels)
    for i, wheel in enumerate(wheel for wheel in wheels if tag in wheel.name):
        there = tmp_path / f"site{i}"
        zipfile.ZipFile(wheel).extractall(there)
        run = programs.run(module="rmsnorm_cuda", cwd=tmp_path, PYTHONPATH=str(there))
        assert run.returncode == 0 and str(there) in run.stdout.splitlines()[0], (
            run.stdout + run.stderr
        )
        words = ["bench", "--minutes", "0.2", "--json", "report.json"]
        options = {"cwd": tmp_path, "PYTHONPATH": str(there)}
        run = programs.run(module="rmsnorm_cuda", arguments=words, **options)
        assert run.returncode == 0, run.stdout + run.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["cells"] and report["machine"]["commit"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", ["2.13.0+cpu", "2.15.0", "2.17.0", "2.16.0.dev20261120", "2.11.0a0+vendor"]
)
def test_pip_keeps_the_torch_that_is_there(version, wheels, tmp_path):
    """A dry run names the package alone; installed, torch is what it was."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    metadata = site / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel = next(wheel for wheel in wheels if wheel.stem.split("-")[2] == tag)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        tmp_path / "venv" / "bin" / "python",
        "install",
        "--no-index",
        wheel,
    ]
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull}  # it may have bounds of its own
    for dry in (["--dry-run"], []):
        run = subprocess.run([*pip, *dry], env=environment, capture_output=True, text=True)
        done = "Would install" if dry else "Successfully installed"
        wanted = f"{done} rmsnorm_cuda-{rmsnorm_cuda.__version__}"
        assert (
            run.returncode == 0
            and run.stdout.splitlines()[-1].replace("rmsnorm-cuda", "rmsnorm_cuda") == wanted
        ), run.stdout + run.stderr
    assert metadata.exists() and (site / "rmsnorm_cuda" / "lib" / build_layers.KERNELS).exists()


@pytest.mark.slow
@needs_sources
def test_pip_keeps_the_torch_that_is_there_when_it_builds():
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--no-build-isolation",
        str(ROOT),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    said = run.stdout.splitlines()
    assert (
        run.returncode == 0 and said[-1] == f"Would install rmsnorm_cuda-{rmsnorm_cuda.__version__}"
    ), run.stdout + run.stderr


@needs_sources
def test_source_distribution(tmp_path):
    """What a build needs; the wheel's sources and nothing built. Making it takes no torch."""
    (tmp_path / "site").mkdir()
    only_setuptools(tmp_path / "site")
    command, environment = (
        ["setup.py", "-q", "sdist", "-d", str(tmp_path)],
        os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    run = subprocess.run(
        [sys.executable, "-S", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    import tarfile

    (archive,) = tmp_path.glob("rmsnorm_cuda-*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    tracked = [
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("rmsnorm_cuda/**/*.py*"),
        *ROOT.glob("rmsnorm_cuda/**/*.cmake"),
        *ROOT.glob("tests/*.py"),
    ]
    tracked = {str(path.relative_to(ROOT)) for path in tracked if "__pycache__" not in path.parts}
    assert (
        tracked <= names
        and {
            "setup.py",
            "rmsnorm_cuda_plugins.py",
            "pyproject.toml",
            "Makefile",
            "README.md",
            "LICENSE",
            ".ci/wheels.py",
        }
        <= names
    )
    assert not [name for name in names if re.search(r"\.(so|o|pyc)$", name)]
