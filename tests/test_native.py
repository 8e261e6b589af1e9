"""The kernels without torch: the CPU ones run natively, the CUDA ones are compiled wherever nvcc
is.
"""

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


def test_each_intrinsic_of_avx512_is_emulated():
    """For `make mutate`, and machines without it."""
    used = re.findall(r"_mm512_\w+(?=\()", (ROOT / "csrc/cpu/isa_avx512.cpp").read_text())
    emulation = (ROOT / "tests/native/cpu_avx512_emulated.h").read_text()
    there = set(re.findall(r"#define (\w+)\(", emulation))
    assert len(set(used)) > 30 and set(used) - there == {"_mm512_undefined"}  # in a comment


def test_each_excused_mutant_is_a_line_of_the_sources():
    run([sys.executable, ROOT / ".ci/mutate.py", "--list"])


@pytest.mark.cuda
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_kernels_from_cpp(tmp_path):
    """The same of the CUDA kernels: see the head of cuda_check.cpp."""
    program, arch = tmp_path / "cuda_check", "".join(map(str, torch.cuda.get_device_capability()))
    sources = [ROOT / "tests/native/cuda_check.cpp", *(ROOT / "csrc/cuda").glob("*.cu")]
    options = [
        "-std=c++17",
        "-O3",
        "-t",
        "2",
        "-cudart",
        os.environ.get("RMSNORM_CUDA_CUDART", "static"),
    ]
    options += ["-gencode", f"arch=compute_{arch},code=compute_{arch}", '-DRMSNORM_CUDA_ARCHS=""']
    run(["nvcc", *options, *sources, "-o", program])
    last = run([program]).splitlines()[-1]
    assert last.endswith(" 0 failed") and int(last.split()[0]) > 1000, last


@pytest.fixture(scope="module")
def cuda_build():
    """The objects for two architectures, by the package's own build; it is kept under build/, so a
    second run is quick. `.ci/run` gives their PTX to a simulator.
    """
    return build_cuda()


def build_cuda():
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    if not (ROOT / "rmsnorm_cuda").exists():
        pytest.skip("the sources of the package are not here")
    # The objects of the CPU kernels are there already; where CUDA is built, those of its own
    # architectures stay apart.
    build = ROOT / "build" / ("cuda-tests" if _C.cuda_built() else "objects")
    archs = "8.0+PTX 9.0+PTX"
    environment = os.environ | {"RMSNORM_CUDA_BUILD": "1", "TORCH_CUDA_ARCH_LIST": archs}
    command = ["build_ext", "--kernels-only", "--build-temp", build, "--build-lib", build / "lib"]
    run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment)
    return build


@pytest.mark.slow
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


