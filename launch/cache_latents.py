r"""Encode captioned images and clips once: training then needs neither VAE nor text encoder.

    python launch/cache_latents.py --model PIPELINE --model-type sdxl --input photos --output cache
    torchrun --nproc_per_node 2 launch/cache_latents.py --model PIPELINE --model-type wan \
        --input clips --output cache --frames 81 --dtype bf16 --device cuda
    python launch/cache_latents.py --vae MODEL/vae --text-encoder MODEL/text_encoder \
        --input clips --output cache --frames 17 --height 480 --width 832

The input folder holds images (``cat.png`` and ``cat.txt``), clips (a sub-folder of numbered frames,
with ``caption.txt`` inside or ``<folder>.txt`` beside it, or a video file), or both. Every sample
becomes one safetensors file. A second call encodes only what is missing.

With ``--model`` VAE and text encoders are those of a local pipeline folder, used as the pipeline
itself uses them; pictures of any size are sorted into buckets of about ``--pixels``; the empty
prompt is encoded too; what cannot be encoded is listed in ``skipped.txt``. With ``--vae`` and
``--text-encoder`` one size is cut and last hidden states are taken, which is what Wan needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from tqdm import tqdm

    from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
    from dist_layerlr.files import write_text
    from launch.trainer.cli import Parser, blame, complain, example, integer
    from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS
    from launch.trainer.data.cached import CAPTION, CachedDataset, read_header
    from launch.trainer.data.caching import begin_writing, cache, end_writing, write_sample
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
    from launch.trainer.data.order import buckets_of
    from launch.trainer.data.works import DTYPES, Report, Wish
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'cache_latents: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

_STORED_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_DEFAULT_MAX_TOKENS = 512
_BY_PIPELINE = ("model", "model-type", "pixels", "step", "fps", "shard")
_BY_PARTS = ("vae", "text-encoder", "tokenizer", "max-tokens")
"""Flags of one way to encode; the first two of each are required."""
_RANK = {"RANK": "0", "WORLD_SIZE": "1"}
"""Variables of torchrun, and what holds without it."""


# Files


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
    # From the header alone: a second call over thousands of files takes seconds.
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
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.height is None) != (args.width is None):
        parser.error(f"--height={args.height} and --width={args.width} must be given together")
    pair = {flag: getattr(args, flag.replace("-", "_")) for flag in _BY_PIPELINE + _BY_PARTS}
    ways = _BY_PIPELINE[:2], _BY_PARTS[:2]
    named = [way for way in ways if all(pair[flag] is not None for flag in way)]
    if len(named) != 1:
        both = " or ".join(" and ".join(f"--{flag}" for flag in way) for way in ways)
        parser.error(f"either {both} must be given")
    for flag in _BY_PARTS if named == [_BY_PIPELINE[:2]] else _BY_PIPELINE:
        if pair[flag] is not None:
            parser.error(f"--{flag} does not go with --{named[0][0]}")
    if args.pixels is not None and args.height is not None:
        parser.error("--pixels makes buckets, --height and --width one size: give one of them")
    return args


def make_parser() -> Parser:
    """The command line, which docs/cli.md shows."""
    parser = Parser(
        prog="cache_latents",
        description="Encode captioned images and clips for training.",
        **example(
            "python launch/cache_latents.py --model MODEL --model-type sd15 --input photos"
            " --output cache"
        ),
    )
    number = integer(1)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="images or clips with captions")
    add("--output", type=Path, required=True, metavar="DIR", help="one file per sample")
    add("--model", type=Path, metavar="DIR", help="local folder of a whole pipeline")
    add("--model-type", metavar="FAMILY", help="the family that is to be trained")
    add("--pixels", type=number, metavar="N", help="area of a bucket; default: the family's")
    add("--step", type=number, metavar="PX", help="of a bucket's sides; default: 64, clips 32")
    add("--fps", type=number, metavar="N", help="frames a second; needed for folders by LTX-2")
    add("--shard", type=_shard, metavar="I/N", help="every N-th sample; default: torchrun's rank")
    add("--vae", type=Path, metavar="DIR", help="local folder of a diffusers VAE")
    add("--text-encoder", type=Path, metavar="DIR", help="local transformers folder")
    add("--tokenizer", type=Path, metavar="DIR", help="default: in or beside the text encoder")
    add("--max-tokens", type=number, metavar="N", help="default: the tokenizer's, at most 512")
    add(
        "--frames",
        type=number,
        metavar="N",
        help="first frames of a clip; --model: at most, 81",
    )
    add("--height", type=number, metavar="PX", help="resize and crop; needs --width")
    add("--width", type=number, metavar="PX", help="resize and crop; needs --height")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="to compute and to store")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--overwrite", action="store_true", help="encode samples again that are already there")
    return parser


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    numbers = [int(part) if part.isdecimal() else -1 for part in (first, count)]
    if not 0 <= numbers[0] < numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return numbers[0], numbers[1]


# By the pipeline


def encode_by_pipeline(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Encode every sample of this process that is not there yet; list what was skipped.

    Returns:
        The number of files written.

    Raises:
        LayerLRError: the model or the folders cannot be used; files already written stay.
    """
    _check_device(args.device)
    shard = _shard_of(args, environment)
    # torchrun's processes of one machine share its devices out by this number.
    device = args.device if args.device == "cpu" else f"cuda:{environment.get('LOCAL_RANK', 0)}"
    wish = Wish(**{**_wishes(args), "device": device, "shard": shard})
    report = cache(wish)
    name = "skipped.txt" if shard[1] == 1 else f"skipped.{shard[0]}.txt"
    lines = [f"{one.path}: {one.why}" for one in report.found.skipped]
    (args.output / name).unlink(missing_ok=True)
    if lines:
        with blame(f"{args.output / name}: cannot be written", "free space"):
            write_text(args.output / name, "\n".join(lines) + "\n")
        _warn(f"skipped {len(lines)} files, see {args.output / name}; first: {lines[0]}")
    _warn_of(report)
    return report.written


