"""Proof that a family of ``launch/trainer/families`` says what its real pipeline says.

``Case`` describes one family on its tiny parts; the checks take it:

- ``check_oracle``: the network is replaced by one that knows the clean latents; the real pipeline
  with its shipped scheduler must then return the VAE's own picture.
- ``check_call``: on the same inputs, the training call gives what the pipeline's call gave.
- ``check_guidance``: the pipeline asks the network for the prompt and for the negative prompt.
- ``check_ragged``: a short prompt in a padded batch gives what it gives alone; padding is unread.
- ``check_train``: a backward pass; exactly the names of ``without_gradient`` get no gradient.
- ``check_names``: the tiny network has the kinds of names of the full-size one.
- ``check_text``: cached prompts give what the pipeline gives for the captions themselves.
- ``check_mutant``: oracle, call or ragged fails for a family that was changed on purpose.

Latents may be tensors or trees of them (video and audio): everything below maps over trees.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.diffusion import Diffusion
from tests.support.forked import in_fork
from tests.support.mutants import MASK_MUTANTS as MASK_MUTANTS
from tests.support.mutants import MUTANTS as MUTANTS
from tests.support.mutants import mutant as mutant
from tests.support.mutants import mutants_of as mutants_of
from tests.support.oracle_case import (
    Call,
    Case,
    Sampler,
    Tree,
    apart,
    per_sample,
    shares,
    wanted,
)

LENGTHS = (3, 5)
STEPS = 6
"""Of the oracle's walk: enough for solvers that look back."""
CLOSE = 1e-5


# What goes in


def lengths_of(case: Case) -> tuple[int, int]:
    return case.lengths or LENGTHS


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_pipeline(case: Case, sampler: Sampler | None = None, **text: Any) -> Any:
    """The real pipeline on tiny parts; text encoders and tokenizers are None unless given."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    cls = getattr(diffusers, case.family.pipeline_class)
    asked = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {
        name: None for name, p in asked.items() if p.default is p.empty and name != "self"
    }
    parts |= {n: False for n in ("requires_safety_checker", "add_watermarker") if n in asked}
    parts |= case.parts() | text
    if sampler is not None and sampler.make is not None:
        parts["scheduler"] = sampler.make()
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    for name in (*case.components, "vae"):
        getattr(pipeline, name).eval()
    case.mend(pipeline)
    return pipeline


def make_pixels(case: Case) -> Tensor:
    """(2, 3, F, H, W) in [-1, 1], smooth."""
    small = noise(4, 2, 3, case.pixels[0], 4, 4)
    return nn.functional.interpolate(small, case.pixels, mode="trilinear").clamp(-1, 1)


def config_of(case: Case, pipeline: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(pipeline, case.components[0]).config
    return config


def make_prompt(case: Case, config: Mapping[str, Any], seed: int, length: int) -> Sample:
    """Random prompt fields with the axes that the family asks for."""
    layout = case.family.layout(config)
    drawn = {}
    for number, name in enumerate(case.family.prompt_fields):
        shape = [axis if isinstance(axis, int) else length for axis in layout[name]]
        drawn[name] = noise(100 * seed + number, *shape)
    return drawn


@torch.no_grad()
def make_samples(case: Case, family: Diffusion, pipeline: Any) -> list[Sample]:
    """Two samples: pixels encoded by the family, random prompts of different lengths."""
    config, pixels = config_of(case, pipeline), make_pixels(case)
    samples = []
    for number, length in enumerate(lengths_of(case)):
        encoded = family.encode_pixels(pipeline, pixels[number])
        samples.append({**encoded, **make_prompt(case, config, 1 + number, length)})
    return samples


def with_negative(case: Case, samples: Sequence[Sample], pipeline: Any) -> Batch:
    """The batch with the fields of an empty prompt, collated as the samples' own."""
    empty = make_prompt(case, config_of(case, pipeline), 9, 4)
    negative = case.family.collate([{**sample, **empty} for sample in samples])
    kept = {k: negative[k] for k in (*case.family.prompt_fields, PROMPT_MASK) if k in negative}
    return {**case.family.collate(samples), "negative": kept}


