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
            given = {a.name: a.default_value for a in arguments}
            given |= dict(zip(given, args)) | kwargs
            input, residual = given["input"], given.get("residual")
            # Else a copy of residual would be written to.
            if op._schema.is_mutable and residual.placements != input.placements:
                raise ValueError(
                    f"{op}: expected residual to be placed as input is, {input.placements}, but it "
                    f"is {residual.placements}"
                )
            whole = Replicate()
            dx, dweight = given.get("output_mask", (True, True))
            lead = input.ndim - len(given.get("normalized_shape", "1"))
            choices = []
            for rows in (whole, *map(Shard, range(lead))):
                # What was not asked for: a tensor without elements, of a backward None.
                total = whole if rows == whole else Partial()
                of_result = {
                    "norm": rows if given.get("keep_norm") else whole,
                    "scale": rows if given.get("scale") is None else whole,
                    "grad_input": rows if dx else None,
                    "grad_weight": total if dweight and given["weight"] is not None else None,
                }
                of_tensor = {"weight": whole, "scale": whole}
                placed = [
                    of_tensor.get(name, rows) if hasattr(value, "placements") else None
                    for name, value in given.items()
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
