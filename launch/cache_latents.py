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
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from safetensors.torch import save_file
    from torch import Tensor
    from tqdm import tqdm

    from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
    from dist_layerlr.files import whole_file
    from launch.trainer.cli import Parser, blame, complain, integer
    from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS
    from launch.trainer.data.cached import CAPTION, CachedDataset, read_header
    from launch.trainer.data.encode import (
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
    from launch.trainer.data.images import Source, common_size, cut_frames, find_samples, load_clip
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'cache_latents: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_DEFAULT_MAX_TOKENS = 512


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
        "--frames", type=integer(1), metavar="N", help="keep the first N frames of each clip"
    )
    parser.add_argument(
        "--height", type=integer(1), metavar="PX", help="resize and crop; needs --width"
    )
    parser.add_argument(
        "--width", type=integer(1), metavar="PX", help="resize and crop; needs --height"
    )
    parser.add_argument(
        "--max-tokens", type=integer(1), metavar="N", help="default: the tokenizer's, at most 512"
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


def _warn_cut(cut: Sequence[Source], max_tokens: int) -> None:
    if cut:
        print(
            f"cache_latents: warning: captions longer than --max-tokens={max_tokens} were cut,"
            f" first that of {cut[0].source}; shorten them or raise --max-tokens: {len(cut)} cut",
            file=sys.stderr,
        )


def _missing(
    samples: Iterable[Source],
    args: argparse.Namespace,
    latent_size: tuple[int, int, int],
    max_tokens: int,
) -> list[Source]:
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


def _output_file(args: argparse.Namespace, sample: Source) -> Path:
    return Path(args.output) / f"{sample.name}.safetensors"


def _metadata(args: argparse.Namespace, sample: Source) -> dict[str, str]:
    return {
        CAPTION: sample.caption,
        "source": sample.source,
        "vae": str(args.vae.resolve()),
        "text_encoder": str(args.text_encoder.resolve()),
    }


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
