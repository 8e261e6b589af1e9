"""replace_rms_norm(fuse_residual=True): layers whose norms add the residual compute what they did,
or are left alone.
"""

import copy
import functools
import importlib
import linecache
import pickle

import pytest
import torch
from cases import TINY, same_bits
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm_cuda
from rmsnorm_cuda import monitor, replace_rms_norm
from rmsnorm_cuda.integrations import rewrite
from rmsnorm_cuda.integrations.fuse_residual import _AddsInNorms

try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed"
)


class PreNorm(nn.Module):
    """A decoder layer as they are written; its subclasses write it otherwise."""

    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(width, 1e-5) for _ in range(3))
        self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = 0.5

    def forward(self, x, extra=None, *, factor=1.0):
        residual = x
        x = self.norm1(x)
        x = self.attention(x)
        x = residual + x * factor

        # a comment between them
        residual = x
        x = self.norm2(x)
        x = self.mlp(x)
        return residual + x


class OtherNames(PreNorm):
    def forward(self, hidden):
        skip = hidden
        if self.scale:
            hidden = self.attention(self.norm1(hidden))
            hidden = self.mlp(hidden) + skip
            skip = hidden
            hidden = self.norm2(hidden)
        else:
            hidden = skip + hidden
            skip = hidden
            hidden = self.norm3(hidden)
        residual = skip
        return residual + self.scale * hidden


class PostNorm(PreNorm):
    def forward(self, x):
        residual = x
        x = residual + self.norm1(self.attention(x))
        residual = x
        return residual + self.norm2(self.mlp(x))


class SumIsReadLater(PreNorm):
    def forward(self, x):
        residual = x
        total = residual + self.attention(self.norm1(x))
        residual = total
        x = self.norm2(total)
        return residual + self.mlp(x) + total


class Subtracts(PreNorm):
    def forward(self, x):
        residual = x
        x = residual - self.attention(self.norm1(x))
        residual = x
        x = self.norm2(x)
        return residual + x


class SumHasAnotherName(PreNorm):
    def forward(self, x):
        h = x + self.attention(self.norm1(x))
        return h + self.norm2(h)


class CallsSuper(PreNorm):
    def forward(self, x):
        return super().forward(x)


def doubled(function):
    @functools.wraps(function)
    def twice(self, x):
        return 2 * function(self, x)

    return twice


class Decorated(PreNorm):
    forward = doubled(PreNorm.forward)


