"""Lets an attention's norms of q and k rotate them too: the module's forward, as its source reads,
with the norms taken out and done where the rotary embedding is.

    q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
    k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
becomes
    q = self.q_proj(x).view(shape).transpose(1, 2)
    k = self.k_proj(x).view(shape).transpose(1, 2)
    q, k = self._norm_rope(0, apply_rotary_pos_emb, (self.q_norm, self.k_norm), (q, k), cos, sin)

The variables may have any names. Between a norm and the rotary embedding there may be a view and a
transpose(1, 2); nothing else may use the variable there, and nothing may write to memory. The
rotary embedding may be in the body of an `if`: what was in front of it is normed in its `else`.
Another form is left alone. What the function of the rotary embedding computes is found by trying
it.
"""

from __future__ import annotations

import ast
import functools
import re
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..again import is_a, same
from ..functional import rms_norm_rope
from ..modules import RMSNorm
from .families import RMSNormOfAnyWidth
from .recognize_rope import LARGEST, Angles, Rotation, recognize_angles, recognize_rotation
from .rewrite import Forward, LeftAlone, Rewritten, has_hooks, rewritten_class

_DEVICES = ("cpu", "cuda", "meta")
_CONSEQUENCE = ", and its norms do not rotate"


def fuser(model: nn.Module) -> Callable[[str, nn.Module], tuple[str, ...] | str]:
    """A function that fuses what it is given: a name in `model` and the module of that name. It
    gives the module a class whose norms rotate their result. It returns the names of these norms,
    () if there is nothing of the kind to be done, or why it was not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[nn.Module, Angles | str] = {}

    def angles_for(name: str) -> list[Angles | str]:
        """Of the rotary embeddings beside the module, or beside the nearest that it is in."""
        while True:
            children = modules[name].children()
            found = [child for child in children if _may_rotate(type(child).__name__)]
            if found or not name:
                break
            name = name.rpartition(".")[0]
        for module in found:
            if module not in known:
                known[module] = recognize_angles(module)
        return [known[module] for module in found]

    return lambda name, layer: _fuse(layer, lambda: angles_for(name))


def _fuse(layer: nn.Module, angles: Callable[[], list[Angles | str]]) -> tuple[str, ...] | str:
    norms = {name for name, child in layer.named_children() if _is_ours(type(child))}
    functions = _rotations(type(layer).forward)
    if not norms or not functions or is_a(layer, _RotatesInNorms):
        return ()
    if "forward" in vars(layer):
        return f"its forward was replaced on this instance{_CONSEQUENCE}"
    hooked = {name for name in norms if has_hooks(layer._modules[name])}
    fused = _fused_class(type(layer), type(layer).forward, frozenset(norms - hooked), functions)
    if isinstance(fused, str) and hooked:
        fused += f" ({', '.join(sorted(hooked))} has hooks)"
    if isinstance(fused, type):
        reasons = (_reason(layer, site, angles()) for site in fused._sites)
        fused = next(filter(None, reasons), fused)
    if isinstance(fused, str):
        return fused + _CONSEQUENCE
    layer.__class__ = fused
    return fused._fused


def _rotations(forward: Callable) -> frozenset[tuple[str, Callable]]:
    """What a forward may call to rotate q and k: names of its globals, and functions."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if not isinstance(forward, types.FunctionType):
        return frozenset()
    held, names = forward.__globals__, forward.__code__.co_names
    functions = ((name, held.get(name)) for name in names if _may_rotate(name))
    return frozenset(
        (name, function)
        for name, function in functions
        if isinstance(function, (types.FunctionType, nn.Module)) and not _is_replaced(function)
    )


