"""Tiny text encoders and tokenizers of the pipelines' own classes, made without a download.

Weights are random, from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from launch.trainer.tiny.tokenizers import (
    INSTRUCT,
    clip_tokenizer,
    gemma_tokenizer,
    instruct_tokenizer,
    llama_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)

Parts = dict[str, Any]

IMAGE_TEXT, VIDEO_TEXT = 24, 16
"""Widths of what the networks of the tiny pipelines take as a prompt."""
IMAGE_POOLED, VIDEO_POOLED = 10, 8
"""Widths of the pooled prompts."""
_SPREAD = 0.3
"""Of the random weights: large enough for every layer to give something else."""


def text_parts(model_type: str) -> Parts:
    """Make the text encoders and tokenizers of a family's pipeline, by component name.

    The same weights on every call; the global random state stays as it is.

    Args:
        model_type: Of the family. One that is not listed in ``TEXTS`` takes the entry that it
            begins with: ``wan22`` that of ``wan``.
    """
    stems = [stem for stem in TEXTS if model_type.startswith(stem)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TEXTS[max(stems, key=len)]()


def _sd15() -> Parts:
    return {"text_encoder": _clip(IMAGE_TEXT), "tokenizer": clip_tokenizer()}


def _sdxl() -> Parts:
    first = IMAGE_TEXT // 3
    return {
        "text_encoder": _clip(first),
        "text_encoder_2": _clip(IMAGE_TEXT - first, projection=IMAGE_POOLED),
        "tokenizer": clip_tokenizer(),
        # The second vocabulary is padded with a token of its own, not with the end of text.
        "tokenizer_2": clip_tokenizer(pad_token="!</w>"),
    }


def _sd35() -> Parts:
    # Together narrower than T5: the pipeline puts zeros behind them.
    first, pooled = IMAGE_TEXT // 3, IMAGE_POOLED // 2 - 1
    return {
        "text_encoder": _clip(first, projection=pooled),
        "text_encoder_2": _clip(IMAGE_TEXT // 2, projection=IMAGE_POOLED - pooled),
        "text_encoder_3": _t5(IMAGE_TEXT),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!</w>"),
        "tokenizer_3": t5_tokenizer(),
    }


def _t5_alone() -> Parts:
    return {"text_encoder": _t5(IMAGE_TEXT), "tokenizer": t5_tokenizer()}


def _flux_2_dev() -> Parts:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    tokenizer = instruct_tokenizer([SYSTEM_MESSAGE])
    # 30 layers: the pipeline takes the states 10, 20 and 30 side by side.
    text = {"model_type": "mistral", **_decoder(IMAGE_TEXT // 3, 30, len(tokenizer))}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, spatial_merge_size=1)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=8),
        tokenizer=tokenizer,
        patch_size=8,
        chat_template=INSTRUCT,
    )
    encoder = _random(Mistral3ForConditionalGeneration, config)
    return {"text_encoder": encoder, "tokenizer": processor}


def _flux_2_klein() -> Parts:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer([])
    # 27 layers: the pipeline takes the states 9, 18 and 27 side by side. One more, so that the last
    # of them is not the one behind the final norm.
    config = Qwen3Config(**_decoder(IMAGE_TEXT // 3, 28, len(tokenizer)))
    return {"text_encoder": _random(Qwen3ForCausalLM, config), "tokenizer": tokenizer}


def _zimage() -> Parts:
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer([])
    config = Qwen3Config(**_decoder(IMAGE_TEXT, 3, len(tokenizer)))
    return {"text_encoder": _random(Qwen3Model, config), "tokenizer": tokenizer}


def _qwen() -> Parts:
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    bare = QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None
    )
    tokenizer = qwen_tokenizer([bare.prompt_template_encode])
    text = _decoder(IMAGE_TEXT, 3, len(tokenizer))
    # One rotary table for time, height and width: 2 * sum of the sections = width of a head.
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": IMAGE_TEXT,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = _random(Qwen2_5_VLForConditionalGeneration, config)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def _sana() -> Parts:
    import inspect

    from diffusers import SanaPipeline
    from transformers import Gemma2Config, Gemma2Model

    call = inspect.signature(SanaPipeline.__call__).parameters
    tokenizer = gemma_tokenizer(call["complex_human_instruction"].default)
    config = Gemma2Config(**_decoder(IMAGE_TEXT, 2, len(tokenizer)))
    return {"text_encoder": _random(Gemma2Model, config), "tokenizer": tokenizer}


def _ltx2() -> Parts:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = gemma_tokenizer([])
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    # Two layers: with the embeddings three states, which the connectors take side by side.
    text = _decoder(VIDEO_TEXT, 2, len(tokenizer))
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    encoder = _random(Gemma3ForConditionalGeneration, config)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def _wan() -> Parts:
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    config = UMT5Config(**_t5_sizes(VIDEO_TEXT), vocab_size=len(tokenizer))
    return {"text_encoder": _random(UMT5EncoderModel, config), "tokenizer": tokenizer}


def _hunyuan_video() -> Parts:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    tokenizer = llama_tokenizer([DEFAULT_PROMPT_TEMPLATE["template"]])
    # The pipeline takes the state before the last two layers.
    config = LlamaConfig(**_decoder(VIDEO_TEXT, 4, len(tokenizer)))
    return {
        "text_encoder": _random(LlamaModel, config),
        "text_encoder_2": _clip(VIDEO_POOLED),
        "tokenizer": tokenizer,
        "tokenizer_2": clip_tokenizer(),
    }


TEXTS: Mapping[str, Callable[[], Parts]] = {
    "chroma_1": _t5_alone,
    "flux_2_dev": _flux_2_dev,
    "flux_2_klein": _flux_2_klein,
    "hunyuan_video": _hunyuan_video,
    "ltx2": _ltx2,
    "pixart": _t5_alone,
    "qwen": _qwen,
    "sana": _sana,
    "sd15": _sd15,
    "sd35": _sd35,
    "sdxl": _sdxl,
    "wan": _wan,
    "zimage": _zimage,
}
"""Beginning of a ``model_type`` -> what makes its text encoders and tokenizers."""


# Encoders


def _random(cls: Any, config: Any) -> Any:
    """Build a model of random weights that are far from 0, in eval mode."""
    model = cls(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Norms begin with 1 (Gemma: 0) and stay near it.
        around = parameter if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.copy_(around + _SPREAD * torch.randn(parameter.shape))
    return model


def _clip(width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": projection or width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {kind: getattr(tokenizer, kind) for kind in kinds}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **tokens)
    return _random(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**_t5_sizes(width), vocab_size=len(t5_tokenizer()))
    return _random(T5EncoderModel, config)


def _t5_sizes(width: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def _decoder(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Sizes as all decoders of transformers spell them."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        # The defaults point into the published vocabularies.
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
