"""The CPU kernels of other libraries, where they are installed, as contenders for cpu.py.

zentorch and onnxruntime are imported. vLLM and SGLang are given as the file of their kernels: of
vLLM's wheel for the CPU that is `vllm/_C.abi3.so`, or `vllm/_C_AVX2.abi3.so`. None has a backward.
"""

import importlib

import torch

from rmsnorm_cuda.bench.contenders import EPS


class Absent(Exception):
    """Why a library does not run here, or not in this cell."""


def imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from error


def loaded(namespace, file):
    """The ops of a file with kernels."""
    if not file:
        raise Absent("no file of its kernels was named")
    ops = getattr(torch.ops, namespace)
    if not hasattr(ops, "rms_norm") and not hasattr(ops, "rmsnorm_cpu"):
        torch.ops.load_library(file)
    return ops


# A peer is a function of a Cell of cpu.py and of a file. It gives, for each mode, runs of the sets
# of buffers that the Cell has, under the name of what ours is beside them: a new tensor, "out=" or
# "in place".


def zentorch(cell, file):
    imported("zentorch")
    norm = torch.ops.zentorch.zentorch_rms_norm.default
    add = torch.ops.zentorch.zentorch_add_rms_norm_.default
    return {
        "forward": {"": lambda s: norm(s.x, cell.weight, EPS)},
        "fused": {" in place": lambda s: add(s.out, cell.weight, s.total, EPS)},
    }


def vllm(cell, file):
    ops = loaded("_C", file)
    if cell.cols[0] % 8:
        raise Absent("a row is no multiple of 8 columns")
    norm, add = ops.rms_norm.default, ops.fused_add_rms_norm.default

    def forward(s):
        y = torch.empty_like(s.x)
        norm(y, s.x, cell.weight, EPS)
        return y

    return {
        "forward": {"": forward, " out=": lambda s: norm(s.out, s.x, cell.weight, EPS)},
        "fused": {" in place": lambda s: add(s.out, s.total, cell.weight, EPS)},
    }


def sglang(cell, file):
    ops = loaded("sgl_kernel", file)
    if cell.dtype == torch.float32:
        raise Absent("no fp32")
    norm, add = ops.rmsnorm_cpu.default, ops.fused_add_rmsnorm_cpu.default
    return {
        "forward": {"": lambda s: norm(s.x, cell.weight, EPS)},
        "fused": {" in place": lambda s: add(s.out, s.total, cell.weight, EPS)},
    }


def onnxruntime(cell, file):
    """Its output is bound to a buffer that is there."""
    ort, onnx = imported("onnxruntime"), imported("onnx")
    types = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}
    if cell.dtype not in types:
        raise Absent("no bf16")
    element = getattr(onnx.TensorProto, types[cell.dtype])
    shapes = {"x": [cell.rows, *cell.cols], "w": list(cell.cols), "y": [cell.rows, *cell.cols]}
    values = {n: onnx.helper.make_tensor_value_info(n, element, s) for n, s in shapes.items()}
    node = onnx.helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=EPS, axis=-1)
    graph = onnx.helper.make_graph([node], "norm", [values["x"], values["w"]], [values["y"]])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    numpy_type = str(cell.dtype).removeprefix("torch.")
    bindings = {}
    for s in cell.sets:
        bindings[id(s)] = binding = session.io_binding()
        for bind, name, t in (
            (binding.bind_input, "x", s.x),
            (binding.bind_input, "w", cell.weight),
            (binding.bind_output, "y", s.out),
        ):
            bind(name, "cpu", 0, numpy_type, list(t.shape), t.data_ptr())
    return {"forward": {" out=": lambda s: session.run_with_iobinding(bindings[id(s)])}}


PEERS = {"zentorch": zentorch, "vLLM": vllm, "SGLang": sglang, "onnxruntime": onnxruntime}


def runs_of_peers(cell, mode, files, report):
    """Name: run, of the peers that have this mode. report(name, reason): of one that does not."""
    result = {}
    for name, peer in PEERS.items():
        try:
            runs = peer(cell, files.get(name)).get(mode, {})
        except Absent as reason:
            report(name, str(reason))
            continue
        result |= {name + suffix: run for suffix, run in runs.items()}
    return result