class Times:
    """A decorator that is an object."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance, owner):
        return functools.partial(self, instance)

    def __call__(self, layer, x):
        return 2 * self.function(layer, x)


class DecoratedByAnObject(PreNorm):
    forward = Times(PreNorm.forward)


def forgetful(function):
    kept = [function]

    @functools.wraps(function)
    def call(self, x):
        return kept[0](self, x)

    return call


class DecoratedByAList(PreNorm):
    forward = forgetful(PreNorm.forward)


def with_an_empty_cell(function):
    later = None

    @functools.wraps(function)
    def call(self, x):
        return 2 * function(self, x) if self.scale else later  # noqa: F821

    del later
    return call


class DecoratedBesideAnEmptyCell(PreNorm):
    forward = with_an_empty_cell(PreNorm.forward)


class NormsASum(PreNorm):
    def forward(self, x):
        return x + self.mlp(self.norm2(x + self.attention(x)))


class DecoratedAroundAnObject(PreNorm):
    forward = doubled(Times(PreNorm.forward))


class Checkpointed(PreNorm):
    """Wraps what its subclasses define, as transformers does: only the outermost wrapper of a class
    acts.
    """

    def __init_subclass__(cls):
        forward = cls.forward

        @functools.wraps(forward)
        def checkpointed(self, x):
            return (1 + (type(self).forward is checkpointed)) * forward(self, x)

        cls.forward = checkpointed


class DecoratedInTheSource(Checkpointed):
    """As transformers 5.24 writes its layers."""

    @doubled
    @doubled
    def forward(self, x):
        residual = x
        x = self.mlp(self.norm1(x))
        x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + x


def decorator_that_is_gone(function):
    return doubled(function)


class DecoratedByWhatIsGone(PreNorm):
    @decorator_that_is_gone
    def forward(self, x):
        residual = x
        x = self.mlp(self.norm1(x))
        x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + x


del decorator_that_is_gone


NOT_FUSED = {
    PostNorm: "does not read `h = residual + h; residual = h",
    SumIsReadLater: "does not read `h = residual + h; residual = h",
    Subtracts: "does not read `h = residual + h; residual = h",
    SumHasAnotherName: "does not read `h = residual + h; residual = h",
    NormsASum: "does not read `h = residual + h; residual = h",
    CallsSuper: "calls super()",
    DecoratedByAnObject: "its forward is decorated by an object|its forward is no function",
    DecoratedAroundAnObject: "its forward is decorated by an object|its forward is no function",
    DecoratedByAList: "its forward is decorated",
}


def layers(cls, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(cls(), cls()).to(dtype), torch.randn(3, 16).to(dtype)


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def fused_additions(model, x):
    with torch.no_grad(), Record() as record:
        model(x)
    return sum("fused_add_rms_norm" in name for name in record.names)


FUSED = {
    PreNorm: ("norm2",),
    OtherNames: ("norm2", "norm3"),
    Decorated: ("norm2",),
    DecoratedBesideAnEmptyCell: ("norm2",),
    DecoratedInTheSource: ("norm2",),
    DecoratedByWhatIsGone: ("norm2",),
}


@pytest.mark.parametrize("cls, norms", FUSED.items())
def test_residual_in_norms(cls, norms):
    model, x = layers(cls)
    with replace_rms_norm(model):
        want = model(x)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert [(entry.name, entry.norms) for entry in swap.fused] == [
            ("0", norms),
            ("1", norms),
        ] and not swap.skipped
        assert (
            type(model[0]) is type(model[1])
            and type(model[0]).__name__ == cls.__name__
            and isinstance(model[0], cls)
        )
        assert same_bits(model(x), want)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(same_bits(twin(x), want) and type(twin[0]) is type(model[0]) for twin in twins)
        assert fused_additions(model, x) == 2
        assert replace_rms_norm(model, fuse_residual=True).fused == []  # they are already
    assert type(model[0]) is cls and same_bits(twins[0](x), want)


def test_arguments_and_dtypes_of_a_fused_layer():
    model, x = layers(PreNorm, torch.float32)
    layer = nn.ModuleList([model[0]])
    replace_rms_norm(layer)
    want = layer[0](x, None, factor=3.0), layer[0](x.double().requires_grad_(False)[..., :].float())
    replace_rms_norm(layer, fuse_residual=True)
    swap = replace_rms_norm(layer, fuse_residual=True)
    assert not swap.fused and type(layer[0]) is not PreNorm
    assert torch.equal(layer[0](x, None, factor=3.0), want[0]) and torch.equal(layer[0](x), want[1])
    # A residual of another dtype is promoted as torch does, not rounded to that of the residual.
    norm = rmsnorm_cuda.RMSNorm(16, 1e-5)
    for a, b in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        hidden, residual = torch.randn(3, 16).to(a), torch.randn(1, 16).to(b)
        out, total = _AddsInNorms._add_norm(norm, hidden, residual)
        assert (
            total.dtype == torch.float32
            and torch.equal(total, residual + hidden)
            and torch.equal(out, norm(total))
        )


@pytest.mark.parametrize("cls", NOT_FUSED)
def test_layers_that_are_left_alone(cls):
    model, x = layers(cls)
    want = model(x)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert not swap.fused and [entry.name for entry in swap.skipped] == ["0", "1"]
        assert all(
            any(text in entry.reason for text in NOT_FUSED[cls].split("|"))
            for entry in swap.skipped
        ), swap.skipped
        assert type(model[0]) is cls
        torch.testing.assert_close(model(x), want)


def test_hooked_norms_and_instances_are_left_alone():
    model, x = layers(PreNorm)
    model[0].norm2.register_forward_hook(lambda module, args, output: output * 2)
    model[1].forward = functools.partial(PreNorm.forward, model[1])
    with replace_rms_norm(model):
        want = model(x)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert not swap.fused and same_bits(model(x), want)
        assert (
            "hooks (norm2 has)" in swap.skipped[0].reason
            and "replaced on this instance" in swap.skipped[1].reason
        )


# Norms on both sides of what a layer adds


class Sandwich(PreNorm):
    """Gemma 2's."""

    def forward(self, x):
        residual = x
        x = self.norm1(x)
        x = self.attention(x)
        x = self.norm2(x)
        x = residual + x

        residual = x
        x = self.norm3(x)
        x = self.mlp(x)
        x = self.norm1(x)
        x = residual + x
        return x


