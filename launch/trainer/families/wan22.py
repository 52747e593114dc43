"""Wan 2.2: the two experts of A14B, text-to-video and image-to-video, and the 5B model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import read_json
from dist_layerlr.sharders import unwrap
from launch.trainer.data.base import Batch
from launch.trainer.families.checks import refuse_key
from launch.trainer.families.wan import Wan, channels_of, check_channels
from launch.trainer.objectives import Objective
from launch.trainer.objectives.experts import BOTH, HIGH, LOW, ExpertFlow
from launch.trainer.objectives.first_frame import FIRST_FRAME, token_times

EXPERTS = {HIGH: "transformer", LOW: "transformer_2"}
"""Expert -> component of the pipeline: its ``transformer`` is asked at or above the boundary."""
_SHIFTS = {"text": 12.0, "image": 5.0, "dense": 5.0}
"""What the authors sample with; trainers draw with 3 to 12."""


class Wan22(Wan):
    """Wan 2.2, one network at a time or both experts in turn; see ``ExpertFlow``."""

    model_type = "wan22"
    objective_class = ExpertFlow

    def check_version(self, model_config: Mapping[str, Any]) -> None:
        """Refuse Wan 2.1's image-to-video, and channels that no Wan has."""
        clip = "Wan 2.1's image-to-video, which takes image embeddings; set model_type='wan'"
        refuse_key(model_config, "image_dim", None, clip)
        check_channels(model_config)

    def networks(self, model_folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Path]:
        """Return the experts' folders; see ``SeveralNetworks.networks``."""
        expert = _expert(model_folder, settings)
        wanted = EXPERTS if expert == BOTH else {expert: EXPERTS.get(expert or "")}
        # A folder with a name of its own holds the one network that it holds.
        if expert is None or (expert != BOTH and model_folder.name not in EXPERTS.values()):
            return {model_folder.name: model_folder}
        found = {str(name): model_folder.with_name(str(name)) for name in wanted.values()}
        for name, folder in found.items():
            if not (folder / "config.json").is_file():
                raise ModelSourceError(
                    f"objective.expert={expert!r} needs {name}/ beside {str(model_folder)!r}, and"
                    " no config.json is there. Give model_path the whole pipeline folder, or"
                    " train the expert that is there: objective.expert='high' or 'low'."
                )
        return found

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network, with a time per token where a first frame is given."""
        if FIRST_FRAME in batch:
            timestep = _token_times(model, noisy, timestep, batch[FIRST_FRAME])
        return super().predict(model, noisy, timestep, batch)

    def settings_of(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of one expert; see ``SeveralNetworks.settings_of``."""
        experts = {component: expert for expert, component in EXPERTS.items()}
        return {**settings, "expert": experts[name]}

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective of one network: its shift, and its range of noise shares.

        Raises:
            ConfigError: an expert without a boundary, or a range that lies outside the expert's.
        """
        variant = _variant(model_folder)
        if settings.get("first_frame", 0.0) > 0 and variant != "dense":
            raise fields.invalid(
                "objective.first_frame",
                settings["first_frame"],
                "0 for a model that is told one time per clip; the 5B model is told one per token",
            )
        expert, boundary = _expert(model_folder, settings), _boundary(model_folder, settings)
        shift = _SHIFTS[variant]
        given = {"shift": shift, "sample_shift": shift, **settings}
        if expert is not None:
            if boundary is None:
                raise ConfigError(
                    f"objective.expert={expert!r} needs the noise share where the experts meet,"
                    f" and above {str(model_folder)!r} no model_index.json gives a boundary_ratio."
                    " Set objective.boundary: 0.875 for A14B text-to-video, 0.9 for image-to-video."
                )
            low, high = (boundary, 1.0) if expert == HIGH else (0.0, boundary)
            given["low"] = max(low, settings.get("low", 0.0))
            given["high"] = min(high, settings.get("high", 1.0))
            if given["low"] >= given["high"]:
                named = {key: settings[key] for key in ("low", "high") if key in settings}
                allowed = f"a range that meets [{low}, {high}], that of the expert {expert!r}"
                raise fields.invalid("objective", named, allowed)
        return super().objective({**given, "expert": expert, "boundary": boundary}, model_folder)


def _token_times(model: nn.Module, noisy: Tensor, timestep: Tensor, given: Tensor) -> Tensor:
    network: Any = unwrap(model)
    frames, height, width = (
        size // step for size, step in zip(noisy.shape[2:], network.config.patch_size, strict=True)
    )
    return token_times(timestep, given, frames, height * width)


def _expert(model_folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The expert that the settings ask for, or that the folder is; None: no experts."""
    asked = settings.get("expert")
    if asked is not None:
        return str(asked)
    if model_folder.name == EXPERTS[LOW]:
        return LOW
    beside = model_folder.with_name(EXPERTS[LOW]) / "config.json"
    return BOTH if model_folder.name == EXPERTS[HIGH] and beside.is_file() else None


def _boundary(model_folder: Path, settings: Mapping[str, Any]) -> float | None:
    found = settings.get("boundary", _index(model_folder).get("boundary_ratio"))
    return None if found is None else float(found)


def _variant(model_folder: Path) -> str:
    """Whether the network is A14B for text, A14B for images, or the 5B model."""
    if _index(model_folder).get("expand_timesteps"):
        return "dense"
    config = model_folder / "config.json"
    content = read_json(config) if config.is_file() else {}
    return "image" if channels_of(content).extra else "text"


def _index(model_folder: Path) -> Mapping[str, Any]:
    """``model_index.json`` of the pipeline that the folder lies in; empty where there is none."""
    path = model_folder.parent / "model_index.json"
    return read_json(path) if path.is_file() else {}
