"""Builds the two thin layers, librmsnorm_torch.so and _C, for the torch of this Python.

    python .../rmsnorm_cuda/installation/build_layers.py

A wheel carries the layers for the releases of torch that it knows. For any other torch (a newer
release, a nightly, a vendor's build) run this file by its path: that works although the package
cannot be imported. It takes g++ and a minute of CPU time. It needs no nvcc, no network and no pip,
and builds nothing where the package loads already.

The layers go into the package's lib/. Where that cannot be written, they go into the user's cache,
where the package looks too: RMSNORM_CUDA_CACHE, else $XDG_CACHE_HOME/rmsnorm_cuda, else
~/.cache/rmsnorm_cuda. Two runs at once do not hurt each other: each builds in a folder of its own,
which takes its place whole, once it loads.

CXX names another compiler, MAX_JOBS how many run at once, LDFLAGS more options for the linker.
setup.py builds with the same flags, from here.
"""

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
from glob import escape as glob_escape
from pathlib import Path
from typing import NamedTuple

# Links are not followed: beside one lies what was installed with it.
SCRIPT = Path(os.path.abspath(__file__))
PACKAGE = SCRIPT.parents[1]
OPS = "librmsnorm_torch.so"
KERNELS = "librmsnorm.so"


def fail(message):
    sys.exit(f"rmsnorm_cuda: {message}")


