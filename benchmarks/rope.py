"""q and k: norm and rotary embedding in one pass, beside the steps and the kernels of others.

    python benchmarks/rope.py [--threads 1,2] [--dtypes fp32,bf16] [--tokens 1,8,64,2048,8192]
                              [--heads 32,8] [--width 128] [--no-compile] [--vllm FILE]
                              [--sglang FILE] [--json FILE] [--md FILE] [--from FILE]

q and k are slices of a projection [tokens, heads of q, k and v, width]; weights [width]; angles of
all columns, in halves. "steps" are our norms and then transformers' apply_rotary_pos_emb in eager
mode; "compile" is torch.compile of the whole formula; "two norms" leaves the rotation out. A copy
of the same bytes is the floor. Calls of 1 MiB and more rotate over buffers of 256 MiB, as a model
finds them: out of the caches. All are verified against fp64 first, then timed interleaved in one
process; medians, in us. "training" is forward and backward, where the kernels of others have none.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.families import main, options_of
from benchmarks.peers import Absent, loaded
from rmsnorm_cuda import rms_norm, rms_norm_rope, rms_norm_rope_
from rmsnorm_cuda.bench.buffers import ROTATE_BYTES
from rmsnorm_cuda.bench.contenders import DTYPES, EPS, llama, norm_then_rotate
from rmsnorm_cuda.reference import rms_norm_rope_reference


class Cell:
    """Buffers of one size, and what runs on them."""

    def __init__(self, tokens, heads, width, dtype, weight_dtype):
        self.heads, self.width, self.dtype, self.tokens = heads, width, dtype, tokens
        # Of one size: others would leave one element of a row that is normed in place again.
        self.weights = [(torch.randint(2, (width,)) * 2 - 1).to(weight_dtype) for _ in heads]
        angle = torch.outer(torch.arange(tokens), 1e4 ** -torch.linspace(0, 1, width // 2))
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.columns = [torch.cat([t, t], -1) for t in (self.cos, self.sin)]
        self.cache, self.positions = torch.cat([self.cos, self.sin], -1), torch.arange(tokens)
        size = tokens * sum(heads) * width * dtype.itemsize
        self.bytes = 2 * size
        sets = 1 if size < 1 << 20 else max(2, ROTATE_BYTES // self.bytes)
        self.sets = [self.buffers() for _ in range(sets)]

    def buffers(self):
        q_heads, k_heads = self.heads
        shape = self.tokens, q_heads + 2 * k_heads, self.width
        q, k, _ = torch.randn(shape).to(self.dtype).split([q_heads, k_heads, k_heads], 1)
        # Rows that are normalized again and again stay as they are.
        dense = [t.contiguous() for t in (q, k)]
        out = [torch.empty_like(t) for t in dense]
        return SimpleNamespace(q=q, k=k, dense=dense, out=out)

    def norm(self, x, weight):
        return rms_norm(x, self.width, weight, EPS)

    def forward(self, compiled):
        w, v = self.weights
        cos, sin = self.columns
        cache = self.cache.chunk(2, -1)

        steps, formula = (norm_then_rotate(n, (w, v), cos, sin) for n in (self.norm, llama))
        runs = {
            "ours": lambda s: rms_norm_rope(s.q, s.k, w, v, self.cos, self.sin, EPS),
            "ours in place": lambda s: rms_norm_rope_(
                s.q, s.k, w, v, *cache, EPS, positions=self.positions
            ),
            "ours out=": lambda s: rms_norm_rope(
                s.q, s.k, w, v, self.cos, self.sin, EPS, out=tuple(s.out)
            ),
            "two norms": lambda s: [self.norm(s.q, w), self.norm(s.k, v)],
            "steps": lambda s: steps(s.q, s.k),
            "copy": lambda s: [a.copy_(b) for a, b in zip(s.out, (s.q, s.k))],
        }
        if compiled:
            torch._dynamo.reset()
            whole = torch.compile(formula, dynamic=False)
            runs["compile"] = lambda s: whole(s.q, s.k)
        return runs

    def training(self, compiled):
        parameters = [t.clone().requires_grad_() for t in self.weights]
        gradients = [torch.randn_like(t) for t in self.sets[0].dense]
        cos, sin = self.columns

        def step(function):
            def run(s):
                leaves = [t.detach().requires_grad_() for t in (s.q, s.k)]
                results = function(*leaves)
                return torch.autograd.grad(results, [*leaves, *parameters], gradients)

            return run

        def ours(q, k):
            return rms_norm_rope(q, k, *parameters, self.cos, self.sin, EPS)

        steps, formula = (norm_then_rotate(n, parameters, cos, sin) for n in (self.norm, llama))
        runs = {"ours": step(ours), "steps": step(steps)}
        if compiled:
            torch._dynamo.reset()
            runs["compile"] = step(torch.compile(formula, dynamic=False))
        return runs

    def verify(self, runs):
        """Beside fp64, in eps of the largest element: fp32 rounds a product and a sum, others each
        step."""
        for name, run in runs.items():
            if name in ("copy", "two norms"):
                continue
            s = self.buffers()
            want = [
                rms_norm_rope_reference(x, weight, self.cos, self.sin, EPS)
                for x, weight in zip((s.q, s.k), self.weights)
            ]
            got = run(s)
            got = got if got is not None else (s.q, s.k)
            for a, b in zip(got, want, strict=True):
                a = a.double().view_as(b)
                error = (a - b).abs().max() / b.abs().max() / torch.finfo(self.dtype).eps
                assert error <= (2 if name.startswith("ours") else 4), f"{name}: {error:.2f}"


# Each takes a cell and a file with kernels, and gives a run: norms of dense copies of q and k that
# are there already, to buffers of their own; and the rotation there, by positions.


def vllm(cell, file):
    ops = loaded("_C", file)
    norm, rotary = ops.rms_norm.default, ops.rotary_embedding.default

    def run(s):
        for y, x, weight in zip(s.out, s.dense, cell.weights):
            norm(y, x, weight, EPS)
        q, k = (t.view(cell.tokens, -1) for t in s.out)
        rotary(cell.positions, q, k, cell.width, cell.cache, True)
        return s.out

    return run


def sglang(cell, file):
    ops = loaded("sgl_kernel", file)
    if cell.dtype == torch.float32:
        raise Absent("no fp32")
    norm, rotary = ops.rmsnorm_cpu.default, ops.rotary_embedding_cpu.default

    def run(s):
        rows = [t.view(-1, cell.width) for t in s.dense]
        normed = [norm(x, weight, EPS) for x, weight in zip(rows, cell.weights)]
        q, k = (t.view(cell.tokens, -1) for t in normed)
        return rotary(cell.positions, q, k, cell.width, cell.cache, True)

    return run


PEERS = {"vLLM": vllm, "SGLang": sglang}


def runs_of_peers(cell, files, report):
    runs = {}
    for name, peer in PEERS.items():
        try:
            runs[name] = peer(cell, files[name])
        except Absent as reason:
            report(name, str(reason))
    return runs


def parser():
    parser = options_of(__doc__)
    parser.add_argument("--tokens", default="1,8,64,2048,8192")
    parser.add_argument("--heads", default="32,8")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vllm", metavar="FILE", help="vLLM's kernels for the CPU")
    parser.add_argument("--sglang", metavar="FILE", help="SGLang's")
    return parser


def cells(args):
    """({what is told of a cell}, the cell, runs of each mode)."""
    absent, files = {}, {"vLLM": args.vllm, "SGLang": args.sglang}
    heads = [int(n) for n in args.heads.split(",")]
    for dtype in args.dtypes.split(","):
        for tokens in map(int, args.tokens.split(",")):
            cell = Cell(tokens, heads, args.width, *DTYPES[dtype])
            peers = runs_of_peers(cell, files, absent.setdefault)
            yield {"dtype": dtype, "tokens": tokens}, cell, peers
    for name, reason in absent.items():
        print(f"without {name}: {reason}")


if __name__ == "__main__":
    main(parser(), cells)
