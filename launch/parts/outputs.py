"""Everything a run leaves behind in its output folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import Plan

from .data.base import Dataset
from .engines.base import Engine
from .families.base import Family
from .flow import sample
from .loop import LOWER, autocast, stack_samples
from .options import LORA, RunOptions
from .runtime import Diverged, Runtime
from .weights import ADAPTER

FULL_WEIGHTS, LORA_WEIGHTS = "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"


_WRITTEN = (
    "plan.json", "verify.json", "metrics.jsonl", "lr_grid.png", "samples/samples.png", f"final/{FULL_WEIGHTS}",
    f"final/{LORA_WEIGHTS}", "final/adapter_config.json", "final/config.json",
)  # fmt: skip
"""Every file that a run may leave in its output folder."""


def open_output_dir(path: str | Path, model_path: str, *, probe: bool) -> Path:
    """Create the output folder. With ``probe`` (the rank that writes), make sure that all files can be written.

    Raises:
        ConfigError: it cannot be created or written to, or the model that is trained lies in it.
    """
    folder = Path(path)
    if (folder / "final").resolve() == Path(model_path).resolve():
        raise ConfigError(f"Invalid --output-dir {str(path)!r}: model_path is its final/. Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if probe:
            _probe(folder)
    except OSError as error:
        what = f"{error.strerror}: {str(error.filename)!r}"
        raise ConfigError(f"Cannot write to --output-dir {str(path)!r}: {what}. Choose another folder.") from None
    return folder


def _probe(folder: Path) -> None:
    for place in (folder, folder / "samples", folder / "final"):
        if place == folder or place.exists():
            (place / ".probe").write_text("")
            (place / ".probe").unlink()
    for name in _WRITTEN:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))


def remove_previous_run(folder: Path) -> None:
    """Remove what an earlier run left in the folder, so that no two runs mix. Files of others stay."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is whole or absent."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def draw_plan(plan: Plan, folder: Path) -> None:
    """Write lr_grid.png."""
    from dist_layerlr.plot import draw_grid

    draw_grid(plan, folder / "lr_grid.png")


def save_weights(engine: Engine, plan: Plan, options: RunOptions, runtime: Runtime, folder: Path, step: int) -> Path:
    """Gather and write the trained weights under original names. Collective.

    A full finetune becomes a diffusers model folder, a LoRA a PEFT adapter folder. The plan's digest and the step are
    in the safetensors metadata.

    Returns:
        The weights file.

    Raises:
        Diverged: a weight is NaN or infinite; nothing is written.
    """
    final = folder / "final"
    lora = options.training_method == LORA
    path = final / (LORA_WEIGHTS if lora else FULL_WEIGHTS)
    tensors = dict(engine.trained_tensors(keep=runtime.is_main))
    runtime.agree(lambda: _check_finite(tensors, step))
    if runtime.is_main:
        final.mkdir(exist_ok=True)
        metadata = {"format": "pt", "plan_digest": plan.digest, "step": str(step)}
        _write_safetensors(path, {_saved_name(n, lora): t for n, t in tensors.items()}, metadata)
        if lora:
            write_json(final / "adapter_config.json", _adapter_config(options, engine))
        else:
            text = (Path(options.model_path) / "config.json").read_text(encoding="utf-8")
            write_text(final / "config.json", text)
    return path


def draw_generated(
    engine: Engine, family: Family, data: Dataset, options: RunOptions, runtime: Runtime, folder: Path
) -> Path | None:
    """Generate clips for the first prompts and draw them beside the real ones. Collective: the forward pass is."""
    from .samples import draw_samples

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
            velocity, tuple(batch["latents"].shape), options.train.seed, options.samples.steps, runtime.device
        )
    engine.model.train()
    path = folder / "samples" / "samples.png"
    if runtime.is_main:
        draw_samples(path, made.cpu(), batch["latents"], [data.name(i) for i in range(count)])
    return path


def _check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Diverged(f"{name} holds NaN or infinity after {step} steps; nothing is saved. {LOWER}")


def _saved_name(name: str, lora: bool) -> str:
    """PEFT files prefix the model and leave the adapter's name out."""
    if not lora:
        return name
    return "base_model.model." + ".".join(s for s in name.split(".") if s != ADAPTER)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file(dict(tensors), str(temporary), metadata=metadata)
    os.replace(temporary, path)


def _adapter_config(options: RunOptions, engine: Engine) -> dict[str, Any]:
    from peft import LoraConfig

    from dist_layerlr.model import unwrap

    inner: Any = unwrap(engine.model)
    config: LoraConfig = inner.peft_config[ADAPTER]
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()} | {
        "base_model_name_or_path": options.model_path
    }
