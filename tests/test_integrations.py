"""Where other libraries plug kernels in. `kernels` and Megatron-Core are among the tests'
dependencies. vLLM, SGLang and torchtitan each need a torch or a GPU of their own: a stand-in with
the documented interface shows signatures and what is declined, and the library does where it is
installed. Tried: vLLM 0.33.0 (with torch 2.14.0), SGLang 0.5.23 (torch 2.14.1), kernels 0.17.2 and
0.14.1, torchtitan 0.3.0, Megatron-Core 0.19.2 and 0.16.1."""

import importlib
import importlib.util
import inspect
import itertools
import sys
import types
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import close, stub_modules
from torch import nn

import rmsnorm_cuda
import rmsnorm_cuda_plugins
from rmsnorm_cuda import rms_norm_gated
from rmsnorm_cuda.integrations.families import FAMILIES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIXTEEN = [BF16, FP16]
COMPILES_LAYERS = torch.__version__ >= "2.12.dev0"


def test_entry_points():
    """pyproject.toml names functions that exist."""
    tomllib = pytest.importorskip("tomllib")
    groups = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "entry-points"
    ]
    assert set(groups) == {"vllm.general_plugins", "sglang.srt.plugins", "pyinstaller40"}
    for group in groups.values():
        for target in group.values():
            module, function = target.split(":")
            assert callable(getattr(importlib.import_module(module), function))


# kernels


class Norm(nn.Module):
    """A norm of any family, as people write it: the family is not to be seen in the class."""

    kernel_layer_name = "RMSNorm"  # as transformers decorates its norms

    def __init__(self, width, family, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width) / 4)
        self.eps, self.offset, self.cast, self.result = (
            eps,
            family.weight_offset,
            family.cast_before_weight,
            family.result,
        )

    def forward(self, hidden_states):
        xhat = hidden_states.float()
        xhat = xhat * torch.rsqrt(xhat.square().mean(-1, keepdim=True) + self.eps)
        if self.result == "weight":
            return self.weight * (
                xhat.to(self.weight.dtype) if self.weight.dtype in SIXTEEN else xhat
            )
        if self.cast:
            return self.weight * xhat.to(hidden_states.dtype)
        return (xhat * (self.weight.float() + self.offset)).to(hidden_states.dtype)


class NoNorm(nn.Module):
    kernel_layer_name = "RMSNorm"

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, hidden_states):
        return hidden_states * self.weight * 2


def kernelized(model, mode="TRAINING", compiled=False, **options):
    """By the library, which binds our layer's forward to each module."""
    kernels = pytest.importorskip("kernels")
    from rmsnorm_cuda.integrations.kernels import mapping

    mode = kernels.Mode[mode] | (kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode(0))
    with kernels.use_kernel_mapping(mapping(), inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, use_fallback=False, **options)


@pytest.fixture
def fresh():
    """Classes are tried again, and Dynamo starts anew."""
    from rmsnorm_cuda.integrations import kernels

    kernels._known.clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_kernels_layer_rules():
    """What `kernels` demands: a hashable repository; a class without constructor and members; a
    forward that takes one input.
    """
    from rmsnorm_cuda.integrations.kernels import mapping

    repositories = mapping()
    assert set(repositories) == {"RMSNorm", "RMSNormZeroCentered", "RMSNormGated"}
    for name, inputs in (("RMSNorm", 1), ("RMSNormGated", 2)):
        assert set(repositories[name]) == {"cpu", "cuda"}
        repository = repositories[name]["cpu"]
        assert hash(repository) == hash(repositories[name]["cuda"])
        assert f"rmsnorm_cuda (layer `{name}`)" in str(repository)
        layer = repository.load()
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        members = {n for n, _ in inspect.getmembers(layer)}
        members -= {n for n, _ in inspect.getmembers(nn.Module)}
        assert members == {"can_torch_compile", "has_backward"} and layer.has_backward
        assert layer.can_torch_compile == COMPILES_LAYERS
        kinds = [p.kind for p in inspect.signature(layer.forward).parameters.values()]
        assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * (1 + inputs)
    assert list(mapping(["A"], ["cpu"])) == ["A"] and list(mapping(["A"], ["cpu"])["A"]) == ["cpu"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_kernels_layer_is_of_the_modules_family(family, fresh):
    """One layer name on several families: each module keeps its own rounding order, dtype, eps and
    gradients.
    """
    for x_dtype, w_dtype in ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)):
        theirs = Norm(40, family, eps=1e-3).to(w_dtype)
        ours = kernelized(Norm(40, family, eps=1e-3).to(w_dtype))
        assert ours.forward.__func__.__module__ == "rmsnorm_cuda.integrations.kernels"
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(256, 40).to(x_dtype)
        x[:8] *= 1e-2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = ours(a), theirs(b)
        if got.dtype == FP32 and x_dtype != FP32 and family.name == "llama":
            torch.testing.assert_close(
                got, want, rtol=torch.finfo(x_dtype).eps, atol=0
            )  # a near-tie of the first rounding
        else:
            close(got, want, 5 if want.dtype == FP32 else 2)
        for y in (got, want):
            y.float().square().sum().backward()
        rough = 3e-2 if BF16 in (x_dtype, w_dtype) else 1e-4
        torch.testing.assert_close(a.grad, b.grad, rtol=rough, atol=rough)
        scale = theirs.weight.grad.abs().max()
        torch.testing.assert_close(
            ours.weight.grad / scale, theirs.weight.grad / scale, rtol=rough, atol=rough
        )


