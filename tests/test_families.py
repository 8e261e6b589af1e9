"""Which RMSNorm a module is: the families against the classes that transformers and others have,
and what is refused.
"""

import importlib
import itertools
import random
import re
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import rmsnorm_cuda
from rmsnorm_cuda.integrations.families import FAMILIES, twin
from rmsnorm_cuda.integrations.recognize import recognize
from rmsnorm_cuda.reference import ulp_distance

# (family, class, arguments beside the width)
CLASSES = [
    ("torch", "torch.nn.modules.normalization.RMSNorm", {"eps": 1e-3}),
    ("torch", "torch.nn.modules.normalization.RMSNorm", {}),
    ("torch", "torch.nn.modules.normalization.RMSNorm", {"eps": 1e-3, "elementwise_affine": False}),
    ("torch", "transformers.olmo2.Olmo2RMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.olmo3.Olmo3RMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.gpt_oss.GptOssRMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.helium.HeliumRMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.moshi.MoshiRMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.gemma3n.Gemma3nRMSNorm", {"eps": 1e-3}),
    ("torch", "transformers.gemma3n.Gemma3nRMSNorm", {"eps": 1e-3, "with_scale": False}),
    ("torch", "transformers.falcon_mamba.FalconMambaWeightlessRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.llama.LlamaRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.mistral.MistralRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.mixtral.MixtralRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.qwen2.Qwen2RMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.qwen2_moe.Qwen2MoeRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.qwen3.Qwen3RMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.qwen3_moe.Qwen3MoeRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.phi3.Phi3RMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.glm.GlmRMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.deepseek_v3.DeepseekV3RMSNorm", {"eps": 1e-3}),
    ("llama", "transformers.llama4.Llama4TextRMSNorm", {"eps": 1e-3}),
    ("gemma", "transformers.gemma.GemmaRMSNorm", {"eps": 1e-3}),
    ("gemma", "transformers.gemma2.Gemma2RMSNorm", {"eps": 1e-3}),
    ("gemma", "transformers.gemma3.Gemma3RMSNorm", {"eps": 1e-3}),
    ("gemma", "transformers.qwen3_next.Qwen3NextRMSNorm", {"eps": 1e-3}),
    ("t5", "transformers.t5.T5LayerNorm", {"eps": 1e-3}),
    ("t5", "transformers.umt5.UMT5LayerNorm", {"eps": 1e-3}),
    ("t5", "transformers.idefics.IdeficsRMSNorm", {"eps": 1e-3}),
]
REFUSED = {
    # a mean is subtracted
    "transformers.cohere.CohereLayerNorm": "it computes what no known family computes",
    "torch.nn.modules.normalization.LayerNorm": "LayerNorm has bias, where one parameter is "
    "expected, called weight",
    "torch.nn.modules.linear.Linear": "it computes what no known family|has bias",
}
DTYPES = torch.float32, torch.bfloat16, torch.float16


def load(path):
    """The class: transformers.MODEL.CLASS, or any other by its full name."""
    if path.startswith("transformers."):
        pytest.importorskip("transformers")
        _, model, name = path.split(".")
        path = f"transformers.models.{model}.modeling_{model}.{name}"
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")