def _shard_of(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[int, int]:
    """Number of this process, and how many there are."""
    rank, processes = (int(environment.get(key, d)) for key, d in _RANK.items())
    return args.shard or (rank, processes)


def _warn_of(report: Report) -> None:
    if report.cut:
        what = "captions longer than the pipeline takes were cut, first that of"
        _warn(f"{what} {report.cut[0]}; shorten them: {len(report.cut)} cut")
    if report.shortened:
        what = "clips had more frames than the VAE takes or --frames keeps, first"
        _warn(f"{what} {report.shortened[0]}: {len(report.shortened)} shortened")
    if report.enlarged:
        what = "pictures smaller than --pixels were enlarged, first"
        _warn(f"{what} {report.enlarged[0]}: {len(report.enlarged)} enlarged")
    if report.uncleaned:
        names = " ".join(report.uncleaned)
        _warn(
            f"captions were encoded as they are; with {names} installed the pipeline mends them"
            " first. Install it here and where you sample, or in neither place"
        )


def _wishes(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": args.input,
        "output": args.output,
        "model": args.model,
        "model_type": args.model_type,
        "pixels": args.pixels,
        "step": args.step,
        "size": None if args.height is None else (args.height, args.width),
        "frames": args.frames,
        "fps": args.fps,
        "dtype": args.dtype,
        "overwrite": args.overwrite,
    }


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "Invalid --device=cuda. This torch sees no CUDA device; use --device cpu."
        )


def _warn(text: str) -> None:
    print(f"cache_latents: warning: {text}", file=sys.stderr)


# By parts


def encode_all(args: argparse.Namespace) -> int:
    """Encode every sample that is not there yet.

    Returns:
        The number of files written.

    Raises:
        LayerLRError: any input that cannot be encoded; files already written stay.
    """
    _check_device(args.device)
    samples = cut_frames(find_samples(args.input), args.frames)
    size = common_size(samples, args.height, args.width)
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device)
    layout = vae_layout(vae)
    check_size(size, layout)
    tokenizer = load_tokenizer(args.tokenizer or find_tokenizer(args.text_encoder))
    max_tokens = args.max_tokens or min(_DEFAULT_MAX_TOKENS, tokenizer.model_max_length)

    missing = _missing(samples, args, layout.latent_size(size), max_tokens)
    if not missing:
        end_writing(args.output)
        return 0
    # After the check of what is there: a second call with nothing to do loads no text encoder.
    encoder = load_text_encoder(args.text_encoder, DTYPES[args.dtype], args.device)
    check_tokens(max_tokens, encoder)
    # Counted before encoding and said after it, below the progress bar.
    cut = [sample for sample in missing if count_tokens(tokenizer, sample.caption) > max_tokens]
    begin_writing(args.output)
    for sample in tqdm(missing, unit="sample", disable=None):
        tensors = {
            LATENTS: encode_latents(vae, layout, load_clip(sample.frames, size.height, size.width)),
            PROMPT_EMBEDS: encode_caption(encoder, tokenizer, sample.caption, max_tokens),
        }
        # The models' own dtype need not be the stored one: image VAEs may force float32.
        tensors = {field: tensor.to(DTYPES[args.dtype]) for field, tensor in tensors.items()}
        write_sample(_output_file(args, sample), tensors, _metadata(args, sample))
    end_writing(args.output)
    _warn_cut(cut, max_tokens)
    return len(missing)


def _warn_cut(cut: Sequence[Source], max_tokens: int) -> None:
    if cut:
        _warn(
            f"captions longer than --max-tokens={max_tokens} were cut, first that of"
            f" {cut[0].source}; shorten them or raise --max-tokens: {len(cut)} cut"
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
        if args.model is None:
            written = encode_all(args)
        else:
            written = encode_by_pipeline(args, os.environ)
            mine, processes = _shard_of(args, os.environ)
            if processes > 1:
                # The others may still write, and this one may have had nothing to do.
                print(f"cache_latents: {written} samples written by process {mine} of {processes}")
                return 0
        dataset = CachedDataset(str(args.output))  # also proves that all files can be read
    except LayerLRError as error:
        complain("cache_latents", error)
        return 2
    shapes, data = dataset.shapes(0), f"--set data.kind=cached --set data.folder={args.output}"
    shown = ", ".join(f"{name} {shapes[name]}" for name in sorted(shapes))
    buckets = len(buckets_of(dataset))
    sizes = f"in {buckets} buckets, the first with {shown}" if buckets > 1 else shown
    print(
        f"cache_latents: {len(dataset)} samples in {args.output} ({written} written now), {sizes};"
        f" next: python launch/train.py {_config(args)} {data}"
    )
    return 0


def _config(args: argparse.Namespace) -> str:
    """What the trainer is told of the model, as far as it was said here."""
    if args.model is None:
        return "--config launch/configs/MODEL.json"
    return f"--config launch/configs/{args.model_type}.json --set model_path={args.model}"


if __name__ == "__main__":
    sys.exit(main())
