"""Families changed on purpose: ``oracle`` must tell each from its pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch
from launch.trainer.families.diffusion import Diffusion
from tests.support.oracle_case import Case, Tree


def mutant(family: Diffusion, method: str, change: Callable[..., Any]) -> Diffusion:
    """A copy whose ``method`` is ``change(original, *args)``."""
    changed, original = copy.copy(family), getattr(family, method)
    setattr(changed, method, lambda *args: change(original, *args))
    return changed


def _negated(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    return tree_map(lambda found: -found, original(model, noisy, timestep, batch))


def _unscaled(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    return original(model, noisy, timestep / 1000, batch)


def _reversed(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    return original(model, noisy, 1000 - timestep, batch)


def _transposed(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    turned = tree_map(lambda n: n.transpose(-1, -2), noisy)
    found = original(model, turned, timestep, batch)
    return tree_map(lambda o: o.transpose(-1, -2), found)


def _without_prompt(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    empty = torch.zeros_like(batch[PROMPT_EMBEDS])
    return original(model, noisy, timestep, {**batch, PROMPT_EMBEDS: empty})


def _swapped(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    told = {k: v.flip(0) for k, v in batch.items() if k != LATENTS and isinstance(v, Tensor)}
    return original(model, noisy, timestep, {**batch, **told})


def _unmasked(original: Any, model: Any, noisy: Tree, timestep: Tensor, batch: Batch) -> Tree:
    return original(model, noisy, timestep, {**batch, PROMPT_MASK: None})


def _unnormalised(original: Any, pipeline: Any, pixels: Tensor) -> Mapping[str, Any]:
    encoded = original(pipeline, pixels)
    return {**encoded, LATENTS: tree_map(lambda x: 1.5 * x + 0.3, encoded[LATENTS])}


def _mirrored(original: Any, pipeline: Any, pixels: Tensor) -> Mapping[str, Any]:
    encoded = original(pipeline, pixels)
    return {**encoded, LATENTS: tree_map(lambda x: x.flip(-1), encoded[LATENTS])}


def _other_channels(original: Any, pipeline: Any, pixels: Tensor) -> Mapping[str, Any]:
    encoded = original(pipeline, pixels)
    return {**encoded, LATENTS: tree_map(lambda x: x.flip(0), encoded[LATENTS])}


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the prediction has the other sign": ("predict", _negated),
    "the timestep is the share of noise": ("predict", _unscaled),
    "time runs backwards": ("predict", _reversed),
    "rows and columns are exchanged": ("predict", _transposed),
    "the prompt is not passed": ("predict", _without_prompt),
    "conditions belong to the other sample": ("predict", _swapped),
    "latents are not normalised": ("encode_pixels", _unnormalised),
    "latents are mirrored": ("encode_pixels", _mirrored),
    "channels are in another order": ("encode_pixels", _other_channels),
}
"""For every family; what -> (method, change)."""
MASK_MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the mask is dropped": ("predict", _unmasked),
}
"""For families with a mask."""


def mutants_of(case: Case) -> dict[str, tuple[str, Callable[..., Any]]]:
    """The mutants that every family of this kind must be told from."""
    return {**MUTANTS, **(MASK_MUTANTS if case.family.ragged else {})}
