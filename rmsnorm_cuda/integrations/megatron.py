"""A norm for Megatron-Core's layer specs, in place of TENorm, FusedLayerNorm or WrappedTorchNorm.

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from rmsnorm_cuda.integrations.megatron import MegatronRMSNorm

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = MegatronRMSNorm

A class, since Megatron hands on a function as it is instead of calling it. Nothing here imports
Megatron.
"""

from __future__ import annotations

from ..modules import RMSNorm


class MegatronRMSNorm(RMSNorm):
    """rmsnorm_cuda.RMSNorm with Megatron's constructor: norm(config=, hidden_size=, eps=).

    From the TransformerConfig come the weight's dtype (`params_dtype`), zero-centered gamma (a
    weight_offset of 1), `init_model_with_meta_device`, and `sequence_parallel`, which marks the
    weight, so that Megatron sums its gradient over the tensor-parallel ranks. One rounding, to the
    input's dtype.

    `persist_layer_norm` is accepted, in the config and as an argument: it chooses between Apex's
    kernels, and ours are chosen by the length of a row. The arguments after it are there because
    Megatron's own norms have them; the config is what counts, and one that contradicts it is
    refused.

    Raises:
        ValueError: `config.normalization` is not "RMSNorm"; `zero_centered_gamma` where the config
            has none; `config.memory_efficient_layer_norm`, since our backward reads the norm's
            input and not its output.
    """

    def __init__(
        self,
        config,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ) -> None:
        for name in dict.fromkeys((config.normalization, normalization)):
            if name != "RMSNorm":
                raise ValueError(
                    f"MegatronRMSNorm: expected normalization to be 'RMSNorm', but got {name!r}"
                )
        if zero_centered_gamma and not config.layernorm_zero_centered_gamma:
            raise ValueError(
                "MegatronRMSNorm: zero_centered_gamma=True, but "
                "config.layernorm_zero_centered_gamma is False"
            )
        if config.memory_efficient_layer_norm:
            raise ValueError(
                "MegatronRMSNorm: memory_efficient_layer_norm is not supported: the backward reads "
                "the norm's input, not its output"
            )
        super().__init__(
            hidden_size,
            eps,
            device="meta" if config.init_model_with_meta_device else None,
            dtype=config.params_dtype,
            weight_offset=1.0 if config.layernorm_zero_centered_gamma else 0.0,
        )
        self.weight.sequence_parallel = config.sequence_parallel
