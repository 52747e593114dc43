"""Write a small, randomly initialised Wan checkpoint in the layout of the real ones.

    python launch/make_tiny_wan.py runs/quickstart/tiny_wan
    python launch/make_tiny_wan.py /tmp/wan --layers 2 --heads 2 --channels 16 --patch 2

Parameter names are those of the full-size models, so a per-layer plan made here reads the same
there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from safetensors import SafetensorError
    from torch import nn

    from launch.trainer.cli import Parser, complain, example, integer
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'make_tiny_wan.py: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

_PROGRAM = "make_tiny_wan.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint and say what was written; return the exit status."""
    options = make_parser().parse_args(arguments)
    out = Path(options.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        model: Any = build(options)
        model.save_pretrained(out)
    except (OSError, SafetensorError) as error:
        complain(
            _PROGRAM,
            f"Invalid OUT_DIR={str(out)!r}: cannot be written to ({error}); choose another folder.",
        )
        return 2
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {out}: WanTransformer3DModel, {options.layers} blocks of width"
        f" {options.heads * options.head_dim}, {count:,} parameters, {weights / 1e6:.1f} MB"
    )
    return 0


def build(options: argparse.Namespace) -> nn.Module:
    """Return the model of the parsed options, initialised as the published Wan code does.

    Draws come from ``options.seed``.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(options.seed)
    model: nn.Module = WanTransformer3DModel(
        patch_size=(1, options.patch, options.patch),
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        in_channels=options.channels,
        out_channels=options.channels,
        text_dim=options.text_dim,
        freq_dim=options.freq_dim,
        ffn_dim=options.ffn_mult * options.heads * options.head_dim,
        num_layers=options.layers,
    )
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Set xavier weights, zero biases but for self-attention's, and a small output layer.

    The velocity then starts near 0.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv3d):
            continue
        weight = module.weight
        if name == "proj_out":
            # Not exactly 0, as trained from scratch upstream: then no other parameter would move in
            # the first step.
            nn.init.normal_(weight, std=0.1 / math.sqrt(weight.shape[1]))
        else:
            nn.init.xavier_uniform_(weight.flatten(1))
        if module.bias is None:
            continue
        if name.endswith((".attn1.to_q", ".attn1.to_k")):
            # Rotary positions act on these: a head that starts with a bias already prefers some
            # relative places.
            nn.init.normal_(module.bias)
        else:
            nn.init.zeros_(module.bias)


def make_parser() -> argparse.ArgumentParser:
    """The command line, which docs/cli.md shows."""
    parser = Parser(
        prog=_PROGRAM,
        description="Write a small random Wan checkpoint.",
        **example("python launch/make_tiny_wan.py runs/tiny_wan --layers 2"),
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder to write; made if missing")
    for flag, default, meaning in (
        ("--layers", 4, "transformer blocks"),
        ("--heads", 3, "attention heads"),
        ("--head-dim", 64, "width of a head, a multiple of 2, at least 6"),
        ("--ffn-mult", 4, "width of the feed-forward layer over the model's"),
        ("--channels", 1, "latent channels in and out"),
        ("--patch", 12, "patch height and width"),
        ("--text-dim", 32, "width of the prompt embeddings"),
        ("--freq-dim", 64, "width of the timestep's sinusoids, a multiple of 2, at least 6"),
    ):
        check = integer(6, multiple_of=2) if "multiple of 2" in meaning else integer(1)
        parser.add_argument(
            flag, type=check, default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument("--seed", type=_seed, default=0, help="of the weights (default 0)")
    return parser


def _seed(text: str) -> int:
    # torch.manual_seed takes signed 64-bit numbers.
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer in [0, 2**63)")
    return number


if __name__ == "__main__":
    sys.exit(main())
