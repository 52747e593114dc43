"""LTX-2.0, 2.3 and 2.5: a clip and its sound (diffusers ``LTX2VideoTransformer3DModel``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.sharders import unwrap
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample, stack
from launch.trainer.families.base import Family
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import Diffusion, Origin
from launch.trainer.families.sound import fitted, log_mel
from launch.trainer.families.video import clip_size, one_length
from launch.trainer.objectives import Objective
from launch.trainer.objectives.first_frame import FIRST_FRAME, token_times
from launch.trainer.objectives.sigma import BY_RESOLUTION, Resolution
from launch.trainer.objectives.streams import WEIGHTS, AudioVideoFlow

AUDIO_LATENTS, AUDIO_PROMPT_EMBEDS = "audio_latents", "audio_prompt_embeds"
"""Fields of a sample: (L, C x M), packed and normalised, and the prompt for the sound."""
FPS, HAS_AUDIO = "fps", "has_audio"
"""Fields of a sample, both scalars. Frames per second enter the positions. Without the second a
sample has sound; where it is false the sound's loss counts nothing."""
_USUAL_RATE = 24.0
"""Frames per second where nothing says them: the pipeline's own default."""
VIDEO, AUDIO = "video", "audio"
"""The streams, by which latents, noise and velocity of a batch are told apart."""
SIZES = Resolution(tokens_of=lambda shape: prod(shape[1:]), tokens=(1024, 4096), mu=(0.95, 2.05))
"""How the shipped scheduler, and the authors' trainer, shift by the tokens of a clip."""
_SOUND = re.compile(r"(^|_)(audio|a2v|v2a|av)(_|$)")
"""Segments of names that only a run with sound uses: ``audio_ff``, ``video_to_audio_attn``,
``video_a2v_cross_attn_scale_shift_table``, ``av_cross_attn_video_a2v_gate``. ``audio`` must be a
whole word."""
_KEYFRAMES = "keyframes_abs_pos_embedding"
"""Marks keyframes, which no training sample has."""
_PROJECTIONS = r"to_q|to_k|to_v|to_out\.0"


