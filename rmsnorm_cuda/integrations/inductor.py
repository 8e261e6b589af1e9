"""A pass of Inductor that puts our ops where a compiled model computes an RMSNorm.

    torch.compile(model, options={"pre_grad_custom_pass": fuse()})

It runs ahead of autograd, on the graph that Dynamo recorded, so that our own backward
differentiates what it puts there. In the graphs behind autograd the backward of a norm is scattered
in pieces, and would stay Inductor's. The price: this graph may write in place, and one step has
several spellings. A norm with a write between its steps stays, and `_step` reads the spellings of
torch and of ATen, which a program of torch.export has.

A norm is taken if each of its steps, by the dtype that it was recorded with, is one of our op's,
and if gains.json tells that it pays.
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import json
import math
import operator
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor

from .. import _C, __version__

GAINS = Path(__file__).with_name("gains.json")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LEAST_GAIN = 1.05  # what is less may be noise


def fuse(
    where: str | Path = "measured", explain: Callable[[str], object] | None = None
) -> CustomGraphPass:
    """The pass, for `options={"pre_grad_custom_pass": fuse()}` of torch.compile.

    It finds F.rms_norm, nn.RMSNorm, and the formula as transformers writes it, of the families
    `torch`, `llama` and `gemma` or without a weight: over the last dimension, and computed in fp32.
    The sum of two tensors of one dtype ahead of a norm becomes part of :func:`fused_add_rms_norm`.
    Where no gradient is recorded, the quantization to fp8 behind it, with a scale for each row,
    becomes part of :func:`rms_norm_quant`: `y / scale`, clamped, of `scale =
    (max|y| / M).clamp(min=1 / (512 * M))`.

    Args:
        where: "measured": where the time of Inductor's code was at least 1.05 times that of ours on
            this kind of device, for the measured row counts and lengths on both sides of the norm's
            (more rows than were measured count as the most that were). A path: the same, from a
            file that `benchmarks/inductor.py` wrote. "everywhere": wherever it is the same
            function.
        explain: called with a line for each norm: what became of it, and why. Inductor's cache is
            not asked then, for it does not know.

    Raises:
        OSError, ValueError: the file is not there, or no such file.
    """
    return FuseNorms(where, explain)


class FuseNorms(CustomGraphPass):
    """What fuse() returns."""

    def __init__(self, where: str | Path, explain: Callable[[str], object] | None) -> None:
        self.explain, self.gains, table = explain, None, ""
        if where != "everywhere":
            table = (GAINS if where == "measured" else Path(where)).read_text(encoding="utf-8")
            self.gains = Gains(json.loads(table))
        source = Path(__file__).read_text(encoding="utf-8")
        self.key = hashlib.sha256(f"{source}\0{where}\0{table}".encode()).hexdigest()

    def uuid(self) -> str:
        """Of what decides: this version, the measurements, the instruction set."""
        key = f"rmsnorm_cuda {__version__} {_C.isa()} {self.key}"
        return key if self.explain is None else f"{key} {uuid.uuid4()}"

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            try:
                norm = _norm_at(node)
                text = norm and self._take(norm)
            except Stays as reason:
                text = f"stays: {reason}"
            if text and self.explain is not None:
                modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                module = "".join(modules[-1:]).rpartition("].")[2]  # L['self'].layers.0.norm
                self.explain(f"{module or node.name}: {text}")

    def _take(self, norm: Norm) -> str:
        """Replaces as much of the norm and what stands around it as is ours and gains."""
        _check(norm)
        reason = None
        for variant in _variants(norm):
            try:
                place, text = _place(variant), f"{variant.op} of {variant}"
                if self.gains is not None:
                    text += f", {self.gains.of(variant):.2f} times as fast"
            except Stays as error:
                reason = reason or error
                continue
            _replace(variant, place)
            return f"{text}; no more, since {reason}" if reason else text
        raise reason


class Gains:
    """What was measured: `{device: {"op mode dtype": {"rows x columns": factor}}}`. A factor is the
    time of Inductor's code over that of ours."""

    def __init__(self, table: dict[str, dict[str, dict[str, float]]]) -> None:
        self.table = {
            (device, kind): {tuple(map(int, shape.split("x"))): f for shape, f in cells.items()}
            for device, kinds in table.items()
            for kind, cells in kinds.items()
        }

    def of(self, norm: Norm) -> float:
        """The least factor of the cells around the norm."""
        device = device_name(norm.value.device)
        cells = self.table.get((device, f"{norm.op} {norm.mode} {NAMES[norm.value.dtype]}"), {})
        rows, columns = norm.shape
        all_rows, all_columns = (sorted({shape[i] for shape in cells}) for i in (0, 1))
        around = [
            cells[r, c]
            for r in _neighbours(all_rows, min(rows, *all_rows[-1:], rows))
            for c in _neighbours(all_columns, columns)
            if (r, c) in cells
        ]
        if not around:
            raise Stays(f"{norm.op} of {norm} was not measured on {device}")
        if min(around) < LEAST_GAIN:
            raise Stays(f"{norm.op} of {norm} is only {min(around):.2f} times as fast")
        return min(around)