def _may_rotate(name: str) -> bool:
    """Others are not called to see what they do: rotary, rotate, RoPE, but not SolarOpen."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name.replace("RoPE", "Rope"))
    return any(word.lower().startswith(("rot", "rope")) for word in words)


def _reason(layer: nn.Module, site: _Site, angles: list[Angles | str]) -> str:
    """Why the op would not be called for this layer, or be given angles that lie otherwise than it
    takes them. Empty if neither is so.
    """
    for switch in site.switches:
        if switch and not getattr(layer, switch, False):
            return f"its {switch} is off"
    layout = site.rotation.layout
    known = [each for each in angles if isinstance(each, Angles)]
    if layout.has_to_be_shown or not site.rotation.is_partial:
        if not angles:
            return "no module is found beside it that makes its cos and sin"
        if len(known) < len(angles):
            return next(each for each in angles if isinstance(each, str))
    others = [each.made_by for each in known if layout.name not in each.layouts]
    if layout.has_to_be_shown and others:
        return f"{others[0]} does not make cos and sin {layout.words}"
    rotated = {layout.rotated(width) for each in known for width in each.widths}
    weight = layer._modules[site.norms[0]].weight
    columns = None if weight is None or "view" in site.steps[0] else weight.numel()
    if columns and rotated and columns not in rotated and not site.rotation.is_partial:
        return f"it rotates {max(rotated)} of {columns} columns in a way of its own"
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
    of_cos = {torch.float32 if each.in_fp32 else dtype for each in known} or {dtype}
    unknown = {(dtype, each) for each in of_cos} - site.rotation.cos_dtypes.keys()
    if unknown and dtype in (torch.bfloat16, torch.float16):
        return "in 16 bits it rounds in other places than the op does"
    return ""


class _Site(NamedTuple):
    """A call of a rotary embedding in a forward."""

    function: Callable
    keywords: tuple[tuple[str, object], ...]
    rotation: Rotation
    # Of each tensor what lies between the norm and the call: "transpose", "view", in their order.
    steps: tuple[tuple[str, ...], ...]
    norms: tuple[str, ...]  # the attributes that hold them
    switches: tuple[str, ...]  # the attributes that say whether they are called; or empty


class _RotatesInNorms(Rewritten):
    """A base of the classes made here."""

    _sites: tuple[_Site, ...]

    def _norm_rope(
        self,
        index: int,
        function: Callable,
        norms: tuple[nn.Module, ...],
        heads: tuple[Tensor, ...],
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, ...]:
        """The norms of q and k, or of one of them, and their rotary embedding."""
        site = self._sites[index]
        weights = None
        if function is site.function:
            weights = _weights_if_it_fits(site, norms, heads, cos, sin)
        if weights is not None:
            rotation, norm, has_k = site.rotation, norms[0], len(heads) == 2
            part = rotation.layout.part(cos.shape[-1])
            dtype = rotation.cos_dtypes[heads[0].dtype, cos.dtype]
            results = rms_norm_rope(
                heads[0],
                heads[1] if has_k else None,
                weights[0],
                weights[1] if has_k else None,
                cos[..., part].to(dtype),
                sin[..., part].to(dtype),
                norm.eps,
                heads_dim=rotation.heads_dim,
                interleaved=rotation.interleaved,
                weight_offset=norm.weight_offset,
                cast_before_weight=norm.cast_before_weight,
                round_each_step=True,
            )
            return results if has_k else results[:1]
        normed = (
            self._norm_before_rope(index, i, norm, x)
            for i, (norm, x) in enumerate(zip(norms, heads))
        )
        results = function(*normed, cos, sin, **dict(site.keywords))
        return results if len(heads) == 2 else (results,)

    def _norm_before_rope(
        self, index: int, which: int, norm: nn.Module | None, x: Tensor
    ) -> Tensor:
        """The norm in the place where it was: before the steps between it and the call."""
        steps = self._sites[index].steps[which]
        if norm is None:
            return x
        x = x.transpose(1, 2) if "transpose" in steps else x
        if "view" in steps:
            width, shape = _width(norm), x.shape
            is_all_heads = width in (None, shape[-2] * shape[-1])
            x = norm(x.flatten(-2) if is_all_heads else x.reshape(-1, width)).view(shape)
        else:
            x = norm(x)
        return x.transpose(1, 2) if "transpose" in steps else x


def _is_ours(cls: type) -> bool:
    return same(cls, RMSNorm) or same(cls, RMSNormOfAnyWidth)


def _is_plain(norm: nn.Module | None) -> bool:
    """Whether a call of the norm does nothing but to compute what RMSNorm does. A monitor's records
    its rows.
    """
    return (
        _is_ours(type(norm))
        and not hasattr(type(norm), "_original")
        and "forward" not in vars(norm)
        and not has_hooks(norm)
    )


def _is_whole(t: object) -> bool:
    """A DTensor has placements. The op takes none beside a whole cos or weight."""
    return type(t) is Tensor or (isinstance(t, Tensor) and not hasattr(t, "placements"))


def _is_replaced(function: Callable) -> bool:
    """Of a module that the `kernels` library makes of a function: whether there is a kernel now."""
    return isinstance(function, nn.Module) and "forward" in vars(function)


def _width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else None


def _weights_if_it_fits(
    site: _Site,
    norms: tuple[nn.Module | None, ...],
    heads: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
) -> list[Tensor | None] | None:
    """The norms' weights, if the op computes what the norms and the function do."""
    rotation, x, weights = site.rotation, heads[0], []
    if _is_replaced(site.function) or not (_is_whole(x) and _is_whole(cos) and _is_whole(sin)):
        return None
    dtype, shape, angles, device = x.dtype, x.shape, cos.shape, x.device.type
    if len(shape) != 4 or len(angles) != 3 or (dtype, cos.dtype) not in rotation.cos_dtypes:
        return None
    if sin.dtype != cos.dtype or sin.shape != angles:
        return None
    if device not in _DEVICES or (device != "meta" and torch.is_autocast_enabled(device)):
        return None
    batch, columns, rotated = shape[0], shape[3], rotation.layout.rotated(angles[2])
    if angles[0] not in (1, batch) or columns % 2 or rotated > min(columns, LARGEST):
        return None
    if rotated != columns and not rotation.is_partial:
        return None
    heads_dim = rotation.heads_dim + 4
    for norm, t, steps in zip(norms, heads, site.steps):
        if not _is_plain(norm) or not _is_whole(t) or t.dtype != dtype:
            return None
        shape = t.shape
        if len(shape) != 4 or shape[0] != batch or shape[3] != columns:
            return None
        if shape[3 - heads_dim] != angles[1]:
            return None
        across = "view" in steps
        width, weight = (shape[heads_dim] * columns if across else columns,), norm.weight
        if norm.normalized_shape not in (None, width):  # None: any, without a weight
            return None
        if weight is None:
            if across:
                return None
        elif weight.shape != width or not _is_whole(weight):
            return None
        elif norm.cast_before_weight and weight.dtype != dtype:
            return None
        weights.append(weight)
    if len(norms) == 2:
        q, k = norms
        if q.eps != k.eps or q.weight_offset != k.weight_offset:
            return None
        # Of all heads as one, or of each.
        if ("view" in site.steps[0]) != ("view" in site.steps[1]):
            return None
        if q.cast_before_weight != k.cast_before_weight:
            return None
    return weights


