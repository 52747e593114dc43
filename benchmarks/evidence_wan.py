"""Studies on a diffusion transformer: depth direction, presets and LoRA+.

diffusers' WanTransformer3DModel as the quickstart builds it, narrower, on the quickstart's moving
digits. Each seed has its own weights and clips; all arms of a seed share them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dist_layerlr.plan.presets import PRESETS
from evidence_studies import Arm, Size, Study
from evidence_training import block, pretrained, train
from evidence_words import Metric
from launch.make_tiny_wan import build
from launch.trainer.data.digits import MovingDigits
from launch.trainer.objectives.flow import make_flow_batch, sample
from launch.trainer.objectives.sigma import SigmaDistribution

BLOCKS, BATCH, FEW = 6, 32, 12
"""Blocks of the network, clips of a step of pretraining, clips to finetune on."""
PRETRAIN_RATE = 3e-3
FLOOR = 0.3
RAISED = 3.0
OLD, NEW = tuple(range(8)), (8, 9)
SIZES = {"layers": BLOCKS, "heads": 2, "head_dim": 32, "ffn_mult": 4, "channels": 1, "patch": 6}
LORA = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
TEST = 64
"""Clips to test on."""
TESTED = 10**6
"""Sample numbers from here on draw noise that no training step drew."""
DRAW = SigmaDistribution(shift=1.5).draw_sigma
LOSS = Metric(name="loss", unit="mean squared error", higher_is_better=False)
FORGOTTEN = Metric(name="forgetting", unit="rise of the old clips' loss", higher_is_better=False)
Settings = Mapping[str, int]
Clips = dict[str, Tensor]


@lru_cache(maxsize=2)
def clips(seed: int, count: int = 1600) -> MovingDigits:
    """The clips of a seed: many scans and starting places, so that few of them are alike."""
    return MovingDigits(clips=count, scans_per_digit=8, starts=4, seed=seed)


def stacked(data: MovingDigits, numbers: Sequence[int]) -> Clips:
    """Some clips as a batch."""
    found = [data[number] for number in numbers]
    return {key: torch.stack([one[key] for one in found]) for key in found[0]}


@lru_cache(maxsize=4)
def numbers_of(data: MovingDigits, digits: tuple[int, ...]) -> list[int]:
    """Numbers of the clips that show one of these digits, each clip once."""
    seen, found = set(), []
    for number in range(len(data)):
        clip = data.clip(number)
        if clip.digit in digits and clip not in seen:
            seen.add(clip)
            found.append(number)
    return found


def make_wan(seed: int) -> nn.Module:
    """A Wan of random weights."""
    return build(argparse.Namespace(**SIZES, text_dim=32, freq_dim=64, seed=seed))


def loss_of(model: Any, batch: Clips, numbers: Sequence[int], seed: int) -> Tensor:
    """The flow-matching loss of a batch, with the noise of these sample numbers."""
    flow = make_flow_batch(batch["latents"], numbers, seed, DRAW)
    assert isinstance(flow.target, Tensor), "stacked clips have a stacked target"
    return mse_loss(velocity(model, batch, flow.noisy, flow.timestep), flow.target)


def velocity(model: Any, batch: Clips, noisy: Any, timestep: Tensor) -> Tensor:
    """The network's answer."""
    found: Tensor = model(
        hidden_states=noisy,
        timestep=timestep,
        encoder_hidden_states=batch["prompt_embeds"],
        return_dict=False,
    )[0]
    return found


@torch.no_grad()
def tested(model: nn.Module, batch: Clips) -> float:
    """The loss of clips, each under two draws of noise that are the same for every arm."""
    count = len(batch["latents"])
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    return float(loss_of(model, twice, range(TESTED, TESTED + 2 * count), 0))


def start(seed: int, settings: Settings, folder: Path) -> nn.Module:
    """The model pretrained on clips of the digits 0 to 7."""
    model, data = make_wan(seed), clips(seed)
    random = np.random.default_rng([seed, 1])

    def loss(step: int) -> Tensor:
        batch = stacked(data, random.choice(numbers_of(data, OLD)[TEST:], BATCH).tolist())
        return loss_of(model, batch, range(step * BATCH, (step + 1) * BATCH), seed)

    steps = settings["pretrain_steps"]
    file = folder / "pretrained" / f"wan_{seed}_{steps}.pt"
    pretrained(file, model, lambda: train(model, block(PRETRAIN_RATE), loss, steps))
    return model.eval()


