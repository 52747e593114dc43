"""Which programs load adapters of which model, and under which names. Pure.

A file under names that a program does not know is not refused by it: it loads nothing, and at most
a warning says so. A form is therefore offered for the classes alone that it is known to load for:
the pipelines of diffusers 0.42 were run with every one, ComfyUI's key map was read (its 0.26).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_layerlr.errors import ConfigError

PEFT, KOHYA, PIPELINE, COMFYUI = "peft", "kohya", "pipeline", "comfyui"
_FUSED = "its original model, whose names are asked for, has q, k and v in one matrix"
_UNKNOWN = "it is not known to load under any name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How other programs find the adapters of one class."""

    component: str | None = "transformer"
    """The first segment in ``pipe.load_lora_weights``; None: that pipeline has no such method."""
    comfyui: str | None = None
    """The first segment in ComfyUI's key map; empty: kohya's names; None: it has none."""
    kohya: bool = False
    """Whether kohya's names load anywhere."""
    original: Mapping[str, str] = field(default_factory=dict)
    """Parts of a module's path, and what the original model calls them: for ComfyUI and kohya."""
    why_not: str = _FUSED
    """Why what is missing above is missing."""


# Where the original model and diffusers' cut a module alike, a path differs in names alone. Fused
# matrices are no such case: their LoRA is not three of them, so that no table could help.
_WAN = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
_LTX2 = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
# A class that is not listed has PEFT's form alone, until somebody has loaded another one.
LOADERS: Mapping[str, Loader] = {
    "UNet2DConditionModel": Loader(component="unet", comfyui="", kohya=True),
    "SD3Transformer2DModel": Loader(comfyui="transformer"),
    "Flux2Transformer2DModel": Loader(comfyui="transformer"),
    "ChromaTransformer2DModel": Loader(comfyui="transformer"),
    "PixArtTransformer2DModel": Loader(
        component=None,
        comfyui="transformer",
        why_not="PixArt's pipelines have no load_lora_weights, and its original model, whose names"
        " kohya's form asks for, has q, k and v in one matrix",
    ),
    "SanaTransformer2DModel": Loader(why_not=_UNKNOWN),
    "QwenImageTransformer2DModel": Loader(comfyui="diffusion_model", kohya=True),
    "ZImageTransformer2DModel": Loader(comfyui="diffusion_model", kohya=True),
    "WanTransformer3DModel": Loader(comfyui="diffusion_model", kohya=True, original=_WAN),
    "LTX2VideoTransformer3DModel": Loader(
        comfyui="diffusion_model", original=_LTX2, why_not=_UNKNOWN
    ),
    "HunyuanVideoTransformer3DModel": Loader(),
    "HunyuanVideo15Transformer3DModel": Loader(component=None, why_not=_UNKNOWN),
}
"""By the model's class in diffusers."""
_FORMER_NAMES = {"Transformer2DModel": "PixArtTransformer2DModel"}
"""What older ``config.json`` call a class."""


def loader_of(model_class: str | None, format: str) -> Loader:
    """How adapters of a class are found in one form.

    Raises:
        ConfigError: files of this form would load nothing; says why, and what to export instead.
    """
    name = _FORMER_NAMES.get(model_class or "", model_class)
    if name is None:
        # Its programs read any model whose module paths they know.
        if format == KOHYA:
            return Loader(kohya=True)
        raise ConfigError(
            f"Cannot export an adapter as {format}: names depend on the model's class, which is not"
            " known. Give --base (base=), the folder of the trained model."
        )
    found = LOADERS.get(name)
    if found is None and format == KOHYA:
        return Loader(kohya=True)
    if found is None:
        allowed = ", ".join(sorted(LOADERS))
        raise ConfigError(
            f"Cannot export an adapter of {name} as {format}: {_UNKNOWN}; known are {allowed}. Use"
            " peft."
        )
    there = formats_of(name)
    if format not in there:
        raise ConfigError(
            f"Cannot export an adapter of {name} as {format}: the file would load nothing, because"
            f" {found.why_not}. Use one of {', '.join(there)}."
        )
    return found


def formats_of(model_class: str) -> tuple[str, ...]:
    """Every form in which adapters of a class are known to load."""
    found = LOADERS.get(_FORMER_NAMES.get(model_class, model_class))
    others = (PIPELINE, COMFYUI, KOHYA)
    return (PEFT, *(one for one in others if found is not None and _offers(found, one)))


def original_path(owner: tuple[str, ...], renames: Mapping[str, str]) -> tuple[str, ...]:
    """The original model's path of a module: the longest known parts are renamed, left to right.

    ``blocks.0.attn1.to_out.0`` -> ``blocks.0.self_attn.o``
    """
    path: list[str] = []
    at = 0
    while at < len(owner):
        # ``to_out.0`` before ``to_out``: the longer part says more.
        ends = range(len(owner), at, -1)
        end = next((e for e in ends if ".".join(owner[at:e]) in renames), at + 1)
        part = ".".join(owner[at:end])
        path.extend(renames.get(part, part).split("."))
        at = end
    return tuple(path)


def _offers(loader: Loader, format: str) -> bool:
    if format == PIPELINE:
        return loader.component is not None
    return loader.kohya if format == KOHYA else loader.comfyui is not None
