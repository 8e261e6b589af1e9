"""The layers with a gate of vLLM and SGLang on ours. Stand-ins have the fields and the definitions
of theirs; the libraries' own layers run where they are installed. Tried: vLLM 0.33.0 and
SGLang 0.5.23, both with torch 2.14.1, on a CPU."""

import functools
import itertools
import sys
import types
import warnings

import pytest
import torch
from cases import close, stub_modules
from torch import nn

import rmsnorm_cuda_plugins
from rmsnorm_cuda import rms_norm_gated
from rmsnorm_cuda.integrations import gated_layers
from rmsnorm_cuda.integrations import sglang as sglang_plugin
from rmsnorm_cuda.integrations import vllm as vllm_plugin

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDS_FIRST = functools.partial(gated_layers.around_mixer2, cast_before_weight=True)


def normalized(x, group, eps):
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))
    return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)


def activated(activation, gate):
    return (torch.sigmoid if activation == "sigmoid" else nn.functional.silu)(gate.float())


class Layer(nn.Module):
    """What CustomOp is to a plug-in of vLLM: a class by the name of another is built in its place.
    And whether its own kernel ran.
    """

    name, registry, bias, went_its_own_way = "stand_in", {}, None, False

    def __new__(cls, *args, **kwargs):
        return super().__new__(Layer.registry.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, ours, name):
        assert name not in Layer.registry and name == cls.__name__ and issubclass(ours, cls)
        Layer.registry[name], ours.name = ours, name  # as vLLM does

    def forward_cuda(self, *args, **kwargs):
        self.went_its_own_way = True
        return self.forward_native(*args, **kwargs)

    forward_cpu = forward_cuda

    def forward(self, *args, **kwargs):
        return self.forward_cuda(*args, **kwargs)