@torch.no_grad()
def run_pipeline(
    case: Case, family: Diffusion, pipeline: Any, batch: Batch, steps: int, guidance: float = 1.0
) -> Tensor:
    """Pictures (B, F, 3, H, W) in [0, 1]."""
    one = tree_map(lambda latents: latents[0], batch[LATENTS])
    options = {
        **family.pipeline_inputs(batch, guidance),
        **family.pixel_size(pipeline, one),
        **case.given(make_pixels(case)),
    }
    with family.pipeline_with(pipeline, batch):
        output = pipeline(
            **options,
            num_inference_steps=steps,
            output_type="pt",
            generator=torch.Generator().manual_seed(5),
        )
    images = torch.as_tensor(output.images if hasattr(output, "images") else output.frames)
    return images[:, None] if images.ndim == 4 else images


@torch.no_grad()
def own_picture(case: Case, vae: Any) -> Tensor:
    """What the VAE makes of its own mode: (B, F, 3, H, W) in [0, 1]."""
    pixels = make_pixels(case)
    coded = vae.encode(pixels if case.video_vae else pixels[:, :, 0])
    mode = coded.latent if hasattr(coded, "latent") else coded.latent_dist.mode()
    decoded = vae.decode(mode, return_dict=False)[0]
    decoded = decoded if decoded.ndim == 5 else decoded[:, :, None]
    return (decoded.transpose(1, 2) / 2 + 0.5).clamp(0, 1)


# Checks


def check_oracle(case: Case, family: Diffusion | None = None) -> None:
    """The pipeline walks back to the VAE's picture when every answer is true."""
    for sampler in case.samplers:
        _walk_back(case, family or case.family, sampler)


def _walk_back(case: Case, family: Diffusion, sampler: Sampler) -> None:
    pipeline = make_pipeline(case, sampler)
    samples = make_samples(case, family, pipeline)
    batch, clean = case.family.collate(samples), family.collate(samples)[LATENTS]
    implied: list[Tree] = []

    def knows(*args: Any, **kwargs: Any) -> Any:
        noisy, timestep = case.read(args, kwargs, clean)
        a, s = shares(case, pipeline, timestep)
        drawn = tree_map(lambda n, x: (n - per_sample(a, x) * x) / per_sample(s, x), noisy, clean)
        implied.append(drawn)
        answer = case.answer(wanted(case, pipeline, a, s, clean, drawn))
        return answer if case.whole_answer else (answer,)

    for name in case.components:
        getattr(pipeline, name).forward = knows
    found = run_pipeline(case, case.family, pipeline, batch, STEPS)
    label = type(pipeline.scheduler).__name__
    error = apart(found, own_picture(case, pipeline.vae))
    assert error < sampler.tolerance, f"{label}: the picture is off by {error:.2g}"
    # One noise explains all calls, else a wrong answer was made good by the decoder's clamp.
    drift = max(apart(one, implied[0]) for one in implied)
    assert drift < 10 * sampler.tolerance, f"{label}: left the path by {drift:.2g}"


def check_call(case: Case, family: Diffusion | None = None) -> None:
    """The training call is the pipeline's call."""
    family = family or case.family
    if _encodes_alike(case, family):
        pipeline, samples, call = _kept_call(case)
    else:
        pipeline, samples, call = _recorded_call(case, family)
    _assert_alike(case, family, pipeline, family.collate(samples), call)


def _recorded_call(case: Case, family: Diffusion) -> tuple[Any, list[Sample], Call]:
    """The pipeline, samples that ``family`` encoded, and the call that the pipeline makes."""
    pipeline = make_pipeline(case)
    samples = make_samples(case, family, pipeline)
    with recorded(case, pipeline) as calls:
        picture = run_pipeline(case, case.family, pipeline, case.family.collate(samples), 2)
    assert picture.isfinite().all()
    return pipeline, samples, calls[case.said_at]


