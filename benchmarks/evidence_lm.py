"""The study on a language model: rates by component, on the standard library's source.

transformers' Llama, tied embeddings, trained from random weights on the characters of Python's own
standard library, which every machine has.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evidence_studies import Arm, Size, Study
from evidence_training import block, only, train
from evidence_words import Metric

FILES = ("argparse", "ast", "dataclasses", "inspect", "pathlib", "tarfile", "typing", "zipfile")
HELD_OUT = ("ipaddress", "shutil")
CONTEXT, BATCH, CHARACTERS = 64, 8, 128
ROLES = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "o_proj")}
PAPER = {"norm": 1.0, "vo": 4.0, "ffn": 6.0, "qk": 8.0, "embed": 10.0}
"""Ratios of arXiv 2502.19002."""
LOSS = Metric(name="loss", unit="nats per character", higher_is_better=False)


@lru_cache(maxsize=2)
def text(names: tuple[str, ...]) -> Tensor:
    """Characters of some modules of the standard library; whatever is not ASCII is a blank."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = bytearray()
    for name in names:
        file = library / f"{name}.py"
        # A later Python made a package of pathlib.
        file = file if file.exists() else library / name / "__init__.py"
        found += file.read_bytes()
    codes = np.frombuffer(bytes(found), dtype=np.uint8).astype(np.int64)
    return torch.from_numpy(np.where(codes < CHARACTERS, codes, 32))


def make_llama(seed: int) -> nn.Module:
    """A small Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def by_component(rate: float, ratios: Mapping[str, float]) -> dict[str, Any]:
    """Rates in given ratios, the feed-forward's being the base rate."""
    patterns = []
    for role, names in ROLES.items():
        for name in names:
            match = f"model.layers.*.self_attn.{name}"
            patterns.append({"match": match, "component": role})
    lrs = {name: rate * ratio / ratios["ffn"] for name, ratio in ratios.items()}
    return block(rate, component_lr=lrs, patterns=patterns)


def reverse() -> dict[str, float]:
    """The reciprocals: what the paper makes fast is slow."""
    return {name: 1 / ratio for name, ratio in PAPER.items()}


def run_lm(
    arm: Arm, rate: float, seed: int, settings: Mapping[str, int], folder: Path
) -> dict[str, float]:
    """Train from random weights, and test on modules that were not read."""
    model: Any = make_llama(seed)
    read, random = text(FILES), np.random.default_rng(seed)

    def loss(_: int) -> Tensor:
        found: Tensor = loss_at(model, read, random.integers(len(read) - CONTEXT, size=BATCH))
        return found

    train(model, arm.config(rate), loss, settings["steps"], weight_decay=0.1)
    unread = text(HELD_OUT)
    starts = np.linspace(0, len(unread) - CONTEXT, settings["test"], dtype=np.int64)
    with torch.no_grad():
        return {"loss": float(loss_at(model, unread, starts))}


def loss_at(model: Any, characters: Tensor, starts: Any) -> Tensor:
    """Mean loss of the stretches that start at these characters."""
    rows = torch.stack([characters[start : start + CONTEXT] for start in starts.tolist()])
    found: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
    return found


BLOCKWISE = Study(
    name="blockwise",
    title="Blockwise rates by component, a language model from scratch",
    short="a small Llama from scratch",
    question="Do the ratios of arXiv 2502.19002 train a language model faster?",
    setting=(
        "transformers Llama (4 blocks, width 64, tied embeddings, 222 thousand parameters) on the"
        " characters of eight modules of Python's standard library, 150 steps of 8 x 64 characters;"
        " loss on two other modules."
    ),
    arms=(
        Arm(name="uniform", what="one rate", config=block, measures=("flat",)),
        Arm(
            name="paper",
            what="norm 1, VO 4, FFN 6, QK 8, embedding 10",
            config=lambda rate: by_component(rate, PAPER),
            measures=("component_lr",),
        ),
        Arm(
            name="reverse",
            what="the reciprocals",
            config=lambda rate: by_component(rate, reverse()),
            measures=("component_lr",),
        ),
        Arm(
            name="norms only",
            what="norms train, all else is held still",
            config=lambda rate: only(rate, "re:norm"),
        ),
    ),
    baseline="uniform",
    control="norms only",
    pairs=(("paper", "reverse"),),
    metrics=(LOSS,),
    full=Size(
        seeds=5,
        rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        extensions=2,
        settings={"steps": 150, "test": 256},
    ),
    quick=Size(seeds=3, rates=(1e-3, 4e-3, 1.6e-2), settings={"steps": 2, "test": 8}),
    run=run_lm,
)
