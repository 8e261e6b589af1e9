"""Random calls of every op beside a reference of their own, and what must not change a bit.

    pytest tests/fuzz --fuzz-seconds 300 --fuzz-seed 7

A failure prints the smallest call that hypothesis finds, and the seed that leads there.
"""

import time

import hypothesis
import pytest
import torch
from calls import BF16, FP16, Placed, calls, is_added
from cases import same_bits
from hypothesis import strategies as st
from judge import Gated, Norm, check_codes, check_rotated, exact, sum_of, unrounded_dtype

from rmsnorm_cuda import _C

namespace = torch.ops.rmsnorm_cuda
ALL = {
    schema.name.split("::")[1]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("rmsnorm_cuda::") and not schema.name.endswith("_formula")
}
FUNCTIONAL = sorted(name for name in ALL if not name.endswith("_"))
SHARES = len(FUNCTIONAL) + 1  # of the time: an op each, and what is refused
VECTOR_ISAS = [n for n, there in _C.isas().items() if there and n not in ("fp64", "scalar")]
ISAS = ["fp64", "scalar", *VECTOR_ISAS]


class Counter:
    calls = 0


def until(seconds, seed, strategy, check, record):
    """`check` on what `strategy` makes, in lots, for so long. hypothesis shrinks what fails."""
    end, Counter.calls = time.monotonic() + seconds, 0
    while True:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=50,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def lot(example):
            if time.monotonic() < end:  # else the rest of the lot is skipped
                check(example)

        try:
            lot()
        except BaseException as error:
            error.add_note(f"again: --fuzz-seed {seed}") if hasattr(error, "add_note") else None
            print(f"again: --fuzz-seed {seed}")
            raise
        if time.monotonic() > end:
            return record("fuzz", Counter.calls)
        seed += 1


def run(op, arguments):
    """{name: tensor} of what an op returns."""
    Counter.calls += 1
    return named(op, op(**arguments))


def named(op, results):
    returns = op._schema.returns
    results = [results] if len(returns) == 1 else results
    named = {r.name or "output": t for r, t in zip(returns, results, strict=True)}
    return {name: t for name, t in named.items() if t is not None}


def main_of(arguments):
    return arguments["q" if "q" in arguments else "input"]


def with_derived(call, arguments):
    if "grad_q" in arguments:
        op = namespace.rms_norm_rope_forward.default
        given = {a.name: arguments[a.name] for a in op._schema.arguments}
        _, _, q_rstd, k_rstd = op(**given)
        return {**arguments, "q_rstd": q_rstd, "k_rstd": k_rstd}
    if "gate" in arguments:
        if "grad_output" not in arguments:
            return arguments
        _, rstd = namespace.rms_norm_gated_forward(**gated_forward(arguments))
        return {**arguments, "rstd": rstd}
    if "grad_output" in arguments:
        forward = ["input", "normalized_shape", "weight", "eps", "weight_offset"]
        _, rstd = namespace.rms_norm_forward(
            **{name: arguments[name] for name in (*forward, "cast_before_weight")}
        )
        arguments = {**arguments, "rstd": rstd}
    return arguments


def on(isa, function, *args):
    _C.set_isa(isa)
    try:
        return function(*args)
    finally:
        _C.set_isa(None)


def assert_same(got, want, what, names=None):
    for name, value in want.items():
        if names is None or name in names:
            assert same_bits(as_float(got[name]), as_float(value)), f"{what} changes bits of {name}"


