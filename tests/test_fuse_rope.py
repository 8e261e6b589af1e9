"""replace_rms_norm(fuse_rope=True): attentions whose norms rotate q and k compute what they did, or
are left alone.
"""

import collections
import contextlib
import copy
import importlib
import inspect
import logging
import pathlib
import pickle
import re
import sys

import pytest
import torch
from cases import TINY, same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm_cuda
from rmsnorm_cuda import replace_rms_norm
from rmsnorm_cuda.integrations import fuse_rope
from rmsnorm_cuda.integrations.recognize_rope import recognize_angles

try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed"
)

WIDTH, HEADS, KV_HEADS, HEAD = 24, 3, 2, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Attentions as they are written, and their rotary embeddings


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotate_one(x, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return x * cos + rotate_half(x) * sin


def rotate_a_part(q, k, cos, sin):
    width = cos.shape[-1]
    rotated = apply_rotary(q[..., :width], k[..., :width], cos, sin)
    return tuple(torch.cat((r, x[..., width:]), -1) for r, x in zip(rotated, (q, k)))


def rotate_neighbours(q, k, cos, sin):
    def rotate(x):
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def rotate_by_first_half(q, k, cos, sin):
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in (cos, sin))
    return rotate_neighbours(q, k, cos, sin)


def rotate_by_single(q, k, cos, sin):
    return apply_rotary(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def rotate_in_fp32(q, k, cos, sin):
    rotated = apply_rotary(q.float(), k.float(), cos.float(), sin.float())
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def rotate_halves_in_fp64(q, k, cos, sin):
    """In fp32 as any other; of 16 bits few results have other bits than in fp32, and none beside
    cos in 16 bits, whose products are exact in fp32.
    """
    if q.dtype == torch.float32:
        return apply_rotary(q, k, cos, sin)
    rotated = apply_rotary(q.double(), k.double(), cos.double(), sin.double())
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def rotate_backwards(q, k, cos, sin):
    return apply_rotary(q, k, cos, -sin)


class RotaryEmbedding(nn.Module):
    def __init__(self, layout="halves", width=HEAD, dtype=None):
        super().__init__()
        self.layout, self.dtype = layout, dtype
        frequencies = 1 / 100 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq.float()
        if self.layout == "halves":
            angles = torch.cat((angles, angles), -1)
        if self.layout == "pairs":
            angles = angles.repeat_interleave(2, -1)
        if self.layout == "odd":
            angles = torch.cat((angles, 2 * angles), -1)
        dtype = self.dtype or x.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """As Qwen3's; its subclasses write it otherwise."""

    def __init__(self, width=HEAD, k_width=None):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.q_norm, self.k_norm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(k_width or width, 1e-6)
        self.rotates, self.use_norm = True, True

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class AfterTranspose(Attention):
    """As Gemma 3's."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        query = self.q_proj(x).view(shape).transpose(1, 2)
        key = self.k_proj(x).view(shape).transpose(1, 2)
        query = self.q_norm(query)
        key = self.k_norm(key)
        query, key = apply_rotary(query, key, angles[0], angles[1])
        return query, key


class AfterTransposeOfAPart(AfterTranspose):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        query = self.q_proj(x).view(shape).transpose(1, 2)
        key = self.k_proj(x).view(shape).transpose(1, 2)
        query = self.q_norm(query)
        key = self.k_norm(key)
        query, key = rotate_a_part(query, key, angles[0], angles[1])
        return query, key


class AcrossHeads(Attention):
    """As Olmo 2's."""

    def __init__(self):
        super().__init__(HEADS * HEAD, KV_HEADS * HEAD)

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x))
        k = self.k_norm(self.k_proj(x))
        q = q.view(shape).transpose(1, 2)
        k = k.reshape(*shape).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class OneByOne(Attention):
    """As Gemma 3n's and 4's."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        cos, sin = angles
        q = self.q_proj(x).view(shape)
        q = self.q_norm(q)
        q = rotate_one(q, cos, sin, unsqueeze_dim=2)
        q = q.transpose(1, 2)
        if self.rotates:
            k = self.k_proj(x).view(shape)
            k = self.k_norm(k)
            k = rotate_one(k, cos, sin, unsqueeze_dim=2)
            k = k.transpose(1, 2)
        else:
            k = q
        return q, k


class Neighbours(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_neighbours(q, k, cos, sin)
        return q, k


class FirstHalf(Attention):
    """As GLM's."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_by_first_half(q, k, cos, sin)
        return q, k


