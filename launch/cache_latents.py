r"""Encode captioned images and clips once: training then needs neither VAE nor text encoder.

    python launch/cache_latents.py --input photos --output cache \
        --vae MODEL/vae --text-encoder MODEL/text_encoder
    python launch/cache_latents.py --input clips --output cache \
        --vae MODEL/vae --text-encoder MODEL/text_encoder \
        --frames 17 --height 480 --width 832 --dtype bf16 --device cuda

The input folder holds images (``cat.png`` and ``cat.txt``), clips (a sub-folder of numbered frames,
with ``caption.txt`` inside or ``<folder>.txt`` beside it), or both. Every sample becomes one
safetensors file with ``latents`` (C, F, H, W) and ``prompt_embeds`` (L, D). A second call encodes
only what is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
from dist_layerlr.files import whole_file
from launch.trainer.blame import blame
from launch.trainer.cli import Parser, complain
from launch.trainer.data.cached import CAPTION, LATENTS, PROMPT_EMBEDS, CachedDataset, read_header
from launch.trainer.data.encode import (
    ClipSize,
    check_size,
    check_tokens,
    count_tokens,
    encode_caption,
    encode_latents,
    find_tokenizer,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    vae_layout,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_DEFAULT_MAX_TOKENS = 512
_EXIF_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image or one clip, with its caption."""

    name: str
    """Stem of the output file."""
    frames: tuple[Path, ...]
    """Image files in temporal order; one for an image."""
    caption: str
    """Text with runs of white space made single spaces; may be empty."""
    source: str
    """Image or clip folder, relative to the input folder."""


# Samples


def find_samples(folder: Path) -> list[Sample]:
    """List the images and clips of a folder, sorted by name; only captions are read.

    Raises:
        ModelSourceError: the folder is missing or holds no sample, a caption is missing, or two
            samples share a name.
    """
    if not folder.is_dir():
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: not a folder; give the folder of images or clips."
        )
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    samples = [_image_sample(path) for path in entries if _is_image(path)]
    samples += [_clip_sample(path) for path in entries if path.is_dir()]
    if not samples:
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: found 0 images ({', '.join(IMAGE_SUFFIXES)}) and 0"
            " sub-folders of frames; need at least 1."
        )
    by_name: dict[str, Sample] = {}
    for sample in samples:
        other = by_name.setdefault(sample.name, sample)
        if other is not sample:
            raise ModelSourceError(
                f"Invalid --input {str(folder)!r}: {other.source} and {sample.source} would both be"
                f" written to {sample.name}.safetensors; rename one of them."
            )
    return [by_name[name] for name in sorted(by_name)]


def cut_frames(samples: Sequence[Sample], frames: int | None) -> list[Sample]:
    """Keep the first ``frames`` frames of every sample; None keeps all.

    Raises:
        ModelSourceError: a sample has fewer.
    """
    for sample in samples:
        if frames is not None and len(sample.frames) < frames:
            found = f"{sample.source}: has {len(sample.frames)} frames"
            raise ModelSourceError(
                f"{found}, need --frames={frames}; lower --frames or remove the clip."
            )
    return [replace(sample, frames=sample.frames[:frames]) for sample in samples]


