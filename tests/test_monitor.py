"""monitor(): what it sees is what went through the norms, in training, inference and compiled; and the faults that it is for."""

import copy
import math

import pytest
import torch
from cases import same_bits
from torch import nn

import rmsnorm_cuda
from rmsnorm_cuda import RMSNorm, monitor, replace_rms_norm
from rmsnorm_cuda.monitoring import RMSNormAlarm, Thresholds

WIDTH, LAYERS = 32, 4


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.linear = RMSNorm(WIDTH, 1e-6, **options), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(LAYERS))
        self.last = RMSNorm(WIDTH, 1e-6, **options)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def kinds(m):
    return [(a.norm, a.kind) for a in m.alarms]


def test_figures_are_those_of_the_rows():
    model, x = Model(), torch.randn(2, 50, WIDTH)
    x[0, :3] = 0
    x[0, 3:6] *= 1e-9
    x[0, 7, 1] = torch.nan
    x[0, 8, 2] = torch.inf
    seen = []
    handle = model.layers[0].norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    want = model(x)
    with monitor(model, thresholds=Thresholds(small=None)) as m:
        assert same_bits(model(x).detach(), want.detach())
        assert type(model.last).__name__ == "RMSNorm" and isinstance(model.last, RMSNorm)
    handle.remove()
    assert type(model.last) is RMSNorm and not hasattr(model.last, "_seen") and not model._forward_hooks
    assert list(m.norms) == [*(f"layers.{i}.norm" for i in range(LAYERS)), "last"] and m.steps == [0]
    rows, nan, inf, small, least, mean, std, most, dead, weight = m.figures()[0, 0].tolist()
    assert (rows, nan, inf, small, dead, weight) == (100, 1, 1, 6, 0, 1)
    usual = seen[1].double().square().mean(-1).flatten()
    usual = usual[usual.isfinite() & (usual > 1e-6)].sqrt().log2()
    assert [least, mean, most] == pytest.approx([usual.min().item(), usual.mean().item(), usual.max().item()], rel=1e-5)
    assert std == pytest.approx(usual.std(correction=0).item(), rel=1e-4)
    assert ("layers.0.norm", "non_finite") in kinds(m)
    assert "NaN in 1 of 100 rows" in m.alarms[0].message and "Inf in 1 of 100 rows" not in m.alarms[0].message


@pytest.mark.parametrize("compiled", ["no", "wrapped", "in place"])
@pytest.mark.parametrize("training", [False, True])
def test_changes_nothing(training, compiled):
    """Outputs, gradients and the number of compilations."""
    torch._dynamo.reset()
    model, graphs = Model(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    called = torch.compile(model, backend=backend, fullgraph=True) if compiled == "wrapped" else model
    if compiled == "in place":
        model.compile(backend=backend, fullgraph=True)

    def run(x):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            y = called(x)
        if training:
            y.square().sum().backward()
        return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if training)]

    xs = [torch.randn(6, WIDTH) for _ in range(4)]
    want = [run(x) for x in xs]
    before = len(graphs)
    with monitor(called) as m:
        got = [run(x) for x in xs]
    assert all(same_bits(a, b) for one, other in zip(got, want, strict=True) for a, b in zip(one, other, strict=True))
    assert m.steps == [0, 1, 2, 3] and list(m.norms)[0] == "layers.0.norm" and not m.alarms
    assert (m.figures()[:, :, 0] == 6).all() and m.figures()[0, 0, 5].item() == pytest.approx(xs[0].square().mean(1).sqrt().log2().mean().item(), rel=1e-4)
    if compiled != "no":
        assert (before, len(graphs)) == (1, 2)  # once more, for the classes that watch
    run(xs[0])
    assert len(graphs) == before + (compiled != "no")  # and what was compiled before is there again


def test_inductor():
    torch._dynamo.reset()
    model, x = Model(), torch.randn(6, WIDTH)
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode(), monitor(compiled) as m:
        for _ in range(3):
            y = compiled(x)
    assert m.steps == [0, 1, 2] and (m.figures()[:, :, 0] == 6).all()
    torch.testing.assert_close(y, model(x).detach())


