"""python -m rmsnorm_cuda: what is built and loaded, and a self-check against fp64. Paste it into a
bug report.

The exit status is 1 if a check fails. `--explain ROWS COLS DTYPE` shows instead how the CUDA
kernels would be laid out, `--cmake-dir` where CMake finds the package. `bench` goes on with times,
beside torch's.
"""

import argparse
import itertools
import os
import platform
import sys
from pathlib import Path

import torch

import rmsnorm_cuda
from rmsnorm_cuda import _C, explain
from rmsnorm_cuda.bench import command as bench
from rmsnorm_cuda.bench.machine import processor
from rmsnorm_cuda.reference import (
    quantize_reference,
    rms_norm_backward_reference,
    rms_norm_gated_reference,
    rms_norm_reference,
    rms_norm_rope_reference,
    round_once,
    ulp_distance,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver
SHAPE = (7, 1031)  # odd: full vectors and a tail


def describe():
    isas = _C.isas()
    yield "rmsnorm_cuda", f"{rmsnorm_cuda.__version__}  {Path(rmsnorm_cuda.__file__).parent}"
    yield "torch", f"{torch.__version__} (built for {_C.torch_version})"
    yield "Python", f"{platform.python_version()}  {platform.platform()}"
    yield "compiler", _C.compiler
    if variables := [f"{n}={v}" for n, v in os.environ.items() if n.startswith("RMSNORM_")]:
        yield "environment", " ".join(sorted(variables))
    yield "CPU", f"{processor()}, {torch.get_num_threads()} threads"
    try:
        in_use = f"{_C.isa()} in use"
    # RMSNORM_CUDA_ISA asks for what is not there; the rest of the report is still wanted.
    except RuntimeError as error:
        in_use = f"ERROR: {error}"
    here = ", ".join(name for name, is_supported in isas.items() if is_supported)
    yield "instruction set", f"{in_use}; here: {here}; built: {', '.join(isas)}"
    yield "CUDA kernels", ("" if _C.cuda_built() else "none: ") + _C.cuda_architectures()
    if _C.cuda_built():
        runtime, driver = _C.cuda_versions()  # 13000: 13.0
        names = [f"{v // 1000}.{v % 1000 // 10}" if v else "none" for v in (runtime, driver)]
        yield "CUDA", "runtime {}, driver {}".format(*names)
        if driver and driver // 1000 < runtime // 1000:
            yield "CUDA driver", f"ERROR: {_C.cuda_error(INSUFFICIENT_DRIVER)}"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(gpus):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        yield f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {capability}"
    if not gpus:
        yield "CUDA device", "none that torch sees"


def checks(device, generator):
    """Yields (kind, what, ulps, limit) for each op, dtype pair and option."""

    def randn(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    cols, ops = SHAPE[-1:], torch.ops.rmsnorm_cuda
    options = ({}, {"weight_offset": 1.0}, {"cast_before_weight": True})
    for dtype, weight_dtype, kwargs in itertools.product(DTYPES, (*DTYPES, None), options):
        x = randn(*SHAPE, dtype=dtype)
        weight = None if weight_dtype is None else randn(*cols, dtype=weight_dtype)
        if weight is None and kwargs:
            continue
        want = rms_norm_reference(x, cols, weight, 1e-6, **kwargs)
        args = x.to(device), cols, None if weight is None else weight.to(device), 1e-6
        # cast_before_weight rounds twice, the first time to the dtype of x: that is the ulp then,
        # of a wider result too.
        casts = "cast_before_weight" in kwargs
        kind, limit = ("cast_before_weight", 2) if casts else ("forward", 1)
        ulp = torch.finfo(dtype).eps / torch.finfo(want.dtype).eps
        name = " ".join([str(dtype)[6:], "x", str(weight_dtype).removeprefix("torch."), *kwargs])
        y, rstd = ops.rms_norm_forward(*args, **kwargs)
        out = torch.empty_like(want).to(device)
        for op, got in (
            ("rms_norm", rmsnorm_cuda.rms_norm(*args, **kwargs)),
            ("rms_norm.out", rmsnorm_cuda.rms_norm(*args, **kwargs, out=out)),
            ("rms_norm_forward", y),
        ):
            ulps = ulp_distance(got.cpu(), want).max().item() / ulp
            yield kind, f"{op} {name}", ulps, limit

        # A gradient is a difference of terms; it is judged in ulps of the largest of its row or
        # column sum. dweight sees what cast_before_weight rounds, and a near-tie is an ulp of x.
        dy = randn(*SHAPE, dtype=dtype)
        mask = [True, weight is not None]
        grads = ops.rms_norm_backward(dy.to(device), *args[:3], rstd, 1e-6, mask, **kwargs)
        wants = rms_norm_backward_reference(dy, x, cols, weight, 1e-6, **kwargs)
        for kind, got, want in zip(("dx", "dweight"), grads, wants):
            if want is not None:
                error = (got.cpu().double() - want).abs()
                error -= (round_once(want, got.dtype).double() - want).abs()
                eps = torch.finfo(got.dtype).eps
                if casts and kind == "dweight":
                    eps = max(eps, torch.finfo(dtype).eps)
                ulps = (error.amax() / want.abs().amax() / eps).item()
                yield kind, f"rms_norm_backward {kind} {name}", ulps, 4

    # An ulp of the norm, and one of the activation and of the product with it.
    for dtype, first, group_size in itertools.product(DTYPES, (False, True), (None, 64)):
        x, gate, weight = (randn(*shape, dtype=dtype) for shape in ((5, 192), (5, 192), (192,)))
        options = {"norm_before_gate": not first, "group_size": group_size}
        args = [t.to(device) for t in (x, gate, weight)]
        got = rmsnorm_cuda.rms_norm_gated(*args, 1e-6, **options)
        want = rms_norm_gated_reference(x, gate, weight, 1e-6, **options)
        name = f"{str(dtype)[6:]} {'gate, norm' if first else 'norm, gate'} {group_size or ''}"
        yield "gated", f"rms_norm_gated {name}", ulp_distance(got.cpu(), want).max().item(), 4
        for block in (None, 64):
            quant = {"dtype": torch.float8_e4m3fn, "block": block}
            codes, scale = rmsnorm_cuda.rms_norm_gated_quant(*args, 1e-6, **quant, **options)
            yield from in_8_bits(f"rms_norm_gated_quant {name}", codes, scale, got, **quant)

    # In ulps of the largest: those of the norm, and half a one of a product and of the sum each.
    for dtype, interleaved in itertools.product(DTYPES, (False, True)):
        q, k = randn(5, 4, 64, dtype=dtype), randn(5, 2, 64, dtype=dtype)
        weights = randn(64, dtype=dtype), randn(2 * 64, dtype=dtype)
        angle = torch.randn(5, 32, generator=generator)
        args = q, k, *weights, angle.cos(), angle.sin()
        on_device = (t.to(device) for t in args)
        results = rmsnorm_cuda.rms_norm_rope(*on_device, 1e-6, interleaved=interleaved)
        for x, weight, got in zip((q, k), weights, results):
            angles = angle.cos(), angle.sin()
            want = rms_norm_rope_reference(x, weight, *angles, 1e-6, interleaved=interleaved)
            error = (got.cpu().double() - round_once(want, dtype).double()).abs().amax()
            ulps = (error / want.abs().amax() / torch.finfo(dtype).eps).item()
            name = f"{str(dtype)[6:]} {'interleaved' if interleaved else 'halves'}"
            yield "rotated", f"rms_norm_rope {name}", ulps, 2

    # What is fused has the bits of the steps.
    quant_dtypes = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
    for dtype, quant_dtype in itertools.product(DTYPES, quant_dtypes):
        x, residual, weight = (randn(*shape, dtype=dtype) for shape in (SHAPE, SHAPE, cols))
        args = [t.to(device) for t in (x, residual, weight)]
        total = (x.float() + residual.float()).to(dtype)
        norm = rmsnorm_cuda.rms_norm(total.to(device), cols, args[2], 1e-6).cpu()
        name = f"{str(dtype)[6:]} {str(quant_dtype)[6:]}"
        for got, want in zip(rmsnorm_cuda.fused_add_rms_norm(*args, 1e-6), (norm, total)):
            ulps = ulp_distance(got.cpu(), want).max().item()
            yield "fused", f"fused_add_rms_norm {name}", ulps, 0
        first = rmsnorm_cuda.rms_norm(args[0], cols, args[2], 1e-6)
        want = rmsnorm_cuda.fused_add_rms_norm(first, *args[1:], 1e-6)
        got = rmsnorm_cuda.rms_norm_add_rms_norm(*args, args[2], 1e-6)
        for a, b in zip(got, want):
            ulps = ulp_distance(a.cpu(), b.cpu()).max().item()
            yield "fused", f"rms_norm_add_rms_norm {name}", ulps, 0
        output, scale, _ = rmsnorm_cuda.fused_add_rms_norm_quant(*args, 1e-6, dtype=quant_dtype)
        yield from in_8_bits(f"rms_norm_quant {name}", output, scale, norm, quant_dtype)


def in_8_bits(what, codes, scale, norm, dtype, block=None):
    """What is fused has the bits of the steps."""
    want, want_scale = quantize_reference(norm.cpu(), dtype, block=block)
    differing = (codes.cpu().view(torch.uint8) != want.view(torch.uint8)).sum().item()
    yield "8 bits", what, differing, 0
    yield "8 bits", f"{what}, scale", ulp_distance(scale.cpu(), want_scale).max().item(), 0


def self_check():
    runs = [("cpu", isa) for isa, supported in _C.isas().items() if supported]
    if _C.cuda_built() and torch.cuda.is_available():
        runs.append(("cuda", None))
    failures = 0
    for device, isa in runs:
        if isa:
            _C.set_isa(isa)
        worst, count = {}, 0
        for kind, what, ulps, limit in checks(device, torch.Generator().manual_seed(0)):
            count += 1
            worst[kind] = max(worst.get(kind, (0.0, limit)), (ulps, limit))
            if not ulps <= limit or (isa and _C.last_isa() != isa):
                failures += 1
                print(f"FAILED  {device} {isa or ''} {what}: {ulps:.3g} ulp, limit {limit}")
        shown = ", ".join(f"{kind} {w:.2f} (limit {limit})" for kind, (w, limit) in worst.items())
        print(f"self-check {device} {isa or ''}: {count} comparisons with fp64; ", end="")
        print(f"worst in ulps: {shown}")
    _C.set_isa(None)
    return failures


def report():
    """Prints what is built and loaded, and the self-check; the exit status."""
    lines = dict(describe())
    for key, value in lines.items():
        print(f"{key:<16}{value}")
    failures = self_check() + lines["instruction set"].startswith("ERROR")
    print("FAILED" if failures else "OK")
    return 1 if failures else 0


def main():
    what = "What is built and loaded, and a self-check against fp64."  # -OO leaves no docstring
    parser = argparse.ArgumentParser(prog="python -m rmsnorm_cuda", description=what)
    layout = (
        "how the CUDA kernels would be laid out, on several GPUs; needs no GPU; DTYPE is one of "
    )
    metavar, dtypes = ("ROWS", "COLS", "DTYPE"), ", ".join(explain.DTYPES)
    parser.add_argument("--explain", nargs=3, metavar=metavar, help=layout + dtypes)
    cmake_dir = "print the rmsnorm_cuda_DIR for CMake's find_package"
    parser.add_argument("--cmake-dir", action="store_true", help=cmake_dir)
    bench.add_parser(parser.add_subparsers(dest="command", title="commands"))
    args = parser.parse_args()
    if args.command == "bench":
        return bench.run(report, minutes=args.minutes, file=args.json)
    if args.cmake_dir:
        print(rmsnorm_cuda.cmake_dir())
        return 0
    if args.explain:
        rows, cols, dtype = args.explain
        if not all(n.isdigit() and int(n) for n in (rows, cols)) or dtype not in explain.DTYPES:
            parser.error(f"--explain: expected two positive integers and one of {dtypes}")
        print(*explain.lines(int(rows), int(cols), dtype), sep="\n")
        return 0
    return report()


if __name__ == "__main__":
    sys.exit(main())