@pytest.mark.filterwarnings("error:rmsnorm_cuda")
def test_kernels_layer_of_gated_norms(fresh, monkeypatch):
    """One layer name, on classes that round and gate otherwise; eager, in training, compiled."""
    pytest.importorskip("transformers")
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    for cls, options in (
        (Qwen3NextRMSNormGated, {"cast_before_weight": True}),
        (KimiLinearRMSNormGated, {"activation": "sigmoid"}),
    ):
        monkeypatch.setattr(cls, "kernel_layer_name", "RMSNormGated", raising=False)
        for compiled in (False, COMPILES_LAYERS):
            norm = kernelized(cls(64, eps=1e-3), compiled=compiled)
            assert norm.forward.__func__.__module__ == "rmsnorm_cuda.integrations.kernels"
            x, gate = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
            call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
            y = call(x, gate)
            want = rms_norm_gated(x, gate, norm.weight, 1e-3, **options)
            assert torch.equal(y, want)
            torch.testing.assert_close(y, cls.forward(norm, x, gate))
            grads = (torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, want))
            assert torch.equal(*grads)


def test_kernels_layer_of_what_is_not_a_norm(fresh):
    ours = kernelized(nn.Sequential(NoNorm(8), NoNorm(8)))
    x = torch.randn(3, 8)
    with pytest.warns(
        UserWarning, match="NoNorm keeps its own forward: it computes what no known family computes"
    ) as caught:
        assert torch.equal(ours(x), x * 4)
    assert len(caught) == 1
    if COMPILES_LAYERS:
        assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), x * 4)
    ours[0].bias = nn.Parameter(torch.ones(8))
    del ours[0]._rmsnorm_cuda_family
    with pytest.warns(
        UserWarning, match="NoNorm has bias, where one parameter is expected, called weight"
    ):
        ours(x)


@pytest.mark.skipif(
    not COMPILES_LAYERS, reason="the layer says itself that it cannot be compiled on this torch"
)
@pytest.mark.filterwarnings("error:rmsnorm_cuda")
def test_kernels_layer_compiled(fresh):
    """Compiled before it was ever called, in training: no graph break; layer by layer: one graph
    for all; eps is guarded.
    """
    blocks = (nn.Sequential(nn.Linear(40, 40), Norm(40, FAMILIES[1])) for _ in range(3))
    model = kernelized(nn.Sequential(*blocks), compiled=True)
    for layer in model:
        layer.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 40, requires_grad=True)
    compiled = model(x.clone())
    compiled.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for layer in model:
        layer._compiled_call_impl = None
    assert torch.equal(compiled, model(x))

    for eps in (1e-2, 3e-2, 5e-2):  # of floats that differ Dynamo would make variables
        model[0][1].eps = eps
        assert torch.equal(
            torch.compile(model[0], fullgraph=True, backend="aot_eager")(x), model[0](x)
        )