def device_name(device: torch.device) -> str:
    """What measurements are kept by: the instruction set, or a GPU's compute capability."""
    if device.type == "cpu":
        return f"cpu {_C.isa()}"
    return "{} {}.{}".format(device.type, *torch.cuda.get_device_capability(device))


def _neighbours(measured: list[int], size: int) -> list[int]:
    """The size itself, or one on either side; none outside."""
    at = bisect_left(measured, size)
    if measured[at : at + 1] == [size]:
        return [size]
    return measured[at - 1 : at + 1] if 0 < at < len(measured) else []


class Stays(Exception):
    """Why a norm stays as it is."""


@dataclass
class Norm:
    """A norm of the graph, with what around it is computed in one op."""

    inputs: list[fx.Node]  # that are normalized, or added and normalized
    eps: float | None
    outputs: list[fx.Node]  # in the order in which the op returns them
    steps: list[fx.Node]  # what the op takes the place of, in any order
    weight: fx.Node | None = None
    options: dict[str, object] = field(default_factory=dict)
    op: str = "rms_norm"  # of torch.ops.rmsnorm_cuda

    @property
    def value(self) -> Tensor:
        return _value(self.inputs[0])

    @property
    def mode(self) -> str:
        return "training" if _value(self.outputs[0]).requires_grad else "forward"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; a dynamic number of rows is the one that was traced."""
        *lead, columns = self.value.shape
        return math.prod(map(_hint, lead)), columns

    def __str__(self) -> str:
        return "{}x{} {}, {}".format(*self.shape, NAMES[self.value.dtype], self.mode)


# ---------------------------------------------------------------- reading the graph


def _value(node: object) -> Tensor | None:
    """The tensor that stood for it when the graph was recorded."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None and node.op == "get_attr":
        value = operator.attrgetter(node.target)(node.graph.owning_module)
    return value if isinstance(value, Tensor) else None


def _dtype(node: object) -> torch.dtype | None:
    value = _value(node)
    return None if value is None else value.dtype


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if not size.node.has_hint():
        raise Stays("the number of its rows depends on data")
    return int(size.node.hint)


_SPACES = torch, F, operator, builtins
_IN_PLACE = {name for name in vars(operator) if name[0] == "i" and hasattr(operator, name[1:])}
_IN_PLACE |= {"setitem", "delitem"}
_SPELLINGS = {"multiply": "mul", "truediv": "div", "true_divide": "div", "divide": "div"}
_SPELLINGS |= dict.fromkeys(("float", "bfloat16", "half", "type", "type_as", "_to_copy"), "to")
_SPELLINGS |= {"convert_element_type": "to", "absolute": "abs"}
_SPELLINGS |= {"clip": "clamp", "clamp_min": "clamp"}


