"""The CUDA kernels against the formula in fp64, through the C entry of cuda_entry.cu. Needs numpy.

    python tests/native/cuda_check.py --build LIB [--arch 9.0]  # PTX 8.0 and 9.0, or machine code
    python tests/native/cuda_check.py --build LIB --objects build/objects  # those of the package
    python tests/native/cuda_check.py --lib LIB [--quick] [--seed N]

Memory comes from the libcudart.so.13 that the loader finds: that of a GPU, or a simulator by
LD_LIBRARY_PATH.
"""

import argparse
import copy
import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
CSRC = os.path.join(HERE, "..", "..", "csrc")
F32, F16, BF16, F64 = range(4)
NAMES = ["f32", "f16", "bf16", "f64"]
RAW = [np.uint32, np.uint16, np.uint16, np.uint64]
BITS = [24, 11, 8, 53]  # significand
MIN_EXP = [-126, -14, -126, -1022]
GUARD = 256
GUARD_BYTE = 0xA5


def build(lib, arch, csrc=CSRC, options=(), objects=None):
    """csrc: the folder of the sources, or of a copy, which then has one of cuda_entry.cu too.
    objects: the folder of the package's build, which has compiled them.
    """
    entry = os.path.join(csrc, "..", "tests", "native", "cuda_entry.cu")
    cuda = os.path.join(objects, "csrc", "cuda") if objects else os.path.join(csrc, "cuda")
    ending = ".cu.o" if objects else ".cu"
    sources = [os.path.join(cuda, f) for f in sorted(os.listdir(cuda)) if f.endswith(ending)]
    code = []
    for number in (arch or "8.0 9.0").replace(".", "").split():
        code += ["-gencode", f"arch=compute_{number},code={'sm' if arch else 'compute'}_{number}"]
    subprocess.run(
        [
            "nvcc",
            "-t",
            "2",
            "-cudart",
            "shared",
            "-shared",
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler",
            "-fPIC",
        ]
        + [f'-DRMSNORM_CUDA_ARCHS="{arch or "8.0 9.0"}"', *code, "-o", lib]
        + sources
        + [entry, *options],
        check=True,
    )


# Numbers


def encode(v, dtype):
    """fp64 (or long double) -> raw integers, rounded once."""
    with np.errstate(all="ignore"):
        if dtype == F64:
            return v.astype(np.float64).view(np.uint64)
        if dtype == F32:
            return v.astype(np.float32).view(np.uint32)
        if dtype == F16:
            return v.astype(np.float16).view(np.uint16)
        v = np.asarray(v, np.float64)
        f = v.astype(np.float32)
        u = f.view(np.uint32).copy()
        u[np.abs(f.astype(np.float64)) > np.abs(v)] -= 1  # towards zero, then odd where inexact
        u[(u.view(np.float32) != v) & ~np.isnan(v)] |= 1
        r = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(v), np.uint16(0x7FC0), r)


def decode(raw, dtype):
    if dtype == F64:
        return raw.view(np.float64)
    if dtype == F32:
        return raw.view(np.float32).astype(np.float64)
    if dtype == F16:
        return raw.view(np.float16).astype(np.float64)
    return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def ulps(a, b, dtype):
    """Distance in representable numbers; 0 between NaNs and between zeros."""
    sign = 1 << (RAW[dtype]().nbytes * 8 - 1)
    nan_a, nan_b = np.isnan(decode(a, dtype)), np.isnan(decode(b, dtype))

    def ordered(raw):
        magnitude = (raw & RAW[dtype](sign - 1)).astype(np.int64)
        return np.where(raw >= sign, -magnitude, magnitude)

    d = np.abs((ordered(a) - ordered(b)).astype(np.float64))
    return np.where(nan_a | nan_b, np.where(nan_a & nan_b, 0, np.inf), d)


def ulp_size(v, dtype):
    with np.errstate(all="ignore"):
        e = np.floor(np.log2(np.maximum(np.abs(v), 2.0 ** max(MIN_EXP[dtype], -1000))))
        return 2.0 ** (np.maximum(e, MIN_EXP[dtype]) - BITS[dtype] + 1)


def promoted(x, w):
    return x if x == w else F64 if F64 in (x, w) else F32


# The library and its memory


P, I64 = ctypes.c_void_p, ctypes.c_int64


def structs(header):
    """The types of rmsnorm.h for ctypes, by name. A member is a line indented by two spaces."""
    types = {"int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": I64, "bool": ctypes.c_bool}
    types |= {"float": ctypes.c_float, "double": ctypes.c_double, "uint8_t": ctypes.c_uint8}
    types |= dict.fromkeys(re.findall(r"enum class (\w+) : int", header), ctypes.c_int32)
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", header))
    member = r"^  (?:const )?(\w+)(\*?) (\w+(?:, \w+)*)(?:\[(\w+)\])?(?: = [^;(]+)?;"
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header, re.M | re.S):
        fields = []
        for kind, pointer, names, count in re.findall(member, body, re.M):
            kind = (ctypes.c_char_p if kind == "char" else P) if pointer else types[kind]
            kind = kind * int(constants[count]) if count else kind
            fields += [(name, kind) for name in names.split(", ")]
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return types


with open(os.path.join(CSRC, "rmsnorm.h"), encoding="utf-8") as header:
    STRUCTS = structs(header.read())
Rows, Addends, Quant, Device, Plan = map(
    STRUCTS.get, ("Rows", "Addends", "Quant", "Device", "Plan")
)
REGISTERS, SHARED, NOWHERE = range(3)