DRIVER = """
#include <cstring>
extern "C" int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
extern "C" int cuInit(unsigned) { return 100; }  // no device
extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long,
                                   int* status) {
  const auto is = [&](const char* what) { return std::strcmp(name, what) == 0; };
  *function = is("cuDriverGetVersion") ? reinterpret_cast<void*>(cuDriverGetVersion)
              : is("cuInit")           ? reinterpret_cast<void*>(cuInit)
              : is("cuGetProcAddress") ? reinterpret_cast<void*>(cuGetProcAddress_v2)
                                       : nullptr;
  if (status) *status = *function == nullptr;
  return *function ? 0 : 500;  // not found
}
extern "C" int cuGetProcAddress(const char* name, void** function, int version,
                                unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
"""
LAUNCH = """
#include <cstdio>
#include "rmsnorm.h"
using namespace rmsnorm;
int main() {
  RmsNormForward p{};
  p.rows = 1, p.cols = 8, p.x_rows.ndim = p.y_rows.ndim = 1;
  const int error = cuda::rms_norm_forward(p, nullptr);
  std::printf("%d %d %d %s", cuda::runtime_version(), cuda::driver_version(), error,
              cuda::error_string(error));
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")
@pytest.mark.skipif(_C.cuda_built(), reason="the CUDA kernels are there")
def test_kernels_that_were_not_built(tmp_path):
    """A launch is an error, which says why."""
    backward = """
        #include "rmsnorm.h"
        int main() {
          const rmsnorm::RmsNormBackward p{};
          const rmsnorm::RmsNormRope q{};
          const rmsnorm::RmsNormRopeBackward dq{};
          if (rmsnorm::cuda::rms_norm_backward_workspace(p) != 0) return 1;
          if (rmsnorm::cuda::rms_norm_rope_backward_workspace(&dq, 1) != 0) return 1;
          if (rmsnorm::cuda::rms_norm_rope_forward(&q, 1, nullptr) == 0) return 1;
          if (rmsnorm::cuda::rms_norm_rope_backward(&dq, 1, nullptr) == 0) return 1;
          const rmsnorm::RmsNormGated gated{};
          const rmsnorm::RmsNormGatedBackward dgated{};
          if (rmsnorm::cuda::rms_norm_gated_backward_workspace(dgated) != 0) return 1;
          if (rmsnorm::cuda::rms_norm_gated_forward(gated, nullptr) == 0) return 1;
          if (rmsnorm::cuda::rms_norm_gated_backward(dgated, nullptr) == 0) return 1;
          const rmsnorm::RmsNormSandwich sandwich{};
          if (rmsnorm::cuda::rms_norm_sandwich_forward(sandwich, nullptr) == 0) return 1;
          return rmsnorm::cuda::rms_norm_backward(p, nullptr) == 0;
        }
    """
    link = [f"-L{LIBRARY}", "-lrmsnorm", f"-Wl,-rpath,{LIBRARY}"]
    for name, source in (("forward", LAUNCH), ("backward", backward)):
        (tmp_path / f"{name}.cpp").write_text(source)
        options = ["-std=c++17", f"-I{LIBRARY.parent / 'include'}", "-o", tmp_path / name]
        run(["g++", tmp_path / f"{name}.cpp", *options, *link])
    runtime, driver, error, sentence = run([tmp_path / "forward"]).split(" ", 3)
    assert runtime == driver == "0" and int(error) != 0
    assert sentence == f"the CUDA kernels were not built: {_C.cuda_architectures()}"
    run([tmp_path / "backward"])


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("RMSNORM_CUDA_CUDART") == "shared",
    reason="a shared CUDA runtime may not be NVIDIA's",
)
def test_driver_that_is_too_old(cuda_build, tmp_path):
    """Told in one sentence with both versions: a library stands in for the driver, and says only
    how old it is.
    """
    (library,) = cuda_build.rglob("librmsnorm.so")
    link = [f"-L{library.parent}", "-lrmsnorm", f"-Wl,-rpath,{library.parent}"]
    (tmp_path / "launch.cpp").write_text(LAUNCH)
    run(
        [
            "g++",
            "-std=c++17",
            f"-I{ROOT / 'csrc'}",
            tmp_path / "launch.cpp",
            *link,
            "-o",
            tmp_path / "launch",
        ]
    )
    (tmp_path / "driver.cpp").write_text(DRIVER)

    def launch(version):
        run(
            [
                "g++",
                "-shared",
                "-fPIC",
                f"-DVERSION={version}",
                tmp_path / "driver.cpp",
                "-o",
                tmp_path / "libcuda.so.1",
            ]
        )
        said = run([tmp_path / "launch"], env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)})
        runtime, driver, error, sentence = said.split(" ", 3)
        assert int(driver) == version
        return int(runtime), int(error), sentence

    runtime, error, sentence = launch(11080)
    series, branch = runtime // 1000, {12: " (R525)", 13: " (R580)"}.get(runtime // 1000, "")
    assert error == 35  # cudaErrorInsufficientDriver
    assert (
        sentence == "the NVIDIA driver is of CUDA 11.8, too old: these kernels need one of CUDA "
        f"{series}.0{branch} or newer"
    )
    assert launch((series - 1) * 1000 + 990)[1] == 35
    assert (
        launch(series * 1000)[1] == launch((series + 1) * 1000)[1] == 100
    )  # cudaErrorNoDevice: the driver is new enough


@pytest.mark.slow
def test_cuda_kernels_move_16_bytes_at_a_time(cuda_build):
    """Their machine code has 16-byte loads and stores of global memory, and no local memory."""
    packages = [
        Path(folder) / "nvidia" for folder in sys.path
    ]  # where nvidia-cuda-cuobjdump is installed to
    found = [
        shutil.which("cuobjdump"),
        *(str(path) for folder in packages for path in folder.glob("*/bin/cuobjdump")),
    ]
    if not any(found):
        pytest.skip("no cuobjdump, neither on PATH nor of the package nvidia-cuda-cuobjdump")
    count = 0
    for name in ("forward", "quant", "backward", "rope_forward", "rope_backward"):
        text = run([next(filter(None, found)), "-sass", cuda_build / f"csrc/cuda/{name}.cu.o"])
        for function, code in re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", text, re.S):
            if "_rows" not in function and "_strips" not in function:
                continue
            count += 1
            assert "LDG.E.128" in code and "STG.E.128" in code, function
            assert not re.search(r"\b(LDL|STL)\b", code), function
    assert count > 100


@pytest.mark.slow
def test_cuda_kernels_compile_without_spills(cuda_build):
    """Nor do they take more registers than the plans count on. Every kernel of the plans is
    there.
    """
    from ptxas_check import failures, parse_ptxas

    kernels = parse_ptxas("\n".join(path.read_text() for path in cuda_build.rglob("*.ptxas")))
    assert len(kernels) > 100 and failures(kernels) == []
    limits = _C.cuda_limits(90)
    names = {kernel.name.removeprefix("void ").partition("<")[0] for kernel in kernels}
    assert names >= set(limits)


def test_a_kernel_that_takes_too_much_is_found(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "native")
    from ptxas_check import Kernel, failures

    plain = Kernel("forward_rows<float, (Form)1, false, 4>", "sm_90", 80, 0, 0, 0)
    kernels = [
        plain,
        plain._replace(name="forward_rows<float, (Form)1, true, 4>", registers=128),
        plain._replace(name="forward_rows<float, (Form)2, false, 4>", registers=128),
        plain._replace(name="backward_rows<__half, __half, (Form)2, 2>"),
        plain._replace(name="backward_rows<__half, float, (Form)2, 2>", registers=120),
    ]
    assert failures(kernels) == []
    bad = [k._replace(registers=k.registers + 1) for k in kernels]
    bad += [plain._replace(spill_bytes=4), plain._replace(stack_bytes=8)]
    assert failures(bad) == bad