class NormsBehind(PreNorm):
    """Olmo 2's, by other names; what is normalized is any expression."""

    def forward(self, hidden):
        skip = hidden
        hidden = self.norm1(self.attention(hidden))
        hidden = hidden + skip
        skip = hidden
        if self.scale:
            hidden = self.norm2(self.mlp(hidden))
            hidden = skip + hidden
        return hidden


class SumIsOneOfTwo(Sandwich):
    """The second norm is of something else: the first is added alone."""

    def forward(self, x):
        residual = x
        x = self.norm1(x)
        x = residual + x
        residual = x
        x = self.norm2(residual)
        return residual + x


class NormIsReadLater(PreNorm):
    def forward(self, x):
        residual = x
        normed = self.norm1(self.attention(x))
        x = residual + normed
        y = self.norm2(x)
        y = y + y
        z = self.norm3(*[y])
        z = residual + z
        return x + normed + z


SANDWICHES = {
    Sandwich: ("norm2", "norm3", "norm1"),
    NormsBehind: ("norm1", "norm2"),
    SumIsOneOfTwo: ("norm1",),
}
CALLS = {  # of one layer, its norms fused
    Sandwich: ["rms_norm", "rms_norm_add_rms_norm", "rms_norm_add"],
    NormsBehind: ["rms_norm_add", "rms_norm_add"],
    SumIsOneOfTwo: ["rms_norm_add", "rms_norm"],
}


def our_calls(model, x):
    with torch.no_grad(), Record() as record:
        model(x)
    return [n.partition("::")[2] for n in record.names if n.startswith("rmsnorm_cuda")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls, norms", SANDWICHES.items())
def test_norms_on_both_sides(cls, norms, dtype):
    model, x = layers(cls, dtype)
    with replace_rms_norm(model):
        leaf = x.clone().requires_grad_()
        want = model(leaf)
        leaves = [leaf, *model.parameters()]
        wanted = torch.autograd.grad(want.sin().sum(), leaves, allow_unused=True)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert [entry.norms for entry in swap.fused] == [norms] * 2 and not swap.skipped
        assert our_calls(model, x) == CALLS[cls] * 2
        got = model(leaf)
        assert same_bits(got.detach(), want.detach())
        grads = torch.autograd.grad(got.sin().sum(), leaves, allow_unused=True)
        tolerance = 32 * torch.finfo(dtype).eps  # a few roundings of each layer
        for a, b in zip(grads, wanted):
            assert b is None or (a - b).abs().max() <= tolerance * b.abs().max()
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(same_bits(twin(x), want.detach()) for twin in twins)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x), want.detach())
    assert type(model[0]) is cls and type(model[1]) is cls


def test_norms_that_are_read_later_are_left_alone():
    model, x = layers(NormIsReadLater)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert not swap.fused and "does not read" in swap.skipped[0].reason


