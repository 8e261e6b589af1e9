"""How DTensor shards the ops. Registered by itself, as soon as both torch.distributed.tensor and
this package are imported.

A norm mixes the elements of a row and nothing else. So the leading dimensions may be sharded in any
way, and the result is sharded alike; the weight is whole everywhere, and its gradient a sum over
the ranks. Any other input (sharded in a normalized dimension, or a sum that is still to be formed)
is redistributed by DTensor first. Heads of q and k that are rotated may be sharded too, if no
weight is across them. The overloads with out= have no rule: DTensor redistributes no
keyword argument, and expects what was written to be returned.
"""

from __future__ import annotations

import torch

from ..again import op_names
from .when_imported import when_imported

_DTENSOR = "torch.distributed.tensor"


def register() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def rule(op):
        arguments, results = op._schema.arguments, op._schema.returns

        def sharding(*args, **kwargs):
            """[(placements of the results, of the arguments)] on one dimension of the mesh."""
            given = {a.name: a.default_value for a in arguments}
            given |= dict(zip(given, args)) | kwargs
            if "q" in given:
                return rope_choices(given)
            input, residual = given["input"], given.get("residual")
            # Else a copy of residual would be written to.
            if op._schema.is_mutable and residual.placements != input.placements:
                raise ValueError(
                    f"{op}: expected residual to be placed as input is, {input.placements}, but it "
                    f"is {residual.placements}"
                )
            whole = Replicate()
            dx, *dgate, dweight = given.get("output_mask", (True, True, True))
            has_groups = given.get("group_size") is not None
            lead = input.ndim - len(given.get("normalized_shape", "1"))
            choices = []
            for rows in (whole, *map(Shard, range(lead))):
                # What was not asked for: a tensor without elements, of a backward None.
                total = whole if rows == whole else Partial()
                of_result = {
                    "norm": rows if given.get("keep_norm") else whole,
                    "scale": rows if given.get("scale") is None else whole,
                    "grad_input": rows if dx else None,
                    "grad_gate": rows
                    if dgate == [True] and given.get("gate") is not None
                    else None,
                    "grad_weight": total if dweight and given["weight"] is not None else None,
                }
                of_tensor = {"weight": whole, "input_weight": whole, "scale": whole}
                if has_groups and rows != whole:  # which are in front of rstd's rows
                    of_result["rstd"] = of_tensor["rstd"] = Shard(rows.dim + 1)
                placed = [
                    of_tensor.get(name, rows) if hasattr(value, "placements") else None
                    for name, value in given.items()
                ]
                choices.append(([of_result.get(r.name, rows) for r in results], placed))
            return choices

        def rope_choices(given):
            q, k = given["q"], given["k"]
            if op._schema.is_mutable and k is not None and k.placements != q.placements:
                raise ValueError(
                    f"{op}: expected k to be placed as q is, {q.placements}, but it is "
                    f"{k.placements}"
                )
            heads = q.ndim + given["heads_dim"]
            token_dims = [d for d in range(q.ndim - 1) if d != heads]
            weights = {side: given[f"{side}_weight"] for side in "qk"}
            own = {side: w is not None and w.ndim == 2 for side, w in weights.items()}
            across = any(
                w is not None and w.ndim == 1 and w.shape[0] != q.shape[-1]
                for w in weights.values()
            )

            def angles(name, trailing, at):
                """Of cos, sin or positions, some of whose leading dimensions may be missing."""
                t, axes = given[name], int(given["sections"] is not None)
                d = at - len(token_dims) + t.ndim - trailing
                sharded = d >= axes and t.shape[d] == q.shape[token_dims[at]]
                return Shard(d) if sharded else Replicate()

            choices = []
            for dim in (None, *range(q.ndim - 1)):
                if dim == heads and across:
                    continue
                whole = Replicate()
                rows = whole if dim is None else Shard(dim)
                of = dict.fromkeys(("q", "k", "grad_q", "grad_k"), rows)
                of_result = dict.fromkeys(("q_out", "k_out", "grad_q", "grad_k"), rows)
                of |= dict.fromkeys(("cos", "sin", "positions"), whole)
                for side in "qk":
                    weight, total, rstd = whole, Partial(), None
                    if dim is None:
                        total = rstd = whole
                    elif dim == heads:
                        rstd = Shard(0 if own[side] else q.ndim - 2)
                        weight = total = Shard(0) if own[side] else total
                        weight = weight if own[side] else whole
                    else:
                        rstd = Shard(token_dims.index(dim) + own[side])
                    of |= {f"{side}_weight": weight, f"{side}_rstd": rstd}
                    of_result |= {f"grad_{side}_weight": total, f"{side}_rstd": rstd}
                if dim in token_dims:
                    at = token_dims.index(dim)
                    if given["positions"] is None:
                        of |= {name: angles(name, 1, at) for name in ("cos", "sin")}
                    else:
                        of["positions"] = angles("positions", 0, at)
                if k is None:  # what is not there has no elements
                    of_result |= {"k_out": whole, "k_rstd": whole}
                    of["k_rstd"] = whole
                for name, is_wanted in wanted_grads(given).items():
                    of_result[name] = of_result[name] if is_wanted else None
                placed = [
                    of[name] if hasattr(value, "placements") else None
                    for name, value in given.items()
                ]
                choices.append(([of_result[r.name] for r in results], placed))
            return choices

        def wanted_grads(given):
            wanted = {}
            for i, side in enumerate("qk"):
                there = given.get(f"grad_{side}") is not None
                mask = given.get("output_mask", (False,) * 4)
                wanted[f"grad_{side}"] = there and mask[i]
                has_weight = given[f"{side}_weight"] is not None
                wanted[f"grad_{side}_weight"] = there and mask[2 + i] and has_weight
            return wanted

        return sharding

    for name in op_names():
        if name.endswith(".out"):
            continue
        op = getattr(torch.ops.rmsnorm_cuda, name.partition("::")[2]).default
        register_sharding(op)(rule(op))
        # Decisions are cached by the arguments that this names; register_sharding names integers
        # only, but normalized_shape, output_mask, cast_before_weight and keep_norm decide too.
        info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op]
        info.static_argnum = 0
        info.static_kwargkey = [a.name for a in op._schema.arguments if a.kwarg_only]


def register_when_imported() -> None:
    # The second name: where a thread is importing that one, it holds a lock that register() needs
    # in the thread that imports the first, which gives up then.
    when_imported((_DTENSOR, _DTENSOR + ".experimental"), register, "DTensor sharding rules")
