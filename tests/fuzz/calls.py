"""Random calls of every op, from its schema: what an argument may be is said once, by its name.

A new op of known arguments is fuzzed without a line here. A new argument is one entry of
`ARGUMENTS`; what a new result should be is one entry of `RESULTS` in test_fuzz.py.
"""

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# Every boundary of the kernels, and anything between.
COLUMNS = st.one_of(
    st.sampled_from(
        [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256]
    ),
    st.sampled_from(
        [257, 320, 511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4103]
    ),
    st.sampled_from([8191, 8192, 8193, 16384, 20000]),
    st.integers(1, 300),
)
ROWS = st.one_of(st.integers(0, 20), st.sampled_from([31, 64, 65, 255, 256, 257, 300, 1030]))
SMALL, LARGE = 1 << 13, 5 << 19  # elements of most calls, and of one in a thousand

# What a kernel can get wrong: rows whose squares leave a format, values that are no numbers.
VALUES = ["normal", "huge", "largest", "tiny", "denormal", "zero", "constant", "mixed", "special"]


@dataclass(repr=False)
class Call:
    """One call: the arguments by name, and how to make the tensors again."""

    op: str
    shape: tuple  # of input
    dims: int  # normalized
    dtype: torch.dtype
    residual_dtype: torch.dtype
    block: int | None
    seed: int
    arguments: dict = field(default_factory=dict)

    def __repr__(self):
        shown = []
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                dtype, few = str(value.dtype).removeprefix("torch."), value.numel() <= 4
                value = (
                    f"{dtype}{list(value.shape)} by {value.stride()}" + few * f" {value.tolist()}"
                )
            shown.append(f"{name}={value}")
        return f"{self.op}({', '.join(shown)}), seed {self.seed}"

    def _repr_pretty_(self, printer, cycle):  # hypothesis would write all values
        printer.text(repr(self))

    @property
    def last(self):
        return self.shape[len(self.shape) - self.dims :]

    @property
    def lead(self):
        return self.shape[: len(self.shape) - self.dims]


def values(kind, shape, dtype, generator):
    """A dense tensor."""
    info = torch.finfo(dtype)
    t = torch.randn(shape, generator=generator, dtype=FP64)
    exponents = {"huge": 62.0, "tiny": -84.0, "largest": math.log2(info.max) - 3}
    exponents["denormal"] = math.log2(info.tiny) - 1
    if kind in exponents:
        most = math.log2(info.max) - 3
        t = t.clamp(-4, 4) * 2.0 ** max(min(exponents[kind], most), -1020)
    elif kind == "zero":
        t = t * 0
    elif kind == "constant":
        t = torch.full_like(t, float(torch.randn((), generator=generator, dtype=FP64)))
    elif kind == "mixed" and t.dim() and t.numel():
        scales = torch.randint(-40, 41, (*t.shape[:-1], 1), generator=generator).double()
        t = t * 2.0 ** (scales if dtype != FP16 else scales / 4)
    elif kind == "special" and t.numel():
        flat = t.view(-1)
        odd = torch.tensor(
            [math.nan, math.inf, -math.inf, 0.0, info.max, info.tiny, -info.tiny / 2]
        )
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(0, t.numel(), (), generator=generator))
            flat[at] = odd[int(torch.randint(0, len(odd), (), generator=generator))].double()
    return t.clamp(-info.max, info.max).to(dtype) if kind != "special" else t.to(dtype)


GUARD = 0xA5


