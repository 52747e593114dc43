"""Everything a run leaves behind in its output folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from dist_layerlr import export_weights
from dist_layerlr.checkpoint.folders import CHECKPOINTS, complete
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike
from dist_layerlr.weights import find_not_finite
from launch.trainer.data.base import LATENTS, to_device
from launch.trainer.engines.base import autocast
from launch.trainer.job import Job
from launch.trainer.options import LORA
from launch.trainer.runtime import LOWER, Diverged

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
_LOCKS: dict[Path, FileLock] = {}
"""{output folder: its lock}. Held here because a FileLock lets go when it is collected; the
operating system takes the lock back when the process ends, however it ends."""


def open_output_dir(path: str | Path, model_path: str, *, probe: bool) -> Path:
    """Create the output folder.

    With ``probe`` (the rank that writes), make sure that all files can be written.

    Raises:
        ConfigError: it cannot be created or written to, another run writes to it, or the model that
            is trained lies in it.
    """
    folder = Path(path)
    # remove_previous_run would delete the model before it is read.
    if (folder / "final").resolve() == Path(model_path).resolve():
        raise ConfigError(
            f"Invalid --output-dir {str(path)!r}: model_path is its final/. Choose another folder."
        )
    try:
        # Every rank, because on several machines each may have a disk of its own.
        folder.mkdir(parents=True, exist_ok=True)
        if probe:
            # The lock first: probing must not disturb another run's files.
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
    lock = FileLock(folder / ".lock")
    try:
        # Not blocking: a run that waits for hours looks like one that hangs.
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"Invalid --output-dir {str(folder)!r}: another run is writing to it. Wait for it, or"
            " choose another folder."
        ) from None
    _LOCKS[folder.resolve()] = lock


def _probe(folder: Path) -> None:
    """Write and remove a file wherever the run will write, and look for folders in the way."""
    # Folders that do not exist yet can be made if their parent takes a file.
    for place in (folder, folder / "samples", folder / "final", folder / CHECKPOINTS):
        if place == folder or place.exists():
            (place / ".probe").write_text("")
            (place / ".probe").unlink()
    for path in _left(folder):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def check_fresh(folder: Path) -> None:
    """Refuse to start from scratch beside another run's checkpoints, which would be lost or mixed.

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


def save_weights(job: Job, step: int) -> Path:
    """Write the trained weights under original names. Collective.

    A full finetune becomes a diffusers model folder, a LoRA a PEFT adapter folder. The plan's
    digest and the step are in the safetensors metadata.

    Returns:
        The weights file, the first where there are several.

    Raises:
        Diverged: a weight is NaN or infinite; nothing is written.
    """
    # The last step may break what no later loss will show.
    alike(lambda: _check_finite(job.engine.model, step))
    return export_weights(
        job.engine.model,
        job.folder / "final",
        format="peft" if job.options.training_method == LORA else "diffusers",
        metadata={"plan_digest": job.plan.digest, "step": str(step)},
        base=job.options.model_path,
    )[0]


def draw_generated(job: Job) -> Path | None:
    """Generate clips for the first prompts and draw them beside the real ones.

    Collective: the forward pass is. None where the objective has nothing to draw.
    """
    from launch.trainer.samples import draw_samples

    options, device, model = job.options, job.runtime.device, job.engine.model
    count = min(options.samples.count, len(job.data))
    if count == 0:
        return None
    batch = alike(lambda: job.family.collate([job.data[index] for index in range(count)]))
    # Dropout and the like are for training; generate() runs the forward pass alone.
    model.eval()
    with torch.no_grad(), autocast(device, options):
        made = job.family.objective.generate(
            model, to_device(batch, device), options.train.seed, options.samples.steps
        )
    model.train()
    if made is None:
        return None
    path = job.folder / "samples" / "samples.png"
    if job.runtime.is_main:
        labels = [job.data.name(index) for index in range(count)]
        draw_samples(path, made.cpu(), batch[LATENTS], labels)
    return path


def _check_finite(model: nn.Module, step: int) -> None:
    name = find_not_finite(model)
    if name is not None:
        raise Diverged(
            f"{name} holds NaN or infinity after {step} steps; nothing is saved. {LOWER}"
        )
