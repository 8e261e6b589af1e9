"""Norms with a gate of other libraries: which they are; swapped, alone and in models. And models
that norm both sides of a sublayer.
"""

import copy
import importlib
import pickle

import pytest
import torch
from cases import TINY, same_bits
from torch import nn

from rmsnorm_cuda import RMSNormGated, replace_rms_norm
from rmsnorm_cuda.integrations.families import twin
from rmsnorm_cuda.integrations.recognize import gradients_differ, recognize, values_off

transformers = pytest.importorskip("transformers")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SILU, SIGMOID = {"activation": "silu"}, {"activation": "sigmoid"}
GROUPS = {"group_size": 24}

# (class, arguments beside the width of 96, family, its options that are not the family's own)
CLASSES = [
    ("qwen3_next.Qwen3NextRMSNormGated", {}, "qwen3-next", {}),
    ("qwen3_5.Qwen3_5RMSNormGated", {}, "qwen3-next", {}),
    ("qwen3_5_moe.Qwen3_5MoeRMSNormGated", {}, "qwen3-next", {}),
    ("qwen4_exp.Qwen4ExpTextRMSNormGated", {}, "qwen3-next", {}),
    ("qwen4_exp.Qwen4ExpTextRMSNormGated", SIGMOID, "qwen3-next", SIGMOID),
    ("olmo_hybrid.OlmoHybridRMSNormGated", {}, "qwen3-next", {}),
    ("kimi_linear.KimiLinearRMSNormGated", {}, "kimi", SIGMOID),
    ("bailing_hybrid.BailingHybridRMSNormGated", {}, "kimi", SIGMOID),
    ("glm5_next.Glm5NextTextRMSNormGated", {}, "kimi", SIGMOID),
    ("lara_mini.LaraMiniRMSNormGated", {}, "kimi", {}),
    ("mamba2.MambaRMSNormGated", GROUPS, "mamba2", GROUPS),
    ("mamba2.MambaRMSNormGated", {"group_size": 96}, "mamba2", {}),
    ("bamba.BambaRMSNormGated", GROUPS, "mamba2", GROUPS),
    ("granitemoehybrid.GraniteMoeHybridRMSNormGated", GROUPS, "mamba2", GROUPS),
    ("nemotron_h.NemotronHRMSNormGated", GROUPS, "mamba2", GROUPS),
    ("zamba2.Zamba2RMSNormGated", GROUPS, "mamba2", GROUPS),
    ("falcon_h1.FalconH1RMSNormGated", {}, "kimi", {}),
    ("falcon_h1.FalconH1RMSNormGated", {"n_groups": 4}, "kimi", GROUPS),
    (
        "falcon_h1.FalconH1RMSNormGated",
        {"n_groups": 4, "norm_before_gate": False},
        "falcon-h1",
        GROUPS,
    ),
]
# The same code as that of a class before them.
COPIES = "Qwen3_5", "Bailing", "Glm5", "OlmoHybrid", "Bamba", "Granite", "NemotronH", "Zamba2"


def load(path):
    model, name = path.split(".")
    try:
        return getattr(
            importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name
        )
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")


def results_of(norm, x, gate):
    leaves = [t.clone().requires_grad_() for t in (x, gate)]
    y = norm(*leaves)
    grads = torch.autograd.grad(y.float().sin().sum(), [*leaves, norm.weight])
    return y.detach(), grads


