"""torchtitan's RMSNorm on our kernels, and a converter that puts it into a model's config.

    from rmsnorm_cuda.integrations.torchtitan import RMSNorm, RMSNormConverter

    norm = RMSNorm.Config(normalized_shape=dim, eps=1e-5).build()  # in a config of one's own
    # Or converters=[RMSNormConverter.Config()].
    model_config = RMSNormConverter(RMSNormConverter.Config()).convert(model_config)

The parameters and checkpoints are those of torchtitan's, as are init and sharding, which stand in
the config. Importing this module imports torchtitan.
"""

from dataclasses import dataclass, fields

from torch import Tensor
from torchtitan.models.common.nn_modules import RMSNorm as TorchtitanRMSNorm
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from .. import modules


class RMSNorm(modules.RMSNorm, Module):
    """rmsnorm_cuda.RMSNorm, built from a Config: that of torchtitan's RMSNorm, with two options
    more.

    `weight_offset=1.0` is the function of torchtitan's OffsetRMSNorm (Qwen 3.5); its `param_init`
    is what fills the weight.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TorchtitanRMSNorm.Config):
        weight_offset: float = 0.0
        cast_before_weight: bool = False

    def __init__(self, config: Config):
        super().__init__(
            config.normalized_shape,
            config.eps,
            config.elementwise_affine,
            weight_offset=config.weight_offset,
            cast_before_weight=config.cast_before_weight,
        )

    def forward(self, x: Tensor) -> Tensor:
        # torchtitan reads the names of the inputs that it shards from here, and its norms have one.
        return super().forward(x)


class RMSNormConverter(ModelConfigConverter):
    """Has a model built with our norms in place of torchtitan's RMSNorm; its OffsetRMSNorm and
    RMSNormGated stay.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        pass

    def __init__(self, config: Config, **kwargs):
        pass

    def convert(self, model_config):
        for _, config, parent, name in list(model_config.traverse(TorchtitanRMSNorm.Config)):
            if type(config) is not TorchtitanRMSNorm.Config:
                continue
            names = [field.name for field in fields(config) if field.init]
            ours = RMSNorm.Config(**{name: getattr(config, name) for name in names})
            if parent is None:
                return ours
            if isinstance(parent, list):
                parent[name] = ours
            else:
                setattr(parent, name, ours)
        return model_config