def test_residuals_and_families():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = RMSNorm(WIDTH, 1e-5, weight_offset=1.0), RMSNorm(WIDTH, 1e-5, cast_before_weight=True)

        def forward(self, x):
            y, x = self.a(x, x)
            return self.b(y.bfloat16(), x.bfloat16())

    model, x = Fused(), torch.randn(4, WIDTH)
    want = model(x)
    with monitor(model, thresholds=Thresholds(settings=False)) as m:
        assert all(map(torch.equal, model(x), want))
    assert m.figures()[0, 0, 5].item() == pytest.approx((2 * x).square().mean(1).sqrt().log2().mean().item(), rel=1e-4) and not m.alarms


def test_what_is_called_in_part():
    model, x = Model(), torch.randn(4, WIDTH)
    with monitor(model, every=2) as m:
        for _ in range(4):
            model.layers[1](x)
            m.step()
    assert m.steps == [0, 2] and (m.figures()[:, :, 0] == torch.tensor([0, 4, 0, 0, 0])).all()
    assert m.figures()[:, 0, 5].isnan().all() and not m.alarms and "layers.0.norm" in m.report()


def test_wrong_use():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got list"):
        monitor([])
    with pytest.raises(ValueError, match="holds no rmsnorm_cuda.RMSNorm; call replace_rms_norm"):
        monitor(nn.Sequential(nn.RMSNorm(4)))
    with pytest.raises(TypeError, match="on_alarm to be 'raise', a function or None, got 'print'"):
        monitor(Model(), on_alarm="print")
    with pytest.raises(ValueError, match="every to be positive, but got 0"):
        monitor(Model(), every=0)
    model = Model()
    with monitor(model), pytest.raises(RuntimeError, match="being monitored already"), monitor(model):
        pass
    assert type(model.last) is RMSNorm


# Planted faults. Each is found, at its norm and step, and nothing else is.


def watch(model, xs, **options):
    told = []
    with monitor(model, on_alarm=told.append, **options) as m:
        for i, x in enumerate(xs):
            if callable(x):
                x = x(i)
            model(x)
    assert told == m.alarms
    return m


def inputs(n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, WIDTH, generator=generator).to(dtype) for _ in range(n)]


def test_nothing_is_wrong():
    assert not watch(Model(), inputs()).alarms


def test_scaled_up_weight():
    model, xs = Model(), inputs()

    def scale(i):
        with torch.no_grad():
            model.layers[2].norm.weight *= 50
        return xs[i]

    m = watch(model, [xs[0], xs[1], scale])
    assert (m.alarms[0].step, m.alarms[0].norm, m.alarms[0].kind) == (2, "layers.2.norm", "weight")
    assert "the weight is 50 times as large" in m.alarms[0].message
    assert set(kinds(m)[1:]) <= {("layers.3.norm", "drift"), ("last", "drift")}  # what comes behind it sees longer rows
    grown = m.report().splitlines()
    assert "x 50" in next(line for line in grown if line.startswith("layers.2.norm"))


def test_overflow_of_float16():
    model, xs = Model().half(), inputs(dtype=torch.float16)
    m = watch(model, [xs[0], lambda i: xs[i] * 4e4, xs[2]])
    steps = {(a.norm, a.kind): a for a in m.alarms}
    # The input is near the largest number of fp16, and the sum behind the first layer is beyond it.
    assert steps["layers.0.norm", "headroom"].step == 1 and "torch.float16" in steps["layers.0.norm", "headroom"].message
    model = Model().half()
    nn.init.constant_(model.layers[1].linear.weight, 3e4)
    m = watch(model, xs)
    first = m.alarms[0]
    assert (first.step, first.norm, first.kind) == (0, "layers.2.norm", "non_finite") and "overflows" in first.message


def test_dead_layer():
    model = Model()
    nn.init.zeros_(model.layers[1].linear.weight), nn.init.zeros_(model.layers[1].linear.bias)
    m = watch(model, inputs())
    assert kinds(m) == [("layers.2.norm", "dead")] and m.alarms[0].step == 0 and "adds nothing" in m.alarms[0].message
    model = Model()
    nn.init.zeros_(model.last.weight)
    assert ("last", "dead") in kinds(watch(model, inputs()))


