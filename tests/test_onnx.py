"""torch.onnx.export() of models with our norms: onnxruntime computes what torch does, with no step
that one has to know.
"""

import io

import pytest
import torch
from torch import nn

from rmsnorm_cuda import (
    RMSNorm,
    fused_add_rms_norm,
    replace_rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
)

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:You are using the legacy"
)

OPTIONS = {
    "": {},
    "no eps": {"eps": None},
    "gemma": {"weight_offset": 1.0},
    "llama": {"cast_before_weight": True},
    "no weight": {"elementwise_affine": False},
}


class Layer(nn.Module):
    """Two dimensions normalized, a residual added in a norm."""

    def __init__(self, options, dtype, weight_dtype):
        super().__init__()
        options = {"eps": 1e-6} | options
        self.first, self.second = RMSNorm((3, 16), **options), RMSNorm(16, **options)
        for norm in (self.first, self.second):
            if norm.weight is not None:
                nn.init.normal_(norm.weight, 1 - norm.weight_offset, 0.25)
        self.to(weight_dtype)
        self.linear = nn.Linear(16, 16, dtype=dtype)

    def forward(self, x):
        y = self.first(x).to(x.dtype)
        y, total = self.second(self.linear(y), x)
        return y + total


class Sandwich(nn.Module):
    """Norms on both sides of the addition."""

    def __init__(self, options, scale):
        super().__init__()
        weights = (None if options == "no weight" else nn.Parameter(torch.rand(16)) for _ in "12")
        self.first, self.second = weights
        self.options, self.scale = dict(OPTIONS[options]), scale
        self.options.pop("elementwise_affine", None)
        self.eps = self.options.pop("eps", 1e-6)

    def forward(self, x):
        y = rms_norm_add(x.sin(), x, self.first, self.eps, **self.options)
        weights = self.first, self.second, self.eps
        y, total = rms_norm_add_rms_norm(x.cos(), y, *weights, scale=self.scale, **self.options)
        return y + total


def run(model_proto, x):
    session = onnxruntime.InferenceSession(model_proto, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def export(model, x, opset):
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, opset_version=opset)
    return program.model_proto, [node.op_type for node in program.model.graph]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("options", OPTIONS)
def test_export(options, opset):
    model, x = Layer(OPTIONS[options], torch.float32, torch.float32).eval(), torch.randn(5, 3, 16)
    proto, ops = export(model, x, opset)
    has_op = opset == 23 and options not in ("gemma", "no weight")
    assert ops.count("RMSNormalization") == 2 * has_op
    with torch.no_grad():
        torch.testing.assert_close(
            run(proto.SerializeToString(), x), model(x), rtol=1e-5, atol=1e-5
        )  # fp32, some roundings


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize("options", OPTIONS)
def test_norms_on_both_sides(options, scale, opset):
    model, x, file = Sandwich(options, scale).eval(), torch.randn(5, 16), io.BytesIO()
    if opset > 17:
        proto = export(model, x, opset)[0].SerializeToString()
    else:
        torch.onnx.export(model, (x,), file, dynamo=False, opset_version=opset)
        proto = file.getvalue()
    with torch.no_grad():
        torch.testing.assert_close(run(proto, x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", ["", "llama"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_fp16(weight_dtype, options):
    model, x = (
        Layer(OPTIONS[options], torch.float16, weight_dtype).eval(),
        torch.randn(5, 3, 16).half(),
    )
    proto, _ = export(model, x, 18)
    with torch.no_grad():
        got, want = run(proto.SerializeToString(), x), model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(
        got, want, rtol=4 * 2**-11, atol=4 * 2**-11
    )  # its matmul sums in another order


class Adding(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(16).half()), options

    def forward(self, x):
        x, residual = x[:32], x[32:]
        y, total = fused_add_rms_norm(x, residual, self.weight, 1e-6, **self.options)
        return torch.cat([y, total])


@pytest.mark.parametrize("options", ["", "gemma", "llama"])
def test_unrounded_sum(options):
    model, x = Adding(OPTIONS[options] | {"round_sum": False}).eval(), torch.randn(64, 16).half()
    protos = [export(model, x, opset)[0].SerializeToString() for opset in (18, 23)]
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=18)
    with torch.no_grad():
        want, of_rounded = model(x), Adding(OPTIONS[options]).eval()
        of_rounded.weight = model.weight
        others = (of_rounded(x) != want).sum()
        for proto in (*protos, file.getvalue()):
            got = run(proto, x)
            assert got.dtype == want.dtype and (got != want).sum() < others / 8
            torch.testing.assert_close(got, want, rtol=2**-10, atol=2**-24)


def test_swapped_model_and_dynamic_batch():
    model, x = (
        nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16, 1e-6), nn.Linear(16, 4)).eval(),
        torch.randn(3, 16),
    )
    replace_rms_norm(model)
    program = torch.onnx.export(
        model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.cat([x, x, x])
    torch.testing.assert_close(
        run(program.model_proto.SerializeToString(), x), model(x).detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("opset", [17, 18])  # axes are an attribute, an input
@pytest.mark.parametrize("options", OPTIONS)
def test_older_exporter(options, opset):
    model, x, file = (
        Layer(OPTIONS[options], torch.float32, torch.float32).eval(),
        torch.randn(5, 3, 16),
        io.BytesIO(),
    )
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=opset)
    with torch.no_grad():
        torch.testing.assert_close(run(file.getvalue(), x), model(x), rtol=1e-5, atol=1e-5)