def test_kernels_layer_first_called_under_a_mode(fresh):
    """Which family it is is tried apart from fake tensors, transforms, autocast and default
    devices.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rmsnorm_cuda.integrations import kernels

    norm, x = kernelized(Norm(40, FAMILIES[2])), torch.randn(4, 40)

    def anew():
        kernels._known.clear()
        vars(norm).pop("_rmsnorm_cuda_family", None)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert norm(mode.from_tensor(x)).shape == x.shape
    anew()
    torch.func.vmap(torch.func.grad(lambda x: norm(x).sum()))(x)
    anew()
    with torch.autocast("cpu", BF16), torch.device("meta"), torch.inference_mode():
        norm(x)
    anew()
    program = torch.export.export(nn.Sequential(norm), (x,), strict=False)
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
        "rmsnorm_cuda.rms_norm.default"
    ]
    assert kernels._known and all(found.family is FAMILIES[2] for found in kernels._known.values())


def test_kernels_library(fresh, monkeypatch):
    """In every mode that `kernels` has; and for a GPU, which this machine may not have."""
    repos = pytest.importorskip("kernels.layer.repos")
    from rmsnorm_cuda.integrations.kernels import mapping

    x, norms = torch.randn(7, 40), [Norm(40, family) for family in FAMILIES]
    want = [norm(x) for norm in norms]
    for mode, compiled in itertools.product(("TRAINING", "INFERENCE"), (False, COMPILES_LAYERS)):
        model = kernelized(nn.ModuleList(norms), mode, compiled)
        for norm, y in zip(model, want):
            assert norm.forward.__func__ is mapping()["RMSNorm"]["cpu"].load().forward
            close(norm(x), y, 5)
    monkeypatch.setattr(repos, "_find_capability", lambda: 90)
    norm = kernelized(Norm(40, FAMILIES[0]), device="cuda")
    assert "rmsnorm_cuda" in norm.forward.__func__.__module__


def test_kernels_library_and_transformers(fresh, monkeypatch):
    """One name for the norms of two families, in models of transformers."""
    pytest.importorskip("kernels")
    transformers = pytest.importorskip("transformers")
    from kernels import Mode, kernelize, use_kernel_mapping
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    from rmsnorm_cuda.integrations.kernels import mapping

    for cls in (
        LlamaRMSNorm,
        Olmo2RMSNorm,
    ):  # as transformers decorates them where it accepts the version of `kernels`
        monkeypatch.setattr(cls, "kernel_layer_name", "RMSNorm", raising=False)
    tokens = torch.randint(0, 99, (2, 16))
    for kind, family in (("Llama", "llama"), ("Olmo2", "torch")):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            want = model(tokens).logits
            with use_kernel_mapping(mapping(), inherit_mapping=False):
                model = kernelize(model, mode=Mode.INFERENCE)
            torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-5)
        assert model.model.norm._rmsnorm_cuda_family[1].family.name == family


def test_kernelize_tells_where_it_changes_nothing(fresh, monkeypatch):
    """With the marks as this transformers sets them, or does not."""
    pytest.importorskip("kernels")
    transformers = pytest.importorskip("transformers")
    from kernels import Mode

    from rmsnorm_cuda.integrations.kernels import kernelize

    sizes = dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    tokens = torch.randint(0, 99, (2, 16))
    with torch.no_grad():
        want = model(tokens).logits
        if getattr(type(model.model.norm), "kernel_layer_name", None) is None:
            with pytest.warns(
                UserWarning,
                match="no module of this LlamaForCausalLM is marked as one of RMSNorm, "
                "RMSNormGated, RMSNormZeroCentered",
            ):
                kernelize(model, mode=Mode.INFERENCE)
            assert torch.equal(model(tokens).logits, want)
            monkeypatch.setattr(
                type(model.model.norm), "kernel_layer_name", "RMSNorm", raising=False
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = kernelize(model, mode=Mode.INFERENCE)
        assert "rmsnorm_cuda" in model.model.norm.forward.__func__.__module__
        torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-5)


# vLLM


def native_rms_norm(x, weight, epsilon, variance_size=None):
    """The definition that vLLM gives of its op, of its own words: fp32; to the weight's dtype;
    times the weight; to x's dtype.
    """
    part = x.float() if variance_size is None else x.float()[..., :variance_size]
    y = x.float() * torch.rsqrt(part.square().mean(-1, keepdim=True) + epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype)


def native_fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):
    total = x.float() + x_residual.float()
    return native_rms_norm(total, weight, epsilon, variance_size).to(x.dtype), total.to(x.dtype)


class IrOp:
    """What a vLLM IR op is to a plug-in: implementations by name, each with the op's signature;
    dispatch by priority.
    """

    def __init__(self, native):
        self.native, self.impls = (
            native,
            {"native": SimpleNamespace(provider="native", impl_fn=native)},
        )

    def register_impl(self, provider, *, supported=True, supports_args=None, inplace=False):
        assert provider not in self.impls
        want = inspect.signature(self.native).parameters.values()

        def check(function):
            parameters = inspect.signature(function).parameters.values()
            assert [(p.name, p.default, p.kind) for p in parameters] == [
                (p.name, p.default, p.kind) for p in want
            ]

        def register(function):
            check(function), check(supports_args)
            schema = torch.library.infer_schema(function, mutates_args=())
            assert (
                schema.startswith("(Tensor x, ")
                and "Tensor? weight, float epsilon, SymInt? variance_size=None) -> " in schema
            )
            assert supported and not inplace
            self.impls[provider] = SimpleNamespace(
                provider=provider, impl_fn=function, supports_args=supports_args
            )
            return self.impls[provider]

        return register

    def dispatch(self, *args):
        ours = self.impls["rmsnorm_cuda"]
        return ours if ours.supports_args(*args) else self.impls["native"]


@pytest.fixture(params=["stand-in", "vllm"])
def vllm_ops(request, monkeypatch):
    """vllm.ir.ops with ours registered, and ours before the native implementation."""
    from rmsnorm_cuda.integrations.vllm import register

    if request.param == "vllm":
        monkeypatch.setenv(
            "VLLM_TARGET_DEVICE", "cpu"
        )  # its wheel looks for a GPU otherwise, and has no platform without one
        pytest.importorskip("vllm")
        from vllm.ir import ops

        register()
        with (
            ops.rms_norm.set_priority(["rmsnorm_cuda", "native"]),
            ops.fused_add_rms_norm.set_priority(["rmsnorm_cuda", "native"]),
        ):
            register()  # vLLM may load a plug-in twice
            yield ops
        return
    ops = SimpleNamespace(
        rms_norm=IrOp(native_rms_norm), fused_add_rms_norm=IrOp(native_fused_add_rms_norm)
    )
    stub_modules(monkeypatch, {"vllm.ir": {"ops": ops}})
    register()
    register()
    yield ops


def test_vllm_computes_what_the_op_is_defined_as(vllm_ops):
    ours, fused = vllm_ops.rms_norm, vllm_ops.fused_add_rms_norm
    native, native_fused = (op.impls["native"].impl_fn for op in (ours, fused))
    # what vLLM states for the op
    stated = {FP32: (1.3e-6, 1e-5), FP16: (2e-3, 1e-2), BF16: (1.6e-2, 1e-3)}
    pairs = [(x, w) for x in (BF16, FP16, FP32) for w in dict.fromkeys((x, FP32, None))]
    for (x_dtype, w_dtype), shape in itertools.product(pairs, [(64, 96), (3, 8, 128), (0, 64)]):
        ulps = 5 if x_dtype == FP32 else 2
        x, residual = torch.randn(shape).to(x_dtype), torch.randn(shape).to(x_dtype)
        weight = None if w_dtype is None else torch.randn(shape[-1]).to(w_dtype)
        impl = ours.dispatch(x, weight, 1e-5)
        assert impl.provider == "rmsnorm_cuda"
        y = impl.impl_fn(x, weight, 1e-5)
        impl = fused.dispatch(x, residual, weight, 1e-5)
        assert impl.provider == "rmsnorm_cuda"
        fused_y, total = impl.impl_fn(x, residual, weight, 1e-5)
        want, want_total = native_fused(x, residual, weight, 1e-5)
        assert torch.equal(total, want_total)
        if x.numel():
            close(y, native(x, weight, 1e-5), ulps)
            close(fused_y, want, ulps)
            rtol, atol = stated[x_dtype]
            torch.testing.assert_close(fused_y, want, rtol=rtol, atol=atol)
            if x_dtype != FP32:  # the norm of the sum as it is rounded is another one
                assert (fused_y != want).sum() < (native(total, weight, 1e-5) != want).sum() / 4


def test_vllm_declines(vllm_ops):
    x, weight = torch.randn(4, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    op, fused = vllm_ops.rms_norm, vllm_ops.fused_add_rms_norm
    assert (
        op.dispatch(x, weight, 1e-5).provider
        == fused.dispatch(x, x, weight, 1e-5).provider
        == "rmsnorm_cuda"
    )
    assert (
        op.dispatch(x[:, :32].mT.reshape(32, 4)[..., :4], None, 1e-5, None).provider
        == "rmsnorm_cuda"
    )
    for args in (
        (x, weight, 1e-5, 32),  # the mean of a part of the row
        (x, weight.half(), 1e-5),
        (x.float(), weight, 1e-5),  # would be rounded to the weight's dtype
        (x.double(), None, 1e-5),  # would be computed in fp32
        (x, weight[:1], 1e-5),  # would be broadcast
        (x, weight.expand(4, 64), 1e-5),
    ):
        assert op.dispatch(*args).provider == "native", args
        assert fused.dispatch(args[0], *args).provider == "native", args
    assert fused.dispatch(x, x.float(), weight, 1e-5).provider == "native"
    assert fused.dispatch(x, x[:1], weight, 1e-5).provider == "native"


@pytest.mark.parametrize("vllm_ops", ["vllm"], indirect=True)
def test_vllm_op_runs_ours(vllm_ops):
    """Through vLLM's own torch ops, in eager and traced, as its lowering pass traces them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, residual, weight = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64)
    assert torch.equal(
        vllm_ops.rms_norm(x, weight, 1e-5),
        rmsnorm_cuda.rms_norm(x, (64,), weight, 1e-5, cast_before_weight=True),
    )
    want = rmsnorm_cuda.fused_add_rms_norm(x, residual, weight, 1e-5, cast_before_weight=True)
    for call in (vllm_ops.fused_add_rms_norm, vllm_ops.fused_add_rms_norm.maybe_inplace):
        assert all(map(torch.equal, call(x.clone(), residual.clone(), weight, 1e-5), want))
    for op, args in ((vllm_ops.rms_norm, (x,)), (vllm_ops.fused_add_rms_norm, (x, residual))):
        graph = make_fx(op.impls["rmsnorm_cuda"].func_impl_fn, tracing_mode="fake")(
            *args, weight, 1e-5, None
        ).graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert [target for target in targets if "getitem" not in target] in (
            [f"rmsnorm_cuda.{op.name}.default"],
            [f"rmsnorm_cuda.{op.name}_forward.default"],
        )
    assert op.impls["rmsnorm_cuda"].uuid()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vllm_ops", ["vllm"], indirect=True)
