"""Everything a run leaves behind in its output folder."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from dist_layerlr import export_weights
from dist_layerlr.checkpoint.folders import CHECKPOINTS, complete
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.entries import Plan
from dist_layerlr.weights import find_not_finite
from launch.trainer.data.base import Dataset
from launch.trainer.engines.base import Engine
from launch.trainer.families.base import Family
from launch.trainer.loop import LOWER, autocast, stack_samples
from launch.trainer.objectives.flow import sample
from launch.trainer.options import LORA, RunOptions
from launch.trainer.runtime import Diverged, Runtime

_WRITTEN = (
    "plan.json",
    "verify.json",
    "metrics.jsonl",
    "lr_grid.png",
    "samples/samples.png",
    "final/adapter_config.json",
    "final/config.json",
    "final/diffusion_pytorch_model*.safetensors*",
    "final/adapter_model.safetensors",
)
"""Every file that a run may leave in its output folder."""


_LOCKS: dict[Path, IO[str]] = {}
"""{output folder: open lock file}; a lock goes with the process, however it ends."""


def open_output_dir(path: str | Path, model_path: str, *, probe: bool) -> Path:
    """Create the output folder.

    With ``probe`` (the rank that writes), make sure that all files can be written.

    Raises:
        ConfigError: it cannot be created or written to, another run writes to it, or the model that
            is trained lies in it.
    """
    folder = Path(path)
    if (folder / "final").resolve() == Path(model_path).resolve():
        raise ConfigError(
            f"Invalid --output-dir {str(path)!r}: model_path is its final/. Choose another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if probe:
            _lock(folder)
            _probe(folder)
    except OSError as error:
        what = f"{error.strerror}: {str(error.filename)!r}"
        raise ConfigError(
            f"Cannot write to --output-dir {str(path)!r}: {what}. Choose another folder."
        ) from None
    return folder


def _lock(folder: Path) -> None:
    """Keep a second run out of the folder for as long as this process lives.

    Raises:
        ConfigError: there is one.
    """
    if folder.resolve() in _LOCKS:
        return
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"Invalid --output-dir {str(folder)!r}: another run is writing to it. Wait for it, or"
            " choose another folder."
        ) from None
    _LOCKS[folder.resolve()] = file


def _probe(folder: Path) -> None:
    for place in (folder, folder / "samples", folder / "final", folder / CHECKPOINTS):
        if place == folder or place.exists():
            (place / ".probe").write_text("")
            (place / ".probe").unlink()
    for path in _left(folder):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def check_fresh(folder: Path) -> None:
    """Refuse to start from scratch beside the checkpoints of another run: they would be mixed, or
    lost.

    Raises:
        ConfigError: there are some.
    """
    if complete(folder / CHECKPOINTS):
        raise ConfigError(
            f"Invalid --output-dir {str(folder)!r}: it holds checkpoints of an earlier run. "
            "Continue it with --resume latest, choose another folder, or delete its checkpoints/."
        )


def remove_previous_run(folder: Path) -> None:
    """Remove what an earlier run left in the folder, so that no two runs mix.

    Files of others stay.
    """
    for path in _left(folder):
        path.unlink()


def _left(folder: Path) -> list[Path]:
    return [path for pattern in _WRITTEN for path in folder.glob(pattern)]


def draw_plan(plan: Plan, folder: Path) -> None:
    """Write lr_grid.png."""
    from dist_layerlr.report.heatmap import draw_grid

    draw_grid(plan, folder / "lr_grid.png")


def save_weights(
    engine: Engine, plan: Plan, options: RunOptions, runtime: Runtime, folder: Path, step: int
) -> Path:
    """Write the trained weights under original names. Collective.

    A full finetune becomes a diffusers model folder, a LoRA a PEFT adapter folder. The plan's
    digest and the step are in the safetensors metadata.

    Returns:
        The weights file, the first where there are several.

    Raises:
        Diverged: a weight is NaN or infinite; nothing is written.
    """
    runtime.agree(lambda: _check_finite(engine.model, step))
    return export_weights(
        engine.model,
        folder / "final",
        format="peft" if options.training_method == LORA else "diffusers",
        metadata={"plan_digest": plan.digest, "step": str(step)},
        base=options.model_path,
    )[0]


def draw_generated(
    engine: Engine,
    family: Family,
    data: Dataset,
    options: RunOptions,
    runtime: Runtime,
    folder: Path,
) -> Path | None:
    """Generate clips for the first prompts and draw them beside the real ones.

    Collective: the forward pass is.
    """
    from launch.trainer.samples import draw_samples

    count = min(options.samples.count, len(data))
    if count == 0:
        return None
    batch = runtime.agree(lambda: stack_samples(data, list(range(count))))
    moved = {key: value.to(runtime.device) for key, value in batch.items()}
    engine.model.eval()

    def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
        with autocast(noisy.device.type, options):
            return family.velocity(engine.model, noisy, timestep, moved)

    with torch.no_grad():
        made = sample(
            velocity,
            tuple(batch["latents"].shape),
            options.train.seed,
            options.samples.steps,
            runtime.device,
        )
    engine.model.train()
    path = folder / "samples" / "samples.png"
    if runtime.is_main:
        draw_samples(path, made.cpu(), batch["latents"], [data.name(i) for i in range(count)])
    return path


def _check_finite(model: nn.Module, step: int) -> None:
    name = find_not_finite(model)
    if name is not None:
        raise Diverged(
            f"{name} holds NaN or infinity after {step} steps; nothing is saved. {LOWER}"
        )