class LTX2(Diffusion):
    """Clip and sound with one share of noise, each with its own prompt behind the connectors."""

    model_type = "ltx2"
    class_name = "LTX2VideoTransformer3DModel"
    pipeline_class = "LTX2Pipeline"
    objective_class = AudioVideoFlow
    # A fixed number for the steps of the picture: the line's value at about 2,500 tokens.
    defaults = {"shift": BY_RESOLUTION, "sample_shift": 4.5}
    prompt_fields = (PROMPT_EMBEDS, AUDIO_PROMPT_EMBEDS)

    def variant(self, settings: Mapping[str, Any]) -> Family:
        """Return the family without sound where the settings say so; see ``HasVariants``."""
        return self if settings.get("audio", True) else SilentLTX2()

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and patches of several latents."""
        super().check_config(model_config)
        for key in ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t"):
            refuse_key(model_config, key, 1, "a network that packs latents otherwise")

    def objective(self, settings: Mapping[str, Any], model_folder: Any) -> Objective:
        """Make the objective, whose shift grows with the tokens of a clip."""
        return super().objective({"resolution": SIZES, **settings}, model_folder)

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Return the projections of all attentions and the feed-forwards; see ``Family``."""
        return (*super().lora_targets(model_config), "net.0.proj", "net.2")

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the mark of keyframes where there is one; see ``Family.without_gradient``."""
        marks = model_config.get("use_keyframes_abs_pos_embedding", False)
        return (_KEYFRAMES,) if marks else ()

    def predict(self, model: nn.Module, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
        """Call the network with both streams; see ``Diffusion.predict``."""
        sound = {"audio_hidden_states": noisy[AUDIO]}
        video, audio = _call(model, noisy[VIDEO], timestep, batch, **sound)
        return {VIDEO: video, AUDIO: audio}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples: ``latents`` holds both streams, and a silent clip's sound weighs 0.

        Raises:
            ModelSourceError: several frame rates, or lengths of prompts, which no call can take.
        """
        one_length(samples, PROMPT_EMBEDS, "encode all prompts again, without a --max-tokens")
        rates = sorted({_scalar(one, FPS, _USUAL_RATE) for one in samples})
        if len(rates) > 1:
            raise ModelSourceError(
                f"Samples of one batch have {', '.join(map(str, rates))} frames per second, and"
                " one call of this model takes one rate: encode all clips at the same --fps, or set"
                " train.micro_batch=1."
            )
        heard = [_scalar(one, HAS_AUDIO, 1.0) for one in samples]
        batch = dict(stack([_tensors(one) for one in samples]))
        if AUDIO_LATENTS in batch:
            clip, sound = batch[LATENTS], batch.pop(AUDIO_LATENTS)
            batch[LATENTS] = {VIDEO: clip, AUDIO: sound}
            batch[WEIGHTS] = {AUDIO: torch.tensor(heard, device=clip.device)}
        return {**batch, FPS: rates[0]}

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Return the clip's tokens and the sound's; see ``Family.tokens``."""
        sound = len(sample[AUDIO_LATENTS]) if AUDIO_LATENTS in sample else 0
        return int(prod(sample[LATENTS].shape[1:])) + sound

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        video, audio = _prompt_widths(model_config)
        return {
            LATENTS: (model_config["in_channels"], "F", "H", "W"),
            AUDIO_LATENTS: ("A", model_config["audio_in_channels"]),
            PROMPT_EMBEDS: ("L", video),
            AUDIO_PROMPT_EMBEDS: ("L", audio),
            FPS: (),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        vae = pipeline.vae
        raw = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
        mean, std = (v.view(-1, 1, 1, 1).float() for v in (vae.latents_mean, vae.latents_std))
        latents: Tensor = (raw - mean) * vae.config.scaling_factor / std
        return {LATENTS: latents.cpu()}

    def encode_source(self, pipeline: Any, pixels: Tensor, origin: Origin) -> Mapping[str, Tensor]:
        """Return the clip, its frame rate and its sound; see ``Diffusion.encode_source``.

        Raises:
            ModelSourceError: a clip without a frame rate, or a sound that the VAE cannot take.
        """
        frames, fps = pixels.shape[1], origin.fps
        if fps is None and frames > 1:
            raise ModelSourceError(
                "A clip does not say how many frames a second has, which this model is told: give"
                " a video file in place of a folder of frames."
            )
        # A single frame has no rate.
        fps = fps or _USUAL_RATE
        found = {FPS: torch.tensor(fps), HAS_AUDIO: torch.tensor(origin.sound is not None)}
        found[AUDIO_LATENTS] = _sound(pipeline, origin, frames, fps)
        return {**self.encode_pixels(pipeline, pixels), **found}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return what the frozen connectors give both streams; see ``Diffusion.encode_prompt``.

        The text encoder's own states would take a hundred times the room.
        """
        rows, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        side = pipeline.tokenizer.padding_side
        # Registers fill the padding, so that nothing is left to mask.
        video, audio, _ = pipeline.connectors(rows, mask, padding_side=side)
        return {PROMPT_EMBEDS: video[0], AUDIO_PROMPT_EMBEDS: audio[0]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``: registers fill the padding; the mask is all ones."""
        rows = batch[PROMPT_EMBEDS]
        return {"prompt_embeds": rows, "prompt_attention_mask": rows.new_ones(rows.shape[:2])}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """Return the prompts, and every other kind of guidance off.

        See ``Diffusion.pipeline_inputs``.
        """
        off = {"guidance_scale": guidance, "guidance_rescale": 0.0}
        # The pipeline guides by skipped layers and by parted streams too unless it is told not to.
        off |= {"stg_scale": 0.0, "modality_scale": 1.0}
        inputs = {**off, **{f"audio_{key}": value for key, value in off.items()}}
        return {**super().pipeline_inputs(batch, guidance), **inputs, "frame_rate": batch[FPS]}

    @contextmanager
    def pipeline_with(self, pipeline: Any, batch: Batch) -> Iterator[None]:
        """Have the connectors give what is cached of them; see ``Diffusion.pipeline_with``."""
        audio, real = batch[AUDIO_PROMPT_EMBEDS], pipeline.connectors

        def connectors(rows: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            # With guidance the negative prompts stand in front.
            told = [audio]
            if len(rows) > len(audio):
                told = [batch["negative"][AUDIO_PROMPT_EMBEDS], audio]
            return rows, torch.cat(told), mask

        # Not its forward: the connectors may not be loaded at all.
        object.__setattr__(pipeline, "connectors", connectors)
        try:
            yield
        finally:
            object.__setattr__(pipeline, "connectors", real)

    def pixel_size(self, pipeline: Any, latents: Any) -> dict[str, int]:
        """Height, width and frames; see ``Diffusion.pixel_size``."""
        video = latents[VIDEO] if isinstance(latents, Mapping) else latents
        scales = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio
        return clip_size(video, *scales)


class SilentLTX2(LTX2):
    """The clip alone, its blocks apart from the sound's: ``objective.audio`` is false."""

    def lora_targets(self, model_config: Mapping[str, Any]) -> str:
        """Return the projections of the clip's attentions and its feed-forward."""
        return rf"transformer_blocks\.\d+\.(attn[12]\.({_PROJECTIONS})|ff\.net\.(0\.proj|2))"

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return everything of the sound and of what joins it to the clip; see ``Family``."""
        with torch.device("meta"):
            names = [name for name, _ in self.build(model_config).named_parameters()]
        return tuple(
            name
            for name in names
            if name == _KEYFRAMES or any(_SOUND.search(part) for part in name.split("."))
        )

    def predict(self, model: nn.Module, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
        """Call the network with the streams kept apart; see ``Diffusion.predict``."""
        # The network insists on a sound: one token of it, which nothing of the clip sees.
        channels = _config(model).audio_in_channels
        sound = {"audio_hidden_states": noisy.new_zeros(len(noisy), 1, channels)}
        return _call(model, noisy, timestep, batch, **sound, isolate_modalities=True)[0]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples without their sound."""
        left = (AUDIO_LATENTS, HAS_AUDIO)
        return super().collate([{k: v for k, v in s.items() if k not in left} for s in samples])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample; it may hold sound."""
        found = super().layout(model_config)
        return {name: axes for name, axes in found.items() if name != AUDIO_LATENTS}


def _sound(pipeline: Any, origin: Origin, frames: int, fps: float) -> Tensor:
    """Return the normalised mode of the audio VAE (L, C x M), float32 on the CPU."""
    vae, rate = pipeline.audio_vae, pipeline.audio_sampling_rate
    length = audio_frames(pipeline, frames, fps)
    if origin.sound is None:
        # Zeros, the mean of all sounds; what is in it is not learned.
        return torch.zeros(length, vae.latents_mean.numel())
    if origin.rate != rate:
        raise ModelSourceError(
            f"The sound has {origin.rate} samples per second, and this model's audio VAE needs"
            f" {rate}: resample it, ffmpeg -i IN -ar {rate} OUT.wav."
        )
    # A sound of another length than the clip is cut, or ends in silence.
    sound = fitted(origin.sound.T, round(frames / fps * rate)).T
    mel = log_mel(sound, rate, bins=vae.config.mel_bins, hop=pipeline.audio_hop_length)
    raw = vae.encode(mel[None].to(vae.device, vae.dtype)).latent_dist.mode()
    packed = pipeline._pack_audio_latents(raw)[0].float()
    # After packing: the statistics are of packed channels.
    latents = (packed - vae.latents_mean) / vae.latents_std
    return fitted(latents.cpu(), length)


def audio_frames(pipeline: Any, frames: int, fps: float) -> int:
    """Latents of the sound of a clip, as the pipeline counts them."""
    hop = pipeline.audio_hop_length * pipeline.audio_vae_temporal_compression_ratio
    return max(1, round(frames / fps * float(pipeline.audio_sampling_rate / hop)))


def _call(
    model: nn.Module, video: Tensor, timestep: Tensor, batch: Batch, **more: Any
) -> tuple[Tensor, Tensor]:
    """Call the network; the velocity of the clip in the form of ``video``, and the sound's."""
    *_, frames, height, width = video.shape
    times = {"timestep": timestep}
    if FIRST_FRAME in batch:
        # The sound has no first frame: its time is the clip's.
        given = token_times(timestep, batch[FIRST_FRAME], frames, height * width)
        times = {"timestep": given, "audio_timestep": timestep}
    found: tuple[Tensor, Tensor] = model(
        # Patches of one latent: tokens in the order (F, H, W).
        hidden_states=video.flatten(2).transpose(1, 2),
        encoder_hidden_states=batch[PROMPT_EMBEDS],
        audio_encoder_hidden_states=batch[AUDIO_PROMPT_EMBEDS],
        **times,
        # A timestep too, in spite of its name.
        sigma=timestep,
        num_frames=frames,
        height=height,
        width=width,
        fps=batch[FPS],
        audio_num_frames=more["audio_hidden_states"].shape[1],
        # Since 2.3 each stream is modulated by the other's timestep, where they meet.
        use_cross_timestep=not _config(model).use_prompt_embeddings,
        return_dict=False,
        **more,
    )
    return found[0].transpose(1, 2).reshape(video.shape), found[1]


def _config(model: nn.Module) -> Any:
    network: Any = unwrap(model)
    return network.config


def _prompt_widths(model_config: Mapping[str, Any]) -> tuple[int, int]:
    """Widths of the prompt of the clip and of the sound."""
    if model_config.get("use_prompt_embeddings", True):
        width = model_config["caption_channels"]
        return width, width
    # Since 2.3 the connectors give each stream its own width.
    return model_config["cross_attention_dim"], model_config["audio_cross_attention_dim"]


def _scalar(sample: Sample, name: str, default: float) -> float:
    value = sample.get(name)
    # On the meta device, where memory is estimated, there are no numbers.
    return default if value is None or value.is_meta else float(value)


def _tensors(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key not in (FPS, HAS_AUDIO)}