def _step(node: object) -> str:
    """What a node computes, whether it calls a method, a function of torch or an op of ATen. Empty
    if it calls something else, or something that writes to its arguments."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, str):
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        name = "" if target._schema.is_mutable else target._schema.name.partition("::")[2]
        name = name if target.namespace in ("aten", "prims") else ""
    else:
        name = getattr(target, "__name__", "")
        if not any(getattr(space, name, None) is target for space in _SPACES):
            return ""
        if _is_in_place(node) or name in _IN_PLACE:
            return ""
    if name.endswith("_") or node.kwargs.get("out") is not None:
        return ""
    return _SPELLINGS.get(name, name)


def _is_in_place(node: fx.Node) -> bool:
    """As F.relu(x, inplace=True) is."""
    if not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    given = dict(zip(names, node.args)) | node.kwargs
    return given.get("inplace", False) is not False


def _arguments(node: fx.Node, *names: str) -> list:
    """By position or by name; there may be no others."""
    given = dict(zip(names, node.args)) | node.kwargs
    if len(node.args) > len(names) or set(given) - set(names):
        raise Stays(f"{node.name} has other arguments")
    return [given.get(name) for name in names]


def _first(node: fx.Node) -> object:
    return node.args[0] if node.args else None


def _operands(node: fx.Node) -> tuple:
    return () if node.kwargs or len(node.args) != 2 else node.args


def _other(node: fx.Node, one: fx.Node) -> object:
    """The operand that is not `one`; None if both are."""
    return next((operand for operand in _operands(node) if operand is not one), None)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _uncast(node: object) -> object:
    """What has the same values in a narrower dtype, or the node itself."""
    while _step(node) == "to":
        before, after = _value(_first(node)), _value(node)
        if before is None or (before.shape, before.device) != (after.shape, after.device):
            break
        if before.dtype != after.dtype and not (
            before.dtype in NAMES and after.dtype == torch.float32
        ):
            break
        node = _first(node)
    return node


def _user(node: fx.Node, *steps: str) -> fx.Node | None:
    """The only node that uses it, if it is such a step."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _step(users[0]) in steps else None


def _next(node: fx.Node, *steps: str) -> fx.Node:
    user = _user(node, *steps)
    if user is None:
        raise Stays(f"{node.name} is not used by one {' or '.join(steps)} alone")
    return user


# ---------------------------------------------------------------- the norm


def _norm_at(node: fx.Node) -> Norm | None:
    """The norm of which this is the call, or the mean of squares."""
    step = _step(node)
    if step == "rms_norm":
        x, shape, weight, eps = _arguments(node, "input", "normalized_shape", "weight", "eps")
        if not isinstance(shape, list | tuple) or len(shape) != 1:
            raise Stays(f"it is over the dimensions {shape}")
        return Norm([x], eps, [node], [node], weight)
    if step != "mean" or (wide := _squared(_first(node))) is None:
        return None
    square, dims, keepdim = _arguments(node, "input", "dim", "keepdim")
    if {_dtype(wide), _dtype(square), _dtype(node)} != {torch.float32}:
        raise Stays(f"it is computed in {_dtype(square)}")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    if keepdim is not True or dims not in ([-1], [_value(square).dim() - 1]):
        raise Stays("its mean is not over the last dimension, kept")
    added = _next(node, "add")
    eps = _other(added, node)
    if not _is_number(eps):
        raise Stays(f"{added.name} adds no number to its mean")
    norm = Norm([_uncast(wide)], float(eps), [], [square, node, added])
    return _weighted(norm, _normalized(norm, added))


def _squared(node: object) -> fx.Node | None:
    step = _step(node)
    is_square = step == "square" or (step == "pow" and _operands(node)[1:] == (2,))
    is_square |= step == "mul" and len(set(map(id, _operands(node)))) == 1
    return _first(node) if is_square else None


def _normalized(norm: Norm, added: fx.Node) -> fx.Node:
    """x * rsqrt(added), x * added ** -0.5 or x / sqrt(added)."""
    root = _next(added, "rsqrt", "sqrt", "pow")
    if _step(root) == "pow" and _operands(root)[1:] != (-0.5,):
        raise Stays(f"{root.name} is no power of -0.5")
    scaled = _next(root, "div" if _step(root) == "sqrt" else "mul")
    x = _other(scaled, root)
    is_over = _step(scaled) == "div" and _operands(scaled)[1:] != (root,)
    if is_over or _uncast(x) is not norm.inputs[0] or _dtype(scaled) != torch.float32:
        raise Stays(f"{scaled.name} does not scale in float32 what was squared")
    norm.steps += [root, scaled]
    return scaled