def common_size(samples: Sequence[Sample], height: int | None, width: int | None) -> ClipSize:
    """Find the one size of all samples, from image headers where ``height`` and ``width`` are None.

    Raises:
        ModelSourceError: an image cannot be read, or frame counts or image sizes differ.
    """
    first = samples[0]
    for sample in samples:
        if len(sample.frames) != len(first.frames):
            raise ModelSourceError(
                f"{sample.source}: has {len(sample.frames)} frames, {first.source} has"
                f" {len(first.frames)}; all need the same number; set --frames, and keep images and"
                " clips in separate folders."
            )
    sizes = {path: image_size(path) for sample in samples for path in sample.frames}
    if height is not None and width is not None:
        return ClipSize(frames=len(first.frames), height=height, width=width)
    path, (height, width) = next(iter(sizes.items()))
    for other, size in sizes.items():
        if size != (height, width):
            raise ModelSourceError(
                f"{other}: is {size[1]}x{size[0]} pixels, {path} is {width}x{height}; "
                "all need one size; set --height and --width to resize and crop."
            )
    return ClipSize(frames=len(first.frames), height=height, width=width)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as the image is shown; reads the header, or all of a PNG.

    Raises:
        ModelSourceError: the file is no readable image.
    """
    with blame(f"{path}: not a readable image", "replace or remove it"), Image.open(path) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
        width, height = image.size
        return (width, height) if turned else (height, width)


def load_clip(paths: Sequence[Path], height: int, width: int) -> Tensor:
    """Load frames as (3, F, height, width), float32 in [-1, 1], scaled to cover the size and
    cropped at the centre.

    Raises:
        ModelSourceError: a file is no readable image.
    """
    return torch.stack([_load_frame(path, height, width) for path in paths], dim=1)


def _load_frame(path: Path, height: int, width: int) -> Tensor:
    with blame(f"{path}: not a readable image", "replace or remove it"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        pixels = bytearray(image.tobytes())
    frame = torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    return frame.to(torch.float32) / 127.5 - 1.0


def _is_image(path: Path) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _image_sample(path: Path) -> Sample:
    caption = _read_caption(path.name, [path.with_suffix(".txt")])
    return Sample(name=path.stem, frames=(path,), caption=caption, source=path.name)


def _clip_sample(folder: Path) -> Sample:
    frames = tuple(sorted((path for path in folder.iterdir() if _is_image(path)), key=_natural))
    if not frames:
        raise ModelSourceError(
            f"{folder}: holds 0 frames ({', '.join(IMAGE_SUFFIXES)}); add frames or move it away."
        )
    caption = _read_caption(
        folder.name, [folder / "caption.txt", folder.parent / f"{folder.name}.txt"]
    )
    return Sample(name=folder.name, frames=frames, caption=caption, source=folder.name)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts ``2.png`` before ``10.png``."""
    parts = re.findall(r"(\d+)|(\D+)", path.name)
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in parts]


def _read_caption(source: str, places: Sequence[Path]) -> str:
    for place in places:
        if place.is_file():
            with blame(f"{place}: caption is not UTF-8 text", "save it as UTF-8"):
                return " ".join(place.read_text(encoding="utf-8").split())
    raise ModelSourceError(
        f"{source}: no caption; write one to {' or '.join(str(place) for place in places)}."
    )


# Files


def write_sample(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file: whole under its final name, or not at all.

    Raises:
        ModelSourceError: the folder cannot be written to.
    """
    whole = {field: tensor.contiguous() for field, tensor in tensors.items()}
    with blame(f"{path}: cannot be written", "free space or choose another --output"):
        # Several of these programs may fill one folder.
        with whole_file(path, shared=True) as partial:
            save_file(whole, partial, metadata=metadata)


def check_written(
    path: Path,
    metadata: dict[str, str],
    latent_size: tuple[int, int, int],
    max_tokens: int,
    stored_as: str,
) -> None:
    """Refuse to keep a file that another caption, model, size or type was used for.

    Args:
        path: an existing sample file.
        metadata: what would be written now.
        latent_size: (F, H, W) of the latents that would be written.
        max_tokens: length of the prompt embeddings that would be written.
        stored_as: element type as safetensors spells it.

    Raises:
        ModelSourceError: the file is damaged or differs.
    """
    header = read_header(path)
    found: dict[str, Any] = {key: header.metadata.get(key) for key in metadata}
    found["latents (F, H, W)"], found["max-tokens"] = (
        header.shapes[LATENTS][1:],
        header.shapes[PROMPT_EMBEDS][0],
    )
    found["dtype"] = header.dtypes[LATENTS]
    wanted = {
        **metadata,
        "latents (F, H, W)": latent_size,
        "max-tokens": max_tokens,
        "dtype": stored_as,
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise ModelSourceError(
                f"{path}: was written with {key} {found[key]!r}, this run has {value!r}; "
                "add --overwrite or choose another --output."
            )


# Command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a bad one ends the program with status 2."""
    parser = Parser(
        prog="cache_latents", description="Encode captioned images and clips for training."
    )
    parser.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="images or clips with captions"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="one safetensors file per sample"
    )
    parser.add_argument(
        "--vae", type=Path, required=True, metavar="DIR", help="local folder of a diffusers VAE"
    )
    parser.add_argument(
        "--text-encoder", type=Path, required=True, metavar="DIR", help="local transformers folder"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="default: found in or beside the text encoder"
    )
    parser.add_argument(
        "--frames", type=_positive, metavar="N", help="keep the first N frames of each clip"
    )
    parser.add_argument(
        "--height", type=_positive, metavar="PX", help="resize and crop; needs --width"
    )
    parser.add_argument(
        "--width", type=_positive, metavar="PX", help="resize and crop; needs --height"
    )
    parser.add_argument(
        "--max-tokens", type=_positive, metavar="N", help="default: the tokenizer's, at most 512"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="fp32", help="to compute and to store"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--overwrite", action="store_true", help="encode samples again that are already there"
    )
    args = parser.parse_args(argv)
    if (args.height is None) != (args.width is None):
        parser.error(f"--height={args.height} and --width={args.width} must be given together")
    return args


