"""Everything a run leaves behind in its output folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_layerlr import export_weights
from dist_layerlr.checkpoint import CHECKPOINTS, complete_checkpoints
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.export import adapter_formats
from dist_layerlr.files import read_safetensors_header, sync_folder, write_json, write_text
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import unwrap
from dist_layerlr.weights import find_not_finite
from launch.trainer.batches import empty_prompt
from launch.trainer.card import metadata, write_card
from launch.trainer.data.base import LATENTS, Batch, to_device
from launch.trainer.data.order import one_batch
from launch.trainer.ema import averaged
from launch.trainer.engines.base import autocast
from launch.trainer.families.base import HasFiles, live_config
from launch.trainer.families.diffusion import Diffusion
from launch.trainer.job import Job
from launch.trainer.lock import hold
from launch.trainer.objectives import FitsPipeline
from launch.trainer.options import LORA
from launch.trainer.pipelines import load_pipeline, pipeline_of, sample_by_pipeline
from launch.trainer.record import RECORD, RESOLVED
from launch.trainer.runlog import LOG
from launch.trainer.runtime import LOWER, Diverged
from launch.trainer.team import Team

PLAN, PROOF, METRICS = "plan.json", "verify.json", "metrics.jsonl"
FINAL, PAGE = "final", "page.html"
_NEW, _OLD = ".new", ".old"
"""Endings of a result's name while it is written, and while it is replaced."""
_PER_RUN = (
    PLAN,
    PROOF,
    METRICS,
    "lr_grid.png",
    PAGE,
    "samples/samples.png",
    "samples/step_*.png",
    RESOLVED,
    RECORD,
    LOG,
)
"""What a run writes on its way. A new run begins with none of an earlier one's."""
_IN_FINAL = (
    PLAN,
    PROOF,
    "adapter_config.json",
    "config.json",
    "diffusion_pytorch_model*.safetensors*",
    "model*.safetensors*",
    "*.pth",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
"""What a run's result consists of. It stays until the next one is complete."""


def open_output_dir(
    path: str | Path, model_path: str, *, probe: bool, say: Callable[[str], None] = print
) -> Path:
    """Create the output folder.

    With ``probe`` (the rank that writes), make sure that all files can be written.

    Args:
        path: The folder.
        model_path: Of the model that is trained.
        probe: Whether this rank writes.
        say: Tells the user what is waited for.

    Raises:
        ConfigError: it cannot be created or written to, another run writes to it, or the model that
            is trained lies in it.
    """
    folder = Path(path)
    # The weights that are trained would replace the model that they are trained from.
    model = Path(model_path).resolve()
    if (folder / FINAL).resolve() in (model, model.parent):
        raise ConfigError(
            f"Invalid --output-dir {str(path)!r}: model_path is its final/. Choose another folder."
        )
    try:
        # Every rank, because on several machines each may have a disk of its own.
        folder.mkdir(parents=True, exist_ok=True)
        if probe:
            # The lock first: probing must not disturb another run's files.
            hold(folder, say)
            for final in (folder / FINAL, *_networks(folder / FINAL)):
                _mend(final)
            _probe(folder)
    except OSError as error:
        what = f"{error.strerror}: {str(error.filename)!r}"
        raise ConfigError(
            f"Cannot write to --output-dir {str(path)!r}: {what}. Choose another folder."
        ) from None
    return folder


def _probe(folder: Path) -> None:
    """Write and remove a file wherever the run will write, and look for folders in the way."""
    # Folders that do not exist yet can be made if their parent takes a file.
    for place in (folder, folder / "samples", folder / FINAL, folder / CHECKPOINTS):
        if place == folder or place.exists():
            (place / ".probe").write_text("")
            (place / ".probe").unlink()
    for path in [*_found(folder, _PER_RUN), *_found(folder / FINAL, _IN_FINAL)]:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def check_fresh(folder: Path) -> None:
    """Refuse to start from scratch beside another run's checkpoints, which would be lost or mixed.

    Raises:
        ConfigError: there are some.
    """
    if complete_checkpoints(folder / CHECKPOINTS):
        raise ConfigError(
            f"Invalid --output-dir {str(folder)!r}: it holds checkpoints of an earlier run. "
            "Continue it with --resume latest, choose another folder, or delete its checkpoints/."
        )


def remove_previous_run(folder: Path) -> None:
    """Remove what an earlier run wrote on its way, so that no two runs mix.

    Its result, ``final/``, stays until this one's is complete. Files of others stay.
    """
    for path in _found(folder, _PER_RUN):
        path.unlink()


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def draw_plan(plan: Plan, folder: Path) -> None:
    """Write lr_grid.png."""
    from dist_layerlr.report import draw_grid

    draw_grid(plan, folder / "lr_grid.png")


def write_pages(team: Team) -> None:
    """Write the page of each network: its map, what was measured, the proof. Collective."""
    from dist_layerlr.report import page, plan_data, run_data

    def write() -> None:
        for name, job in team.jobs.items():
            data = {**plan_data(job.plan), **run_data(team.face.folder, job.folder)}
            title = f"{job.options.model_type} {name}: {team.face.folder.name}"
            write_text(job.folder / PAGE, page(data, title.replace(" :", ":")))

    alike(lambda: write() if team.face.runtime.is_main else None)


def save_result(job: Job, step: int, proof: dict[str, Any]) -> Path:
    """Write the trained weights under original names, with plan and proof beside them. Collective.

    A full finetune becomes a model folder of the family's library. A LoRA becomes a PEFT adapter
    folder, with the file that ``pipe.load_lora_weights`` takes where the model's pipeline has it.
    The plan's digest, the step and the run are in the safetensors metadata.

    Args:
        job: What was trained.
        step: Optimizer steps done.
        proof: Content of ``verify.json``.

    Returns:
        The weights file, the first where there are several.

    Raises:
        Diverged: a weight is NaN or infinite; nothing is written.
        ConfigError: it cannot be written; the result that was there is unchanged.
    """
    # The last step may break what no later loss will show.
    alike(lambda: _check_finite(job.engine.model, step))
    final, main = final_of(job), job.runtime.is_main
    staged = _staged(final)
    # What a killed run has left behind is in the way.
    alike(lambda: shutil.rmtree(staged, ignore_errors=True) if main else None)
    files: list[Path] = []
    for form in _forms(job):
        files += export_weights(
            job.engine.model,
            staged,
            format=form,
            metadata={**metadata(job, step), **_identity(job, step)},
            base=job.options.model_path,
        )
    alike(lambda: _complete(job, step, proof) if main else None)
    return final / files[0].name


def final_of(job: Job) -> Path:
    """Where a job's result goes: ``final/``, or the sub-folder of its network there."""
    if not job.network:
        return job.folder / FINAL
    return job.folder.parent / FINAL / job.network


def _forms(job: Job) -> tuple[str, ...]:
    """The formats of a result, that by which it is known first."""
    if job.options.training_method != LORA:
        return (job.family.weights_format,)
    offered = adapter_formats(job.engine.model)
    return tuple(form for form in ("peft", "pipeline") if form in offered)


def _identity(job: Job, step: int) -> dict[str, str]:
    """What ``holds_result`` looks for."""
    return {"plan_digest": job.plan.digest, "step": str(step), "run": job.run_id}


def _complete(job: Job, step: int, proof: dict[str, Any]) -> None:
    """Put the staged result in the place of the one that was there."""
    final = final_of(job)
    try:
        _write_beside(job, _staged(final))
        write_card(job, _staged(final), final, step, proof)
        for folder in (job.folder, _staged(final)):
            write_json(folder / PROOF, proof)
            write_text(folder / PLAN, job.plan.to_json() + "\n")
        _swap(final)
        if job.network:
            # Of an earlier run of one network: beside two they would be a third.
            for path in _found(final.parent, _IN_FINAL):
                path.unlink()
    except OSError as error:
        raise ConfigError(
            f"Cannot write {str(error.filename)!r}: {error.strerror}. The final/ that was there is"
            " unchanged."
        ) from None


def _write_beside(job: Job, result: Path) -> None:
    """Have the family write what it puts beside the weights of a full finetune."""
    family, options = job.family, job.options
    if options.training_method != LORA and isinstance(family, HasFiles):
        config = live_config(unwrap(job.engine.model))
        family.write_beside(config, Path(options.model_path), result)


def _swap(final: Path) -> None:
    """Make the staged folder the ``final`` one. Only names change, so it is soon done."""
    if final.exists():
        final.rename(_replaced(final))
    # A process that dies here leaves the earlier result under its other name: see _mend.
    _staged(final).rename(final)
    sync_folder(final.parent)
    _mend(final)


def _mend(final: Path) -> None:
    """Finish what ``_swap`` has begun, or undo it where the new result has no name yet."""
    replaced = _replaced(final)
    if not replaced.exists():
        return
    if not final.exists():
        replaced.rename(final)
        return
    # Results of several networks, each in a sub-folder, are ours too.
    ours = {*_found(replaced, _IN_FINAL), *_networks(replaced)}
    for path in replaced.iterdir():
        if path not in ours and not (final / path.name).exists():
            path.rename(final / path.name)
    if replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced)


