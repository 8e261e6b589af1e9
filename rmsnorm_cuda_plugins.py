"""What vLLM, SGLang and PyInstaller find by the entry points in pyproject.toml. No function raises.

A module beside the package: to import anything of the package is to import its compiled part, which
may be for another torch or Python than the server's. vLLM would end where a plug-in raises, and
both servers print a traceback where one cannot be loaded. So this module imports the package
itself. Where that fails, one line says why, and the server keeps its own norms.
"""

import importlib
import logging
import os
from pathlib import Path


def vllm() -> None:
    """Registers our implementations of vLLM's IR ops, which --ir-op-priority chooses; and our
    layers with a gate if VLLM_PLUGINS names us.
    """
    layers = ["register_gated_layers"] if _is_named("VLLM_PLUGINS") else []
    _register("vLLM", "rmsnorm_cuda.integrations.vllm", "register", *layers)


def sglang() -> None:
    """Registers our hooks if SGLANG_PLUGINS names us: unset, SGLang loads every plug-in."""
    if _is_named("SGLANG_PLUGINS"):
        _register("SGLang", "rmsnorm_cuda.integrations.sglang", "register")


def pyinstaller() -> list[str]:
    """The folder of our hook, by which a frozen application takes our libraries along."""
    return [str(Path(__file__).parent / "rmsnorm_cuda/installation/pyinstaller")]


def _is_named(variable: str) -> bool:
    names = os.environ.get(variable, "").split(",")
    return "rmsnorm_cuda" in [name.strip() for name in names]


def _register(server: str, module: str, *functions: str) -> None:
    try:
        plugin = importlib.import_module(module)
        for function in functions:
            getattr(plugin, function)()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        logger = logging.getLogger("rmsnorm_cuda")
        logger.warning("rmsnorm_cuda: %s keeps its own norms: %s", server, reason)
