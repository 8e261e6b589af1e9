"""What is timed beside ours: torch's norms and the formula of Llama's class, eager and compiled.

Steps that several ops share take a formula, `norm(x, weight)`, and make of it what a user without
ours would write.
"""

import functools

import torch
import torch.nn.functional as F

import rmsnorm_cuda

DTYPES = {  # of x and of weight
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}
EPS = 1e-6
# How often the bytes of x (of 16 bits) have to move at least. forward: x read and y written;
# training: x, dy and x again read, y and dx written; fused: x and the residual read and both
# results written; quantized: x read and as many bytes as elements written.
PASSES = {"forward": 2, "training": 5, "fused": 4, "quantized": 1.5}
# Ours is within 1 ulp of fp64. Others sum squares in fp32, one after the other, and in 16 bits take
# the squares of a sum before it is rounded, round once more, or cut off.
MOST_ULP = {"ours": 1, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


def llama(x, weight):
    """The formula of the Llama family in transformers: the rounding order of cast_before_weight."""
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * hidden.to(x.dtype)


FORMULAS = {
    "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    "llama": llama,
}


def add_then_norm(norm, weight):
    """Of x and residual: the norm of their sum, and the sum."""

    def add_then_norm(x, residual):
        total = x + residual
        return norm(total, weight), total

    return add_then_norm


def quantize(norm, dtype=torch.float8_e4m3fn, most=448.0):
    """The codes and the per-token scales of a norm, step by step."""
    y = norm.float()
    scale = (y.abs().amax(-1, keepdim=True) / most).clamp(min=1 / (512 * most))
    return (y / scale).clamp(-most, most).to(dtype), scale


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotated(x, cos, sin):
    """As transformers does, of cos and sin of all columns; heads behind the tokens."""
    return x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)


def norm_then_rotate(norm, weights, cos, sin):
    """Of q and k: both, each head normed and then rotated; cos and sin of all columns."""
    return lambda q, k: [
        rotated(norm(x, weight), cos, sin) for x, weight in zip((q, k), weights, strict=True)
    ]


def compiled_of(steps, names):
    """{name: steps(formula) under torch.compile}, of FORMULAS of these names."""
    if names:
        torch._dynamo.reset()
    return {
        f"compile({name})": torch.compile(steps(FORMULAS[name]), dynamic=False) for name in names
    }


def norms(cols, weight, bias, compiled):
    """Name: (a norm of x, its parameters). compiled: those of FORMULAS under torch.compile too."""
    result = {
        "ours": (lambda x: rmsnorm_cuda.rms_norm(x, cols, weight, EPS), [weight]),
        "F.rms_norm": (lambda x: F.rms_norm(x, cols, weight, EPS), [weight]),
        "F.layer_norm": (lambda x: F.layer_norm(x, cols, weight, bias, EPS), [weight, bias]),
    }
    for name, formula in compiled_of(lambda norm: norm, compiled).items():
        result[name] = (lambda x, formula=formula: formula(x, weight), [weight])
    return result


def fused_adds(cols, weight, compiled):
    """Name: a function of x and residual, to the norm of their sum and the sum."""
    steps = functools.partial(add_then_norm, weight=weight)
    return {
        "ours": lambda x, residual: rmsnorm_cuda.fused_add_rms_norm(x, residual, weight, EPS),
        "F.rms_norm": steps(FORMULAS["F.rms_norm"]),
    } | compiled_of(steps, [name for name in compiled if name == "F.rms_norm"])


def quantized(cols, weight, compiled):
    """Name: a function of x, to the norm in float8_e4m3fn (or int8) and per-token scales.

    "ours unquantized" leaves the norm as it is.
    """

    def steps(norm):
        return lambda x: quantize(norm(x, weight))

    given = torch.tensor([0.02]).to(weight.device)
    e4m3 = torch.float8_e4m3fn
    result = {
        "ours": lambda x: rmsnorm_cuda.rms_norm_quant(x, weight, EPS, dtype=e4m3),
        "ours int8": lambda x: rmsnorm_cuda.rms_norm_quant(x, weight, EPS, dtype=torch.int8),
        "ours blocks of 128": lambda x: rmsnorm_cuda.rms_norm_quant(
            x, weight, EPS, dtype=e4m3, block=128
        ),
        "ours scale given": lambda x: rmsnorm_cuda.rms_norm_quant(
            x, weight, EPS, dtype=e4m3, scale=given
        ),
        "ours fused add": lambda x: rmsnorm_cuda.fused_add_rms_norm_quant(
            x, x, weight, EPS, dtype=e4m3
        ),
        "ours unquantized": lambda x: rmsnorm_cuda.rms_norm(x, cols, weight, EPS),
        "ours, then torch": lambda x: quantize(rmsnorm_cuda.rms_norm(x, cols, weight, EPS)),
        "F.rms_norm, then torch": steps(FORMULAS["F.rms_norm"]),
    }
    return result | compiled_of(steps, [name for name in compiled if name == "F.rms_norm"])


def training_step(norm, parameters, gradients):
    """A run of forward and backward; `gradients` maps the id of an x to its dy."""
    leaves = {}

    def run(x):
        leaf = leaves.setdefault(id(x), x.detach().requires_grad_())
        return torch.autograd.grad(norm(leaf), [leaf, *parameters], gradients[id(x)])

    return run