def test_wrong_eps():
    model = Model()
    model.layers[3].norm.eps = 5.0
    m = watch(model, inputs())
    assert kinds(m) == [("layers.3.norm", "small")] and "eps=5.0, which decides there" in m.alarms[0].message
    model = Model()
    model.config = type("Config", (), {"rms_norm_eps": 1e-6})()
    model.last.eps = 1e-5
    m = watch(model, inputs())
    assert kinds(m) == [("last", "settings")] and "eps is 1e-05, and the model's config says 1e-06" in m.alarms[0].message


def test_wrong_rounding_family():
    model = Model(cast_before_weight=True)
    model.layers[1].norm = RMSNorm(WIDTH, 1e-6)
    m = watch(model, inputs())
    assert kinds(m) == [("layers.1.norm", "settings")] and m.alarms[0].step == -1
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    llama, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(6)[None]
    with replace_rms_norm(llama), monitor(llama) as m:
        llama(ids)
    assert not m.alarms and len(m.norms) == 5
    for layer in llama.model.layers:  # all but one, so that the others do not tell
        layer.input_layernorm = RMSNorm(32, config.rms_norm_eps)
        layer.post_attention_layernorm = RMSNorm(32, config.rms_norm_eps)
    with replace_rms_norm(llama), monitor(llama) as m:
        llama(ids)
    assert len(m.alarms) == 4 and {a.kind for a in m.alarms} == {"settings"} and "cast_before_weight=True" in m.alarms[0].message


def test_nan_is_told_where_it_comes_first():
    model, xs = Model(), inputs(4)

    def poison(i):
        model.layers[1].linear.bias.data[3] = torch.nan
        return xs[i]

    m = watch(model, [xs[0], xs[1], poison, xs[3]])
    assert (m.alarms[0].step, m.alarms[0].norm, m.alarms[0].kind) == (2, "layers.2.norm", "non_finite")
    assert len([a for a in m.alarms if a.norm == "layers.2.norm"]) == 1  # and not again in the next step


def test_raises():
    model = Model()
    with pytest.raises(RMSNormAlarm, match="last, step 1: rows are .* times as long as in the first step") as caught:
        with monitor(model, on_alarm="raise") as m:
            model(inputs()[0])
            model.layers[3].linear.weight.data *= 1000
            model(inputs()[0])
    assert caught.value.alarm is m.alarms[0] and caught.value.alarm.kind == "drift"
    assert type(model.last) is RMSNorm and not model._forward_hooks


def test_thresholds():
    model = Model()
    model.layers[3].norm.eps = 5.0
    off = Thresholds(None, None, None, None, False, False, False)
    assert not watch(model, inputs(), thresholds=off).alarms
    assert not watch(model, inputs(), thresholds=Thresholds(small=1.0)).alarms


def test_monitored_model_can_be_copied_afterwards():
    model = Model()
    m = watch(model, inputs())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()[0]), model(inputs()[0])) and len(m.steps) == 3


def test_report_and_plot(tmp_path, capsys):
    model = Model()
    nn.init.zeros_(model.last.weight)
    m = watch(model, inputs())
    text = m.report()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.startswith("3 steps, 5 norms") and "! step 0, last: its weight is zero" in text
    pytest.importorskip("matplotlib")
    figure = m.plot(str(tmp_path / "norms.png"))
    assert (tmp_path / "norms.png").stat().st_size > 5000
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (5, 3) and len(axes.get_yticks()) == 5
    assert math.isclose(axes.images[0].get_array()[0, 0], m.figures()[0, 0, 5])
    assert axes.lines[0].get_xydata().tolist() == [[0, 4]]


def test_import_is_lazy():
    import subprocess
    import sys

    code = "import sys, rmsnorm_cuda; sys.exit('rmsnorm_cuda.monitoring' in sys.modules or not callable(rmsnorm_cuda.monitor))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "monitor" in dir(rmsnorm_cuda)