CHANGED = {
    "another eps": lambda norm: setattr(norm, "eps", 0.5),
    "another offset": lambda norm: setattr(norm, "weight_offset", 0.25),
    "another order": lambda norm: setattr(norm, "cast_before_weight", True),
    "no weight": lambda norm: setattr(norm, "weight", None),
    "a wider weight": lambda norm: setattr(
        norm, "weight", nn.Parameter(torch.arange(16.0).double())
    ),
    "its forward": lambda norm: setattr(norm, "forward", torch.sin),
    "a hook": lambda norm: norm.register_forward_hook(lambda m, args, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("which", ["norm1", "norm2", "norm3"])
def test_norms_that_changed_since(which, change):
    """What fits is fused when it is called, and the bits are those of the layer that is not."""
    model, x = layers(Sandwich)
    plain = copy.deepcopy(model)
    for each, fuses in ((plain, False), (model, True)):
        assert bool(replace_rms_norm(each, fuse_residual=fuses).fused) == fuses
        CHANGED[change](getattr(each[0], which))
    with torch.no_grad():
        assert same_bits(model(x), plain(x))
    calls = our_calls(model, x)
    assert len(calls) < len(our_calls(plain, x)) + 2 and calls[-3:] == CALLS[Sandwich]


def test_another_norm_in_its_place():
    model, x = layers(Sandwich, torch.float32)
    plain = copy.deepcopy(model)
    for each, fuses in ((plain, False), (model, True)):
        replace_rms_norm(each, fuse_residual=fuses)
        torch.manual_seed(1)
        each[0].norm2, each[0].norm1 = nn.Linear(16, 16), nn.LayerNorm(16)
        each[1].norm3 = nn.Tanh()
    assert same_bits(model(x).detach(), plain(x).detach())


def test_sums_that_torch_would_promote_or_broadcast():
    norm, other = rmsnorm_cuda.RMSNorm(16, 1e-5), rmsnorm_cuda.RMSNorm(16, 1e-5)
    for a, b in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for rows in (1, 3):
            hidden, residual = torch.randn(3, 16).to(a), torch.randn(rows, 16).to(b)
            total = residual + norm(hidden)
            assert same_bits(_AddsInNorms._norm_add(norm, hidden, residual), total)
            got = _AddsInNorms._norm_add_norm(norm, other, hidden, residual)
            assert all(map(same_bits, got, (other(total), total)))


def test_a_monitor_sees_all_norms():
    model, x = layers(Sandwich)
    with torch.no_grad():
        replace_rms_norm(model)
        want = model(x)
        replace_rms_norm(model, fuse_residual=True)
        replace_rms_norm(model).restore()
        with monitor(model) as watch:
            assert same_bits(model(x), want)
        assert len(watch.norms) == 6
        assert same_bits(model(x), want)


MODELS = {
    "Gemma2": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "Gemma3Text": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "Olmo2": ("post_attention_layernorm",),
    "Olmo3": ("post_attention_layernorm",),
}


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_norms_on_both_sides(name, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # else a weight that is not applied would not be seen
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) / 4)
    ids = torch.randint(3, 128, (2, 9))
    options = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)
    options["attention_mask"] = torch.ones_like(ids)

    def run():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), [p.grad for p in model.parameters()]

    classes = [type(m) for m in model.modules()]
    with replace_rms_norm(model):
        logits, grads = run()
        tokens = model.generate(ids, **options)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        norms = (*MODELS[name], "post_feedforward_layernorm")
        assert [entry.norms for entry in swap.fused] == [norms] * 2 and not swap.skipped
        got, got_grads = run()
        assert same_bits(got, logits)
        assert torch.equal(model.generate(ids, **options), tokens)
        tolerance = 16 * torch.finfo(dtype).eps
        for a, b in zip(got_grads, grads):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert [type(m) for m in model.modules()] == classes


# Hooks, which expect the sum and one result

