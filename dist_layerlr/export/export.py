"""Trained weights as files that other programs load: full weights, a PEFT adapter, a kohya LoRA.

From a live model, however sharded, or from a checkpoint on disk. One whole tensor is in memory at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_layerlr.checkpoint import folders
from dist_layerlr.errors import ConfigError
from dist_layerlr.export import adapter_names
from dist_layerlr.export.folder import FILE_BYTES, publish, split
from dist_layerlr.export.saved import SavedWeights
from dist_layerlr.plan.entries import Shape
from dist_layerlr.plan.names import base_name
from dist_layerlr.ranks import alike
from dist_layerlr.sharders.model import unwrap
from dist_layerlr.weights.gather import LiveWeights
from dist_layerlr.weights.tensorfile import Entry

DIFFUSERS, TRANSFORMERS, PEFT, KOHYA = "diffusers", "transformers", "peft", "kohya"
STEMS = {
    DIFFUSERS: "diffusion_pytorch_model",
    TRANSFORMERS: "model",
    PEFT: "adapter_model",
    KOHYA: "lora",
}
FORMATS = tuple(STEMS)
ADAPTER_CONFIG = "adapter_config.json"
SAVED_CONFIG = "adapter_config"
"""Key of the adapter's config in a checkpoint's ``extra``."""


class TensorInfo(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> Shape: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def trainable(self) -> bool: ...  # noqa: D102


class WeightSource(Protocol):
    """Whole tensors by canonical name."""

    writes: bool
    """Whether this rank writes."""

    @property
    def table(self) -> Mapping[str, TensorInfo]:
        """What there is."""
        ...

    def fetch(self, name: str) -> Tensor | None:
        """The tensor, on the rank that writes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write, decided before anything is read."""

    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    """{name in the file: canonical name}."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """kohya's alphas: {name in the file: value}."""
    metadata: Mapping[str, str]
    stem: str
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further files: {name: content}."""


def export_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str,
    dtype: torch.dtype | None = None,
    adapter: str = "default",
    metadata: Mapping[str, str] | None = None,
    base: str | Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write the trained weights of a live model, however sharded. Collective; rank 0 writes.

    Args:
        model: as it is trained, a DeepSpeed engine included.
        folder: what is there of an earlier export in this format is replaced when all is written.
        format: ``diffusers`` or ``transformers`` (all weights and persistent buffers, frozen ones
            included, ties once), ``peft`` or ``kohya`` (a LoRA adapter).
        dtype: of floating-point tensors; None: as they are trained, which is fp32 under ZeRO.
        adapter: PEFT's name of the adapter.
        metadata: for the file's header, such as ``{"plan_digest": ..., "step": ...}``.
        base: folder of the model that was trained; its ``config.json`` is copied, and named in the
            adapter's config.
        file_bytes: the size above which weights are split into several files.

    Returns:
        The weight files.

    Raises:
        ConfigError: on all ranks alike; nothing fits the format, or it has no name for something
            trained.
        PlanMismatch: on all ranks alike: ranks hold different values of a tensor.
    """
    source = LiveWeights(model)
    config = adapter_config(model, adapter)
    chosen = alike(
        lambda: choose(source.table, format, dtype, adapter, config, metadata or {}, base)
    )
    source.check(chosen.names.values())
    return alike(lambda: _write_all(chosen, source, Path(folder), file_bytes))


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    format: str,
    dtype: torch.dtype | None = None,
    adapter: str = "default",
    config: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write the weights of a checkpoint of ``save_checkpoint``, in one process and without a model.

    Args:
        checkpoint: a checkpoint, or a folder of checkpoints: then the newest complete one.
        config: content of ``adapter_config.json``; None: what was saved as
            ``extra={"adapter_config": ...}``.
        folder: as for ``export_weights``, like all others.
        format: see there.
        dtype: see there.
        adapter: see there.
        base: see there.
        file_bytes: see there.

    Raises:
        CheckpointError: none there, damaged, or one that leaves out the frozen base that the format
            needs.
        ConfigError: as ``export_weights``.
    """
    source = SavedWeights(folders.latest(checkpoint))
    config = config or source.manifest.extra.get(SAVED_CONFIG)
    metadata = {"plan_digest": source.manifest.digest, "step": str(source.manifest.step)}
    chosen = choose(source.table, format, dtype, adapter, config, metadata, base)
    source.check(chosen.names.values())
    return _write_all(chosen, source, Path(folder), file_bytes)


def adapter_config(model: nn.Module, adapter: str) -> dict[str, Any] | None:
    """Content of ``adapter_config.json`` of a live PEFT adapter; None without one."""
    configs: Mapping[str, Any] = getattr(unwrap(model), "peft_config", {})
    if adapter not in configs:
        return None
    return {
        key: sorted(v) if isinstance(v, set) else v for key, v in configs[adapter].to_dict().items()
    }


def choose(
    table: Mapping[str, TensorInfo],
    format: str,
    dtype: torch.dtype | None,
    adapter: str,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    base: str | Path | None,
) -> Export:
    """Decide what becomes of which tensor.

    Raises:
        ConfigError: see ``export_weights``.
    """
    if format not in FORMATS:
        raise ConfigError(f"Invalid format={format!r}: must be one of {', '.join(FORMATS)}.")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            f"Invalid dtype={dtype}: must be a floating-point dtype, such as torch.bfloat16."
        )
    adapters = sorted(filter(None, set(map(adapter_names.adapter_of, table))))
    common = {"format": "pt", **metadata}
    if format in (DIFFUSERS, TRANSFORMERS):
        if adapters:
            raise ConfigError(
                f"Cannot export adapter {adapters[0]!r} as {format} weights: use format peft or"
                " kohya."
            )
        names = {base_name(name): name for name in table}
        return Export(
            entries=_entries(names, table, dtype),
            names=names,
            metadata=common,
            stem=STEMS[format],
            texts=_config_of(base),
        )
    if adapter not in adapters:
        raise ConfigError(
            f"No adapter {adapter!r} to export as {format}: the model has {adapters or 'none'}."
        )
    config = _checked_config(config, adapter)
    mine = _names_of(table, adapter)
    if base is not None:
        config = {**config, "base_model_name_or_path": str(base)}
    return (_peft if format == PEFT else _kohya)(mine, table, dtype, config, common)


def _checked_config(config: Mapping[str, Any] | None, adapter: str) -> Mapping[str, Any]:
    if config is None:
        raise ConfigError(
            f"Cannot export adapter {adapter!r}: its LoraConfig is not known. Give"
            " adapter_config.json."
        )
    if "peft_type" not in config:
        raise ConfigError(
            f"Invalid adapter config with keys {sorted(config)[:5]}: no peft_type. Give PEFT's own"
            " file."
        )
    return config


def _names_of(table: Mapping[str, TensorInfo], adapter: str) -> list[str]:
    """Names of an adapter's tensors. Whatever else trains would be lost with this export."""
    mine: list[str] = []
    for name, info in table.items():
        if adapter_names.adapter_of(name) == adapter:
            mine.append(name)
        elif info.trainable:
            raise ConfigError(
                f"Cannot export {name} with adapter {adapter!r}: it is trained, but no part of"
                " it. Add its module to modules_to_save, or freeze it."
            )
    return mine


