"""Tiny models, pictures and clips for `cache_latents`, and calls of the program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from launch import cache_latents

WORDS = ["a", "red", "blue", "square", "moves", "left", "right"]
WAN_MEAN, WAN_STD = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 4.0, 1.5]


@dataclass(frozen=True, kw_only=True)
class Models:
    """Folders of the saved models."""

    image_vae: Path
    video_vae: Path
    text_encoder: Path
    tokenizer: Path


def make_models(root: Path) -> Models:
    """Tiny random models: image VAE 2x smaller; video VAE 4x smaller in space and in time; 8-wide
    text encoder."""
    from diffusers import AutoencoderKL, AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    image_vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    video_vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=WAN_MEAN,
        latents_std=WAN_STD,
    )
    text = UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    found = Models(
        image_vae=root / "image_vae",
        video_vae=root / "video_vae",
        text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer",
    )
    image_vae.save_pretrained(found.image_vae)
    video_vae.save_pretrained(found.video_vae)
    UMT5EncoderModel(text).save_pretrained(found.text_encoder)
    make_tokenizer().save_pretrained(found.tokenizer)
    return found


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def write_image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(
        0, 256, (size[0] * size[1] * 3,), generator=torch.Generator().manual_seed(seed)
    )
    Image.frombytes("RGB", size, bytes(noise.tolist())).save(path)


def write_images(folder: Path, size: tuple[int, int] = (16, 16)) -> Path:
    for seed, (name, caption) in enumerate(
        {"blue": "a blue  square\n", "red": "a red square moves left"}.items()
    ):
        write_image(folder / f"{name}.png", seed, size)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def write_clips(folder: Path, frames: int = 5) -> Path:
    for seed, name in enumerate(["one", "two"]):
        for frame in range(frames):
            write_image(folder / name / f"{frame}.png", 100 * seed + frame)
    (folder / "one" / "caption.txt").write_text("a red square")
    (folder / "two.txt").write_text("a blue square moves right")
    return folder


def run_program(source: Path, output: Path, vae: Path, models: Models, *extra: str) -> int:
    flags = [
        "--input",
        source,
        "--output",
        output,
        "--vae",
        vae,
        "--text-encoder",
        models.text_encoder,
    ]
    return cache_latents.main([*map(str, flags), "--max-tokens", "6", *extra])


def write_sample(
    path: Path, latents: Tensor | None = None, prompt: Tensor | None = None, **metadata: str
) -> None:
    tensors = {"latents": latents, "prompt_embeds": prompt}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor for key, tensor in tensors.items() if tensor is not None},
        path,
        metadata=metadata,
    )


def assert_refused(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    """One line on stderr with every part, and status 2."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("cache_latents: error: "), lines
    assert [part for part in parts if part not in lines[0]] == []