HOOKS = {
    "forward": lambda norm, seen: norm.register_forward_hook(
        lambda m, args, y: seen.append((*args, y))
    ),
    "forward pre": lambda norm, seen: norm.register_forward_pre_hook(
        lambda m, args: seen.append(args)
    ),
    "backward": lambda norm, seen: norm.register_full_backward_hook(
        lambda m, inputs, outputs: seen.append((*inputs, *outputs))
    ),
    "backward pre": lambda norm, seen: norm.register_full_backward_pre_hook(
        lambda m, outputs: seen.append(outputs)
    ),
    "halves the gradient": lambda norm, seen: norm.register_full_backward_hook(
        lambda m, inputs, outputs: (inputs[0] / 2,)
    ),
    "forward, global": lambda norm, seen: hooks_of_all.register_module_forward_hook(
        lambda m, args, y: seen.append((*args, y)) if m is norm else None
    ),
    "forward pre, global": lambda norm, seen: hooks_of_all.register_module_forward_pre_hook(
        lambda m, args: seen.append(args) if m is norm else None
    ),
    "backward, global": lambda norm, seen: hooks_of_all.register_module_full_backward_hook(
        lambda m, inputs, outputs: seen.append((*inputs, *outputs)) if m is norm else None
    ),
    "backward pre, global": lambda norm, seen: hooks_of_all.register_module_full_backward_pre_hook(
        lambda m, outputs: seen.append(outputs) if m is norm else None
    ),
}


