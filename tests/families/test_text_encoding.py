"""What ``encode_prompt`` caches is what the network receives when the pipeline is asked.

Whole tiny pipelines with real text encoders and tokenizers. Bit for bit, and so are the ids, the
padding and the mask that each text encoder is asked with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.trainer.data.base import PROMPT_EMBEDS, Batch
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Diffusion, Origin
from launch.trainer.tiny import build

pytest.importorskip("diffusers", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")

CAPTIONS = {"short": "A red Cat, on 2 mats!", "empty": "", "long": "two dogs walk on a road " * 60}
"""The long one is cut by every tokenizer."""
Inputs = Mapping[str, Any]
"""Arguments of one call of the network."""
Change = Callable[[Any], Any]


def rows(told: Inputs, mask: str | None = None) -> Tensor:
    """The rows of the prompt that the network is to read."""
    prompt: Tensor = told["encoder_hidden_states"][0]
    if mask is None or told[mask] is None:
        return prompt
    # Of a longer mask the first entries are the prompt's.
    return prompt[told[mask][0, : len(prompt)].bool()]


def plain(told: Inputs) -> dict[str, Tensor]:
    return {PROMPT_EMBEDS: rows(told)}


def masked(mask: str) -> Callable[[Inputs], dict[str, Tensor]]:
    return lambda told: {PROMPT_EMBEDS: rows(told, mask)}


def pooled(told: Inputs, mask: str | None = None) -> dict[str, Tensor]:
    return {PROMPT_EMBEDS: rows(told, mask), "pooled": told["pooled_projections"][0]}


RECEIVED: dict[str, Callable[[Inputs], dict[str, Tensor]]] = {
    "chroma_1": masked("attention_mask"),
    "flux_2_dev": plain,
    "flux_2_klein_4b": plain,
    "hunyuan_video": lambda told: pooled(told, "encoder_attention_mask"),
    "ltx2": lambda told: {
        **plain(told),
        "audio_prompt_embeds": told["audio_encoder_hidden_states"][0],
    },
    "pixart": masked("encoder_attention_mask"),
    "qwen": masked("encoder_hidden_states_mask"),
    "sana": masked("encoder_attention_mask"),
    "sd15": plain,
    "sd35": pooled,
    "sdxl": lambda told: {**plain(told), "pooled": told["added_cond_kwargs"]["text_embeds"][0]},
    "wan": plain,
    "wan22": plain,
    "zimage": lambda told: {PROMPT_EMBEDS: told["cap_feats"][0]},
}
"""What each family's network is told as the prompt, by the names of a sample's fields."""
NAMES = {"zimage": ("x", "t", "cap_feats")}
"""Of arguments that a pipeline passes by position."""
CHATS = ("flux_2_dev", "flux_2_klein_4b", "qwen", "zimage")
"""Families whose pipelines put a template around the caption that a test can take away."""
ALONE = ("qwen",)
"""Families whose pipelines do not pad one prompt."""
INSTRUCTED = ("sana",)
"""Families whose empty prompt is the negative one: the pipeline puts no instruction before it."""
WITHOUT_MASK = ("sd15", "sd35", "sdxl")
"""Families whose text encoders are asked without one."""


@cache
def tiny(model_type: str) -> Any:
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    return build(model_type)


def family_of(model_type: str) -> Diffusion:
    found = get_family(model_type)
    assert isinstance(found, Diffusion)
    return found


def encoders(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and part}


@contextmanager
def asked(pipeline: Any) -> Iterator[list[tuple[str, dict[str, Tensor]]]]:
    """Ids and masks that the text encoders are called with."""
    calls: list[tuple[str, dict[str, Tensor]]] = []
    hooks = []
    for name, encoder in encoders(pipeline).items():

        def note(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            keys = ("input_ids", "attention_mask")
            told = {**dict(zip(keys, args, strict=False)), **kwargs}
            calls.append((name, {key: told[key] for key in keys if told.get(key) is not None}))

        hooks.append(encoder.register_forward_pre_hook(note, with_kwargs=True))
    with removed(hooks):
        yield calls


@cache
@torch.no_grad()
def told_by_pipeline(model_type: str, caption: str) -> tuple[Inputs, list[Any]]:
    """Arguments of the network's first call, and those of the text encoders'."""
    family, pipeline = family_of(model_type), tiny(model_type)
    pixels = torch.linspace(-1, 1, 3 * 32 * 64).view(3, 1, 32, 64)
    origin = Origin(size=(32, 64), corner=(0, 0), fps=24.0)
    encoded = family.encode_source(pipeline, pixels, origin)
    sample = {**encoded, **family.encode_prompt(pipeline, "x")}
    batch: Batch = family.collate([sample])
    given = family.pipeline_inputs(batch, 1.0).items()
    # The pipeline encodes the caption itself: nothing of the cached prompt is passed.
    own = {k: v for k, v in given if not any(word in k for word in ("embeds", "mask", "negative"))}
    own["prompt"] = caption
    negative = model_type in INSTRUCTED and not caption
    if negative:
        own |= {"prompt": "x", "negative_prompt": "", "guidance_scale": 4.0}
    network, seen = getattr(pipeline, family.subfolder), list[Inputs]()

    def note(_: Any, args: Any, kwargs: Any) -> None:
        names = NAMES.get(model_type, ("hidden_states", "timestep"))
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    with removed([hook]), asked(pipeline) as calls:
        pipeline(
            **own,
            **family.pixel_size(pipeline, sample["latents"]),
            num_inference_steps=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    # The negative prompt is encoded last, and comes first in the batch.
    return seen[0], calls[-1:] if negative else calls


def check(model_type: str, caption: str, changed: Change | None = None) -> None:
    """Compare; ``changed`` is entered around the encoding for the cache."""
    pipeline = tiny(model_type)
    told, calls = told_by_pipeline(model_type, caption)
    with torch.no_grad(), (changed or unchanged)(pipeline), asked(pipeline) as own:
        cached = family_of(model_type).encode_prompt(pipeline, caption)
    assert [name for name, _ in own] == [name for name, _ in calls]
    for (name, found), (_, wanted) in zip(own, calls, strict=True):
        assert found.keys() == wanted.keys(), f"{name} is asked with {found.keys()}"
        for key, value in wanted.items():
            assert torch.equal(found[key].long(), value.long()), f"{name}: {key} differs"
    wanted = RECEIVED[model_type](told)
    assert cached.keys() == wanted.keys() == set(family_of(model_type).prompt_fields)
    for key, value in wanted.items():
        assert cached[key].shape == value.shape, f"{key}: {cached[key].shape} {value.shape}"
        assert torch.equal(cached[key], value), f"{key} differs"


# Encodings that are wrong


@contextmanager
def unchanged(pipeline: Any) -> Iterator[None]:
    yield


@contextmanager
def other_layer(pipeline: Any) -> Iterator[None]:
    """Every state is that of the layer before."""

    def shift(encoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
        found = encoder.forward(*args, **{**kwargs, "output_hidden_states": True})
        states = found.hidden_states
        found.hidden_states = (states[0], *states[:-1])
        found.last_hidden_state = states[-2]
        return found

    parts = encoders(pipeline).values()
    with removed(part.register_forward_hook(shift, with_kwargs=True) for part in parts):
        yield


@contextmanager
def no_mask(pipeline: Any) -> Iterator[None]:
    def drop(_: Any, args: Any, kwargs: Any) -> Any:
        return args[:1], {**kwargs, "attention_mask": None}

    parts = encoders(pipeline).values()
    with removed(part.register_forward_pre_hook(drop, with_kwargs=True) for part in parts):
        yield


@contextmanager
def no_padding(pipeline: Any) -> Iterator[None]:
    """Tokenizers pad to the longest prompt only."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(part) for part in tokenizers(pipeline)}:

            def call(self: Any, *args: Any, real: Any = cls.__call__, **kwargs: Any) -> Any:
                return real(self, *args, **{**kwargs, "padding": True})

            patch.setattr(cls, "__call__", call)
        yield


