"""Chroma 1 (diffusers ``ChromaTransformer2DModel``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.checks import Layout
from launch.trainer.families.diffusion import Diffusion, tokens_of
from launch.trainer.families.latents import (
    encode_image,
    from_patches,
    shifted_and_scaled,
    to_patches,
)
from launch.trainer.families.prompts import with_mask
from launch.trainer.objectives.sigma import TIMESTEPS


class Chroma(Diffusion):
    """2 x 2 patches; a prompt is its tokens and one row of padding, which the network reads."""

    model_type = "chroma_1"
    class_name = "ChromaTransformer2DModel"
    pipeline_class = "ChromaPipeline"
    # Most trainers draw the plain sigmoid of a normal. In sampling exp(1.15), the authors' own and
    # that of Flux 1's scheduler at 1024 pixels.
    defaults = {"shift": 1.0, "sample_shift": 3.2}
    ragged = True
    patch = 2

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network; see ``Family.build``."""
        with warnings.catch_warnings():
            # Diffusers warns of its own import, and nobody who trains can change it.
            warnings.filterwarnings("ignore", message="`FluxPosEmbed`", category=FutureWarning)
            return super().build(model_config)

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Checkpoint with the mask; see ``_WithMask``."""
        model.enable_gradient_checkpointing(_WithMask())  # type: ignore[operator]

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        height, width = noisy.shape[-2:]
        prompt, mask = batch[PROMPT_EMBEDS], batch[PROMPT_MASK]
        if mask is not None:
            # Bool: a float mask would be added to the scores, and mask nothing.
            pixels = mask.new_ones(len(mask), height * width // 4)
            mask = torch.cat([mask.bool(), pixels.bool()], dim=1)
        axes = [torch.arange(size, device=noisy.device) for size in (1, height // 2, width // 2)]
        output: tuple[Tensor, ...] = model(
            hidden_states=to_patches(noisy),
            # In [0, 1]: the network multiplies by 1000 itself.
            timestep=timestep / TIMESTEPS,
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=noisy.device),
            img_ids=torch.cartesian_prod(*axes).float(),
            attention_mask=mask,
            return_dict=False,
        )
        return from_patches(output[0], height, width)

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches and the prompt; see ``Family.tokens``."""
        return tokens_of(sample, self.patch) + len(sample[PROMPT_EMBEDS])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"] // 4, "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["joint_attention_dim"]),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        return {LATENTS: shifted_and_scaled(pipeline.vae, encode_image(pipeline.vae, pixels))}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows that the pipeline's mask keeps: the prompt's, and one of padding."""
        prompt, _, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return {PROMPT_EMBEDS: prompt[0][mask[0].bool()]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``."""
        prompt, mask = with_mask(batch)
        return {"prompt_embeds": prompt, "prompt_attention_mask": mask}


class _WithMask:
    """Checkpoints Chroma's blocks, and gives the single ones the mask.

    The network's forward passes its mask to the double blocks as their fifth argument. To single
    blocks it passes three where a fourth is the mask, when it checkpoints and only then: without
    this class padding would be read.
    """

    def __init__(self) -> None:
        # Of the pass that is under way: the double blocks of a pass run before its single ones.
        self._mask: Tensor | None = None

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        if len(args) == 5:
            self._mask = args[4]
        elif len(args) == 3:
            args = (*args, self._mask)
        # The module and not its forward: hooks of sharders and of streaming must run again in the
        # recomputation.
        return checkpoint(block, *args, use_reentrant=False)
