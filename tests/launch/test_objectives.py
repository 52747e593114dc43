"""Objectives beside each other: flow matching on data of any rank, next-token prediction, and the
loop's promise that neither depends on the microbatches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr.errors import ConfigError
from launch.trainer.data.base import Batch, Sample, stack, to_device
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.objectives import Objective
from launch.trainer.objectives.causal_lm import IGNORED, LABELS, NextToken, Predicted
from launch.trainer.objectives.flow import FlowMatching, euler_sigmas, make_flow_batch
from launch.trainer.objectives.sigma import Resolution, SigmaDistribution
from tests.support.extras import needs_families

SHAPES = [(4, 6, 6), (4, 3, 8), (4, 5, 5)]


def images(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def half(model: nn.Module, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
    """A call that predicts half of its input, for stacked data and for lists."""
    return noisy / 2 if isinstance(noisy, Tensor) else [one / 2 for one in noisy]


FLOW = FlowMatching(predict=half)


def flow_loss(latents: Any, numbers: Sequence[int]) -> Tensor:
    return FLOW.loss(nn.Identity(), {"latents": latents}, numbers, 5)


@pytest.mark.parametrize("shape", [(7,), (4, 6, 6), (2, 3, 4, 4)])
def test_flow_matching_takes_data_of_any_rank(shape: tuple[int, ...]) -> None:
    latents = torch.stack(images([shape] * 4))
    whole = flow_loss(latents, range(4))
    halves = [flow_loss(latents[i : i + 2], range(i, i + 2)) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_a_list_of_equal_samples_is_the_stacked_batch() -> None:
    same = images([(4, 6, 6)] * 3)
    stacked, listed = (
        make_flow_batch(data, range(3), 5, FLOW.draw_sigma) for data in (torch.stack(same), same)
    )
    assert isinstance(stacked.noisy, Tensor) and isinstance(listed.noisy, list)
    assert torch.equal(stacked.noisy, torch.stack(listed.noisy))
    assert torch.equal(stacked.timestep, listed.timestep)
    torch.testing.assert_close(flow_loss(torch.stack(same), range(3)), flow_loss(same, range(3)))


def test_samples_of_different_shapes_count_alike_in_any_microbatch() -> None:
    mixed = images(SHAPES)
    each = [flow_loss([one], [number]) for number, one in enumerate(mixed)]
    torch.testing.assert_close(flow_loss(mixed, range(3)), torch.stack(each).mean())
    assert FLOW.generate(nn.Identity(), {"latents": mixed}, 0, 2) is None


def test_generated_images_have_the_shape_of_the_latents_and_depend_on_the_seed_alone() -> None:
    latents = torch.stack(images([(4, 6, 6)] * 2))
    first, again, other = (
        FLOW.generate(nn.Identity(), {"latents": latents}, seed, 3) for seed in (0, 0, 1)
    )
    assert first is not None and again is not None and other is not None
    assert first.shape == latents.shape
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_sigmas_are_those_of_diffusers_scheduler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - index / 20 for index in range(20)])
    assert euler_sigmas(20, shift) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


def drawn(distribution: SigmaDistribution, shape: tuple[int, ...] = (1, 4, 4)) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return [distribution.draw_sigma(generator, shape) for _ in range(4000)]


@pytest.mark.parametrize("timesteps", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_range_keeps_the_distribution_inside_it(timesteps: str, shift: float) -> None:
    low, high = 0.6, 0.9
    whole = drawn(SigmaDistribution(timesteps=timesteps, shift=shift, std=1.5))
    inside = sorted(s for s in whole if low <= s <= high)
    kept = sorted(
        drawn(SigmaDistribution(timesteps=timesteps, shift=shift, std=1.5, low=low, high=high))
    )
    assert low <= kept[0] and kept[-1] <= high
    # The quantiles of what is left when the rest is thrown away, up to sampling error.
    for share in (0.1, 0.5, 0.9):
        a, b = (values[int(share * len(values))] for values in (inside, kept))
        assert a == pytest.approx(b, abs=0.015)


def test_a_shift_is_a_change_of_the_mean_of_the_logit() -> None:
    bent = drawn(SigmaDistribution(shift=3.0))
    moved = drawn(SigmaDistribution(mean=math.log(3.0)))
    assert bent == pytest.approx(moved, rel=1e-5)


def test_a_shift_by_resolution_is_the_line_through_the_models_two_points() -> None:
    grows = Resolution(
        tokens_of=lambda shape: shape[1] * shape[2], tokens=(256, 4096), mu=(0.5, 1.15)
    )
    assert grows.shift((1, 16, 16)) == pytest.approx(math.exp(0.5))
    assert grows.shift((1, 64, 64)) == pytest.approx(math.exp(1.15))
    small, large = (
        sum(drawn(SigmaDistribution(shift="resolution", resolution=grows), shape)) / 4000
        for shape in ((1, 16, 16), (1, 64, 64))
    )
    assert small < large


def test_settings_of_an_objective_that_cannot_be_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"objective\.low=0\.9: must be below objective\.high=0\.5"
    ):
        SigmaDistribution(low=0.9, high=0.5)
    with pytest.raises(ConfigError, match=r"objective\.shift='resolution'"):
        SigmaDistribution(shift="resolution")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


class Llama:
    """How a family of language models calls its model and pads its samples."""

    def __init__(self) -> None:
        self.objective: Objective = NextToken(predict=self.predict)

    def predict(self, model: nn.Module, batch: Batch) -> Predicted:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return Predicted(logits=output.logits)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        longest = max(len(one["input_ids"]) for one in samples)
        padded = []
        for one in samples:
            ids, pad = one["input_ids"], (0, longest - len(one["input_ids"]))
            padded.append(
                {
                    "input_ids": nn.functional.pad(ids, pad),
                    "attention_mask": nn.functional.pad(torch.ones_like(ids), pad),
                    LABELS: nn.functional.pad(ids, pad, value=IGNORED),
                }
            )
        return stack(padded)


def texts(lengths: Sequence[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (n,), generator=generator)} for n in lengths]


def test_next_token_loss_is_the_models_own_loss(llama: nn.Module) -> None:
    family = Llama()
    batch = family.collate(texts([7, 7, 7]))
    own = llama(**batch).loss
    torch.testing.assert_close(family.objective.loss(llama, batch, range(3), 0), own)
    assert family.objective.generate(llama, batch, 0, 1) is None


def test_next_token_loss_of_ragged_texts_is_the_mean_of_the_models_losses(
    llama: nn.Module,
) -> None:
    family = Llama()
    samples = texts([3, 9, 5])
    each = [llama(**family.collate([one])).loss for one in samples]
    found = family.objective.loss(llama, family.collate(samples), range(3), 0)
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_a_text_without_targets_costs_nothing(llama: nn.Module) -> None:
    family = Llama()
    batch = dict(family.collate(texts([4])))
    batch[LABELS] = torch.full_like(batch[LABELS], IGNORED)
    assert family.objective.loss(llama, batch, [0], 0).item() == 0.0


def test_boxes_and_images_of_each_sample_reach_the_device_as_lists() -> None:
    batch = {"images": images(SHAPES), "targets": [{"boxes": torch.zeros(n, 4)} for n in (1, 0, 3)]}
    moved = to_device(batch, torch.device("meta"))
    assert [one.device.type for one in moved["images"]] == ["meta"] * 3
    assert [tuple(one["boxes"].shape) for one in moved["targets"]] == [(1, 4), (0, 4), (3, 4)]
    assert all(one["boxes"].is_meta for one in moved["targets"])


@needs_families
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_makes_its_objective_from_settings_of_its_class(model_type: str) -> None:
    family = get_family(model_type)
    objective = family.objective({}, Path("no such folder"))
    assert isinstance(objective, family.objective_class)
    assert callable(objective.loss) and callable(objective.generate)
