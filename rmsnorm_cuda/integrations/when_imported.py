"""Calls a function once somebody has imported a module: to import it ourselves would take a while,
and most do not need it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Callable

from ..again import is_a


def when_imported(names: tuple[str, ...], function: Callable[[], None], what: str) -> None:
    """Calls `function` now or when the first of these modules is imported, or another of them if it
    failed then; `what` is missing until it succeeds."""
    hook = _Hook(names, function, what)
    # Instead of one that an earlier import of this package left.
    others = [f for f in sys.meta_path if not (is_a(f, _Hook) and f.names == names)]
    sys.meta_path[:] = [hook, *others]
    if names[0] in sys.modules:
        importlib.import_module(names[0])  # waits for a thread that is importing it
        hook.call()


class _Hook(threading.local):
    """A finder that has the function called once a module has been executed, and then leaves
    sys.meta_path.
    """

    asks = False  # the other finders, in this thread: one of somebody else may in turn ask this one

    def __init__(self, names: tuple[str, ...], function: Callable[[], None], what: str) -> None:
        self.names, self.function, self.what = names, function, what

    def call(self) -> None:
        if self not in sys.meta_path:  # done meanwhile
            return
        self.function()
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(self, name, path=None, target=None):
        if self.asks or name not in self.names:
            return None
        # Not importlib.util.find_spec, which imports the parent: this is called under the lock of
        # all imports.
        specs = (
            finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self
        )
        self.asks = True
        try:
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.asks = False
        if spec is not None:
            self.after_exec(spec.loader)
        return spec

    def after_exec(self, loader):
        # What another package's hook put there.
        before = {key: value for key, value in vars(loader).items() if key == "exec_module"}

        def exec_module(module):
            del loader.exec_module  # the method of its class again
            vars(loader).update(before)
            loader.exec_module(module)
            try:
                self.call()
            except Exception as error:  # that is no reason for the module not to be imported
                until = f" until {self.names[1]} is imported" if len(self.names) > 1 else ""
                why = f"which failed: {type(error).__name__}: {error}"
                warnings.warn(f"rmsnorm_cuda: no {self.what}{until}, {why}", stacklevel=2)

        loader.exec_module = exec_module
