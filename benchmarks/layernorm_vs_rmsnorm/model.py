"""A byte-level transformer language model, with one of three norms or none."""

import functools
import math

import torch
import torch.nn.functional as F

import rmsnorm_cuda
from rmsnorm_cuda.bench.contenders import EPS

NORMS = {
    "LayerNorm": torch.nn.LayerNorm,
    "torch.nn.RMSNorm": torch.nn.RMSNorm,
    "rmsnorm_cuda.RMSNorm": rmsnorm_cuda.RMSNorm,
}


class Block(torch.nn.Module):
    """Attention and an MLP, each with its norm before it (pre) or behind the addition (post)."""

    def __init__(self, norm, placement, width, heads):
        super().__init__()
        self.placement, self.heads = placement, heads
        self.norms = torch.nn.ModuleList([norm(width), norm(width)])
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        for norm, layer in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = x + layer(norm(x)) if self.placement == "pre" else norm(x + layer(x))
        return x


class Model(torch.nn.Module):
    """A decoder over bytes.

    Its initial weights let post-norm leave the plateau of guessing by frequency within the steps
    that there are: matrices of Xavier's, and embeddings of the size that norms give.
    """

    def __init__(self, norm, placement, args):
        super().__init__()
        self.embedding, self.position = (
            torch.nn.Embedding(256, args.width),
            torch.nn.Embedding(args.context, args.width),
        )
        self.blocks = torch.nn.Sequential(
            *(Block(norm, placement, args.width, args.heads) for _ in range(args.layers))
        )
        self.norm = norm(args.width) if placement == "pre" else torch.nn.Identity()
        self.head = torch.nn.Linear(args.width, 256)
        for part in self.modules():
            if isinstance(part, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(part.weight)
                torch.nn.init.zeros_(part.bias)
        torch.nn.init.normal_(self.position.weight, std=0.3)
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, x):
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def build(norm, placement, seed, args):
    """The model, its weights the same for every norm, and AdamW, which decays matrices only."""
    torch.manual_seed(seed)
    make = (
        functools.partial(NORMS[norm], eps=EPS)
        if norm in NORMS
        else lambda width: torch.nn.Identity()
    )
    model = Model(make, placement, args).to(args.device)
    matrices, others = (
        [p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def step_once(model, optimizer, pair, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, *pair)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def rate_of(step, args):
    """Up in the first tenth, then down a cosine to a tenth."""
    rise = max(1, args.steps // 10)
    if step < rise:
        return args.rate * (step + 1) / rise
    return args.rate * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / (args.steps - rise)))


@torch.no_grad()
def evaluate(model, rows, args):
    losses = [
        (loss_of(model, part[:, :-1], part[:, 1:]).item(), len(part))
        for part in rows.split(args.batch)
    ]
    return sum(loss * count for loss, count in losses) / len(rows)