def test_vllm_layers_and_lowering(vllm_ops):
    """vLLM's own layers on ours, chosen as --ir-op-priority chooses; and its pass over a graph of
    Inductor's.
    """
    layers = pytest.importorskip("vllm.model_executor.layers.layernorm", exc_type=ImportError)
    lowering = pytest.importorskip("vllm.compilation.passes.ir.lowering_pass", exc_type=ImportError)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.kernel import IrOpPriorityConfig

    try:
        config = VllmConfig()
    except ImportError as error:
        pytest.skip(f"vLLM is not installed with all that it needs: {error}")
    mine = ["rmsnorm_cuda", "native"]
    priority = IrOpPriorityConfig.with_default(["native"], rms_norm=mine, fused_add_rms_norm=mine)
    assert priority.compute_hash()
    x, residual = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    with set_current_vllm_config(config), torch.no_grad(), priority.set_priority():
        for cls, options in (
            (layers.RMSNorm, {"cast_before_weight": True}),
            (layers.GemmaRMSNorm, {}),
        ):
            norm = cls(64).bfloat16()
            nn.init.normal_(norm.weight)
            weight = norm.weight if cls is layers.RMSNorm else norm.weight.float() + 1
            assert torch.equal(norm(x), rmsnorm_cuda.rms_norm(x, (64,), weight, 1e-6, **options))
            options["round_sum"] = False
            want = rmsnorm_cuda.fused_add_rms_norm(x, residual, weight, 1e-6, **options)
            assert all(map(torch.equal, norm(x.clone(), residual.clone()), want))

        def function(x, residual, weight):
            y, residual = vllm_ops.fused_add_rms_norm(x, residual, weight, 1e-6)
            return vllm_ops.rms_norm(y, weight, 1e-6), residual

        lower = lowering.VllmIRLoweringPass(config)
        torch._dynamo.reset()
        # From Inductor's cache on disk the graph of an earlier run would come, and the pass would
        # not run.
        options = {"post_grad_custom_post_pass": lower, "fx_graph_cache": False}
        compiled = torch.compile(function, fullgraph=True, options=options)
        assert all(
            map(torch.equal, compiled(x, residual, norm.weight), function(x, residual, norm.weight))
        )
        assert {impl for impls in lower.selected_impls.values() for impl in impls.values()} == {
            "rmsnorm_cuda"
        }


