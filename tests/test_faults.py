"""What goes wrong around a call: no memory, forks, signals, memory of every origin. The result is
right or a clear error, nothing is written by a call that fails, and the next call works.
"""

import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda import fused_add_rms_norm, rms_norm

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")
def test_every_allocation_fails_once(tmp_path):
    """See fuzz/failing_allocations.py."""
    library = tmp_path / "failing_malloc.so"
    options = ["-shared", "-fPIC", "-O1", "-o", library]
    subprocess.run(["g++", TESTS / "native" / "failing_malloc.cpp", *options], check=True)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path}
    command = [sys.executable, TESTS / "fuzz" / "failing_allocations.py", "0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert int(run.stdout) > 300  # allocations that failed


def test_limit_of_memory():
    """Results that do not fit are refused by torch's allocator; what was given stays."""
    run = programs.run("""if True:
        import resource, torch, rmsnorm_cuda
        x = torch.randn(2304, 4096)  # 36 MiB, which malloc maps afresh each time
        r, w = torch.randn_like(x), torch.randn(4096)
        calls = [
            lambda: rmsnorm_cuda.rms_norm(x, 4096, w),
            lambda: rmsnorm_cuda.rms_norm(x.t().contiguous().t(), 4096, w),
            lambda: rmsnorm_cuda.fused_add_rms_norm(x, r, w),
            lambda: rmsnorm_cuda.rms_norm_quant(x, w, dtype=torch.int8),
        ]
        want = [call() for call in calls]
        before = x.clone(), r.clone()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        refused = 0
        for megabytes in (1, 30, 40, 76, 120):
            for call, results in zip(calls, want):
                pages = int(open("/proc/self/statm").read().split()[0])
                size = pages * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20), limits[1]))
                try:
                    got = call()
                except (RuntimeError, MemoryError) as error:
                    assert "can't allocate memory" in str(error) or "bad_alloc" in str(error)
                    got, refused = None, refused + 1
                resource.setrlimit(resource.RLIMIT_AS, limits)
                got = call() if got is None else got
                torch.testing.assert_close(got, results, rtol=0, atol=0)
                del got
        assert torch.equal(x, before[0]) and torch.equal(r, before[1])
        print(refused)
    """)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 4


# torch's own kernels cannot run in two threads in a child whose parent did so; these are ours.
FORK = """if True:
    import os, signal, threading, torch, rmsnorm_cuda
    torch.set_num_threads(2)
    x, w = torch.randn(2048, 1024), torch.randn(1024)
    leaf, weight = x.detach().requires_grad_(), w.detach().requires_grad_()

    def work():
        y, total = rmsnorm_cuda.fused_add_rms_norm(leaf, x, weight)
        grads = torch.autograd.grad([y], [leaf, weight], [x])
        quant = rmsnorm_cuda.rms_norm_quant(x, w, dtype=torch.int8)
        return [t.detach().numpy().tobytes() for t in (y, total, *grads, *quant) if t is not None]

    def in_child(function):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            status = 1
            try:
                status = int(not function())
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1]

    def in_thread(function):
        results = []
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        thread.join()
        return results[0]

    def send(write):  # the bytes of the results, to compare where they are known
        os.write(write, __import__("hashlib").sha256(b"".join(work())).digest())
        return True
"""


def fork(code):
    run = programs.run(FORK + code, timeout=120)
    assert run.returncode == 0, run.stderr


def test_fork_before_use():
    fork("""
    read, write = os.pipe()
    assert in_child(lambda: send(write)) == 0
    send(write)
    assert os.read(read, 32) == os.read(read, 32)
    """)


def test_fork_after_use():
    """The child runs in one thread: those of OpenMP stay in the parent."""
    fork("""
    want = work()
    right = lambda: work() == want
    assert in_child(right) == 0
    assert in_child(lambda: in_child(right) == 0) == 0
    assert in_child(lambda: in_thread(right) and right()) == 0
    assert in_thread(lambda: in_child(right)) == 0
    assert in_thread(lambda: right() and in_child(right) == 0)
    assert right()
    """)


def test_fork_while_threads_call():
    fork("""
    want, done = work(), threading.Event()
    def call():
        while not done.is_set():
            assert work() == want
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    statuses = [in_child(lambda: work() == want) for _ in range(10)]
    done.set()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 10, statuses
    """)


class Interruption(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_signals(raises):
    """A handler that calls the ops itself, every millisecond, and one that raises."""
    x, r, w = torch.randn(64, 1000), torch.randn(64, 1000), torch.randn(1000)
    want = fused_add_rms_norm(x, r, w)
    seen, may_raise = [], False

    def handle(number, frame):
        nonlocal may_raise
        seen.append(all(map(torch.equal, fused_add_rms_norm(x, r, w), want)))
        if may_raise:
            may_raise = False
            raise Interruption

    before, interrupted = signal.signal(signal.SIGALRM, handle), 0
    out = torch.empty(64, 1000), torch.empty(64, 1000)
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        while len(seen) < 100:
            try:
                may_raise = raises
                got = fused_add_rms_norm(x, r, w, out=out)
                assert all(map(torch.equal, got, want))
                may_raise = False
            except Interruption:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(seen) and (interrupted > 0) == raises
    assert all(map(torch.equal, fused_add_rms_norm(x, r, w, out=out), want))


def test_mapped_files(tmp_path):
    """As safetensors and numpy.memmap give them: read-only, private, shared."""
    x, w = torch.randn(33, 1000), torch.randn(1000)
    want = rms_norm(x, 1000, w)
    file = tmp_path / "x"
    file.write_bytes(x.numpy().tobytes())
    with open(file, "rb") as opened:
        readable = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with pytest.warns(UserWarning, match="not writable"):
        inputs = torch.frombuffer(readable, dtype=torch.float32).view(33, 1000)
    assert torch.equal(rms_norm(inputs, 1000, w), want)
    private = torch.from_file(str(file), False, x.numel()).view(33, 1000)
    assert torch.equal(rms_norm(private, 1000, w, out=private), want)
    assert file.read_bytes() == x.numpy().tobytes()
    shared = torch.from_file(str(file), True, x.numel()).view(33, 1000)
    rms_norm(shared, 1000, w, out=shared)
    assert file.read_bytes() == want.numpy().tobytes()


def test_read_only_memory_as_out():
    """torch does not know that memory is read-only. Its own `out=` ends the process, and so does
    ours; nothing is written. Only a system call in every call could tell.
    """
    code = """if True:
        import mmap, sys, warnings, torch, rmsnorm_cuda
        warnings.simplefilter("ignore")
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
        out, x = torch.frombuffer(memory, dtype=torch.float32), torch.ones(1024)
        if sys.argv[1] == "ours":
            rmsnorm_cuda.rms_norm(x, 1024, out=out)
        else:
            torch.add(x, x, out=out)
    """
    statuses = [programs.run(code, arguments=[whose]).returncode for whose in ("ours", "torch")]
    assert statuses == [-signal.SIGSEGV] * 2


def test_lazy_clones_are_not_written_through():
    """Of a copy-on-write clone, what it was cloned from stays (all ops: tests/fuzz)."""
    x, r, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    want, total = fused_add_rms_norm(x, r, w)
    before = x.clone(), r.clone()
    lazy = torch._lazy_clone(x), torch._lazy_clone(r)
    rmsnorm_cuda.fused_add_rms_norm_(*lazy, w)
    assert torch.equal(lazy[0], want) and torch.equal(lazy[1], total)
    assert torch.equal(x, before[0]) and torch.equal(r, before[1])
