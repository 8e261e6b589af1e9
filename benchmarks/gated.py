"""The norm and a gate in one pass, beside the formula of transformers, eager and compiled.

    python benchmarks/gated.py [--threads 1,2] [--dtypes fp32,bf16] [--tokens 1,8,64,512,2048]
                               [--families qwen3-next,mamba2,nemotron-h] [--no-compile]
                               [--modes forward,training,quantized]
                               [--json FILE] [--md FILE] [--from FILE]

The gate is a slice of a projection. "eager" and "compile" are the formula of the family's class in
transformers; a copy of x is the floor. Calls of 1 MiB and more rotate over buffers of 256 MiB, as a
model finds them: out of the caches. All are verified against fp64 first, then timed interleaved in
one process; medians, in us. "training" is forward and backward. "quantized" has codes in e4m3 with
a scale for each row, as a matrix product behind it takes them.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import silu

from benchmarks.families import main, options_of
from rmsnorm_cuda import rms_norm_gated, rms_norm_gated_quant
from rmsnorm_cuda.bench.buffers import ROTATE_BYTES
from rmsnorm_cuda.bench.contenders import DTYPES, EPS, llama, quantize
from rmsnorm_cuda.reference import rms_norm_gated_reference

MAMBA = {"norm_before_gate": False, "cast_before_weight": True}
# Rows of a token, their columns, and the options.
FAMILIES = {
    "qwen3-next": (32, 128, {"cast_before_weight": True}),
    "mamba2": (1, 5120, MAMBA),
    "nemotron-h": (1, 8192, MAMBA | {"group_size": 1024}),
}


def formula(x, gate, weight, options):
    """As the classes of transformers compute."""
    if "norm_before_gate" not in options:
        return (llama(x, weight) * silu(gate.float())).to(x.dtype)
    h = x.float() * silu(gate.float())
    groups = h.unflatten(-1, (-1, options.get("group_size", h.shape[-1])))
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * groups.flatten(-2).to(x.dtype)


class Cell:
    """Buffers of one size, and what runs on them."""

    def __init__(self, family, tokens, dtype, weight_dtype):
        rows, self.cols, self.options = FAMILIES[family]
        self.shape, self.dtype = (tokens, rows, self.cols), dtype
        self.weight = (torch.rand(self.cols) + 0.5).to(weight_dtype)
        # Of a gate that comes first the result is promoted.
        is_first = "norm_before_gate" in self.options
        self.result = torch.promote_types(dtype, weight_dtype) if is_first else dtype
        size = tokens * rows * self.cols * dtype.itemsize
        sets = 1 if size < 1 << 20 else max(2, ROTATE_BYTES // (3 * size))
        self.sets = [self.buffers() for _ in range(sets)]

    def buffers(self):
        both = torch.randn(*self.shape[:-1], 2 * self.cols).to(self.dtype)
        x = torch.randn(self.shape).to(self.dtype)
        gate, out = both[..., self.cols :], torch.empty(self.shape, dtype=self.result)
        return SimpleNamespace(x=x, gate=gate, out=out)

    def formula(self, compiled, then=lambda y: y):
        def eager(x, gate, weight):
            return then(formula(x, gate, weight, self.options))

        if not compiled:
            return {"eager": eager}
        torch._dynamo.reset()
        return {"eager": eager, "compile": torch.compile(eager, dynamic=False)}

    def forward(self, compiled):
        weight, options = self.weight, self.options
        runs = {
            "ours": lambda s: rms_norm_gated(s.x, s.gate, weight, EPS, **options),
            "ours out=": lambda s: rms_norm_gated(s.x, s.gate, weight, EPS, **options, out=s.out),
        }
        for name, function in self.formula(compiled).items():
            runs[name] = lambda s, function=function: function(s.x, s.gate, weight)
        return runs | {"copy": lambda s: s.out.copy_(s.x)}

    def quantized(self, compiled):
        weight, options = self.weight, self.options
        e4m3 = {"dtype": torch.float8_e4m3fn}
        runs = {
            "ours": lambda s: rms_norm_gated_quant(s.x, s.gate, weight, EPS, **e4m3, **options),
            "ours, then torch": lambda s: quantize(
                rms_norm_gated(s.x, s.gate, weight, EPS, **options)
            ),
        }
        s = self.sets[0]
        codes, others = (run(s)[0].view(torch.uint8) for run in runs.values())
        assert torch.equal(codes, others), "the codes are not those of the steps"
        for name, function in self.formula(compiled, quantize).items():
            runs[name] = lambda s, function=function: function(s.x, s.gate, weight)
        return runs

    def training(self, compiled):
        weight, dy = self.weight.clone().requires_grad_(), torch.randn(self.shape).to(self.result)

        def step(function):
            def run(s):
                leaves = [t.detach().requires_grad_() for t in (s.x, s.gate)]
                return torch.autograd.grad(function(*leaves, weight), [*leaves, weight], dy)

            return run

        def ours(x, gate, weight):
            return rms_norm_gated(x, gate, weight, EPS, **self.options)

        functions = {"ours": ours} | self.formula(compiled)
        return {name: step(function) for name, function in functions.items()}

    def verify(self, runs):
        """Beside fp64, in eps of the largest element: one ahead of the weight may be a tie."""
        for name, run in runs.items():
            if name == "copy":
                continue
            s = self.buffers()
            want = rms_norm_gated_reference(s.x, s.gate, self.weight, EPS, **self.options)
            error = (run(s).double() - want.double()).abs().max() / want.double().abs().max()
            assert error <= 2 * torch.finfo(self.dtype).eps, f"{name}: {error}"


def parser():
    parser = options_of(__doc__)
    parser.add_argument("--tokens", default="1,8,64,512,2048")
    parser.add_argument("--families", default=",".join(FAMILIES))
    return parser


def cells(args):
    for dtype in args.dtypes.split(","):
        for family in args.families.split(","):
            for tokens in map(int, args.tokens.split(",")):
                where = {"family": family, "tokens": tokens, "dtype": dtype}
                yield where, Cell(family, tokens, *DTYPES[dtype]), {}


if __name__ == "__main__":
    main(parser(), cells)