@cache
def _kept_call(case: Case) -> tuple[Any, list[Sample], Call]:
    return _recorded_call(case, case.family)


def _encodes_alike(case: Case, family: Diffusion) -> bool:
    own, other = case.family.encode_pixels, family.encode_pixels
    return getattr(own, "__func__", own) is getattr(other, "__func__", other)


def check_guidance(case: Case, guidance: float = 3.0) -> None:
    """With guidance the network is asked for the prompt and for the negative prompt."""
    family, pipeline = case.family, make_pipeline(case)
    batch = with_negative(case, make_samples(case, family, pipeline), pipeline)
    with recorded(case, pipeline) as calls:
        run_pipeline(case, family, pipeline, batch, 2, guidance)
    asked = [part for call in calls[: len(calls) // 2] for part in _parts_of(case, call, batch)]
    for label, told in (("prompt", batch), ("negative prompt", {**batch, **batch["negative"]})):
        gaps = []
        for network, noisy, timestep, said in asked:
            with torch.no_grad():
                found = family.predict(getattr(pipeline, network), noisy, timestep, told)
            gaps.append(apart(found, said))
        assert min(gaps) < CLOSE, f"the pipeline never asks for the {label}: {gaps}"


def _parts_of(case: Case, call: Call, batch: Batch) -> Iterator[tuple[str, Tree, Tensor, Tree]]:
    """(network, noisy, timestep, what it said) for each batch of conditions in one call."""
    noisy, timestep = case.read(call.args, call.kwargs, batch[LATENTS])
    said = case.said(_place(case, call.output), batch[LATENTS])
    size = len(lengths_of(case))
    for start in range(0, len(tree_flatten(said)[0][0]), size):
        rows = slice(start, start + size)
        yield call.network, *(_rows(part, rows) for part in (noisy, timestep, said))


def _rows(tree: Tree, rows: slice) -> Tree:
    return tree_map(lambda tensor: tensor[rows], tree)


@torch.no_grad()
def check_ragged(case: Case, family: Diffusion | None = None) -> None:
    """Padding is neither read nor counted."""
    family = family or case.family
    if not family.ragged:
        return
    pipeline = make_pipeline(case)
    samples = make_samples(case, family, pipeline)
    network, timestep = getattr(pipeline, case.components[0]), torch.tensor([300.0, 800.0])
    batch = family.collate(samples)
    whole = family.predict(network, batch[LATENTS], timestep, batch)
    for row in range(len(lengths_of(case))):
        one = family.collate(samples[row : row + 1])
        alone = family.predict(network, one[LATENTS], timestep[row : row + 1], one)
        error = apart(_rows(whole, slice(row, row + 1)), alone)
        assert error < CLOSE, f"sample {row} differs from itself alone by {error:.2g}"
    pads = ~(torch.arange(max(lengths_of(case))) < torch.tensor(lengths_of(case))[:, None])
    junk = {**batch, PROMPT_EMBEDS: batch[PROMPT_EMBEDS].masked_fill(pads[..., None], 99.0)}
    leak = apart(whole, family.predict(network, batch[LATENTS], timestep, junk))
    assert leak == 0, f"junk in the padding changes the output by {leak:.2g}"


def check_train(case: Case, folder: Path, **settings: Any) -> None:
    """One backward pass of the family's own objective, in a process of its own: see ``forked``."""
    kind, text = in_fork(lambda: _one_pass(case, folder, settings), "cpu")
    assert kind == "passed", text


def _one_pass(case: Case, folder: Path, settings: dict[str, Any]) -> None:
    family, pipeline = case.family, make_pipeline(case)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    batch = family.collate(make_samples(case, family, pipeline))
    network = getattr(pipeline, case.components[0]).train()
    objective = family.objective(settings, folder / family.subfolder)
    loss = objective.loss(network, batch, [0, 1], 0)
    loss.backward()
    named = dict(network.named_parameters())
    assert loss.isfinite()
    assert all(bool(p.grad.isfinite().all()) for p in named.values() if p.grad is not None)
    none = {name for name, p in named.items() if p.grad is None}
    assert none == set(family.without_gradient(network.config))


def check_names(case: Case) -> None:
    """The tiny network has the full-size one's kinds of names."""
    with torch.device("meta"):
        full = case.family.model_class(**case.network_class)
    tiny = case.parts()[case.components[0]]
    assert kinds(tiny) == kinds(full), sorted(kinds(tiny) ^ kinds(full))[:5]


def kinds(model: nn.Module) -> set[str]:
    """Names of parameters, their numbers replaced."""
    return {re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in model.named_parameters()}


def check_text(case: Case, captions: Sequence[str], **text: Any) -> None:
    """Cached prompts give what the pipeline gives for the captions.

    Args:
        case: The family.
        captions: Two, of different lengths.
        text: The tiny text encoders and tokenizers, by the pipeline's names of them.
    """
    family, pipeline = case.family, make_pipeline(case, **text)
    pixels, samples = make_pixels(case), []
    with torch.no_grad():
        for clip, caption in zip(pixels, captions, strict=True):
            prompt = family.encode_prompt(pipeline, caption)
            assert set(prompt) == set(family.prompt_fields)
            samples.append({**family.encode_pixels(pipeline, clip), **prompt})
    for sample in samples:
        family.check_sample(config_of(case, pipeline), sample)
    batch = family.collate(samples)
    inputs = family.pipeline_inputs(batch, 1.0)
    # The pipeline encodes the captions itself: nothing of the cache's prompts is passed.
    own = {k: v for k, v in inputs.items() if "embeds" not in k and "mask" not in k}
    own = {"prompt": list(captions), **{k: v for k, v in own.items() if k != "negative_prompt"}}
    one = tree_map(lambda latents: latents[0], batch[LATENTS])
    options = {**own, **family.pixel_size(pipeline, one), **case.given(pixels)}
    with torch.no_grad(), recorded(case, pipeline) as calls:
        pipeline(
            **options,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(5),
        )
    _assert_alike(case, family, pipeline, batch, calls[case.said_at])


def check_mutant(case: Case, family: Diffusion) -> None:
    """At least one of oracle, call and ragged measures a family changed on purpose."""
    checks = [check_call, check_ragged, check_oracle]
    # The one most likely to fail first, because none after it is needed.
    for check in checks if _encodes_alike(case, family) else reversed(checks):
        try:
            check(case, family)
        # Measured, or refused by torch: some mutants turn the latents and not their condition.
        except (AssertionError, RuntimeError):
            return
    pytest.fail("oracle, call and ragged hold for the mutant")


# Inside


@contextmanager
def recorded(case: Case, pipeline: Any) -> Iterator[list[Call]]:
    """Calls of the networks, as they are made."""
    calls: list[Call] = []
    hooks = []
    for name in case.components:

        def note(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls.append(Call(network=name, args=args, kwargs=kwargs, output=output))

        network = getattr(pipeline, name)
        hooks.append(network.register_forward_hook(note, with_kwargs=True))
    yield calls
    for hook in hooks:
        hook.remove()


def _place(case: Case, output: Any) -> Any:
    return output if case.whole_answer else output[0]


@torch.no_grad()
def _assert_alike(case: Case, family: Diffusion, pipeline: Any, batch: Batch, call: Call) -> None:
    noisy, timestep = case.read(call.args, call.kwargs, batch[LATENTS])
    found = family.predict(getattr(pipeline, call.network), noisy, timestep, batch)
    error = apart(found, case.said(_place(case, call.output), batch[LATENTS]))
    assert error < CLOSE, f"the training call differs from the pipeline's by {error:.2g}"