def encode_all(args: argparse.Namespace) -> int:
    """Encode every sample that is not there yet.

    Returns:
        The number of files written.

    Raises:
        LayerLRError: any input that cannot be encoded; files already written stay.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "Invalid --device=cuda. This torch sees no CUDA device; use --device cpu."
        )
    samples = cut_frames(find_samples(args.input), args.frames)
    size = common_size(samples, args.height, args.width)
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device)
    layout = vae_layout(vae)
    check_size(size, layout)
    tokenizer = load_tokenizer(args.tokenizer or find_tokenizer(args.text_encoder))
    max_tokens = args.max_tokens or min(_DEFAULT_MAX_TOKENS, tokenizer.model_max_length)

    missing = _missing(samples, args, layout.latent_size(size), max_tokens)
    if not missing:
        return 0
    encoder = load_text_encoder(args.text_encoder, DTYPES[args.dtype], args.device)
    check_tokens(max_tokens, encoder)
    cut = [sample for sample in missing if count_tokens(tokenizer, sample.caption) > max_tokens]
    for sample in tqdm(missing, unit="sample", disable=None):
        tensors = {
            LATENTS: encode_latents(vae, layout, load_clip(sample.frames, size.height, size.width)),
            PROMPT_EMBEDS: encode_caption(encoder, tokenizer, sample.caption, max_tokens),
        }
        tensors = {field: tensor.to(DTYPES[args.dtype]) for field, tensor in tensors.items()}
        write_sample(_output_file(args, sample), tensors, _metadata(args, sample))
    _warn_cut(cut, max_tokens)
    return len(missing)


def _warn_cut(cut: Sequence[Sample], max_tokens: int) -> None:
    if cut:
        print(
            f"cache_latents: warning: captions longer than --max-tokens={max_tokens} were cut,"
            f" first that of {cut[0].source}; shorten them or raise --max-tokens: {len(cut)} cut",
            file=sys.stderr,
        )


def _missing(
    samples: Iterable[Sample],
    args: argparse.Namespace,
    latent_size: tuple[int, int, int],
    max_tokens: int,
) -> list[Sample]:
    """Make the output folder and list the samples to encode; those kept are checked first."""
    with blame(f"Invalid --output {str(args.output)!r}: cannot be made", "choose another folder"):
        args.output.mkdir(parents=True, exist_ok=True)
    missing = []
    for sample in samples:
        path = _output_file(args, sample)
        if args.overwrite or not path.exists():
            missing.append(sample)
        else:
            check_written(
                path, _metadata(args, sample), latent_size, max_tokens, _STORED_AS[args.dtype]
            )
    return missing


def _output_file(args: argparse.Namespace, sample: Sample) -> Path:
    return Path(args.output) / f"{sample.name}.safetensors"


def _metadata(args: argparse.Namespace, sample: Sample) -> dict[str, str]:
    return {
        CAPTION: sample.caption,
        "source": sample.source,
        "vae": str(args.vae.resolve()),
        "text_encoder": str(args.text_encoder.resolve()),
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not an integer >= 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0, or 2 after a one-line error."""
    args = parse_args(argv)
    try:
        written = encode_all(args)
        dataset = CachedDataset(str(args.output))  # also proves that all files in the folder agree
    except LayerLRError as error:
        complain("cache_latents", error)
        return 2
    shapes, data = dataset.shapes(0), f"--set data.kind=cached --set data.folder={args.output}"
    print(
        f"cache_latents: {len(dataset)} samples in {args.output} ({written} written now), "
        f"latents {shapes[LATENTS]}, prompt_embeds {shapes[PROMPT_EMBEDS]}; "
        f"next: python launch/train.py --config launch/configs/MODEL.json {data}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