@pytest.mark.parametrize(
    "path, arguments, family, options",
    [
        pytest.param(*c, marks=pytest.mark.slow if c[0].split(".")[1].startswith(COPIES) else [])
        for c in CLASSES
    ],
    ids=[f"{path.split('.')[1]}-{i}" for i, (path, *_) in enumerate(CLASSES)],
)
def test_class(path, arguments, family, options):
    """The twin has the class's bits, but for near-ties of its roundings; and its gradients."""
    old = load(path)(96, eps=1e-3, **arguments)
    nn.init.normal_(old.weight, mean=1.0, std=0.25)
    found = recognize(old)
    assert not isinstance(found, str), found
    assert (found.family.name, found.eps, found.eps_name) == (family, 1e-3, "variance_epsilon")
    told = found.family.options()
    expected = SILU | {"group_size": None} | options
    assert {key: told[key] for key in expected} == expected
    for w_dtype, x_dtype in ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)):
        theirs = copy.deepcopy(old).to(w_dtype)
        ours = twin(theirs, *found)
        assert isinstance(ours, RMSNormGated) and ours.weight is theirs.weight
        x, gate = torch.randn(512, 96).to(x_dtype), 2 * torch.randn(512, 96).to(x_dtype)
        x[:8] *= 1e-3
        (want, wanted), (got, grads) = (results_of(n, x, gate) for n in (theirs, ours))
        assert got.dtype == want.dtype
        share, far = values_off(got, want, (x_dtype, w_dtype), roundings=2)
        assert share < 0.003 and not far
        for a, b in zip(grads, wanted):
            assert a.dtype == b.dtype and not gradients_differ(a, b, (x_dtype, w_dtype))


class Own(nn.Module):
    """What somebody writes: the names are other ones."""

    def __init__(self, rounds=False, factor=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.epsilon, self.rounds, self.factor = 1e-4, rounds, factor

    def forward(self, x, z):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        y = y * self.weight.float()
        if self.rounds:
            y = y.to(x.dtype).float()
        return (y * nn.functional.silu(z.float()) * self.factor).to(x.dtype)


def test_own_class():
    found = recognize(Own())
    assert (found.family.name, found.eps, found.eps_name) == ("kimi", 1e-4, "epsilon")
    model = nn.ModuleDict({"norm": Own(), "other": nn.Linear(2, 2)})
    x, z = torch.randn(3, 32), torch.randn(3, 32)
    want = model["norm"](x=x, z=z)
    swap = replace_rms_norm(model, match=lambda name, module: name == "norm")
    assert len(swap) == 1 and isinstance(model["norm"], RMSNormGated)
    torch.testing.assert_close(model["norm"](x=x, z=z), want)
    assert model["norm"].epsilon == 1e-4
    model["norm"].epsilon = 0.5
    assert (model["norm"](x, z) - want).abs().max() > 0.1
    swap.restore()
    assert type(model["norm"]) is Own and model["norm"].epsilon == 0.5


class OnAGpu(Own):
    """As fla's RMSNormGated, a kernel of Triton."""

    def forward(self, x, z=None):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


class WithResidual(Own):
    """As fla's FusedRMSNormGated."""

    def forward(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
        return super().forward(x, g)


@pytest.mark.parametrize(
    "norm, reason",
    [
        (OnAGpu, "it could not be tried on the CPU: RuntimeError: 0 active drivers"),
        (WithResidual, "takes more than the input: x, g, residual, prenorm, residual_in_fp32"),
    ],
)
def test_what_cannot_be_tried_stays(norm, reason):
    model = nn.ModuleDict({"norm": norm()})
    swap = replace_rms_norm(model, match=lambda name, module: name == "norm")
    assert not swap and type(model["norm"]) is norm and reason in swap.skipped[0].reason


def test_norms_of_fla_stay():
    """They run on a GPU, and are tried on the CPU. Triton's interpreter, which runs RMSNormGated
    there, cuts bf16 off where the GPU rounds."""
    fla = pytest.importorskip("fla.modules")
    gated = pytest.importorskip("fla.modules.norm.layernorm_gated").RMSNormGated
    kinds = fla.RMSNorm, fla.FusedRMSNormGated, fla.FusedRMSNormSwishGate, gated
    model = nn.ModuleList(cls(32) for cls in kinds)
    swap = replace_rms_norm(model)
    assert not swap and len(swap.skipped) == len(kinds)
    for *_, reason in swap.skipped:
        assert "could not be tried on the CPU" in reason or "takes more than the input" in reason


@pytest.mark.parametrize("what", [{"rounds": True}, {"factor": 1.01}])
def test_what_computes_something_else_stays(what):
    model = nn.ModuleDict({"norm": Own(**what)})
    swap = replace_rms_norm(model, match=lambda name, module: name == "norm")
    assert not swap and type(model["norm"]) is Own
    assert "takes more than the input: x, z; tried as a norm with a gate" in swap.skipped[0].reason


def test_twin_is_the_original_too():
    norm = load("falcon_h1.FalconH1RMSNormGated")(96, n_groups=4, norm_before_gate=False)
    model = nn.ModuleList([norm])
    swap = replace_rms_norm(model)
    new = model[0]
    assert isinstance(new, type(norm)) and new.n_groups == 4 and new.group_size == 24
    assert "norm_before_gate=False, group_size=24" in repr(new)
    with pytest.raises(AttributeError, match="n_groups decided what the original computes"):
        new.n_groups = 2
    x, gate = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    want = new(x, gate)
    torch.testing.assert_close(new(hidden_states=x, gate=gate), want)
    torch.testing.assert_close(new(x), norm(x))
    assert same_bits(pickle.loads(pickle.dumps(new))(x, gate).detach(), want.detach())
    assert same_bits(copy.deepcopy(new)(x, gate).detach(), want.detach())
    assert not replace_rms_norm(model) and model[0] is new  # a second time
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x, gate).detach(), want.detach())
    swap.restore()
    assert model[0] is norm and type(norm) is load("falcon_h1.FalconH1RMSNormGated")
    assert not hasattr(norm, "group_size") and norm.norm_before_gate is False
    with pytest.raises(ValueError, match="construct rmsnorm_cuda.RMSNormGated instead"):
        replace_rms_norm(norm)


