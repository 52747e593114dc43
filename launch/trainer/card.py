"""What a result says of itself: the model card beside the weights, the metadata within them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dist_layerlr.files import write_text
from dist_layerlr.proof import Proof
from dist_layerlr.report import FOLDED, grid
from launch.trainer.job import Job
from launch.trainer.options import LORA, RunOptions
from launch.trainer.record import versions

CARD = "README.md"
_MARK = "# written by the trainer of dist_layerlr; without this line it is yours, and kept"
"""A comment in the card's front matter."""


def metadata(job: Job, step: int) -> dict[str, str]:
    """Return what goes into the header of the weights' files.

    ``ss_*`` are the keys of kohya's programs, ``modelspec.*`` those of Stability's ModelSpec; what
    does not apply is left out.
    """
    options = job.options
    train, kind = options.train, options.model_type
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": kind,
        "modelspec.implementation": job.family.weights_format,
        "modelspec.title": job.folder.resolve().name,
        "ss_base_model_version": kind,
        "ss_sd_model_name": Path(options.model_path).name,
        "ss_learning_rate": repr(max(group.lr for group in job.plan.groups)),
        "ss_lr_scheduler": options.schedule.kind,
        "ss_lr_warmup_steps": str(options.schedule.warmup_steps),
        "ss_optimizer": options.optimizer.kind,
        "ss_max_train_steps": str(train.steps),
        "ss_steps": str(step),
        "ss_seed": str(train.seed),
        "ss_total_batch_size": str(train.global_batch),
        "ss_mixed_precision": "bf16" if train.dtype == "bf16" else "no",
        "ss_max_grad_norm": repr(train.grad_clip),
        "ss_caption_dropout_rate": repr(train.caption_dropout),
        "ss_num_train_images": str(len(job.data)),
    }
    if options.training_method == LORA:
        found["modelspec.architecture"] = f"{kind}/lora"
        found["ss_network_dim"] = str(options.adapter.rank)
        found["ss_network_alpha"] = repr(options.adapter.alpha)
    return found


def write_card(job: Job, result: Path, earlier: Path, step: int, proof: dict[str, Any]) -> None:
    """Write the model card, unless somebody has put a README of their own there.

    Args:
        job: What was trained.
        result: Folder that is being written.
        earlier: Folder whose place it will take.
        step: Optimizer steps done.
        proof: Content of ``verify.json``.

    Raises:
        OSError: no room, no rights.
    """
    there = earlier / CARD
    if there.exists() and _MARK not in there.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(result / CARD, _card(job, step, proof))


def _card(job: Job, step: int, proof: dict[str, Any]) -> str:
    options = job.options
    adapter = options.training_method == LORA
    library = "peft" if adapter else job.family.weights_format
    what = f"A LoRA of rank {options.adapter.rank}" if adapter else "A full finetune"
    seen = step * options.train.global_batch
    command = _command()
    again = command if "--resume" in command else f"{command} --resume latest"
    packages = "\n".join(f"| {name} | {number} |" for name, number in versions().items())
    return f"""---
{_MARK}
library_name: {library}
tags:
- {options.model_type}
- per-layer-learning-rates
---

# {job.folder.resolve().name}

{what} of `{Path(options.model_path).name}` ({options.model_type}): {step} steps of
{options.train.global_batch} samples, {seen:,} samples of a data set of {len(job.data):,}
(`{options.data.get("kind")}`), with a learning rate for every parameter by name.{_average(options)}

## Learning rates

```text
{grid(job.plan, FOLDED)}
```
{_proven(proof)}
`plan.json` has every parameter, `verify.json` the proof at the start and at the end.

## Again

```bash
{command}
```

Go on from the newest checkpoint, if the run kept some (`train.save_every`):

```bash
{again}
```

| package | version |
|---|---|
{packages}
"""


def _average(options: RunOptions) -> str:
    """What the weights are, where they are an average."""
    if not options.ema.on:
        return ""
    return (
        f"\nThe weights are their exponential moving average over the steps (decay"
        f" {options.ema.decay:g})."
    )


def _proven(proof: dict[str, Any]) -> str:
    """The proof's line; nothing where a caller has saved without one."""
    if not proof.get("end"):
        return ""
    line = Proof(**proof["end"]).line()
    return f"\nProven on the live optimizer after the last step:\n\n```text\n{line}\n```\n"


def _command() -> str:
    """The command line of this process, with torchrun in front where it started the ranks."""
    program = [Path(sys.executable).name]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*program, *sys.argv])