def finetune(
    model: nn.Module, arm: Arm, rate: float, seed: int, few: Clips, settings: Settings
) -> None:
    """Train on the few clips, all of them in every step."""
    count = len(few["latents"])

    def loss(step: int) -> Tensor:
        return loss_of(model, few, range(step * count, (step + 1) * count), seed + 1000)

    train(model, arm.config(rate), loss, settings["steps"])


def tuned_full(
    arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> tuple[nn.Module, float]:
    """(the model finetuned in full on a few clips of 8 and 9, its loss on old clips before)."""
    data = clips(seed)
    model = start(seed, settings, folder) if arm.pretrained else make_wan(seed).eval()
    before = tested(model, old_clips(data, settings))
    few = stacked(data, numbers_of(data, NEW)[:FEW])
    finetune(model, arm, rate, seed, few, settings)
    return model, before


def old_clips(data: MovingDigits, settings: Settings) -> Clips:
    """Clips of the old digits that pretraining leaves out."""
    return stacked(data, numbers_of(data, OLD)[: settings["test"]])


def run_depth(
    arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Finetune in full on 8 and 9; test on unseen clips of these, and on the old digits."""
    model, before = tuned_full(arm, rate, seed, settings, folder)
    data = clips(seed)
    unseen = stacked(data, numbers_of(data, NEW)[FEW : FEW + settings["test"]])
    after = tested(model, old_clips(data, settings))
    return {"loss": tested(model, unseen), "forgetting": after - before}


def run_lora(
    arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Train a LoRA on a style, dark strokes on a bright ground; test on unseen clips of it."""
    from peft import LoraConfig, inject_adapter_in_model

    data = clips(seed)
    model = start(seed, settings, folder) if arm.pretrained else make_wan(seed).eval()
    numbers = numbers_of(data, OLD)
    few, unseen = stacked(data, numbers[:FEW]), stacked(data, numbers[FEW : settings["test"]])
    few["latents"], unseen["latents"] = -few["latents"], -unseen["latents"]
    model.requires_grad_(False)
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=list(LORA)), model)
    finetune(model, arm, rate, seed, few, settings)
    return {"loss": tested(model, unseen)}


def curve(rate: float, strategy: str, **more: Any) -> dict[str, Any]:
    """One rate times a depth curve."""
    return block(rate, depth_strategy=strategy, **more)


def scaled_preset(rate: float, preset: str) -> dict[str, Any]:
    """A preset with all its rates multiplied, so that self attention's is the base rate."""
    given = PRESETS[preset]["component_lr"]
    lrs = {name: rate * lr / given["self_attn"] for name, lr in given.items()}
    shape = {"enabled": True, "preset": preset, "component_lr": lrs, "default_lr": rate}
    return {"learning_rate": rate, "per_layer_lr": {**shape, "unmatched": "default"}}


def _preset_arms(names: Sequence[str]) -> list[Arm]:
    arms = []
    for name in names:
        what = f"preset `{name}`, its rates scaled together"
        config = partial(scaled_preset, preset=name)
        arms.append(Arm(name=name, what=what, config=config, measures=(name,)))
    return arms


def curve_arms() -> list[Arm]:
    """Arms of one rate times a curve over the depth."""
    rising = [FLOOR + (1 - FLOOR) * i / (BLOCKS - 1) for i in range(BLOCKS)]
    curves: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("linear", {"min_depth_factor": FLOOR}),
        "cosine": ("cosine", {"min_depth_factor": FLOOR}),
        "inverted_u": ("inverted_u", {"min_depth_factor": FLOOR}),
        "inverted_u, early": ("inverted_u", {"min_depth_factor": FLOOR, "peak_position": 0.2}),
        "inverted_u, late": ("inverted_u", {"min_depth_factor": FLOOR, "peak_position": 0.8}),
        "reversed linear": ("table", {"depth_table": rising}),
        "layer_decay 0.8": ("layer_decay", {"layer_decay": 0.8}),
    }
    arms = []
    for name, (strategy, more) in curves.items():
        what = f"`{strategy}`" + (f", floor {FLOOR}" if "min_depth_factor" in more else "")
        what += f", peak {more['peak_position']}" if "peak_position" in more else ""
        config = partial(curve, strategy=strategy, **more)
        arms.append(Arm(name=name, what=what, config=config, measures=(strategy,)))
    return arms


def raised(rate: float, components: Sequence[str]) -> dict[str, Any]:
    """Some components three times as fast as the rest."""
    return block(rate, component_lr={name: RAISED * rate for name in components})


