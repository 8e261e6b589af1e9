"""What torch.jit.script() compiles in place of an RMSNorm: TorchScript reads no string annotations
and no C functions.
"""

import torch
from torch import Tensor, nn


class ScriptableRMSNorm(nn.Module):
    """The norm as one op, for TorchScript. A process that loads it has to import rmsnorm_cuda, or
    load librmsnorm_torch.so.
    """

    __constants__ = ["normalized_shape", "eps", "weight_offset", "cast_before_weight"]
    normalized_shape: list[int]
    eps: float | None
    weight_offset: float
    cast_before_weight: bool

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.register_parameter("weight", norm._parameters["weight"])
        self.normalized_shape, self.eps = list(norm.normalized_shape), norm.eps
        self.weight_offset = float(norm.weight_offset)
        self.cast_before_weight = bool(norm.cast_before_weight)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.rmsnorm_cuda.rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )
        return y