# ------------------------------------------------------------------------------------------ models

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MIXER = dict(num_heads=8, head_dim=12, state_size=8, n_groups=2, chunk_size=8)
# architecture: (gated norms, more of its config)
MODELS = {
    "Gemma3Text": (0, {}),  # this one and the next norm both sides of a sublayer
    "Olmo2": (0, {}),
    "FalconMamba": (0, {"state_size": 8}),  # has norms with no weight, and a buffer of that name
    "Qwen3Next": (1, EXPERTS | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "Qwen3_5Text": (1, LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "Mamba2": (2, MIXER),
    "FalconH1": (
        2,
        {
            "mamba_d_ssm": 96,
            "mamba_n_heads": 8,
            "mamba_d_head": 12,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "mamba_rms_norm": True,
        },
    ),
    "NemotronH": (
        1,
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "KimiLinear": (
        1,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "Bamba": (
        1,
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 12,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "Zamba2": (
        2,
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "adapter_rank": 4,
        },
    ),
    "GraniteMoeHybrid": (
        1,
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
        },
    ),
}


# Layers and attentions whose norms add the residual or rotate. In those of the others no norm
# follows an addition.
FUSED = {"Gemma3Text": 4, "Olmo2": 4, "Qwen3Next": 3, "Qwen3_5Text": 3}
FUSED |= dict.fromkeys(("FalconH1", "KimiLinear", "Bamba", "GraniteMoeHybrid"), 2)


def build_model(name, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY | MODELS[name][1])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 4)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    return model.eval(), ids


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    """generate() gives the tokens of transformers' own, with every norm swapped."""
    model, ids = build_model(name, dtype)
    options = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24)
    options |= {"attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **options)
    with replace_rms_norm(model) as swap:
        gated = [entry for entry in swap if isinstance(entry.new, RMSNormGated)]
        assert len(gated) == MODELS[name][0] and not swap.skipped
        assert torch.equal(model.generate(ids, **options), tokens)
    with replace_rms_norm(model, fuse_residual=True, fuse_rope=True) as swap:
        assert len(swap.fused) == FUSED.get(name, 0)
        assert torch.equal(model.generate(ids, **options), tokens)


@pytest.mark.parametrize("fused", [False, True], ids=["swapped", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_models(name, fused):
    model, ids = build_model(name, FP32)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    with replace_rms_norm(model, fuse_residual=fused, fuse_rope=fused):
        got = gradients()
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        # fp32, a few roundings of sums of values of size 1
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)
