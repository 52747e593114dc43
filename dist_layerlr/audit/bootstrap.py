"""What runs at the start of every process of an audited command: it waits until torch is imported.

Most of the processes (launchers, data workers, compilers) never train, so nothing heavy is imported
here, and no fault of the audit may reach the script.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

FOLDER = "DIST_LAYERLR_AUDIT"
"""Environment variable: the folder that reports are written to."""
STEPS = "DIST_LAYERLR_AUDIT_STEPS"
"""Environment variable: optimizer steps that are watched."""
_HOOKED = ("torch.optim.optimizer", "deepspeed.runtime.engine")


def start(folder: str) -> None:
    """Called by ``sitecustomize``.

    Args:
        folder: where that ``sitecustomize`` lies.
    """
    _run_shadowed(folder)
    # A process that is told to be audited no more (an inner `env -u`) keeps only the path.
    if os.environ.get(FOLDER):
        sys.meta_path.insert(0, _Watch())


def _run_shadowed(folder: str) -> None:
    """Run the ``sitecustomize`` that the audit's own one stands before; distributions have one."""
    elsewhere = [path for path in sys.path if path and os.path.abspath(path) != folder]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.origin is not None:
        # As Python itself does: a fault in it ends no program.
        with contextlib.suppress(Exception):
            runpy.run_path(spec.origin, run_name="sitecustomize")


class _Watch(importlib.abc.MetaPathFinder):
    """Finds the modules to be hooked as they would be found without it, and has them hooked."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _HOOKED or self._busy:
            return None
        # The search comes back here, and must go on to the other finders.
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            _after(spec.loader, _hook)
        return spec


def _after(loader: Any, then: Callable[[ModuleType], None]) -> None:
    """Have a loader call ``then`` when the module has run."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        then(module)

    loader.exec_module = exec_module


def _hook(module: ModuleType) -> None:
    # Whatever fails here, the script goes on: the parent says that nothing was seen.
    with contextlib.suppress(Exception):
        from dist_layerlr.audit import hooks

        hooks.install(module)
