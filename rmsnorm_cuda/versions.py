"""What differs between the versions of torch that this package runs with, in one place."""

import torch

_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

# The Dynamo of 2.11 makes zeros of the gradients of an autograd.Function over a collective: the graph is broken there.
TRACES_FUNCTIONS_OVER_COLLECTIVES = _TORCH >= (2, 12)

# The AOTInductor of 2.11 hands an op another dtype than it was given (pytorch#173562): no quantized op in a compiled package.
AOTI_KEEPS_DTYPE_ARGUMENTS = _TORCH >= (2, 12)

# F.rms_norm is on autocast's list of fp32 ops for CUDA.
AUTOCASTS_RMS_NORM = _TORCH >= (2, 12)

# Dynamo reads a module's __dict__: the layer for the library `kernels` does, to know whose forward it takes the place of.
TRACES_MODULE_DICT = _TORCH >= (2, 12)
