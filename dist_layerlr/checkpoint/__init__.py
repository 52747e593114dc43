"""Checkpoints keyed by canonical name, which any layout loads. See docs/checkpoints.md.

Importing this package does not import torch: the command line compares folders by their files
alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_layerlr.checkpoint.deepspeed import load_deepspeed as load_deepspeed
    from dist_layerlr.checkpoint.deepspeed import save_deepspeed as save_deepspeed
    from dist_layerlr.checkpoint.folders import CHECKPOINTS as CHECKPOINTS
    from dist_layerlr.checkpoint.folders import complete_checkpoints as complete_checkpoints
    from dist_layerlr.checkpoint.folders import step_of as step_of
    from dist_layerlr.checkpoint.load import Restored as Restored
    from dist_layerlr.checkpoint.load import load_checkpoint as load_checkpoint
    from dist_layerlr.checkpoint.manifest import read_manifest as read_manifest
    from dist_layerlr.checkpoint.resume import find_checkpoint as find_checkpoint
    from dist_layerlr.checkpoint.resume import resume_plan as resume_plan
    from dist_layerlr.checkpoint.save import Saving as Saving
    from dist_layerlr.checkpoint.save import finish_background_save as finish_background_save
    from dist_layerlr.checkpoint.save import save_checkpoint as save_checkpoint

_MODULE_OF = {
    "load_deepspeed": "deepspeed",
    "save_deepspeed": "deepspeed",
    "CHECKPOINTS": "folders",
    "complete_checkpoints": "folders",
    "step_of": "folders",
    "Restored": "load",
    "find_checkpoint": "resume",
    "load_checkpoint": "load",
    "read_manifest": "manifest",
    "resume_plan": "resume",
    "Saving": "save",
    "finish_background_save": "save",
    "save_checkpoint": "save",
}

__all__ = sorted(_MODULE_OF)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Resolve public names on first use, so that torch loads only when it is asked for."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
