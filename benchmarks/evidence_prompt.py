"""A study of a new prompt word: it must change what it stands for, and nothing else.

The word is a third token behind the two of a clip's prompt; clips that carry it have their contrast
inverted. Clips without it must stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evidence_studies import Arm, Size, Study
from evidence_wan import (
    FEW,
    FLAT,
    LOSS,
    OLD,
    PRETRAINED,
    QUICK,
    SCRATCH,
    TEST,
    Clips,
    Settings,
    clips,
    component_arms,
    curve_arms,
    finetune,
    make_wan,
    numbers_of,
    stacked,
    start,
    tested,
)
from evidence_words import Metric
from launch.trainer.data.digits import MovingDigits

LEAKED = Metric(
    name="leakage", unit="rise of the loss of clips without the word", higher_is_better=False
)
_WORD_STREAM = 3
"""Of a seed's random numbers: the embedding of the new word."""


def worded(data: MovingDigits, numbers: Sequence[int], seed: int) -> Clips:
    """Clips with the new word in their prompts, and what it stands for in their pictures."""
    batch = stacked(data, numbers)
    prompts = batch["prompt_embeds"]
    generator = torch.Generator().manual_seed(1000 * _WORD_STREAM + seed)
    word = torch.randn(prompts.shape[-1], generator=generator).expand(len(numbers), 1, -1)
    return {"latents": -batch["latents"], "prompt_embeds": torch.cat([prompts, word], dim=1)}


def run_word(
    arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Finetune in full on few clips with the word; test on unseen ones, and on clips without."""
    data = clips(seed)
    model = start(seed, settings, folder) if arm.pretrained else make_wan(seed).eval()
    numbers = numbers_of(data, OLD)
    # What pretraining leaves out: half of it to train on and to test with the word, half without.
    half = settings["test"] // 2
    plain = stacked(data, numbers[half : settings["test"]])
    before = tested(model, plain)
    finetune(model, arm, rate, seed, worded(data, numbers[: FEW // 2], seed), settings)
    unseen = worded(data, numbers[FEW // 2 : half], seed)
    return {"loss": tested(model, unseen), "leakage": tested(model, plain) - before}


WORD = Study(
    name="word",
    title="A new prompt word, full finetune",
    short="a small Wan, a new prompt word",
    question="Which rates teach a new word without changing what prompts without it give?",
    setting=(
        f"{PRETRAINED}, finetuned in full on {FEW // 2} clips of inverted contrast whose prompts"
        f" have a new word; loss on {(TEST - FEW) // 2} unseen clips with the word, leakage on"
        f" {TEST // 2} clips without it."
    ),
    arms=(FLAT, *curve_arms(), *component_arms(), SCRATCH),
    baseline="flat",
    control="scratch",
    pairs=(("linear", "reversed linear"), ("attention x3", "ffn x3")),
    metrics=(LOSS, LEAKED),
    full=Size(
        seeds=10,
        rates=(2e-4, 4e-4, 8e-4, 1.6e-3),
        extensions=2,
        settings={"pretrain_steps": 600, "steps": 60, "test": TEST},
    ),
    quick=QUICK,
    run=run_word,
)