class RMSNormGated(Layer):
    def __init__(
        self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=False, activation="swish"
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps, self.group_size = eps, group_size
        self.norm_before_gate, self.activation = norm_before_gate, activation

    def forward_native(self, x, z=None):
        act = 1 if z is None else activated(self.activation, z)
        before, after = (1, act) if self.norm_before_gate else (act, 1)
        y = normalized(x.float() * before, self.group_size, self.eps) * self.weight.float()
        return (y * after).to(x.dtype)


class FusedRMSNormGated(Layer):
    def __init__(self, hidden_size, elementwise_affine=True, eps=1e-5, activation="swish"):
        super().__init__()
        self.eps, self.activation = eps, activation
        weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def forward_native(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
        total = x.float() if residual is None else x.float() + residual.float()
        y = normalized(total, None, self.eps) * activated(self.activation, g)
        y = (y if self.weight is None else y * self.weight.float()).to(x.dtype)
        return (y, total) if prenorm else y


class Mixer2RMSNormGated(Layer):
    rounds_first = True

    def __init__(self, full_hidden_size, full_n_groups, use_rms_norm=True, eps=1e-6):
        super().__init__()
        self.tp_size, self.n_groups = 1, full_n_groups
        self.group_size = full_hidden_size // full_n_groups
        self.variance_epsilon, self.use_rms_norm = eps, use_rms_norm
        weight = nn.Parameter(torch.ones(full_hidden_size)) if use_rms_norm else None
        self.register_parameter("weight", weight)

    def forward_native(self, x, gate):
        y = x.float() * activated("silu", gate)
        if not self.use_rms_norm:
            return y.to(x.dtype)
        y = normalized(y, self.group_size, self.variance_epsilon)
        return self.weight * y.to(x.dtype) if self.rounds_first else (y * self.weight).to(x.dtype)


STAND_INS = RMSNormGated, FusedRMSNormGated, Mixer2RMSNormGated


@pytest.fixture(params=["stand-in", "vllm"])
def vllm_layers(request, monkeypatch):
    """The three layers, as vLLM builds them with ours registered."""
    if request.param == "vllm":
        monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
        pytest.importorskip("vllm")
        from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
        from vllm.model_executor.custom_op import op_registry_oot

        own = pytest.importorskip("vllm.model_executor.layers.mamba.mamba_mixer2")
        monkeypatch.setattr(own, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(own, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
        modules = {m: pytest.importorskip(m) for m in vllm_plugin._GATED_LAYERS}
        vllm_plugin.register_gated_layers()
        names = [name for name, _ in vllm_plugin._GATED_LAYERS.values()]
        config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
        with set_current_vllm_config(config):
            yield [getattr(module, name) for module, name in zip(modules.values(), names)]
        for name in names:
            del op_registry_oot[name]
        return
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.setattr(Layer, "registry", {})
    modules = {"vllm.model_executor.custom_op": {"op_registry_oot": Layer.registry}}
    for (module, (name, _)), cls in zip(vllm_plugin._GATED_LAYERS.items(), STAND_INS):
        modules[module] = {name: cls}
    stub_modules(monkeypatch, modules)
    vllm_plugin.register_gated_layers()
    yield STAND_INS


@pytest.fixture(params=["stand-in", "sglang"])
def sglang_layers(request, monkeypatch):
    """The three classes of SGLang with our hooks applied."""
    hooks = {name: hook for name, hook in sglang_plugin._HOOKS.items() if ".layernorm." not in name}
    places = [target.split(".") for target in hooks]
    if request.param == "sglang":
        pytest.importorskip("sglang")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from sglang.srt.plugins.hook_registry import HookRegistry

                modules = [
                    __import__(".".join(["sglang", *path[:-2]]), fromlist=["_"]) for path in places
                ]
        except Exception as error:
            pytest.skip(f"SGLang cannot be imported here: {type(error).__name__}: {error}")
        own = modules[2]
        monkeypatch.setattr(own, "is_dp_attention_enabled", lambda: False)
        ranks = types.SimpleNamespace(tp_size=1, tp_rank=0)
        monkeypatch.setattr(own, "get_parallel", lambda: ranks)
        monkeypatch.setattr(own, "sharded_weight_loader", lambda *args, **options: None)
        classes = [getattr(module, path[-2]) for module, path in zip(modules, places)]
        for cls, path in zip(classes, places):
            monkeypatch.setattr(cls, path[-1], vars(cls)[path[-1]])  # put back afterwards
        sglang_plugin.register()
        HookRegistry.apply_hooks()
        yield classes
        HookRegistry.reset()
        return
    monkeypatch.setattr(Layer, "registry", {})
    hooked = []
    for cls, (*_, method), hook in zip(STAND_INS, places, hooks.values(), strict=True):
        body = {method: vllm_plugin._around(getattr(cls, method), hook), "rounds_first": False}
        hooked.append(type(cls.__name__, (cls,), body))
    stub_modules(
        monkeypatch,
        {"sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False}},
    )
    yield hooked


@pytest.fixture
def calls(monkeypatch):
    """How often ours has run."""
    made = []

    def counted(*args, **options):
        made.append(options)
        return rms_norm_gated(*args, **options)

    monkeypatch.setattr(gated_layers, "rms_norm_gated", counted)
    return made


def every_option(kinds):
    gated, fused, mixer2 = kinds
    for activation, before in itertools.product(("swish", "silu", "sigmoid"), (True, False)):
        for group in (None, 24):
            options = {"norm_before_gate": before, "group_size": group, "activation": activation}
            yield gated(96, eps=1e-3, **options)
    for options in ({}, {"activation": "sigmoid"}, {"elementwise_affine": False}):
        yield fused(96, eps=1e-3, **options)
    for groups in (1, 4):
        yield mixer2(96, groups, eps=1e-3)


def check(kinds, calls, methods, definition):
    """The layers' own results, but for near-ties of their roundings."""
    for norm, dtype in itertools.product(every_option(kinds), (FP32, BF16, FP16)):
        if norm.weight is not None:
            nn.init.normal_(norm.weight)
        norm = norm.to(dtype)
        # The gate is a slice of a projection.
        x, gate = torch.randn(256, 96).to(dtype), torch.randn(256, 200).to(dtype)[:, 100:196]
        want = definition(norm, x, gate)
        for method in methods(norm):
            forward = getattr(norm, method)
            # fp32: both round an exponential, a quotient, a sum, a root and four products.
            close(forward(x, gate), want, 16 if dtype == FP32 else 2)
            y = forward(x.view(2, 128, 96), gate.view(2, 128, 96))
            assert torch.equal(y, forward(x, gate).view(2, 128, 96))
            assert forward(x[:0], gate[:0]).shape == (0, 96)
            assert len(calls) == 4
            calls.clear()
    alone = kinds[0](96, group_size=24)
    nn.init.normal_(alone.weight)
    x = torch.randn(5, 96)
    y = getattr(alone, methods(alone)[0])(x)
    torch.testing.assert_close(y, RMSNormGated.forward_native(alone, x))
    assert len(calls) == 1


@torch.no_grad()
def test_vllm_layers(vllm_layers, calls):
    check(
        vllm_layers,
        calls,
        lambda norm: ("forward", "forward_cuda", "forward_cpu"),
        lambda norm, x, gate: norm.forward_native(x, gate),
    )


@torch.no_grad()
def test_vllm_compiles_the_layers(vllm_layers):
    """In one graph, with one node of ours."""
    gated, fused, mixer2 = vllm_layers
    x, gate = torch.randn(5, 96), torch.randn(5, 96)
    for norm in (gated(96, group_size=24), fused(96), mixer2(96, 4)):
        nn.init.normal_(norm.weight)
        graphs = []
        torch._dynamo.reset()

        def backend(graph, inputs):
            graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
            return graph

        y = torch.compile(norm, backend=backend, fullgraph=True)(x, gate)
        assert torch.equal(y, norm(x, gate))
        assert len(graphs) == 1 and sum("rms_norm_gated" in node for node in graphs[0]) == 1
        assert not any("silu" in node or "rsqrt" in node for node in graphs[0])


@torch.no_grad()
def test_sglang_layers(sglang_layers, calls):
    """SGLang's Triton kernels run on no CPU: the definition is the stand-ins'."""
    of_name = dict(zip((cls.__name__ for cls in sglang_layers), STAND_INS))

    def definition(norm, x, gate):
        vars(norm).setdefault("rounds_first", False)
        return of_name[type(norm).__name__].forward_native(norm, x, gate)

    def methods(norm):
        return ["forward_cuda" if hasattr(norm, "n_groups") else "forward"]

    check(sglang_layers, calls, methods, definition)
    gated = sglang_layers[0](96, norm_before_gate=True)
    x, gate = torch.randn(12, 96), torch.randn(3, 600)[:, :384].unflatten(-1, (4, 96))
    calls.clear()
    assert torch.equal(gated(x, gate), gated(x, gate.reshape(12, 96))) and len(calls) == 2


@torch.no_grad()
def test_what_is_not_ours_stays_theirs(calls, monkeypatch):
    """It reaches the layer's own forward with all its arguments."""
    monkeypatch.setattr(Layer, "registry", {})
    x, gate = torch.randn(4, 96), torch.randn(4, 96)

    def own_way(around, norm, *args, **fields):
        vars(norm).update(fields)
        got = []
        around(lambda *args: got.append(args), norm, *args)
        if got:
            assert got[0][: 1 + len(args)] == (norm, *args) and not calls
        return bool(got) or not calls.pop()

    gated = functools.partial(own_way, gated_layers.around_rms_norm_gated, RMSNormGated(96))
    assert not gated(x) and not gated(x, gate) and not gated(x.half(), gate)
    assert gated(x.double(), gate) and gated(x, gate.double())
    assert gated(x, gate[:1]) and gated(x[:, :1], gate[:, :1])  # would be broadcast
    assert gated(x.to("meta"), gate.to("meta"))
    assert gated(x, gate, activation="gelu")
    assert gated(x, gate, activation="silu", bias=torch.zeros(96))

    fused = functools.partial(
        own_way, gated_layers.around_fused_rms_norm_gated, FusedRMSNormGated(96)
    )
    assert not fused(x, gate) and not fused(x, gate, None, False, True)
    assert fused(x, gate, x) and fused(x, gate, None, True) and fused(x, gate.double())
    assert fused(x, gate, activation="gelu")

    mixer2 = functools.partial(own_way, ROUNDS_FIRST, Mixer2RMSNormGated(96, 4))
    assert not mixer2(x, gate) and not mixer2(x, gate, tp_size=2)
    assert mixer2(x, gate, tp_size=3) and mixer2(x.half(), gate.half(), tp_size=1)
    one = functools.partial(own_way, ROUNDS_FIRST, Mixer2RMSNormGated(96, 1))
    assert not one(x, gate) and one(x, gate, tp_size=2) and one(x, gate, use_rms_norm=False)
    once = functools.partial(gated_layers.around_mixer2, cast_before_weight=False)
    assert not own_way(once, Mixer2RMSNormGated(96, 4), x.half(), gate.half())


def test_sglang_in_batch_invariant_mode(calls, monkeypatch):
    stub_modules(
        monkeypatch,
        {"sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: True}},
    )
    monkeypatch.setattr(Layer, "registry", {})
    (hook,) = (hook for name, hook in sglang_plugin._HOOKS.items() if ".FusedRMSNormGated." in name)
    x, got = torch.randn(2, 96), []
    hook(lambda *args, **options: got.append((args[1:], options)), FusedRMSNormGated(96), x, g=x)
    assert got == [((x,), {"g": x})] and not calls


def test_vllm_registers_once_and_after_others(vllm_layers, monkeypatch):
    """custom_ops means our class by the name of vLLM's; one that a platform has registered
    stays."""
    theirs = vllm_layers[0]
    ours = type(theirs(96))
    assert ours is not theirs and issubclass(ours, theirs) and ours.name == theirs.name
    vllm_plugin.register_gated_layers()  # vLLM may load a plug-in twice
    assert type(theirs(96)) is ours
    (module,) = (m for m, (name, _) in vllm_plugin._GATED_LAYERS.items() if name == "RMSNormGated")
    registry = sys.modules["vllm.model_executor.custom_op"].op_registry_oot
    platforms = type("RMSNormGated", (theirs,), {})
    monkeypatch.setitem(registry, "RMSNormGated", platforms)
    vllm_plugin._register_layer(module, "RMSNormGated", gated_layers.around_rms_norm_gated)
    assert type(theirs(96)) is platforms


def test_vllm_plugin_waits_to_be_named(monkeypatch):
    """vLLM loads every plug-in that is installed; to be installed is not to be asked for."""
    called = []
    monkeypatch.setattr(vllm_plugin, "register", lambda: called.append("ops"))
    monkeypatch.setattr(vllm_plugin, "register_gated_layers", lambda: called.append("layers"))
    for value in (None, "", "other", "other, rmsnorm_cuda"):
        called.clear()
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        if value is not None:
            monkeypatch.setenv("VLLM_PLUGINS", value)
        rmsnorm_cuda_plugins.vllm()
        named = value is not None and "rmsnorm_cuda" in value
        assert called == ["ops", "layers"][: 1 + named], value
