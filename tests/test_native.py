"""The kernels without torch: the CPU ones run natively, the CUDA ones are compiled wherever nvcc is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C

ROOT = Path(__file__).parent.parent
LIBRARY = Path(rmsnorm_cuda.__file__).parent / "lib"
sys.path.insert(0, str(ROOT / "tests" / "native"))


def run(command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")
def test_cpu_kernels_from_cpp(tmp_path):
    """Guard zones, NaN paint, every ISA, every boundary length: see the head of cpu_check.cpp."""
    program = tmp_path / "cpu_check"
    # No torch and no Python on the command line: the library stands alone.
    link = [f"-L{LIBRARY}", "-lrmsnorm", f"-Wl,-rpath,{LIBRARY}"]
    run(["g++", "-std=c++17", "-O1", ROOT / "tests/native/cpu_check.cpp", *link, "-o", program])
    last = run([program]).splitlines()[-1]
    assert last.endswith(" 0 failed") and int(last.split()[0]) > 1000, last


@pytest.mark.cuda
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_kernels_from_cpp(tmp_path):
    """The same of the CUDA kernels: see the head of cuda_check.cpp."""
    program, arch = tmp_path / "cuda_check", "".join(map(str, torch.cuda.get_device_capability()))
    sources = [ROOT / "tests/native/cuda_check.cpp", *(ROOT / "csrc/cuda").glob("*.cu")]
    options = ["-std=c++17", "-O3", "-t", "2", "-cudart", os.environ.get("RMSNORM_CUDA_CUDART", "static")]
    options += ["-gencode", f"arch=compute_{arch},code=compute_{arch}", '-DRMSNORM_CUDA_ARCHS=""']
    run(["nvcc", *options, *sources, "-o", program])
    last = run([program]).splitlines()[-1]
    assert last.endswith(" 0 failed") and int(last.split()[0]) > 1000, last


@pytest.fixture(scope="module")
def cuda_build():
    """The objects for one architecture, by the package's own build; it is kept under build/, so a second run is quick."""
    return build_cuda()


def build_cuda():
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    if not (ROOT / "rmsnorm_cuda").exists():
        pytest.skip("the sources of the package are not here")
    # The objects of the CPU kernels are there already; where CUDA is built, those of its own architectures stay apart.
    build = ROOT / "build" / ("cuda-9.0" if _C.cuda_built() else "objects")
    environment = os.environ | {"RMSNORM_CUDA_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = ["build_ext", "--kernels-only", "--build-temp", build, "--build-lib", build / "lib"]
    run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment)
    return build


def test_same_inputs_same_bytes(cuda_build, monkeypatch):
    """Neither an object nor the library tells which process made it, or when."""
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    (library,) = cuda_build.rglob("librmsnorm.so")
    made = [library, cuda_build / "csrc/cuda/common.cu.o", cuda_build / "csrc/cpu/dispatch.cpp.o"]
    before = [path.read_bytes() for path in made]
    for path in made:
        path.unlink()
    build_cuda()
    assert [path.read_bytes() for path in made] == before


def test_cuda_kernels_move_16_bytes_at_a_time(cuda_build):
    """Their machine code has 16-byte loads and stores of global memory, and no local memory."""
    packages = [Path(folder) / "nvidia" for folder in sys.path]  # where nvidia-cuda-cuobjdump is installed to
    found = [shutil.which("cuobjdump"), *(str(path) for folder in packages for path in folder.glob("*/bin/cuobjdump"))]
    if not any(found):
        pytest.skip("no cuobjdump, neither on PATH nor of the package nvidia-cuda-cuobjdump")
    count = 0
    for name in ("forward", "backward"):
        text = run([next(filter(None, found)), "-sass", cuda_build / f"csrc/cuda/{name}.cu.o"])
        for function, code in re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", text, re.S):
            if "_rows" not in function and "_strips" not in function:
                continue
            count += 1
            assert "LDG.E.128" in code and "STG.E.128" in code, function
            assert not re.search(r"\b(LDL|STL)\b", code), function
    assert count > 100


def test_cuda_kernels_compile_without_spills(cuda_build):
    from ptxas_check import parse_ptxas

    kernels = parse_ptxas("\n".join(path.read_text() for path in cuda_build.rglob("*.ptxas")))
    assert len(kernels) > 40
    for kernel in kernels:
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel

    def registers(backward, cols, dtype, weight_dtype=None):
        return _C.cuda_plan(backward, 4096, cols, dtype, dtype, weight_dtype or dtype, 90, 132, 227 << 10)["registers"]

    # What the plans count on.
    half, full = torch.bfloat16, torch.float32
    for kind, limit in (
        ("forward_rows<(float|__nv_bfloat16, __nv_bfloat16).* false>$", registers(False, 4096, half)),
        ("forward_rows<.* true>$", registers(False, 2_000_000, half)),  # in 8 bits
        ("forward_long_rows<.* false, true, false>$", registers(False, 40_000, half)),  # keep the row
        ("forward_long_rows<", registers(False, 2_000_000, half)),
        ("backward_rows<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16", registers(True, 4096, half)),
        ("backward_rows<__half, float, float", registers(True, 4096, torch.half, full)),
        ("backward_rows<float", registers(True, 2048, full)),
        ("backward_shared_rows", registers(True, 40_000, half)),
        ("backward_long_stats", registers(True, 2_000_000, half)),
    ):
        of_kind = [kernel for kernel in kernels if re.search(kind, kernel.name)]
        assert of_kind and all(kernel.registers <= limit for kernel in of_kind), (kind, limit, of_kind)