def _networks(final: Path) -> list[Path]:
    """Sub-folders that hold the result of one network each, or are about to."""
    found = []
    for plan in final.glob(f"*/{PLAN}"):
        name = plan.parent.name.removeprefix(".").removesuffix(_OLD)
        found.append(final / name)
    return list(dict.fromkeys(found))


def _staged(final: Path) -> Path:
    return final.with_name(f".{final.name}{_NEW}")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}{_OLD}")


def holds_result(final: Path, run_id: str | None, step: int) -> bool:
    """Whether a folder is what this start of a run made of its weights after ``step`` steps."""
    files = sorted(final.glob("*.safetensors"))
    if run_id is None or not files:
        return False
    try:
        found = read_safetensors_header(files[0]).metadata
    # Whatever is wrong with it, it is no result: the weights are written again.
    except ModelSourceError:
        return False
    return (found.get("run"), found.get("step")) == (run_id, str(step))


def draw_generated(team: Team, step: int | None = None) -> Path | None:
    """Generate clips for the first prompts and draw them.

    By the model's pipeline where its folder is there; else by the objective, as latents beside the
    real ones. Collective: the forward pass is.

    Args:
        team: What is trained.
        step: Optimizer steps done; None: at the end of the run.

    Returns:
        The picture; None where there is nothing to draw.
    """
    from launch.trainer.samples import draw_samples

    job = team.face
    options, device = job.options, job.runtime.device
    chosen = one_batch(job.data, options.samples.count)
    if not chosen:
        return None
    batch = alike(lambda: _prompts_of(job, chosen))
    models = {name: one.engine.model for name, one in team.jobs.items()}
    # Dropout and the like are for training; generate() runs the forward pass alone.
    for model in models.values():
        model.eval()
    # The average, if there is one, comes first: it is put in where the networks are now.
    with averaged(team.jobs.values()), torch.no_grad(), autocast(device, options), team.called():
        made, real = _generate(job, models, batch)
    for model in models.values():
        model.train()
    if made is None:
        return None
    name = "samples.png" if step is None else f"step_{step:06d}.png"
    path, labels = job.folder / "samples" / name, []
    if job.runtime.is_main:
        labels = [job.data.name(index) for index in chosen]
    shown: Any = made
    alike(lambda: draw_samples(path, shown.cpu(), real, labels) if labels else None)
    return path


