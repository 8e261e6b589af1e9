"""Which build of the compiled part is loaded: the one for the torch that runs.

A package carries one for each of several minor versions of torch, in lib/torch2.15 and the like; build_layers.py makes one
for any other. Libraries are loaded by their path, and what the loader took instead is told. What is not there, or does not
load, is told in one sentence.
"""

import importlib.util
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from .build_layers import KERNELS, OPS, PACKAGE, binding_name, built_layers, is_too_old, is_whole, layer_name
from .supported import TORCH

_LIBRARIES = PACKAGE / "lib"


def carried() -> list[str]:
    """The versions of torch that the package came with builds for, such as "2.13"."""
    found = {path.parent.name.removeprefix("torch") for path in _LIBRARIES.glob(f"torch*/{OPS}")}
    found = {version for version in found if not re.search(r"-[0-9a-f]{16}$", version)}  # of build_layers.py
    return sorted(found, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])


def torch_libraries() -> Path:
    """The folder of `librmsnorm_torch.so` and `_C` for the torch that runs, which need not exist."""
    import torch

    return built_layers(torch.__version__)[0] or _LIBRARIES / layer_name(torch.__version__)


def load(package: str) -> None:
    """Imports torch, and then `_C` as the package's module of that name.

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

    python, version = shlex.quote(sys.executable), torch.__version__
    build = f"`{python} {shlex.quote(str(PACKAGE / 'build_layers.py'))}`, which takes g++ and a minute"
    kernels = _LIBRARIES / KERNELS
    if is_too_old(version, TORCH):
        raise ImportError(f"rmsnorm_cuda needs {TORCH}, and this is torch {version}; `pip install '{TORCH}'`.")
    if not kernels.exists() or not is_whole(kernels):
        if (PACKAGE.parent / "setup.py").exists():
            mend = f"build it by `cd {shlex.quote(str(PACKAGE.parent))} && {python} setup.py build_ext --inplace`"
        else:  # pip's cache would give what it built before
            options = "--force-reinstall --no-cache-dir --no-deps --no-build-isolation"
            mend = f"install it again by `{python} -m pip install {options} <its wheel or sources>`"
        what = f"was cut: {kernels} ends too early" if kernels.exists() else f"is not compiled in {PACKAGE}"
        raise ImportError(
            f"rmsnorm_cuda {what}. If that is the source tree and the package is installed, start Python in another directory; "
            f"otherwise {mend}."
        )
    try:
        folder, refused = built_layers(version)
    except ValueError as error:
        raise ImportError(f"rmsnorm_cuda: {error}.") from None
    folder = folder or _LIBRARIES / layer_name(version)
    if not (folder / OPS).exists():
        refused = f" What was built for it before is not loaded: {refused}." if refused else ""
        raise ImportError(
            f"rmsnorm_cuda in {PACKAGE} carries builds for torch {', '.join(carried()) or '(none)'}, and this is torch {version}; "
            f"build it for this one by {build}.{refused}"
        )
    libraries, binding = (folder / OPS, kernels), folder / binding_name()
    pythons = ", ".join(sorted(file.name.split(".")[1] for file in folder.glob("_C.*.so")))
    if pythons and not binding.exists():
        raise ImportError(
            f"rmsnorm_cuda in {PACKAGE} was built for another Python ({pythons}), and this is {platform.python_implementation()} "
            f"{platform.python_version()}; install it with this Python's pip, or build it by {build}."
        )
    try:
        for path in (folder / OPS, binding):
            if not path.exists() or not is_whole(path):
                raise ImportError(f"{path.name} is not there, or was cut")
        module = _import(f"{package}._C", binding)
        for path, there in zip(libraries, module.libraries(), strict=True):
            if not os.path.samefile(path, there):
                raise ImportError(f"{there} was loaded before, and is used in place of {path}")
    except ImportError as error:
        raise ImportError(
            f"rmsnorm_cuda's build for torch {folder.name.removeprefix('torch').partition('-')[0]} in {folder} does not load beside torch "
            f"{version} in {Path(torch.__file__).parent}. The loader said: {error}. Build it anew by {build}."
        ) from None


def _import(name, path):
    """The extension module at that path. It is loaded once in a process."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
