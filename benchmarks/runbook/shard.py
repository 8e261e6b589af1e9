"""A bad data shard: step 3 is random tokens; step 4 and 5 are one token, as padding or zeros."""

import torch
from common import load, show

import rmsnorm_cuda

model, batches = load()
torch.manual_seed(0)
batches[3] = torch.randint_like(batches[3], model.config.vocab_size)
batches[4:] = [torch.zeros_like(ids) for ids in batches[4:]]
with torch.inference_mode(), rmsnorm_cuda.monitor(model) as m:
    losses = []
    for ids in batches:
        losses.append(model(ids, labels=ids).loss)
show(m, losses)
