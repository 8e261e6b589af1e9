"""A wrong eps: one norm has 0.1 where the model's config says 1e-5."""

import torch
from common import load, show

import rmsnorm_cuda

model, batches = load()
model.model.layers[0].input_layernorm.eps = 0.1
with torch.inference_mode(), rmsnorm_cuda.monitor(model) as m:
    losses = []
    for ids in batches:
        losses.append(model(ids, labels=ids).loss)
show(m, losses)
