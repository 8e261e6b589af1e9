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
    """Registers our implementations of vLLM's IR ops, which --ir-op-priority chooses."""
    _register("vLLM", "rmsnorm_cuda.integrations.vllm")


def sglang() -> None:
    """Registers our hooks if SGLANG_PLUGINS names us: unset, SGLang loads every plug-in."""
    if "rmsnorm_cuda" in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]:
        _register("SGLang", "rmsnorm_cuda.integrations.sglang")


def pyinstaller() -> list[str]:
    """The folder of our hook, by which a frozen application takes our libraries along."""
    return [str(Path(__file__).parent / "rmsnorm_cuda/installation/pyinstaller")]


def _register(server: str, module: str) -> None:
    try:
        importlib.import_module(module).register()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        logger = logging.getLogger("rmsnorm_cuda")
        logger.warning("rmsnorm_cuda: %s keeps its own norms: %s", server, reason)
