"""A module's forward, rewritten as its source reads: what fuse_residual and fuse_rope share.

A forward whose source is not what runs is left alone: compiled as it stands, it has to give the
very bytecode. All but the lines that are rewritten is the original's: globals, defaults, what it
closes over, decorators.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import types
from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..again import is_a
from .families import rebased


class LeftAlone(Exception):
    """Why a forward is left alone."""


class Rewritten:
    """A base of the classes made here. They have the name of the original, and are copied and
    pickled by way of it.
    """

    _original: type
    _made_by: tuple  # a function, and what it takes after the original to make the class again
    _fused: tuple[str, ...]  # the norms that do more than they did

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, (self._original, *self._made_by), *rest


def _rebuild(original: type, make: Callable, *args) -> nn.Module:
    cls = make(original, original.forward, *args)
    cls = cls if isinstance(cls, type) else original  # of another version, whose source is another
    return cls.__new__(cls)


def unfuse(layer: nn.Module) -> None:
    if is_a(layer, Rewritten):
        made = next(cls for cls in type(layer).__mro__ if "_original" in vars(cls))
        layer.__class__ = rebased(type(layer), made, made._original)


def has_hooks(norm: nn.Module) -> bool:
    """Whether there is a hook, of this norm or of every module: it expects the norm's one input
    and one result.
    """
    return bool(
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _has_any_global_hook()
    )


class Forward:
    """A forward, the decorators around it and its source. Raises LeftAlone where one of them cannot
    be had.
    """

    def __init__(self, outermost: types.FunctionType) -> None:
        self.decorators: list[types.FunctionType] = []  # the outermost first
        function = outermost
        while hasattr(function, "__wrapped__"):
            self.decorators.append(function)
            function = function.__wrapped__
        if not isinstance(function, types.FunctionType):
            raise LeftAlone("its forward is no function of Python")
        self.function, self.code = function, function.__code__
        try:
            self._source = _Source(function)
        except (OSError, TypeError, SyntaxError):
            raise LeftAlone("the source of its forward is not there") from None

    def tree(self) -> ast.Module:
        """Of the source, new at each call."""
        return self._source.tree()

    def rewritten(self, tree: ast.Module) -> types.FunctionType:
        """The forward, decorated as it was, with the body of `tree`."""
        if not _same_code(self._source.compiled(self.tree()), self.code):
            raise LeftAlone(
                "its forward is not what its source says "
                "(the file has changed, or somebody has rewritten it)"
            )
        cells = dict(zip(self.code.co_freevars, self.function.__closure__ or ()))
        new = _with_code(self.function, self._source.compiled(tree), cells)
        return _decorated(self.decorators, self.function, new)


def rewritten_class(
    cls: type, base: type[Rewritten], forward: types.FunctionType, body: dict[str, object]
) -> type:
    """`cls` with `base` before it and another forward."""
    body = {"_original": cls, **body}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made = type(cls)(cls.__name__, (base, cls), body)
    # Now: a base class may put decorators around the forward of a new subclass, and they are there
    # already.
    made.forward = forward
    return made


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
        # The compiler has another bytecode for a method of what the module imports.
        if imported := _imported_names("".join(inspect.findsource(function)[0])):
            around.insert(0, f"import {', '.join(imported)}\n")
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


def _imported_names(text: str) -> list[str]:
    """What a module imports at its top level, also in an `if` or a `try` there."""
    names, nodes = set(), [ast.parse(text)]
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)
    return sorted(names - {"*"})


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
            raise LeftAlone("its forward is decorated by an object")
        code, cells = decorator.__code__, {}
        for name, cell in zip(code.co_freevars, decorator.__closure__ or ()):
            cells[name], held = cell, _function_in(cell)
            if held in (*decorators, forward):
                cells[name] = types.CellType()
                filled.append((cells[name], held))
        if decorator.__wrapped__ not in (held for _, held in filled):
            raise LeftAlone("its forward is decorated")
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
