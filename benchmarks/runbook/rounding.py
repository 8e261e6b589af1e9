"""The wrong rounding family: torch's order in half the norms of a Llama, which casts first."""

import torch
from common import load, show

import rmsnorm_cuda

model, batches = load(torch.bfloat16)
for layer in model.model.layers:
    layer.input_layernorm.cast_before_weight = False
with torch.inference_mode(), rmsnorm_cuda.monitor(model) as m:
    losses = []
    for ids in batches:
        losses.append(model(ids, labels=ids).loss)
show(m, losses)
