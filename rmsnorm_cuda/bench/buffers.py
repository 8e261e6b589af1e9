"""Memory for what is timed."""

import os

import torch


def cache_bytes(level):
    """Of a CPU cache of this level; 0 where the system does not tell."""
    name = f"SC_LEVEL{level}_CACHE_SIZE"
    return max(os.sysconf(name), 0) if name in os.sysconf_names else 0


# Beyond what an L3 cache that others use too keeps for us: a large cell finds none of its data.
ROTATE_BYTES = 256 << 20


def rotation():
    """ROTATE_BYTES, or twice an L3 cache that is larger; at most a GiB, which any machine has."""
    return min(max(ROTATE_BYTES, 2 * cache_bytes(3)), 1 << 30)


class Pools:
    """Memory for the buffers of all cells, filled once."""

    def __init__(self, device="cpu"):
        self.memory, self.device = {}, device

    def tensors(self, name, shape, dtype, count):
        """`count` dense tensors, whole pages apart: none lies better in its page than others.

        Those of one name and dtype share the memory of earlier ones.
        """
        size = torch.Size(shape).numel()
        step = -(-size * dtype.itemsize // 4096) * 4096 // dtype.itemsize
        memory = self.memory.get((name, dtype))
        if memory is None or memory.numel() < count * step:
            some = torch.randn(1 << 20).to(dtype).to(self.device)
            self.memory.pop((name, dtype), None)
            memory = self.memory[name, dtype] = some.repeat(-(-count * step // len(some)))
        return [part.view(shape) for part in memory[: count * step].view(count, step)[:, :size]]