def test_vllm_of_another_version(monkeypatch):
    """vLLM stops where a plug-in raises; one without IR ops goes on, and the log says why."""
    from rmsnorm_cuda.integrations.vllm import register

    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.delitem(sys.modules, "vllm.ir", raising=False)
    with pytest.warns(UserWarning, match="this vLLM has no IR ops for norms, and keeps its own"):
        register()


# SGLang


class SglangNorm(nn.Module):
    """The fields and the native forward of SGLang's RMSNorm and GemmaRMSNorm, whose forward_cuda
    and forward_cpu are hooked.
    """

    _quant_linear = variance_size_override = override_orig_dtype = None
    cast_x_before_out_mul = fp32_residual = False
    offset = 0.0

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(width)), eps

    def forward_native(self, x, residual=None, post_residual_addition=None, quant_linear=None):
        dtype = x.dtype
        x = x.float()
        if residual is not None:
            x = (
                x
                + residual.float()
                + (0 if post_residual_addition is None else post_residual_addition.float())
            )
            residual = x if self.fp32_residual else x.to(dtype)
        part = x[..., : self.variance_size_override]
        x = x * torch.rsqrt(part.square().mean(-1, keepdim=True) + self.variance_epsilon)
        x = (
            self.weight * x.to(dtype)
            if self.cast_x_before_out_mul
            else (x * (self.offset + self.weight.float())).to(dtype)
        )
        return x if residual is None else (x, residual)

    def forward_cpu(self, x, residual=None, post_residual_addition=None, *rest):
        self.went_its_own_way = True
        return self.forward_native(x, residual, post_residual_addition)

    forward_cuda = forward_cpu


