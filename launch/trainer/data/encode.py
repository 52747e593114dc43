"""Frozen VAEs and text encoders: loaded from local folders, run on one clip or caption a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.cli import blame

IMAGE_VAES = ("AutoencoderKL",)
VIDEO_VAES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """Size that every sample is brought to, before encoding."""

    frames: int
    """Number of frames, >= 1."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""


@dataclass(frozen=True, kw_only=True)
class VaeLayout:
    """How one VAE cuts its input and what the diffusion model expects of its latents."""

    class_name: str
    """diffusers class."""
    video: bool
    """True: encodes (3, F, H, W) at once; False: frame by frame."""
    spatial: int
    """Pixels per latent pixel, each way."""
    temporal: int
    """Frames per latent frame after the first."""
    mean: Tensor
    """Subtracted from raw latents; broadcasts to (C, F, H, W)."""
    scale: Tensor
    """Multiplies the difference; broadcasts to (C, F, H, W)."""

    def latent_size(self, size: ClipSize) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a clip."""
        return (
            (size.frames - 1) // self.temporal + 1,
            size.height // self.spatial,
            size.width // self.spatial,
        )


def check_size(size: ClipSize, layout: VaeLayout) -> None:
    """Refuse a size that the VAE cannot encode without loss at the edges.

    Raises:
        ConfigError: height or width is no multiple of the VAE's factor, or the frame count does not
            fit.
    """
    for flag, value in (("--height", size.height), ("--width", size.width)):
        if value % layout.spatial or value <= 0:
            below = max(layout.spatial, value // layout.spatial * layout.spatial)
            raise ConfigError(
                f"Invalid {flag}={value}: must be a multiple of {layout.spatial} for"
                f" {layout.class_name}; set --height and --width, for example {flag} {below}."
            )
    # Video VAEs encode the first frame by itself and the others in groups.
    if (size.frames - 1) % layout.temporal:
        fits = (size.frames - 1) // layout.temporal * layout.temporal + 1
        raise ConfigError(
            f"Invalid --frames={size.frames}: must be {layout.temporal}k+1 (1,"
            f" {layout.temporal + 1}, {2 * layout.temporal + 1}, ...) for {layout.class_name}; set"
            f" --frames {fits}."
        )


def check_tokens(max_tokens: int, encoder: Any) -> None:
    """Refuse more tokens than the text encoder has positions for; T5 models have no limit.

    Raises:
        ConfigError: ``max_tokens`` is above ``max_position_embeddings``.
    """
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and max_tokens > limit:
        raise ConfigError(
            f"Invalid --max-tokens={max_tokens}: must be in [1, {limit}] for"
            f" {type(encoder).__name__}; set --max-tokens {limit}."
        )


# Models


def load_vae(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load a diffusers VAE from a local folder, in eval mode.

    Raises:
        ModelSourceError: the folder, its config or its weights are missing or damaged, or the class
            is not supported.
    """
    class_name = str(_read_config(folder, "--vae").get("_class_name"))
    if class_name not in IMAGE_VAES + VIDEO_VAES:
        raise ModelSourceError(
            f"Invalid --vae {str(folder)!r}: class {class_name}; can encode with"
            f" {', '.join(IMAGE_VAES + VIDEO_VAES)}."
        )
    import diffusers

    diffusers.logging.set_verbosity_error()
    vae: torch.nn.Module = _load_whole(getattr(diffusers, class_name), folder, dtype, "--vae")
    return vae.to(device)


def vae_layout(vae: Any) -> VaeLayout:
    """Read factors and latent normalisation from the config of a VAE.

    Image VAEs: ``(z - shift_factor) * scaling_factor``. Video VAEs: ``(z - latents_mean) /
    latents_std``.
    """
    config, class_name = vae.config, type(vae).__name__
    if class_name in VIDEO_VAES:
        # Every stage halves height and width; those listed as True halve the frames too. (The
        # misspelling is diffusers' own.)
        spatial = 2 ** len(config.temperal_downsample) * (config.get("patch_size") or 1)
        temporal = 2 ** sum(config.temperal_downsample)
        mean, scale = _per_channel(config.latents_mean), 1.0 / _per_channel(config.latents_std)
        return VaeLayout(
            class_name=class_name,
            video=True,
            spatial=spatial,
            temporal=temporal,
            mean=mean,
            scale=scale,
        )
    mean = _per_channel(config.get("latents_mean") or [config.get("shift_factor") or 0.0])
    scale = config.scaling_factor / _per_channel(config.get("latents_std") or [1.0])
    spatial = 2 ** (len(config.block_out_channels) - 1)
    return VaeLayout(
        class_name=class_name, video=False, spatial=spatial, temporal=1, mean=mean, scale=scale
    )


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a local folder.

    Raises:
        ModelSourceError: the folder holds no tokenizer, or one that cannot pad.
    """
    from transformers import AutoTokenizer

    step = "give the folder that holds tokenizer.json or spiece.model"
    with blame(f"Invalid --tokenizer {str(folder)!r}: cannot be loaded", step):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise ModelSourceError(
            f"Invalid --tokenizer {str(folder)!r}: no pad_token; set it in tokenizer_config.json."
        )
    return tokenizer


def find_tokenizer(text_encoder: Path) -> Path:
    """Guess the tokenizer folder: the text encoder's own, or ``tokenizer*`` beside it."""
    # diffusers lays a pipeline out as text_encoder_2/ beside tokenizer_2/.
    beside = text_encoder.with_name(text_encoder.name.replace("text_encoder", "tokenizer"))
    own = (text_encoder / "tokenizer_config.json").is_file()
    return beside if not own and beside.is_dir() else text_encoder


