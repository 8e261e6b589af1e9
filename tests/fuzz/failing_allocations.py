"""Calls of every op in which the first allocation fails, or the second, until none is left.

Run by test_faults.py with native/failing_malloc.cpp before libc. A call that raises has written
nothing; one that returns has the right bits, and so has the next.
"""

import ctypes
import sys

import hypothesis
import torch
from calls import calls
from test_fuzz import (
    FUNCTIONAL,
    WRITTEN,
    assert_same,
    named,
    namespace,
    run,
    with_derived,
    written_calls,
)

from rmsnorm_cuda import _C

ERRORS = "bad_alloc", "can't allocate memory"
fail_allocation = ctypes.CDLL(None).fail_allocation
fail_allocation.argtypes, fail_allocation.restype = [ctypes.c_int64], ctypes.c_int64
failures = 0


def each_failing(call, tensors, want):
    """`call` with each of its allocations failing. `tensors` are all that it is given; `want` are
    its results, or what of `tensors` it writes.
    """
    global failures
    before = {name: t.clone() for name, t in tensors.items()}
    n, none_failed = 0, False
    while not none_failed:
        n += 1
        got = error = None
        fail_allocation(n)
        try:
            got = call()
        except (RuntimeError, MemoryError) as raised:
            error = raised
        none_failed = fail_allocation(0) > 0
        torch.set_grad_enabled(True)  # torch's own engine leaves it off
        if error:
            failures += 1
            assert not none_failed and any(words in str(error) for words in ERRORS), error
            assert_same(tensors, before, f"allocation {n}, which failed,")
            got = call()
        assert_same(got or tensors, want, f"allocation {n}")
        for name, t in tensors.items():
            t.copy_(before[name])


def check(call):
    op = getattr(namespace, call.op).default
    arguments = with_derived(call, call.arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and 0 in value.stride():  # not to be written back to
            arguments[name] = value.clone()
    tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    results = run(op, arguments)
    each_failing(lambda: run(op, arguments), tensors, results)
    entry, values = getattr(_C, call.op, None), [arguments[a.name] for a in op._schema.arguments]
    if entry and entry(*values) is not None:
        each_failing(lambda: named(op, entry(*values)), tensors, results)
    for target, given, places in written_calls(call, arguments, results):
        written = {argument: given[argument] for argument in places}
        want = {argument: results[WRITTEN[argument]] for argument in places}
        each_failing(lambda t=target, a=given: t(**a), {**tensors, **written}, want)


def main(seed):
    torch.set_num_threads(1)
    for name in FUNCTIONAL:
        op = getattr(namespace, name).default

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=5, database=None, deadline=None)
        @hypothesis.given(calls(op))
        def lot(call):
            check(call)

        lot()
    print(failures)


if __name__ == "__main__":
    main(int(sys.argv[1]))
