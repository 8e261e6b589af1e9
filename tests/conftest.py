import json
import platform
import random
import re
from pathlib import Path

import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C

ISAS = [isa for isa, supported in _C.isas().items() if supported]  # test_invariance.py names all

# The tests' tensors are small, and beside another busy process a pool of threads waits for its
# slowest member: 20 times slower. test_invariance.py sets the number of threads itself.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        metavar="FILE",
        help="put what was tested into this JSON: test_pages.py makes the table of it",
    )
    parser.addoption("--fuzz-seconds", type=float, default=20, help="for tests/fuzz (default 20)")
    parser.addoption(
        "--fuzz-seed", type=int, help="of its first calls; by default another each time"
    )


def pytest_terminal_summary(terminalreporter, config):
    properties = [p for r in terminalreporter.getreports("passed") for p in r.user_properties]
    if calls := sum(value for name, value in properties if name == "fuzz"):
        terminalreporter.write_line(f"tests/fuzz: {calls} calls")
    file = config.getoption("--record")
    if not file:
        return
    counts = {
        name: len(terminalreporter.stats.get(name, []))
        for name in ("passed", "skipped", "failed", "error")
    }
    root = Path(__file__).parents[1]
    package = Path(rmsnorm_cuda.__file__).parent
    entry = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "installed": "from sources" if package.parent == root else "wheel",
        "CUDA kernels": _C.cuda_architectures() if _C.cuda_built() else "none",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "rmsnorm_cuda": rmsnorm_cuda.__version__,
        **counts,
    }
    key = ("python", "torch", "installed", "device")
    entries = json.loads(Path(file).read_text()) if Path(file).exists() else []
    entries = [e for e in entries if any(e[k] != entry[k] for k in key)] + [entry]
    entries.sort(
        key=lambda e: [[int(n) for n in re.findall(r"\d+", e[k])] for k in ("torch", "python")]
    )
    Path(file).write_text(json.dumps(entries, indent=1) + "\n")


@pytest.fixture
def fuzz_seconds(request):
    return request.config.getoption("--fuzz-seconds")


@pytest.fixture
def fuzz_seed(request):
    given = request.config.getoption("--fuzz-seed")
    return random.randrange(1 << 32) if given is None else given


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[*ISAS, pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """ "cpu", once for each instruction set of this machine, and "cuda"."""
    if request.param != "cuda":
        _C.set_isa(request.param)
        yield "cpu"
        _C.set_isa(None)
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _C.cuda_built():
        pytest.skip(f"no CUDA kernels: {_C.cuda_architectures()}")
    yield "cuda"


@pytest.fixture
def torch_kernels():
    """Skips the test, when it is called with "cuda", where torch's own CUDA kernels do not run (on
    a simulated GPU).
    """

    def check(device):
        if device != "cuda":
            return
        try:
            torch.zeros(1, device="cuda").item()
        except RuntimeError as error:
            pytest.skip(f"torch's own kernels do not run here: {str(error).splitlines()[0]}")

    return check


@pytest.fixture
def painted(request):
    """Fresh CPU tensors hold NaN: what a kernel forgets to write is seen. (On CUDA torch would need
    a fill kernel.)
    """
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("device") == "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
