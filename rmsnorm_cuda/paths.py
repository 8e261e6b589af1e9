"""Where a C++ program finds what this package was built into; no Python is needed to run one."""

from .binary import torch_libraries
from .build_layers import PACKAGE


def include_dir() -> str:
    """The folder of `rmsnorm.h`, by which C++ calls the kernels in `librmsnorm.so`."""
    return str(PACKAGE / "include")


def library_dir() -> str:
    """The folder of `librmsnorm.so`, the kernels: neither torch nor Python."""
    return str(PACKAGE / "lib")


def torch_library_dir() -> str:
    """The folder of `librmsnorm_torch.so`, torch's ops without Python, for the torch that runs."""
    return str(torch_libraries())


def cmake_dir() -> str:
    """The `rmsnorm_cuda_DIR` of CMake's `find_package(rmsnorm_cuda)`."""
    return str(PACKAGE / "cmake")