def _weighted(norm: Norm, node: fx.Node) -> Norm:
    """The norm to its end: rounded, then multiplied by the weight, or the other way around."""
    dtype = _dtype(norm.inputs[0])
    cast = _user(node, "to")
    if cast is not None and _dtype(cast) == dtype:
        norm.steps.append(cast)
        product, weight, offset = _product(cast)
        # 1 + weight would be rounded there, too: weightless, with a product behind it.
        if product is not None and not offset:
            norm.options, norm.weight = {"cast_before_weight": True}, weight
            norm.steps.append(product)
            cast = product
        return replace(norm, outputs=[cast])
    product, weight, offset = _product(node)
    if product is not None and _dtype(product) == torch.float32:
        norm.options, norm.weight = {"weight_offset": offset} if offset else {}, weight
        norm.steps.append(product)
        node = product
    if dtype != torch.float32:
        cast = _user(node, "to")
        if _dtype(cast) != dtype:
            raise Stays(f"its result is not rounded to {dtype}, the dtype of its input")
        norm.steps.append(cast)
        node = cast
    return replace(norm, outputs=[node])


def _product(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None, float]:
    """The product with a weight that it goes into alone, the weight, and what is added to that in
    fp32."""
    product = _user(node, "mul")
    scale, offset = _uncast(product and _other(product, node)), 0.0
    if _step(scale) == "add" and _dtype(scale) == torch.float32:
        terms = sorted(_operands(scale), key=_is_number)
        if [_is_number(term) for term in terms] == [False, True]:
            scale, offset = _uncast(terms[0]), float(terms[1])
    if _value(scale) is None or _value(scale).shape != _value(node).shape[-1:]:
        return None, None, 0.0
    return product, scale, offset


# ---------------------------------------------------------------- what stands around it


def _variants(norm: Norm) -> Iterator[Norm]:
    """The norm with what stands around it, the most first."""
    for one in (_quantized(norm), norm):
        if one is not None:
            (total,) = one.inputs
            terms = _operands(total) if _step(total) == "add" else ()
            if terms and all(_alike(term, total) for term in terms):
                around = {"inputs": list(terms), "outputs": [*one.outputs, total]}
                steps, op = [*one.steps, total], f"fused_add_{one.op}"
                yield replace(one, **around, steps=steps, op=op)
            yield one


def _alike(node: object, other: fx.Node) -> bool:
    one, two = _value(node), _value(other)
    return one is not None and (one.shape, one.dtype) == (two.shape, two.dtype)


def _quantized(norm: Norm) -> Norm | None:
    """With the quantization to fp8 behind it, if it is used for nothing else."""
    (y,) = norm.outputs
    if norm.mode == "training":
        return None
    wide = [user for user in y.users if _step(user) == "to" and _dtype(user) == torch.float32]
    users = [user for node in (y, *wide) for user in node.users if user not in wide]
    users.sort(key=lambda user: _step(user) == "div")
    if [_step(user) for user in users] != ["abs", "div"]:
        return None
    absolute, quotient = users
    steps, options, node = [*norm.steps, *wide, *users], {}, absolute
    try:
        while _step(node) != "div":
            node = _next(node, *_TO_LARGEST, "div")
            steps.append(node)
            bound = _of_largest(node)
            if bound and options:
                return None
            options |= bound
        scale = _next(node, "clamp")
        clamped = _next(quotient, "clamp")
        codes = _next(clamped, "to")
        _, *bounds = _arguments(scale, "input", "min", "max")
        _, *range_ = _arguments(clamped, "input", "min", "max")
    except Stays:
        return None
    dtype = _dtype(codes)
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return None
    most = torch.finfo(dtype).max
    same = (
        _operands(node)[1:] == (most,)
        and bounds == [1 / (512 * most), None]
        and _operands(quotient)[1:] == (scale,)
        and range_ == [-most, most]
        and {_dtype(n) for n in (node, scale, quotient, clamped)} == {torch.float32}
        and _value(scale).shape == (*_value(y).shape[:-1], 1)
    )
    options |= norm.options | {"dtype": dtype}
    steps += [scale, clamped, codes]
    found = replace(norm, op="rms_norm_quant", outputs=[codes, scale], steps=steps)
    return replace(found, options=options) if same else None


_TO_LARGEST = "amax", "max", "getitem", "unsqueeze", "to", "clamp"


