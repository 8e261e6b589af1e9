"""torch.export: one node per norm. AOTInductor and C++: servers without Python give the bits of
Python.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import GEMMA, LLAMA, ops, random, random_weight, same_bits
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.export import Dim

import rmsnorm_cuda
from rmsnorm_cuda import (
    RMSNorm,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    fused_add_rms_norm_quant,
    rms_norm,
    rms_norm_quant,
)

SERVERS = Path(__file__).parent.parent / "benchmarks" / "cpp_server"
sys.path.insert(0, str(SERVERS))

# ---------------------------------------------------------------- torch.export


def in_place(x, residual, weight, norm):
    y, total = x * 2, residual + 1
    fused_add_rms_norm_(y, total, weight, 1e-5)
    return y, total


KINDS = {
    "function": (ops.rms_norm.default, lambda x, r, w, norm: rms_norm(x, 40, w, 1e-5)),
    "gemma": (ops.rms_norm.default, lambda x, r, w, norm: rms_norm(x, 40, w, **GEMMA)),
    "llama": (ops.rms_norm.default, lambda x, r, w, norm: rms_norm(x.bfloat16(), 40, w, **LLAMA)),
    "module": (ops.rms_norm.default, lambda x, r, w, norm: norm(x)),
    "module with residual": (ops.fused_add_rms_norm.default, lambda x, r, w, norm: norm(x, r)),
    "fused": (ops.fused_add_rms_norm.default, lambda x, r, w, norm: fused_add_rms_norm(x, r, w)),
    "in place": (ops.fused_add_rms_norm_.default, in_place),
    "quantized": (
        ops.rms_norm_quant.default,
        lambda x, r, w, norm: rms_norm_quant(x, w, dtype=torch.float8_e4m3fn),
    ),
    "fused, quantized": (
        ops.fused_add_rms_norm_quant.default,
        lambda x, r, w, norm: fused_add_rms_norm_quant(x, r, w, dtype=torch.int8, return_norm=True),
    ),
}


class Model(torch.nn.Module):
    def __init__(self, function, trained=False):
        super().__init__()
        self.weight, self.norm, self.function = (
            torch.nn.Parameter(random_weight(40, torch.float32)),
            RMSNorm(40),
            function,
        )
        self.requires_grad_(trained)

    def forward(self, x, residual):
        return self.function(x, residual, self.weight, self.norm)


def export(model):
    lead = {0: Dim("batch"), 1: Dim("sequence")}
    return torch.export.export(
        model, (random(2, 3, 40), random(2, 3, 40)), dynamic_shapes=(lead, lead)
    )


def norms(program):
    """The ops of this package, in the functional form of a decomposed program too."""
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    wrapped = [
        node.args[0] for node in program.graph.nodes if "auto_functionalized" in str(node.target)
    ]
    return [op for op in called + wrapped if getattr(op, "namespace", None) == "rmsnorm_cuda"]


def results(function, *args):
    result = function(*args)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def all_same_bits(got, want):
    """Of 8 bits too."""
    return len(got) == len(want) and all(
        a.dtype == b.dtype
        and same_bits(*((a, b) if a.itemsize > 1 else (a.view(torch.uint8), b.view(torch.uint8))))
        for a, b in zip(got, want)
    )


@pytest.mark.parametrize("op, function", KINDS.values(), ids=KINDS)
def test_one_node_per_norm(op, function):
    """Before and after decompositions and in a saved program, for any batch and sequence, with the
    bits of eager.
    """
    model = Model(function)
    program = export(model)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for form in (program, program.run_decompositions(), torch.export.load(file)):
        assert norms(form) == [op]
        for shape in ((2, 3, 40), (5, 1, 40), (1, 7, 40)):
            x, residual = random(*shape), random(*shape)
            assert all_same_bits(results(form.module(), x, residual), results(model, x, residual))


@pytest.mark.parametrize("kind", ["function", "module with residual"])
def test_exported_program_trains(kind):
    model = Model(KINDS[kind][1], trained=True)
    program = export(model)
    x, residual = random(4, 2, 40), random(4, 2, 40)
    grads = []
    for module in (program.module(), model):
        leaves = [
            x.clone().requires_grad_(),
            residual.clone().requires_grad_(),
            *module.parameters(),
        ]
        loss = sum(y.square().sum() for y in results(module, *leaves[:2]))
        grads.append(
            [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]
        )
    assert len(grads[0]) > 1 and all_same_bits(*grads)


# ---------------------------------------------------------------- AOTInductor and C++


def run(*command, status=0, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == status, (done.stdout + done.stderr)[-4000:]
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder that export.py writes, and its model."""
    from export import export_model

    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    with fresh_cache():  # Inductor's cache on disk does not know that an op has changed
        # Quicker to compile, and the same kernels.
        quick = {
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
        }
        return folder, export_model(folder, hidden=64, layers=2, **quick)