def component_arms() -> list[Arm]:
    """Arms that raise a part of every block, which lowers the rest as the base rate is swept."""
    arms = []
    parts = {"attention": ("self_attn", "cross_attn"), "ffn": ("ffn",)}
    for name, components in parts.items():
        what = f"{', '.join(f'`{one}`' for one in components)} at {RAISED:g} times the rest"
        config = partial(raised, components=components)
        arms.append(
            Arm(name=f"{name} x{RAISED:g}", what=what, config=config, measures=("component_lr",))
        )
    return arms


FLAT = Arm(name="flat", what="one rate", config=block, measures=("flat",))
SCRATCH = Arm(name="scratch", what="one rate, random weights", config=block, pretrained=False)
PRETRAINED = (
    "diffusers WanTransformer3DModel as the quickstart builds it (6 blocks, width 64, patch 6),"
    " pretrained on moving digits 0 to 7"
)
QUICK = Size(
    seeds=3,
    rates=(1e-3, 4e-3, 1.6e-2),
    settings={"pretrain_steps": 2, "steps": 2, "test": 14},
    # A rehearsal has one of each kind.
    arms=(
        "flat",
        "linear",
        "reversed linear",
        "full_finetune",
        "attention x3",
        "LoRA+ 16",
        "style_lora",
        "advised",
        "scratch",
    ),
)


def draw_samples(best: Mapping[str, float], settings: Settings, folder: Path, file: Path) -> None:
    """Draw what each arm generates at its best rate, below the real clips, for seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = clips(0)
    shown = stacked(data, numbers_of(data, NEW)[FEW : FEW + 4])
    rows = {"real": shown["latents"]}
    for name, rate in best.items():
        model, _ = tuned_full(DEPTH.arm(name), rate, 0, settings, folder)
        answer = partial(velocity, model, shown)
        rows[name] = sample(answer, shown["latents"].shape, 0, 20, "cpu", shift=2.0)
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(8, 0.75 * len(rows)))
    for axis, (name, latents) in zip(axes, rows.items(), strict=True):
        # Frames of a clip beside each other, then the next clip, with a gap of two columns.
        strip = nn.functional.pad(latents[:, 0, ::2], (1, 1), value=1.0)
        axis.imshow(torch.cat(list(strip.flatten(0, 1)), dim=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


DEPTH = Study(
    name="depth",
    title="Depth direction on a diffusion transformer, full finetune",
    short="a small Wan, few clips of two new digits",
    question="Should the first or the last blocks be fast, when few clips teach something new?",
    setting=(
        f"{PRETRAINED}, finetuned in full on {FEW} clips of 8 and 9; loss on 64 unseen clips of"
        " 8 and 9, forgetting on 64 clips of the old digits."
    ),
    arms=(FLAT, *curve_arms(), *component_arms(), *_preset_arms(["full_finetune"]), SCRATCH),
    baseline="flat",
    control="scratch",
    pairs=(("linear", "reversed linear"),),
    metrics=(LOSS, FORGOTTEN),
    full=Size(
        seeds=10,
        rates=(2e-4, 4e-4, 8e-4, 1.6e-3),
        extensions=2,
        settings={"pretrain_steps": 600, "steps": 60, "test": TEST},
    ),
    quick=QUICK,
    run=run_depth,
    picture=draw_samples,
)
_PLUS = tuple(
    Arm(
        name=f"LoRA+ {ratio}",
        what=f"`lora_plus_ratio` {ratio}",
        config=partial(block, lora_plus_ratio=ratio),
        measures=("lora_plus_ratio",),
    )
    for ratio in (4, 16)
)
LORA_STYLE = Study(
    name="lora",
    title="LoRA+ and the LoRA presets on a style",
    short="a LoRA of a small Wan, a new style",
    question="Do LoRA+ or the presets for LoRA beat one rate?",
    setting=(
        f"{PRETRAINED}; a LoRA of rank 8 on {FEW} clips of inverted contrast; loss on 52 unseen"
        " clips of inverted contrast."
    ),
    arms=(
        FLAT,
        *_PLUS,
        *(arm for arm in curve_arms() if arm.name in ("reversed linear", "layer_decay 0.8")),
        *_preset_arms(
            ["style_lora", "subject_lora", "concept_lora", "component_only", "conservative"]
        ),
        SCRATCH,
    ),
    baseline="flat",
    control="scratch",
    metrics=(LOSS,),
    full=Size(
        seeds=10,
        rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        extensions=2,
        settings={"pretrain_steps": 600, "steps": 60, "test": TEST},
    ),
    quick=QUICK,
    run=run_lora,
)
