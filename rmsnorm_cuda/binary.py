"""Which build of the compiled part is loaded: the one for the torch that runs.

A package carries one or several, for a minor version of torch each, in lib/torch2.13 and the like. What is not there, or
does not load, is told in one sentence.
"""

import importlib
import platform
import re
import shlex
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

TORCH = "torch>=2.11,<2.14"  # what pyproject.toml tells pip
_LIBRARIES = Path(__file__).resolve().parent / "lib"


def carried() -> list[str]:
    """The versions of torch that there are builds for, such as "2.13"."""
    found = [re.fullmatch(r"torch(\d+\.\d+)", path.parent.name) for path in _LIBRARIES.glob("torch*/librmsnorm_torch.so")]
    return sorted((match[1] for match in found if match), key=lambda version: tuple(map(int, version.split("."))))


def torch_libraries() -> Path:
    """The folder of `librmsnorm_torch.so` and `_C` for the torch that runs, which need not exist."""
    import torch

    return _LIBRARIES / f"torch{'.'.join(torch.__version__.split('.')[:2])}"


def is_whole(library: Path) -> bool:
    """Whether the file goes on to the end of its ELF section table. To load one that was cut kills the process."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return False
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return library.stat().st_size >= table + size * count


def load(package: str, path: list[str]) -> None:
    """Imports torch and then `_C` into the package, whose __path__ is given.

    Raises:
        ImportError: there is no torch, no build for it or for this Python, or the build does not load.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"rmsnorm_cuda needs torch, which is not installed; `pip install '{TORCH}'`.") from None
    if not hasattr(torch, "__version__"):
        raise ImportError(f"rmsnorm_cuda needs torch, and the folder {next(iter(torch.__path__))} is not that; `pip install '{TORCH}'`.")

    here, python = _LIBRARIES.parent, shlex.quote(sys.executable)
    folder, builds = torch_libraries(), carried()
    bindings = [path for path in (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES) if path.exists()]
    version = folder.name.removeprefix("torch")
    if (here.parent / "setup.py").exists():
        build = f"`cd {shlex.quote(str(here.parent))} && {python} setup.py build_ext --inplace`"
    else:  # pip's cache would give what it built for another torch
        build = f"`{python} -m pip install --force-reinstall --no-cache-dir --no-deps --no-build-isolation <its wheel or sources>`"
    if not builds:
        raise ImportError(
            f"rmsnorm_cuda is not compiled in {here}. If that is the source tree and the package is installed, start Python "
            f"in another directory; otherwise build it by {build}."
        )
    if version not in builds:
        least, below = ([int(n) for n in pair] for pair in re.findall(r"(\d+)\.(\d+)", TORCH))
        supported = least <= [int(n) for n in re.findall(r"\d+", version)] < below
        mend = f"`pip install 'torch=={builds[-1]}.*'`" + (f", or build it for this one by {build}" if supported else "")
        raise ImportError(f"rmsnorm_cuda in {here} was built for torch {', '.join(builds)}, and this is torch {torch.__version__}; {mend}.")
    pythons = ", ".join(sorted(file.name.split(".")[1] for file in folder.glob("_C.*.so")))
    if pythons and not bindings:
        raise ImportError(
            f"rmsnorm_cuda in {here} was built for another Python ({pythons}), and this is {platform.python_implementation()} "
            f"{platform.python_version()}; install it with this Python's pip, or build it by {build}."
        )
    path.append(str(folder))
    try:
        if not all(path.exists() and is_whole(path) for path in (_LIBRARIES / "librmsnorm.so", folder / "librmsnorm_torch.so", *bindings)):
            raise ImportError("a library was cut, or is none")
        importlib.import_module(f"{package}._C")
    except ImportError:
        # What the loader said, an undefined symbol most often, stays in __context__.
        raise ImportError(
            f"rmsnorm_cuda's build for torch {version} in {folder} does not load beside torch {torch.__version__} in "
            f"{Path(torch.__file__).parent}: one of them is incomplete, or of other sources than it says; build it anew by {build}."
        ) from None