class Single(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_by_single(q, k, cos, sin)
        return q, k


class Conditional(Attention):
    """As Exaone 4's: not every layer rotates."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        if self.rotates:
            cos, sin = angles
            q, k = apply_rotary(q, k, cos, sin)
        return q, k


class ConditionalAcrossHeads(AcrossHeads):
    """As Olmo Hybrid's."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x))
        k = self.k_norm(self.k_proj(x))
        q = q.view(shape).transpose(1, 2)
        k = k.view(shape).transpose(1, 2)
        if self.rotates:
            cos, sin = angles
            q, k = apply_rotary(q, k, cos, sin)
        elif self.use_norm:
            q = 2 * q
        return q, k


class Switch(Attention):
    """As GLM 4.5's: not every configuration norms."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_proj(x).view(shape)
        k = self.k_proj(x).view(shape)
        if self.use_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


FUSED = {
    Attention: "halves",
    AfterTranspose: "halves",
    AfterTransposeOfAPart: "halves",
    AcrossHeads: "halves",
    OneByOne: "halves",
    Neighbours: "pairs",
    FirstHalf: "halves",
    Single: "single",
    Conditional: "halves",
    ConditionalAcrossHeads: "halves",
    Switch: "halves",
}


class RopeFirst(Attention):
    """As HunYuan's."""

    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return self.q_norm(q), self.k_norm(k)


class ScaledBetween(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2) * 0.5
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class ReadBetween(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        scale = q.abs().amax()
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q * scale, k


class ReadLater(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        rotated, k = apply_rotary(q, k, cos, sin)
        return rotated + q, k


class WrittenBetween(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        both = self.q_proj(x)
        q = self.q_norm(both.view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        both.mul_(3)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class WrittenInTheCondition(WrittenBetween):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        both = self.q_proj(x)
        q = self.q_norm(both.view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        if both.mul_(3) is not None:
            cos, sin = angles
            q, k = apply_rotary(q, k, cos, sin)
        return q, k


class ViewedAfterTranspose(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape))
        k = self.k_norm(self.k_proj(x).view(shape))
        q = q.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1], HEAD)
        k = k.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1], HEAD)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class AcrossTokens(AcrossHeads):
    """A norm of what is a head in the view."""

    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x))
        k = self.k_norm(self.k_proj(x))
        q = q.view(x.shape[0], HEADS, x.shape[1], HEAD)
        k = k.view(x.shape[0], KV_HEADS, x.shape[1], HEAD)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class Starred(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(*[self.q_proj(x).view(shape)]).transpose(1, 2)
        k = self.k_norm(*[self.k_proj(x).view(shape)]).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class StarredAngles(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        q, k = apply_rotary(q, k, angles[0], *angles[1:])
        return q, k


class InANestedFunction(Attention):
    def forward(self, x, angles):
        def rotated(x):
            shape = (*x.shape[:-1], -1, HEAD)
            q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
            k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
            q, k = apply_rotary(q, k, angles[0], angles[1])
            return q, k

        q, k = rotated(x)
        return apply_rotary(q, k, angles[0], angles[1])


class OneNorm(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q, k


class SwitchOfOne(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        if self.rotates:
            k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
            cos, sin = angles
            q, k = apply_rotary(q, k, cos, sin)
            return q, k
        return q, q


class ConditionReads(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        if q.abs().amax() > 0:
            cos, sin = angles
            q, k = apply_rotary(q, k, cos, sin)
        return q, k


class ReadByANestedFunction(Attention):
    def forward(self, x, angles):
        def size():
            return q.abs().amax()

        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        scale = size()
        cos, sin = angles
        q, k = apply_rotary(q, k, cos, sin)
        return q * scale, k


class AnotherRotation(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_backwards(q, k, cos, sin)
        return q, k


class OfAnExpression(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = apply_rotary(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), k, cos, sin)
        return q, k


class LayerNorms(Attention):
    def __init__(self):
        super().__init__()
        self.k_norm = nn.LayerNorm(HEAD)


class CallsSuper(Attention):
    def forward(self, x, angles):
        q, k = super().forward(x, angles)
        q, k = apply_rotary(q, k, *angles)
        return q, k


NOT_FUSED = {
    RopeFirst: "apply_rotary is not given the result of a norm",
    ScaledBetween: "apply_rotary is not given the result of a norm",
    ReadBetween: "q has another use in front of apply_rotary",
    ReadLater: "it does not call apply_rotary as `q, k = apply_rotary(q, k, cos, sin)`",
    WrittenBetween: "between a norm and apply_rotary something is written to",
    WrittenInTheCondition: "between a norm and apply_rotary something is written to",
    ViewedAfterTranspose: "q is reshaped between its norm and apply_rotary",
    AcrossTokens: "q is reshaped between its norm and apply_rotary",
    Starred: "its q_norm is no RMSNorm",
    StarredAngles: "it does not call apply_rotary as",
    InANestedFunction: "its forward does not read `q, k = rotated(q, k, cos, sin)`",
    OneNorm: "apply_rotary is not given the result of a norm",
    SwitchOfOne: "apply_rotary is under a condition that one of its norms is under too",
    ConditionReads: "the condition that apply_rotary is under reads q",
    ReadByANestedFunction: "it does not call apply_rotary as",
    AnotherRotation: "rotate_backwards computes no rotary embedding that is known",
    OfAnExpression: "it does not call apply_rotary as",
    LayerNorms: "its k_norm is no RMSNorm that was swapped, or has a hook",
    CallsSuper: "it does not call apply_rotary as",
}


class Model(nn.Module):
    def __init__(self, cls=Attention, layout="halves", width=HEAD, angles=None):
        super().__init__()
        self.layers = nn.ModuleList([cls(), cls()])
        self.rotary_emb = RotaryEmbedding(layout, width, angles)

    def forward(self, x):
        angles = self.rotary_emb(x, torch.arange(x.shape[1])[None])  # for every sequence
        return torch.stack([t.flatten() for layer in self.layers for t in layer(x, angles)[:1]])


def build(cls=Attention, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model(cls, **options).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 4)
    return model, torch.randn(2, 5, WIDTH).to(dtype)


def both(model, x):
    """q and k of all layers."""
    angles = model.rotary_emb(x, torch.arange(x.shape[1])[None])
    return [t.contiguous() for layer in model.layers for t in layer(x, angles)]


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def fused_calls(model, x):
    with torch.no_grad(), Record() as record:
        both(model, x)
    return sum("rms_norm_rope" in name for name in record.names)


def alike(ours, theirs):
    return len(ours) == len(theirs) and all(same_bits(a, b) for a, b in zip(ours, theirs))


# What is fused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", FUSED)
def test_rope_in_norms(cls, dtype):
    layout, width = FUSED[cls], 4 if cls is AfterTransposeOfAPart else HEAD
    model, x = build(cls, dtype, layout=layout, width=width)
    with replace_rms_norm(model):
        want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert [(entry.name, entry.norms) for entry in swap.fused] == [
            ("layers.0", ("q_norm", "k_norm")),
            ("layers.1", ("q_norm", "k_norm")),
        ] and not swap.skipped
        layer = model.layers[0]
        assert type(layer) is type(model.layers[1]) and isinstance(layer, cls)
        assert type(layer).__name__ == cls.__name__
        assert alike(both(model, x), want)
        assert fused_calls(model, x) == (4 if cls is OneByOne else 2)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in twins:
            assert alike(both(twin, x), want) and type(twin.layers[0]) is type(layer)
        assert replace_rms_norm(model, fuse_rope=True).fused == []  # they are already
    assert type(model.layers[0]) is cls and alike(both(twins[0], x), want)


@pytest.mark.parametrize("cls", FUSED)
def test_gradients(cls):
    layout, width = FUSED[cls], 4 if cls is AfterTransposeOfAPart else HEAD
    model, x = build(cls, layout=layout, width=width)

    def gradients():
        model.zero_grad()
        sum((t.sin() * t).sum() for t in both(model, x)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert len(swap.fused) == 2
        # fp32, a few roundings of sums of values of size 1
        torch.testing.assert_close(gradients(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Conditional, ConditionalAcrossHeads, Switch, OneByOne])
def test_the_other_way_of_a_condition(cls):
    model, x = build(cls)
    replace_rms_norm(model, fuse_rope=True)
    for switch in ("rotates", "use_norm"):
        plain = copy.deepcopy(model)
        for layer in (*model.layers, *plain.layers):
            setattr(layer, switch, False)
        for layer in plain.layers:
            layer.__class__ = cls
        assert alike(both(model, x), both(plain, x))


def test_switch_that_is_off():
    model, _ = build(Switch)
    model.layers[1].use_norm = False
    swap = replace_rms_norm(model, fuse_rope=True)
    assert [entry.name for entry in swap.fused] == ["layers.0"]
    assert "its use_norm is off" in swap.skipped[0].reason


@pytest.mark.parametrize("cls", NOT_FUSED)
def test_attentions_that_are_left_alone(cls):
    model, x = build(cls)
    want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert not swap.fused and type(model.layers[0]) is cls
        assert [entry.name for entry in swap.skipped] == ["layers.0", "layers.1"]
        assert all(NOT_FUSED[cls] in entry.reason for entry in swap.skipped), swap.skipped
        torch.testing.assert_close(both(model, x), want)
        assert fused_calls(model, x) == 0


def test_nothing_to_do_is_not_reported():
    """A layer with norms that does not rotate, and an attention without norms."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.RMSNorm(4), nn.RMSNorm(4)

        def forward(self, x):
            return self.other(self.norm(x))

    class WithoutNorms(nn.Module):
        def forward(self, q, k, cos, sin):
            q, k = apply_rotary(q, k, cos, sin)
            return q, k

    model = nn.Sequential(Layer(), WithoutNorms())
    swap = replace_rms_norm(model, fuse_rope=True)
    assert len(swap) == 2 and not swap.fused and not swap.skipped


# The angles


@pytest.mark.parametrize(
    "cls, layout, reason",
    [
        (Attention, "odd", "RotaryEmbedding does not make cos and sin whose halves are alike"),
        (Attention, "pairs", "RotaryEmbedding does not make cos and sin whose halves are alike"),
        (Neighbours, "halves", "RotaryEmbedding does not make cos and sin whose neighbours"),
        (FirstHalf, "odd", ""),  # the second half is not read
    ],
)
def test_angles_that_do_not_lie_as_they_have_to(cls, layout, reason):
    model, x = build(cls, layout=layout)
    with replace_rms_norm(model):
        want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert bool(swap.fused) == (not reason)
        assert all(reason in entry.reason for entry in swap.skipped)
        assert alike(both(model, x), want)


def test_angles_that_cannot_be_tried():
    class RotaryOfImages(nn.Module):
        def forward(self, pixels):
            return pixels, pixels

    class RotaryWithAWeight(RotaryEmbedding):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    class RotaryNumber(RotaryEmbedding):
        def forward(self, x, position_ids):
            return 1.0, 2.0

    for embedding, reason in (
        (RotaryOfImages(), "RotaryOfImages cannot be tried: TypeError"),
        (RotaryWithAWeight(), "RotaryWithAWeight cannot be tried: ValueError: it has parameters"),
        (RotaryNumber(), "RotaryNumber does not make cos and sin by token"),
        (nn.Identity(), "no module is found beside it that makes its cos and sin"),
    ):
        model, _ = build()
        model.rotary_emb = embedding
        swap = replace_rms_norm(model, fuse_rope=True)
        assert not swap.fused and reason in swap.skipped[0].reason, swap.skipped


def test_nearest_angles_count():
    """Those of an image tower, say, are not the text's."""
    model, x = build()
    outer = nn.Module()
    outer.text, outer.rotary_emb = model, RotaryEmbedding("odd")
    assert len(replace_rms_norm(outer, fuse_rope=True).fused) == 2


def test_angles_of_each_kind_of_layer():
    class RotaryOfKinds(RotaryEmbedding):
        def __init__(self, second):
            super().__init__()
            self.register_buffer("local_inv_freq", self.inv_freq)
            self.register_buffer("full_inv_freq", self.inv_freq)
            self.second = second

        def forward(self, x, position_ids, layer_type):
            self.layout = "halves" if layer_type == "full" else self.second
            return super().forward(x, position_ids)

    for second in ("halves", "odd"):
        model, _ = build()
        model.rotary_emb = RotaryOfKinds(second)
        swap = replace_rms_norm(model, fuse_rope=True)
        assert len(swap.fused) == (2 if second == "halves" else 0)
        assert model.rotary_emb.layout == "halves"  # a copy was tried


def test_trial_leaves_the_embedding_alone():
    model, _ = build()
    with torch.device("meta"):
        model.rotary_emb = RotaryEmbedding()
    calls = []
    model.rotary_emb.register_forward_hook(lambda *args: calls.append(args))
    state, random = dict(vars(model.rotary_emb)), torch.get_rng_state()
    assert len(replace_rms_norm(model, fuse_rope=True).fused) == 2
    assert vars(model.rotary_emb) == state and not calls
    assert model.rotary_emb.inv_freq.device.type == "meta"
    assert torch.equal(torch.get_rng_state(), random)


# Rounding


class InFp32(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_in_fp32(q, k, cos, sin)
        return q, k


class HalvesInFp64(Attention):
    def forward(self, x, angles):
        shape = (*x.shape[:-1], -1, HEAD)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        q, k = rotate_halves_in_fp64(q, k, cos, sin)
        return q, k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angles", [None, torch.float32])
def test_rotation_in_fp32(angles, dtype):
    """Of norms that were rounded."""
    model, x = build(InFp32, dtype, angles=angles)
    with replace_rms_norm(model):
        want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert len(swap.fused) == 2 and fused_calls(model, x) == 2
        assert alike(both(model, x), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [HalvesInFp64, Attention])
def test_rounding_of_another_kind(cls, dtype):
    """Beside cos in fp32; the other's results are in fp32 then."""
    model, x = build(cls, dtype, angles=torch.float32)
    with replace_rms_norm(model):
        want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert len(swap.fused) == (2 if dtype == torch.float32 else 0)
        assert all("rounds in other places" in s.reason for s in swap.skipped)
        assert alike(both(model, x), want)


def test_model_that_is_rounded_after_the_swap():
    """It keeps what it computes, without the op."""
    model, x = build(HalvesInFp64, angles=torch.float32)
    replace_rms_norm(model, fuse_rope=True)
    plain = copy.deepcopy(model)
    for layer in plain.layers:
        layer.__class__ = HalvesInFp64
    assert fused_calls(model, x) == 2
    model, plain, x = model.bfloat16(), plain.bfloat16(), x.bfloat16()
    assert fused_calls(model, x) == 0 and alike(both(model, x), both(plain, x))


# What happens to a fused attention later: it computes what its plain twin would


def fused_and_plain(cls=Attention, dtype=torch.float32):
    model, x = build(cls, dtype)
    assert len(replace_rms_norm(model, fuse_rope=True).fused) == 2
    plain = copy.deepcopy(model)
    for layer in plain.layers:
        layer.__class__ = cls
    return model, plain, x


def other_eps(model):
    model.layers[0].k_norm.eps = 0.5


def other_norm(model):
    model.layers[0].q_norm = nn.RMSNorm(HEAD, 0.1)


def other_norm_of_ours(model):
    model.layers[0].k_norm = rmsnorm_cuda.RMSNorm(HEAD, 1e-6, weight_offset=1.0)


def no_norm(model):
    model.layers[0].q_norm = nn.Identity()


def forward_of_the_instance(model):
    norm = model.layers[0].q_norm
    norm.forward = lambda x, forward=norm.forward: 2 * forward(x)


def fp64(model):
    model.double()


LATER = [other_eps, other_norm, other_norm_of_ours, no_norm, forward_of_the_instance, fp64]


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_norms_that_change_later(change):
    model, plain, x = fused_and_plain()
    change(model), change(plain)
    plain.load_state_dict(model.state_dict())
    x = x.double() if change is fp64 else x
    assert fused_calls(model, x) == (0 if change is fp64 else 1)
    assert alike(both(model, x), both(plain, x))


def test_norm_without_a_weight():
    model, plain, x = fused_and_plain()
    for each in (model, plain):
        for layer in each.layers:
            layer.q_norm = rmsnorm_cuda.RMSNorm(HEAD, 1e-6, elementwise_affine=False)
    assert fused_calls(model, x) == 2 and alike(both(model, x), both(plain, x))


def test_weights_in_fp32_beside_a_model_in_16_bits():
    for cls, layout in ((Attention, "halves"), (AcrossHeads, "halves")):
        model, x = build(cls, torch.bfloat16, layout=layout)
        for layer in model.layers:
            layer.q_norm.float(), layer.k_norm.float()
        with replace_rms_norm(model):
            want = both(model, x)
        with replace_rms_norm(model, fuse_rope=True):
            assert fused_calls(model, x) == 2 and alike(both(model, x), want)


def test_norm_of_more_dimensions():
    model, plain, x = fused_and_plain(AfterTranspose)
    norm = rmsnorm_cuda.RMSNorm((x.shape[1], HEAD), 1e-6, elementwise_affine=False)
    for each in (model, plain):
        each.layers[0].q_norm = norm
    assert fused_calls(model, x) == 1 and alike(both(model, x), both(plain, x))


def test_a_weight_of_another_width():
    """Two heads are a row: its norm has to be taken where it was."""
    model, plain, x = fused_and_plain(AcrossHeads)
    norm = nn.Sequential(
        nn.Unflatten(-1, (-1, 2 * HEAD)), nn.RMSNorm(2 * HEAD, 1e-6), nn.Flatten(-2)
    )
    for each in (model, plain):
        each.layers[0].q_proj, each.layers[0].q_norm = nn.Linear(WIDTH, 4 * HEAD), norm
    plain.load_state_dict(model.state_dict())
    assert fused_calls(model, x) == 1 and alike(both(model, x), both(plain, x))


def test_rotation_that_is_patched_later(monkeypatch):
    """As Liger does."""
    model, plain, x = fused_and_plain()
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary", rotate_backwards_of(apply_rotary))
    assert fused_calls(model, x) == 0 and alike(both(model, x), both(plain, x))
    again, _ = build()  # fused now, it is another function
    swap = replace_rms_norm(again, fuse_rope=True)
    assert not swap.fused and "apply_rotary computes no rotary embedding" in swap.skipped[0].reason


def rotate_backwards_of(function):
    return lambda q, k, cos, sin: function(q, k, cos, -sin)


def test_a_function_that_kernels_made_a_module_of(monkeypatch):
    class Function(nn.Module):
        def forward(self, *args):
            return original(*args)

    original, function = apply_rotary, Function()
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary", function)
    model, plain, x = fused_and_plain()
    assert fused_calls(model, x) == 2 and alike(both(model, x), both(plain, x))
    function.forward = rotate_backwards_of(original)  # what kernelize() does
    assert fused_calls(model, x) == 0 and alike(both(model, x), both(plain, x))
    assert not replace_rms_norm(build()[0], fuse_rope=True).fused


def test_inputs_that_the_op_does_not_take():
    model, plain, x = fused_and_plain()
    layer, other = model.layers[0], plain.layers[0]
    angles = model.rotary_emb(x, torch.arange(10).view(2, 5))
    cases = {
        "other dtype": tuple(t.bfloat16() for t in angles),
        "one token's": tuple(t[:, :1] for t in angles),
        "the batch's first": tuple(t[:1] for t in angles),
        "of a part": tuple(t[..., :4] for t in angles),
        "two dimensions": tuple(t[0] for t in angles),
    }
    for name, given in cases.items():
        try:
            want = other(x, given)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                layer(x, given)
            continue
        assert alike(layer(x, given), want), name
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x, angles), other(x, angles)
    assert alike(got, want)


def test_sharded_tensors_take_the_steps():
    """What a DTensor does is test_distributed.py's; here one counts the ops."""

    class Sharded(torch.Tensor):
        placements = ()

    model, plain, x = fused_and_plain()
    for each in (model, plain):
        for layer in each.layers:
            layer.q_proj.register_forward_hook(lambda m, args, y: y.as_subclass(Sharded))
    assert fused_calls(model, x) == 0 and alike(both(model, x), both(plain, x))


# Hooks and monitors see each norm


@pytest.mark.parametrize("cls", [Attention, AfterTranspose, AcrossHeads, OneByOne])
def test_hooks_of_a_fused_norm(cls):
    def run(model):
        seen = []
        handle = model.layers[0].k_norm.register_forward_hook(
            lambda norm, args, y: seen.append((args[0].shape, args[0].stride(), y.clone()))
        )
        results = both(model, x)
        handle.remove()
        return results, seen

    model, plain, x = fused_and_plain(cls)
    (got, mine), (want, theirs) = run(model), run(plain)
    assert alike(got, want) and len(mine) == len(theirs) == 1
    assert mine[0][:2] == theirs[0][:2] and torch.equal(mine[0][2], theirs[0][2])
    assert fused_calls(model, x) == (4 if cls is OneByOne else 2)  # the hook is gone


def test_hooks_before_and_replaced_forwards():
    model, x = build()
    model.layers[0].q_norm.register_forward_hook(lambda module, args, output: output * 2)
    model.layers[1].forward = lambda *args: Attention.forward(model.layers[1], *args)
    with replace_rms_norm(model):
        want = both(model, x)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert not swap.fused and alike(both(model, x), want)
        assert "(q_norm has hooks)" in swap.skipped[0].reason
        assert "replaced on this instance" in swap.skipped[1].reason


def test_monitor_sees_the_rows():
    model, plain, x = fused_and_plain()
    with rmsnorm_cuda.monitor(model) as watch:
        got = both(model, x)
        assert watch is not None and fused_calls(model, x) == 0
    assert alike(got, both(plain, x)) and fused_calls(model, x) == 2


# The rest of the module


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    for cls in (Attention, AcrossHeads, OneByOne, Conditional, Switch):
        model, x = build(cls)
        replace_rms_norm(model, fuse_rope=True)
        graphs = []
        compiled = torch.compile(
            model, backend=lambda module, _: graphs.append(module) or module, fullgraph=True
        )
        assert torch.equal(compiled(x), model(x)) and len(graphs) == 1
        called = sum("rms_norm_rope" in str(node.target) for node in graphs[0].graph.nodes)
        assert called == (4 if cls is OneByOne else 2)


def test_beside_fused_residuals():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
            self.attention, self.out = Attention(), nn.Linear(HEADS * HEAD, WIDTH)

        def forward(self, x, angles):
            residual = x
            x = self.first(x)
            x, _ = self.attention(x, angles)
            x = self.out(x.transpose(1, 2).flatten(2))
            x = residual + x
            residual = x
            x = self.second(x)
            return residual + x, x

    model, x = build(Layer, torch.bfloat16)
    with replace_rms_norm(model):
        want = model(x)
    with replace_rms_norm(model, fuse_residual=True, fuse_rope=True) as swap:
        assert [(entry.name, *entry.norms) for entry in swap.fused] == [
            ("layers.0", "second"),
            ("layers.1", "second"),
            ("layers.0.attention", "q_norm", "k_norm"),
            ("layers.1.attention", "q_norm", "k_norm"),
        ]
        assert torch.equal(model(x), want)
    assert type(model.layers[0]) is Layer and type(model.layers[0].attention) is Attention


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model, x = build()
    want, classes = both(model, x), [type(m) for m in model.modules()]
    fuse, calls = fuse_rope._fuse, []

    def failing(layer, angles):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fuse(layer, angles)

    monkeypatch.setattr(fuse_rope, "_fuse", failing)
    with pytest.raises(KeyboardInterrupt):
        replace_rms_norm(model, fuse_rope=True)
    assert [type(m) for m in model.modules()] == classes and alike(both(model, x), want)


def test_file_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = f"""
import torch
from torch import nn
from {__name__} import Attention as Base, apply_rotary

class Attention(Base):
{inspect.getsource(Attention.forward)}
"""
    file = tmp_path / "attention_of_a_file.py"
    file.write_text(text)
    importlib.invalidate_caches()
    module = importlib.import_module("attention_of_a_file")
    assert len(replace_rms_norm(build(module.Attention)[0], fuse_rope=True).fused) == 2
    file.write_text(text.replace("cos, sin = angles", "cos, sin = angles[:2]"))
    fuse_rope._fused_class.cache_clear()
    swap = replace_rms_norm(build(module.Attention)[0], fuse_rope=True)
    assert not swap.fused and "its forward is not what its source says" in swap.skipped[0].reason


# The models of transformers


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
# architecture: (calls of the op in two layers, more of its config)
MODELS = {
    "Qwen3": (2, {}),
    "Qwen3Moe": (2, EXPERTS),
    "Gemma3Text": (2, {"layer_types": ["sliding_attention", "full_attention"]}),
    "Glm4Moe": (
        2,
        {
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    # Its second layer does not rotate.
    "Exaone4": (1, {"sliding_window_pattern": 2, "sliding_window": 4}),
    "Apertus": (2, {}),
    "Lfm2": (1, {"layer_types": ["full_attention", "conv"], "head_dim": 12}),
    "MiniMaxM2": (2, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Next": (1, EXPERTS | {"layer_types": ["linear_attention", "full_attention"]}),
    # Their cos is in fp32.
    "Olmo2": (2, {}),
    "Olmo3": (2, {}),
    # They rotate first.
    "HunYuanDenseV1": (0, {}),
    "NanoChat": (0, {}),
}


def build_model(name, dtype):
    torch.manual_seed(0)
    if name == "Qwen3VL":
        vision = dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48
        )
        scaling = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
        text = TINY | {"rope_parameters": scaling}
        config = transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}
        )
        model = transformers.Qwen3VLForConditionalGeneration(config).to(dtype)
    else:
        config = getattr(transformers, f"{name}Config")(**TINY | MODELS[name][1])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 4)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    return model.eval(), ids


def ops_called(model, ids):
    with torch.no_grad(), Record() as record:
        model(ids)
    return sum("rms_norm_rope" in name for name in record.names)


@needs_transformers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MODELS, "Qwen3VL"])
def test_models(name, dtype):
    """The logits have the bits of the model that is swapped, and generate() gives the tokens of
    transformers' own.
    """
    calls, _ = MODELS.get(name, (2, {}))
    model, ids = build_model(name, dtype)
    options = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24)
    options |= {"attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        tokens = model.generate(ids, **options)
        with replace_rms_norm(model):
            want = model(ids).logits
        with replace_rms_norm(model, fuse_rope=True) as swap:
            unfused = [entry for entry in swap.skipped if "do not rotate" in entry.reason]
            assert len(swap.fused) == (2 if name == "Exaone4" else calls)
            assert ops_called(model, ids) == calls and bool(unfused) == (calls == 0)
            assert same_bits(model(ids).logits, want)
            assert torch.equal(model.generate(ids, **options), tokens)
        with replace_rms_norm(model, fuse_rope=True, fuse_residual=True):
            assert torch.equal(model.generate(ids, **options), tokens)


@needs_transformers
@pytest.mark.parametrize("name", ["Qwen3", "Gemma3Text", "Olmo2", "Glm4Moe", "Qwen3VL"])
def test_gradients_of_models(name):
    model, ids = build_model(name, torch.float32)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert swap.fused
        got = gradients()
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        # fp32, a few roundings of sums of values of size 1
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize("name", ["Qwen3", "Gemma3Text"])
def test_gradients_of_models_in_bfloat16(name):
    """As near to those in fp32 as transformers' own."""
    exact, ids = build_model(name, torch.float32)
    model = copy.deepcopy(exact).bfloat16()

    def gradients(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        return torch.cat([grad.flatten().float() for grad in grads])

    want, theirs = gradients(exact), gradients(model)
    with replace_rms_norm(model, fuse_rope=True) as swap:
        assert len(swap.fused) == 2
        ours = gradients(model)
    assert (ours - want).norm() <= 1.1 * (theirs - want).norm()


TAKEN = (
    "qwen3.Qwen3Attention",
    "qwen3_moe.Qwen3MoeAttention",
    "qwen3_next.Qwen3NextAttention",
    "qwen3_vl.Qwen3VLTextAttention",
    "gemma3.Gemma3Attention",
    "gemma4.Gemma4TextAttention",
    "olmo2.Olmo2Attention",
    "olmo3.Olmo3Attention",
    "glm4_moe.Glm4MoeAttention",
    "minimax_m2.MiniMaxM2Attention",
    "exaone4.Exaone4Attention",
    "lfm2.Lfm2Attention",
)
REFUSED = {
    "hunyuan_v1_dense.HunYuanDenseV1Attention": "is not given the result of a norm",
    "nanochat.NanoChatAttention": "is not given the result of a norm",
    "muse_spark.MuseSparkTextAttention": "is not given the result of a norm",
    "olmoe.OlmoeAttention": "has another use in front of",
    "deepseek_v3.DeepseekV3Attention": "has another use in front of",
    "llama4.Llama4TextAttention": "it does not call apply_rotary_emb as",
}


def configs(module):
    """Of what a modeling file builds, tiny where that is a word of theirs, and those in them."""
    package, _, name = module.__name__.rpartition(".")
    file = f"{package}.{name.replace('modeling', 'configuration')}"
    for cls in vars(importlib.import_module(file)).values():
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedConfig)):
            continue
        for options in (TINY, {"head_dim": 12}, {}):
            with contextlib.suppress(Exception):
                config = cls(**options)
                for each in (config, getattr(config, "text_config", None)):
                    if each is not None:
                        each._attn_implementation = "eager"
                        if hasattr(each, "use_qk_norm"):
                            each.use_qk_norm = True
                        yield each


def built(cls, held):
    """A module of the first config that does, and that; or why there is none, and None."""
    reason = "it takes no config of its file"
    parameters = inspect.signature(cls.__init__).parameters
    options = {"layer_idx": 0} if "layer_idx" in parameters else {}
    kind = parameters["config"].annotation if "config" in parameters else None
    for config in sorted(held, key=lambda config: type(config) is not kind):
        if kind is not None:
            try:
                return cls(config=config, **options), config
            except Exception as error:
                line = next(iter(str(error).splitlines()), "")
                reason = f"it is not built: {type(error).__name__}: {line}"
    return reason, None


def attentions():
    """Each class of transformers whose forward calls a rotary embedding: its name, a module of it
    with the rotary embeddings of its file beside it, and the config; or its name and why not."""
    folder = pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue  # of another library, which is not installed
        classes = [
            cls
            for cls in vars(module).values()
            if isinstance(cls, type) and issubclass(cls, nn.Module)
            if cls.__module__ == module.__name__
        ]
        rotating = [cls for cls in classes if fuse_rope._rotations(cls.forward)]
        held = [*configs(module)] if rotating else []
        for cls in rotating:
            name = f"{path.stem.removeprefix('modeling_')}.{cls.__name__}"
            attention, config = built(cls, held)
            if config is None:
                yield name, attention, None
                continue
            model = nn.Module()
            model.attention = attention
            for i, embedding in enumerate(classes):
                if not fuse_rope._may_rotate(embedding.__name__) or embedding in rotating:
                    continue
                part = [word in cls.__name__ for word in ("Vision", "Audio")]
                if part == [word in embedding.__name__ for word in ("Vision", "Audio")]:
                    made = (built(embedding, [each])[0] for each in (config, *held))
                    good = (each for each in made if isinstance(each, nn.Module))
                    tried = [(isinstance(recognize_angles(each), str), each) for each in good]
                    if tried:  # one that can be called, say of a config with all kinds of layers
                        model.add_module(f"embedding_{i}", min(tried, key=lambda t: t[0])[1])
            yield name, model, config


def runs(model, config):
    """q, k and all that follows of one attention in a batch of 2; None if it wants other arguments.

    The same numbers each time.
    """
    generator = torch.Generator().manual_seed(0)
    width = getattr(config, "hidden_size", TINY["hidden_size"])
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, 5, width, generator=generator).to(dtype)
    positions = torch.arange(5)[None]
    kind = getattr(model.attention, "layer_type", None) or "full_attention"
    for name, embedding in model.named_children():
        for more in ((), (kind,)) if name != "attention" else ():
            for options in ({}, {"shared_kv_states": {}}):
                with contextlib.suppress(Exception), torch.no_grad():
                    angles = embedding(x, positions, *more)
                    options |= {"position_embeddings": angles, "attention_mask": None}
                    return model.attention(hidden_states=x, **options)[0]
    return None


def examples():
    page = pathlib.Path(rmsnorm_cuda.__file__).parent / "integrations" / "README.md"
    if not page.exists():
        pytest.skip("there are no sources")
    code = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for text in code if "rope" in text and "MyNorm" not in text]


@needs_transformers
def test_example_of_the_page(capsys):
    names = {}
    exec(examples()[0], names)
    assert names["tokens"].shape == (1, 11)
    assert "q_norm, k_norm" in capsys.readouterr().out


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotated", [HEAD, 4])
def test_servers_functions_of_the_page(is_neox, rotated):
    """Of vLLM's and SGLang's arguments what the functions with results compute."""
    servers = {}
    exec(examples()[1], servers)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, 7 * HEAD, generator=generator).bfloat16()
    weights = torch.randn(2, HEAD, generator=generator).bfloat16()
    angles = torch.rand(30, rotated // 2, generator=generator) * 6
    cache, positions = torch.cat((angles.cos(), angles.sin()), -1), torch.tensor([3, 1, 4, 1, 29])
    q, k, v = qkv.clone().view(5, 7, HEAD).split((3, 2, 2), 1)
    cos, sin = (t[positions] for t in cache.chunk(2, -1))
    q, k = rmsnorm_cuda.rms_norm_rope(q, k, *weights, cos, sin, 1e-5, interleaved=not is_neox)
    want = torch.cat((q, k, v), 1).flatten(1)
    ours = qkv.clone()
    result = servers["fused_qk_norm_rope"](
        ours, 3, 2, 2, HEAD, 1e-5, *weights, cache, is_neox, positions
    )
    assert result is None and same_bits(ours, want)
    ours = qkv.clone()
    q, k, v = ours.view(5, 7, HEAD).split((3, 2, 2), 1)
    servers["fused_inplace_qknorm_rope"](
        q, k, *weights, cache, positions.int(), is_neox=is_neox, eps=1e-5
    )
    assert same_bits(ours, want)


@pytest.mark.slow
@needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_which_attentions_of_transformers_are_fused(capsys, monkeypatch):
    """Each that is fused gives the same bits, where a call by the usual arguments runs; in 16 bits
    too.
    """
    fused, reasons, run = [], collections.defaultdict(list), 0
    unbuilt, without = [], 0
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    for name, model, config in attentions():
        if config is None:
            unbuilt.append(f"{name}: {model}")
            continue
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                with torch.no_grad():
                    parameter.copy_(1 + torch.randn_like(parameter) / 4)
        original = type(model.attention)
        for dtype in (torch.float32, torch.bfloat16):
            with replace_rms_norm(model.to(dtype), fuse_rope=True) as swap:
                if not swap.fused:
                    break
                fused.append((name, dtype))
                with Record() as record:
                    got = runs(model, config)
                run += any("rms_norm_rope" in op for op in record.names)
                fused_class = type(model.attention)
                model.attention.__class__ = original  # its own forward, and our norms
                want = runs(model, config)
                model.attention.__class__ = fused_class
                assert (want is None) == (got is None), name
                assert got is None or same_bits(got, want), name
        if not swap.fused and any(entry.name.startswith("attention.") for entry in swap):
            (reason,) = (entry.reason for entry in swap.skipped if entry.name == "attention")
            reasons[reason].append(name)
        elif not swap.fused:
            without += 1
    refused = sum(map(len, reasons.values()))
    taken = [name for name, dtype in fused if dtype == torch.float32]
    with capsys.disabled():
        print(f"\ntransformers {transformers.__version__}, attentions with a rotary embedding:")
        print(f"{len(taken)} are fused: {' '.join(taken)}; {run} of {len(fused)} were run")
        print(f"{without} have no RMSNorm")
        print(f"{refused} have one and stay:")
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"  {reason}: {' '.join(names)}")
        print(f"{len(unbuilt)} could not be built here:", *unbuilt, sep="\n  ")
    assert run >= 60 and len(fused) == 2 * len(taken) and {*TAKEN} <= {*taken}
    for name, words in REFUSED.items():
        (reason,) = (reason for reason, names in reasons.items() if name in names)
        assert words in reason
    page = pathlib.Path(rmsnorm_cuda.__file__).parent / "integrations" / "README.md"
    if transformers.__version__ == "5.24.0" and page.exists():
        told = " ".join(page.read_text().split())
        assert f"It fuses {len(taken)}, and says why {refused} others stay." in told