@contextmanager
def no_template(pipeline: Any) -> Iterator[None]:
    """The text encoder is asked with the caption alone."""
    user = "{% for m in messages if m.role == 'user' %}"
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(pipeline, "prompt_template_encode"):
            # As many tokens in front as the pipeline cuts off.
            patch.setattr(pipeline, "prompt_template_encode", 34 * "\n " + "{}")
        elif pipeline.tokenizer in tokenizers(pipeline):
            patch.setattr(pipeline.tokenizer, "chat_template", user + "{{ m.content }}{% endfor %}")
        else:
            parts = user + "{{ m.content[0].text }}{% endfor %}"
            patch.setattr(pipeline.tokenizer, "chat_template", parts)
        yield


def tokenizers(pipeline: Any) -> list[Any]:
    parts = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
    # A processor has its tokenizer inside.
    return [getattr(part, "tokenizer", part) for part in parts]


@contextmanager
def removed(hooks: Iterable[Any]) -> Iterator[None]:
    made = list(hooks)
    try:
        yield
    finally:
        for hook in made:
            hook.remove()


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("model_type", RECEIVED)
def test_the_cached_prompt_is_what_the_network_receives(model_type: str, caption: str):
    check(model_type, CAPTIONS[caption])


def mutants() -> Iterator[Any]:
    for model_type in RECEIVED:
        wrong = {"other layer": other_layer, "no padding": no_padding, "no mask": no_mask}
        if model_type in WITHOUT_MASK:
            del wrong["no mask"]
        if model_type in ALONE:
            del wrong["no padding"]
        if model_type in CHATS:
            wrong["no template"] = no_template
        for label, change in wrong.items():
            yield pytest.param(model_type, change, id=f"{model_type}, {label}")


@pytest.mark.parametrize(("model_type", "change"), mutants())
def test_another_encoding_is_told_from_it(model_type: str, change: Change):
    # Without padding Sana's rows are not there, and LTX-2's are no multiple of its registers.
    errors = (AssertionError, IndexError, ValueError)
    with pytest.raises(errors, match="differs|asked with|Size|out of bounds|divisible"):
        check(model_type, CAPTIONS["short"], change)
