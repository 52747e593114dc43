"""Studies on a vision transformer: layer decay with few labels, and which block to train.

timm's VisionTransformer on scikit-learn's 8x8 scans of handwriting. Each seed has its own weights,
its own split of the scans and its own few labels; all arms of a seed share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evidence_studies import Arm, Size, Study
from evidence_training import block, only, pretrained, train
from evidence_words import Metric

BLOCKS, WIDTH, BATCH = 6, 48, 64
PRETRAIN_RATE = 4e-3
FOUR = (3, 5, 8, 9)
"""Digits that are easily taken for each other: the four ways of the target task."""
LABELS = 5
"""Of each class."""
PRETRAIN, SHUFFLE, FEW = 1, 2, 3
"""Streams of random numbers of a seed."""
ACCURACY = Metric(name="accuracy", unit="%", higher_is_better=True)
FORGOTTEN = Metric(name="forgetting", unit="points", higher_is_better=False)
Settings = Mapping[str, int]
EVERYTHING: Settings = {}
QUICK = Size(
    seeds=3,
    rates=(1e-3, 4e-3, 1.6e-2),
    settings={"pretrain_steps": 5, "steps": 2, "every": 20},
    # A rehearsal has one of each kind.
    arms=("flat", "layer_decay 0.65", "last block", "blocks.0", "blocks.5", "scratch"),
)


@lru_cache(maxsize=1)
def scans() -> tuple[Tensor, Tensor]:
    """(images in [-1, 1], digits) of scikit-learn."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images.astype(np.float32) / 8 - 1)[:, None]
    return images, torch.from_numpy(bundle.target.astype(np.int64))