@pytest.mark.parametrize("before", [False, True], ids=["hooked afterwards", "hooked before"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_a_fused_norm(kind, before):
    """A hook sees what it sees of the plain layer, to fp32's roundings, and what it returns counts
    once.
    """

    def run(model, hooked):
        seen, t = [], x.clone().requires_grad_()
        handle = hooked or HOOKS[kind](model[0].norm2, seen)
        try:
            model(t).sin().sum().backward()
        finally:
            handle.remove()
        return t.grad, [[part.detach() for part in parts] for parts in seen]

    model, x = layers(PreNorm, torch.float32)
    want = run(copy.deepcopy(model), None)
    seen: list = []
    handle = HOOKS[kind](model[0].norm2, seen) if before and "global" not in kind else None
    swap = replace_rms_norm(model, fuse_residual=True)
    assert len(swap.fused) == 2 - (handle is not None)
    if handle is not None:
        gradient, _ = run(model, handle)
        got = gradient, [[part.detach() for part in parts] for parts in seen]
    else:
        got = run(model, None)
    assert len(got[1]) == len(want[1])
    torch.testing.assert_close(
        got, want, rtol=1e-5, atol=1e-6
    )  # a few roundings of values of size 1
    assert fused_additions(model, x) == len(swap.fused)  # the hook is gone


# The source, which is not always what runs

TEMPLATE = """
from torch import nn
FACTOR = 3.0

class Layer(nn.Module):
    {body}
    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def __twice(self, x):
        return 2 * x

    def forward(self, x{arguments}):
        residual = x
        x = self.attention(self.norm1(x))
        {inside}
        x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + self.mlp(x)

FACTOR = 5.0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of its own whose file the test may change."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, body="pass", arguments="", inside="pass"):
        text = TEMPLATE.format(body=body, arguments=arguments, inside=inside)
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name), tmp_path / f"{name}.py", text

    return make


def unchanged(layer, fused, reason=""):
    """The layer computes what it did, swapped, fused if it is to be, and restored."""
    model, x = nn.Sequential(layer), torch.randn(3, 16)
    want = model(x)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        assert len(swap.fused) == fused and all(reason in entry.reason for entry in swap.skipped), (
            swap.skipped
        )
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert same_bits(model(x), want)


FORMS = {
    "private method": {"inside": "x = self.__twice(x)"},
    "default of the class body": {
        "body": "factor = 3.0",
        "arguments": ", factor=factor",
        "inside": "x = x * factor",
    },
    "default that is another number by now": {
        "arguments": ", factor=FACTOR",
        "inside": "x = x * factor",
    },
    "annotation of the class body": {
        "body": "Kind = float",
        "arguments": ", factor: Kind = 2.0",
        "inside": "x = x * factor",
    },
    "keyword-only": {
        "arguments": ", *more, factor=2.0, **rest",
        "inside": "x = x * factor + len(more) + len(rest)",
    },
    "super": {"inside": "x = super().__getattr__('mlp')(x)"},
    "method of what the module imports": {"inside": "x = nn.Identity()(x)"},
    "nested function": {"inside": "x = (lambda y: self.__twice(y))(x)"},
}


@pytest.mark.parametrize("form", FORMS)
def test_names_are_those_of_the_original(form, module):
    made, *_ = module(f"form_{list(FORMS).index(form)}", **FORMS[form])
    unchanged(made.Layer(), 1)


def test_class_of_a_function():
    factor = 3.0

    class Local(PreNorm):
        def forward(self, x):
            residual = x
            x = factor * self.mlp(self.norm1(x))
            x = residual + x
            residual = x
            x = self.norm2(x)
            return residual + x

    unchanged(Local(), 1)
    factor = 4.0
    unchanged(Local(), 1)


def test_default_that_is_filled(module):
    made, *_ = module("filled", arguments=", seen=[]", inside="seen.append(1); x = x * len(seen)")
    model, x = nn.Sequential(made.Layer()), torch.randn(3, 16)
    model(x)
    with replace_rms_norm(model, fuse_residual=True) as swap:
        model(x)
    assert len(swap.fused) == 1 and made.Layer.forward.__defaults__ == ([1, 1],)


CHANGES = {
    "another forward": lambda text: text.replace(
        "self.attention(self.norm1(x))", "3 * self.attention(self.norm1(x))"
    ),
    "another constant": lambda text: text.replace("return residual", "return 1.0 * residual"),
    "lines above": lambda text: "\n" * 3 + text,
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_has_changed_since(change, module):
    made, file, text = module(f"changed_{list(CHANGES).index(change)}")
    layer = made.Layer()
    file.write_text(CHANGES[change](text))
    unchanged(layer, 0, "source")


def test_cell_was_run_again():
    """Two texts of one file name, as a notebook has them."""
    one, two = (
        TEMPLATE.format(body="pass", arguments="", inside=inside)
        for inside in ("pass", "x = 9 * x")
    )
    for text, fused in ((one, 1), (two, 0)):
        scope = {"__name__": "cell"}
        exec(compile(one, "<cell>", "exec"), scope)
        linecache.cache["<cell>"] = len(text), None, text.splitlines(True), "<cell>"
        unchanged(scope["Layer"](), fused, "source")
    del linecache.cache["<cell>"]


def test_forward_was_replaced_on_the_class(module):
    made, *_ = module("replaced")
    unchanged(made.Layer(), 1)

    def forward(self, x):
        return self.mlp(self.norm2(self.norm1(x)))

    made.Layer.forward = forward
    unchanged(made.Layer(), 0)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model, x = layers(PreNorm)
    want, classes = model(x), [type(m) for m in model.modules()]
    from rmsnorm_cuda.integrations import transformers

    def failing(layer, calls=[]):  # noqa: B006
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transformers_fuse(layer)

    transformers_fuse = transformers.fuse
    monkeypatch.setattr(transformers, "fuse", failing)
    with pytest.raises(KeyboardInterrupt):
        replace_rms_norm(model, fuse_residual=True)
    assert [type(m) for m in model.modules()] == classes and same_bits(model(x), want)


def test_code_that_differs_in_its_flags_alone():
    one, other = (lambda *x: x).__code__, (lambda **x: x).__code__
    assert rewrite._same_code(one, one) and not rewrite._same_code(one, other)