@functools.cache  # one class for all layers of a model: torch.compile compiles its forward once
def _fused_class(
    cls: type,
    outermost: types.FunctionType,
    norms: frozenset[str],
    functions: frozenset[tuple[str, Callable]],
) -> type | str:
    try:
        forward = Forward(outermost)
        tree = forward.tree()
        rewriter = _Rewriter(dict(functions), norms, forward.code.co_cellvars)
        rewriter.rewrite(tree, forward.code.co_name)
        if not rewriter.sites:
            return rewriter.reason or "its forward does not read `q, k = rotated(q, k, cos, sin)`"
        new = forward.rewritten(tree)
    except LeftAlone as error:
        return str(error)
    body = {"_made_by": (_made_again, norms), "_sites": tuple(rewriter.sites)}
    names = (name for site in rewriter.sites for name in site.norms)
    body |= {"_fused": tuple(dict.fromkeys(names))}
    return rewritten_class(cls, _RotatesInNorms, new, body)


def _made_again(cls: type, forward: types.FunctionType, norms: frozenset[str]) -> type | str:
    return _fused_class(cls, forward, norms, _rotations(forward))


class _Normed(NamedTuple):
    """Where a variable is normed."""

    statement: ast.Assign
    call: ast.Call
    steps: tuple[str, ...]
    under: ast.If | None  # the rotary embedding is in its body, and the norm in front of it
    switch: str  # the attribute of the module that says whether it is normed; or empty

    def text(self) -> str:
        norm = f"self.{self.call.func.attr}"
        return f"{norm} if self.{self.switch} else None" if self.switch else norm