class Digits:
    """The scans of one seed, split into those to pretrain on, to finetune on and to test on."""

    def __init__(self, seed: int):
        """Split by the seed."""
        images, labels = scans()
        order = torch.from_numpy(np.random.default_rng([seed, SHUFFLE]).permutation(len(labels)))
        images, labels = images[order], labels[order]
        self.old = images[:900], labels[:900]
        self.old_test = images[900:1100], labels[900:1100]
        self.new = images[1100:], labels[1100:]

    def few(self, seed: int, digits: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(images, labels, test images, test labels) of a task with a few labels of each digit."""
        images, labels = self.new
        random = np.random.default_rng([seed, FEW])
        train_rows: list[int] = []
        test_rows: list[int] = []
        train_labels: list[int] = []
        test_labels: list[int] = []
        for label, digit in enumerate(digits):
            rows = random.permutation(np.flatnonzero(labels.numpy() == digit))
            train_rows.extend(rows[:LABELS])
            train_labels.extend([label] * LABELS)
            test_rows.extend(rows[LABELS:])
            test_labels.extend([label] * (len(rows) - LABELS))
        seen, unseen = images[np.array(train_rows)], images[np.array(test_rows)]
        return seen, torch.tensor(train_labels), unseen, torch.tensor(test_labels)


def make_vit(seed: int) -> nn.Module:
    """A ViT of random weights."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=4,
        mlp_ratio=2,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # timm's 0.02 suits a width of hundreds; here it would train slowly.
            nn.init.xavier_uniform_(module.weight)
    return model


def shifted(images: Tensor, random: np.random.Generator, noise: float) -> Tensor:
    """Images moved by up to a pixel each way, with noise."""
    top, left = (int(one) for one in random.integers(0, 3, 2))
    room = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    moved = room[:, :, top : top + 8, left : left + 8]
    drawn = random.standard_normal(tuple(images.shape), dtype=np.float32)
    return moved + noise * torch.from_numpy(drawn)


def start(seed: int, digits: Digits, settings: Settings, folder: Path) -> nn.Module:
    """The model pretrained on ten digits, with shifts and noise."""
    model = make_vit(seed)
    images, labels = digits.old
    random = np.random.default_rng([seed, PRETRAIN])

    def loss(_: int) -> Tensor:
        rows = torch.from_numpy(random.integers(len(labels), size=BATCH))
        return cross_entropy(model(shifted(images[rows], random, 0.3)), labels[rows])

    steps = settings["pretrain_steps"]
    file = folder / "pretrained" / f"vit_{seed}_{steps}.pt"
    pretrained(file, model, lambda: train(model, block(PRETRAIN_RATE), loss, steps))
    return model.eval()


@torch.no_grad()
def share_right(
    model: nn.Module, images: Tensor, labels: Tensor, settings: Settings = EVERYTHING
) -> float:
    """Accuracy in percent; a rehearsal tests on fewer images."""
    few = slice(None, None, settings.get("every", 1))
    images, labels = images[few], labels[few]
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def finetune(
    model: Any, arm: Arm, rate: float, seed: int, images: Tensor, labels: Tensor, steps: int
) -> None:
    """Train on the few images, with shifts and little noise; the same draws for every arm."""
    random = np.random.default_rng([seed, PRETRAIN, FEW])

    def loss(_: int) -> Tensor:
        found: Tensor = model(shifted(images, random, 0.1))
        return cross_entropy(found, labels)

    train(model, arm.config(rate), loss, steps)


def run_decay(
    arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Finetune on four mirrored digits with few labels; test on theirs, and on the old ten."""
    digits = Digits(seed)
    model: Any = start(seed, digits, settings, folder) if arm.pretrained else make_vit(seed)
    before = share_right(model, *digits.old_test, settings)
    old_head = model.head
    torch.manual_seed(seed)
    model.head = nn.Linear(WIDTH, len(FOUR))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    images, labels, unseen, answers = digits.few(seed, FOUR)
    finetune(model, arm, rate, seed, images.flip(3), labels, settings["steps"])
    accuracy = share_right(model, unseen.flip(3), answers, settings)
    model.head = old_head
    return {
        "accuracy": accuracy,
        "forgetting": before - share_right(model, *digits.old_test, settings),
    }


def run_surgical(
    inverted: bool, arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Finetune on all ten digits: contrast inverted, or each called by another's name."""
    digits = Digits(seed)
    model = start(seed, digits, settings, folder) if arm.pretrained else make_vit(seed).eval()
    images, labels, unseen, answers = digits.few(seed, tuple(range(10)))
    if inverted:
        images, unseen = -images, -unseen
    else:
        # Every digit gets another's name: no label is right before training.
        labels, answers = (labels + 1) % 10, (answers + 1) % 10
    finetune(model, arm, rate, seed, images, labels, settings["steps"])
    return {"accuracy": share_right(model, unseen, answers, settings)}


def decay(rate: float, of: float) -> dict[str, Any]:
    """Layer decay as BEiT counts layers."""
    return block(rate, depth_strategy="layer_decay", layer_decay=of, convention="beit")


_DECAYS = tuple(
    Arm(
        name=f"layer_decay {of:g}",
        what=f"`layer_decay` {of:g}, `convention: beit`",
        config=partial(decay, of=of),
        measures=("layer_decay",),
    )
    for of in (0.9, 0.75, 0.65, 0.5)
)
_LAST = ("blocks.5", "norm", "head")
LAYER_DECAY = Study(
    name="layer_decay",
    title="Layer decay with few labels",
    short="a pretrained ViT, 5 labels per class",
    question="Does slowing the first blocks help a pretrained model that has few labels?",
    setting=(
        "timm VisionTransformer (6 blocks, width 48, patch 2) on scikit-learn's 8x8 digits,"
        " pretrained on 900 scans of ten digits with shifts and noise, finetuned on a four-way task"
        " (mirrored 3, 5, 8, 9) with 5 labels per class; accuracy on unseen mirrored scans,"
        " forgetting on the old ten digits under the old head."
    ),
    arms=(
        Arm(name="flat", what="one rate", config=block, measures=("flat",)),
        *_DECAYS,
        Arm(
            name="last block",
            what="last block, final norm and head; the rest held still",
            config=lambda rate: only(rate, *_LAST),
        ),
        Arm(name="scratch", what="one rate, random weights", config=block, pretrained=False),
        Arm(
            name="scratch, layer_decay 0.65",
            what="`layer_decay` 0.65, random weights",
            config=partial(decay, of=0.65),
            measures=("layer_decay",),
            pretrained=False,
        ),
    ),
    baseline="flat",
    control="scratch",
    pairs=(("scratch, layer_decay 0.65", "scratch"),),
    metrics=(ACCURACY, FORGOTTEN),
    full=Size(
        seeds=20,
        rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        extensions=2,
        settings={"pretrain_steps": 800, "steps": 60},
    ),
    quick=QUICK,
    run=run_decay,
)


def only_part(rate: float, part: str) -> dict[str, Any]:
    """One part trains."""
    return only(rate, part)


def _surgical(name: str, title: str, short: str, inverted: bool) -> Study:
    parts = ("blocks.0", "blocks.2", "blocks.5")
    arms = [Arm(name="flat", what="one rate, all trained", config=block, measures=("flat",))]
    for part in parts:
        what = f"only `{part}` trains"
        arms.append(Arm(name=part, what=what, config=partial(only_part, part=part)))
    arms.append(
        Arm(name="scratch", what="one rate, random weights", config=block, pretrained=False)
    )
    return Study(
        name=name,
        title=title,
        short=f"a ViT, one block at a time, {short}",
        question="Which block of a pretrained model should train, if one alone may?",
        setting=(
            "The ViT of the layer-decay study, finetuned on ten digits with 5 labels per class,"
            f" one block at a time; {short}."
        ),
        arms=tuple(arms),
        baseline="flat",
        control="scratch",
        pairs=(("blocks.0", "blocks.5"),),
        metrics=(ACCURACY,),
        full=Size(
            seeds=5,
            rates=(2e-3, 8e-3, 3.2e-2),
            extensions=1,
            settings={"pretrain_steps": 800, "steps": 120},
        ),
        quick=QUICK,
        run=partial(run_surgical, inverted),
    )


SURGICAL_INPUT = _surgical(
    "surgical_input", "Surgical: the input changed", "the contrast is inverted", True
)
SURGICAL_LABELS = _surgical(
    "surgical_labels", "Surgical: the labels changed", "each digit has another's name", False
)
