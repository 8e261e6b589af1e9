"""Lets the norms of a model's layers add the residual: the layer's forward, as its source reads,
with three lines made one.

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.norm(hidden_states)
becomes
    hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)

The variables may have any names, and anything may be added to the residual. Another form is left
alone.
"""

from __future__ import annotations

import ast
import functools
import types

from torch import Tensor, nn

from ..again import is_a, same
from ..modules import RMSNorm
from .rewrite import Forward, LeftAlone, Rewritten, has_hooks, rewritten_class

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
    hooked = {name for name in ours if has_hooks(layer._modules[name])}
    fused = _fused_class(type(layer), type(layer).forward, frozenset(ours - hooked))
    if isinstance(fused, type):
        layer.__class__ = fused
        return fused._fused
    if fused and hooked:
        fused += f" that has no hooks ({', '.join(sorted(hooked))} has)"
    return fused and fused + _CONSEQUENCE


class _AddsInNorms(Rewritten):
    """A base of the classes made here."""

    @staticmethod
    def _add_norm(norm: nn.Module, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        cls = getattr(norm, "_original", type(norm))  # before a monitor gave it another
        if (
            (cls is RMSNorm or same(cls, RMSNorm))
            and isinstance(hidden, Tensor)
            and isinstance(residual, Tensor)
            and not has_hooks(norm)
            and hidden.dtype == residual.dtype
            and hidden.shape == residual.shape
        ):
            return norm(hidden, residual)
        # Promoted or broadcast as torch does it; or another norm has been put there.
        total = residual + hidden
        return norm(total), total


@functools.cache  # one class for all layers of a model: torch.compile compiles its forward once
def _fused_class(
    cls: type, outermost: types.FunctionType, norms: frozenset[str]
) -> type | str | tuple[()]:
    try:
        forward = Forward(outermost)
        rewriter, code = _Rewriter(norms), forward.code
        rewritten = rewriter.visit(forward.tree())
        if not rewriter.fused:
            if "__class__" in code.co_freevars:
                return "its forward calls super()"
            named = any("residual" in name for name in code.co_varnames)
            if named or _norms_a_sum(forward.tree(), norms):
                pattern = "`h = residual + h; residual = h; h = self.norm(h)`"
                return f"its forward does not read {pattern} anywhere"
            return ()
        new = forward.rewritten(rewritten)
    except LeftAlone as error:
        return str(error)
    body = {"_made_by": (_fused_class, norms), "_fused": tuple(rewriter.fused)}
    return rewritten_class(cls, _AddsInNorms, new, body)


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
