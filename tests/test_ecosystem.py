"""What stands around a norm in torch: autocast, determinism flags, tracing, state, counters,
profiler.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import GEMMA, LLAMA, name, random, random_weight, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize

from rmsnorm_cuda import RMSNorm, fused_add_rms_norm, fused_add_rms_norm_, rms_norm, rms_norm_quant

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Model(torch.nn.Module):
    """Linear layers around every form of the norm that a model holds."""

    def __init__(self, width=16, **options):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(width, width), torch.nn.Linear(width, 3)
        self.first, self.second = RMSNorm(width, 1e-5, **options), RMSNorm(width, **options)
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        y, x = self.second(self.inner(self.first(x)), x)
        y, x = fused_add_rms_norm(y, x, self.gain, 1e-6)
        return self.outer(rms_norm(y, y.shape[-1:], self.gain) + x)


# ---------------------------------------------------------------- autocast

# (input, weight): dtype of F.rms_norm, ours, ours with cast_before_weight, under autocast to bf16.
# On CUDA, F.rms_norm is on autocast's list of fp32 ops since torch 2.12: it casts, and returns
# fp32. Ours takes its inputs as they come.
AUTOCAST = {
    ("cpu", FP32, FP32): (FP32, FP32, FP32),
    ("cpu", FP32, BF16): (FP32, FP32, FP32),
    ("cpu", BF16, BF16): (BF16, BF16, BF16),
    ("cpu", BF16, FP32): (BF16, BF16, FP32),
    ("cpu", FP16, FP32): (FP16, FP16, FP32),
    ("cuda", FP32, FP32): (FP32, FP32, FP32),
    ("cuda", FP32, BF16): (FP32, FP32, FP32),
    ("cuda", BF16, BF16): (FP32, BF16, BF16),
    ("cuda", BF16, FP32): (FP32, BF16, FP32),
    ("cuda", FP16, FP32): (FP32, FP16, FP32),
}


@pytest.fixture
def autocast_to_bf16():
    """torch.autocast, also where there is no GPU, for which torch would leave it off."""
    before = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    }
    for device in before:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, BF16)
    yield
    for device, (enabled, dtype) in before.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


@pytest.mark.parametrize(
    "case, dtypes", AUTOCAST.items(), ids=[f"{d}-{name(x)}-{name(w)}" for d, x, w in AUTOCAST]
)
def test_autocast_table(case, dtypes, autocast_to_bf16):
    """On fake tensors, which need no GPU: dtypes, and that no cast stands beside the norm."""
    device, x_dtype, weight_dtype = case
    if device == "cuda" and torch.__version__ < "2.12.dev0":  # not on the list of fp32 ops yet
        dtypes = (x_dtype, *dtypes[1:])
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype")  # F.rms_norm's
        x, weight = (
            torch.empty(3, 8, dtype=x_dtype, device=device),
            torch.empty(8, dtype=weight_dtype, device=device),
        )
        with torch.autograd.profiler.profile() as seen:
            ours = rms_norm(x, 8, weight), rms_norm(x, 8, weight, **LLAMA)
            fused = fused_add_rms_norm(x, x, weight)
        called = {event.name for event in seen.function_events}
        assert "rmsnorm_cuda::rms_norm" in called and not called & {
            "aten::to",
            "aten::_to_copy",
            "aten::copy_",
        }
        assert (F.rms_norm(x, (8,), weight).dtype, *(y.dtype for y in ours)) == dtypes
        assert [y.dtype for y in fused] == [x_dtype, x_dtype]


def test_autocast_keeps_the_bits(device, autocast_to_bf16):
    """Forward, backward and the other functions, with and without: nothing is cast on the way."""

    def run():
        results = []
        for x_dtype, weight_dtype in ((FP32, FP32), (BF16, FP32), (BF16, BF16)):
            torch.manual_seed(0)
            x, weight = (
                random(3, 64, dtype=x_dtype, device=device),
                random_weight(64, weight_dtype, device),
            )
            results += [
                *fused_add_rms_norm(x, x, weight),
                *rms_norm_quant(x, weight, dtype=torch.int8),
            ]
            y = rms_norm(x.requires_grad_(), 64, weight.requires_grad_(), **GEMMA)
            results += [y.detach(), *torch.autograd.grad(y, (x, weight), y.detach())]
        return results

    with_autocast = run()
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_enabled("cuda", False)
    assert all(map(same_bits, with_autocast, run()))


def test_model_under_autocast():
    """Linear layers hand on bf16, and the norm takes and returns it."""
    model, x, seen = Model(), random(4, 16), []
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(
                lambda module, args, output: seen.append((args[0], output))
            )
    with torch.autocast("cpu", BF16):
        y = model(x)
    (first, normed), (second, (output, total)) = seen
    assert [t.dtype for t in (first, normed, second, output, total, y)] == [
        FP32,
        FP32,
        BF16,
        BF16,
        FP32,
        BF16,
    ]
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == FP32 for p in model.parameters())


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("fill", [False, True])
def test_deterministic_algorithms(fill):
    """Accepted without an error or a warning, with the same bits; memory that torch fills
    beforehand does no harm.
    """

    def run():
        torch.manual_seed(0)
        x, residual, weight = random(40, 64), random(40, 64), random_weight(64, FP32)
        leaves = (
            x.clone().requires_grad_(),
            residual.clone().requires_grad_(),
            weight.clone().requires_grad_(),
        )
        grads = torch.autograd.grad([t.sum() for t in fused_add_rms_norm(*leaves)], leaves)
        quantized = rms_norm_quant(x, weight, dtype=torch.int8, block=64)
        fused_add_rms_norm_(x, residual, weight)
        return *grads, *quantized, x, residual, rms_norm(x, 64, weight)

    want = run()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = run()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert all(map(same_bits, got, want))


# ---------------------------------------------------------------- state

CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_copies_of_a_model(clone):
    model, x = Model(**GEMMA), random(4, 16)
    twin = clone(model)
    assert same_bits(twin(x).detach(), model(x).detach())
    assert twin.first.weight is not model.first.weight


def test_state_dict_of_torch_both_ways_through_a_file():
    ours, theirs = RMSNorm(16, 1e-5), torch.nn.RMSNorm(16, 1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(torch.load(_saved(ours.state_dict())))
    assert same_bits(theirs.weight.detach(), ours.weight.detach())
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(torch.load(_saved(theirs.state_dict())))
    assert same_bits(theirs.weight.detach(), ours.weight.detach())


def test_parametrized_weights():
    x = random(4, 16)
    model = RMSNorm(16, 1e-5)

    class Exponential(torch.nn.Module):
        def forward(self, weight):
            return weight.exp()

    parametrize.register_parametrization(model, "weight", Exponential())
    assert same_bits(
        model(x).detach(),
        rms_norm(x, 16, model.parametrizations.weight.original.detach().exp(), 1e-5),
    )
    model(x).sum().backward()
    assert model.parametrizations.weight.original.grad is not None
    want = model(x).detach()
    parametrize.remove_parametrizations(model, "weight")
    assert same_bits(model(x).detach(), want)
    linear = parametrizations.weight_norm(torch.nn.Linear(16, 16))
    assert torch.nn.Sequential(linear, RMSNorm(16))(x).shape == x.shape


@pytest.mark.parametrize("options", [{}, GEMMA], ids=name)
def test_meta_init_and_to_empty(options):
    with torch.device("meta"):
        model = Model(**options)
        x = torch.empty(4, 16)
    assert model(x).device.type == "meta" and model(x).shape == (4, 3)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert same_bits(
        model.first.weight.detach(), torch.full((16,), 1.0 - options.get("weight_offset", 0.0))
    )
    with torch.device("meta"):
        twin = Model(**options)
    twin.load_state_dict(model.state_dict(), assign=True)
    x = random(4, 16)
    assert same_bits(twin.first(x).detach(), model.first(x).detach())


# ---------------------------------------------------------------- tracing


def test_fx_symbolic_trace():
    model, x = Model(**LLAMA), random(4, 16)
    traced = torch.fx.symbolic_trace(model)
    assert same_bits(traced(x).detach(), model(x).detach())
    # The module is traced through, into the functions that it calls.
    assert (
        sum("norm" in str(node.target) for node in traced.graph.nodes if node.op == "call_function")
        == 4
    )


def test_ao_fx_quantization():
    """prepare_fx and convert_fx leave the norms in floating point and quantize the linear
    layers.
    """
    quantize_fx = pytest.importorskip(
        "torch.ao.quantization.quantize_fx", reason="this torch has no torch.ao.quantization"
    )
    from torch.ao.quantization import get_default_qconfig_mapping

    model, x = Model().eval(), random(64, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own deprecations
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
        prepared(x)
        converted = quantize_fx.convert_fx(prepared)
    want = model(x).detach()
    assert (converted(x) - want).abs().max() < 0.1 * want.abs().max()  # 8 bits, in two layers
    assert "quantized" in str(converted.inner).lower()


def test_fake_tensor_training_step():
    with FakeTensorMode() as mode:
        model = Model()
        x = torch.empty(4, 16, requires_grad=True)
        model(x).sum().backward()
        assert mode.is_our_fake(x.grad) and x.grad.shape == x.shape
        assert all(p.grad.shape == p.shape for p in model.parameters())


# ---------------------------------------------------------------- counters


def test_flop_counter():
    """As of F.rms_norm: the norm passes, and the linear layers alone are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Model(), random(4, 16)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    forward = 2 * 4 * 16 * (16 + 3)
    assert (
        counter.get_total_flops() == 3 * forward
    )  # x requires no gradient, but the norm's weight ahead of the layer does


def test_profiler_names_all_ops():
    x, weight = random(4, 64).requires_grad_(), random_weight(64, FP32).requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as seen:
        (rms_norm(x, 64, weight) + fused_add_rms_norm(x, x, weight)[0]).sum().backward()
        with torch.no_grad():
            rms_norm(x, 64, weight)
            rms_norm_quant(x, weight, dtype=torch.int8)
            fused_add_rms_norm_(x.clone(), x.clone(), weight)
    names = {event.key for event in seen.key_averages()}
    assert names >= {
        f"rmsnorm_cuda::{op}"
        for op in (
            "rms_norm",
            "rms_norm_forward",
            "rms_norm_backward",
            "fused_add_rms_norm",
            "fused_add_rms_norm_forward",
            "fused_add_rms_norm_",
            "rms_norm_quant",
        )
    }
    shapes = {
        tuple(e.input_shapes[0])
        for e in seen.key_averages(group_by_input_shape=True)
        if e.key == "rmsnorm_cuda::rms_norm"
    }
    assert shapes == {(4, 64)}
