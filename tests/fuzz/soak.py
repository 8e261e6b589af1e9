"""`make soak`: every op from four threads at once for an hour. Bits stay right, memory stays flat.

    python tests/fuzz/soak.py [--minutes 60] [--seed 0]

Each thread repeats calls of its own, which tests/fuzz makes: new results, out=, in place, autograd.
The first tenth of the time is for caches to fill. From then on what malloc has given away may not
grow by 1 MB. (Resident memory, which is shown, goes up and down with what malloc keeps.)
"""

import argparse
import ctypes
import gc
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for cases.py

from calls import calls  # noqa: E402
from test_fuzz import (  # noqa: E402
    FUNCTIONAL,
    VECTOR_ISAS,
    assert_same,  # noqa: E402
    check_autograd,
    check_written,
    namespace,
    run,
    with_derived,
)

from rmsnorm_cuda import _C  # noqa: E402

THREADS, CALLS, BOUND = 4, 12, 1_000_000


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def memory():
    """(bytes that malloc has given away, bytes that are resident), while no thread calls."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return info.uordblks + info.hblkhd, resident


def made(op, seed):
    """Calls of an op, with what they give."""
    found = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=CALLS,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls(op))
    def collect(call):
        arguments = with_derived(call, call.arguments)
        found.append((call, op, arguments, run(op, arguments)))

    collect()
    return found


def repeat(examples, generator, until):
    """Calls until then; how many."""
    count = 0
    while time.monotonic() < until:
        call, op, arguments, results = generator.choice(examples)
        assert_same(run(op, arguments), results, "another thread")
        check = generator.choices([check_written, check_autograd], [20, 1])[0]
        check(call, op, arguments, results)
        count += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    examples = [
        [example for name in FUNCTIONAL for example in made(getattr(namespace, name).default, seed)]
        for seed in range(args.seed, args.seed + THREADS)
    ]
    generators = [random.Random(args.seed + i) for i in range(THREADS)]
    rounds, calls_made, seen = 20, 0, []
    print("minutes  calls  malloc_MB  resident_MB")
    start = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for i in range(1, rounds + 1):
            until = start + 60 * args.minutes * i / rounds
            work = [pool.submit(repeat, *w, until) for w in zip(examples, generators)]
            while not all(w.done() for w in work):  # the instruction set changes meanwhile
                _C.set_isa(random.choice([None, *VECTOR_ISAS]))
                time.sleep(0.01)
            calls_made += sum(w.result() for w in work)
            seen.append(memory())
            megabytes = "  ".join(f"{n / 1e6:.2f}" for n in seen[-1])
            print(f"{(time.monotonic() - start) / 60:.1f}  {calls_made}  {megabytes}", flush=True)
    allocated = [allocated for allocated, _ in seen[rounds // 10 :]]
    growth = max(allocated) - allocated[0]
    print(f"{calls_made} calls; malloc's memory grew by {growth / 1e6:.2f} MB after a tenth")
    sys.exit(growth > BOUND)


if __name__ == "__main__":
    main()
