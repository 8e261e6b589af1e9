"""What was built: three libraries, each ignorant of the one above; none can crash an older CPU."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C
from rmsnorm_cuda import __main__ as command
from rmsnorm_cuda.bench import machine

BINDING = Path(_C.__file__)
LIBRARIES = Path(rmsnorm_cuda.__file__).parent / "lib"
KERNELS, OPS = (
    LIBRARIES / "librmsnorm.so",
    Path(rmsnorm_cuda.torch_library_dir()) / "librmsnorm_torch.so",
)


def output(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library)))


def test_layers():
    assert not [lib for lib in needed(KERNELS) if re.search(r"torch|c10|python", lib)]
    assert not [lib for lib in needed(OPS) if re.search(r"python|torch_cuda|c10_cuda|cudart", lib)]
    assert not [lib for lib in needed(BINDING) if re.search(r"torch_cuda|c10_cuda|cudart", lib)]
    assert {"librmsnorm.so", "libtorch_cpu.so"} < set(needed(OPS))  # this is how such names look


@pytest.mark.parametrize("library", [KERNELS, OPS, BINDING], ids=["kernels", "ops", "binding"])
def test_no_paths_of_the_build_machine(library):
    """Found at load time beside each other and beside torch, wherever that is."""
    for path in re.findall(
        r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", output("readelf", "-d", str(library))
    ):
        assert all(part.startswith("$ORIGIN") for part in path.split(":"))


def test_exports_and_types_are_those_on_record(monkeypatch):
    """Programs were compiled against the contract as native/abi.txt shows it. `python
    tests/native/abi.py` records a change, which then is seen; a struct that grew breaks them.
    """
    for program in ("nm", "g++"):
        output(program, "--version")  # or it is skipped
    pytest.importorskip("elftools")
    monkeypatch.syspath_prepend(Path(__file__).parent / "native")
    import abi

    assert abi.abi()[1:] == abi.RECORD.read_text().splitlines()[1:]
    assert abi.exports(OPS) == ["rmsnorm::registered_elsewhere()"]
    assert abi.exports(BINDING) == ["PyInit__C"]


def test_a_struct_that_grows_is_seen(monkeypatch, tmp_path):
    output("g++", "--version")
    pytest.importorskip("elftools")
    monkeypatch.syspath_prepend(Path(__file__).parent / "native")
    import abi

    header = Path(rmsnorm_cuda.include_dir(), "rmsnorm.h").read_text()
    grown = tmp_path / "rmsnorm.h"
    before = abi.types(header_at(grown, header))
    for old, new in [
        ("  bool stream;  //", "  bool stream, other;  //"),  # takes the place of padding
        ("int64_t rows, cols;", "int64_t cols, rows;"),
        ("float bound;", "double bound;"),
        ("{ kFloat8E4M3, kFloat8E5M2,", "{ kFloat8E5M2, kFloat8E4M3,"),
    ]:
        assert old in header and abi.types(header_at(grown, header.replace(old, new))) != before


def header_at(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("library", [KERNELS, OPS, BINDING], ids=["kernels", "ops", "binding"])
def test_no_names_of_ours_are_shared(library):
    """Of a weak symbol the loader keeps one for the process, that of another version maybe."""
    weak = re.findall(r" [WVu] (.*)", output("nm", "-DC", "--defined-only", str(library)))
    assert not [name for name in weak if "rmsnorm" in name]


# A third more than they have without CUDA; CUDA's kernels have a bound of the wheel's.
BOUNDS = {KERNELS: 7_400_000, OPS: 2_500_000, BINDING: 600_000}


@pytest.mark.parametrize("library", BOUNDS, ids=["kernels", "ops", "binding"])
def test_size(library):
    if library == KERNELS and _C.cuda_built():
        assert library.stat().st_size < 60_000_000
    else:
        assert library.stat().st_size < BOUNDS[library]


VECTOR = re.compile(r"%[yz]mm|\bv[a-z0-9]+ ")


@pytest.mark.parametrize("library", [KERNELS, OPS, BINDING], ids=["kernels", "ops", "binding"])
def test_no_weak_symbol_holds_vector_code(library):
    """The ISA trap: of a weak symbol the linker keeps one copy for the whole process, and an older
    CPU crashes if that is the one compiled for AVX. See csrc/cpu/isa_avx2.cpp."""
    text = output("nm", "--defined-only", str(library)) + output(
        "nm", "-D", "--defined-only", str(library)
    )
    weak = set(re.findall(r" [WVu] (\S+?)(?:@|$)", text, re.M))
    code = {}
    for block in output("objdump", "-d", "--no-show-raw-insn", str(library)).split("\n\n"):
        match = re.match(r"[0-9a-f]+ <(.*)>:", block.lstrip())
        if match:
            code[match[1]] = block
    if library == KERNELS and "avx2" in _C.isas():
        assert any(
            VECTOR.search(block) for block in code.values()
        )  # the pattern does find what it looks for
    assert not [symbol for symbol in weak if VECTOR.search(code.get(symbol, ""))]


def test_vector_code_is_in_local_functions_alone():
    """What librmsnorm.so exports is plain x86-64: nothing crashes before the CPU was asked."""
    exported = set(re.findall(r" T (\S+)", output("nm", "-D", "--defined-only", str(KERNELS))))
    for block in output("objdump", "-d", "--no-show-raw-insn", str(KERNELS)).split("\n\n"):
        match = re.match(r"[0-9a-f]+ <(.*)>:", block.lstrip())
        if match and match[1] in exported:
            assert not VECTOR.search(block), match[1]


@pytest.mark.parametrize("library", [KERNELS, OPS, BINDING], ids=["kernels", "ops", "binding"])
def test_vector_code_is_from_two_files(library):
    """Those whose functions are compiled for AVX; by the addresses of the local symbols after each
    file's name. The other libraries have none.
    """
    file, owner = None, {}
    for line in output("readelf", "-sW", str(library)).splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[3] == "FILE":
            file = fields[7]
        elif len(fields) == 8 and fields[3] == "FUNC" and fields[4] == "LOCAL":
            owner[int(fields[1], 16)] = file
    if not owner and library == KERNELS:
        pytest.skip("it is stripped")
    found = set()
    for block in output("objdump", "-d", "--no-show-raw-insn", str(library)).split("\n\n"):
        match = re.match(r"([0-9a-f]+) <(.*)>:", block.lstrip())
        if match and VECTOR.search(block):
            found.add(owner.get(int(match[1], 16), match[2]))
    vectors = "avx2" in _C.isas() and library == KERNELS
    assert found == ({"isa_avx2.cpp", "isa_avx512.cpp"} if vectors else set())


def test_header_is_the_contract():
    """rmsnorm_cuda/include holds a copy, which a build keeps fresh."""
    header = Path(rmsnorm_cuda.include_dir(), "rmsnorm.h").read_text()
    assert header == (Path(__file__).parent.parent / "csrc" / "rmsnorm.h").read_text()
    assert Path(rmsnorm_cuda.library_dir()) == LIBRARIES.resolve()
    printed = programs.run(module="rmsnorm_cuda", arguments=["--cmake-dir"]).stdout
    assert Path(printed.strip(), "rmsnorm_cuda-config.cmake").exists()


def test_versions():
    minor = torch.__version__.split(".")[:2]
    assert _C.torch_version.split(".")[:2] == minor and re.fullmatch(
        rf"torch{'.'.join(minor)}(\.\d+.*-[0-9a-f]{{16}})?", BINDING.parent.name
    )
    assert _C.compiler.startswith("g++")
    assert isinstance(_C.cuda_built(), bool) and _C.cuda_architectures()
    assert list(_C.isas())[:2] == ["fp64", "scalar"] and _C.isas()["scalar"]


def test_typed():
    assert (Path(rmsnorm_cuda.__file__).parent / "py.typed").exists()
    declared = (Path(rmsnorm_cuda.__file__).parent / "_C.pyi").read_text()
    public = [name for name in dir(_C) if not name.startswith("_")]
    assert not [name for name in public if not re.search(rf"^(def )?{name}\b", declared, re.M)]


def test_unbuilt_sources_say_so(tmp_path):
    """Python started inside the source tree of an installed package imports the sources."""
    package = Path(rmsnorm_cuda.__file__).parent
    shutil.copytree(
        package, tmp_path / "rmsnorm_cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    run = programs.run("import rmsnorm_cuda", cwd=tmp_path)
    assert run.returncode == 1 and "rmsnorm_cuda is not compiled in" in run.stderr.splitlines()[-1]


def test_self_check_reports_a_wrong_isa():
    """The report is printed all the same, and the status says that something is wrong."""
    run = programs.run(module="rmsnorm_cuda", RMSNORM_CUDA_ISA="nonsense")
    assert run.returncode == 1 and run.stdout.startswith("rmsnorm_cuda ")
    assert (
        "RMSNORM_CUDA_ISA is 'nonsense'" in run.stdout
        and "RMSNORM_CUDA_ISA=nonsense" in run.stdout
        and run.stdout.splitlines()[-1] == "FAILED"
    )


def test_self_check_reports_a_wrong_result(monkeypatch, capsys):
    def checks(device, generator):
        for ulps in (0.5, 3.0, float("nan")):
            rmsnorm_cuda.rms_norm(torch.ones(1, 8), 8)  # it asks which instruction set ran
            yield "forward", "rms_norm", ulps, 1

    monkeypatch.setattr(command, "checks", checks)
    monkeypatch.setattr(_C, "cuda_built", lambda: False)
    assert command.self_check() == 2 * sum(_C.isas().values())
    said = capsys.readouterr().out
    assert "FAILED  cpu scalar rms_norm: 3 ulp, limit 1" in said and "3 comparisons" in said


def test_self_check_holds_for_other_numbers():
    """A near-tie of what cast_before_weight rounds is no error of dweight."""
    for seed in range(20):
        for _, what, ulps, limit in command.checks("cpu", torch.Generator().manual_seed(seed)):
            assert ulps <= limit, (seed, what)


def test_report_of_a_driver_that_is_too_old(monkeypatch):
    """And of a machine that does not say what its processor is."""
    monkeypatch.setattr(_C, "cuda_built", lambda: True)
    monkeypatch.setattr(_C, "cuda_versions", lambda: (13020, 12090))
    monkeypatch.setattr(_C, "cuda_error", lambda code: f"error {code}")
    monkeypatch.setattr(machine, "text_of", lambda path: None)
    report = dict(command.describe())
    assert report["CUDA"] == "runtime 13.2, driver 12.9"
    assert report["CUDA driver"] == "ERROR: error 35"
    assert report["CPU"].startswith(platform.processor() or platform.machine())


@pytest.mark.skipif(_C.cuda_built(), reason="the CUDA kernels are there")
def test_what_is_said_without_cuda_kernels():
    assert _C.cuda_versions() == (0, 0) and _C.last_plan()["kernel"] == ""
    assert _C.cuda_error(1) == f"the CUDA kernels were not built: {_C.cuda_architectures()}"


STUBS = Path(__file__).parents[1] / ".ci" / "stubs.py"


@pytest.mark.skipif(not STUBS.exists(), reason="there are no sources")
def test_stubs_of_the_ops():
    """`python .ci/stubs.py` writes them anew; `make check` asks for those of the binding too."""
    written = "\n".join(runpy.run_path(str(STUBS))["ops_stubs"]()).rstrip("\n") + "\n"
    assert (Path(rmsnorm_cuda.__file__).parent / "ops.pyi").read_text() == written
    assert rmsnorm_cuda.ops.rms_norm is torch.ops.rmsnorm_cuda.rms_norm


@pytest.mark.slow
def test_public_api_is_typed(tmp_path):
    """mypy --strict accepts a program that uses all of it, and knows the types of the results."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("""if True:
        import torch
        import rmsnorm_cuda
        from rmsnorm_cuda import RMSNorm, config, monitor, monitoring, ops, replace_rms_norm

        x = torch.ones(2, 8)
        y: torch.Tensor = rmsnorm_cuda.rms_norm(x, 8, out=torch.empty(2, 8))
        pair: tuple[torch.Tensor, torch.Tensor]
        pair = rmsnorm_cuda.fused_add_rms_norm(x, x, weight_offset=1.0)
        rmsnorm_cuda.fused_add_rms_norm_(x, x)
        pair = rmsnorm_cuda.rms_norm_add_rms_norm(x, x, x[0], None, 1e-6, scale=0.5)
        rmsnorm_cuda.rms_norm_add_rms_norm_(x, x, x[0], None, 1e-6)
        y = rmsnorm_cuda.rms_norm_add(x, y, x[0], 1e-6, out=torch.empty(2, 8))
        y = rmsnorm_cuda.rms_norm_gated(x, x, activation="sigmoid", group_size=4)
        y = rmsnorm_cuda.RMSNormGated(8)(x, x)
        codes, scale, *_ = rmsnorm_cuda.rms_norm_quant(x, dtype=torch.int8)
        codes, scale, *_ = rmsnorm_cuda.rms_norm_gated_quant(x, x, dtype=torch.int8)
        heads, angles = torch.ones(2, 3, 4, 8), torch.ones(3, 4)
        rotated: tuple[torch.Tensor, torch.Tensor | None]
        rotated = rmsnorm_cuda.rms_norm_rope(heads, None, None, None, angles, angles, 1e-6)
        rmsnorm_cuda.rms_norm_rope_(heads, heads, x[0], None, angles, angles, sections=[2, 2])
        norm = RMSNorm(8, 1e-6, cast_before_weight=True)
        reveal_type(norm.weight_offset)

        class Mine(RMSNorm):  # with the signature of torch's
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 2

        def of_torch(norm: torch.nn.RMSNorm) -> torch.Tensor:
            return norm.forward(x) * 2

        of_torch(norm)
        normed, total = norm.forward(x, x)
        model = torch.nn.Sequential(norm)
        for swap in replace_rms_norm(model):
            name: str = swap.name
        with monitor(model, thresholds=monitoring.Thresholds(drift=None)) as m:
            alarms: list[monitoring.Alarm] = m.alarms
            values: dict[str, float] = m.log(lambda step, values: None, 3)
            monitoring.exporters.prometheus(m, model="mine")
            monitoring.exporters.opentelemetry(m, model="mine")
        out, rstd = ops.rms_norm_forward(x, [8])
        ops.rms_norm(x, [8], out=x)
        folder: str = rmsnorm_cuda.include_dir() + rmsnorm_cuda.torch_library_dir()
        folder = rmsnorm_cuda.library_dir() + rmsnorm_cuda.cmake_dir()
        table = rmsnorm_cuda.decompositions()
        config.decompose = True
        more = rmsnorm_cuda.fused_add_rms_norm_quant(x, x, dtype=torch.int8)
        sharded: torch.Tensor = rmsnorm_cuda.rms_norm_sharded(x, 16)
        with rmsnorm_cuda.patch_transformers("llama") as mapping:
            names = list(mapping)
        wrong: int = rmsnorm_cuda.rms_norm(x, 8)
    """)
    assert not {name for name in rmsnorm_cuda.__all__ if name not in program.read_text()}
    where = Path(rmsnorm_cuda.__file__).parents[1]
    environment = os.environ | ({} if where.name == "site-packages" else {"MYPYPATH": str(where)})
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(program)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    *said, last = run.stdout.strip().splitlines()
    assert len(said) == 2, run.stdout + run.stderr
    assert (
        re.search('Revealed type is "(builtins.)?float"', said[0])
        and "Incompatible types in assignment" in said[1]
    )