@pytest.fixture(params=["stand-in", "sglang"])
def sglang(request, monkeypatch):
    """RMSNorm and GemmaRMSNorm with our hooks applied, as subclasses: (RMSNorm, GemmaRMSNorm)."""
    from rmsnorm_cuda.integrations import sglang as ours

    if request.param == "sglang":
        if importlib.util.find_spec("sglang") is None:
            pytest.skip("SGLang is not installed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from sglang.srt.layers import layernorm
        except Exception as error:
            pytest.skip(f"SGLang cannot be imported here: {type(error).__name__}: {error}")
        from sglang.srt.plugins.hook_registry import HookRegistry

        classes = layernorm.RMSNorm, layernorm.GemmaRMSNorm
        before = [
            (cls, name, vars(cls)[name])
            for cls in classes
            for name in ("forward_cuda", "forward_cpu")
        ]
        ours.register()
        HookRegistry.apply_hooks()
        yield classes
        for cls, name, method in before:
            setattr(cls, name, method)
        HookRegistry.reset()
        return

    class RMSNorm(SglangNorm):
        pass

    class GemmaRMSNorm(SglangNorm):
        offset = 1.0

    classes = {"RMSNorm": RMSNorm, "GemmaRMSNorm": GemmaRMSNorm}

    class HookRegistry:
        @staticmethod
        def register(target, hook, hook_type):
            assert hook_type == "around" and target.startswith("sglang.")
            if ".layernorm." not in target:  # test_gated_layers.py
                return
            cls, method = target.split(".")[-2:]
            original = getattr(classes[cls], method)
            setattr(classes[cls], method, lambda *args, **kwargs: hook(original, *args, **kwargs))

    stub_modules(
        monkeypatch,
        {
            "sglang.srt.plugins.hook_registry": {
                "HookRegistry": HookRegistry,
                "HookType": SimpleNamespace(AROUND="around"),
            },
            "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False},
        },
    )
    ours.register()
    yield RMSNorm, GemmaRMSNorm


@torch.no_grad()
def test_sglang_norms(sglang):
    kinds = ("RMSNorm", "cast_x_before_out_mul", "GemmaRMSNorm")
    methods = ("forward_cuda", "forward_cpu")
    for kind, dtype, method in itertools.product(kinds, (BF16, FP16, FP32), methods):
        norm = sglang[kind == "GemmaRMSNorm"](96, eps=1e-5)
        nn.init.normal_(norm.weight)
        norm = norm.to(dtype)
        norm.cast_x_before_out_mul = kind == "cast_x_before_out_mul"
        forward, ulps, eps = (
            getattr(norm, method),
            5 if dtype == FP32 else 2,
            torch.finfo(dtype).eps,
        )
        for shape in ((64, 96), (2, 8, 96)):
            x, residual, post = (torch.randn(shape).to(dtype) for _ in range(3))
            close(forward(x), norm.forward_native(x), ulps)

            total = (x.float() + residual.float()).to(dtype)
            a, b = x.clone(), residual.clone()
            y, out = forward(a, b)
            assert y is a and out is b and torch.equal(out, total)  # in place, as SGLang's kernel
            want, want_total = norm.forward_native(x.clone(), residual.clone())
            assert torch.equal(out, want_total)
            torch.testing.assert_close(y, want, rtol=4 * eps, atol=4 * eps)
            if kind == "GemmaRMSNorm":  # SGLang's native one rounds the sum first
                want = norm.forward_native(x.float() + residual.float()).to(dtype)
            close(y, want, ulps)
            if dtype != FP32:
                of_rounded = norm.forward_native(total)
                assert (y != want).sum() < (of_rounded != want).sum() / 4
            y, out = forward(x.clone(), residual.clone(), post)
            assert torch.equal(out, (x.float() + (residual + post).float()).to(dtype))
        assert not hasattr(norm, "went_its_own_way")


@torch.no_grad()
def test_sglang_leaves_the_rest_alone(monkeypatch):
    """What ours does not do reaches SGLang's own forward with all its arguments."""
    from rmsnorm_cuda.integrations import sglang as ours

    mode = SimpleNamespace(on=False)
    stub_modules(
        monkeypatch,
        {"sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: mode.on}},
    )
    calls = []
    norm, x = SglangNorm(32), torch.randn(4, 32, dtype=BF16)

    def asked(x, residual=None, *rest, hook=ours._around_rms_norm, **fields):
        calls.clear()
        vars(norm).update(fields)
        hook(lambda *args: calls.append(args), norm, x, residual, *rest)
        for name in fields:
            delattr(norm, name)
        return bool(calls)

    assert not asked(x) and not asked(x, x.clone())
    linear = object()
    assert asked(x, None, None, linear) and calls[0] == (norm, x, None, None, linear)
    assert (
        asked(x, _quant_linear=linear)
        and asked(x, variance_size_override=16)
        and asked(x, override_orig_dtype=FP32)
    )
    assert (
        asked(x, x.float())
        and asked(x, x.clone(), fp32_residual=True)
        and not asked(x, fp32_residual=True)
    )
    assert asked(x, x.clone(), x.float())
    assert asked(x, cast_x_before_out_mul=True)  # the weight is fp32: the result would be
    assert asked(x.double()) and asked(torch.randn(32, 4, dtype=BF16).mT, x.clone())
    assert asked(x, x.float(), hook=ours._around_gemma_rms_norm) and not asked(
        x, hook=ours._around_gemma_rms_norm
    )
    mode.on = True
    assert asked(x) and asked(x, hook=ours._around_gemma_rms_norm)


def test_sglang_plugin_waits_to_be_named(monkeypatch):
    """SGLang loads every plug-in that is installed; to be installed is not to be asked for."""
    from rmsnorm_cuda.integrations import sglang as ours

    called = []
    monkeypatch.setattr(ours, "register", lambda: called.append(True))
    for value, want in ((None, 0), ("", 0), ("other", 0), ("other, rmsnorm_cuda", 1)):
        called.clear()
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
        if value is not None:
            monkeypatch.setenv("SGLANG_PLUGINS", value)
        rmsnorm_cuda_plugins.sglang()
        assert len(called) == want, value


# torchtitan


@pytest.fixture(params=["stand-in", "torchtitan"])
def torchtitan(request, monkeypatch):
    """rmsnorm_cuda.integrations.torchtitan, on torchtitan or on a stand-in with its Config and
    build().
    """
    name = "rmsnorm_cuda.integrations.torchtitan"
    if request.param == "torchtitan":
        if importlib.util.find_spec("torchtitan") is None:
            pytest.skip("torchtitan is not installed")
        pytest.importorskip("torchtitan.models.common.nn_modules", exc_type=ImportError)
    else:

        class Configurable:
            @dataclass(kw_only=True, slots=True)
            class Config:
                def build(self, **kwargs):
                    return self._owner(config=replace(self), **kwargs)

                def traverse(self, kind, prefix="", parent=None, attribute=None):
                    if isinstance(self, kind):
                        yield prefix, self, parent, attribute
                        return
                    for field in fields(self):
                        value = getattr(self, field.name)
                        holder, items = (
                            (value, enumerate(value))
                            if isinstance(value, list)
                            else (self, [(field.name, value)])
                        )
                        for key, item in items:
                            if isinstance(item, Configurable.Config):
                                yield from item.traverse(kind, f"{prefix}.{key}", holder, key)

            def __init_subclass__(cls, **kwargs):
                super().__init_subclass__(**kwargs)
                if "Config" in vars(cls):
                    assert "__slots__" in vars(cls.Config) and all(
                        field.kw_only for field in fields(cls.Config)
                    )
                    cls.Config._owner = cls

        class Module(nn.Module, Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                param_init: dict | None = None

                def build(self, **kwargs):
                    instance = Configurable.Config.build(self, **kwargs)
                    instance._param_init = self.param_init
                    return instance

        class RMSNorm(nn.RMSNorm, Module):
            @dataclass(kw_only=True, slots=True)
            class Config(Module.Config):
                normalized_shape: int
                eps: float = 1e-5
                elementwise_affine: bool = True

            def __init__(self, config):
                super().__init__(config.normalized_shape, config.eps, config.elementwise_affine)

        class ModelConfigConverter(Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                pass

        stub_modules(
            monkeypatch,
            {
                "torchtitan.models.common.nn_modules": {"RMSNorm": RMSNorm},
                "torchtitan.protocols.model": {"ModelConfigConverter": ModelConfigConverter},
                "torchtitan.protocols.module": {"Module": Module},
            },
        )
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_torchtitan_constructor(torchtitan):
    init = {"weight": nn.init.ones_}
    norm = torchtitan.RMSNorm.Config(normalized_shape=40, eps=1e-3, param_init=init).build()
    assert list(inspect.signature(type(norm).forward).parameters) == [
        "self",
        "x",
    ]  # what Module.parallelize() reads
    assert isinstance(norm, rmsnorm_cuda.RMSNorm) and isinstance(norm, torchtitan.Module)
    assert list(norm.state_dict()) == ["weight"] and norm._param_init is init
    x = torch.randn(8, 40)
    close(norm(x), torch.nn.functional.rms_norm(x, (40,), norm.weight, 1e-3), 5)
    gemma = torchtitan.RMSNorm.Config(normalized_shape=40, weight_offset=1.0).build()
    assert not gemma.weight.any() and gemma.eps == 1e-5
    bare = torchtitan.RMSNorm.Config(
        normalized_shape=40, elementwise_affine=False, cast_before_weight=True
    ).build()
    assert bare.weight is None and bare.cast_before_weight
    with torch.device("meta"):
        assert torchtitan.RMSNorm.Config(normalized_shape=40).build().weight.is_meta


def test_torchtitan_converter(torchtitan):
    theirs = torchtitan.TorchtitanRMSNorm
    init = {"weight": nn.init.ones_}

    class Block(torchtitan.Module):
        @dataclass(kw_only=True, slots=True)
        class Config(torchtitan.Module.Config):
            norm: theirs.Config
            layers: list

        def __init__(self, config):
            super().__init__()
            self.norm, self.layers = (
                config.norm.build(),
                nn.ModuleList([layer.build() for layer in config.layers]),
            )

    layers = [theirs.Config(normalized_shape=8) for _ in range(2)]
    config = Block.Config(
        norm=theirs.Config(normalized_shape=16, eps=1e-3, param_init=init), layers=layers
    )
    converter = torchtitan.RMSNormConverter.Config().build()
    assert converter.convert(config) is config
    model = config.build()
    assert [type(module) for module in model.modules() if isinstance(module, nn.RMSNorm)] == [
        torchtitan.RMSNorm
    ] * 3
    assert model.norm.eps == 1e-3 and model.norm._param_init is init
    assert isinstance(
        converter.convert(theirs.Config(normalized_shape=4)), torchtitan.RMSNorm.Config
    )
    derived = torchtitan.RMSNorm.Config(normalized_shape=4)
    assert converter.convert(derived) is derived


def test_torchtitan_model():
    """A Llama of torchtitan's, with its norms and with ours."""
    pytest.importorskip("torchtitan.models.common.nn_modules", exc_type=ImportError)
    llama3 = pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
    from rmsnorm_cuda.integrations.torchtitan import RMSNorm, RMSNormConverter

    config = RMSNormConverter.Config().build().convert(llama3._debugmodel(attn_backend="flex"))
    with torch.device("meta"):
        model = config.build()
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) > 2 and all(type(norm) is RMSNorm for norm in norms)
    norm = norms[0].to_empty(device="cpu")
    norm.init_states()
    assert (norm.weight == 1).all()


# Megatron


def megatron_config(**options):
    """What the constructor reads of a TransformerConfig."""
    defaults = {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
        "persist_layer_norm": False,
        "memory_efficient_layer_norm": False,
        "params_dtype": FP32,
        "init_model_with_meta_device": False,
    }
    return SimpleNamespace(**defaults | options)


def test_megatron_constructor():
    from rmsnorm_cuda.integrations.megatron import MegatronRMSNorm

    assert isinstance(MegatronRMSNorm, type)  # a function would be taken for the module
    x = torch.randn(8, 40)
    norm = MegatronRMSNorm(
        config=megatron_config(persist_layer_norm=True), hidden_size=40, eps=1e-3
    )
    assert (
        norm.weight.sequence_parallel is False
        and norm.eps == 1e-3
        and list(norm.state_dict()) == ["weight"]
    )
    y = norm(x)
    assert y._base is None  # Megatron frees outputs, and asks for a tensor that is no view
    close(y, torch.nn.functional.rms_norm(x, (40,), None, 1e-3), 5)

    options = {
        "layernorm_zero_centered_gamma": True,
        "sequence_parallel": True,
        "params_dtype": BF16,
    }
    norm = MegatronRMSNorm(megatron_config(**options), 40, zero_centered_gamma=True)
    assert (
        norm.weight.sequence_parallel is True
        and norm.weight.dtype == BF16
        and not norm.weight.any()
    )
    assert norm.weight_offset == 1.0 and norm.eps == 1e-5
    nn.init.normal_(norm.weight)
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + norm.weight.float())
    close(
        norm(x.bfloat16()),
        rmsnorm_cuda.rms_norm(x.bfloat16(), (40,), norm.weight, 1e-5, weight_offset=1.0),
        0,
    )
    close(norm(x), want, 5)
    assert MegatronRMSNorm(megatron_config(init_model_with_meta_device=True), 40).weight.is_meta


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (
            {"normalization": "LayerNorm"},
            {},
            "expected normalization to be 'RMSNorm', but got 'LayerNorm'",
        ),
        (
            {},
            {"normalization": "LayerNorm"},
            "expected normalization to be 'RMSNorm', but got 'LayerNorm'",
        ),
        ({}, {"zero_centered_gamma": True}, "config.layernorm_zero_centered_gamma is False"),
        ({"memory_efficient_layer_norm": True}, {}, "the backward reads the norm's input"),
    ],
)
def test_megatron_refuses(config, arguments, message):
    from rmsnorm_cuda.integrations.megatron import MegatronRMSNorm

    with pytest.raises(ValueError, match=message):
        MegatronRMSNorm(megatron_config(**config), 40, **arguments)


@pytest.mark.filterwarnings("ignore")
def test_megatron_specs():
    """In Megatron-Core's layer spec, built by its own build_module()."""
    pytest.importorskip("megatron.core")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rmsnorm_cuda.integrations.megatron import MegatronRMSNorm

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = MegatronRMSNorm
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        persist_layer_norm=True,
        params_dtype=BF16,
    )
    for submodule in (spec.submodules.input_layernorm, ModuleSpec(module=MegatronRMSNorm)):
        norm = build_module(
            submodule, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        assert (
            type(norm) is MegatronRMSNorm
            and norm.weight_offset == 1.0
            and norm.weight.dtype == BF16
        )
        assert norm.weight.sequence_parallel is False
