"""Where a C++ program finds the headers and libraries; it needs no Python to run."""

from .build_layers import PACKAGE, layers_folder


def include_dir() -> str:
    """The folder of `rmsnorm.h`, by which C++ calls the kernels in `librmsnorm.so`."""
    return str(PACKAGE / "include")


def library_dir() -> str:
    """The folder of `librmsnorm.so`, the kernels: neither torch nor Python."""
    return str(PACKAGE / "lib")


def torch_library_dir() -> str:
    """The folder of `librmsnorm_torch.so`, torch's ops without Python, for the torch that runs."""
    import torch

    return str(layers_folder(torch.__version__)[0])


def cmake_dir() -> str:
    """The `rmsnorm_cuda_DIR` of CMake's `find_package(rmsnorm_cuda)`."""
    return str(PACKAGE / "installation" / "cmake")
