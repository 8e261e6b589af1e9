"""Lets the norms of a model's layers add the residual: the layer's forward, as its source reads, with three lines made one.

    hidden_states = residual + hidden_states
    residual = hidden_states                        ->  hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
    hidden_states = self.norm(hidden_states)

Names are what they are, and anything may be added to the residual. Any other form is left alone.
"""

from __future__ import annotations

import __future__
import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable

from torch import Tensor, nn

from ..again import is_a, same
from ..modules import RMSNorm


def fuse(layer: nn.Module) -> tuple[str, ...] | str:
    """Gives the layer a class whose norms add the residual. Returns the names of these norms, () if there is nothing of the
    kind to be done, or why it was not."""
    norms = {name: child for name, child in layer.named_children() if same(type(child), RMSNorm)}
    ours = {name for name, norm in norms.items() if len(norm.normalized_shape) == 1}
    if len(ours) < 2 or is_a(layer, _AddsInNorms):
        return ()
    if "forward" in vars(layer):
        return "its forward was replaced on this instance, and its norms do not add the residual"
    hooked = {name for name in ours if layer._modules[name]._forward_hooks or layer._modules[name]._forward_pre_hooks}
    fused = _fused_class(type(layer), frozenset(ours - hooked))
    if not isinstance(fused, type):
        return fused and fused + (f" that has no hooks ({', '.join(sorted(hooked))} has)" if hooked else "")
    layer.__class__ = fused
    return fused._fused


def unfuse(layer: nn.Module) -> None:
    if not is_a(layer, _AddsInNorms):
        return
    cls, original = type(layer), type(layer)._original
    if "_original" not in vars(cls):  # fully_shard() made one of it
        bases = tuple(original if "_original" in vars(base) else base for base in cls.__bases__)
        original = type(cls)(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})
    layer.__class__ = original


class _AddsInNorms:
    """A base of the classes made here. They have the name of the original, and are copied and pickled by way of it."""

    _original: type
    _norms: frozenset[str]  # that could take the residual
    _fused: tuple[str, ...]  # that do

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._original, self._norms), vars(self)

    @staticmethod
    def _add_norm(norm: nn.Module, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        cls = getattr(norm, "_original", type(norm))  # before a monitor gave it another
        plain = cls is RMSNorm or same(cls, RMSNorm)
        hooked = norm._forward_hooks or norm._forward_pre_hooks  # which expect the sum, and one result
        if plain and not hooked and hidden.dtype == residual.dtype and hidden.shape == residual.shape:
            return norm(hidden, residual)
        total = residual + hidden  # promoted or broadcast as torch does it; or another norm has been put there
        return norm(total), total


def _rebuild(original: type, norms: frozenset[str]) -> nn.Module:
    cls = _fused_class(original, norms)
    cls = cls if isinstance(cls, type) else original  # of another version, whose source is another
    return cls.__new__(cls)


@functools.cache  # one class for all layers of a model: torch.compile compiles its forward once
def _fused_class(cls: type, norms: frozenset[str]) -> type | str | tuple[()]:
    # Around what the source says lie the decorators that it names, and what a base class puts around
    # the forward of its subclasses (transformers does, for checkpointing). Ours get both, too.
    wrappers, forward = [], cls.forward
    while hasattr(forward, "__wrapped__"):
        wrappers.append(forward)
        forward = forward.__wrapped__
    if not isinstance(forward, types.FunctionType) or forward.__closure__:
        return "its forward is decorated or calls super(), and its norms do not add the residual"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward is not there, and its norms do not add the residual"
    rewriter = _Rewriter(norms)
    rewriter.visit(tree)
    if not rewriter.fused:
        named = any(isinstance(node, ast.Name) and "residual" in node.id for node in ast.walk(tree))
        return "its forward has no addition to the residual right before a norm" if named else ()
    decorated = "its forward is decorated, and its norms do not add the residual"
    try:
        new, outer = _compiled(tree, forward)
    except Exception:  # a decorator that is not to be had in the module
        return decorated
    body = {"forward": outer, "_original": cls, "_norms": norms, "_fused": tuple(rewriter.fused)}
    fused = type(cls)(cls.__name__, (_AddsInNorms, cls), body | {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    inner = fused.forward
    for wrapper in wrappers:
        if getattr(inner, "__code__", inner) is not getattr(wrapper, "__code__", None):
            return decorated
        inner = getattr(inner, "__wrapped__", None)
    return fused if inner is new else decorated


def _compiled(tree: ast.Module, original: types.FunctionType) -> tuple[types.FunctionType, Callable]:
    """The function of this source, in place of the original one; and with the decorators that are written above it."""
    ast.increment_lineno(tree, original.__code__.co_firstlineno - 1)  # tracebacks show the original's lines
    flags = original.__code__.co_flags & __future__.annotations.compiler_flag
    scope: dict = {}
    file = original.__code__.co_filename
    (function,) = tree.body
    written, globals_ = function.decorator_list, original.__globals__
    decorators = [eval(compile(ast.Expression(d), file, "eval"), globals_) for d in written]
    function.decorator_list = []
    exec(compile(tree, file, "exec", flags=flags, dont_inherit=True), globals_, scope)
    new = functools.update_wrapper(scope[original.__name__], original, updated=())
    outer = new
    for decorator in reversed(decorators):
        outer = decorator(outer)
    return new, outer


class _Rewriter(ast.NodeTransformer):
    def __init__(self, norms: frozenset[str]) -> None:
        self.norms, self.fused = norms, []

    def generic_visit(self, node):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, field, None), list):
                setattr(node, field, self._block(getattr(node, field)))
        return super().generic_visit(node)

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        result = []
        while statements:
            new = self._fuse(*statements[:3]) if len(statements) >= 3 else None
            result.append(new or statements[0])
            statements = statements[3 if new else 1 :]
        return result

    def _fuse(self, add: ast.stmt, keep: ast.stmt, norm: ast.stmt) -> ast.stmt | None:
        match add, keep, norm:
            case (
                ast.Assign([ast.Name(total)], ast.BinOp(left, ast.Add(), right)),
                ast.Assign([ast.Name(residual)], ast.Name(kept)),
                ast.Assign([ast.Name(output)], ast.Call(ast.Attribute(ast.Name("self"), attribute), [ast.Name(argument)], [])),
            ) if kept == argument == total == output != residual and attribute in self.norms:  # else the sum may be read later
                for one, other in ((left, right), (right, left)):
                    if isinstance(one, ast.Name) and one.id == residual:
                        self.fused.append(attribute)
                        new = ast.parse(f"{output}, {residual} = self._add_norm(self.{attribute}, other, {residual})").body[0]
                        for node in ast.walk(new):
                            ast.copy_location(node, add)
                        new.value.args[1] = other
                        return new
        return None
