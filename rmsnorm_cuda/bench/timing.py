"""The loops: contenders interleaved in one process, on the CPU's clock or by CUDA events."""

import gc
import math
import random
import time

import torch

OWN_THREADS = "onnxruntime"  # has a pool of threads beside torch's


def samples(contenders, inputs, seconds, *, deadline=math.inf, clock=time.perf_counter):
    """Microseconds a call of each contender, many of them, interleaved in batches of about 200 us.

    Every round has an order of its own: who follows a contender of the same kind finds its code in
    the caches. There are five rounds at least; one where `deadline`, a reading of `clock`, is over.
    """
    batch = {}
    for name, run in contenders.items():
        run(inputs[0])
        start = clock()
        run(inputs[-1])
        batch[name] = max(1, int(200e-6 / max(clock() - start, 1e-9)))
    times = {name: [] for name in contenders}
    turn, order, shuffled, own_threads = 0, list(contenders), random.Random(0), False
    rounds, end = 0, clock() + seconds * len(contenders)
    gc.disable()
    try:
        while rounds < 1 or ((clock() < end or rounds < 5) and clock() < deadline):
            rounds += 1
            shuffled.shuffle(order)
            for name in order:
                run = contenders[name]
                if name.startswith(OWN_THREADS) != own_threads:
                    # Idle threads turn round for a while, on the cores of those timed next.
                    own_threads = not own_threads
                    time.sleep(0.02)
                    run(inputs[turn % len(inputs)])
                start = clock()
                for i in range(batch[name]):
                    run(inputs[(turn + i) % len(inputs)])
                times[name].append((clock() - start) / batch[name] * 1e6)
                turn += 1
    finally:
        gc.enable()
    return times


def flush_of(device):
    """A function that leaves a cold L2 cache: a copy larger than it, which runs on the GPU while
    the host queues what is timed next."""
    properties = torch.cuda.get_device_properties(device)
    big = torch.empty(2 * max(properties.L2_cache_size, 64 << 20), dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    return lambda: other.copy_(big)


def event_samples(
    contenders, x, flush, calls, *, deadline=math.inf, cuda=torch.cuda, clock=time.perf_counter
):
    """Microseconds of each call of each contender, interleaved: of the GPU, and of the host.

    `flush` runs ahead of each call. At most `calls` rounds; one where `deadline`, a reading of
    `clock`, is over. Each contender has run before: nothing is compiled here.
    """
    times = {name: [] for name in contenders}
    host = {name: [] for name in contenders}
    cuda.synchronize()
    for i in range(calls):
        if i and clock() >= deadline:
            break
        events = {name: [cuda.Event(enable_timing=True) for _ in range(2)] for name in contenders}
        for name, (start, end) in events.items():
            flush()
            start.record()
            began = clock()
            contenders[name](x)
            host[name].append((clock() - began) * 1e6)
            end.record()
        cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3)
    return times, host