def _peft(
    mine: Sequence[str],
    table: Mapping[str, TensorInfo],
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Export:
    names = {adapter_names.peft_name(name): name for name in mine}
    # diffusers takes rank and alpha from the header, under the prefix that it is told to strip.
    packed = {f"{adapter_names.PEFT_ROOT}.{key}": value for key, value in config.items()}
    return Export(
        entries=_entries(names, table, dtype),
        names=names,
        stem=STEMS[PEFT],
        metadata={**metadata, "lora_adapter_metadata": json.dumps(packed)},
        texts={ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n"},
    )


def _kohya(
    mine: Sequence[str],
    table: Mapping[str, TensorInfo],
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Export:
    names = {adapter_names.kohya_name(name): name for name in mine}
    weights = _entries(names, table, dtype)
    downs = [entry for entry in weights if entry.name.endswith(".lora_down.weight")]
    alphas = dict(
        adapter_names.kohya_alpha(names[entry.name], entry.shape[0], config) for entry in downs
    )
    scalars = tuple(Entry(name=name, shape=(), dtype=dtype or torch.float32) for name in alphas)
    return Export(
        entries=weights + scalars,
        names=names,
        constants=alphas,
        stem=STEMS[KOHYA],
        metadata=metadata,
    )


def _entries(
    names: Mapping[str, str], table: Mapping[str, TensorInfo], dtype: torch.dtype | None
) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for written, name in names.items():
        info = table[name]
        # ``dtype`` is for floating-point tensors: a counter among the buffers stays an integer.
        wanted = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        entries.append(Entry(name=written, shape=tuple(info.shape), dtype=wanted))
    return tuple(entries)


def _config_of(base: str | Path | None) -> dict[str, str]:
    if base is None:
        return {}
    path = Path(base) / "config.json"
    try:
        return {path.name: path.read_text(encoding="utf-8")}
    except OSError as error:
        raise ConfigError(
            f"Cannot read {str(path)!r}: {error.strerror}. Give the folder of the trained model."
        ) from None


def _write_all(chosen: Export, source: WeightSource, folder: Path, file_bytes: int) -> list[Path]:
    """Write on the rank that does; the others take part in the gathering."""
    files = split(chosen.entries, chosen.stem, file_bytes)
    # All ranks gather in this one order. Constants (kohya's alphas) are gathered from nowhere.
    order = iter(
        [entry for entries in files.values() for entry in entries if entry.name in chosen.names]
    )

    def fetch(entry: Entry) -> Tensor:
        if entry.name in chosen.constants:
            return torch.tensor(chosen.constants[entry.name])
        found = source.fetch(chosen.names[next(order).name])
        assert found is not None
        return found

    try:
        if source.writes:
            publish(folder, chosen.stem, files, fetch, chosen.metadata, chosen.texts)
    except OSError as error:
        where = str(error.filename or folder)
        raise ConfigError(
            f"Cannot write {where!r}: {error.strerror}. The export that was there is unchanged."
        ) from None
    finally:
        # Ranks that do not write send everything here. So does the writer after a failure: it takes
        # what is left, or the others would wait in their sends.
        for entry in order:
            source.fetch(chosen.names[entry.name])
    return [folder / file for file in files]
