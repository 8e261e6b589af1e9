"""Writes what the two servers serve: python export.py FOLDER

model.pt2 and requests.pt are for torch_server; fp32.x, fp32.weight, bf16.x and bf16.weight for
kernel_server.
"""

import argparse
from pathlib import Path

import torch

from rmsnorm_cuda import RMSNorm, fused_add_rms_norm_, rms_norm, rms_norm_quant

BATCHES = (1, 2, 3, 8)
# The AOTInductor of 2.11 hands an op another dtype than it was given (pytorch#173562): no quantized
# op in a compiled package.
AOTI_KEEPS_DTYPES = torch.__version__ >= "2.12.dev0"


class Model(torch.nn.Module):
    """Feed-forward layers between norms of every kind.

    Returns the last norm, in 8 bits and its scales, and the residual.
    """

    def __init__(self, hidden, layers):
        super().__init__()
        self.embed = torch.nn.Linear(hidden, hidden, bias=False)
        self.norm = RMSNorm(hidden, eps=1e-6)
        self.weight = torch.nn.Parameter(torch.rand(hidden) + 0.5)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(hidden, hidden, bias=False) for _ in range(layers)
        )

    def forward(self, x):
        y, residual = self.norm(
            self.embed(x), x
        )  # the sum is new, so that it may be written in place from here on
        for layer in self.layers:
            y = layer(y).relu()
            fused_add_rms_norm_(y, residual, self.weight, 1e-6)
        y = rms_norm(y * 2, y.shape[-1:], self.weight, 1e-6)
        last = rms_norm_quant(y, self.weight, 1e-6, dtype=torch.int8) if AOTI_KEEPS_DTYPES else (y,)
        return *last, residual


def export_model(folder, hidden, layers, **inductor_configs):
    """Compiles the model for any batch size, and saves requests with the answers of Python.

    Returns the model.
    """
    model = Model(hidden, layers).requires_grad_(False)
    program = torch.export.export(
        model, (torch.randn(2, hidden),), dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},)
    )
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2"), inductor_configs=inductor_configs
    )
    compiled = torch._inductor.aoti_load_package(path)
    inputs = [torch.randn(batch, hidden) for batch in BATCHES]
    torch.save(
        [(x, rms_norm(x, (hidden,), eps=1e-6), *compiled(x)) for x in inputs],
        folder / "requests.pt",
    )
    return model


def save_bits(tensor, path):
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as a request has in the server
    export_model(args.folder, args.hidden, args.layers)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        save_bits(torch.randn(64, 4096, dtype=dtype), args.folder / f"{name}.x")
        save_bits(torch.randn(4096, dtype=dtype), args.folder / f"{name}.weight")


if __name__ == "__main__":
    main()