def _prompts_of(job: Job, chosen: Sequence[int]) -> Batch:
    """Collate samples, and the same with the empty prompt where the pipeline is to be guided."""
    samples = [job.data[index] for index in chosen]
    batch = job.family.collate(samples)
    if job.options.samples.guidance > 1:
        empty = empty_prompt(job.data, job.family, "samples.guidance")
        negative = job.family.collate([{**one, **empty} for one in samples])
        batch = {**batch, "negative": negative}
    return batch


def _generate(job: Job, models: Mapping[str, nn.Module], batch: Batch) -> tuple[Any, Any]:
    """Return what the model makes of a batch's prompts, and what to draw beside it. Collective."""
    options, device, family = job.options, job.runtime.device, job.family
    moved, seed = to_device(batch, device), options.train.seed
    if pipeline_of(options.model_path) is None or not isinstance(family, Diffusion):
        if len(models) > 1:
            # Each has its part of the path only, and the pipeline knows which.
            return None, None
        made = job.objective.generate(job.engine.model, moved, seed, options.samples.steps)
        real = batch.get(LATENTS)
        # Of several streams the first: a picture has no sound.
        return made, next(iter(real.values())) if isinstance(real, Mapping) else real
    pipeline = alike(lambda: load_pipeline(family, options.model_path, models, device))
    if isinstance(job.objective, FitsPipeline):
        job.objective.fit_pipeline(pipeline)
    wanted = options.samples
    made = sample_by_pipeline(family, pipeline, moved, seed, wanted.steps, wanted.guidance)
    return made, None


def _check_finite(model: nn.Module, step: int) -> None:
    name = find_not_finite(model)
    if name is not None:
        raise Diverged(
            f"{name} holds NaN or infinity after {step} steps; nothing is saved. {LOWER}"
        )
