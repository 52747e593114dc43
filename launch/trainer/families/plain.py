"""What the families outside diffusers share: one folder of weights, and the files beside them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import Batch, Sample, stack


class Plain(ABC):
    """A model that is one folder of weights, as transformers writes it. Satisfies ``Family``."""

    model_type: ClassVar[str]
    objective_class: ClassVar[type]
    flat_units: ClassVar[tuple[str, ...]] = ()
    weights_format: ClassVar[str] = "transformers"
    companions: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files that a model folder holds beside weights and ``config.json``."""

    def model_folder(self, path: Path) -> Path:
        """Return the folder as it is; see ``Family.model_folder``."""
        return path

    @abstractmethod
    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network; see ``Family.build``."""

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Turn on the network's own checkpointing; see ``Family.checkpoint_blocks``."""
        # Not the reentrant kind, which gives no gradient where a block's input needs none.
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return none: every parameter gets a gradient; see ``Family.without_gradient``."""
        return ()

    def without_decay(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return none: the plan decides; see ``Family.without_decay``."""
        return ()

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples, which are of one shape; see ``Family.collate``."""
        return stack(samples)

    def write_beside(self, model_config: Mapping[str, Any], folder: Path, result: Path) -> None:
        """Copy the model folder's companions; see ``HasFiles``."""
        for pattern in self.companions:
            for path in folder.glob(pattern):
                (result / path.name).write_bytes(path.read_bytes())


def from_transformers(model_config: Mapping[str, Any], ending: str, model_type: str) -> Any:
    """Return the class that a config's ``architectures`` names.

    Args:
        model_config: Content of ``config.json``.
        ending: What the names of the classes that can be trained end in.
        model_type: Of the family, for the message.

    Raises:
        ModelSourceError: none is named, one of another kind, or one that transformers lacks.
    """
    import transformers

    named = model_config.get("architectures") or [model_config.get("_class_name")]
    name = named[0]
    if not isinstance(name, str) or not name.endswith(ending):
        raise ModelSourceError(
            f"model_path holds a {name}, but model_type={model_type!r} needs a class of"
            f" transformers whose name ends in {ending} ('architectures' in config.json)."
        )
    found = getattr(transformers, name, None)
    if found is None:
        raise ModelSourceError(
            f"transformers {transformers.__version__} has no {name}, which 'architectures' in"
            " config.json names: install a newer release (pip install -U transformers)."
        )
    return found


def config_of(model_class: Any, model_config: Mapping[str, Any]) -> Any:
    """Return the config object of a class of transformers."""
    return model_class.config_class.from_dict(dict(model_config))


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return a ``config.json``."""
    return (json.dumps(content, indent=2) + "\n").encode()