@pytest.fixture(scope="module")
def cmake(tmp_path_factory):
    """Builds a folder with a CMakeLists.txt; returns where."""
    cmake = shutil.which(
        "cmake",
        path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    )
    if not cmake:
        pytest.skip("cmake is not installed")

    def build(source):
        folder = tmp_path_factory.mktemp("build")
        where = [
            f"-Drmsnorm_cuda_DIR={rmsnorm_cuda.cmake_dir()}",
            f"-DCMAKE_PREFIX_PATH={Path(torch.__file__).parent}",
        ]
        run(
            cmake,
            "-S",
            source,
            "-B",
            folder,
            *where,
            "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        )
        run(cmake, "--build", folder, "--parallel", 2)
        return folder

    return build


@pytest.fixture(scope="module")
def servers(cmake):
    return cmake(SERVERS)


@pytest.mark.slow
def test_aot_inductor(exported):
    folder, model = exported
    compiled = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    for batch in (1, 2, 7):
        x = random(batch, 64)
        assert all_same_bits(results(compiled, x), results(model, x))


@pytest.mark.slow
def test_torch_server(exported, servers):
    folder, _ = exported
    arguments = servers / "torch_server", folder / "model.pt2", folder / "requests.pt", 3, 20
    assert re.match(r"240 requests, 3 threads: \d+ a second, 0 with other bits", run(*arguments))
    # Its comparison does see another bit.
    requests = torch.load(folder / "requests.pt")
    requests[1][-1][0, 0] += 1
    torch.save(requests, folder / "wrong.pt")
    run(*arguments[:2], folder / "wrong.pt", status=1)


@pytest.mark.slow
def test_torch_server_says_what_is_wrong(exported, servers):
    folder, _ = exported
    arguments = servers / "torch_server", folder / "model.pt2", folder / "requests.pt"
    assert "Could not find schema for rmsnorm_cuda::" in run(
        *arguments, 1, 1, "libm.so.6", status=1
    )  # the ops were not loaded
    assert "nowhere.so: cannot open" in run(*arguments, 1, 1, "nowhere.so", status=1)
    assert "THREADS: expected a positive integer, but got 'two'" in run(*arguments, "two", status=1)
    assert "cannot read nothing.pt" in run(*arguments[:2], "nothing.pt", status=1)
    assert "usage: torch_server" in run(arguments[0], status=1)


@pytest.mark.slow
def test_torch_server_survives_a_bad_request(exported, servers, tmp_path):
    """What its threads throw is reported."""
    folder, _ = exported
    torch.save([(torch.randn(2, 5), torch.randn(2, 5))], tmp_path / "bad.pt")
    message = run(
        servers / "torch_server", folder / "model.pt2", tmp_path / "bad.pt", 2, 2, status=1
    )
    assert "\ntorch_server: " in message and "terminate" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, name", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")], ids=["fp32", "bf16"]
)
def test_kernel_server(dtype, name, servers, tmp_path):
    from export import save_bits

    x, weight = random(50, 1031, dtype=dtype), random_weight(1031, dtype)
    save_bits(x, tmp_path / "x")
    save_bits(weight, tmp_path / "weight")
    said = run(
        servers / "kernel_server",
        name,
        1031,
        tmp_path / "x",
        tmp_path / "weight",
        tmp_path / "y",
        3,
        100,
    )
    assert re.match(rf"1x1031 {name}, \w+, 3 threads: [\d.]+ us a call", said)
    save_bits(rms_norm(x, 1031, weight, 1e-6), tmp_path / "want")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "want").read_bytes()


