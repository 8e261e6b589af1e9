"""How DTensor shards the ops. Registered by itself, as soon as both torch.distributed.tensor and
this package are imported.

A norm mixes the elements of a row and nothing else. So the leading dimensions may be sharded in any
way, and the result is sharded alike; the weight is whole everywhere, and its gradient a sum over
the ranks. Any other input (sharded in a normalized dimension, or a sum that is still to be formed)
is redistributed by DTensor first. The overloads with out= have no rule: DTensor redistributes no
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
            given = (
                {a.name: a.default_value for a in arguments}
                | dict(zip([a.name for a in arguments], args))
                | kwargs
            )
            input, residual = given["input"], given.get("residual")
            if (
                op._schema.is_mutable and residual.placements != input.placements
            ):  # a copy of it would be written to
                raise ValueError(
                    f"{op}: expected residual to be placed as input is, {input.placements}, but it "
                    f"is {residual.placements}"
                )
            # What was not asked for: a tensor without elements, of a backward None.
            unasked = dict.fromkeys(
                ["norm"] * (not given.get("keep_norm"))
                + ["scale"] * (given.get("scale") is not None),
                Replicate(),
            )
            dx, dweight = given.get("output_mask", (True, True))
            unasked |= dict.fromkeys(
                ["grad_input"] * (not dx)
                + ["grad_weight"] * (not dweight or given["weight"] is None)
            )
            of_tensor = {"weight": Replicate(), "scale": Replicate()}
            lead = input.ndim - len(given.get("normalized_shape", "1"))
            choices = []
            for rows in (Replicate(), *map(Shard, range(lead))):
                of_result = {"grad_weight": rows if rows.is_replicate() else Partial()} | unasked
                placed = [
                    of_tensor.get(n, rows) if hasattr(v, "placements") else None
                    for n, v in given.items()
                ]
                choices.append(([of_result.get(r.name, rows) for r in results], placed))
            return choices

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