def _of_largest(node: fx.Node) -> dict[str, float]:
    """What a step from |y| to the largest of each row says of the op's options; raises if it is
    none."""
    step, fine, options = _step(node), True, {}
    if step in ("amax", "max"):
        _, dims, _ = _arguments(node, "input", "dim", "keepdim")
        fine = dims in (-1, [-1], (-1,))
    elif step == "getitem":
        source, index = node.args
        index = index if isinstance(index, tuple) else (index,)
        new_axis = all(part in (None, ..., slice(None)) for part in index)
        fine = index == (0,) if _step(source) == "max" else new_axis
    elif step == "to":
        fine = _uncast(node) is not node
    elif step == "clamp":
        _, least, most = _arguments(node, "input", "min", "max")
        fine, options = least is None and _is_number(most) and most > 0, {"scale_ub": most}
    if not fine:
        raise Stays(f"{node.name} is another function of the largest")
    return options


# ---------------------------------------------------------------- putting ours there


def _check(norm: Norm) -> None:
    """Raises if our norm would compute something else."""
    x, weight = norm.value, _value(norm.weight)
    for node in (*norm.inputs, *norm.outputs, *filter(None, [norm.weight])):
        if type(_value(node)) not in (FakeTensor, Tensor, nn.Parameter) or is_wrapped(_value(node)):
            raise Stays(f"{node} is of a subclass, or under a transform")
        if _value(node).device != x.device:
            raise Stays(f"{node} is on another device")
    if x.dtype not in NAMES:
        raise Stays(f"its input is {x.dtype}")
    if not x.dim() or not isinstance(x.shape[-1], int):
        raise Stays("its rows have no fixed length")
    if not (norm.eps is None or (_is_number(norm.eps) and norm.eps >= 0)):
        raise Stays(f"its eps is {norm.eps}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype not in NAMES):
        raise Stays(f"its weight is {list(weight.shape)}, {weight.dtype}")
    dtype = x.dtype
    if weight is not None and norm.options.get("cast_before_weight"):
        dtype = torch.promote_types(dtype, weight.dtype)
    if _dtype(norm.outputs[0]) != dtype:
        raise Stays(f"its result is {_dtype(norm.outputs[0])}, ours would be {dtype}")


def _place(norm: Norm) -> fx.Node:
    """The node ahead of which the op takes the place of the steps; raises if it cannot."""
    nodes = list(norm.outputs[0].graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    sources = {*norm.inputs, *filter(None, [norm.weight])}
    read = list(norm.steps)  # and what they read, such as an input in fp32
    for node in read:
        read += [n for n in node.all_input_nodes if n not in sources and n not in read]
    place = min(norm.outputs, key=at.get)
    if any(at[source] >= at[place] for source in sources):
        raise Stays("its weight is made behind the addition")
    for node in norm.steps:
        if node not in norm.outputs and not set(node.users) <= set(norm.steps):
            raise Stays(f"{node.name} is used elsewhere")
    first, last = min(map(at.get, read)), max(map(at.get, read))
    for node in nodes[first:last]:
        if node not in read and _may_write(node):
            raise Stays(f"{node.name} may write to what it reads")
    if not all(is_contiguous_or_false(_value(node)) for node in norm.outputs):
        raise Stays("its result is not contiguous")
    return place


def _may_write(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op in ("call_function", "call_method", "call_module") and not _step(node)


def _replace(norm: Norm, place: fx.Node) -> None:
    graph = place.graph
    lead = [norm.shape[1:]] if norm.op == "rms_norm" else []
    scale = [None] if norm.op.endswith("quant") else []
    op = getattr(torch.ops.rmsnorm_cuda, norm.op).default
    with graph.inserting_before(place):
        args = (*norm.inputs, *lead, norm.weight, *scale, norm.eps)
        new = [graph.call_function(op, args, norm.options)]
        if len(norm.outputs) > 1:
            new = [
                graph.call_function(operator.getitem, (new[0], i)) for i in range(len(norm.outputs))
            ]
    for node, ours in zip(norm.outputs, new):
        ours.meta = node.meta.copy()
        node.replace_all_uses_with(ours)
    for node in sorted(norm.steps, reverse=True):
        graph.erase_node(node)
