"""fp16 overflows: a matrix grows, as in a run that diverges."""

import torch
from common import load, show

import rmsnorm_cuda

model, batches = load(torch.float16)
with torch.inference_mode(), rmsnorm_cuda.monitor(model) as m:
    losses = []
    for step, ids in enumerate(batches):
        if step >= 2:
            model.model.layers[12].mlp.down_proj.weight *= 16
        losses.append(model(ids, labels=ids).loss)
show(m, losses)
