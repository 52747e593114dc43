"""Folders of one model: what is written in place of a pipeline for families outside diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model and what lies beside it."""

    components: Mapping[str, Any]
    """Name -> model, tokenizer and the like."""
    save: Callable[[Mapping[str, Any], Path], None]
    """Writes the components."""

    def save_pretrained(self, folder: Path) -> None:
        """Write everything into the folder, as a pipeline's method of that name does."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save(self.components, folder)


def save_all(components: Mapping[str, Any], folder: Path) -> None:
    """Have each component write itself, as those of transformers can."""
    for component in components.values():
        component.save_pretrained(folder)