class Placed:
    """A tensor in memory of its own, with guard bytes around and between its rows."""

    def __init__(self, shape, dtype, layout, dense_from, offset=0):
        """The dimensions from `dense_from` on are dense but where the layout is "scattered"."""
        size = dtype.itemsize
        strides, step = [0] * len(shape), 1
        order = list(range(len(shape)))[::-1]
        if layout == "transposed" and dense_from > 1:
            order = order[: len(shape) - dense_from] + list(range(dense_from))
        for d in order:
            strides[d] = step
            if layout == "expanded" and d < dense_from:
                strides[d] = 0
                continue
            step *= max(shape[d], 1)
            if layout == "scattered":
                step *= 2
            elif layout in ("padded", "transposed") and d <= dense_from:
                step += 3
        strides = [2 * s for s in strides] if layout == "scattered" else strides
        last = sum((n - 1) * s for n, s in zip(shape, strides)) if math.prod(shape) else -1
        front = 64 + offset * size
        self.memory = torch.full((front + (last + 1) * size + 64,), GUARD, dtype=torch.uint8)
        start = (-self.memory.data_ptr()) % 64  # so that `offset` alone says how it is aligned
        front = start + offset * size
        elements = self.memory[front : front + (last + 1) * size].view(dtype)
        self.tensor = elements.as_strided(shape, strides)
        self.outside = torch.ones_like(self.memory, dtype=torch.bool)
        inside = self.outside[front : front + (last + 1) * size]
        if inside.numel():
            where = inside.view(-1, size).as_strided(
                (*shape, size), (*(s * size for s in strides), 1)
            )
            where.fill_(False)

    def guards_are_intact(self):
        return bool((self.memory[self.outside] == GUARD).all())


LAYOUTS = ["dense", "dense", "padded", "transposed", "expanded", "scattered"]


