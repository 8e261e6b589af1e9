"""The cells of `bench`: an op of one shape and dtype, its contenders, how fp64 judges them."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

import rmsnorm_cuda
from rmsnorm_cuda.bench.buffers import rotation
from rmsnorm_cuda.bench.contenders import (
    DTYPES,
    EPS,
    FORMULAS,
    MOST_ULP,
    PASSES,
    add_then_norm,
    compiled_of,
    norm_then_rotate,
    quantize,
    training_step,
)
from rmsnorm_cuda.reference import (
    rms_norm_backward_reference,
    rms_norm_reference,
    rms_norm_rope_reference,
    ulp_distance,
)

COMPILED = "compile(F.rms_norm)"
SMALL_BYTES = 1 << 20  # below, a model finds the tensor in a cache: one set of buffers
JUDGED_ROWS = 64


class Wrong(Exception):
    """A contender whose result is too far from fp64."""


class Spec(NamedTuple):
    """Which cell: `cols` columns, or the heads of q and of k with `cols` columns each."""

    mode: str
    dtype: str
    rows: int
    cols: int
    heads: tuple = ()

    @property
    def shape(self):
        cols = f"({'+'.join(map(str, self.heads))})x{self.cols}" if self.heads else self.cols
        return f"{self.rows}x{cols}"

    def __str__(self):
        return f"{self.mode} {self.dtype} {self.shape}"


class Cell:
    """Buffers of one spec, and what runs on a set of them.

    A class has `passes`, how often the bytes of x have to move; `ours`, {name: run of a set};
    `steps`, what a formula makes of the tensors that `inputs` takes of a set; and `judge`.
    """

    passes: float
    buffers = inputs = ("x",)

    def __init__(self, spec, pools):
        self.spec, self.pools = spec, pools
        self.dtype, weight_dtype = DTYPES[spec.dtype]
        size = spec.rows * spec.cols * (sum(spec.heads) or 1)
        one = size * self.dtype.itemsize
        self.bytes = int(self.passes * one)
        # A flushed GPU needs no rotation.
        on_cpu = torch.device(pools.device).type == "cpu"
        self.is_cold = not on_cpu or one >= SMALL_BYTES
        # Each op moves x twice at least.
        self.count = max(2, -(-rotation() // (2 * one))) if on_cpu and self.is_cold else 1
        # In place a sum grows by its norm with each call: a small weight keeps it in fp16's range,
        # an even one its direction.
        weight = (1 + torch.randn(spec.cols) / 64) / 64
        self.weight = weight.to(weight_dtype).to(pools.device)
        self.sets = [
            SimpleNamespace(**dict(zip(self.buffers, tensors, strict=True)))
            for tensors in zip(*map(self.tensors, self.buffers), strict=True)
        ]
        half = max(1, self.bytes // 4)  # elements of 16 bits, read and then written
        pairs = min(self.count, max(2, -(-rotation() // self.bytes)))
        for name in ("source", "target"):
            tensors = pools.tensors(name, (half,), torch.bfloat16, pairs)
            for i, s in enumerate(self.sets):
                setattr(s, name, tensors[i % pairs])

    def tensors(self, name):
        return self.pools.tensors(name, (self.spec.rows, self.spec.cols), self.dtype, self.count)

    def run_of(self, function):
        names = self.inputs
        if names == ("x",):
            return lambda s: function(s.x)
        first, second = names
        return lambda s: function(getattr(s, first), getattr(s, second))

    def beside(self):
        """Eager torch, and the copy."""
        runs = {name: self.run_of(self.steps(formula)) for name, formula in FORMULAS.items()}
        return runs | {"copy": lambda s: s.target.copy_(s.source)}

    def compiled(self):
        return self.run_of(compiled_of(self.steps, ["F.rms_norm"])[COMPILED])

    def verify(self, name, run):
        """Runs a contender once, and holds the first rows of what it makes beside fp64.

        Raises:
            Wrong: a result is further off than rounding takes it.
        """
        s = self.sets[0]
        given = {field: getattr(s, field)[:JUDGED_ROWS].cpu().clone() for field in self.buffers}
        made = run(s)
        if name != "copy":
            if made is None:  # in place
                made = s.out, s.total
            made = made if isinstance(made, (tuple, list)) else (made,)
            self.judge(name, SimpleNamespace(**given), [t.cpu() for t in made])

    def limit(self, name):
        return MOST_ULP["ours" if name.startswith("ours") else self.dtype]

    def judge_norm(self, name, x, y):
        want = rms_norm_reference(x, self.weight.shape, self.weight.cpu(), EPS)
        expect(name, "ulp", ulp_distance(y[:JUDGED_ROWS], want).max().item(), self.limit(name))


def expect(name, unit, error, limit):
    if not error <= limit:
        raise Wrong(f"{name} is {error:.3g} {unit} from fp64, where {limit:g} is the limit")


def off(got, want):
    """The largest error, in eps of the largest value."""
    error = (got.double() - want.double()).abs().amax() / want.double().abs().amax()
    return (error / torch.finfo(got.dtype).eps).item()


class Forward(Cell):
    passes = PASSES["forward"]

    def ours(self):
        cols, weight = self.weight.shape, self.weight
        return {"ours": lambda s: rmsnorm_cuda.rms_norm(s.x, cols, weight, EPS)}

    def steps(self, formula):
        weight = self.weight
        return lambda x: formula(x, weight)

    def judge(self, name, s, made):
        self.judge_norm(name, s.x, made[0])


class Training(Forward):
    """Forward and backward; `other` is dy."""

    passes = PASSES["training"]
    buffers = ("x", "other")

    def __init__(self, spec, pools):
        super().__init__(spec, pools)
        self.weight.requires_grad_()
        self.gradients = {id(s.x): s.other for s in self.sets}

    def run_of(self, function):
        step = training_step(function, [self.weight], self.gradients)
        return lambda s: step(s.x)

    def ours(self):
        cols, weight = self.weight.shape, self.weight
        return {"ours": self.run_of(lambda x: rmsnorm_cuda.rms_norm(x, cols, weight, EPS))}

    def judge(self, name, s, made):
        """dx of some rows, and dweight of all where that is cheap.

        As in the self-check 4 eps of the largest for ours. Others round in between, in 16 bits
        several times, and sum dweight in x's dtype: a part of the largest then.
        """
        ours = name.startswith("ours")
        weight = self.weight.detach().cpu()
        wants = rms_norm_backward_reference(s.other, s.x, weight.shape, weight, EPS)
        eps = torch.finfo(self.dtype).eps
        limit = 4 if ours else (1e-5 / eps if self.dtype == torch.float32 else 4)
        expect(f"{name}, dx", "eps", off(made[0][:JUDGED_ROWS], wants[0]), limit)
        if self.spec.rows <= JUDGED_ROWS:
            limit = 4 if ours else 0.1 / eps
            expect(f"{name}, dweight", "eps", off(made[1], wants[1]), limit)


class FusedAdd(Cell):
    """`other` is the residual; in place on `out` and `total`."""

    passes = PASSES["fused"]
    inputs = ("x", "other")
    buffers = ("x", "other", "out", "total")

    def ours(self):
        weight = self.weight
        new, in_place = rmsnorm_cuda.fused_add_rms_norm, rmsnorm_cuda.fused_add_rms_norm_
        return {
            "ours": lambda s: new(s.x, s.other, weight, EPS),
            "ours in place": lambda s: in_place(s.out, s.total, weight, EPS),
        }

    def steps(self, formula):
        return add_then_norm(formula, self.weight)

    def judge(self, name, s, made):
        x, residual = (s.out, s.total) if name == "ours in place" else (s.x, s.other)
        total = x + residual
        self.judge_norm(name, total, made[0])
        worst = ulp_distance(made[1][:JUDGED_ROWS], total).max().item()
        expect(f"{name}, the sum", "ulp", worst, 0 if name.startswith("ours") else 1)


class Quantized(Cell):
    """Codes in e4m3 with a scale for each token."""

    def __init__(self, spec, pools):
        self.passes = 1 + 1 / DTYPES[spec.dtype][0].itemsize
        super().__init__(spec, pools)

    def ours(self):
        weight, e4m3 = self.weight, torch.float8_e4m3fn
        return {"ours": lambda s: rmsnorm_cuda.rms_norm_quant(s.x, weight, EPS, dtype=e4m3)}

    def steps(self, formula):
        weight = self.weight
        return lambda x: quantize(formula(x, weight))

    def judge(self, name, s, made):
        """Half a step of e4m3, which has three bits behind the first, and of its smallest numbers;
        and what the norm may be off, which the scale is too."""
        y = rms_norm_reference(s.x.double(), self.weight.shape, self.weight.cpu().double(), EPS)
        codes, scale = (t[:JUDGED_ROWS].double() for t in made)
        slack = 2 * self.limit(name) * torch.finfo(self.dtype).eps
        allowed = y.abs() * (2**-4 + slack) + scale * 2**-10 * (1 + slack)
        error = ((codes * scale - y).abs() / allowed).max().item()
        expect(name, "half steps of e4m3", error, 1)


class Rope(Cell):
    """q and k as slices of a projection; cos and sin of the dtype of x, as in transformers."""

    passes = 2
    inputs = buffers = ("q", "k")

    def __init__(self, spec, pools):
        angle = torch.outer(torch.arange(spec.rows), 1e4 ** -torch.linspace(0, 1, spec.cols // 2))
        dtype = DTYPES[spec.dtype][0]
        self.cos, self.sin = (t.to(dtype).to(pools.device) for t in (angle.cos(), angle.sin()))
        super().__init__(spec, pools)

    def tensors(self, name):
        q, k = self.spec.heads
        shape = self.spec.rows, q + 2 * k, self.spec.cols  # beside v
        whole = self.pools.tensors("projection", shape, self.dtype, self.count)
        return [t[:, :q] if name == "q" else t[:, q : q + k] for t in whole]

    def ours(self):
        weight, cos, sin = self.weight, self.cos, self.sin
        run = rmsnorm_cuda.rms_norm_rope
        return {"ours": lambda s: run(s.q, s.k, weight, weight, cos, sin, EPS)}

    def steps(self, formula):
        columns = (torch.cat([t, t], -1) for t in (self.cos, self.sin))
        return norm_then_rotate(formula, (self.weight, self.weight), *columns)

    def judge(self, name, s, made):
        """In eps of the largest: fp32 rounds a product and a sum, others each step."""
        cos, sin = (t[:JUDGED_ROWS].cpu() for t in (self.cos, self.sin))
        for x, got in zip((s.q, s.k), made, strict=True):
            want = rms_norm_rope_reference(x, self.weight.cpu(), cos, sin, EPS)
            limit = 2 if name.startswith("ours") else 4
            expect(name, "eps", off(got[:JUDGED_ROWS], want), limit)


MODES = {
    "forward": Forward,
    "training": Training,
    "fused": FusedAdd,
    "quantized": Quantized,
    "rope": Rope,
}
TITLES = {
    "forward": "norm",
    "training": "norm, forward + backward",
    "fused": "fused add: norm of x + residual, and the sum",
    "quantized": "norm in fp8 (e4m3), a scale for each token",
    "rope": "norm of q and k, and their rotary embedding",
}


def specs(tokens=(1, 64, 2048), cols=4096, heads=(32, 8), width=128):
    """Those of a run, what tells most first: decode, prefill, a small batch; then fp32 where that
    takes little time."""
    made = []
    for rows in sorted(tokens, key=lambda n: (n != min(tokens), -n)):
        for mode in MODES:
            shape = (width, heads) if mode == "rope" else (cols, ())
            made.append(Spec(mode, "bf16", rows, *shape))
    for rows in sorted(tokens)[:2]:
        made += [Spec(mode, "fp32", rows, cols) for mode in ("forward", "training", "fused")]
    return made
