"""What the denoisers of diffusers share: folders, collation, LoRA targets, checks.

A family's own file says how its network is called, how a sample is encoded, and how its pipeline
takes cached prompts. Everything else has a default here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample, pad, stack
from launch.trainer.families.checks import Layout, check_shape, misfit, spelled
from launch.trainer.objectives import Objective
from launch.trainer.objectives.flow import FlowMatching

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of an attention by the names of diffusers' modules; ``to_out.1`` is a dropout."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the pixels of a sample come from."""

    size: tuple[int, int]
    """Height and width of the file."""
    corner: tuple[int, int]
    """Top and left of the crop in the scaled picture."""
    fps: float | None = None
    """Frames per second; None: an image, or a clip that does not say."""
    sound: Tensor | None = None
    """(channels, N) in [-1, 1]; None: a silent clip."""
    rate: int | None = None
    """Of ``sound``: numbers per second."""


class Diffusion(ABC):
    """A denoiser of diffusers, trained on cached latents and prompts. Satisfies ``Family``."""

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    """Of the network, in diffusers."""
    pipeline_class: ClassVar[str]
    """Of the pipeline that samples with it, in diffusers."""
    subfolder: ClassVar[str] = "transformer"
    """Of a pipeline folder: where the network lies."""
    flat_units: ClassVar[tuple[str, ...]] = ()
    weights_format: ClassVar[str] = "diffusers"
    objective_class: ClassVar[type] = FlowMatching
    defaults: ClassVar[Mapping[str, Any]] = {}
    """The family's own values for settings of ``objective_class``."""
    prompt_fields: ClassVar[tuple[str, ...]] = (PROMPT_EMBEDS,)
    """Fields of a sample that hold its prompt: those of the empty prompt replace them together."""
    ragged: ClassVar[bool] = False
    """Whether prompts of several lengths share a batch: padded, with a mask."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """By which the pipeline takes the scale of classifier-free guidance."""
    patch: ClassVar[int] = 1
    """Latent pixels of a token, each way: height and width must be multiples of it."""

    # Building

    @property
    def model_class(self) -> Any:
        """The network's class, imported on first use: diffusers takes seconds to load.

        Raises:
            ModelSourceError: The installed diffusers is older than the class.
        """
        return from_diffusers(self.class_name, self.model_type)

    def model_folder(self, path: Path) -> Path:
        """Return the network's folder; see ``Family.model_folder``."""
        inner = path / self.subfolder
        return inner if not (path / "config.json").is_file() and inner.is_dir() else path

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another class; see ``Family.check_config``."""
        found = model_config.get("_class_name", self.class_name)
        if found != self.class_name:
            raise ModelSourceError(
                f"model_path holds a {found}, but model_type={self.model_type!r} needs a"
                f" {self.class_name}."
            )

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network; see ``Family.build``."""
        model: nn.Module = self.model_class.from_config(model_config)
        return model

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Turn on the network's own checkpointing; see ``Family.checkpoint_blocks``."""
        model.enable_gradient_checkpointing()  # type: ignore[operator]

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Return the projections of all attentions; see ``Family.lora_targets``."""
        return ATTENTION

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return none: every parameter gets a gradient; see ``Family.without_gradient``."""
        return ()

    def without_decay(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return none: every element gets a gradient; see ``Family.without_decay``."""
        return ()

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective from the family's own defaults and what the config gives."""
        made: Objective = self.objective_class(
            predict=self.predict, **{**self.defaults, **settings}
        )
        return made

    # Training

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network, however wrapped, and return what the objective asks for.

        Args:
            model: The network, or its DDP, FSDP or DeepSpeed wrapper.
            noisy: The shape of the stacked latents, (B, C, H, W) or (B, C, F, H, W), on the
                network's device.
            timestep: (B,) in [0, 1000]: 1000 x the share of noise for flow matching, whose target
                is the velocity ``noise - latents``; the scheduler's integer for noise prediction.
            batch: What ``collate`` returned.

        Returns:
            The prediction in the shape of ``noisy``.
        """

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples; pad their prompts where the family takes a mask.

        With ``ragged``, prompts shorter than the longest get zeros behind them and ``prompt_mask``
        is (B, L), True at tokens. It is None where all are of one length: kernels without a mask
        are faster, and the numbers are the same.
        """
        if not self.ragged:
            return stack(samples)
        rest = [_without(one, PROMPT_EMBEDS) for one in samples]
        prompts, mask = pad([one[PROMPT_EMBEDS] for one in samples])
        return {**stack(rest), PROMPT_EMBEDS: prompts, PROMPT_MASK: mask}

    @abstractmethod
    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Tokens that the blocks see for one sample; see ``Family.tokens``."""

    @abstractmethod
    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field that a sample must hold."""

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse fields that are missing, or have other axes or sizes; see ``Family``."""
        step = "encode it with the model's own VAE and text encoders"
        layout = self.layout(model_config)
        for name, axes in layout.items():
            check_shape(sample, name, axes, label, step)
        shape = tuple(sample[LATENTS].shape)
        if any(size % self.patch for size in shape[-2:]):
            needed = f"{spelled(layout[LATENTS])} with H, W multiples of {self.patch}"
            raise misfit(label, LATENTS, shape, needed, "crop the pictures")

    # Encoding and sampling with the pipeline

    @abstractmethod
    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Encode one image or clip as a cached sample holds it.

        Args:
            pipeline: The family's pipeline, of which only the VAE is used.
            pixels: (3, F, H, W) in [-1, 1]; images have one frame.

        Returns:
            ``latents``, normalised as the network expects and not noised, and what else comes from
            the pixels; float32.
        """

    def encode_source(self, pipeline: Any, pixels: Tensor, origin: Origin) -> Mapping[str, Tensor]:
        """Encode one image or clip, and what of its origin the network is told.

        Args:
            pipeline: As ``encode_pixels`` takes it.
            pixels: As ``encode_pixels`` takes them.
            origin: Of the pixels.
        """
        return self.encode_pixels(pipeline, pixels)

    @abstractmethod
    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Encode one caption by the pipeline's own ``encode_prompt``.

        Returns:
            The fields of ``prompt_fields``, without a batch dimension.
        """

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """Arguments by which the pipeline takes encoded prompts.

        Those of the negative prompt have the same names behind ``negative_``.
        """
        return {"prompt_embeds": batch[PROMPT_EMBEDS]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """Arguments by which the pipeline samples for the prompts of a batch.

        Args:
            batch: What ``collate`` returned, on the network's device.
            guidance: 1 samples without a negative prompt. More needs the fields of the empty prompt
                in ``batch["negative"]``, collated like the others.
        """
        inputs = {**self.pipeline_prompt(batch), self.guidance_argument: guidance}
        if guidance > 1:
            negative = self.pipeline_prompt(batch["negative"])
            inputs |= {f"negative_{name}": value for name, value in negative.items()}
        return inputs

    def pipeline_name(self, model_config: Mapping[str, Any]) -> str:
        """Return the class of the pipeline that samples with a checkpoint, in diffusers.

        Args:
            model_config: Content of its ``config.json``: variants may have pipelines of their own.
        """
        return self.pipeline_class

    @contextmanager
    def pipeline_with(self, pipeline: Any, batch: Batch) -> Iterator[None]:
        """Have the pipeline take from a batch what it has no argument for, while inside.

        Args:
            pipeline: Is called inside, with ``pipeline_inputs`` of the same batch. It is left as
                it was.
            batch: What ``collate`` returned, on the network's device.
        """
        yield

    def pixel_size(self, pipeline: Any, latents: Tensor) -> dict[str, int]:
        """Height and width, for clips also the frames, as the pipeline takes them.

        Args:
            pipeline: The family's pipeline.
            latents: Of one sample, (C, H, W) or (C, F, H, W).
        """
        scale = pipeline.vae_scale_factor
        return {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale}


def from_diffusers(name: str, model_type: str) -> Any:
    """Return a class of diffusers.

    Raises:
        ModelSourceError: The installed release has none of this name.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise ModelSourceError(
            f"diffusers {diffusers.__version__} has no {name}, which model_type={model_type!r}"
            " needs: install a newer release (pip install -U diffusers)."
        )
    return found


def tokens_of(sample: Sample, patch: int) -> int:
    """Patches of an image's latents (C, H, W), each ``patch`` high and wide."""
    height, width = sample[LATENTS].shape[-2:]
    return int(height // patch) * int(width // patch)


def _without(sample: Sample, name: str) -> Sample:
    return {key: value for key, value in sample.items() if key != name}
