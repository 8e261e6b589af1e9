"""Lets the norms of a model's layers add the residual: the layer's forward, as its source reads,
with three lines made one.

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.norm(hidden_states)
becomes
    hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)

The variables may have any names, and anything may be added to the residual. Another form is left
alone. So is a forward whose source is not what runs: compiled as it stands, it has to give the very
bytecode. All else is the original's: globals, defaults, what it closes over, decorators.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import types

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..again import is_a, same
from ..modules import RMSNorm
from .families import rebased

_CONSEQUENCE = ", and its norms do not add the residual"


def fuse(layer: nn.Module) -> tuple[str, ...] | str:
    """Gives the layer a class whose norms add the residual. Returns the names of these norms, () if
    there is nothing of the kind to be done, or why it was not."""
    norms = {name: child for name, child in layer.named_children() if same(type(child), RMSNorm)}
    ours = {name for name, norm in norms.items() if len(norm.normalized_shape) == 1}
    if len(ours) < 2 or is_a(layer, _AddsInNorms):
        return ()
    if "forward" in vars(layer):
        return f"its forward was replaced on this instance{_CONSEQUENCE}"
    hooked = {name for name in ours if _has_hooks(layer._modules[name])}
    fused = _fused_class(type(layer), type(layer).forward, frozenset(ours - hooked))
    if isinstance(fused, type):
        layer.__class__ = fused
        return fused._fused
    if fused and hooked:
        fused += f" that has no hooks ({', '.join(sorted(hooked))} has)"
    return fused and fused + _CONSEQUENCE


def unfuse(layer: nn.Module) -> None:
    if is_a(layer, _AddsInNorms):
        made = next(cls for cls in type(layer).__mro__ if "_original" in vars(cls))
        layer.__class__ = rebased(type(layer), made, made._original)


def _has_hooks(norm: nn.Module) -> bool:
    """Whether there is a hook, of this norm or of every module: it expects the sum, and one
    result.
    """
    return bool(
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _has_any_global_hook()
    )


class _AddsInNorms:
    """A base of the classes made here. They have the name of the original, and are copied and
    pickled by way of it.
    """

    _original: type
    _norms: frozenset[str]  # that could take the residual
    _fused: tuple[str, ...]  # that do

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, (self._original, self._norms), *rest

    @staticmethod
    def _add_norm(norm: nn.Module, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        cls = getattr(norm, "_original", type(norm))  # before a monitor gave it another
        if (
            (cls is RMSNorm or same(cls, RMSNorm))
            and isinstance(hidden, Tensor)
            and isinstance(residual, Tensor)
            and not _has_hooks(norm)
            and hidden.dtype == residual.dtype
            and hidden.shape == residual.shape
        ):
            return norm(hidden, residual)
        # Promoted or broadcast as torch does it; or another norm has been put there.
        total = residual + hidden
        return norm(total), total


def _rebuild(original: type, norms: frozenset[str]) -> nn.Module:
    cls = _fused_class(original, original.forward, norms)
    cls = cls if isinstance(cls, type) else original  # of another version, whose source is another
    return cls.__new__(cls)


@functools.cache  # one class for all layers of a model: torch.compile compiles its forward once
def _fused_class(
    cls: type, outermost: types.FunctionType, norms: frozenset[str]
) -> type | str | tuple[()]:
    decorators, forward = [], outermost
    while hasattr(forward, "__wrapped__"):
        decorators.append(forward)
        forward = forward.__wrapped__
    if not isinstance(forward, types.FunctionType):
        return "its forward is no function of Python"
    try:
        source = _Source(forward)
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward is not there"
    rewriter, code = _Rewriter(norms), forward.__code__
    rewritten = rewriter.visit(source.tree())
    if not rewriter.fused:
        if "__class__" in code.co_freevars:
            return "its forward calls super()"
        named = any("residual" in name for name in code.co_varnames)
        if named or _norms_a_sum(source.tree(), norms):
            pattern = "`h = residual + h; residual = h; h = self.norm(h)`"
            return f"its forward does not read {pattern} anywhere"
        return ()
    try:
        if not _same_code(source.compiled(source.tree()), code):
            return (
                "its forward is not what its source says "
                "(the file has changed, or somebody has rewritten it)"
            )
        cells = dict(zip(code.co_freevars, forward.__closure__ or ()))
        new = _with_code(forward, source.compiled(rewritten), cells)
        new = _decorated(decorators, forward, new)
    except _LeftAlone as error:
        return str(error)
    body = {"_original": cls, "_norms": norms, "_fused": tuple(rewriter.fused)}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    fused = type(cls)(cls.__name__, (_AddsInNorms, cls), body)
    # Now: a base class may put decorators around the forward of a new subclass, and they are there
    # already.
    fused.forward = new
    return fused


class _LeftAlone(Exception):
    """Why a forward is left alone."""


class _Source:
    """The text of a function, and what it compiles to in the place where it stands: a class,
    variables around it.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.code = function.__code__
        lines, _ = inspect.getsourcelines(function)
        owner = f".{function.__qualname__}".split(".")[-2]
        around = []
        if free := [name for name in self.code.co_freevars if name != "__class__"]:
            around += ["def around():\n", f" {' = '.join(free)} = None\n"]
        indent = " " * bool(around)
        if owner not in ("", "<locals>"):  # private names have the class's in them
            around.append(f"{indent}class {owner}:\n")
        elif lines[0][:1].isspace():
            around.append(f"{indent}if True:\n")
        self.text, self.above = "".join(around + lines), len(around)
        self.tree()

    def tree(self) -> ast.Module:
        tree = ast.parse(self.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == self.code.co_name:
                node.decorator_list = []
                # Tracebacks show the original's lines.
                return ast.increment_lineno(tree, self.code.co_firstlineno - 1 - self.above)
        raise SyntaxError

    def compiled(self, tree: ast.Module) -> types.CodeType:
        futures = [getattr(__future__, name) for name in __future__.all_feature_names]
        flags = self.code.co_flags & functools.reduce(
            operator.or_, (future.compiler_flag for future in futures)
        )
        module = compile(tree, self.code.co_filename, "exec", flags, dont_inherit=True)
        return next(code for code in _all_codes(module) if code.co_name == self.code.co_name)


def _all_codes(code: types.CodeType):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_codes(constant)


# "co_exceptiontable" from Python 3.11 on.
_FIELDS = (
    "co_name co_code co_names co_varnames co_freevars co_cellvars co_argcount co_posonlyargcount "
    "co_kwonlyargcount co_exceptiontable"
).split()


def _same_code(one: types.CodeType, other: types.CodeType) -> bool:
    """But for where it stands."""
    if any(getattr(one, field, None) != getattr(other, field, None) for field in _FIELDS):
        return False
    if (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED:
        return False
    return len(one.co_consts) == len(other.co_consts) and all(
        _same_code(a, b)
        if isinstance(a, types.CodeType) and isinstance(b, types.CodeType)
        else type(a) is type(b) and repr(a) == repr(b)
        for a, b in zip(one.co_consts, other.co_consts)
    )


def _with_code(
    function: types.FunctionType, code: types.CodeType, cells: dict[str, types.CellType]
) -> types.FunctionType:
    """The function with another code; all else is its own."""
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=function.__code__.co_qualname)
    closure = tuple(cells[name] for name in code.co_freevars) or None
    new = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__
    return new


def _decorated(
    decorators: list[types.FunctionType], forward: types.FunctionType, new: types.FunctionType
) -> types.FunctionType:
    """What the decorators, the outermost first, made of `forward`, made of `new`: the functions
    that they returned, which close over what they call, and over themselves to tell whether they
    are the outermost."""
    instead, filled = {forward: new}, []
    for decorator in reversed(decorators):
        if not isinstance(decorator, types.FunctionType):
            raise _LeftAlone("its forward is decorated by an object")
        code, cells = decorator.__code__, {}
        for name, cell in zip(code.co_freevars, decorator.__closure__ or ()):
            cells[name], held = cell, _function_in(cell)
            if held in (*decorators, forward):
                cells[name] = types.CellType()
                filled.append((cells[name], held))
        if decorator.__wrapped__ not in (held for _, held in filled):
            raise _LeftAlone("its forward is decorated")
        outer = _with_code(decorator, code, cells)
        outer.__wrapped__, instead[decorator], new = new, outer, outer
    for cell, held in filled:
        cell.cell_contents = instead[held]
    return new


def _function_in(cell: types.CellType) -> types.FunctionType | None:
    try:
        held = cell.cell_contents
    except ValueError:  # empty
        return None
    return held if isinstance(held, types.FunctionType) else None


def _norms_a_sum(tree: ast.Module, norms: frozenset[str]) -> bool:
    """Whether one of the norms is called with a sum, in whichever form."""
    sums = set()
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Name(name)], ast.BinOp(_, ast.Add(), _)):
                sums.add(name)
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(_, attribute), [argument]) if attribute in norms:
                match argument:
                    case ast.BinOp(_, ast.Add(), _):
                        return True
                    case ast.Name(name) if name in sums:
                        return True
    return False


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
                ast.Assign(
                    [ast.Name(output)],
                    ast.Call(ast.Attribute(ast.Name("self"), attribute), [ast.Name(argument)], []),
                ),
            ) if kept == argument == total == output != residual and attribute in self.norms:
                # Else the sum may be read later.
                for one, other in ((left, right), (right, left)):
                    if isinstance(one, ast.Name) and one.id == residual:
                        self.fused.append(attribute)
                        call = f"self._add_norm(self.{attribute}, other, {residual})"
                        new = ast.parse(f"{output}, {residual} = {call}").body[0]
                        for node in ast.walk(new):
                            ast.copy_location(node, add)
                        new.value.args[1] = other
                        return new
        return None
