"""What the trainer needs to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from launch.trainer.data.base import Batch, Sample
from launch.trainer.objectives import Objective


class Family(Protocol):
    """One model architecture: how it is built and called, and what data fits it.

    To add a family, write one file with a class like this and one line in ``families/__init__.py``.
    Denoisers of diffusers begin with ``families.diffusion.Diffusion``. A family holds no state:
    what depends on a checkpoint takes the content of its ``config.json``.
    """

    @property
    def model_type(self) -> str:
        """The value of ``model_type`` in the config."""
        ...

    @property
    def flat_units(self) -> tuple[str, ...]:
        """Submodules whose forward iterates ``self.parameters()``, to find a dtype for example.

        With flat FSDP1 that iterator is empty unless the submodule is a unit of its own, so each
        of these is wrapped separately.
        """
        ...

    @property
    def weights_format(self) -> str:
        """Of a full finetune's result: a key of ``dist_layerlr.export.FORMATS``."""
        ...

    @property
    def objective_class(self) -> type:
        """A dataclass; its settings are the fields of the config's ``objective`` block."""
        ...

    def model_folder(self, path: Path) -> Path:
        """Return the folder of the weights, where ``model_path`` is that of a whole pipeline."""
        ...

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another class, or a variant that needs other inputs.

        Raises:
            ModelSourceError: names the key of ``config.json`` and what is trained instead.
        """
        ...

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the model that a checkpoint's ``config.json`` describes, its weights unset.

        The caller sees to it that parameters are created on the meta device.
        """
        ...

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Have the blocks' activations recomputed in backward, output and gradients unchanged.

        Names of parameters must stay as they are.

        Args:
            model: What ``build`` returned, its parameters on the meta device.
        """
        ...

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Modules that LoRA adapts unless the config says otherwise.

        Endings of their names, or one regular expression that matches whole names.
        """
        ...

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of parameters that the objective gives no gradient.

        They are frozen: DDP would wait for them, and weight decay would shrink them.
        """
        ...

    def without_decay(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of parameters that weight decay must not touch, whatever the plan says.

        Some of their elements get a gradient of zero always, so that decay alone would move them,
        or the model's own library spares them.
        """
        ...

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make what the model is trained for.

        Args:
            settings: What the config's ``objective`` block gives, checked; the family knows the
                rest.
            model_folder: Of the weights; a scheduler's config may lie beside it.
        """
        ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch of samples: ``data.base.stack`` where all have the same shapes.

        A family whose samples differ in shape pads them, packs them, or returns lists.
        """
        ...

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Tokens that the blocks see for one sample."""
        ...

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse a data sample that the model cannot take.

        Args:
            model_config: Content of the checkpoint's ``config.json``.
            sample: One item of the dataset; its tensors may be on the meta device.
            label: File or sample name for the message.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        ...


@runtime_checkable
class SeveralNetworks(Protocol):
    """What a family has as well whose pipelines hold more than one network to train."""

    def networks(self, model_folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Path]:
        """Return the networks that a run trains: component of the pipeline -> its folder.

        Args:
            model_folder: What ``model_folder`` returned, or a folder that this returned.
            settings: What the config's ``objective`` block gives, checked.

        Raises:
            ModelSourceError: A network that the settings ask for is not there.
        """
        ...

    def settings_of(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings under which one of several networks trains."""
        ...


@runtime_checkable
class HasVariants(Protocol):
    """What a family has as well that is another one under some settings of its objective."""

    def variant(self, settings: Mapping[str, Any]) -> Family:
        """Return the family that trains under what the ``objective`` block gives, checked."""
        ...


@runtime_checkable
class HasFreshWeights(Protocol):
    """What a family has as well that may train weights which its checkpoint does not have."""

    def fresh_weights(self, model_config: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the weights that begin anew: a head for another number of classes.

        Args:
            model_config: Content of the checkpoint's ``config.json``.

        Returns:
            Name -> value of each element where it is a vector; matrices are drawn.
        """
        ...


@runtime_checkable
class FitsData(Protocol):
    """What a family has as well that must see the whole data set, and not only a sample."""

    def fit_data(self, model_config: Mapping[str, Any], data: Any) -> None:
        """Tell the data set what the model takes, and refuse one that does not fit.

        Raises:
            ConfigError: field of the config, its value and what is needed.
        """
        ...


@runtime_checkable
class HasExample(Protocol):
    """What a family has as well whose samples are not float tensors of a ``layout``."""

    def example(self, model_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Sample:
        """Return one sample on the meta device, its lettered axes of these sizes."""
        ...


@runtime_checkable
class HasFiles(Protocol):
    """What a family has as well whose result needs other files beside weights and config."""

    def write_beside(self, model_config: Mapping[str, Any], folder: Path, result: Path) -> None:
        """Write what a result needs beside its weights and the copied ``config.json``.

        Args:
            model_config: Of the live model.
            folder: Of the model that was trained.
            result: Holds the weights already; no reader sees it yet.

        Raises:
            OSError: no room, no rights.
        """
        ...


def live_config(model: Any) -> Mapping[str, Any]:
    """Return a live model's config as a mapping: transformers has a class of its own for it."""
    config = model.config
    found: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return found


def network_folders(
    family: Family, model_folder: Path, settings: Mapping[str, Any]
) -> Mapping[str, Path]:
    """Return the networks of a run by name: one of no name, unless the family has several."""
    if isinstance(family, SeveralNetworks):
        return family.networks(model_folder, settings)
    return {"": model_folder}