class _Rewriter:
    def __init__(
        self, functions: dict[str, Callable], norms: frozenset[str], shared: tuple[str, ...]
    ) -> None:
        self.functions, self.norms = functions, norms
        self.shared = {*shared}  # variables of nested functions too
        self.sites: list[_Site] = []
        self.reason = ""  # why a call of a rotary embedding was left

    def rewrite(self, tree: ast.Module, name: str) -> None:
        function = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == name
        )
        self._block(function.body, None)

    def _block(self, block: list[ast.stmt], outside: tuple[list[ast.stmt], int] | None) -> None:
        """Rewrites what stands in the block. `outside`: the block and the place in it of the `if`
        whose body this is.
        """
        for i, statement in enumerate(block):
            if self._is_rotation(statement):
                try:
                    block[i] = self._fuse(block, i, outside)
                except LeftAlone as error:
                    self.reason = self.reason or str(error)
            is_scope = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
            for field in ("body", "orelse", "finalbody"):
                inner = getattr(statement, field, None)
                if isinstance(inner, list) and not is_scope:
                    is_body = isinstance(statement, ast.If) and field == "body"
                    self._block(inner, (block, i) if is_body else None)

    def _is_rotation(self, statement: ast.stmt) -> bool:
        match statement:
            case ast.Assign([_], ast.Call(ast.Name(function))):
                return function in self.functions
        return False

    def _fuse(self, block, i: int, outside) -> ast.stmt:
        target, call = block[i].targets[0], block[i].value
        function, arguments = call.func.id, call.args
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        names = [node.id for node in targets if isinstance(node, ast.Name)]
        given = [node.id for node in arguments[:-2] if isinstance(node, ast.Name)]
        keywords = {
            k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)
        }
        if (
            not 1 <= len(names) == len(targets) == len(set(names)) <= 2
            or given != names
            or len(given) != len(arguments) - 2
            or len(keywords) != len(call.keywords)
            or None in keywords
            or self.shared & {*names}
            or any(isinstance(argument, ast.Starred) for argument in arguments)
            or any(set(names) & _names(argument) for argument in arguments[-2:])
        ):
            raise LeftAlone(f"it does not call {function} as `q, k = {function}(q, k, cos, sin)`")
        normed = [self._normed(name, function, block, i, outside) for name in names]
        under = normed[0].under
        if any(each.under is not under for each in normed):
            raise LeftAlone(f"{function} is under a condition that one of its norms is under too")
        options = tuple(keywords.items())
        rotation = recognize_rotation(self.functions[function], options, len(names))
        if isinstance(rotation, str):
            raise LeftAlone(f"{function} {rotation}")
        for name, each in zip(names, normed):
            # A norm of all heads: they lie side by side where the view is.
            if "view" in each.steps and ("transpose" in each.steps) != (rotation.heads_dim == -3):
                raise LeftAlone(f"{name} is reshaped between its norm and {function}")
        rows = ((each.steps, each.call.func.attr, each.switch) for each in normed)
        index = len(self.sites)
        self.sites.append(_Site(self.functions[function], options, rotation, *zip(*rows)))
        if under is not None:
            texts = (
                f"{name} = self._norm_before_rope({index}, {k}, {each.text()}, {name})"
                for k, (name, each) in enumerate(zip(names, normed))
            )
            under.orelse[:0] = [_statement(text, under) for text in texts]
        for each in normed:
            _Replace(each.call, each.call.args[0]).visit(each.statement)
        norms = "".join(f"{each.text()}, " for each in normed)
        heads = "".join(f"{name}, " for name in names)
        new = _statement(
            f"{heads} = self._norm_rope({index}, {function}, ({norms}), ({heads}), cos, sin)",
            block[i],
        )
        new.value.args[-2:] = arguments[-2:]
        return new

    def _normed(self, name: str, function: str, block, i: int, outside) -> _Normed:
        """Where the variable that statement i of the block rotates is normed."""
        steps: list[str] = []
        under = None
        while True:
            i -= 1
            if i < 0 and outside is not None:
                block, i = outside
                under, outside = block[i], None
                if name in _names(under.test):
                    raise LeftAlone(f"the condition that {function} is under reads {name}")
                if _writes(under.test):
                    raise LeftAlone(f"between a norm and {function} something is written to")
                continue
            if i < 0:
                raise LeftAlone(f"{function} is not given the result of a norm")
            statement = block[i]
            if name not in _names(statement):
                if _writes(statement):
                    raise LeftAlone(f"between a norm and {function} something is written to")
                continue
            statement, switch = self._under_a_switch(statement, name)
            match statement:
                case ast.Assign([ast.Name(assigned)], value) if assigned == name:
                    peeled = len(steps)
                    value = self._peeled(value, name, steps)
                    if switch and len(steps) > peeled:
                        value = None
                case _:
                    raise LeftAlone(f"{name} has another use in front of {function}")
            match value:
                case ast.Name(again) if again == name and not switch:
                    continue
                case ast.Call(ast.Attribute(ast.Name("self"), norm), [x], []) if (
                    norm in self.norms and not isinstance(x, ast.Starred)
                ):
                    if tuple(steps) not in _KNOWN_STEPS:
                        raise LeftAlone(f"{name} is reshaped between its norm and {function}")
                    return _Normed(statement, value, tuple(steps), under, switch)
                case ast.Call(ast.Attribute(ast.Name("self"), norm)) if "norm" in norm:
                    raise LeftAlone(f"its {norm} is no RMSNorm that was swapped, or has a hook")
            raise LeftAlone(f"{function} is not given the result of a norm")

    @staticmethod
    def _under_a_switch(statement: ast.stmt, name: str) -> tuple[ast.stmt, str]:
        """Of `if self.switch: ...` the statement in it that has to do with the variable, and the
        name of the switch; else the statement itself.
        """
        match statement:
            case ast.If(ast.Attribute(ast.Name("self"), switch), body, []):
                inner = [each for each in body if name in _names(each)]
                if len(inner) == 1 and not any(_writes(each) for each in body):
                    return inner[0], switch
        return statement, ""

    def _peeled(self, value: ast.expr, name: str, steps: list[str]) -> ast.expr:
        """What is transposed or viewed, which is added to the steps, the last one first."""
        while True:
            match value:
                case ast.Call(
                    ast.Attribute(inner, "transpose"), [ast.Constant(1), ast.Constant(2)], []
                ):
                    steps.insert(0, "transpose")
                case ast.Call(ast.Attribute(inner, "view" | "reshape"), shape, []) if not any(
                    name in _names(size) for size in shape
                ):
                    steps.insert(0, "view")
                case _:
                    return value
            value = inner


# In their order. After a transpose a view would put other rows together.
_KNOWN_STEPS = (), ("transpose",), ("view",), ("view", "transpose")


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _writes(node: ast.AST) -> bool:
    """Whether it may write to a tensor, of which the norm's input can be a view."""
    for each in ast.walk(node):
        match each:
            case ast.AugAssign() | ast.Delete() | ast.Yield() | ast.Await():
                return True
            case ast.Subscript(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
                return True
            case ast.Call(ast.Attribute(_, name) | ast.Name(name)) if name.endswith("_"):
                return True
            case ast.keyword("out" | "inplace"):
                return True
    return False


def _statement(text: str, place: ast.stmt) -> ast.stmt:
    """Tracebacks show the original's line."""
    statement = ast.parse(text).body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, place)
    return statement


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().visit(node)