BAD_KERNEL_ARGUMENTS = {
    "usage: kernel_server": [],
    "expected fp32, fp16 or bf16, but got 'fp8'": ["fp8", 40, "x", "weight", "y"],
    "COLS: expected a positive integer, but got '0'": ["fp32", 0, "x", "weight", "y"],
    "cannot read nothing": ["fp32", 40, "nothing", "weight", "y"],
    "INPUT: expected rows of 164 bytes": ["fp32", 41, "x", "weight", "y"],
    "one or more for each of 3 threads, but got 320 bytes": ["fp32", 40, "x", "weight", "y", 3],
    "WEIGHT: expected 160 bytes, but got 320": ["fp32", 40, "x", "x", "y"],
    "cannot write no/y": ["fp32", 40, "x", "weight", "no/y"],
}


@pytest.mark.slow
@pytest.mark.parametrize("message", BAD_KERNEL_ARGUMENTS)
def test_kernel_server_says_what_is_wrong(message, servers, tmp_path):
    (tmp_path / "x").write_bytes(bytes(320))
    (tmp_path / "weight").write_bytes(bytes(160))
    assert message in run(
        servers / "kernel_server", *BAD_KERNEL_ARGUMENTS[message], status=1, cwd=tmp_path
    )


@pytest.mark.slow
def test_servers_have_no_python(exported, servers):
    """Nor do the ops and the model that one of them loads as it runs: the dynamic linker tells of
    every file.
    """
    folder, _ = exported
    arguments = servers / "torch_server", folder / "model.pt2", folder / "requests.pt"
    told = subprocess.run(
        arguments,
        env=os.environ | {"LD_DEBUG": "files"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "librmsnorm_torch.so" in told and "wrapper.so" in told and "libpython" not in told
    torch_server, kernel_server = (
        run("ldd", servers / name) for name in ("torch_server", "kernel_server")
    )
    assert "libtorch_cpu" in torch_server and "libpython" not in torch_server
    assert "librmsnorm.so" in kernel_server and not re.search(
        "lib(torch|c10|python)", kernel_server
    )


PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(linked LANGUAGES CXX)
find_package(rmsnorm_cuda {version} EXACT CONFIG REQUIRED)
find_library(TORCH_CPU torch_cpu)
find_library(C10 c10)
add_executable(linked main.cpp)
target_link_libraries(linked rmsnorm_cuda::rmsnorm rmsnorm_cuda::rmsnorm_torch
                      ${{TORCH_CPU}} ${{C10}})
find_package(rmsnorm_cuda 99 CONFIG QUIET)
if(rmsnorm_cuda_FOUND)
  message(FATAL_ERROR "there is no version 99")
endif()
"""


@pytest.mark.slow
def test_linked_ops(cmake, tmp_path):
    """A program that links the ops needs no dlopen: they are loaded with it, though it asks for
    none of their symbols.
    """
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(version=rmsnorm_cuda.__version__))
    (tmp_path / "main.cpp").write_text(
        "#include <rmsnorm.h>\nint main() { return rmsnorm::cpu::isa_count() == 0; }\n"
    )
    program = cmake(tmp_path) / "linked"
    run(program)
    assert "librmsnorm_torch.so" in run("ldd", program)


OPTIONS_OF_MODULES = [
    {},
    {"eps": None},
    {"weight_offset": 1.0},
    {"cast_before_weight": True},
    {"elementwise_affine": False},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", OPTIONS_OF_MODULES, ids=str)
def test_torchscript(options):
    """Compiled, saved, read again, trained: one op, the bits of eager."""
    model, x = (
        nn.Sequential(nn.Linear(16, 16), RMSNorm(16, **({"eps": 1e-6} | options))),
        torch.randn(3, 16),
    )
    scripted, file = torch.jit.script(model), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for made in (scripted, loaded):
        assert same_bits(made(x).detach(), model(x).detach())
        assert "rmsnorm_cuda::rms_norm" in str(made.inlined_graph)
    if model[1].weight is not None:
        scripted(x).sin().sum().backward()
        assert model[1].weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_of_what_it_cannot_compile():
    class Mine(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="use torch.jit.trace or torch.export"):
        torch.jit.script(nn.Sequential(Mine(4)))
