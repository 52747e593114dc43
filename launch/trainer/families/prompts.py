"""Cached prompts as pipelines take them."""

from __future__ import annotations

from torch import Tensor

from launch.trainer.data.base import PROMPT_EMBEDS, PROMPT_MASK, Batch


def with_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the prompts and their mask, for pipelines that do without neither.

    A batch whose prompts are all of one length has none; here it is all True.
    """
    prompts, mask = batch[PROMPT_EMBEDS], batch[PROMPT_MASK]
    return prompts, prompts.new_ones(prompts.shape[:2]).bool() if mask is None else mask
