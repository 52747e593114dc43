"""Write the folder of a tiny, randomly initialised pipeline of any family.

    python launch/tiny.py sdxl /tmp/tiny_sdxl
    python launch/tiny.py qwen /tmp/tiny_qwen

The folder is laid out as the published ones are: ``model_index.json`` and a sub-folder for the
network, the VAE, the scheduler and each text encoder and tokenizer. Names of parameters are those
of the full-size models, so a per-layer plan made here reads the same there. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from torch import nn

    from dist_layerlr.errors import ConfigError, LayerLRError
    from launch.trainer.cli import Parser, blame, complain, example
    from launch.trainer.tiny import build, known
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'tiny.py: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

_PROGRAM = "tiny.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pipeline and say what was written; return the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        parts = write(options.family, options.out)
    except LayerLRError as error:
        complain(_PROGRAM, error)
        return 2
    print(f"wrote {options.out}: {', '.join(parts)}")
    return 0


def write(family: str, out: Path) -> list[str]:
    """Write one pipeline folder.

    Args:
        family: One of ``known()``.
        out: The folder: empty, or made.

    Returns:
        What was written: each component, its class and its number of parameters.

    Raises:
        ConfigError: No such family, or a folder that is not empty.
        ModelSourceError: The folder cannot be written to.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    pipeline = build(family)
    # Nothing is replaced: what is there may be a model of full size.
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"Invalid OUT={str(out)!r}. It is not empty; choose an empty or a new folder."
        )
    with blame(f"Invalid OUT={str(out)!r}: cannot be written to", "choose another folder"):
        pipeline.save_pretrained(out)
    return [_described(name, part) for name, part in pipeline.components.items() if part]


def _described(name: str, part: object) -> str:
    text = f"{name} {type(part).__name__}"
    if isinstance(part, nn.Module):
        text += f" {sum(parameter.numel() for parameter in part.parameters()):,}"
    return text


def make_parser() -> Parser:
    """The command line, which docs/cli.md shows."""
    parser = Parser(
        prog=_PROGRAM,
        description="Write a tiny random pipeline.",
        **example("python launch/tiny.py sd15 MODEL"),
    )
    parser.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(known())}")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; made if missing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
