"""replace_rms_norm(): the swap changes the kernels of a model and nothing else about it."""

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import rmsnorm_cuda
from rmsnorm_cuda import replace_rms_norm
from rmsnorm_cuda.integrations.transformers import _KNOWN
from rmsnorm_cuda.reference import rms_norm_reference, ulp_distance

try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

TINY = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=128,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# family, norms of two layers: two a layer and the last one, and with Qwen3 those of q and k
FAMILIES = [("Llama", 5), ("Mistral", 5), ("Qwen2", 5), ("Qwen3", 9)]


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


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh norms are all ones, and would hide a weight that is not applied
            nn.init.normal_(parameter, mean=1.0, std=0.25)
    return model


def tokens():
    return torch.randint(3, TINY["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


# The classes: every row of the table against the class it names


@pytest.mark.parametrize("dtypes", ["fp32 fp32", "bf16 bf16", "fp16 fp16", "bf16 fp32", "fp16 fp32", "fp32 bf16"])
@pytest.mark.parametrize("path", _KNOWN)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch.nn.RMSNorm
def test_known_class(path, dtypes):
    """The twin computes what the class computes, to the last bit but for near-ties of its roundings."""
    if path.startswith("transformers") and transformers is None:
        pytest.skip("transformers is not installed")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    x_dtype, w_dtype = (names[name] for name in dtypes.split())
    module, _, name = path.rpartition(".")
    torch.manual_seed(0)
    parent = nn.ModuleDict({"norm": getattr(importlib.import_module(module), name)(96, eps=1e-3)}).to(w_dtype)
    old = parent["norm"]
    nn.init.normal_(old.weight, mean=1.0, std=0.25)
    (swapped,) = replace_rms_norm(parent)
    assert (type(swapped.new), swapped.new.eps, swapped.new.weight) == (rmsnorm_cuda.RMSNorm, 1e-3, old.weight)

    x = torch.randn(512, 96).to(x_dtype)
    x[:8] *= 1e-3  # where eps is as large as the mean of squares and larger
    want, got = old(x), parent["norm"](x)
    assert got.dtype == want.dtype == (torch.promote_types(x_dtype, w_dtype) if _KNOWN[path][0] else x_dtype)
    if want.dtype == x_dtype:
        # 16 bits: one rounding can fall the other way, and the product carries that to 2 ulp. fp32: theirs rounds
        # the mean (half of it reaches the root), the root, and two products; ours is within 1 or 2.
        assert ulp_distance(got, want).max() <= (4 if x_dtype == torch.float32 else 2)
    else:
        # 16-bit input, fp32 weight, fp32 result: a near-tie of the first rounding is an ulp of the input's dtype
        torch.testing.assert_close(got, want, rtol=torch.finfo(x_dtype).eps, atol=0)
    if x_dtype != torch.float32:
        assert (got == want).float().mean() > 0.999
    if x_dtype == torch.float16:
        # and the other order would have been noticed
        other = rms_norm_reference(x, 96, old.weight, 1e-3, cast_before_weight=not _KNOWN[path][0]).to(want.dtype)
        assert (other == want).float().mean() < 0.95


# The models


@needs_transformers
@pytest.mark.parametrize("family, norms", FAMILIES)
def test_logits_and_gradients(family, norms):
    model, ids = build(family), tokens()

    def run():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    logits, grads = run()
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    with replace_rms_norm(model) as swap:
        assert len(swap) == norms and not swap.skipped
        assert sum(type(m) is rmsnorm_cuda.RMSNorm for m in model.modules()) == norms
        assert list(model.state_dict()) == keys
        assert all(p is parameters[name] for name, p in model.named_parameters())
        new_logits, new_grads = run()
    # fp32, values of size 1, a few ulp for each of up to nine norms in a row
    torch.testing.assert_close(new_logits, logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(new_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert not any(isinstance(m, rmsnorm_cuda.RMSNorm) for m in model.modules())
    assert torch.equal(model(ids).logits, logits)


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family, _", FAMILIES)
def test_half_precision_logits(family, _, dtype):
    model, ids = build(family, dtype), tokens()
    with torch.no_grad():
        want = model(ids).logits
        with replace_rms_norm(model):
            got = model(ids).logits
    assert got.dtype == want.dtype == dtype
    # one flipped rounding upstream reaches every later sum: a few units of the largest logit's last place
    assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@needs_transformers
@pytest.mark.parametrize("family, _", FAMILIES)
def test_generates_the_same_tokens(family, _):
    model, ids = build(family), tokens()
    options = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24, attention_mask=torch.ones_like(ids))
    want = model.generate(ids, **options)
    with replace_rms_norm(model):
        assert torch.equal(model.generate(ids, **options), want)


@needs_transformers
def test_qk_norms_of_qwen3():
    model = build("Qwen3")
    names = [entry.name for entry in replace_rms_norm(model)]
    for name in ("q_norm", "k_norm"):
        assert f"model.layers.1.self_attn.{name}" in names
        assert model.get_submodule(f"model.layers.1.self_attn.{name}").normalized_shape == (12,)


@needs_transformers
def test_family_with_another_formula_is_left_alone():
    config = transformers.GemmaConfig(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config)
    swap = replace_rms_norm(model)
    assert not swap and len(swap.skipped) == 5
    assert "GemmaRMSNorm is not a known class" in swap.skipped[0].reason


# The mechanics, on a model of torch alone


def test_entries_and_restore():
    model, x = Block(), torch.randn(3, 16)
    originals, want = dict(model.named_modules(remove_duplicate=False)), model(x)
    swap = replace_rms_norm(model)
    assert [entry.name for entry in swap] == ["first", "inner.0", "inner.1", "tied"]
    for name, old, new in swap:
        assert old is originals[name] and new is model.get_submodule(name) and type(new) is rmsnorm_cuda.RMSNorm
        assert (new.normalized_shape, new.eps, new.weight) == (old.normalized_shape, old.eps, old.weight)
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
    model = nn.Sequential(plain[0], OddRMSNorm(), Subclass(4), plain[1], plain[2], torch.compile(plain[3]))
    model[3].forward = lambda x: x
    model[4].compile(backend="eager")
    swap = replace_rms_norm(model)
    assert [entry.name for entry in swap] == ["0"]
    assert [(entry.name, entry.reason.split("(")[0].strip()) for entry in swap.skipped] == [
        ("1", f"{__name__}.OddRMSNorm is not a known class, and its rounding order would be a guess"),
        ("2", f"{__name__}.Subclass is not a known class, and its rounding order would be a guess"),
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
    """Training, a change of mode, hooks and a state_dict that was assigned all outlive restore()."""
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
    handle = model.first.register_forward_hook(lambda module, args, output: seen.append(type(module)))
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
    assert torch.equal(twin(x), model(x)) and twin.tied is twin.inner[0] and twin.tied is not model.tied


def test_compile_after_the_swap():
    torch._dynamo.reset()
    model, x = Block(), torch.randn(2, 16)
    replace_rms_norm(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_import_is_lazy():
    code = "import sys, rmsnorm_cuda; sys.exit(any('transformers' in module for module in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