def as_float(t):
    """Without the dtypes that torch.where() does not know. NaN codes keep their bits."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


# ------------------------------------------------------------------------------------ references


def rope_options(arguments):
    return {a: arguments[a] for a in ROPE_OPTIONS}


ROPE_OPTIONS = ("cos", "sin", "positions", "eps", "heads_dim", "interleaved", "sections")
ROPE_OPTIONS += ("interleaved_sections", "weight_offset", "cast_before_weight", "round_each_step")


def angles_of(arguments):
    """cos and sin of each token, from the steps that sections and positions stand for."""
    positions, sections = arguments["positions"], arguments["sections"]
    for table in (arguments["cos"], arguments["sin"]):
        t = table if positions is None else table[positions]
        if sections is not None:
            axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
            if arguments["interleaved_sections"]:
                n = len(sections)
                axes = [i % n if i < sections[i % n] * n else 0 for i in range(len(axes))]
            columns = [t[axis][..., i] for i, axis in enumerate(axes)]
            t = torch.stack(columns, -1) if columns else t[0]
        yield t


def rotated_by_steps(norm, cos, sin, arguments):
    """As eager code of a model rounds; tokens, then heads."""
    if norm.dtype != torch.float64:
        cos, sin = (t.float() if t.dtype == torch.float64 else t for t in (cos, sin))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    pairs = cos.shape[-1]
    turned, rest = norm[..., : 2 * pairs], norm[..., 2 * pairs :]
    neighbours = arguments["interleaved"]
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if neighbours else turned.chunk(2, -1)
    both = a * cos + -b * sin, b * cos + a * sin
    turned = torch.stack(both, -1).flatten(-2) if neighbours else torch.cat(both, -1)
    return torch.cat([turned.to(norm.dtype), rest], -1)


def check_rope(call, arguments, results):
    if "grad_q" in arguments:
        return check_rope_gradients(call, arguments, results)
    cos, sin = angles_of(arguments)
    names = ("weight_offset", "cast_before_weight")
    options = {name: arguments[name] for name in names}
    for side in "qk":
        x, weight = arguments[side], arguments[f"{side}_weight"]
        if x is None:
            assert not results[f"{side}_out"].numel()
            continue
        y = results[f"{side}_out"]
        assert y.shape == x.shape
        if not x.numel():
            continue
        if not arguments["round_each_step"]:
            how = arguments["heads_dim"], arguments["interleaved"], options["cast_before_weight"]
            check_rotated(y, x, weight, cos, sin, *how, options["weight_offset"], arguments["eps"])
            continue
        x, y = (t.transpose(-3, -2) if arguments["heads_dim"] == -3 else t for t in (x, y))
        cols = x.shape[-1]
        if weight is not None and weight.dim() == 2:
            each = zip(x.unbind(-2), weight)
            norm = [namespace.rms_norm(a, [cols], w, arguments["eps"], **options) for a, w in each]
            norm = torch.stack(norm, -2)
        elif weight is not None and len(weight) != cols:
            flat = x.flatten(-2)
            norm = namespace.rms_norm(flat, [len(weight)], weight, arguments["eps"], **options)
            norm = norm.view(x.shape)
        else:
            norm = namespace.rms_norm(x, [cols], weight, arguments["eps"], **options)
        assert_same({side: y}, {side: rotated_by_steps(norm, cos, sin, arguments)}, "rotation")


def check_rope_gradients(call, arguments, results):
    """Those of the formula in ATen ops, in double. Bounds: see test_gradients in test_rope.py."""
    mask, tensors = arguments["output_mask"], ("q", "k", "q_weight", "k_weight")
    wanted = {}
    for i, name in enumerate(tensors):
        if arguments[name] is None or arguments[f"grad_{name[0]}"] is None or not mask[i]:
            assert f"grad_{name}" not in results
            continue
        wanted[name] = arguments[name].double().clone().requires_grad_()
    if not wanted or not arguments["q"].numel():
        return
    leaves = {n: None if arguments[n] is None else arguments[n].double() for n in tensors} | wanted
    options = rope_options(arguments) | {"round_each_step": False}
    for angles in ("cos", "sin"):
        options[angles] = options[angles].double()
    eps = options["eps"]
    if eps is None:
        options["eps"] = 2.0**-52 if arguments["q"].dtype == torch.float64 else 2.0**-23
        if arguments["k"] is not None and arguments["k"].dtype != arguments["q"].dtype:
            return
    q, k = namespace.rms_norm_rope_formula(**leaves, **options)
    pairs = [(q, arguments["grad_q"]), (k, arguments["grad_k"])]
    pairs = [(y, dy.double()) for y, dy in pairs if dy is not None and y.requires_grad]
    if not pairs:
        return
    ys, dys = zip(*pairs)
    grads = torch.autograd.grad(ys, list(wanted.values()), dys, allow_unused=True)
    for name, want in zip(wanted, grads):
        got = results[f"grad_{name}"]
        assert got.dtype == arguments[name].dtype and got.shape == arguments[name].shape
        largest = torch.finfo(arguments[name].dtype).max / 4
        if want is None or not want.isfinite().all() or want.abs().amax() > largest:
            continue
        dtype = arguments[name].dtype
        coarse = arguments[name[0]].dtype if arguments["cast_before_weight"] else dtype
        relative = 8 * max(torch.finfo(dtype).eps, torch.finfo(coarse).eps)
        # In fp64 both sums are, and a term of a weight's may add a rounding to each.
        rows = arguments["q"].numel() / arguments["q"].shape[-1] if "weight" in name else 1
        relative = max(relative, 2e-6 if torch.float64 != dtype else rows * 2.0**-53)
        # A head, or a sum over all rows, in fp32. A gradient of q or k may be smaller than what it
        # is the difference of.
        scale = want.abs().amax()
        if "weight" not in name:
            weight = arguments[f"{name}_weight"]
            dims = [-1]
            if weight is not None and weight.dim() == 1 and len(weight) != want.shape[-1]:
                dims.append(arguments["heads_dim"])
            rms = leaves[name].detach().square().mean(dims, keepdim=True).add(options["eps"]).sqrt()
            terms = arguments[f"grad_{name}"].double().abs().amax(dims, keepdim=True) / rms
            if weight is not None:
                terms = terms * (weight.double() + options["weight_offset"]).abs().amax()
            scale = torch.maximum(scale, terms)
        error = (got.double() - want).abs() - torch.finfo(dtype).tiny
        assert (error <= relative * (want.abs() + scale)).all(), (name, error.max(), scale)


GATED = ("input", "gate", "weight", "eps", "activation", "norm_before_gate", "group_size")
GATED += ("weight_offset", "cast_before_weight")


def gated_forward(arguments):
    return {name: arguments[name] for name in GATED}


def check_gated(call, arguments, results):
    given = gated_forward(arguments)
    judge = Gated(*given.values())
    if "scale" in results:
        if arguments["keep_norm"]:
            judge.check(results["norm"])
            norm = namespace.rms_norm_gated(**given)
            assert_same({"norm": norm}, results, "a quantization", ["norm"])
            check_quantized(arguments, results)
        return
    if "grad_output" not in arguments:
        return judge.check(results["output"])
    tensors, mask = ("input", "gate", "weight"), arguments["output_mask"]
    wanted = [n for n, want in zip(tensors, mask) if want and arguments[n] is not None]
    assert set(results) == {f"grad_{n}" for n in wanted}
    for n in wanted:
        assert results[f"grad_{n}"].dtype == arguments[n].dtype
        assert results[f"grad_{n}"].shape == arguments[n].shape
    if not wanted or not arguments["input"].numel():
        return
    # Those of the formula in ATen ops, in double, which counts roundings as the identity.
    eps = given["eps"]
    if eps is None:
        given["eps"] = 2.0**-52 if given["input"].dtype == torch.float64 else 2.0**-23
    leaves = {n: given[n].double().clone().requires_grad_() for n in wanted}
    in_double = {n: None if given[n] is None else given[n].double() for n in tensors}
    y = namespace.rms_norm_gated_formula(
        **{**given, **in_double, **leaves, "cast_before_weight": False}
    )
    dy = arguments["grad_output"]
    grads = torch.autograd.grad(y, list(leaves.values()), dy.double())
    judge.check_gradients(results, dy, {f"grad_{n}": g for n, g in zip(wanted, grads)})


def sandwich_options(arguments):
    return {name: arguments[name] for name in ("eps", "weight_offset", "cast_before_weight")}


def check_sandwich(call, arguments, results):
    """The bits of the steps, each of which has a test of its own."""
    x, options = arguments["input"], sandwich_options(arguments)
    is_pair, cols = "input_weight" in arguments, call.last
    weight = arguments["input_weight" if is_pair else "weight"]
    norm, rstd = namespace.rms_norm_forward(x, cols, weight, **options)
    total = (norm + arguments["residual"]).to(arguments["residual"].dtype)
    want = {"output": total, "rstd": rstd}
    if is_pair:
        scale, weight = arguments["scale"], arguments["weight"]
        total = total if scale == 1 else total * scale
        y, sum_rstd = namespace.rms_norm_forward(total, cols, weight, **options)
        if options["cast_before_weight"] and weight is not None:
            dtype = torch.promote_types(norm.dtype, weight.dtype)
        else:
            dtype = norm.dtype
        want = {"output": y.to(dtype), "residual_out": total, "rstd": sum_rstd, "input_rstd": rstd}
    assert_same(results, {name: want[name] for name in results}, "sandwich")


def check_sandwich_autograd(op, arguments, results):
    """The backward op twice; the gradient that flows into the sum is added in the first."""
    if not arguments["input"].numel():
        return
    x, options = arguments["input"], sandwich_options(arguments)
    is_pair, shape = "input_weight" in arguments, [arguments["input"].shape[-1]]
    tensors = ("input", "residual", "input_weight", "weight")
    leaves = {n: arguments[n] for n in tensors if arguments.get(n) is not None}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    got = run(op, {**arguments, **leaves})
    assert_same({k: v.detach() for k, v in got.items()}, results, "recording")
    ys = [got[n] for n in ("output", "residual_out") if n in got]
    dys = [torch.cos(y.detach().float()).to(y.dtype) for y in ys]
    Counter.calls += 1
    grads = torch.autograd.grad(ys, list(leaves.values()), dys)
    want, first = {}, "input_weight" if is_pair else "weight"
    dsum, eps = dys[-1], options.pop("eps")

    def backward(dy, x, weight, dsum=None):
        given = x, shape, weight
        _, rstd = namespace.rms_norm_forward(*given, eps, **options)
        return namespace.rms_norm_backward(dy, *given, rstd, eps, [True, True], dsum, **options)

    if is_pair:
        total = results["residual_out"]
        dsum, want["weight"] = backward(dys[0], total, arguments["weight"], dsum)
        dsum = dsum if arguments["scale"] == 1 else dsum * arguments["scale"]
    want["residual"] = dsum
    want["input"], want[first] = backward(dsum, x, arguments[first])
    assert_same(dict(zip(leaves, grads)), {n: want[n] for n in leaves}, "autograd")


def check_results(call, arguments, results):
    """By the names of results. One with a new meaning needs a line here."""
    if "q" in arguments:
        return check_rope(call, arguments, results)
    if "gate" in arguments:
        return check_gated(call, arguments, results)
    if is_added(call.op):
        return check_sandwich(call, arguments, results)
    x, options = arguments["input"], {}
    for name in ("weight", "eps", "weight_offset", "cast_before_weight"):
        options[name] = arguments[name]
    if "grad_output" in arguments:
        want_dx, want_dweight = arguments["output_mask"]
        wanted = {"grad_input"} if want_dx else set()
        wanted |= {"grad_weight"} if want_dweight and arguments["weight"] is not None else set()
        assert set(results) == wanted
        return Norm(x, call.dims, **options).check_gradients(
            results.get("grad_input"),
            results.get("grad_weight"),
            arguments["grad_output"],
            arguments["grad_residual"],
        )
    if "residual" in arguments:
        total = results["residual_out"]
        want = sum_of(x, arguments["residual"])
        assert total.dtype == arguments["residual"].dtype
        got = exact(total)
        assert ((got == want) | ((got != got) & (want != want))).all(), "residual_out"
        options["rounds_to"] = unrounded_dtype(arguments)
        x = x.float() + arguments["residual"].float() if options["rounds_to"] else total
    norm = Norm(x, call.dims, **options)
    dtype = arguments["input"].dtype
    if norm.cast:
        dtype = torch.promote_types(dtype, arguments["weight"].dtype)
    if "rstd" in results:
        norm.check_rstd(results["rstd"])
    if "scale" not in results:
        return norm.check(results["output"], dtype)
    if arguments["keep_norm"]:
        norm.check(results["norm"], dtype)
        check_quantized(arguments, results)


def check_quantized(arguments, results):
    if arguments["input"].numel():
        kind = (arguments[name] for name in ("dtype", "scale", "block", "scale_ub"))
        check_codes(results["output"], results["scale"], results["norm"], *kind)


# ------------------------------------------------------------------------------------ properties


def check_isas(call, op, arguments, results):
    """All are right; those with vectors agree in every bit, and plain C++ too where products of
    16-bit values are exact.
    """
    narrow = False
    if not {"q", "gate"} & set(arguments) and not is_added(call.op):
        x = "residual" if "residual" in arguments else "input"
        read = arguments[x], arguments["weight"]
        narrow = all(t is None or t.dtype in (FP16, BF16) for t in read)
        narrow &= unrounded_dtype(arguments) is None
    for isa in ISAS if main_of(arguments).numel() < 1 << 17 else VECTOR_ISAS:
        got = on(isa, run, op, arguments)
        on(isa, check_results, call, arguments, got)
        if isa in VECTOR_ISAS or (isa == "scalar" and narrow and "grad_output" not in arguments):
            assert_same(got, results, isa)


def check_row_alone(call, op, arguments, results):
    if "q" in arguments:
        return check_side_alone(call, op, arguments, results)
    rows = [range(n) for n in call.lead]
    if not all(rows):
        return
    at = tuple(call.seed % len(r) for r in rows)
    alone, has_groups = dict(arguments), arguments.get("group_size") is not None
    for name in ("input", "residual", "gate", "grad_output", "grad_residual", "rstd"):
        if alone.get(name) is not None:
            alone[name] = alone[name][(..., *at) if name == "rstd" else at]
    got = run(op, alone)
    for name, value in results.items():
        if has_groups and name == "rstd":  # whose groups come first
            value, got[name] = value[(slice(None), *at)], got[name]
            assert_same({name: got[name]}, {name: value}, "a batch")
            continue
        if value.shape[: len(at)] == call.lead and value.numel() and name != "grad_weight":
            assert_same({name: got[name].reshape(value[at].shape)}, {name: value[at]}, "a batch")


def check_side_alone(call, op, arguments, results):
    """k as q."""
    if arguments["k"] is None or "grad_q" in arguments:
        return
    alone = {"q": arguments["k"], "q_weight": arguments["k_weight"], "k": None, "k_weight": None}
    got = run(op, {**arguments, **alone})
    renamed = {name.replace("k", "q"): t for name, t in results.items() if name[0] == "k"}
    assert_same(got, renamed, "the other side")


def check_dense(call, op, arguments, results):
    dense = {
        name: value.clone(memory_format=torch.contiguous_format)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    assert_same(run(op, dense), results, "the layout")


def check_steps(call, op, arguments, results):
    """An addition and a norm in one have the bits of both, one after the other."""
    name = "norm" if "scale" in results else "output"
    if "residual_out" not in results or results[name].shape != call.shape:
        return
    if unrounded_dtype(arguments):
        return
    names = ("weight", "eps", "weight_offset", "cast_before_weight")
    options = {name: arguments[name] for name in names}
    for isa in (None, *ISAS):
        got = on(isa, run, op, arguments)
        _C.set_isa(isa)
        alone = namespace.rms_norm(got["residual_out"], call.last, **options)
        _C.set_isa(None)
        assert_same(got, {name: alone.to(results[name].dtype)}, f"{isa}: fusion")


def check_threads(call, op, arguments, results):
    if main_of(arguments).nbytes < 1 << 18:
        return
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert_same(run(op, arguments), results, f"{threads} threads")
        finally:
            torch.set_num_threads(1)


# What is written, and which result it holds.
WRITTEN = {
    "out": "output",
    "scale_out": "scale",
    "norm_out": "norm",
    "residual_out": "residual_out",
    "input": "output",
    "residual": "residual_out",
    **dict.fromkeys(("q", "q_out"), "q_out"),
    **dict.fromkeys(("k", "k_out"), "k_out"),
}


def written_calls(call, arguments, results):
    """(op, arguments, {argument: Placed}) of the overload `out` and of the op in place, in guarded
    memory, as far as the dtypes allow.
    """
    name = call.op
    targets = []
    if "out" in getattr(namespace, name).overloads():
        targets.append(getattr(namespace, name).out)
    if name + "_" in ALL:
        targets.append(getattr(namespace, name + "_").default)
    for target in targets:
        written = [a.name for a in target._schema.arguments if a.alias_info is not None]
        given, places = dict(arguments), {}
        for argument in written:
            result = results[WRITTEN[argument]]
            if argument in arguments and arguments[argument] is None:
                continue
            if argument in arguments and arguments[argument].dtype != result.dtype:
                break  # the result cannot take its place
            column_major = argument == "scale_out" and arguments["column_major"]
            shape = result.movedim(-1, 0).shape if column_major else result.shape
            layout = "dense" if "quant" in name else ("dense", "padded")[call.seed % 2]
            heads_first = "q" in arguments and arguments["heads_dim"] == -3 and result.dim() > 1
            dense_from = len(call.lead)
            if "q" in arguments:  # all heads of a token are dense where a weight is across them
                shape = result.transpose(-3, -2).shape if heads_first else shape
                dense_from = max(len(shape) - 2, 0)
            place = places[argument] = Placed(shape, result.dtype, layout, dense_from)
            given[argument] = place.tensor.movedim(0, -1) if column_major else place.tensor
            if heads_first:
                given[argument] = place.tensor.transpose(-3, -2)
            if argument in arguments:
                given[argument].copy_(arguments[argument])
        else:
            yield target, given, places


def check_written(call, op, arguments, results):
    for target, given, places in written_calls(call, arguments, results):
        wanted = {argument: results[WRITTEN[argument]] for argument in places}
        before = {argument: given[argument].clone() for argument in places}
        lazy = {argument: torch._lazy_clone(given[argument]) for argument in places}
        Counter.calls += 2
        assert target(**{**given, **lazy}) is None
        assert_same(lazy, wanted, f"{target.name()} of lazy clones")
        assert_same(given, before, f"{target.name()} of lazy clones")
        assert target(**given) is None
        assert_same(given, wanted, target.name())
        for argument, place in places.items():
            assert place.guards_are_intact(), f"{target.name()} wrote beside {argument}"


def check_rope_autograd(op, arguments, results):
    """Those of the backward op, which has a test of its own."""
    if "grad_q" in arguments or not arguments["q"].numel():
        return
    tensors = ("q", "k", "q_weight", "k_weight")
    leaves = {n: arguments[n] for n in tensors if arguments[n] is not None}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    got = run(op, {**arguments, **leaves})
    assert_same({k: v.detach() for k, v in got.items()}, results, "recording")
    ys = [got[f"{side}_out"] for side in "qk" if arguments[side] is not None]
    dys = [torch.cos(y.detach().float()).to(y.dtype) for y in ys]
    Counter.calls += 1
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, allow_unused=True)
    given = {n: arguments[n] for n in tensors} | rope_options(arguments)
    *_, q_rstd, k_rstd = namespace.rms_norm_rope_forward(**given)
    given |= {"q_rstd": q_rstd, "k_rstd": k_rstd, "output_mask": [True] * 4}
    given |= {"grad_q": dys[0], "grad_k": dys[1] if len(dys) > 1 else None}
    want = run(namespace.rms_norm_rope_backward.default, given)
    want = {name.removeprefix("grad_"): t for name, t in want.items()}
    got = {n: g for n, g in zip(leaves, grads) if g is not None}
    assert_same(got, {n: want[n] for n in got}, "autograd")


def check_gated_autograd(op, arguments, results):
    """Those of the backward op, which has a test of its own."""
    if {"grad_output", "scale"} & set(arguments) or not arguments["input"].numel():
        return
    tensors = ("input", "gate", "weight")
    leaves = {n: arguments[n] for n in tensors if arguments[n] is not None}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    got = run(op, {**arguments, **leaves})
    assert_same({k: v.detach() for k, v in got.items()}, results, "recording")
    y = got["output"]
    dy = torch.cos(y.detach().float()).to(y.dtype)
    Counter.calls += 1
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    given = gated_forward(arguments)
    _, rstd = namespace.rms_norm_gated_forward(**given)
    given |= {"rstd": rstd, "grad_output": dy, "output_mask": [True] * 3}
    want = run(namespace.rms_norm_gated_backward.default, given)
    assert_same({f"grad_{n}": g for n, g in zip(leaves, grads)}, want, "autograd")


def check_autograd(call, op, arguments, results):
    """The gradients that torch records."""
    if "q" in arguments:
        return check_rope_autograd(op, arguments, results)
    if "gate" in arguments:
        return check_gated_autograd(op, arguments, results)
    if is_added(call.op):
        return check_sandwich_autograd(op, arguments, results)
    if not call.op.startswith(("rms_norm", "fused_add_rms_norm")) or (
        "quant" in call.op or "grad_output" in arguments or not arguments["input"].numel()
    ):
        return
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in ("input", "residual", "weight")
        if isinstance(arguments.get(name), torch.Tensor)
    }
    got = run(op, {**arguments, **leaves})
    assert_same({k: v.detach() for k, v in got.items()}, results, "recording")
    generator = torch.Generator().manual_seed(call.seed)
    y = got["output"]
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    outputs, upstream = [y], [dy]
    if "residual_out" in got:
        total = got["residual_out"]
        outputs.append(total)
        upstream.append(torch.randn(total.shape, generator=generator).to(total.dtype))
    Counter.calls += 1
    grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), upstream)))
    x = got.get("residual_out", leaves["input"]).detach()
    options = {n: arguments[n] for n in ("weight", "eps", "weight_offset", "cast_before_weight")}
    if unrounded_dtype(arguments):  # that of the rounded sum, by the rstd of the other
        rstd = namespace.fused_add_rms_norm_forward(
            *(arguments[name] for name in ("input", "residual")), round_sum=False, **options
        )[2]
        weight, eps = options.pop("weight"), options.pop("eps")
        mask = (True, weight is not None)
        want = namespace.rms_norm_backward(
            dy, x, call.last, weight, rstd, eps, mask, upstream[1], **options
        )
        names = ("residual", "weight") if weight is not None else ("residual",)
        return assert_same({n: grads[n] for n in names}, dict(zip(names, want)), "autograd")
    Norm(x, call.dims, **options).check_gradients(
        grads.get("residual", grads["input"]),
        grads.get("weight"),
        dy,
        upstream[1] if "residual" in grads else None,
    )
    if "residual" in grads:
        want = grads["residual"].to(grads["input"].dtype)
        assert_same({"input": grads["input"]}, {"input": want}, "autograd")


def check_compiled(call, op, arguments, results):
    """Now and then: compiling takes as long as hundreds of calls."""
    if call.seed % 997 != 500:  # hypothesis is fond of small numbers
        return
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    got = compiled(**arguments)
    Counter.calls += 1
    got = [got] if isinstance(got, torch.Tensor) else [t for t in got if t is not None]
    assert_same(dict(zip(results, got, strict=True)), results, "torch.compile")


PROPERTIES = [
    check_isas,
    check_row_alone,
    check_dense,
    check_steps,
    check_threads,
    check_written,
    check_autograd,
    check_compiled,
]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_op(name, painted, fuzz_seconds, fuzz_seed, record_property):
    op = getattr(namespace, name).default

    def check(call):
        arguments = with_derived(call, call.arguments)
        before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        results = run(op, arguments)
        check_results(call, arguments, results)
        for check in PROPERTIES:
            check(call, op, arguments, results)
        assert_same(arguments, before, "the op")

    until(fuzz_seconds / SHARES, fuzz_seed, calls(op), check, record_property)


# ---------------------------------------------------------------------------------- what is wrong


def longer(t, by=1):
    return torch.zeros((*t.shape[:-1], t.shape[-1] + by), dtype=t.dtype)


# Each makes one argument wrong, or returns None where the call has no such argument.
FAULTS = {
    "a negative eps": lambda a: {"eps": -1e-6},
    "eps that is no number": lambda a: {"eps": float("nan")},
    "an infinite offset": lambda a: {"weight_offset": float("inf")},
    "a weight too long": lambda a: a.get("weight") is not None and {"weight": longer(a["weight"])},
    "the other weight too long": lambda a: (
        a.get("input_weight") is not None and {"input_weight": longer(a["input_weight"])}
    ),
    "an infinite scale": lambda a: "input_weight" in a and {"scale": float("inf")},
    "a weight of integers": lambda a: a.get("weight") is not None and {"weight": a["weight"].int()},
    "an input of integers": lambda a: "input" in a and {"input": a["input"].int()},
    "an input too long": lambda a: (
        (a.get("weight") is not None or {"normalized_shape", "residual"} & set(a))
        and {"input": longer(a["input"])}
    ),
    "heads of an odd length": lambda a: "q" in a and {"q": longer(a["q"])},
    "heads of integers": lambda a: "q" in a and {"q": a["q"].int()},
    "angles of integers": lambda a: "q" in a and {"cos": a["cos"].int()},
    "too many pairs": lambda a: (
        "q" in a and {n: longer(a[n], a["q"].shape[-1]) for n in ("cos", "sin")}
    ),
    "heads somewhere else": lambda a: "q" in a and {"heads_dim": -1},
    "sections of fewer pairs": lambda a: (
        a.get("sections") is not None
        and len(a["sections"]) > 1
        and {"sections": [a["sections"][0] + 1, *a["sections"][1:]]}
    ),
    "a position that is not there": lambda a: (
        a.get("positions") is not None
        and a["positions"].numel()
        and a["q"].numel()
        and ("grad_q" not in a or a["grad_q"] is not None and a["output_mask"][0])
        and {"positions": torch.full_like(a["positions"], 9)}
    ),
    "a gate too long": lambda a: a.get("gate") is not None and {"gate": longer(a["gate"])},
    "a gate of integers": lambda a: a.get("gate") is not None and {"gate": a["gate"].int()},
    "no such activation": lambda a: "gate" in a and {"activation": "gelu"},
    "an empty group": lambda a: "gate" in a and {"group_size": 0},
    "half a group": lambda a: (
        "gate" in a and a["input"].shape[-1] and {"group_size": a["input"].shape[-1] + 1}
    ),
    "another shape": lambda a: (
        "normalized_shape" in a and {"normalized_shape": [n + 1 for n in a["normalized_shape"]]}
    ),
    "no shape": lambda a: "normalized_shape" in a and {"normalized_shape": []},
    "a residual too long": lambda a: "residual" in a and {"residual": longer(a["residual"])},
    "a residual of integers": lambda a: "residual" in a and {"residual": a["residual"].int()},
    "another device": lambda a: a.get("weight") is not None and {"weight": a["weight"].to("meta")},
    "angles of another device": lambda a: "q" in a and {"cos": a["cos"].to("meta")},
    "a gradient too long": lambda a: (
        "grad_output" in a and {"grad_output": longer(a["grad_output"])}
    ),
    "too few rstd": lambda a: "rstd" in a and {"rstd": longer(a["rstd"].reshape(-1))},
    "no such format": lambda a: "dtype" in a and {"dtype": torch.int32},
    "no such block": lambda a: "dtype" in a and {"block": 65, "scale": None},
    "two scales": lambda a: "dtype" in a and {"scale": torch.ones(2), "block": None},
    "a bound below 0": lambda a: "dtype" in a and {"scale_ub": -1.0, "scale": None},
    "columns of no blocks": lambda a: "dtype" in a and {"block": None, "column_major": True},
}
# The same for what is written.
WRITTEN_FAULTS = {
    "too long": lambda t: longer(t),
    "integers": lambda t: t.to(torch.int32),
    "rows that overlap": lambda t: t.new_empty(t.shape[-1]).expand(t.shape),
    "elements apart": lambda t: t.new_empty((*t.shape, 2))[..., 0],
}


@st.composite
def faulty_calls(draw):
    name = draw(st.sampled_from(FUNCTIONAL))
    call = draw(calls(getattr(namespace, name).default))
    return (
        call,
        draw(st.sampled_from(sorted(FAULTS))),
        draw(st.sampled_from(sorted(WRITTEN_FAULTS))),
    )


def assert_refused(function, arguments, fault):
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    before = {n: t.clone() for n, t in tensors.items()}
    Counter.calls += 1
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)):
        function(**arguments)
        raise AssertionError(f"{fault} was taken")
    assert_same(tensors, before, "an error")


def test_refusals(painted, fuzz_seconds, fuzz_seed, record_property):
    """What is wrong is told, and nothing is written."""

    def check(example):
        call, fault, written_fault = example
        op = getattr(namespace, call.op).default
        arguments = with_derived(call, call.arguments)
        if not main_of(arguments).dim():
            return
        wrong = FAULTS[fault](arguments)
        overloads = getattr(namespace, call.op).overloads()
        outs = {}
        if "out" in overloads:
            results = run(op, arguments)
            target = getattr(namespace, call.op).out
            names = [a.name for a in target._schema.arguments if a.alias_info is not None]
            outs = {name: torch.full_like(results[WRITTEN[name]], 3) for name in names}
            first = names[0]
            t = outs[first]
            if t.numel() and t.shape[-1] > 1 and (t.dim() > 1 and t.numel() > t.shape[-1]):
                assert_refused(
                    target,
                    {**arguments, **outs, first: WRITTEN_FAULTS[written_fault](t)},
                    written_fault,
                )
        if wrong:
            assert_refused(op, {**arguments, **wrong}, fault)
            if outs:
                assert_refused(target, {**arguments, **wrong, **outs}, fault)

    until(fuzz_seconds / SHARES, fuzz_seed, faulty_calls(), check, record_property)
