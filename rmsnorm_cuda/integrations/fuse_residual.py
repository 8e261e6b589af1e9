"""Lets the norms of a model's layers add the residual: the layer's forward, as its source reads,
with a few lines made one.

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.norm(hidden_states)
becomes
    hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)

With `hidden_states = self.norm_a(hidden_states)` right before them (Gemma 2) all four become
    hidden_states, residual = self._norm_add_norm(
        self.norm_a, self.norm, hidden_states, residual
    )
and where only the addition is behind it (Olmo 2), both lines become
    hidden_states = self._norm_add(self.norm_a, hidden_states, residual)

The variables may have any names, and anything may be added to the residual, or normalized before.
Another form is left alone.
"""

from __future__ import annotations

import ast
import functools
import types

import torch
from torch import Tensor, nn

from ..again import is_a, same
from ..functional import rms_norm_add, rms_norm_add_rms_norm
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
            and "forward" not in vars(norm)
            and not has_hooks(norm)
            and hidden.dtype == residual.dtype
            and hidden.shape == residual.shape
        ):
            return norm(hidden, residual)
        # Promoted or broadcast as torch does it; or another norm has been put there.
        total = residual + hidden
        return norm(total), total

    @staticmethod
    def _norm_add(norm: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor:
        if not _adds(norm, hidden, residual):
            return residual + norm(hidden)
        return rms_norm_add(hidden, residual, norm.weight, norm.eps, **_options(norm))

    @staticmethod
    def _norm_add_norm(
        first: nn.Module, second: nn.Module, hidden: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        if (
            _adds(first, hidden, residual)
            and _computes(second)
            and second.normalized_shape == first.normalized_shape
            and second.eps == first.eps
            and _options(second) == _options(first)
        ):
            weights = first.weight, second.weight
            return rms_norm_add_rms_norm(hidden, residual, *weights, first.eps, **_options(first))
        return _AddsInNorms._add_norm(second, first(hidden), residual)


def _computes(norm: nn.Module) -> bool:
    """Whether nobody sees if its numbers are used without a call of it: no hook, no monitor, no
    other forward."""
    return (
        same(type(norm), RMSNorm)
        and not hasattr(type(norm), "_original")  # a monitor's
        and len(norm.normalized_shape) == 1
        and "forward" not in vars(norm)
        and not has_hooks(norm)
    )


def _adds(norm: nn.Module, hidden: Tensor, residual: Tensor) -> bool:
    """Whether norm(hidden) has the residual's shape and dtype, and may be part of the addition."""
    if not (_computes(norm) and isinstance(hidden, Tensor) and isinstance(residual, Tensor)):
        return False
    dtype, weight = hidden.dtype, norm.weight
    if norm.cast_before_weight and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    return (
        dtype == residual.dtype
        and hidden.shape == residual.shape
        and hidden.shape[-1:] == norm.normalized_shape
    )


def _options(norm: nn.Module) -> dict[str, float | bool]:
    return {
        "weight_offset": norm.weight_offset,
        "cast_before_weight": norm.cast_before_weight,
    }


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
                before = "`h = residual + h; residual = h; h = self.norm(h)`"
                behind = "`h = self.norm(h); h = residual + h`"
                return f"its forward does not read {before} or {behind} anywhere"
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
            new, count = self._fuse_first(statements)
            result.append(new or statements[0])
            statements = statements[count if new else 1 :]
        return result

    def _fuse_first(self, statements: list[ast.stmt]) -> tuple[ast.stmt | None, int]:
        """What takes the place of the first ones, and of how many."""
        for count, fuse in ((4, self._fuse_both), (2, self._fuse_behind), (3, self._fuse)):
            if len(statements) >= count and (new := fuse(*statements[:count])):
                return new, count
        return None, 0

    def _fuse_behind(self, norm: ast.stmt, add: ast.stmt) -> ast.stmt | None:
        match norm, add:
            case (
                ast.Assign(
                    [ast.Name(normed)],
                    ast.Call(ast.Attribute(ast.Name("self"), attribute), [argument], []),
                ),
                ast.Assign(
                    [ast.Name(total)], ast.BinOp(ast.Name(left), ast.Add(), ast.Name(right))
                ),
            ) if total == normed and attribute in self.norms and {left, right} > {normed}:
                # Else the norm may be read later.
                if not isinstance(argument, ast.Starred):
                    residual = left if right == normed else right
                    call = f"self._norm_add(self.{attribute}, argument, {residual})"
                    return self._made([attribute], f"{total} = {call}", norm, argument)
        return None

    def _fuse_both(
        self, first: ast.stmt, add: ast.stmt, keep: ast.stmt, norm: ast.stmt
    ) -> ast.stmt | None:
        fused = list(self.fused)
        second, behind = self._fuse(add, keep, norm), self._fuse_behind(first, add)
        self.fused = fused
        if not second or not behind:
            return None
        attributes = [first.value.func.attr, norm.value.func.attr]
        names = ", ".join(f"self.{attribute}" for attribute in attributes)
        residual = keep.targets[0].id
        call = f"self._norm_add_norm({names}, argument, {residual})"
        text = f"{norm.targets[0].id}, {residual} = {call}"
        return self._made(attributes, text, first, first.value.args[0])

    def _made(self, attributes: list[str], text: str, at: ast.stmt, argument: ast.expr) -> ast.stmt:
        """The statement of a text, with this expression for the argument before the last."""
        self.fused += attributes
        new = ast.parse(text).body[0]
        for node in ast.walk(new):
            ast.copy_location(node, at)
        new.value.args[-2] = argument
        return new

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
                        call = f"self._add_norm(self.{attribute}, other, {residual})"
                        return self._made([attribute], f"{output}, {residual} = {call}", add, other)
        return None