# The same code as another class's, in transformers.
COPIES = (
    *("Olmo3", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Phi3", "Glm"),
    *("DeepseekV3", "Gemma2", "UMT5"),
)


@pytest.mark.parametrize(
    "family, path, options",
    [
        pytest.param(
            *case,
            marks=pytest.mark.slow if re.search(rf"\.({'|'.join(COPIES)})\w*$", case[1]) else [],
        )
        for case in CLASSES
    ],
    ids=[f"{path.split('.')[-1]}-{len(options)}" for _, path, options in CLASSES],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch.nn.RMSNorm
def test_class(family, path, options):
    """The twin computes what the class computes, to the last bit but for near-ties of its
    roundings.
    """
    for w_dtype, x_dtypes in (
        (torch.float32, DTYPES),
        (torch.bfloat16, (torch.bfloat16, torch.float32)),
        (torch.float16, (torch.float16, torch.float32)),
    ):
        old = load(path)(96, **options).to(w_dtype)
        for weight in old.parameters():
            nn.init.normal_(weight, mean=0.0 if family == "gemma" else 1.0, std=0.25)
        found = recognize(old)
        assert (found.family.name, found.eps) == (family, options.get("eps"))
        new = twin(old, *found)
        assert isinstance(new, rmsnorm_cuda.RMSNorm) and new.weight is getattr(old, "weight", None)
        for x_dtype in x_dtypes:
            compare(old, new, x_dtype, family)


def compare(old, new, x_dtype, family):
    x = torch.randn(512, 96).to(x_dtype)
    x[:8] *= 1e-3  # where eps is as large as the mean of squares and larger
    want, got = old(x).detach(), new(x).detach()
    assert got.dtype == want.dtype
    promoted = want.dtype == torch.float32 != x_dtype
    if promoted and new.cast_before_weight and family != "t5":
        # a near-tie of the first rounding is an ulp of the input's dtype
        torch.testing.assert_close(got, want, rtol=torch.finfo(x_dtype).eps, atol=0)
    else:
        # 16 bits: one rounding can fall the other way, and a product carries that to 2 ulp. fp32:
        # theirs rounds the mean (half of it reaches the root), the root, two products and 1 +
        # weight; ours is within 1 or 2.
        assert ulp_distance(got, want).max() <= (5 if want.dtype == torch.float32 else 2)
    if want.dtype != torch.float32:
        assert (got == want).float().mean() > 0.999


@pytest.mark.parametrize("path", REFUSED)
def test_refused(path):
    arguments = (96, 96) if path.endswith("Linear") else (96,)
    reason = recognize(load(path)(*arguments))
    assert isinstance(reason, str) and any(text in reason for text in REFUSED[path].split("|")), (
        reason
    )


def test_families_differ():
    """Each family's module is recognized as itself, and its name tells."""
    for family in FAMILIES:
        norm = nn.Module()
        norm.weight, norm.variance_epsilon, norm.eps = nn.Parameter(torch.ones(40)), 1e-5, 1e-5
        ours = twin(norm, family, 1e-5)
        found = recognize(
            Wrapped(
                lambda self, x, ours=ours: run(ours, self.weight, x),
                eps=1e-5,
                variance_epsilon=1e-5,
            )
        )
        assert found.family is family


def run(ours, weight, x):
    ours._parameters["weight"] = weight
    return ours(x)


# What people write themselves


class Wrapped(nn.Module):
    """A norm whose forward is `function(self, x)`."""

    def __init__(self, function, width=40, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def rms(x, eps):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


OWN = {
    "as in Llama's own code": (
        lambda self, x: (x.float() * rms(x, self.eps)).type_as(x) * self.weight,
        {"eps": 1e-5},
        ("llama", 1e-5),
    ),
    "another name for eps": (
        lambda self, x: (x * rms(x, self.epsilon) * self.weight).to(x.dtype),
        {"epsilon": 1e-6},
        ("torch", 1e-6),
    ),
    "two numbers": (
        lambda self, x: (x * rms(x, self.small) * self.weight).to(x.dtype),
        {"eps": 0.9, "dropout": 0.1, "small": 1e-5},
        ("torch", 1e-5),
    ),
    "large eps": (
        lambda self, x: (x * rms(x, self.eps) * self.weight).to(x.dtype),
        {"eps": 0.5},
        ("torch", 0.5),
    ),
    "no eps": (
        lambda self, x: (x * rms(x, self.eps) * self.weight).to(x.dtype),
        {"eps": 0.0},
        ("torch", 0.0),
    ),
}
NOT_OURS = {
    "no such attribute": (
        lambda self, x: (x * rms(x, 1e-5) * self.weight).to(x.dtype),
        {},
        "no attribute that could be its eps",
    ),
    "another eps than it says": (
        lambda self, x: (x * rms(x, 1e-5) * self.weight).to(x.dtype),
        {"eps": 1e-6},
        "with eps=1e-06",
    ),
    "eps outside of the root": (
        lambda self, x: (
            x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight
        ).to(x.dtype),
        {"eps": 1e-5},
        "no known family",
    ),
    "in the input's dtype": (
        lambda self, x: x * rms(x, self.eps).to(x.dtype) * self.weight,
        {"eps": 1e-5},
        "no known family",
    ),
    "of another dimension": (
        lambda self, x: x * rms(x.mT, self.eps).mT * self.weight,
        {"eps": 1e-5},
        "could not be tried|no known family",
    ),
    "part of a row": (
        lambda self, x: (x * rms(x[..., :20], self.eps) * self.weight).to(x.dtype),
        {"eps": 1e-5},
        "no known family",
    ),
    "scaled": (
        lambda self, x: (x * rms(x, self.eps) * self.weight * 2).to(x.dtype),
        {"eps": 1e-5},
        "of its values differ in float32",
    ),
    "L2": (
        lambda self, x: (nn.functional.normalize(x.float(), dim=-1) * self.weight).to(x.dtype),
        {"eps": 1e-12},
        "no known family",
    ),
    "raises": (
        lambda self, x: x.nothing,
        {"eps": 1e-5},
        "could not be tried on the CPU: AttributeError: 'Tensor' object",
    ),
    "no tensor": (lambda self, x: (x, x), {"eps": 1e-5}, "its result is a tuple, not a tensor"),
}


@pytest.mark.parametrize("what", OWN)
def test_own_class(what):
    function, attributes, want = OWN[what]
    found = recognize(Wrapped(function, **attributes))
    assert (found.family.name, found.eps) == want


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_is_not_ours(what):
    function, attributes, reason = NOT_OURS[what]
    found = recognize(Wrapped(function, **attributes))
    assert isinstance(found, str) and any(text in found for text in reason.split("|")), found


# What computes the same where it is looked at first, and is another function


def plain(self, x, weight=None):
    return (x.float() * rms(x, self.eps) * (self.weight if weight is None else weight)).to(x.dtype)


def written_over(self, x):
    y = plain(self, x)
    return y if torch.is_grad_enabled() else x.copy_(y)


def counted(self, x):
    self.calls += 1
    return plain(self, x) * (1 + self.calls % 3)


flips = itertools.cycle((0, 2e-7))  # within what arithmetic in fp32 is allowed


LOOK_ALIKES = {
    "in fp64 while it trains": (
        lambda self, x: plain(self, x).double() if self.training else plain(self, x),
        "its result is float64 [",
    ),
    "a tuple while it trains": (
        lambda self, x: (plain(self, x),) if self.training else plain(self, x),
        "its result is a tuple, not float32 [",
    ),
    "flips": (
        lambda self, x: plain(self, x) * (1 + next(flips)),
        "its result is another at each call",
    ),
    "more while it trains": (
        lambda self, x: plain(self, x) + 0.1 * self.training,
        "of the values differ for rows of size 1 in float32 while it trains",
    ),
    "dropout": (
        lambda self, x: nn.functional.dropout(plain(self, x), 0.1, self.training),
        "while it trains",
    ),
    "clamped": (lambda self, x: plain(self, x.clamp(-1e3, 1e3)), "no known family"),
    "clamped for fp16": (
        lambda self, x: plain(self, x.clamp(-5e4, 5e4)),
        "for rows near the largest number of fp16",
    ),
    "clamped result": (lambda self, x: plain(self, x).clamp(-1e3, 1e3), "values differ for rows"),
    "clamped before the weight": (
        lambda self, x: plain(self, x, torch.ones(1)).clamp(-3.9, 3.9) * self.weight,
        "values differ for rows that one element|single values differ",
    ),
    "negative weights as none": (
        lambda self, x: plain(self, x, self.weight.relu()),
        "values differ for rows",
    ),
    "weights without sign": (
        lambda self, x: plain(self, x, self.weight.abs()),
        "values differ for rows",
    ),
    "clamped weights": (
        lambda self, x: plain(self, x, self.weight.clamp(max=100)),
        "values differ for rows",
    ),
    "a tuple": (lambda self, x: (plain(self, x), None), "its result is a tuple, not a tensor"),
    "not of no rows": (
        lambda self, x: plain(
            self, x + 0 * x.detach().nan_to_num(0, 0, 0).float().max().to(x.dtype)
        ),
        "of input of the shape [0, 40] it raises",
    ),
    "without NaN": (
        lambda self, x: plain(self, x.nan_to_num(posinf=float("inf"), neginf=-float("inf"))),
        "for rows with NaN",
    ),
    "without Inf": (lambda self, x: plain(self, torch.where(x.isinf(), 0, x)), "for rows with Inf"),
    "the larger of the mean and eps": (
        lambda self, x: (
            x.float()
            * x.float().square().mean(-1, keepdim=True).clamp_min(self.eps).rsqrt()
            * self.weight
        ).to(x.dtype),
        "no known family",
    ),
    "root without gradient": (
        lambda self, x: (x.float() * rms(x, self.eps).detach() * self.weight).to(x.dtype),
        "the gradient of its input differs",
    ),
    "weight without gradient": (
        lambda self, x: plain(self, x, self.weight.detach()),
        "its weight gets no gradient",
    ),
    "weight with half the gradient": (
        lambda self, x: plain(self, x, self.weight / 2 + self.weight.detach() / 2),
        "the gradient of its weight differs",
    ),
    "without gradients": (torch.no_grad()(plain), "its result requires no gradient"),
    "fp32 for all": (lambda self, x: plain(self, x.float()), "no known family"),
    "another result in fp16": (
        lambda self, x: plain(self, x) * (1 + (x.dtype == torch.float16)),
        "in float16",
    ),
    "other results in mixtures": (
        lambda self, x: plain(self, x) * (1 + (x.dtype == torch.float16 != self.weight.dtype)),
        "in float16 and float32",
    ),
    "writes to its input": (written_over, "it writes to its input"),
    "one element": (
        lambda self, x: torch.cat([plain(self, x)[..., :-1], x[..., -1:]], -1),
        "of the values differ|no known family",
    ),
    "counts": (counted, "no known family|another at each call"),
    "refuses NaN": (
        lambda self, x: plain(self, x) if not x.isnan().any() else x.nothing,
        "it raises AttributeError",
    ),
}


@pytest.mark.parametrize("what", LOOK_ALIKES)
def test_look_alike(what):
    function, reason = LOOK_ALIKES[what]
    found = recognize(Wrapped(function, eps=1e-6, calls=0))
    assert isinstance(found, str) and any(text in found for text in reason.split("|")), found


def test_what_is_the_same_in_other_ways():
    """Computed in fp64; its eps a number of numpy's or torch's; a lock, a list and a tensor beside
    its weight.
    """
    fp64 = Wrapped(
        lambda self, x: (
            x.double()
            * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + self.eps)
            * self.weight
        ).to(x.dtype),
        eps=1e-6,
    )
    assert recognize(fp64)[:2] == (FAMILIES[0], 1e-6)
    numpy = pytest.importorskip("numpy")
    for eps in (
        numpy.float32(1e-3),
        numpy.float64(1e-3),
        torch.tensor(1e-3),
        torch.tensor(1e-3, dtype=torch.float64),
    ):
        found = recognize(Wrapped(plain, eps=eps, lock=threading.Lock(), kept=[torch.ones(3)]))
        assert found == (FAMILIES[0], float(eps), "eps", ()) and type(found.eps) is float


def test_rows_that_are_long():
    """As many values as a batch holds: each kind of rows is tried by itself."""
    assert recognize(Wrapped(plain, 1 << 14, eps=1e-5))[:2] == (FAMILIES[0], 1e-5)


def test_a_number_that_must_not_change():
    def strict(self, x):
        assert self.version == 3
        return plain(self, x)

    assert recognize(Wrapped(strict, eps=1e-5, version=3))[:3] == (FAMILIES[0], 1e-5, "eps")


def test_dtypes_that_are_not_taken():
    """A norm need not train in pairs of dtypes that models do not have."""

    def same_dtype(self, x):
        assert x.dtype == self.weight.dtype or not torch.is_grad_enabled()
        return plain(self, x)

    assert recognize(Wrapped(same_dtype, eps=1e-5))[:2] == (FAMILIES[0], 1e-5)


def test_twin_without_a_weight_or_a_mark():
    class Marked(nn.RMSNorm):
        kernel_layer_name = "RMSNorm"  # as the `kernels` library marks a class

    class Bare(nn.Module):
        eps = 1e-5

        def __init__(self):
            super().__init__()
            self.eps = 1e-5

        def forward(self, x):
            return (x.float() * rms(x, self.eps)).to(x.dtype)

    ours = twin(Marked(8), *recognize(Marked(8)))
    assert isinstance(ours, Marked) and not hasattr(ours, "kernel_layer_name")
    ours = twin(Bare(), *recognize(Bare()))
    assert repr(ours) == "RMSNormOfAnyWidth(eps=1e-05, elementwise_affine=False)"


class OnesBeside(nn.Module):
    """FalconMamba's: the weight is a buffer of ones, for a kernel that wants one."""

    def __init__(self, reads=False, width=40):
        super().__init__()
        self.eps, self.reads = 1e-5, reads
        self.register_buffer("weight", torch.ones(width), persistent=False)

    def forward(self, x):
        y = x.float() * rms(x, self.eps)
        return (y * self.weight if self.reads else y).to(x.dtype)


def test_weight_that_is_a_buffer():
    model = nn.ModuleList([OnesBeside(), OnesBeside(reads=True), OnesBeside(), OnesBeside()])
    model[2].weight[3] = 2
    model[3].weight = torch.ones(40, device="meta")
    ones, old = model[0].weight, model[0]
    x = torch.randn(3, 40)
    swap = rmsnorm_cuda.replace_rms_norm(model, lambda name, module: name != "")
    assert [entry.name for entry in swap] == ["0"] and model[0].weight is ones
    assert repr(model[0]) == "RMSNormOfAnyWidth(eps=1e-05, elementwise_affine=False)"
    torch.testing.assert_close(model[0](x), old(x))
    assert not model.state_dict() and [*dict(model[0].named_buffers())] == ["weight"]
    reasons = [skipped.reason for skipped in swap.skipped]
    assert "it computes what no known family computes" in reasons[0]
    assert all("is not a parameter" in reason for reason in reasons[1:]) and len(reasons) == 3
    swap.restore()
    assert model[0] is old and type(old) is OnesBeside and old.weight is ones


def test_the_attribute_that_is_read():
    """Of two that hold the same number."""
    assert recognize(Wrapped(plain, eps=1e-5, variance_epsilon=1e-5)).eps_name == "eps"
    norm = Wrapped(
        lambda self, x: (x.float() * rms(x, self.variance_epsilon) * self.weight).to(x.dtype),
        eps=1e-5,
        variance_epsilon=1e-5,
    )
    assert recognize(norm).eps_name == "variance_epsilon"


def test_eps_that_is_no_number():
    norm = nn.RMSNorm(40)
    norm.eps = torch.full((2,), 1e-3)
    assert isinstance(recognize(norm), str)


def test_weight_that_is_a_view():
    """As FSDP1 leaves it: an attribute, and no parameter."""
    norm = nn.RMSNorm(40)
    del norm.weight
    norm.weight = torch.ones(40)
    assert (
        "the weight of RMSNorm is not a parameter; where it was sharded or parametrized, swap "
        "before that" == recognize(norm)
    )


def test_sharded_weight():
    norm = Wrapped(plain, eps=1e-5)
    norm.weight.data, norm.weight.ds_shape = torch.empty(0), (40,)
    assert (
        recognize(norm)
        == "its weight is partitioned by DeepSpeed ZeRO-3; swap before deepspeed.initialize()"
    )


def test_nothing_is_left_behind():
    """No random number is drawn, no list filled, no warning silenced for others."""

    def noisy(self, x):
        self.log.append(x.shape)
        self.largest.copy_(x.abs().max())
        return plain(self, x) * (1 + random.random() * torch.rand(()))

    norm = Wrapped(noisy, eps=1e-5, log=[], largest=torch.zeros(()))
    states, filters = (torch.get_rng_state(), random.getstate()), list(warnings.filters)
    assert isinstance(recognize(norm), str)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert norm.log == [] and norm.largest == 0 and warnings.filters == filters


def test_threads_warn_as_before():
    """Two threads meet in a trial, one leaves it later; warnings are those of before, meanwhile and
    after.
    """
    barrier, filters = threading.Barrier(3), list(warnings.filters)
    local = threading.local()

    def meets(self, x):
        if not hasattr(local, "met"):
            local.met = True
            barrier.wait(20)
            time.sleep(0.2 * self.late)
        return plain(self, x)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(recognize, Wrapped(meets, eps=1e-5, late=late)) for late in (0.0, 0.5)]
        barrier.wait(20)
        with pytest.warns(UserWarning, match="of somebody else"):
            warnings.warn("of somebody else", stacklevel=1)
        assert [f.result().family.name for f in found] == ["torch", "torch"]
    assert warnings.filters == filters


def test_structure_that_is_not_ours():
    norm = Wrapped(OWN["large eps"][0], eps=0.5)
    norm.child = nn.Linear(2, 2)
    assert recognize(norm) == "Wrapped has submodules"
    norm = Wrapped(OWN["large eps"][0], eps=0.5)
    norm.register_buffer("scale", torch.ones(()))
    assert recognize(norm) == "Wrapped has scale, where one parameter is expected, called weight"
    norm = Wrapped(OWN["large eps"][0], eps=0.5)
    del norm.weight
    norm.weight = torch.ones(40)
    assert (
        recognize(norm)
        == "the weight of Wrapped is not a parameter; where it was sharded or parametrized, swap "
        "before that"
    )


def test_class_that_is_not_ours():
    class Computed(Wrapped):
        weight_offset = property(lambda self: 0.0)

    class Builtin(nn.RMSNorm):
        forward = torch.rsqrt

    assert recognize(Computed(plain, eps=1e-5)) == "Computed has a property weight_offset"
    reason = "the signature of Builtin.forward cannot be read"
    assert recognize(Builtin(8)) == reason


def test_weight_that_is_not_one_for_each_column():
    for shape in ((), (0,), (1,)):  # a scale; what a sharded model holds meanwhile
        norm = Wrapped(OWN["large eps"][0], eps=0.5)
        norm.weight = nn.Parameter(torch.ones(shape))
        reason = (
            f"its weight has the shape {list(shape)}, and one number for each column is expected; "
            "where it was sharded, swap before that"
        )
        assert recognize(norm) == reason
    norm = Wrapped(OWN["large eps"][0], eps=0.5, normalized_shape=40)
    assert twin(norm, *recognize(norm)).normalized_shape == (40,)


def test_leading_dimensions_matter():
    """Such a module is no RMSNorm, though it is one on matrices."""
    norm = Wrapped(lambda self, x: OWN["large eps"][0](self, x) * (x.dim() - 1), eps=1e-3)
    assert (
        "its result depends on how many dimensions there are before the normalized ones"
        in recognize(norm)
    )


def test_the_module_itself_takes_no_part():
    """Neither its weights nor its hooks nor where it lies matter, and nothing of it changes."""
    norm = Wrapped(OWN["as in Llama's own code"][0], eps=1e-5)
    norm.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    nn.init.constant_(norm.weight, torch.nan)
    state = dict(vars(norm)), norm.weight._version, torch.get_rng_state()
    assert recognize(norm).family.name == "llama"
    assert (dict(vars(norm)), norm.weight._version) == state[:2] and torch.equal(
        torch.get_rng_state(), state[2]
    )
    with torch.device("meta"):
        assert recognize(Wrapped(OWN["large eps"][0], eps=0.5)).eps == 0.5
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert recognize(norm).family.name == "llama"
