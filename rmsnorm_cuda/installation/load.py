"""Loads the compiled part: `_C` and both libraries, in the build for the torch that runs.

A package carries a build for each of several minor versions of torch, in lib/torch2.15 and the
like. build_layers.py makes one for any other. The libraries load by their path, and an error names
what the loader took instead. Each ImportError names the problem and the command that fixes it.
"""

import importlib.util
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from . import build_layers as layers
from .build_layers import KERNELS, OPS, PACKAGE
from .supported import TORCH

LIBRARIES = PACKAGE / "lib"
PYTHON = shlex.quote(sys.executable)
BUILD_LAYERS = f"`{PYTHON} {shlex.quote(str(layers.SCRIPT))}`, which takes g++ and a minute"


def carried() -> list[str]:
    """The versions of torch that the package came with builds for, such as "2.13"."""
    versions = {path.parent.name.removeprefix("torch") for path in LIBRARIES.glob(f"torch*/{OPS}")}
    by_build_layers = {version for version in versions if re.search(r"-[0-9a-f]{16}$", version)}
    return sorted(versions - by_build_layers, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])


def load(package: str) -> None:
    """Imports torch, and then `_C` as the package's module of that name.

    Raises:
        ImportError: there is no torch, no build for it or this Python, or the build does not load.
    """
    fix = f"`pip install '{TORCH}'`"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"rmsnorm_cuda needs torch, which is not installed; {fix}.") from None
    if not hasattr(torch, "__version__"):
        folder = next(iter(torch.__path__))
        raise ImportError(f"rmsnorm_cuda needs torch, and the folder {folder} is not that; {fix}.")
    version = torch.__version__
    if layers.is_too_old(version, TORCH):
        raise ImportError(f"rmsnorm_cuda needs {TORCH}, and this is torch {version}; {fix}.")
    _check_kernels()
    try:
        folder, refused = layers.layers_folder(version)
    except ValueError as error:
        raise ImportError(f"rmsnorm_cuda: {error}.") from None
    _check_layers(folder, refused, version)
    try:
        _load_binding(f"{package}._C", folder)
    except ImportError as error:
        built_for = folder.name.removeprefix("torch").partition("-")[0]
        raise ImportError(
            f"rmsnorm_cuda's build for torch {built_for} in {folder} does not load beside torch "
            f"{version} in {Path(torch.__file__).parent}. The loader said: {error}. Build it anew "
            f"by {BUILD_LAYERS}."
        ) from None


def _check_kernels():
    kernels, problem = LIBRARIES / KERNELS, f"is not compiled in {PACKAGE}"
    if kernels.exists():
        if layers.is_whole(kernels):
            return
        problem = f"was cut: {kernels} ends too early"
    if (PACKAGE.parent / "setup.py").exists():
        checkout = shlex.quote(str(PACKAGE.parent))
        fix = f"build it by `cd {checkout} && {PYTHON} setup.py build_ext --inplace`"
    else:  # pip's cache would give what it built before
        options = "--force-reinstall --no-cache-dir --no-deps --no-build-isolation"
        fix = f"install it again by `{PYTHON} -m pip install {options} <its wheel or sources>`"
    raise ImportError(
        f"rmsnorm_cuda {problem}. If that is the source tree and the package is installed, start "
        f"Python in another directory; otherwise {fix}."
    )


def _check_layers(folder, refused, version):
    """That there are layers for this torch and this Python, whether or not they load."""
    if not (folder / OPS).exists():
        builds = ", ".join(carried()) or "(none)"
        reason = f" What was built for it before is not loaded: {refused}." if refused else ""
        raise ImportError(
            f"rmsnorm_cuda in {PACKAGE} carries builds for torch {builds}, and this is torch "
            f"{version}; build it for this one by {BUILD_LAYERS}.{reason}"
        )
    pythons = ", ".join(sorted(file.name.split(".")[1] for file in folder.glob("_C.*.so")))
    if pythons and not (folder / layers.binding_name()).exists():
        raise ImportError(
            f"rmsnorm_cuda in {PACKAGE} was built for another Python ({pythons}), and this is "
            f"{platform.python_implementation()} {platform.python_version()}; install it with this "
            f"Python's pip, or build it by {BUILD_LAYERS}."
        )


def _load_binding(name, folder):
    """Imports `_C`, once in a process, if the libraries that it takes along are the ones meant."""
    ops, binding = folder / OPS, folder / layers.binding_name()
    for path in (ops, binding):
        if not path.exists() or not layers.is_whole(path):
            raise ImportError(f"{path.name} is not there, or was cut")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, binding)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    for path, loaded in zip((ops, LIBRARIES / KERNELS), sys.modules[name].libraries(), strict=True):
        if not os.path.samefile(path, loaded):
            raise ImportError(f"{loaded} was loaded before, and is used in place of {path}")