def output(*command):
    """What a program prints; nothing if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


# What there is to build with and for


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # what it was built with
    hip: str | None

    @property
    def layer(self):
        return layer_name(self.version)


def layer_name(version):
    """The folder in lib/ of the layers for a torch.

    "torch2.15" serves all releases of that minor version. A nightly or a vendor's build
    ("2.16.0.dev20261120", "2.14.0a0+vendor") has an ABI of its own, and a folder by its whole
    version.
    """
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\.post\d+)?(\+.*)?", version)
    return f"torch{release[1] if release else version}"


def is_too_old(version, requirement):
    """Whether a torch is older than "torch>=..." allows, by major and minor version."""
    given, oldest = ([int(n) for n in re.findall(r"\d+", s)[:2]] for s in (version, requirement))
    return bool(given) and given < oldest


def find_torch(requirement, where=None):
    """The torch in that folder, or the one that this Python would import; nothing is imported."""
    finder = importlib.machinery.PathFinder.find_spec if where else importlib.util.find_spec
    spec = finder("torch", [where] if where else None)
    if not spec or not spec.origin:
        return None
    folder = Path(spec.origin).parent
    try:
        values = runpy.run_path(str(folder / "version.py"))
    except OSError:
        reinstall = "`pip install --force-reinstall torch`"
        fail(f"torch in {folder} is not complete: it has no version.py; {reinstall}.")
    version = values["__version__"]
    if is_too_old(version, requirement):
        install = f"`pip install '{requirement}'`"
        fail(f"torch {version} was found, and {requirement} is needed; {install}.")
    return Torch(folder, version, values.get("cuda"), values.get("hip"))


def words_of(variable, default=""):
    """The words of an environment variable, as a shell would split it."""
    value = os.environ.get(variable) or default
    try:
        return shlex.split(value)
    except ValueError as error:
        fail(f"{variable}={value!r} is not understood: {error}.")


def find_compiler():
    """The words of the command, without ccache: setup.py puts that before every compiler."""
    words, cxx = words_of("CXX", "g++"), os.environ.get("CXX") or "g++"
    if words and Path(words[0]).name == "ccache":
        words = words[1:]
    if not words or not shutil.which(words[0]):
        fix = "install g++ 11 or newer, or name one in CXX"
        fail(f"the C++ compiler {cxx!r} was not found; {fix}.")
    version = output(*words, "-dumpversion").strip()
    major = re.match(r"\d+", version)
    if major and int(major[0]) < 11:
        needed = "g++ or clang++ 11 or newer is needed; name another in CXX"
        fail(f"{cxx} is of version {version}, and {needed}.")
    return words


def jobs():
    """MAX_JOBS: how many compilers may run at once. None if it is not set."""
    value = os.environ.get("MAX_JOBS")
    if value and not re.fullmatch("0*[1-9][0-9]*", value):
        fail(f"MAX_JOBS={value!r} is not understood; expected a positive number.")
    return value


class Layer(NamedTuple):
    library: Path
    sources: list[Path]  # the longest compilation first
    flags: list[str]  # to compile them
    link: list[str]


def both_layers(torch, csrc, lib, folder, rpath="$ORIGIN/..:$ORIGIN/../../../torch/lib"):
    """librmsnorm_torch.so and _C, which loads it, to be built into a folder.

    `lib` has librmsnorm.so. `rpath` is where that lies, and torch: the default is for a folder of
    an installed package, beside which torch lies. (In Python that is loaded already.)
    """
    # torch 2.11 is of C++17. Its headers call std::ostringstream::str(), which C++20 takes from
    # libstdc++ 11: too new for a wheel.
    standard = "c++17" if torch.layer == "torch2.11" else "c++20"
    # at::parallel_for is inline and serial without -fopenmp; the runtime is libgomp.so.1, torch's.
    flags = f"-std={standard} -O2 -fopenmp -fPIC -fvisibility=hidden -Wall -Wextra".split()
    flags += ["-isystem", str(torch.folder / "include")]
    # pybind11 is the one that torch was built with: its type casters are torch's.
    # The argument parser's header takes fmt's functions inline, as torch itself was compiled.
    python = ["-isystem", sysconfig.get_paths()["include"], "-DFMT_HEADER_ONLY=1"]
    python += [f'-DRMSNORM_TORCH_VERSION="{torch.version}"']
    # --disable-new-dtags makes RPATH of -rpath. It goes before LD_LIBRARY_PATH, where a namesake
    # may lie.
    link = [*words_of("LDFLAGS"), f"-L{lib}", f"-L{folder}", f"-L{torch.folder / 'lib'}"]
    link += ["-Wl,--no-as-needed", "-Wl,--disable-new-dtags"]
    link_ops = [*link, f"-Wl,-rpath,{rpath}", f"-Wl,-soname,{OPS}", "-Wl,--no-undefined"]
    link_ops += ["-fopenmp", "-lrmsnorm", "-ltorch_cpu", "-lc10"]
    # Python's own symbols are left to the interpreter.
    link_binding = [*link, f"-Wl,-rpath,$ORIGIN:{rpath}", "-lrmsnorm_torch", "-lrmsnorm"]
    link_binding += ["-ltorch_python", "-ltorch_cpu", "-lc10"]
    of_ops, of_binding = sorted(csrc.glob("torch/*.cpp"), reverse=True), csrc.glob("python/*.cpp")
    return (
        Layer(folder / OPS, of_ops, flags, link_ops),
        Layer(folder / binding_name(), [*of_binding], [*flags, *python], link_binding),
    )


def binding_name():
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


# Where a build of this file goes


def sources():
    """csrc/, in a wheel or in the source tree, to which a strict editable install has links."""
    roots = PACKAGE, PACKAGE.parent, SCRIPT.resolve().parent.parent.parent
    return next(root / "csrc" for root in roots if (root / "csrc" / "torch").is_dir())


def built_name(version):
    """The folder that this file makes. The name has a hash of what the build depends on: what an
    older package left is not taken."""
    csrc = sources()
    key = hashlib.sha256(f"{PACKAGE} {binding_name()}".encode())
    for pattern in ("rmsnorm.h", "python/*.*", "torch/*.*"):
        for path in sorted(csrc.glob(pattern)):
            key.update(path.read_bytes())
    return f"torch{version}-{key.hexdigest()[:16]}"


def cache_folder():
    """The user's cache of layers, which need not exist. None: there is no home to put it into.

    Raises:
        ValueError: RMSNORM_CUDA_CACHE is not understood.
    """
    named = os.environ.get("RMSNORM_CUDA_CACHE")
    if named and not os.path.isabs(named):
        message = f"RMSNORM_CUDA_CACHE={named!r} is not understood; expected an absolute path"
        raise ValueError(message)
    home = os.environ.get("XDG_CACHE_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.cache")
    folder = named or os.path.join(home, "rmsnorm_cuda")
    return Path(folder) if os.path.isabs(folder) else None


def layers_folder(version):
    """The folder of the layers for that torch, which need not exist, and why one in the cache was
    refused, or None."""
    cache, refused = cache_folder(), None
    for parent in (PACKAGE / "lib", cache):
        # Without a folder of that version there is nothing to hash at import.
        if not parent or not any(parent.glob(f"torch{glob_escape(version)}-*")):
            continue
        folder = parent / built_name(version)
        if parent == cache and folder.is_dir():
            refused = why_not_trusted(folder)
        if not refused and all(os.path.exists(folder / name) for name in (OPS, binding_name())):
            return folder, None
    return PACKAGE / "lib" / layer_name(version), refused


def is_whole(library):
    """Whether an ELF file has its section table, at the end. A cut one would kill the process."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return False
    (table,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return library.stat().st_size >= table + size * count


def why_not_trusted(folder):
    """Why a folder of the cache is not used: somebody else may write to it. None: it is used."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder} cannot be read"
    folder = Path(os.path.realpath(folder))
    for path in (folder, *folder.parents):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user"
        sticky = path != folder and status.st_mode & stat.S_ISVTX
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            return f"{path} may be written to by others"
    return None


def make_destination(name):
    """The folder to build in, and the one that it becomes: in lib/, or in the cache."""
    reasons = []
    for parent, mode in ((PACKAGE / "lib", 0o755), (cache_folder(), 0o700)):
        if not parent:
            reasons.append("there is no home folder")
            continue
        try:
            parent.mkdir(mode=mode, parents=True, exist_ok=True)
            reason = mode == 0o700 and why_not_trusted(parent)
            if not reason:
                scratch = Path(tempfile.mkdtemp(prefix=".build", dir=parent))
                scratch.chmod(mode)
                return scratch, parent / name
        except OSError as error:
            reason = f"{parent} cannot be written ({error.strerror})"
        reasons.append(reason)
    why = "; ".join(reasons)
    fail(f"there is no place for what is built: {why}. RMSNORM_CUDA_CACHE names another folder.")


def put_in_place(scratch, folder):
    """Renames it, in place of what was there. What another process put there is as good."""
    options = {"prefix": ".old", "dir": folder.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**options) as old:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(Path(old) / folder.name)
        with contextlib.suppress(OSError):
            scratch.rename(folder)


def run_python(code):
    """In a fresh process."""
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)


def run_all(commands):
    """Runs them, MAX_JOBS at once, and returns whether all succeeded."""
    limit = int(jobs() or os.cpu_count() or 1)
    waiting, running, succeeded = commands[::-1], [], True
    while waiting or running:
        if waiting and len(running) < limit:
            running.append(subprocess.Popen(waiting.pop()))
        else:
            succeeded &= running.pop(0).wait() == 0
    return succeeded


def build(torch, cxx):
    """Builds both layers and returns their folder."""
    scratch, folder = make_destination(built_name(torch.version))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `scratch` is removed then, too
    try:
        lib, layers = PACKAGE / "lib", f"the layers for torch {torch.version}"
        rpath = [] if folder.parent == lib else [f"{lib}:{torch.folder / 'lib'}"]
        both = both_layers(torch, sources(), lib, scratch, *rpath)
        print(f"rmsnorm_cuda: building {layers}, which takes a minute of CPU time", flush=True)
        compilations, links = [], []
        for library, files, flags, link in both:
            objects = [str(scratch / f"{path.stem}.o") for path in files]
            compilations += [[*flags, "-c", str(p), "-o", o] for p, o in zip(files, objects)]
            links.append([["-shared", *objects, "-o", str(library), *link]])
        for commands in (compilations, *links):  # each step needs the one before
            if not run_all([[*cxx, *words] for words in commands]):
                fail(f"`{shlex.join(cxx)}` does not build {layers}; what it said is above.")
        code = f"""if True:
            import torch, importlib.util
            spec = importlib.util.spec_from_file_location("_C", {str(both[1].library)!r})
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.libraries()
        """
        run = run_python(code)
        if run.returncode:
            fail(f"what was built does not load beside torch {torch.version}:\n{run.stderr}")
        for path in scratch.glob("*.o"):
            path.unlink()
        put_in_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main():
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    # Python puts the folder of the script there.
    sys.path = [path for path in sys.path if os.path.abspath(path) != str(SCRIPT.parent)]
    requirement = runpy.run_path(str(SCRIPT.with_name("supported.py")))["TORCH"]
    torch = find_torch(requirement) or fail(f"torch is not installed for {sys.executable}.")
    kernels = PACKAGE / "lib" / KERNELS
    if not kernels.exists() or not is_whole(kernels):
        fail(f"{kernels} is not there, or was cut: install or build the package first.")
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import rmsnorm_cuda"
    if not run_python(code).returncode:
        print(f"rmsnorm_cuda loads beside torch {torch.version} as it is; nothing is to be built.")
        return
    cxx = find_compiler()
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        fix = "install Python's headers (python3-dev or python3-devel)"
        fail(f"Python.h of {sys.executable} was not found; {fix}.")
    try:
        print(f"rmsnorm_cuda: built in {build(torch, cxx)}")
    except ValueError as error:
        fail(f"{error}.")


if __name__ == "__main__":
    main()