def load_text_encoder(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load the transformers text encoder of ``architectures[0]`` in its config, in eval mode.

    Raises:
        ModelSourceError: the folder, its config or its weights are missing or damaged, or it is no
            plain encoder.
    """
    import transformers

    class_name = str((_read_config(folder, "--text-encoder").get("architectures") or [None])[0])
    if not class_name.endswith(("EncoderModel", "TextModel")) or not hasattr(
        transformers, class_name
    ):
        raise ModelSourceError(
            f"Invalid --text-encoder {str(folder)!r}: architectures[0] is {class_name}; need an"
            " encoder-only class such as UMT5EncoderModel, T5EncoderModel or CLIPTextModel."
        )
    transformers.logging.set_verbosity_error()
    # Standard error is for our own progress bar.
    transformers.logging.disable_progress_bar()
    encoder: torch.nn.Module = _load_whole(
        getattr(transformers, class_name), folder, dtype, "--text-encoder"
    )
    return encoder.to(device)


def _load_whole(cls: Any, folder: Path, dtype: torch.dtype, flag: str) -> Any:
    """Load local weights, and refuse a checkpoint that would leave some of them random."""
    where, step = f"Invalid {flag} {str(folder)!r}:", "download the folder again"
    with blame(f"{where} {cls.__name__} cannot be loaded", step):
        # Not .to(dtype) afterwards: some classes keep part of their weights in float32.
        options = {"torch_dtype": dtype, "local_files_only": True, "output_loading_info": True}
        model, info = cls.from_pretrained(str(folder), **options)
    # from_pretrained only warns, and leaves these weights random.
    if missing := sorted(info["missing_keys"]):
        raise ModelSourceError(
            f"{where} {len(missing)} weights of {cls.__name__} missing, first {missing[0]}; {step}."
        )
    return model.eval().requires_grad_(False)


def _read_config(folder: Path, flag: str) -> dict[str, Any]:
    """Read ``config.json`` of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelSourceError(
            f"Invalid {flag} {str(folder)!r}: no config.json there; give the model's own"
            " sub-folder, such as MODEL/vae."
        )
    with blame(f"{path}: not a JSON object", "download it again"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)  # (C, 1, 1, 1)


# Encoding


@torch.inference_mode()
def encode_latents(vae: Any, layout: VaeLayout, clip: Tensor) -> Tensor:
    """Encode one clip to the mode of its distribution, normalised as the diffusion model expects.

    Args:
        vae: a class of ``IMAGE_VAES`` or ``VIDEO_VAES``.
        layout: ``vae_layout(vae)``.
        clip: (3, F, H, W) in [-1, 1].

    Returns:
        (C, f, h, w), float32 on the CPU.

    Raises:
        ModelSourceError: the latents hold NaN or infinity.
    """
    pixels = clip.to(vae.device, vae.dtype)
    # The mode and not a sample: a cache must not depend on a random draw.
    if layout.video:
        raw = vae.encode(pixels[None]).latent_dist.mode()[0]
    else:
        frames = [vae.encode(frame[None]).latent_dist.mode() for frame in pixels.unbind(1)]
        raw = torch.cat(frames).transpose(0, 1)
    latents = (raw.to("cpu", torch.float32) - layout.mean) * layout.scale
    return _finite(latents, f"--vae {layout.class_name}")


@torch.inference_mode()
def encode_caption(encoder: Any, tokenizer: Any, caption: str, max_tokens: int) -> Tensor:
    """Encode one caption, padded or cut to ``max_tokens``.

    Rows of padding are 0, as Wan and T5 models expect.

    CLIP models were trained on the encoder's output at padding, so for those it is kept.

    Returns:
        (max_tokens, D), float32 on the CPU.

    Raises:
        ModelSourceError: the embeddings hold NaN or infinity.
    """
    tokens = tokenizer(
        caption,
        padding="max_length",
        padding_side="right",
        max_length=max_tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    # See the docstring: with an attention mask CLIP's padding would come out differently.
    keep_padding = type(encoder).__name__.startswith("CLIP")
    mask = None if keep_padding else tokens.attention_mask.to(encoder.device)
    hidden = encoder(
        input_ids=tokens.input_ids.to(encoder.device), attention_mask=mask
    ).last_hidden_state[0]
    if mask is not None:
        hidden = hidden.masked_fill(mask[0, :, None] == 0, 0.0)
    return _finite(hidden.to("cpu", torch.float32), f"--text-encoder {type(encoder).__name__}")


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Length of a caption in tokens when nothing is cut, end tokens included."""
    return len(tokenizer(caption, truncation=False, verbose=False).input_ids)


def _finite(tensor: Tensor, origin: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ModelSourceError(
            f"{origin} gave NaN or infinity; run again with --dtype bf16 or fp32."
        )
    return tensor