class Gpu:
    def __init__(self, lib):
        self.rt = ctypes.CDLL("libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
        self.rt.cudaMalloc.argtypes = [ctypes.POINTER(P), ctypes.c_size_t]
        self.rt.cudaFree.argtypes = [P]
        self.rt.cudaMemcpy.argtypes = [P, P, ctypes.c_size_t, ctypes.c_int]
        self.k = ctypes.CDLL(os.path.abspath(lib))
        self.k.workspace.restype = I64
        self.k.error_string.restype = self.k.architectures.restype = ctypes.c_char_p
        self.k.plan.argtypes = (
            [ctypes.c_int, I64, I64] + [ctypes.c_int] * 3 + [ctypes.POINTER(Device)]
        )
        self.k.plan.restype = self.k.last_plan.restype = Plan
        self.k.device.restype = Device
        self.k.rope_workspace.restype = self.k.gated_workspace.restype = I64
        self.k.gated_plan.argtypes = [
            ctypes.c_int,
            I64,
            I64,
            I64,
            ctypes.c_int,
            ctypes.POINTER(Device),
        ]
        self.k.gated_plan.restype = Plan
        names = ("RmsNormForward", "RmsNormBackward", "Device", "Plan")
        names += ("RmsNormRope", "RmsNormRopeBackward", "RmsNormGated", "RmsNormGatedBackward")
        names += ("RmsNormSandwich",)
        for which, name in enumerate(names):
            assert self.k.sizes(which) == ctypes.sizeof(STRUCTS[name]), (
                f"{name} was read wrong from rmsnorm.h"
            )
        self.simulated = hasattr(self.rt, "cusim_set_option")

    def check(self, error):
        if error:
            raise RuntimeError(f"CUDA error {error}: {self.k.error_string(error).decode()}")

    def option(self, key, value):
        if self.simulated:
            self.rt.cusim_set_option(key.encode(), value.encode())

    def plan(self, backward, cols, dy, x, rows=1, device=None, wide=False):
        device = device or self.k.device()
        return self.k.plan(int(backward), rows, cols, dy, x, int(wide), device)

    def ran(self, plan):
        """Was the last launch laid out like this?"""
        last = self.k.last_plan()
        return all(getattr(last, name) == getattr(plan, name) for name, _ in Plan._fields_)

    def stats(self):
        """What the simulator counted of the last launch."""
        self.rt.cusim_stats_json.restype = ctypes.c_char_p
        self.rt.cusim_stats_json.argtypes = [ctypes.c_longlong]
        return json.loads(self.rt.cusim_stats_json(-1))

    def launches(self):
        """How many the simulator has seen."""
        return self.rt.cusim_launch_count() if self.simulated else 0

    def traffic(self):
        """Bytes that the last launch asked of global memory: loaded and stored."""
        stats = self.stats()
        return stats["load_bytes"], stats["store_bytes"]


class Buffer:
    """`raw` on the device, `shift` bytes off a 256-byte boundary, between guard zones."""

    def __init__(self, gpu, raw, shift=0):
        self.gpu, self.like = gpu, raw
        self.start, self.bytes = GUARD + shift, raw.nbytes
        self.base = P()
        host = np.full(self.bytes + 2 * GUARD + shift, GUARD_BYTE, np.uint8)
        host[self.start : self.start + self.bytes] = (
            np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
        )
        gpu.check(gpu.rt.cudaMalloc(ctypes.byref(self.base), host.nbytes))
        gpu.check(gpu.rt.cudaMemcpy(self.base, host.ctypes.data, host.nbytes, 1))

    @property
    def address(self):
        return self.base.value + self.start

    def read(self):
        """What is there now; frees it. The guard zones must be as they were."""
        host = np.empty(self.bytes + self.start + GUARD, np.uint8)
        self.gpu.check(self.gpu.rt.cudaMemcpy(host.ctypes.data, self.base, host.nbytes, 2))
        self.gpu.check(self.gpu.rt.cudaFree(self.base))
        inside = host[self.start : self.start + self.bytes]
        outside = np.concatenate([host[: self.start], host[self.start + self.bytes :]])
        assert (outside == GUARD_BYTE).all(), "written outside of the buffer"
        return inside.copy().view(self.like.dtype).reshape(self.like.shape)


class Layout:
    """Where rows start: a Rows, the offsets of all rows, and the elements that they reach over."""

    def __init__(self, sizes, strides, cols):
        self.rows = Rows(len(sizes), (I64 * 4)(*sizes), (I64 * 4)(*strides))
        grid = np.zeros((), np.int64)
        for n, s in zip(sizes, strides):
            grid = grid[..., None] + np.arange(n, dtype=np.int64) * s
        self.offsets = grid.reshape(-1)
        self.index = self.offsets[:, None] + np.arange(cols)
        self.elements = int(self.index.max()) + 1

    def place(self, values, fill):
        flat = np.full(self.elements, fill, values.dtype)
        flat[self.index] = values
        return flat


def dense(rows, cols):
    return Layout([rows], [cols], cols)


def nan_of(dtype):
    return RAW[dtype](np.iinfo(RAW[dtype]).max)


# The two ops: run on the device, checked against the formula


class Case:
    """Names the case in what an assertion says."""

    passed = 0

    def __init__(self, **values):
        self.values = values

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            print("FAILED:", ", ".join(f"{k}={v}" for k, v in self.values.items()), file=sys.stderr)
        else:
            Case.passed += 1


def random_values(rng, shape, dtype, scale=1.0):
    return encode(rng.standard_normal(shape) * scale, dtype)


def run_forward(
    gpu,
    x,
    xt,
    w,
    wt,
    *,
    eps=1e-6,
    offset=0.0,
    cast=False,
    x_layout=None,
    y_layout=None,
    shift=(0, 0, 0),
    in_place=False,
    want_rstd=True,
):
    rows, cols = x.shape
    yt = promoted(xt, wt if w is not None else xt) if cast else xt
    x_layout = x_layout or dense(rows, cols)
    y_layout = x_layout if in_place else y_layout or dense(rows, cols)
    xb = Buffer(gpu, x_layout.place(x, nan_of(xt)), shift[0])
    wb = Buffer(gpu, w, shift[1]) if w is not None else None
    yb = xb if in_place else Buffer(gpu, np.full(y_layout.elements, nan_of(yt), RAW[yt]), shift[2])
    rt = F64 if xt == F64 else F32
    rb = Buffer(gpu, np.full(rows, nan_of(rt), RAW[rt])) if want_rstd else None
    p = STRUCTS["RmsNormForward"](
        x=xb.address,
        weight=wb and wb.address,
        y=yb.address,
        rstd=rb and rb.address,
        x_rows=x_layout.rows,
        y_rows=y_layout.rows,
        rows=rows,
        cols=cols,
        eps=eps,
        weight_offset=offset,
        cast_before_weight=cast,
        x_dtype=xt,
        w_dtype=wt if w is not None else xt,
        y_dtype=yt,
    )
    gpu.check(gpu.k.forward(ctypes.byref(p), None))
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    flat = yb.read()
    if wb:
        wb.read()
    if not in_place:
        assert (xb.read() == x_layout.place(x, nan_of(xt))).all(), "x was written"
    y = flat[y_layout.index]
    flat[y_layout.index] = nan_of(yt)
    assert (flat == nan_of(yt)).all(), "written between the rows"
    return y, rb.read() if rb else None, yt


def run_unrounded(
    gpu, x, residual, t, w, wt, *, cast=False, offset=0.0, pad=0, shift=0, in_place=False
):
    """(y, rstd, sum) of a sum that is normalized before it is rounded to t; in place, y and the sum
    where its addends were."""
    rows, cols = x.shape
    yt = promoted(t, wt if w is not None else t) if cast else t
    layout = Layout([rows], [cols + pad], cols)

    def buffer(values):
        return Buffer(gpu, layout.place(values, nan_of(t)), shift * values.itemsize)

    def blank(dtype):
        full = np.full(layout.elements, nan_of(dtype), RAW[dtype])
        return Buffer(gpu, full, shift * full.itemsize)

    xb, old, wb = buffer(x), buffer(residual), Buffer(gpu, w) if w is not None else None
    here = in_place and yt == t
    yb, total = xb if here else blank(yt), old if in_place else blank(t)
    rb = Buffer(gpu, np.full(rows, nan_of(F32), RAW[F32]))
    p = STRUCTS["RmsNormForward"](
        x=total.address,
        weight=wb and wb.address,
        y=yb.address,
        rstd=rb.address,
        x_rows=layout.rows,
        y_rows=layout.rows,
        rows=rows,
        cols=cols,
        eps=1e-6,
        weight_offset=offset,
        cast_before_weight=cast,
        x_dtype=t,
        w_dtype=wt if w is not None else t,
        y_dtype=yt,
        addends=Addends(
            input=xb.address,
            residual=old.address,
            input_dtype=t,
            input_rows=layout.rows,
            residual_rows=layout.rows,
            unrounded=True,
        ),
    )
    gpu.check(gpu.k.forward(ctypes.byref(p), None))
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    if wb:
        wb.read()
    if not here:
        assert (xb.read() == layout.place(x, nan_of(t))).all(), "input was written"
    if not in_place:
        assert (old.read() == layout.place(residual, nan_of(t))).all(), "residual was written"
    y, sums = yb.read(), total.read()
    for flat, dtype in ((y, yt), (sums, t)):
        between = np.ones(flat.shape, bool)
        between[layout.index] = False
        assert (flat[between] == nan_of(dtype)).all(), "written between the rows"
    return y[layout.index], rb.read(), sums[layout.index], yt


def check_unrounded(gpu, x, residual, t, w, wt, *, cast=False, offset=0.0, **how):
    y, rstd, sums, yt = run_unrounded(gpu, x, residual, t, w, wt, cast=cast, offset=offset, **how)
    with np.errstate(all="ignore"):
        exact = decode(x, t).astype(np.float32) + decode(residual, t).astype(np.float32)
    assert (sums == encode(exact.astype(np.float64), t)).all(), "the sum"
    raw = exact.view(np.uint32)
    want, r = reference_forward(raw, F32, None, F32, 1e-6, 0.0, False)
    assert (ulps(rstd, encode(r, F32), F32) <= 2).all(), "rstd"
    g = gain(w, wt if w is not None else t, t, x.shape[1], offset, F64 in (wt,))
    off = None
    for nudge in (0, 2.0**-22, -(2.0**-22)) if cast else (0,):
        n = wide(encode(want * (1 + nudge), t), t) if cast else want
        with np.errstate(all="ignore"):
            one = ulps(y, encode(np.float64(n * g), yt), yt)
        off = one if off is None else np.minimum(off, one)
    assert (off <= 1).all(), f"y is {off.max()} ulps off"
    assert (off != 0).mean() <= 0.01 + 2 / off.size, "y is not rounded to the nearest"
    return y, rstd, sums


E4M3, E5M2, INT8 = range(3)  # QType
MOST = [448.0, 57344.0, 127.0]


def float8(dtype):
    """The magnitudes of all codes."""
    fraction, bias = ((3, 7), (2, 15))[dtype]
    codes = np.arange(0x7F if dtype == E4M3 else 0x7C)
    exponent, rest = codes >> fraction, codes & (1 << fraction) - 1
    return np.where(
        exponent > 0,
        (1 << fraction | rest) * 2.0 ** (exponent - bias - fraction),
        rest * 2.0 ** (1 - bias - fraction),
    )


def quantize(y, yt, dtype, block, scale=None, bound=np.inf):
    """Codes and scales of a norm, in numpy's fp32, as rmsnorm.h has it; by a table of all codes."""
    f32, most = np.float32, np.float32(MOST[dtype])
    v = decode(y, yt).astype(f32)
    least = f32(np.finfo(f32).eps) if dtype == INT8 else f32(1) / (most * f32(512))
    with np.errstate(all="ignore"):
        if scale is None:
            groups = v.reshape(len(v), -1, block)
            scale = np.minimum(np.abs(groups).max(-1), f32(bound)) / most
            scale = np.maximum(scale, least)
            each = np.repeat(scale, block, 1)
            q = v * (f32(1) / each) if dtype == INT8 else v / each
        else:
            scale = f32(scale)
            q = v * (f32(1) / scale)
        if dtype == INT8:
            return np.rint(np.clip(np.nan_to_num(q, nan=0.0), -128, 127)).astype(np.int8).view(
                np.uint8
            ), scale
        table = float8(dtype)
        size = np.minimum(np.abs(np.nan_to_num(q, nan=0.0)).astype(np.float64), table[-1])
        above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
        below = above - 1
        down, up = size - table[below], table[above] - size
        code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
        code = np.where(np.isnan(q), 0x7F, code) | np.signbit(v) * 0x80
        return code.astype(np.uint8), scale


class Codes:
    """What a quantization writes; block 0 stands for a row. `quant` tells a kernel of it."""

    def __init__(
        self,
        gpu,
        shape,
        dtype,
        block,
        *,
        scale=None,
        bound=np.inf,
        column_major=False,
        shift=0,
    ):
        rows, cols = shape
        self.is_static, self.column_major, block = scale is not None, column_major, block or cols
        self.grid = rows, cols // block
        self.codes = Buffer(gpu, np.full(shape, 0xAA, np.uint8), shift)
        scales = np.full(rows * self.grid[1], nan_of(F32), RAW[F32])
        scales = np.float32([scale]).view(np.uint32) if self.is_static else scales
        self.scales = Buffer(gpu, scales)
        most = np.float32(MOST[dtype])
        least = np.finfo(np.float32).eps if dtype == INT8 else np.float32(1) / (most * 512)
        strides = (1, rows) if column_major else (self.grid[1], 1)
        self.quant = Quant(
            data=self.codes.address,
            scale=self.scales.address,
            block=0 if self.is_static else block,
            row_stride=strides[0],
            block_stride=strides[1],
            bound=bound,
            least=least,
            dtype=dtype,
        )

    def read(self):
        scales = self.scales.read().view(np.float32)
        if not self.is_static:
            grid = self.grid
            scales = scales.reshape(grid[::-1]).T if self.column_major else scales.reshape(grid)
        return self.codes.read(), scales


def run_quant(
    gpu,
    x,
    xt,
    w,
    wt,
    dtype,
    block,
    *,
    keep_norm=False,
    cast=False,
    offset=0.0,
    residual=None,
    unrounded=False,
    eps=1e-6,
    **kind,
):
    """(codes, scales, norm, sum): block 0 stands for a row; residual, of dtype rt = fp32 or xt."""
    rows, cols = x.shape
    rt = xt if residual is None else residual[1]
    yt = promoted(xt, wt if w is not None else xt) if cast else xt
    xb, wb = Buffer(gpu, x), Buffer(gpu, w) if w is not None else None
    written = Codes(gpu, x.shape, dtype, block, **kind)
    yb = Buffer(gpu, np.full((rows, cols), nan_of(yt), RAW[yt])) if keep_norm else None
    place = dense(rows, cols).rows
    p = STRUCTS["RmsNormForward"](
        x=xb.address,
        weight=wb and wb.address,
        y=yb and yb.address,
        x_rows=place,
        y_rows=place,
        rows=rows,
        cols=cols,
        eps=eps,
        weight_offset=offset,
        cast_before_weight=cast,
        x_dtype=rt,
        w_dtype=wt if w is not None else xt,
        y_dtype=yt,
        quant=written.quant,
    )
    if residual is not None:
        total, old = (
            Buffer(gpu, np.full((rows, cols), nan_of(rt), RAW[rt])),
            Buffer(gpu, residual[0]),
        )
        p.x = total.address
        p.addends = Addends(
            input=xb.address,
            residual=old.address,
            input_dtype=xt,
            input_rows=place,
            residual_rows=place,
            unrounded=unrounded,
        )
    gpu.check(gpu.k.forward(ctypes.byref(p), None))
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    assert (xb.read() == x).all(), "x was written"
    norm = yb.read().reshape(rows, cols) if keep_norm else None
    total = total.read().reshape(rows, cols) if residual is not None else None
    return *written.read(), norm, total


def wide(raw, dtype):
    v = decode(raw, dtype)
    return v.astype(np.longdouble) if dtype == F64 else v


def gain(w, wt, xt, cols, offset, exact):
    if w is None:
        return np.ones(cols)
    if exact:
        return wide(w, wt) + np.longdouble(offset)
    return (decode(w, wt).astype(np.float32) + np.float32(offset)).astype(np.float64)


def reference_forward(x, xt, w, wt, eps, offset, cast, nudge=0.0):
    """nudge: relative change of x * rstd before it is rounded by cast."""
    exact = F64 in (xt, wt)
    with np.errstate(all="ignore"):
        v = wide(x, xt)
        if exact:
            v = v.astype(np.longdouble)
        r = 1 / np.sqrt((v * v).mean(axis=1, keepdims=True) + eps)
        n = v * r
        if cast:
            n = wide(encode(n * (1 + nudge), xt), xt)
        y = n * gain(w, wt, xt, x.shape[1], offset, exact)
    return y, r[:, 0]


def check_forward(gpu, x, xt, w, wt, *, eps=1e-6, offset=0.0, cast=False, tolerance=None, **how):
    y, rstd, yt = run_forward(gpu, x, xt, w, wt, eps=eps, offset=offset, cast=cast, **how)
    want, r = reference_forward(x, xt, w, wt if w is not None else xt, eps, offset, cast)
    off = ulps(y, encode(want, yt), yt)
    if cast and xt not in (
        F32,
        F64,
    ):  # x * rstd that is nearly between two numbers may become either
        for nudge in (2.0**-22, -(2.0**-22)):
            other, _ = reference_forward(
                x, xt, w, wt if w is not None else xt, eps, offset, cast, nudge
            )
            off = np.minimum(off, ulps(y, encode(other, yt), yt))
    if (
        cast and xt == F32
    ):  # one ulp of x * rstd is more than two of y where it is subnormal and y is not
        n, _ = reference_forward(x, xt, None, xt, eps, 0.0, False)
        g = np.abs(gain(w, wt, xt, x.shape[1], offset, F64 in (xt, wt)))
        with np.errstate(all="ignore"):
            close = np.abs(decode(y, yt) - want) <= ulp_size(n, xt) * g + ulp_size(want, yt)
        off = np.where(close, 0, off)
    worst = off.max()
    limit = tolerance or (4 if yt == F64 or xt == F64 else 2 if cast else 1)
    assert worst <= limit, f"y is {worst} ulp off"
    if rstd is not None:
        rt = F64 if xt == F64 else F32
        off = ulps(rstd, encode(r, rt), rt).max()
        # That of 16-bit rows comes of plain fp32 sums: see Total in reduce.cuh.
        assert off <= (1 if xt == F32 else 4), f"rstd is {off} ulp off"
    return y, rstd


def run_backward(
    gpu,
    dy,
    dyt,
    x,
    xt,
    w,
    wt,
    rstd,
    *,
    eps=1e-6,
    offset=0.0,
    cast=False,
    dy_layout=None,
    x_layout=None,
    shift=(0, 0, 0, 0),
    want=(True, True),
    dresidual=None,
):
    rows, cols = x.shape
    dy_layout, x_layout = dy_layout or dense(rows, cols), x_layout or dense(rows, cols)
    wt = wt if w is not None else xt
    dyb = Buffer(gpu, dy_layout.place(dy, nan_of(dyt)), shift[0])
    xb = Buffer(gpu, x_layout.place(x, nan_of(xt)), shift[1])
    wb = Buffer(gpu, w, shift[2]) if w is not None else None
    rb = Buffer(gpu, rstd)
    db = (
        Buffer(gpu, x_layout.place(dresidual, nan_of(xt)), shift[1])
        if dresidual is not None
        else None
    )
    dxb = Buffer(gpu, np.full((rows, cols), nan_of(xt), RAW[xt]), shift[3]) if want[0] else None
    dwb = Buffer(gpu, np.full(cols, nan_of(wt), RAW[wt])) if want[1] else None
    p = STRUCTS["RmsNormBackward"](
        dy=dyb.address,
        x=xb.address,
        weight=wb and wb.address,
        rstd=rb.address,
        dresidual=db and db.address,
        dx=dxb and dxb.address,
        dweight=dwb and dwb.address,
        dy_rows=dy_layout.rows,
        x_rows=x_layout.rows,
        dresidual_rows=x_layout.rows,
        rows=rows,
        cols=cols,
        eps=eps,
        weight_offset=offset,
        cast_before_weight=cast,
        dy_dtype=dyt,
        x_dtype=xt,
        w_dtype=wt,
    )
    size = gpu.k.workspace(ctypes.byref(p))
    wsb = Buffer(gpu, np.full(size, 0xFF, np.uint8)) if size else None
    p.workspace = wsb and wsb.address
    gpu.check(gpu.k.backward(ctypes.byref(p), None))
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    for b in (dyb, xb, wb, rb, db, wsb):
        if b:
            b.read()
    return dxb.read() if dxb else None, dwb.read() if dwb else None


def check_backward(gpu, dy, dyt, x, xt, w, wt, *, eps=1e-6, offset=0.0, cast=False, **how):
    _, r = reference_forward(x, xt, None, xt, eps, 0.0, False)
    rstd = encode(r, F64 if xt == F64 else F32)
    dx, dw = run_backward(
        gpu, dy, dyt, x, xt, w, wt, rstd, eps=eps, offset=offset, cast=cast, **how
    )
    wt = wt if w is not None else xt
    exact = F64 in (dyt, xt, wt)
    unit = 2.0**-50 if exact else 2.0**-24
    with np.errstate(all="ignore"):
        vx, vdy = wide(x, xt), wide(dy, dyt)
        g = vdy * gain(w, wt, xt, x.shape[1], offset, exact)
        xhat = vx * r[:, None]
        c = (g * xhat).mean(axis=1, keepdims=True)
        want_dx = r[:, None] * (g - xhat * c)
        size = np.abs(r)[:, None] * (
            np.abs(g) + np.abs(xhat) * np.abs(g * xhat).mean(axis=1, keepdims=True)
        )
        if how.get("dresidual") is not None:
            want_dx = want_dx + wide(how["dresidual"], xt)
            size = size + np.abs(want_dx)  # the sum rounds once more
        if dx is not None:
            compare("dx", dx, xt, want_dx, 12 * unit * size)
        if dw is not None:
            seen = wide(encode(xhat, xt), xt) if cast else xhat
            terms = np.abs(vdy * seen)
            # A chain of additions per thread; and a rounded xhat that lay between two numbers may
            # be the other one.
            slack = (10 + np.sqrt(len(x))) * unit * terms.sum(axis=0)
            if cast:
                slack = slack + 2.0 ** (1 - BITS[xt]) * terms.max(axis=0)
            compare("dweight", dw, wt, (vdy * seen).sum(axis=0), slack)
    return dx, dw


def compare(name, raw, dtype, want, slack):
    got = wide(raw, dtype)
    same = (got == want) | (np.isnan(got) & np.isnan(want)) | (raw == encode(want, dtype))
    off = np.abs(got - want) / (0.505 * ulp_size(want.astype(np.float64), dtype) + slack)
    worst = np.where(same, 0, off)
    assert (worst <= 1).all(), (
        f"{name} is off by {np.nanmax(worst):.3g} of its tolerance, {np.isnan(worst).sum()} NaN"
    )


class Rotary:
    """q or k: its tensors and angles, the same in fp64, and how a call gets them."""

    def __init__(self, rng, tokens, heads, cols, pairs, xt, wt, **options):
        how = {"at": xt, "across": False, "interleaved": False, "cached": False, "axes": 1}
        how |= {"weights": 1, "each": False, "cast": False, "offset": 0.0, "eps": 1e-6}
        how |= {"layout": "dense", "shift": 0, "scale": 1.0, "in_place": False, "batches": 1}
        self.__dict__.update(how | options)
        self.xt, self.wt, self.pairs, self.tokens = xt, xt if wt is None else wt, pairs, tokens
        self.yt = promoted(xt, self.wt) if self.cast else xt
        self.exact = F64 in (xt, self.wt)
        self.cols, self.heads_per_row = (heads * cols, heads) if self.across else (cols, 1)
        self.rows = tokens if self.across else tokens * heads
        self.rows_per_token = 1 if self.across or self.weights > 1 else heads
        row = np.arange(self.rows)
        self.token = row % tokens if self.rows_per_token == 1 else row // heads
        self.weight_of = row // (self.rows // self.weights)
        self.x = random_values(rng, (self.rows, self.cols), xt, self.scale)
        shape = (self.weights, self.cols)
        self.w = None if wt is None else random_values(rng, shape, wt)
        self.heads = heads
        # Angles, of no unit circle: an error in one of them shows.
        count = 11 if self.cached else self.axes * tokens
        self.cos, self.sin = (random_values(rng, (count, pairs), self.at, 0.5) for _ in range(2))
        self.axis_of = np.arange(pairs) * 7 % self.axes
        self.positions = (np.arange(self.axes * tokens, dtype=np.int64) * 5 + 3) % count
        axis_rows = self.positions if self.cached else np.arange(self.axes * tokens)
        index = axis_rows.reshape(self.axes, tokens)[self.axis_of][:, self.token].T
        self.angles = [
            wide(table, self.at)[index, np.arange(pairs)] for table in (self.cos, self.sin)
        ]
        first = 0 if self.interleaved else pairs
        head = np.arange(heads if self.across else 1)[:, None] * cols
        a = np.arange(pairs) * (2 if self.interleaved else 1)
        self.a = (head + a).reshape(-1)
        self.b = self.a + (1 if self.interleaved else first)

    def place(self, kind):
        r, c, h = self.rows, self.cols, self.heads
        n = r // h // self.batches
        if kind == "dense" or (self.across or self.weights > 1) and kind != "odd":
            return dense(r, c)
        if kind == "odd":
            return Layout([r], [c + 3], c)
        if kind == "fused":  # beside others of a token
            return Layout([r // h, h], [c * (h + 2), c], c)
        return Layout([self.batches, n, h], [h * n * c, c, n * c], c)  # heads first

    def rotate(self, v, back=False, rounded=None, number=np.float64):
        """Rotated, and the sum of magnitudes; rounded(values): of each step."""
        step = rounded or (lambda values: values)
        cos, sin = (np.tile(t.astype(number), self.heads_per_row) for t in self.angles)
        sin = -sin if back else sin
        a, b = v[:, self.a], v[:, self.b]
        result, size = v.copy(), np.abs(v)
        result[:, self.a] = step(a * cos) - step(b * sin)
        result[:, self.b] = step(b * cos) + step(a * sin)
        size[:, self.a] = np.abs(a * cos) + np.abs(b * sin)
        size[:, self.b] = np.abs(b * cos) + np.abs(a * sin)
        return result, size

    def rope(self, gpu, keep):
        keep += [Buffer(gpu, self.cos, self.shift), Buffer(gpu, self.sin, self.shift)]
        cos, sin = keep[-2:]
        n = self.tokens // self.batches
        rows = dense(len(self.cos), self.pairs).rows
        if self.batches > 1 and not self.cached and self.axes == 1:
            rows = Layout([self.batches, n], [n * self.pairs, self.pairs], self.pairs).rows
        p = STRUCTS["Rope"](
            cos=cos.address,
            sin=sin.address,
            angle_rows=rows,
            tokens=self.tokens,
            pairs=self.pairs,
            axis_stride=self.tokens * self.pairs,
            axis_count=self.axes,
            dtype=self.at,
            interleaved=self.interleaved,
            round_each_step=self.each,
        )
        p.axes[: self.pairs] = [int(axis) for axis in self.axis_of]
        if self.cached:
            keep.append(Buffer(gpu, self.positions))
            p.positions = keep[-1].address
        return p

    def call(self, gpu, kind, norm, keep):
        return STRUCTS[kind](
            norm=norm,
            rope=self.rope(gpu, keep),
            rows_per_token=self.rows_per_token,
            heads_per_row=self.heads_per_row,
            weights=self.weights,
        )

    def norm(self):
        """The norm of the norm's own kernels, and its rstd."""
        results = []
        for i in range(self.weights):
            rows = self.weight_of == i
            results.append(
                run_forward(
                    GPU[0],
                    self.x[rows],
                    self.xt,
                    None if self.w is None else self.w[i],
                    self.wt,
                    eps=self.eps,
                    offset=self.offset,
                    cast=self.cast,
                )
            )
        return (np.concatenate([r[i] for r in results]) for i in (0, 1))

    def exact_norm(self):
        parts = []
        for i in range(self.weights):
            rows, w = self.weight_of == i, None if self.w is None else self.w[i]
            parts.append(
                reference_forward(
                    self.x[rows], self.xt, w, self.wt, self.eps, self.offset, self.cast
                )
            )
        return (np.concatenate([part[i] for part in parts]) for i in (0, 1))

    def check_forward(self, y, rstd):
        norm, norms_rstd = self.norm()
        assert (ulps(rstd, norms_rstd, F64 if self.xt == F64 else F32) == 0).all(), "rstd"
        if self.each:
            number = np.float64 if self.yt == F64 else np.float32
            step_type = self.yt if self.yt in (self.at, F64) else F32

            def step(v):
                return decode(encode(v.astype(number), step_type), step_type).astype(number)

            with np.errstate(all="ignore"):
                norm = decode(norm, self.yt).astype(number)
                want, _ = self.rotate(norm, rounded=step, number=number)
            off = ulps(y, encode(want, self.yt), self.yt)
            assert (off == 0).all(), f"other bits than step by step: {(off != 0).sum()}"
            return
        with np.errstate(all="ignore"):
            exact, _ = self.exact_norm()
            want, size = self.rotate(exact)
            unit = 2.0**-50 if self.exact else 2.0**-23
            tie = 2.0 ** (1 - BITS[self.xt]) / unit if self.cast and not self.exact else 0
            compare("y", y, self.yt, want, unit * (2 + tie) * size)


GPU = []  # the one that all is run on


def run_rope(gpu, sides, want_rstd=True):
    """[(y, rstd)] of sides, in one call."""
    keep, calls, results = [], [], []
    for s in sides:
        x_layout, wb = s.place(s.layout), None
        y_layout = x_layout if s.in_place else s.place("odd" if s.layout == "odd" else "dense")
        xb = Buffer(gpu, x_layout.place(s.x, nan_of(s.xt)), s.shift)
        if s.w is not None:
            keep.append(wb := Buffer(gpu, s.w, s.shift))
        painted = np.full(y_layout.elements, nan_of(s.yt), RAW[s.yt])
        yb = xb if s.in_place else Buffer(gpu, painted, s.shift)
        rt = F64 if s.xt == F64 else F32
        rb = Buffer(gpu, np.full(s.rows, nan_of(rt), RAW[rt])) if want_rstd else None
        norm = STRUCTS["RmsNormForward"](
            x=xb.address,
            weight=wb and wb.address,
            y=yb.address,
            rstd=rb and rb.address,
            x_rows=x_layout.rows,
            y_rows=y_layout.rows,
            rows=s.rows,
            cols=s.cols,
            eps=s.eps,
            weight_offset=s.offset,
            cast_before_weight=s.cast,
            x_dtype=s.xt,
            w_dtype=s.wt,
            y_dtype=s.yt,
        )
        calls.append(s.call(gpu, "RmsNormRope", norm, keep))
        results.append((xb, yb, y_layout, rb))
    array = (STRUCTS["RmsNormRope"] * len(calls))(*calls)
    before = gpu.launches()
    gpu.check(gpu.k.rope_forward(array, len(calls), None))
    gpu.rope_plan = gpu.k.last_plan()
    gpu.rope_launches = gpu.launches() - before if gpu.simulated else None
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    for buffer in keep:
        assert (buffer.read() == buffer.like).all(), "an argument was written"
    found = []
    for s, (xb, yb, y_layout, rb) in zip(sides, results):
        flat = yb.read()
        if not s.in_place:
            assert (xb.read() == xb.like).all(), "x was written"
        y = flat[y_layout.index]
        flat[y_layout.index] = nan_of(s.yt)
        assert (flat == nan_of(s.yt)).all(), "written between the rows"
        found.append((y, rb.read() if rb else None))
    return found


def check_rope(gpu, *sides):
    found = run_rope(gpu, sides)
    for s, (y, rstd) in zip(sides, found):
        s.check_forward(y, rstd)
    return found


def run_rope_backward(gpu, sides, dys, dyt, want=(True, True)):
    """[(dx, dweight)] of sides, in one call."""
    keep, calls, results = [], [], []
    for s, dy in zip(sides, dys):
        x_layout, dy_layout = s.place(s.layout), s.place("odd" if s.layout == "odd" else "dense")
        _, r = s.exact_norm()
        wb = None
        xb = Buffer(gpu, x_layout.place(s.x, nan_of(s.xt)), s.shift)
        dyb = Buffer(gpu, dy_layout.place(dy, nan_of(dyt)), s.shift)
        rb = Buffer(gpu, encode(r, F64 if s.xt == F64 else F32))
        keep += [xb, dyb, rb]
        if s.w is not None:
            keep.append(wb := Buffer(gpu, s.w, s.shift))
        dxb = Buffer(gpu, np.full(s.x.shape, nan_of(s.xt), RAW[s.xt]), s.shift) if want[0] else None
        shape = (s.weights, s.cols)
        dwb = Buffer(gpu, np.full(shape, nan_of(s.wt), RAW[s.wt])) if want[1] else None
        norm = STRUCTS["RmsNormBackward"](
            dy=dyb.address,
            x=xb.address,
            weight=wb and wb.address,
            rstd=rb.address,
            dx=dxb and dxb.address,
            dweight=dwb and dwb.address,
            dy_rows=dy_layout.rows,
            x_rows=x_layout.rows,
            rows=s.rows,
            cols=s.cols,
            eps=s.eps,
            weight_offset=s.offset,
            cast_before_weight=s.cast,
            dy_dtype=dyt,
            x_dtype=s.xt,
            w_dtype=s.wt,
        )
        calls.append(s.call(gpu, "RmsNormRopeBackward", norm, keep))
        results.append((dxb, dwb))
    array = (STRUCTS["RmsNormRopeBackward"] * len(calls))(*calls)
    size = gpu.k.rope_workspace(array, len(calls))
    space = Buffer(gpu, np.full(size, 0xFF, np.uint8)) if size else None
    array[0].norm.workspace = space and space.address
    before = gpu.launches()
    gpu.check(gpu.k.rope_backward(array, len(calls), None))
    gpu.rope_plan = gpu.k.last_plan()
    gpu.rope_launches = gpu.launches() - before if gpu.simulated else None
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    for buffer in keep:
        assert (buffer.read() == buffer.like).all(), "an argument was written"
    if space:
        space.read()
    return [tuple(b.read() if b else None for b in pair) for pair in results]


def check_rope_backward(gpu, rng, dyt, *sides):
    dys = [random_values(rng, s.x.shape, dyt) for s in sides]
    found = run_rope_backward(gpu, sides, dys, dyt)
    for s, dy, (dx, dw) in zip(sides, dys, found):
        exact = s.exact or dyt == F64
        unit = 2.0**-50 if exact else 2.0**-24
        with np.errstate(all="ignore"):
            turned, size = s.rotate(wide(dy, dyt), back=True)
            _, r = s.exact_norm()
            gains = [
                gain(None if s.w is None else w, s.wt, s.xt, s.cols, s.offset, exact)
                for w in (s.w if s.w is not None else [None] * s.weights)
            ]
            g = np.array(gains)[s.weight_of]
            xhat, r = wide(s.x, s.xt) * r[:, None], r[:, None]
            products, sizes = turned * g * xhat, size * np.abs(g * xhat)
            mean, of_sizes = products.mean(1, keepdims=True), sizes.mean(1, keepdims=True)
            want = r * (turned * g - xhat * mean)
            slack = 12 * (
                np.abs(turned * g) + np.abs(xhat) * np.abs(products).mean(1, keepdims=True)
            )
            slack = slack + 4 * (size * np.abs(g) + np.abs(xhat) * of_sizes)
            compare("dx", dx, s.xt, want, unit * np.abs(r) * slack)
            seen = wide(encode(xhat, s.xt), s.xt) if s.cast else xhat
            for i in range(s.weights):
                rows = s.weight_of == i
                terms = np.abs(turned * seen)[rows]
                slack = (10 + np.sqrt(len(terms))) * unit * terms.sum(0)
                slack = slack + 4 * unit * (size * np.abs(seen))[rows].sum(0)
                if s.cast:
                    slack = slack + 2.0 ** (1 - BITS[s.xt]) * terms.max(0)
                compare("dweight", dw[i], s.wt, (turned * seen)[rows].sum(0), slack)
    again = run_rope_backward(gpu, sides, dys, dyt)
    for (dx, dw), (dx2, dw2) in zip(found, again):
        assert (dx == dx2).all() and (dw == dw2).all(), "other bits in a second run"
    dx_alone = run_rope_backward(gpu, sides, dys, dyt, want=(True, False))
    dw_alone = run_rope_backward(gpu, sides, dys, dyt, want=(False, True))
    for (dx, dw), (dx2, _), (_, dw2) in zip(found, dx_alone, dw_alone):
        assert (dx == dx2).all() and (dw == dw2).all(), "other bits of one alone"
    return found


# With a gate, and of groups


SILU, SIGMOID = range(2)  # Activation


def activate(g, activation):
    """The activation, its slope, and the sum of magnitudes of the slope's terms."""
    e = np.exp(-np.abs(g))
    sigmoid, rest = np.where(g < 0, e, 1) / (1 + e), np.where(g < 0, 1, e) / (1 + e)
    if activation == SIGMOID:
        return sigmoid, sigmoid * rest, sigmoid * rest
    size = sigmoid + np.abs(g) * sigmoid * rest
    return g * sigmoid, sigmoid + g * sigmoid * rest, size


class Gated:
    """A norm with a gate, or of groups: its tensors, the same in fp64, and how a call gets them."""

    def __init__(self, rng, rows, groups, group_cols, xt, wt, **options):
        how = {"gt": xt, "gated": True, "before": False, "activation": SILU, "cast": False}
        how |= {"offset": 0.0, "eps": 1e-6, "scale": 1.0, "pad": 0, "shift": 0, "apart": 0}
        self.__dict__.update(how | options)
        self.rows, self.groups, self.group_cols = rows, groups, group_cols
        self.cols, self.xt, self.wt = groups * group_cols, xt, xt if wt is None else wt
        self.weighted = wt is not None
        self.rounds = self.cast and self.weighted
        product = promoted(xt, self.wt)
        self.yt = product if self.cast and (self.before or not self.gated) else xt
        self.product_type = product
        self.exact = F64 in (xt, self.wt, self.gt)
        self.rt = F64 if xt == F64 or (self.before and self.exact) else F32
        self.x = random_values(rng, (rows, self.cols), xt, self.scale)
        self.w = random_values(rng, self.cols, wt) if self.weighted else None
        g = 3 * rng.standard_normal((rows, self.cols))
        odd = np.array([0, -0.0, 30, -30, 80, -95, 1000, -1000])
        index = np.arange(self.cols) + 5 * np.arange(rows)[:, None]
        g = np.where(index % 17 == 5, odd[index // 17 % 8], g)
        self.gate = encode(g, self.gt)

    def place(self, extra=0):
        """Rows that lie `pad` elements apart, and of two dimensions if `apart`."""
        cols = self.cols + self.pad + extra
        if self.apart and self.rows % self.apart == 0:
            outer = self.rows // self.apart
            return Layout([self.apart, outer], [cols, self.apart * cols], self.cols)
        return Layout([self.rows], [cols], self.cols)

    def values(self):
        """What is normalized, the activation, 1 / RMS and xhat: of groups [rows, groups, cols]."""
        shape = (self.rows, self.groups, self.group_cols)
        x = wide(self.x, self.xt).reshape(shape)
        if self.gated:
            g = wide(self.gate, self.gt).reshape(shape)
            if not self.exact:
                g = g.astype(np.longdouble)
            act = activate(g, self.activation)
        else:
            act = (np.ones(shape), np.zeros(shape), np.zeros(shape))
        u = x * act[0] if self.before else x.astype(np.longdouble)
        r = 1 / np.sqrt((u * u).mean(-1, keepdims=True) + self.eps)
        w = gain(self.w, self.wt, self.xt, self.cols, self.offset, self.exact)
        return x, u, act, r, w.reshape(shape[1:])

    def cast_to(self, v, dtype, nudge=0.0):
        return wide(encode(v * (1 + nudge), dtype), dtype) if self.rounds else v

    def result(self, nudge=(0.0, 0.0)):
        _, u, act, r, w = self.values()
        n = self.cast_to(u * r, self.xt, nudge[0]) * w
        if not self.before:
            n = self.cast_to(n, self.product_type, nudge[1]) * act[0]
        return n.reshape(self.rows, self.cols), r[..., 0].T

    def arguments(self, gpu, keep, kind, **outputs):
        """A call, and what it reads, in buffers that are kept."""
        layout, gate_layout = self.place(), self.place(extra=8 if self.pad % 8 == 0 else 3)
        keep.append(Buffer(gpu, layout.place(self.x, nan_of(self.xt)), self.shift))
        norm = {"x": keep[-1].address, "x_rows": layout.rows, "x_dtype": self.xt}
        if self.weighted:
            keep.append(Buffer(gpu, self.w, self.shift))
            norm["weight"] = keep[-1].address
        gate = STRUCTS["Gate"](activation=self.activation, before_norm=self.before, dtype=self.gt)
        if self.gated:
            keep.append(Buffer(gpu, gate_layout.place(self.gate, nan_of(self.gt)), self.shift))
            gate.data, gate.rows = keep[-1].address, gate_layout.rows
        norm |= {"w_dtype": self.wt, "rows": self.rows, "cols": self.cols, "eps": self.eps}
        norm |= {"weight_offset": self.offset, "cast_before_weight": self.cast}
        inner = "RmsNormForward" if kind == "RmsNormGated" else "RmsNormBackward"
        own = {"dgate": outputs.pop("dgate")} if "dgate" in outputs else {}
        norm = STRUCTS[inner](**norm, **outputs)
        return STRUCTS[kind](norm=norm, gate=gate, groups=self.groups, **own)

    def one_row(self, row):
        alone = copy.copy(self)
        alone.rows, alone.x, alone.gate = 1, self.x[row : row + 1], self.gate[row : row + 1]
        return alone

    def kind(self):
        """What has a kernel of plain rows of its own."""
        size, shift = RAW[self.xt]().nbytes, self.shift
        apart = self.apart and self.rows % self.apart == 0
        elems = 16 // size
        return not (
            shift % 16
            or self.pad * size % 16
            or self.group_cols % elems
            or apart
            or (self.gated and self.gt != self.xt)
        )


def run_gated(gpu, s, in_place=False, want_rstd=True):
    keep = []
    y_layout = s.place() if in_place else s.place(extra=16 if s.pad % 8 == 0 else 1)
    painted = Buffer(gpu, np.full(y_layout.elements, nan_of(s.yt), RAW[s.yt]), s.shift)
    rb = Buffer(gpu, np.full((s.groups, s.rows), nan_of(s.rt), RAW[s.rt])) if want_rstd else None
    p = s.arguments(gpu, keep, "RmsNormGated", y_dtype=s.yt, rstd=rb and rb.address)
    p.norm.y, p.norm.y_rows = p.norm.x if in_place else painted.address, y_layout.rows
    gpu.check(gpu.k.gated_forward(ctypes.byref(p), None))
    gpu.gated_plan = gpu.k.last_plan()
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    results = [buffer.read() for buffer in keep]
    unwritten = painted.read()
    flat = results[0] if in_place else unwritten
    for buffer, now in list(zip(keep, results))[in_place:]:
        assert (now == buffer.like).all(), "an argument was written"
    y = flat[y_layout.index]
    flat[y_layout.index] = nan_of(s.yt)
    assert (flat == nan_of(s.yt)).all(), "written between the rows"
    return y, rb.read() if rb else None


def check_gated(gpu, s):
    y, rstd = run_gated(gpu, s)
    with np.errstate(all="ignore"):
        want, r = s.result()
        off = ulps(y, encode(want, s.yt), s.yt)
        if s.rounds and not s.exact:  # what is nearly between two numbers may become either
            steps = (0.0, 2.0**-20, -(2.0**-20))
            for nudge in itertools.product(steps, steps):
                off = np.minimum(off, ulps(y, encode(s.result(nudge)[0], s.yt), s.yt))
        # A gate among the denormals has few bits.
        tiny = 0 if s.exact else 2.0**-140 * (1 + np.abs(want))
        if s.before and not s.exact:
            each = np.repeat(r.T, s.group_cols, 1) * np.abs(wide(s.x, s.xt))
            tiny = tiny + 2.0**-140 * each
        close = np.abs(wide(y, s.yt) - want) <= ulp_size(want.astype(np.float64), s.yt) + tiny
        off = np.where(close, 0, off)
        limit = 8 if s.exact else 4 if F32 in (s.yt, s.gt) and s.yt == F32 else 1
        assert off.max() <= limit, f"y is {off.max()} ulp off"
        off = ulps(rstd, encode(r, s.rt), s.rt).max()
        assert off <= (4 if s.before or s.exact or s.xt != F32 else 1), f"rstd is {off} ulp off"
    return y, rstd


QUANT_KINDS = (
    {"block": 0},
    {"block": 64},
    {"block": 0, "scale": 0.013},
    {"block": 128, "column_major": True},
    {"block": 0, "bound": 1.5},
)


def check_gated_quant(gpu, s, y, turn):
    """The codes and scales of y: in one launch, or of scales that span groups in two."""
    kinds = [kind for kind in QUANT_KINDS if s.cols % (kind["block"] or 1) == 0]
    kind, dtype = dict(kinds[turn % len(kinds)]), (E4M3, E5M2, INT8)[turn // len(kinds) % 3]
    written = Codes(gpu, y.shape, dtype, shift=s.shift + turn % 7 // 6, **kind)
    block = written.quant.block
    spans = block != 0 and s.group_cols % block != 0
    keep = []
    p = s.arguments(gpu, keep, "RmsNormGated", y_dtype=s.yt)
    yb = None
    if spans or turn % 3 == 0:
        yb = Buffer(gpu, np.full(y.shape, nan_of(s.yt), RAW[s.yt]), s.shift)
        p.norm.y, p.norm.y_rows = yb.address, dense(*y.shape).rows
    p.norm.quant = written.quant
    launches = gpu.launches()
    gpu.check(gpu.k.gated_forward(ctypes.byref(p), None))
    ran = gpu.k.last_plan().kernel.decode()
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    assert not gpu.simulated or gpu.launches() == launches + 1 + spans
    assert all((buffer.read() == buffer.like).all() for buffer in keep), "an argument was written"
    assert yb is None or (ulps(yb.read(), y, s.yt) == 0).all(), "the norm has other bits"
    keep = gpu.k.gated_plan(0, s.rows, s.groups, s.group_cols, s.xt, gpu.k.device()).keep
    plain = (
        s.kind() and s.yt == s.xt != F32 and written.quant.data % (16 // RAW[s.xt]().nbytes) == 0
    )
    name = "quantize_rows" if spans else "gated_quant_any_rows"
    if keep != NOWHERE and plain and not spans:
        name = ("gated_quant_rows", "gated_quant_shared_rows")[keep]
    # One row is plain wherever the next one would be.
    assert s.rows == 1 or ran == name, f"{ran} ran, not {name}"
    codes, scales = written.read()
    kind.pop("column_major", None)
    kind["block"] = kind["block"] or s.cols
    want, want_scales = quantize(y, s.yt, dtype, **kind)
    broken = np.isnan(decode(y, s.yt)).any(-1)  # of which numpy's minimum makes other scales
    assert (scales == want_scales)[~broken].all() if kind.get("scale") is None else True, "scales"
    assert (codes == want)[~broken].all(), f"{(codes != want)[~broken].sum()} codes differ"


def run_gated_backward(gpu, s, dy, dyt, want=(True, True, True)):
    """(dx, dgate, dweight), of those that are wanted."""
    keep = []
    with np.errstate(all="ignore"):
        _, r = s.result()
    dy_layout = s.place(extra=24 if s.pad % 8 == 0 else 5)
    dyb = Buffer(gpu, dy_layout.place(dy, nan_of(dyt)), s.shift)
    rb = Buffer(gpu, encode(r, s.rt))
    types = (s.xt, s.gt, s.wt)
    shapes = (s.x.shape, s.x.shape, (s.cols,))
    outputs = [
        Buffer(gpu, np.full(shape, nan_of(t), RAW[t]), s.shift) if wanted else None
        for wanted, shape, t in zip(want, shapes, types)
    ]
    dx, dgate, dweight = (b and b.address for b in outputs)
    p = s.arguments(
        gpu,
        keep,
        "RmsNormGatedBackward",
        dy=dyb.address,
        dy_rows=dy_layout.rows,
        dy_dtype=dyt,
        rstd=rb.address,
        dx=dx,
        dweight=dweight,
        dgate=dgate,
    )
    size = gpu.k.gated_workspace(ctypes.byref(p))
    space = Buffer(gpu, np.full(size, 0xFF, np.uint8)) if size else None
    p.norm.workspace = space and space.address
    gpu.check(gpu.k.gated_backward(ctypes.byref(p), None))
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    for buffer in (*keep, dyb, rb):
        assert (buffer.read() == buffer.like).all(), "an argument was written"
    if space:
        space.read()
    return [b and b.read() for b in outputs]


def check_gated_backward(gpu, rng, s, dyt):
    dy = random_values(rng, s.x.shape, dyt)
    dx, dgate, dw = found = run_gated_backward(gpu, s, dy, dyt, (True, s.gated, True))
    exact = s.exact or dyt == F64
    unit = 2.0**-50 if exact else 2.0**-24
    # The activation of 16 bits: see Sigmoid in gated.cuh.
    act_unit = unit * 4 if exact or F32 in (s.xt, s.gt) else 2.0**-18
    with np.errstate(all="ignore"):
        x, u, (act, slope, slope_size), r, w = s.values()
        d = wide(dy, dyt).reshape(x.shape)
        d = d if s.before else d * act
        xhat, g = u * r, d * w
        mean = (g * xhat).mean(-1, keepdims=True)
        size = np.abs(r) * (np.abs(g) + np.abs(xhat) * np.abs(g * xhat).mean(-1, keepdims=True))
        du = r * (g - xhat * mean)
        tiny = 0 if exact else 2.0**-140 * (1 + np.abs(du))
        times, slack = (act, np.abs(act)) if s.before else (1, 1)
        flat = s.x.shape
        compare(
            "dx",
            dx,
            s.xt,
            (du * times).reshape(flat),
            ((12 * unit + 4 * act_unit) * size * slack + tiny).reshape(flat),
        )
        seen = xhat if s.before else s.cast_to(xhat, s.xt)
        tie = 2.0 ** (1 - BITS[s.xt]) if s.rounds else 0
        if s.gated:
            norm = s.cast_to(s.cast_to(xhat, s.xt) * w, s.product_type)
            upstream, v = (du, x) if s.before else (wide(dy, dyt).reshape(x.shape), norm)
            of = (size if s.before else np.abs(upstream)) * np.abs(v) * slope_size
            near = 16 * unit + 8 * act_unit + (0 if s.before else tie)
            compare(
                "dgate",
                dgate,
                s.gt,
                (upstream * v * slope).reshape(flat),
                (near * of + tiny * (1 + np.abs(v))).reshape(flat),
            )
        terms = np.abs(d * seen)
        slack = (10 + np.sqrt(len(x))) * unit * terms.sum(0) + 4 * act_unit * terms.sum(0)
        slack = slack + (0 if s.before else tie * terms.max(0))
        if not exact:
            each = np.abs(r * x * wide(dy, dyt).reshape(x.shape))
            slack = slack + 2.0**-140 * each.sum(0)
        compare("dweight", dw, s.wt, (d * seen).sum(0).reshape(-1), slack.reshape(-1))
    return dy, found


# What is checked


class Sandwich:
    """residual + norm(x), and the norm of that: its tensors, and how a call gets them."""

    def __init__(self, rng, rows, cols, xt, wt, **options):
        how = {"nwt": wt, "st": None, "cast": False, "offset": 0.0, "eps": 1e-6, "scale": 1.0}
        self.__dict__.update(how | {"pad": 0, "shift": 0, "apart": 0} | options)
        self.rows, self.cols, self.xt = rows, cols, xt
        self.w, self.next_w = (
            t if t is None else random_values(rng, cols, t) for t in (wt, self.nwt)
        )
        self.wt = xt if wt is None else wt
        self.nt = promoted(xt, self.wt) if self.cast else xt  # of the norm
        self.nwt = self.nt if self.nwt is None else self.nwt
        self.st = self.nt if self.st is None else self.st  # of the sum
        self.yt = promoted(self.nt, self.nwt) if self.cast else self.nt
        self.rts = [F64 if t == F64 else F32 for t in (xt, self.st)]
        self.exact = F64 in (xt, self.wt, self.st, self.nwt)
        self.x = random_values(rng, (rows, cols), xt)
        self.residual = random_values(rng, (rows, cols), self.st)

    place = Gated.place

    def one_row(self, row):
        alone = copy.copy(self)
        alone.rows, alone.x, alone.residual = (
            1,
            self.x[row : row + 1],
            self.residual[row : row + 1],
        )
        return alone

    def kernel(self, gpu):
        if self.exact:
            return "sandwich_forward_double"
        size = RAW[self.xt]().nbytes
        plain = {self.xt} == {self.nt, self.st, self.yt} and not (
            self.shift % 16
            or (self.rows > 1 and self.pad * size % 16)
            or self.cols * size % 16
            or (self.apart and self.rows % self.apart == 0)
        )
        keep = gpu.plan(False, self.cols, self.xt, self.xt).keep if plain else NOWHERE
        return ("sandwich_rows", "sandwich_shared_rows", "sandwich_any_rows")[keep]


def run_sandwich(gpu, s, in_place="", has_y=True, want_rstd=True):
    """(sum, y, rstd, that of the sum). in_place: "x" is overwritten by y (by the sum, if that is
    all), "residual" by the sum, "both"."""
    layouts = [s.place(extra) for extra in ((0, 16, 32, 48) if s.pad % 8 == 0 else (0, 1, 2, 3))]
    places = {"x": (s.xt, layouts[0]), "residual": (s.st, layouts[1])}
    there = {
        name: Buffer(gpu, layout.place(getattr(s, name), nan_of(dtype)), s.shift)
        for name, (dtype, layout) in places.items()
    }
    weights = [w if w is None else Buffer(gpu, w, s.shift) for w in (s.w, s.next_w)]

    def blank(name, layout, dtype):
        places[name] = (dtype, layout)
        full = np.full(layout.elements, nan_of(dtype), RAW[dtype])
        there[name] = Buffer(gpu, full, s.shift)
        return name

    total, y = "residual", "x"
    if in_place == "x" and not has_y:
        total = "x"
    elif in_place not in ("residual", "both"):
        total = blank("sum", layouts[2], s.st)
    if has_y and in_place not in ("x", "both"):
        y = blank("y", layouts[3], s.yt)
    rstds = [Buffer(gpu, np.full(s.rows, nan_of(t), RAW[t])) if want_rstd else None for t in s.rts]
    how = {"rows": s.rows, "cols": s.cols, "eps": s.eps, "weight_offset": s.offset}
    how |= {"cast_before_weight": s.cast}

    def norm(x, xt, w, wt, rstd, **rest):
        placed = {"x": there[x].address, "x_rows": places[x][1].rows, "x_dtype": xt}
        placed |= {"weight": w and w.address, "w_dtype": wt, "rstd": rstd and rstd.address}
        return STRUCTS["RmsNormForward"](**how, **placed, **rest)

    addends = Addends(
        residual=there["residual"].address, input_dtype=s.nt, residual_rows=layouts[1].rows
    )
    written = {"y": there[y].address, "y_rows": places[y][1].rows} if has_y else {}
    p = STRUCTS["RmsNormSandwich"](
        norm=norm("x", s.xt, weights[0], s.wt, rstds[0], y_dtype=s.nt),
        next=norm(
            total,
            s.st,
            weights[1],
            s.nwt,
            rstds[1] if has_y else None,
            y_dtype=s.yt,
            addends=addends,
            **written,
        ),
        scale=s.scale,
    )
    before = gpu.launches()
    gpu.check(gpu.k.sandwich_forward(ctypes.byref(p), None))
    assert gpu.launches() - before == gpu.simulated, "launches"
    ran = gpu.k.last_plan().kernel.decode()
    assert ran == s.kernel(gpu), f"{ran} ran, not {s.kernel(gpu)}"
    gpu.check(gpu.rt.cudaDeviceSynchronize())
    for w in weights:
        assert w is None or (w.read() == w.like).all(), "a weight was written"
    results = {}
    for name, (dtype, layout) in places.items():
        flat = there[name].read()
        if name not in (total, has_y and y):
            assert (flat == there[name].like).all(), f"{name} was written"
            continue
        results[name] = flat[layout.index]
        flat[layout.index] = nan_of(dtype)
        assert (flat == nan_of(dtype)).all(), "written between the rows"
    rstd, of_sum = (t and t.read() for t in rstds)
    return results[total], results[y] if has_y else None, rstd, of_sum if has_y else None


def check_sandwich(gpu, s):
    """Beside the steps, each of which is held against the formula in fp64."""
    got = total, y, rstd, of_sum = run_sandwich(gpu, s)
    how = {"eps": s.eps, "offset": s.offset, "cast": s.cast}

    def step(x, xt, w, wt, yt):
        # With fp64 among the dtypes all is in fp64, which a step without it is not.
        if s.exact and F64 not in (xt, wt):
            values, r = reference_forward(x, xt, w, wt, *how.values())
            values = encode(np.float64(values), F32 if xt == F32 else yt)
            r = encode(r, F32)
        else:
            values, r = check_forward(gpu, x, xt, w, wt, **how)
        narrowed = F32 if xt == F32 and F64 not in (yt, wt) else yt
        return encode(decode(values, narrowed), yt), r

    with np.errstate(all="ignore"):
        n, want_rstd = step(s.x, s.xt, s.w, s.wt, s.nt)
        compute = np.float64 if F64 in (s.nt, s.st) else np.float32
        want = decode(n, s.nt).astype(compute) + decode(s.residual, s.st).astype(compute)
        want = encode(want.astype(np.float64), s.st)
        if s.scale != 1:
            compute = np.float64 if s.st == F64 else np.float32
            want = decode(want, s.st).astype(compute) * compute(s.scale)
            want = encode(want.astype(np.float64), s.st)
        assert (rstd == want_rstd).all(), "rstd"
        assert (ulps(total, want, s.st) == 0).all(), "the sum"
        want, want_rstd = step(total, s.st, s.next_w, s.nwt, s.yt)
    off = ulps(y, want, s.yt)
    # A sum in fp32 beside narrower x is summed up in another order, which rarely shows.
    most = 0 if s.st == s.xt or s.exact else 1
    assert (ulps(of_sum, want_rstd, s.rts[1]) <= most).all(), "rstd of the sum"
    assert off.max() <= most, f"y is {off.max()} ulps off"
    assert (off != 0).sum() <= 1 + off.size // 10_000, "y differs from that of the steps"
    return got


def boundaries(gpu, backward, x, dy=None, limit=20000):
    """Row lengths around each change of the plan, and a few more."""
    dy = x if dy is None else dy
    step = {F32: 4, F64: 1}.get(x, 8)
    lengths = {1, 2, 3, step - 1, step, step + 1, 96, 100, 2 * step + 1, limit} - {0}

    def kind(cols):
        plan = gpu.plan(backward, cols, dy, x)
        return (
            plan.keep,
            plan.cluster,
            *((plan.vectors, plan.lanes) if plan.keep == REGISTERS else ()),
        )

    last = kind(1)
    for cols in range(2, limit + 1):
        if (cols - 1) % step:
            continue  # plans change where one more vector begins
        if kind(cols) != last:
            lengths |= {cols - 1, cols}
        last = kind(cols)
    return sorted(lengths)


def sample(rng, items, count):
    return (
        items
        if len(items) <= count
        else [items[i] for i in sorted(rng.choice(len(items), count, replace=False))]
    )


def forward_mixes(gpu, rng, quick):
    for xt in (F32, F16, BF16):
        for wt in (None, F32, F16, BF16):
            lengths = boundaries(gpu, False, xt)
            for offset, cast in ((0.0, False), (1.0, False), (0.0, True), (1.0, True)):
                for cols in sample(rng, lengths, 6 if quick else 16):
                    rows = int(rng.integers(1, 8))
                    with Case(
                        op="forward",
                        x=NAMES[xt],
                        w=wt,
                        offset=offset,
                        cast=cast,
                        rows=rows,
                        cols=cols,
                    ):
                        w = None if wt is None else random_values(rng, cols, wt)
                        x = random_values(rng, (rows, cols), xt, 10.0 ** rng.integers(-3, 3))
                        check_forward(
                            gpu,
                            x,
                            xt,
                            w,
                            wt,
                            offset=offset,
                            cast=cast,
                            want_rstd=bool(rng.integers(2)),
                        )
    for xt, wt in ((F64, F64), (F64, F32), (F32, F64), (BF16, F64), (F64, None)):
        for cols, cast in ((1, False), (33, True), (700, False), (5000, True)):
            with Case(op="forward", x=NAMES[xt], w=wt, cast=cast, cols=cols):
                w = None if wt is None else random_values(rng, cols, wt)
                x = random_values(rng, (5, cols), xt)
                check_forward(gpu, x, xt, w, wt, cast=cast, offset=0.5 * (wt is not None))


def forward_every_length(gpu, rng, quick):
    """Every kernel boundary of the three x dtypes, with the weight's dtype drawn."""
    for xt in (F32, F16, BF16):
        for cols in sample(rng, boundaries(gpu, False, xt), 30 if quick else 1000):
            with Case(op="forward", x=NAMES[xt], cols=cols):
                x = random_values(rng, (2, cols), xt)
                check_forward(gpu, x, xt, random_values(rng, cols, xt), xt)
                wide = cols * RAW[xt]().nbytes % 16 != 0  # not plain
                assert gpu.ran(gpu.plan(False, cols, xt, xt, rows=2, wide=wide)), "last_plan"


def layouts(rows, cols, pad):
    """Rows of 1 to 4 dimensions; `pad` elements between rows."""
    c = cols + pad
    yield Layout([rows], [c], cols)
    a, b = 2, rows // 2
    yield Layout([a, b], [c, a * c], cols)  # transposed
    yield Layout([2, b // 2, 2], [2 * b * c, 2 * c, c], cols)
    yield Layout([2, 2, b // 4, 2], [c, 2 * c, 8 * c, 4 * c], cols)


def invariance(gpu, rng, quick):
    """Strides, alignment, the batch and writing in place change no bit."""
    for xt, wt, cast in (
        (BF16, BF16, False),
        (F32, F32, False),
        (F16, F32, True),
        (F32, BF16, False),
    ):
        size = RAW[xt]().nbytes
        lengths = (8, 40, 72, 128, 256, 500, 512, 1000, 1536, 4096, 5120, 9000, 17000, 40000)
        for cols in lengths[::2] if quick else lengths:
            rows = 16 if cols < 2000 else 8
            x, w = random_values(rng, (rows, cols), xt), random_values(rng, cols, wt)
            with Case(op="invariance", x=NAMES[xt], w=NAMES[wt], cast=cast, cols=cols):
                y, rstd = check_forward(gpu, x, xt, w, wt, cast=cast)

                def same(**how):
                    y2, rstd2, _ = run_forward(gpu, x, xt, w, wt, cast=cast, **how)
                    assert (y2 == y).all() and (rstd2 == rstd).all(), f"other bits with {how}"

                for layout in layouts(rows, cols, 64):
                    same(x_layout=layout)
                    same(y_layout=layout)
                same(x_layout=Layout([rows], [cols + 3], cols))
                same(y_layout=Layout([rows], [cols + 5], cols))
                for shift in ((size, 0, 0), (0, RAW[wt]().nbytes, 0), (0, 0, 4), (8, 8, 8)):
                    same(shift=shift)
                if not cast or promoted(xt, wt) == xt:
                    same(in_place=True)
                    same(in_place=True, x_layout=Layout([rows], [cols + 1], cols))
                for row in (0, rows - 1):
                    y1, r1, _ = run_forward(gpu, x[row : row + 1], xt, w, wt, cast=cast)
                    assert (y1[0] == y[row]).all() and r1[0] == rstd[row], (
                        "one row alone has other bits"
                    )


def extremes(gpu, rng, quick):
    """Rows whose squares overflow or vanish, subnormal ones, NaN, Inf; beside rows without."""
    for xt in (F32, BF16, F16, F64):
        top = {F32: 3e38, BF16: 3e38, F16: 65504.0, F64: 1e300}[xt]
        low = {F32: 1e-44, BF16: 9.2e-41, F16: 6e-8, F64: 1e-320}[xt]
        lengths = (1, 5, 64, 200, 300, 512, 1000, 2048, 5000, 9000, 40000)
        for cols in lengths[1:9] if quick else lengths:
            for wt, eps, cast in ((xt, 1e-6, False), (None, 0.0, False), (F32, 1e-300, True)):
                rows = []
                for scale in (1.0, top / 100, top**0.5, low * 50, low, low**0.5, 0.0):
                    row = rng.standard_normal(cols) * scale
                    rows.append(np.clip(row, -top, top))
                for special in (np.inf, -np.inf, np.nan):
                    row = rng.standard_normal(cols)
                    row[rng.integers(cols)] = special
                    rows.append(row)
                mixed = rng.standard_normal(cols) * top ** rng.uniform(-1, 0.9, cols)
                rows.append(mixed)
                rows.append(np.full(cols, 1 / 3))
                order = rng.permutation(len(rows))
                x = encode(np.array(rows)[order], xt)
                w = None if wt is None else random_values(rng, cols, wt)
                with Case(op="extremes", x=NAMES[xt], w=wt, eps=eps, cast=cast, cols=cols):
                    y, _ = check_forward(gpu, x, xt, w, wt, eps=eps, cast=cast)
                    if not cast or xt in (F32, F64):
                        y2, _, yt = run_forward(
                            gpu, x, xt, w, wt, eps=eps, cast=cast, in_place=True
                        )
                        nan = np.isnan(decode(y, yt))
                        assert ((y2 == y) | nan).all() and (
                            np.isnan(decode(y2, yt)) == nan
                        ).all(), "other bits in place"
                # dy small enough for products with the greatest rstd
                dy = random_values(rng, x.shape, xt)
                with Case(op="extremes backward", x=NAMES[xt], w=wt, eps=eps, cols=cols):
                    values = decode(x, xt)
                    finite = [
                        i
                        for i in range(len(x))
                        if np.isfinite(values[i]).all() and np.any(values[i])
                    ]
                    keep = [
                        i for i in finite if xt == F16 or np.abs(decode(x[i], xt)).max() > 1e-30
                    ]
                    check_backward(gpu, dy[keep], xt, x[keep], xt, w, wt, eps=eps)
                    rstd = encode(
                        reference_forward(x, xt, None, xt, eps, 0, False)[1],
                        F64 if xt == F64 else F32,
                    )
                    dx, _ = run_backward(gpu, dy, xt, x, xt, w, wt, rstd, eps=eps)
                    for i in range(len(x)):  # a row with NaN or Inf is all NaN, and spoils no other
                        values = decode(x[i], xt)
                        if not np.isfinite(values).all():
                            assert np.isnan(decode(dx[i], xt)).all(), "dx of a row with NaN or Inf"
                        elif i in keep:
                            assert not np.isnan(decode(dx[i], xt)).any(), (
                                "NaN spread to another row"
                            )


def backward_mixes(gpu, rng, quick):
    kinds = (F32, F16, BF16)
    for xt in kinds:
        for dyt in kinds:
            for wt in (None,) + kinds:
                lengths = boundaries(gpu, True, xt, dyt)
                for offset, cast in ((0.0, False), (1.0, True)):
                    for cols in sample(rng, lengths, 4 if quick else 12):
                        rows = int(rng.integers(1, 12))
                        with Case(
                            op="backward",
                            dy=NAMES[dyt],
                            x=NAMES[xt],
                            w=wt,
                            offset=offset,
                            rows=rows,
                            cols=cols,
                        ):
                            w = None if wt is None else random_values(rng, cols, wt)
                            x, dy = (
                                random_values(rng, (rows, cols), xt),
                                random_values(rng, (rows, cols), dyt),
                            )
                            check_backward(gpu, dy, dyt, x, xt, w, wt, offset=offset, cast=cast)
    for dyt, xt, wt in (
        (F64, F64, F64),
        (F64, F32, F32),
        (F32, F64, F64),
        (F32, F32, F64),
        (F64, F64, None),
    ):
        for rows, cols in ((1, 1), (9, 33), (70, 130), (3, 3000)):
            with Case(op="backward", dy=NAMES[dyt], x=NAMES[xt], w=wt, rows=rows, cols=cols):
                w = None if wt is None else random_values(rng, cols, wt)
                x, dy = random_values(rng, (rows, cols), xt), random_values(rng, (rows, cols), dyt)
                check_backward(gpu, dy, dyt, x, xt, w, wt)
    for rows, cols in ((1, 300_001), (20_000, 1)):  # each addition would round to the same side
        with Case(op="backward", what="equal terms", rows=rows, cols=cols):
            x, dy, w = (encode(np.full((rows, cols), v), F64) for v in (0.1, 0.3, 0.7))
            check_backward(gpu, dy, F64, x, F64, w[0], F64)


def backward_every_length(gpu, rng, quick):
    for xt in (F32, BF16):
        for cols in sample(rng, boundaries(gpu, True, xt), 20 if quick else 1000):
            with Case(op="backward", x=NAMES[xt], cols=cols):
                x, dy = random_values(rng, (5, cols), xt), random_values(rng, (5, cols), xt)
                check_backward(gpu, dy, xt, x, xt, random_values(rng, cols, xt), xt)
                assert gpu.ran(gpu.plan(True, cols, xt, xt, rows=5)), "last_plan"


def backward_forms(gpu, rng, quick):
    """Masks, strides, expanded dy, alignment, and the same bits on every run."""
    for xt, dyt, wt, cast in (
        (BF16, BF16, BF16, False),
        (F32, F32, F32, False),
        (F16, F32, F32, True),
        (F32, BF16, F16, False),
    ):
        size = RAW[xt]().nbytes
        lengths = (8, 40, 72, 128, 256, 500, 512, 1000, 1536, 4096, 5120, 9000, 17000)
        for cols in lengths[::2] if quick else lengths:
            rows = 48 if cols < 200 else 16
            x, w = random_values(rng, (rows, cols), xt), random_values(rng, cols, wt)
            dy = random_values(rng, (rows, cols), dyt)
            with Case(
                op="backward forms", dy=NAMES[dyt], x=NAMES[xt], w=NAMES[wt], cast=cast, cols=cols
            ):
                dx, dw = check_backward(gpu, dy, dyt, x, xt, w, wt, cast=cast)
                rstd = encode(reference_forward(x, xt, None, xt, 1e-6, 0, False)[1], F32)

                def same(**how):
                    dx2, dw2 = run_backward(gpu, dy, dyt, x, xt, w, wt, rstd, cast=cast, **how)
                    assert dx2 is None or (dx2 == dx).all(), f"other dx with {how}"
                    assert dw2 is None or (dw2 == dw).all(), f"other dweight with {how}"

                check_backward(
                    gpu,
                    dy,
                    dyt,
                    x,
                    xt,
                    w,
                    wt,
                    cast=cast,
                    dresidual=random_values(rng, (rows, cols), xt),
                    x_layout=Layout([rows], [cols + int(rng.integers(5))], cols),
                )
                gpu.option("order", "random:7")
                same()
                gpu.option("order", "reverse")
                same()
                gpu.option("order", "seq")
                same(want=(True, False))
                same(want=(False, True))
                for layout in layouts(rows, cols, 64):
                    same(x_layout=layout)
                    same(dy_layout=layout)
                same(
                    x_layout=Layout([rows], [cols + 3], cols),
                    dy_layout=Layout([rows], [cols + 1], cols),
                )
                for shift in (
                    (RAW[dyt]().nbytes, 0, 0, 0),
                    (0, size, 0, 0),
                    (0, 0, RAW[wt]().nbytes, 0),
                    (0, 0, 0, size),
                    (8, 8, 8, 8),
                ):
                    same(shift=shift)
                row = rows // 2
                dx1, _ = run_backward(
                    gpu,
                    dy[row : row + 1],
                    dyt,
                    x[row : row + 1],
                    xt,
                    w,
                    wt,
                    rstd[row : row + 1],
                    cast=cast,
                )
                assert (dx1[0] == dx[row]).all(), "dx of one row alone has other bits"
                dy = np.broadcast_to(dy[0], dy.shape)
                check_backward(
                    gpu, dy, dyt, x, xt, w, wt, cast=cast, dy_layout=Layout([rows], [0], cols)
                )
    with Case(op="dweight of a rounded xhat"):
        x, one = random_values(rng, (1, 512), BF16), encode(np.ones((1, 512)), F32)
        _, dw = check_backward(gpu, one, F32, x, BF16, encode(np.ones(512), F32), F32, cast=True)
        assert (dw & 0xFFFF == 0).all(), "dweight did not use the rounded xhat"


def many_rows(gpu, rng, quick):
    """More rows than the grid holds."""
    for xt, rows, cols in (
        (BF16, 65537, 8),
        (F32, 65537, 1),
        (F16, 20011, 24),
        (BF16, 3001, 128),
        (F32, 1301, 576),
    ):
        if quick:
            rows //= 4
        with Case(op="many rows", x=NAMES[xt], rows=rows, cols=cols):
            x, w = random_values(rng, (rows, cols), xt), random_values(rng, cols, xt)
            y, _ = check_forward(gpu, x, xt, w, xt)
            if cols == 8:
                y1, _, _ = run_forward(gpu, x[rows // 2 : rows // 2 + 1], xt, w, xt)
                assert (y1[0] == y[rows // 2]).all(), "one row alone has other bits"
            check_backward(gpu, random_values(rng, (rows, cols), xt), xt, x, xt, w, xt)
    with Case(op="longest rows"):
        cols = 1_000_003
        x, w = random_values(rng, (2, cols), BF16), random_values(rng, cols, F32)
        check_forward(gpu, x, BF16, w, F32)
        check_forward(gpu, np.full((1, cols), encode(np.array([1 / 3]), F32)[0]), F32, None, None)
        check_backward(gpu, random_values(rng, x.shape, BF16), BF16, x, BF16, w, F32)


def shared_rows(gpu, rng, quick):
    """Rows in shared memory, of one block and of each size of cluster; any order, and in place."""
    for backward in (False, True):
        for xt, dyt, wt in ((BF16, BF16, BF16), (F32, F32, F32), (F16, F32, F32)):
            seen = set()
            lengths = [5000, 9001, 20003, 40000, 70008, 100_000, 131_072, 200_000, 300_001, 400_000]
            for cols in lengths:
                plan = gpu.plan(backward, cols, dyt, xt)
                kind = (plan.keep, plan.cluster, plan.slice * plan.cluster == cols)
                if kind in seen and quick:
                    continue
                seen.add(kind)
                rows = 5 if backward else 3
                with Case(
                    op="shared rows",
                    backward=backward,
                    x=NAMES[xt],
                    dy=NAMES[dyt],
                    w=NAMES[wt],
                    cols=cols,
                    cluster=plan.cluster,
                ):
                    x, w, dy = (
                        random_values(rng, (rows, cols), xt),
                        random_values(rng, cols, wt),
                        random_values(rng, (rows, cols), dyt),
                    )
                    x[1] = encode(
                        decode(x[1], xt) * (3e4 if xt == F16 else 1e25), xt
                    )  # out of the fast path's range, not in fp16
                    if not backward:
                        y, rstd = check_forward(gpu, x, xt, w, wt)
                        for order in ("reverse", "random:3"):
                            gpu.option("order", order)
                            y2, rstd2, _ = run_forward(gpu, x, xt, w, wt, in_place=True)
                            assert (y2 == y).all() and (rstd2 == rstd).all(), (
                                f"other bits in place, {order}"
                            )
                        gpu.option("order", "seq")
                        y1, _, _ = run_forward(gpu, x[1:2], xt, w, wt)
                        assert (y1[0] == y[1]).all(), "one row alone has other bits"
                    else:
                        dx, dw = check_backward(gpu, dy, dyt, x, xt, w, wt)
                        rstd = encode(reference_forward(x, xt, None, xt, 1e-6, 0, False)[1], F32)
                        gpu.option("order", "reverse")
                        dx2, dw2 = run_backward(gpu, dy, dyt, x, xt, w, wt, rstd)
                        gpu.option("order", "seq")
                        assert (dx2 == dx).all() and (dw2 == dw).all(), (
                            "other bits in reverse order"
                        )


def unrounded(gpu, rng, quick):
    """Sums that are normalized before they are rounded: rows in registers, in shared memory, of
    clusters, and read twice; in place, misaligned, one of them rescued."""
    lengths = [1, 7, 33, 128, 300, 1000, 1024, 4097, 9001]
    cases = [(cols, t) for cols in lengths for t in (BF16, F16)]
    cases += [(20003, BF16), (70008, F16), (300_001, BF16), (600_004, BF16), (1_000_003, F16)]
    for n, (cols, t) in enumerate(cases):
        wt = (t, F32, None, F16, F64)[n % 5 if cols < 10_000 else n % 2]
        cast, offset = n % 3 == 0 and wt is not None, float(n % 3 == 1)
        rows = 5 if cols < 10_000 else 2
        x, residual = (random_values(rng, (rows, cols), t) for _ in range(2))
        w = None if wt is None else random_values(rng, cols, wt)
        if t == BF16:  # out of the fast path's range
            x[1] = encode(decode(x[1], t) * 1e25, t)
            residual[-1] = encode(decode(residual[-1], t) * 1e-24, t)
            x[-1] = encode(decode(x[-1], t) * 1e-24, t)
        with Case(op="unrounded", x=NAMES[t], w=wt and NAMES[wt], cols=cols, cast=cast):
            how = {"cast": cast, "offset": offset}
            got = check_unrounded(gpu, x, residual, t, w, wt, **how)
            for order in ("reverse", "random:3"):
                gpu.option("order", order)
                layout = {"pad": n % 3, "shift": n % 2}
                again = check_unrounded(gpu, x, residual, t, w, wt, in_place=True, **how, **layout)
                assert all((a == b).all() for a, b in zip(got, again)), f"in place, {order}"
            gpu.option("order", "seq")
            one = run_unrounded(gpu, x[1:2], residual[1:2], t, w, wt, **how)
            assert all((a[1] == b[0]).all() for a, b in zip(got, one)), "a row alone"


def quantized(gpu, rng, quick):
    """The bits of the norm, then the steps one by one: every format, way of scales and kernel."""
    lengths = (1, 7, 64, 96, 128, 384, 576, 1000, 1024, 4096, 5120, 16384, 40960, 300_032)
    turn = 0
    for xt, wt in ((BF16, BF16), (F32, F32), (F16, F32), (BF16, None)):
        for cols in lengths:
            rows = 37 if cols < 600 else 3
            x = random_values(rng, (rows, cols), xt, 3.0)
            w = None if wt is None else random_values(rng, cols, wt)
            if rows > 2:
                x[1] = encode(decode(x[1], xt) * (1e25 if xt != F16 else 1e-4), xt)
                x[2] = 0
            for dtype in (E4M3, E5M2, INT8):
                for kind in (
                    {"block": 0},
                    {"block": 0, "bound": 1.5},
                    {"block": 64},
                    {"block": 128, "column_major": True},
                    {"block": 0, "scale": 0.013},
                ):
                    turn += 1
                    if (
                        kind["block"]
                        and cols % kind["block"]
                        or (quick and cols > 600 and turn % 3)
                    ):
                        continue
                    cast, with_add = turn % 4 == 1 and wt is not None, turn % 2 == 0
                    offset = 1.0 if turn % 4 == 3 and wt is not None else 0.0
                    with Case(
                        op="quantized",
                        x=NAMES[xt],
                        cols=cols,
                        dtype=dtype,
                        cast=cast,
                        add=with_add,
                        offset=offset,
                        **kind,
                    ):
                        residual = (
                            random_values(rng, x.shape, F32 if turn % 8 == 0 else xt),
                            F32 if turn % 8 == 0 else xt,
                        )
                        how = kind | {"cast": cast, "offset": offset}
                        unrounded = with_add and turn % 3 == 0 and xt != F32 and residual[1] == xt
                        codes, scales, norm, total = run_quant(
                            gpu,
                            x,
                            xt,
                            w,
                            wt,
                            dtype,
                            keep_norm=turn % 5 == 0,
                            shift=turn % 7 % 3,
                            residual=residual if with_add else None,
                            unrounded=unrounded,
                            **how,
                        )
                        source, st = (total, residual[1]) if with_add else (x, xt)
                        if with_add:
                            sums = decode(x, xt).astype(np.float32) + decode(
                                residual[0], st
                            ).astype(np.float32)
                            assert (total == encode(sums.astype(np.float64), st)).all(), "sum"
                        options = {"cast": cast, "offset": offset}
                        if unrounded:
                            y, _, _, yt = run_unrounded(gpu, x, residual[0], xt, w, wt, **options)
                        else:
                            y, _, yt = run_forward(
                                gpu, source, st, w, wt, want_rstd=False, **options
                            )
                        narrow = promoted(xt, wt if w is not None else xt) if cast else xt
                        if (
                            narrow != yt
                        ):  # a wider residual: its norm is rounded to the input's dtype, once
                            continue
                        if norm is not None:
                            assert (norm == y).all(), "norm"
                        want, want_scales = quantize(
                            y,
                            yt,
                            dtype,
                            kind["block"] or cols,
                            kind.get("scale"),
                            kind.get("bound", np.inf),
                        )
                        assert (scales == want_scales).all(), "scales"
                        assert (codes == want).all(), f"{(codes != want).sum()} codes differ"


def rope(gpu, rng, quick):
    """q and k in one call: plain rows of each form, then all that the others are for."""
    GPU[:] = [gpu]

    def both(kernel, backward_kernel, dyt, tokens, heads, *shape, **how):
        with Case(op="rope", tokens=tokens, heads=heads, shape=shape, dy=dyt, **how):
            sides = [Rotary(rng, tokens, n, *shape, **how) for n in heads]
            found = check_rope(gpu, *sides)
            together = gpu.rope_plan
            assert not kernel or together.kernel.decode() == kernel, f"{together.kernel} ran"
            assert not kernel or gpu.rope_launches in (1, None), "more than one launch"
            for s, (y, _) in zip(sides, found):  # alone, and in place
                s.in_place = s.yt == s.xt
                ((alone, _),) = run_rope(gpu, [s])
                assert (ulps(alone, y, s.yt) == 0).all(), "other bits alone"
            check_rope_backward(gpu, rng, dyt, *sides)
            ran = gpu.rope_plan.kernel.decode()
            assert not backward_kernel or ran == backward_kernel, f"{ran} ran"
            assert not backward_kernel or gpu.rope_launches in (1, 2, None), "too many launches"

    plain, any_rows = (
        ("rope_rows", "rope_backward_rows"),
        ("rope_any_rows", "rope_backward_any_rows"),
    )
    turn = 0
    # Plain: halves in a thread's chunks; then partial ones and lengths that are no power of two.
    shapes = [(16, 8), (32, 16), (64, 32), (128, 64), (256, 128)]
    shapes += [(128, 32), (256, 32), (256, 64), (96, 48), (80, 40), (192, 96), (64, 8), (160, 48)]
    for xt, types in ((BF16, (BF16, F32, F16)), (F16, (F16, F32, BF16)), (F32, (F32, BF16, F16))):
        for each, cast in ((False, False), (True, True), (True, False), (False, True)):
            for cols, pairs in shapes if not quick else sample(rng, shapes, 4):
                turn += 1
                how = {"layout": ("dense", "fused", "heads")[turn % 3], "each": each, "cast": cast}
                how |= {
                    "batches": 1 + turn % 2,
                    "cached": turn % 4 == 0,
                    "at": types[turn // 2 % 3],
                }
                how |= {"offset": 1.0 if turn % 5 == 0 else 0.0, "interleaved": turn % 6 == 5}
                how |= {"axes": 3 if turn % 7 in (1, 5) else 1}
                heads, tokens = (
                    ((4, 1), (3, 2), (8, 2), (1, 1))[turn % 4],
                    (2, 6, 34)[turn // 4 % 3],
                )
                both(*plain, xt, tokens, heads, cols, pairs, xt, (xt, None)[turn % 7 == 0], **how)
    both(*plain, BF16, 4, (2, 1), 512, 256, BF16, BF16)
    both(*plain, F32, 4, (2,), 256, 128, F32, F32, cached=True)
    # All others.
    for n in range(24 if quick else 96):
        xt = (BF16, F32, F16)[n % 3]
        cols, pairs = ((64, 32), (10, 3), (128, 64), (33, 16), (96, 20), (7, 2), (512, 256))[n % 7]
        how = {"interleaved": n % 2 == 1, "cached": n % 3 == 1, "axes": (1, 3)[n % 5 == 2]}
        how |= {"across": n % 4 == 2, "each": n // 2 % 2 == 1, "cast": n // 3 % 2 == 1}
        how |= {"at": (xt, F32, BF16, F64)[n // 4 % 4], "shift": (0, 8)[n % 11 == 5]}
        how |= {"layout": ("dense", "odd", "fused", "heads")[n // 5 % 4], "batches": 1 + n // 7 % 2}
        how |= {"weights": 2 if n % 6 == 1 else 1, "offset": 1.0 if n % 7 == 3 else 0.0}
        wt = (xt, F32, None, BF16)[n // 2 % 4]
        how["across"] = how["across"] and how["weights"] == 1
        both(
            None, None, (xt, F32)[n % 2], (2, 6, 10)[n // 3 % 3], (4, 2), cols, pairs, xt, wt, **how
        )
    both(*any_rows, BF16, 6, (4, 2), 64, 32, BF16, BF16, interleaved=True, at=F64)
    both(*any_rows, F32, 6, (6, 6), 64, 32, BF16, BF16, weights=6)
    both(*any_rows, BF16, 5, (32, 32), 128, 64, BF16, BF16, across=True, interleaved=True)
    both(
        *any_rows, BF16, 2, (70,), 128, 64, BF16, BF16, across=True
    )  # in shared memory, by the norm
    both(*any_rows, F32, 2, (160,), 128, 64, F32, F32, across=True)  # of a cluster
    both(*any_rows, F32, 4, (2, 2), 512, 256, F32, F32)
    for xt, wt, at in ((F64, F64, F64), (F32, F64, F32), (F64, F32, BF16), (BF16, F64, F64)):
        for n in range(2 if quick else 6):
            how = {"interleaved": n % 2 == 0, "each": n % 3 == 1, "cast": n % 2 == 1, "at": at}
            how |= {"across": n == 4, "weights": 2 if n == 1 else 1, "axes": 1 + n % 3}
            both(None, None, (xt, F64)[n % 2], 6, (2, 4), 40, 12, xt, wt, **how)
    # Two sides of kernels that differ, in dtype or in layout.
    for other in ({"xt": F32}, {"interleaved": True}, {"cols": 256}, {"cols": 96, "pairs": 48}):
        with Case(op="rope", other=other):
            shape = {"cols": 128, "pairs": 64, "xt": BF16, "wt": BF16}
            sides = [Rotary(rng, 6, 4, **shape), Rotary(rng, 6, 2, **(shape | other))]
            check_rope(gpu, *sides)
            if "xt" not in other:
                check_rope_backward(gpu, rng, BF16, *sides)
    # Rows out of the fast path's range, and what is no number.
    for xt, scale in ((BF16, 1e25), (BF16, 1e-25), (F32, 1e30), (F32, 1e-30), (F16, 1e-6)):
        for how in ({}, {"interleaved": True}, {"pairs": 16}, {"pairs": 16, "each": True}):
            with Case(op="rope", x=NAMES[xt], scale=scale, **how):
                s = Rotary(rng, 6, 4, **({"cols": 64, "pairs": 32, "xt": xt, "wt": xt} | how))
                s.eps = 0.0
                for row in (1, 2, 23):
                    s.x[row] = encode(decode(s.x[row], xt) * scale, xt)
                if not quick or xt != BF16:
                    check_rope_backward(gpu, rng, xt, s)
                s.x[5, 3], s.x[6, 9] = encode(np.array([np.nan, np.inf]), xt)
                check_rope(gpu, s)
    # More rows than the grid holds.
    for how in ({}, {"interleaved": True}, {"pairs": 32}):
        with Case(op="rope", many=True, **how):
            shape = {"cols": 128, "pairs": 64, "xt": BF16, "wt": BF16} | how
            tokens = 400 if quick else 1501
            sides = [Rotary(rng, tokens, 4, **shape), Rotary(rng, tokens, 1, **shape)]
            check_rope(gpu, *sides)
            check_rope_backward(gpu, rng, BF16, *sides)


def gated(gpu, rng, quick):
    """Each kernel and what it is laid out by; orders, activations, roundings, mixes of dtypes."""

    def both(dyt, rows, groups, cols, xt, wt, kernels=None, **how):
        with Case(
            op="gated", rows=rows, groups=groups, cols=cols, x=NAMES[xt], w=wt, dy=dyt, **how
        ):
            s = Gated(rng, rows, groups, cols, xt, wt, **how)
            y, rstd = check_gated(gpu, s)
            ran = gpu.gated_plan.kernel.decode()
            if not s.exact:
                keep = gpu.k.gated_plan(0, rows, groups, cols, xt, gpu.k.device()).keep
                name = "gated_any_rows"
                if keep != NOWHERE and s.kind() and s.yt == s.xt:
                    name = ("gated_rows", "gated_shared_rows")[keep]
                assert ran == name, f"{ran} ran, not {name}"
            if not s.exact:
                check_gated_quant(gpu, s, y, Case.passed)
            if s.yt == s.xt:
                other, _ = run_gated(gpu, s, in_place=True, want_rstd=False)
                assert (ulps(other, y, s.yt) == 0).all(), "other bits in place"
            for row in {0, rows - 1}:
                one, of_one = run_gated(gpu, s.one_row(row))
                assert (ulps(one[0], y[row], s.yt) == 0).all(), "one row alone has other bits"
                assert (of_one[:, 0] == rstd[:, row]).all(), "rstd of one row alone"
            dy, found = check_gated_backward(gpu, rng, s, dyt)
            gpu.option("order", "reverse")
            ways = [(True, s.gated, True), (True, False, False), (False, False, True)]
            ways += [(False, True, False)] * s.gated
            for want in ways:
                again = run_gated_backward(gpu, s, dy, dyt, want)
                for a, b in zip(found, again):
                    assert b is None or (a == b).all(), f"other bits of what is wanted, {want}"
            gpu.option("order", "random:5")
            (one, _, _) = run_gated_backward(gpu, s.one_row(0), dy[:1], dyt, (True, False, False))
            assert (one[0] == found[0][0]).all(), "dx of one row alone has other bits"
            if s.kind() and dyt == xt and not s.exact:  # the kernel for all others
                s.apart = 2 if rows % 2 == 0 else 0
                s.pad, s.shift = (s.pad, s.shift) if s.apart else (s.pad + 1, 0)
                other, other_rstd = run_gated(gpu, s)
                assert (ulps(other, y, s.yt) == 0).all(), "other bits of rows that are not plain"
                assert (other_rstd == rstd).all(), "rstd of rows that are not plain"
                check_gated_quant(gpu, s, y, Case.passed)
                again = run_gated_backward(gpu, s, dy, dyt, (True, s.gated, True))
                for a, b in zip(found, again):
                    assert a is None or (a == b).all(), "other gradients of rows that are not plain"

    turn = 0
    lengths = (8, 64, 128, 256, 264, 512, 1024, 2048, 4096)
    shared, clusters = (4104, 8192, 12_000), (20_000, 70_000)
    for xt in (BF16, F32, F16):
        types = (xt, F32 if xt != F32 else BF16)
        for cols in lengths + shared:
            for before in (False, True):
                turn += 1
                if quick and cols > 600 and turn % 3 == 0:
                    continue
                how = {"before": before, "activation": SIGMOID if turn % 3 == 1 else SILU}
                how |= {"cast": turn % 4 > 1, "offset": 1.0 if turn % 5 == 0 else 0.0}
                how |= {"pad": 16 * (turn % 3)}
                groups = (1, 4, 8)[turn % 3] if cols < 2000 else 1 + turn % 2
                rows = (37 if cols <= 64 else 12 if cols <= 512 else 4) // (1 + (cols > 4096))
                wt = None if turn % 7 == 0 else types[turn // 3 % 2]
                both(xt, rows, groups, cols, xt, wt, **how)
        for cols in clusters[: 1 if quick and xt == F16 else 2]:
            turn += 1
            both(xt, 2, 1, cols, xt, xt, before=turn % 2 == 0, cast=turn % 3 == 0)
        both(xt, 3, 8, 128, xt, xt, gated=False)
        both(xt, 20, 4, 64, xt, types[1], gated=False, cast=True)
        both(xt, 2, 2, 4400, xt, xt, gated=False, before=True)
    # All others: dtypes, alignment, dimensions of rows, lengths that are no whole chunks.
    for n in range(20 if quick else 90):
        xt, gt, dyt = ((BF16, F32, F16)[k] for k in (n % 3, n // 3 % 3, n // 2 % 3))
        wt = (xt, F32, None, BF16)[n // 4 % 4]
        how = {"gt": gt, "before": n % 2 == 1, "activation": n // 5 % 2, "cast": n // 7 % 2 == 1}
        how |= {"pad": (0, 3, 16)[n // 2 % 3], "shift": (0, 8)[n % 11 == 5]}
        how |= {"apart": 2 if n % 4 == 2 else 0, "offset": 1.0 if n % 6 == 2 else 0.0}
        cols = (64, 33, 128, 5, 300, 1, 1000, 96, 600)[n % 9]
        groups = (1, 3, 8, 2)[n // 2 % 4]
        both(dyt, (6, 1, 10, 40)[n // 3 % 4], groups, cols, xt, wt, **how)
    both(F32, 2, 1, 5001, BF16, BF16, gt=F32)
    both(BF16, 2, 2, 9001, F32, BF16, before=True)
    both(BF16, 1, 1, 50_001, BF16, F32, cast=True)
    for n, (xt, wt, gt, dyt) in enumerate(
        (
            (F64, F64, F64, F64),
            (F32, F64, F32, F32),
            (BF16, BF16, F64, BF16),
            (F64, F32, BF16, F64),
            (BF16, F64, BF16, F32),
            (F32, None, F32, F64),
        )
    ):
        for before in (False, True):
            how = {"gt": gt, "before": before, "activation": n % 2, "cast": n // 2 % 2 == before}
            both(dyt, 7, (1, 3)[n % 2], (40, 33, 300)[n % 3], xt, wt, pad=n % 2, **how)
    # Rows out of the fast path's range.
    for xt, scale in ((BF16, 1e25), (BF16, 1e-25), (F32, 1e28), (F32, 1e-28), (F16, 1e-6)):
        for how in ({}, {"before": True}, {"before": True, "pad": 3}, {"pad": 3}):
            for cols in (64, 1032, 4400):
                with Case(op="gated", x=NAMES[xt], scale=scale, cols=cols, **how):
                    s = Gated(rng, 6, 2, cols, xt, xt, **how)
                    s.eps = 0.0
                    # What is left of such rows by a gate near zero is a matter of its few bits.
                    s.gate = encode(rng.uniform(-3, 3, s.gate.shape), s.gt)
                    for row in (1, 2, 5):
                        s.x[row, : 2 * cols] = encode(decode(s.x[row], xt) * scale, xt)
                    check_gated(gpu, s)
                    y, _ = run_gated(gpu, s)
                    other, _ = run_gated(gpu, s, in_place=True)
                    assert (other == y).all(), "other bits in place"
                    check_gated_quant(gpu, s, y, Case.passed)
                    if xt != F16:
                        check_gated_backward(gpu, rng, s, xt)
    # What is no number, as in the formula.
    for xt in (BF16, F32, F16):
        for before, activation, pad in itertools.product((False, True), (SILU, SIGMOID), (0, 3)):
            with Case(op="gated", x=NAMES[xt], before=before, activation=activation, pad=pad):
                s = Gated(rng, 8, 2, 64, xt, xt, before=before, activation=activation, pad=pad)
                nan, inf = np.nan, np.inf
                s.x[1, 5], s.x[2, 70], s.gate[3, 7] = encode(np.array([nan, inf, nan]), xt)
                s.gate[4, 9], s.gate[5, 80] = encode(np.array([inf, -inf]), xt)
                check_gated(gpu, s)
    # More rows than the grid holds.
    for cols, groups in ((128, 1), (64, 8), (1024, 2)):
        rows = (1 << (17 if quick else 19)) // (cols * groups)
        for before in (False, True):
            with Case(op="gated", rows=rows, cols=cols, groups=groups, before=before):
                s = Gated(rng, rows * 4, groups, cols, BF16, BF16, before=before)
                check_gated(gpu, s)
                check_gated_backward(gpu, rng, s, BF16)


def sandwich_rows(gpu, rng, quick):
    """Each kernel and what it is laid out by; dtypes, roundings, layouts, in place."""

    def check(rows, cols, xt, wt, change=None, **how):
        with Case(op="sandwich", rows=rows, cols=cols, x=NAMES[xt], w=wt, **how):
            s = Sandwich(rng, rows, cols, xt, wt, **how)
            if change:
                change(s)
            got = check_sandwich(gpu, s)

            def same(other, what, want=got):
                for a, b, t in zip(other, want, (s.st, s.yt, *s.rts)):
                    assert a is None or (ulps(a, b, t) == 0).all(), f"other bits {what}"

            for order, where in (("reverse", "residual"), ("random:5", "both"), ("seq", "x")):
                gpu.option("order", order)
                if where == "residual" or s.yt == xt:
                    same(run_sandwich(gpu, s, in_place=where), f"in place of {where}")
            same(run_sandwich(gpu, s, has_y=False, want_rstd=False), "of the sum alone")
            if s.st == xt:
                same(run_sandwich(gpu, s, in_place="x", has_y=False), "of the sum in place of x")
            for row in {0, rows - 1}:
                one = [v[row : row + 1] for v in got]
                same(run_sandwich(gpu, s.one_row(row)), "of one row alone", one)
            if s.kernel(gpu) in ("sandwich_rows", "sandwich_shared_rows"):
                s.apart, s.shift = (2, 0) if rows % 2 == 0 else (0, 8)
                assert s.kernel(gpu) == "sandwich_any_rows"
                same(run_sandwich(gpu, s, in_place="both"), "of rows that are not plain")

    turn = 0
    for xt in (BF16, F32, F16):
        types = (xt, F32 if xt != F32 else BF16)
        lengths = [8, 64, 128, 256, 264, 512, 768, 1024, 2048, 4096, 4104, 8192, 8200, 20_000]
        lengths += [70_000] * (xt != F16) + [131_072] * (xt == F32)
        for cols in lengths:
            turn += 1
            if quick and turn % 3 == 0 and 600 < cols < 8000:
                continue
            how = {"cast": turn % 4 > 1, "offset": 1.0 if turn % 5 == 0 else 0.0}
            how |= {"pad": 16 * (turn % 3), "scale": 0.37 if turn % 3 == 1 else 1.0}
            how["nwt"] = types[0] if how["cast"] else types[turn // 2 % 2]
            rows = (37 if cols <= 64 else 12 if cols <= 512 else 4) // (1 + (cols > 8192))
            wt = None if turn % 7 == 0 else types[0 if how["cast"] else turn % 2]
            check(rows, cols, xt, wt, **how)
    # All others: dtypes, alignment, dimensions of rows, lengths that are no whole chunks.
    for n in range(18 if quick else 90):
        xt = (BF16, F32, F16)[n % 3]
        how = {"nwt": (xt, F32, F16, None)[n // 5 % 4], "cast": n // 2 % 2 == 1}
        how |= {"st": F32 if n // 3 % 2 else None, "scale": (1.0, 2.5)[n // 4 % 2]}
        how |= {"pad": (0, 3, 16)[n // 2 % 3], "shift": (0, 8)[n % 11 == 5]}
        how |= {"apart": 2 if n % 4 == 2 else 0, "offset": 1.0 if n % 6 == 2 else 0.0}
        cols = (64, 33, 128, 5, 300, 1, 1000, 96, 2304)[n % 9]
        check((6, 1, 10, 40)[n // 3 % 4], cols, xt, (xt, F32, None, BF16)[n // 4 % 4], **how)
    check(2, 9001, BF16, BF16, st=F32)
    check(2, 40_001, F32, F16, cast=True)
    check(2, 1_000_003, BF16, F32)
    check(1, 1_000_000, BF16, BF16, cast=True, scale=0.5)
    for n, (xt, wt, st, nwt) in enumerate(
        (
            (F64, F64, F64, F64),
            (F32, F64, F32, F32),
            (BF16, BF16, BF16, F64),
            (F32, F32, F32, F64),
            (F64, F32, F64, BF16),
            (BF16, F64, F32, BF16),
        )
    ):
        for cols in (33, 300):
            how = {"cast": n % 2 == 0 and wt != F64, "scale": (1.0, 0.37)[n // 2 % 2]}
            check(7, cols, xt, wt, nwt=nwt, st=st, pad=n % 2, **how)
    # Rows out of the fast path's range: x, the sum, and both.
    for xt, scale in ((BF16, 1e25), (BF16, 1e-25), (F32, 1e28), (F32, 1e-28), (F16, 1e-6)):

        def change(s):
            s.eps = 0.0
            s.x[1], s.x[-1] = (encode(decode(s.x[i], xt) * scale, xt) for i in (1, -1))
            s.x[2] = 0
            for row in (2, 4, -1):
                s.residual[row] = encode(decode(s.residual[row], s.st) * scale, s.st)

        for cols, how in itertools.product((64, 264, 1032, 8200), ({}, {"pad": 3}, {"st": F32})):
            check(6, cols, xt, xt, change, **how)
    # What is no number.
    for xt, pad in itertools.product((BF16, F32, F16), (0, 3)):

        def change(s):
            odd = encode(np.array([np.nan, np.inf, -np.inf]), xt)
            s.x[1, 5], s.x[2, 7], s.residual[3, 9] = odd[0], odd[1], odd[0]
            s.residual[4, 9], s.residual[5, 3] = odd[1:]
            s.x[6] = s.residual[6] = 0

        check(8, 64, xt, xt, change, pad=pad)
    # More rows than the grid holds.
    for cols in (64, 512, 1024):
        check((1 << (17 if quick else 19)) // cols * 4, cols, BF16, BF16)


def traffic(gpu, rng, quick):
    """A row is read once and written once, with few instructions and without bank conflicts."""
    if not gpu.simulated:
        return

    def work(stats, plan, rows, cols):
        """PTX instructions an element, without moves between registers, which ptxas removes."""
        # A block writes its warps' sums into each block of its cluster at the same place: no
        # conflict, but counted as one.
        to_others = rows * plan.cluster * (plan.cluster - 1) * plan.lanes // 32
        assert stats["bank_conflicts"] == to_others, (
            "bank conflicts",
            stats["bank_conflicts"],
            to_others,
        )
        moves = stats["by_category"]["mov"] / stats["warp_instructions"]
        return stats["lane_instructions"] * (1 - moves) / (rows * cols)

    for cols in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 65536, 131072):
        rows = max(
            2, (1 << (22 if cols <= 512 else 19)) // cols
        )  # of short ones a thread takes four, if they are many
        for xt, wt, most in ((BF16, BF16, (17, 36)), (BF16, F32, (17, 36)), (F32, F32, (54, 49))):
            with Case(op="instructions", x=NAMES[xt], w=NAMES[wt], cols=cols):
                x, dy, w = (
                    random_values(rng, (rows, cols), xt),
                    random_values(rng, (rows, cols), xt),
                    random_values(rng, cols, wt),
                )
                run_forward(gpu, x, xt, w, wt, want_rstd=False)
                forward = work(gpu.stats(), gpu.plan(False, cols, xt, xt), rows, cols)
                run_backward(
                    gpu, dy, xt, x, xt, w, wt, np.ones(rows, np.float32), want=(True, False)
                )
                backward = work(gpu.stats(), gpu.plan(True, cols, xt, xt), rows, cols)
                print(
                    f"  {NAMES[xt]}/{NAMES[wt]} {rows}x{cols}: {forward:.1f} and {backward:.1f} "
                    "instructions an element"
                )
                assert forward <= most[0] and backward <= most[1], (forward, backward)
    for xt in (BF16, F32):
        size = RAW[xt]().nbytes
        for cols in (64, 96, 128, 256, 768, 1000, 4096, 5120, 12288, 40000, 65536, 131072):
            rows = 64 if cols < 10_000 else 3
            x, dy = random_values(rng, (rows, cols), xt), random_values(rng, (rows, cols), xt)
            bytes_of_x = rows * cols * size
            with Case(op="traffic", x=NAMES[xt], cols=cols):
                run_forward(gpu, x, xt, None, None)
                if gpu.plan(False, cols, xt, xt).keep != NOWHERE:
                    assert gpu.traffic() == (bytes_of_x, bytes_of_x + 4 * rows), (
                        "forward",
                        gpu.traffic(),
                        bytes_of_x,
                    )
                    stats = gpu.stats()
                    assert cols * size % 32 or stats["load_efficiency"] == 1, (
                        "sectors are loaded in part"
                    )
                    widths = {
                        width for width, count in stats["load_instr_by_width"].items() if count
                    }
                    assert cols * size % 16 or widths == {"16"}, f"loads of {widths} bytes"
                if (
                    gpu.plan(False, cols, xt, xt).keep != NOWHERE
                ):  # scales of rows, and with a residual that is added
                    run_quant(gpu, x, xt, None, None, E4M3, 0)
                    assert gpu.traffic() == (bytes_of_x, rows * cols + 4 * rows), (
                        "quantized",
                        gpu.traffic(),
                        bytes_of_x,
                    )
                    run_quant(gpu, x, xt, None, None, INT8, 0, residual=(dy, xt))
                    stored = bytes_of_x + rows * cols + 4 * rows
                    assert gpu.traffic() == (2 * bytes_of_x, stored), (
                        "added, quantized",
                        gpu.traffic(),
                        bytes_of_x,
                    )
                    run_sandwich(gpu, Sandwich(rng, rows, cols, xt, None))
                    if cols * size % 16 == 0:
                        assert gpu.traffic() == (2 * bytes_of_x, 2 * bytes_of_x + 8 * rows), (
                            "sandwich",
                            gpu.traffic(),
                            bytes_of_x,
                        )
                rstd = encode(reference_forward(x, xt, None, xt, 1e-6, 0, False)[1], F32)
                run_backward(gpu, dy, xt, x, xt, None, None, rstd, want=(True, False))
                plan = gpu.plan(True, cols, xt, xt)
                if plan.keep != NOWHERE:
                    loaded, stored = gpu.traffic()  # beside x and dy, each thread loads rstd
                    assert loaded == 2 * bytes_of_x + 4 * rows * plan.lanes * plan.cluster, (
                        "backward",
                        loaded,
                        bytes_of_x,
                    )
                    assert stored == bytes_of_x, ("backward", stored, bytes_of_x)
                    run_backward(
                        gpu, dy, xt, x, xt, None, None, rstd, want=(True, False), dresidual=dy
                    )
                    assert gpu.traffic() == (loaded + bytes_of_x, stored), (
                        "with dresidual",
                        gpu.traffic(),
                    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lib")
    parser.add_argument("--build", metavar="LIB")
    parser.add_argument(
        "--arch", help="with --build: machine code for this architecture instead of PTX for 9.0"
    )
    parser.add_argument("--objects", help="with --build: a folder of compiled CUDA sources")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="run the parts whose name contains this")
    args = parser.parse_args()
    if args.build:
        build(args.build, args.arch, objects=args.objects)
    if not args.lib:
        return 0 if args.build else parser.error("--lib or --build")
    gpu = Gpu(args.lib)
    started, failed = time.time(), 0
    for part in (
        forward_mixes,
        forward_every_length,
        invariance,
        extremes,
        backward_mixes,
        backward_every_length,
        backward_forms,
        many_rows,
        shared_rows,
        unrounded,
        quantized,
        rope,
        gated,
        sandwich_rows,
        traffic,
    ):
        if args.only and args.only not in part.__name__:
            continue
        before, t = Case.passed, time.time()
        try:
            part(gpu, np.random.default_rng(args.seed), args.quick)
        except (AssertionError, RuntimeError) as e:
            failed += 1
            print(f"{part.__name__}: {e}", file=sys.stderr)
        print(
            f"{part.__name__}: {Case.passed - before} passed in {time.time() - t:.1f} s", flush=True
        )
    print(f"cuda_check: {Case.passed} passed, {failed} failed in {time.time() - started:.0f} s")
    return 1 if failed or not Case.passed else 0


if __name__ == "__main__":
    sys.exit(main())
