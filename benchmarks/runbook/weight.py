"""A norm's weight grows: its parameters have a learning rate that is far too large."""

import torch
from common import load, show

import rmsnorm_cuda

model, batches = load()
weights = [layer.input_layernorm.weight for layer in model.requires_grad_(False).model.layers[:2]]
optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=0.3)
with rmsnorm_cuda.monitor(model) as m:
    losses = []
    for ids in batches:
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
show(m, losses)