def tensors(kinds=VALUES, *, last=False, dtype=None, layouts=LAYOUTS, optional=False):
    """Of input's shape, or of its normalized dimensions; of the call's dtype unless another is
    given.
    """

    @st.composite
    def strategy(draw, call):
        if optional and draw(st.booleans()):
            return None
        shape = call.last if last else call.shape
        dense_from = 0 if last else len(call.lead)
        of = draw(dtype(call)) if dtype else call.dtype
        layout = draw(st.sampled_from(layouts)) if len(shape) else "dense"
        kind = draw(st.sampled_from(kinds))
        offset = draw(st.sampled_from([0, 0, 0, 1, 3, 8]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        placed = Placed(shape, of, layout, dense_from, offset)
        once = (slice(0, 1),) * dense_from if layout == "expanded" else ...
        placed.tensor[once].copy_(values(kind, shape, of, generator)[once])
        return placed.tensor

    return strategy


def anything(dtypes):
    return lambda call: st.sampled_from(dtypes)


def chosen(*choices):
    return lambda call: st.sampled_from(choices)


def groups_of(call):
    cols = call.last[-1]
    return st.sampled_from(
        [None, *(n for n in (1, 3, 8, 16, 64, 128, cols) if n and cols % n == 0)]
    )


def masks(call):
    count = 3 if "gated" in call.op else 2  # of input, gate and weight
    one_alone = [[i == j for i in range(count)] for j in range(count)]
    return st.sampled_from([[True] * count, *one_alone])


def is_added(op):
    """Whether what is added to the residual is itself a norm."""
    return op.startswith("rms_norm_add")


def is_quant(call):
    return "quant" in call.op


def dtypes_of_weight(call):
    return st.sampled_from([call.dtype, FP32, BF16, FP16] + ([] if is_quant(call) else [FP64]))


def dtypes_of_gradient(call):
    return st.sampled_from([call.dtype, FP32] if call.dtype != FP64 else [FP64])


WEIGHTS = tensors(
    ["normal", "normal", "constant", "tiny", "huge", "zero", "special"],
    last=True,
    dtype=dtypes_of_weight,
    layouts=["dense", "dense", "scattered"],
    optional=True,
)


def scales(call):
    """Of 8 bits, or what a sum of norm and residual is multiplied by."""
    if not is_quant(call):
        return st.sampled_from([1.0, 1.0, 0.37, -2.0, 0.0, 1e30])
    static = [None, None, torch.tensor([0.013]), torch.tensor([3.0])]
    return st.sampled_from(static) if call.block is None else st.none()


ARGUMENTS = {
    "input": tensors(),
    "residual": tensors(dtype=lambda call: st.just(call.residual_dtype)),
    "normalized_shape": lambda call: st.just(list(call.last)),
    "weight": WEIGHTS,
    "input_weight": WEIGHTS,
    "eps": chosen(None, 1e-6, 1e-5, 0.0, 1e-12, 1.0, 1e30),
    "weight_offset": chosen(0.0, 0.0, 1.0, -0.37, 1e30),
    "cast_before_weight": chosen(False, True),
    "round_sum": chosen(True, False),
    "dtype": chosen(torch.float8_e4m3fn, torch.float8_e5m2, torch.int8),
    "block": lambda call: st.just(call.block),
    "scale": scales,
    "scale_ub": chosen(None, None, 1.25, 1e-3, 1e39),
    "column_major": lambda call: st.booleans() if call.block else st.just(False),
    "keep_norm": chosen(True, True, False),
    "grad_output": tensors(["normal", "tiny", "zero", "mixed"], dtype=dtypes_of_gradient),
    "grad_residual": tensors(["normal", "zero"], optional=True),
    "output_mask": masks,
    "gate": tensors(
        ["normal", "normal", "normal", "tiny", "zero", "mixed", "special"],
        dtype=dtypes_of_weight,
        optional=True,
    ),
    "activation": chosen("silu", "sigmoid"),
    "norm_before_gate": chosen(True, False),
    "group_size": groups_of,
}
# Found from the others when the call is made.
DERIVED = {"rstd", "q_rstd", "k_rstd"}
HEAD_COLUMNS = st.sampled_from([2, 6, 8, 16, 30, 32, 48, 64, 66, 80, 96, 128, 192, 256, 512])


@st.composite
def rope_calls(draw, op):
    """A call of an op that rotates q and k, whose arguments depend on each other."""
    names = [a.name for a in op._schema.arguments]
    cols, heads = draw(HEAD_COLUMNS), draw(st.sampled_from([1, 2, 3, 8]))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 17, 40]))
    tokens = min(tokens, SMALL // (cols * heads))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    heads_dim = draw(st.sampled_from([-2, -3]))
    dtype = draw(st.sampled_from([FP32, BF16, FP16, FP32, BF16, FP64]))

    def shape(heads):
        return (*batch, tokens, heads, cols) if heads_dim == -2 else (*batch, heads, tokens, cols)

    call = Call(
        op._schema.name.split("::")[1],
        shape(heads),
        1,
        dtype,
        dtype,
        None,
        draw(st.integers(0, 2**31)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(shape, dtype, layouts, dense_from, kinds=("normal", "tiny", "constant", "mixed")):
        placed = Placed(shape, dtype, draw(st.sampled_from(layouts)), dense_from)
        kind = draw(st.sampled_from(kinds))
        placed.tensor.copy_(values(kind, shape, dtype, generator))
        return placed.tensor

    layouts = ["dense", "dense", "padded", "transposed", "scattered"]
    given = {"heads_dim": heads_dim}
    for side in "qk":
        count = heads if side == "q" else draw(st.sampled_from([None, 1, 2, heads]))
        given[side] = given[f"{side}_weight"] = None
        if count is None:
            continue
        of = dtype if side == "q" else draw(st.sampled_from([dtype, FP32]))
        given[side] = tensor(shape(count), of, layouts, len(shape(count)) - 1)
        weights = [None, (cols,), (cols,), (count, cols), (count * cols,)]
        if weight := draw(st.sampled_from(weights)):
            of = draw(st.sampled_from([dtype, FP32, BF16]))
            given[f"{side}_weight"] = tensor(
                weight, of, ["dense", "scattered"], 0, ["normal", "zero"]
            )
        if "grad_q" in names:
            there = side == "q" or draw(st.booleans())
            grad = tensor(shape(count), given[side].dtype, layouts, len(shape(count)) - 1)
            given[f"grad_{side}"] = grad if there else None
    given.setdefault("grad_k", None)
    pairs = draw(st.sampled_from([cols // 2, cols // 2, cols // 4]))
    sections = draw(st.sampled_from([None, None, (pairs,), (pairs - pairs // 2, pairs // 2)]))
    axes = () if sections is None else (len(sections),)
    given["sections"] = sections and list(sections)
    given["interleaved_sections"] = bool(sections) and draw(st.booleans())
    angle_dtype = draw(st.sampled_from([dtype, FP32, dtype, BF16, FP64]))
    where = draw(st.sampled_from([(*batch, tokens), (tokens,), (1,)]))
    given["positions"] = None
    table = (*axes, *where)
    if draw(st.booleans()):
        table = (9,)
        given["positions"] = torch.randint(0, 9, (*axes, *where), generator=generator)
    angles = torch.randn((*table, pairs), generator=generator, dtype=FP64)
    cos_sin = angles.cos(), angles.sin()
    if draw(st.booleans()):  # side by side, as a cache is
        cos_sin = torch.cat(cos_sin, -1).split([pairs, pairs], -1)
    given["cos"], given["sin"] = (t.to(angle_dtype) for t in cos_sin)
    for name in ("interleaved", "cast_before_weight", "round_each_step"):
        given[name] = draw(st.booleans())
    given["weight_offset"] = draw(st.sampled_from([0.0, 1.0, -0.37]))
    given["eps"] = draw(st.sampled_from([None, 1e-6, 1e-5, 1.0]))
    given["output_mask"] = draw(
        st.sampled_from([[True] * 4, [True, True, False, False], [False, True, True, True]])
    )
    call.arguments = {name: given[name] for name in names if name not in DERIVED}
    return call


@st.composite
def calls(draw, op):
    """A call of an op that returns new tensors."""
    schema = op._schema
    names = [a.name for a in schema.arguments]
    if "q" in names:
        return draw(rope_calls(op))
    quant = "dtype" in names
    large = draw(st.integers(0, 999)) == 999
    most = LARGE if large else SMALL
    dims = draw(st.sampled_from([1, 1, 2, 3])) if "normalized_shape" in names else 1
    block = draw(st.sampled_from([None, None, 64, 128])) if quant else None
    cols = draw(COLUMNS)
    if block:
        cols = max(cols // block, 1) * block
    last = [cols]
    for _ in range(dims - 1):
        size = draw(st.sampled_from([1, 2, 3]))
        last = [size, *last] if draw(st.booleans()) else [max(last[0] // size, 1), size, *last[1:]]
    rows = draw(ROWS) if not large else most // math.prod(last)
    rows = min(rows, max(most // math.prod(last), 1))
    lead = draw(st.sampled_from([(), (rows,), (rows,), (rows, 1), (-(-rows // 3), 3)]))
    if draw(st.integers(0, 99)) == 99:
        last[0] = 0
    dtype = draw(st.sampled_from([FP32, BF16, FP16, FP32, BF16] + ([] if quant else [FP64])))
    residual_dtype = draw(st.sampled_from([dtype, FP32])) if dtype in (FP16, BF16) else dtype
    call = Call(
        op._schema.name.split("::")[1],
        (*lead, *last),
        len(last),
        dtype,
        residual_dtype,
        block,
        draw(st.integers(0, 2**31)),
    )
    for argument in names:
        if argument not in DERIVED:
            call.arguments[argument] = draw(ARGUMENTS[argument](call))
    if quant and call.arguments["scale"] is not None:
        call.arguments["scale_ub"] = None
    if is_added(call.op):  # a norm of the residual's dtype, or of 16 bits beside fp32
        weight = call.arguments["input_weight" if "input_weight" in names else "weight"]
        if weight is not None and torch.promote_types(dtype, weight.dtype) != dtype:
            call.arguments["cast_before_weight"] &= residual_dtype == torch.promote_types(
                dtype, weight.dtype
            )
    return call
