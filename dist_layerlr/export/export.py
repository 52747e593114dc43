"""Trained weights as files that other programs load: full weights, or an adapter in four forms.

From a live model, however sharded, or from a checkpoint on disk. One whole tensor is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_layerlr.checkpoint import folders
from dist_layerlr.errors import ConfigError
from dist_layerlr.export import adapter_files, adapter_names
from dist_layerlr.export.contents import Export, TensorInfo, entries_of
from dist_layerlr.export.folder import FILE_BYTES, publish, split
from dist_layerlr.export.saved import SavedWeights
from dist_layerlr.plan.names import base_name
from dist_layerlr.ranks import alike
from dist_layerlr.sharders.model import unwrap
from dist_layerlr.weights.gather import LiveWeights
from dist_layerlr.weights.tensorfile import Entry

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
STEMS = {DIFFUSERS: "diffusion_pytorch_model", TRANSFORMERS: "model", **adapter_files.STEMS}
"""{format: its files without their endings}."""
FORMATS = tuple(STEMS)
SAVED_CONFIG = "adapter_config"
"""Key of the adapter's config in a checkpoint's ``extra``."""


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
            included, ties once); of a LoRA adapter ``peft``, ``pipeline`` (what
            ``pipe.load_lora_weights`` takes), ``comfyui`` or ``kohya``.
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
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return adapter_files.described(configs[adapter].to_dict(), base)


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
                f"Cannot export adapter {adapters[0]!r} as {format} weights: use one of"
                f" {', '.join(adapter_files.STEMS)}."
            )
        names = {base_name(name): name for name in table}
        return Export(
            entries=entries_of(names, table, dtype),
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
    found = adapter_files.Adapter(
        names=_names_of(table, adapter),
        table=table,
        config=config,
        dtype=dtype,
        metadata=common,
    )
    return adapter_files.choose_adapter(found, format, base)


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
    # All ranks gather in this one order. Constants (alphas) are gathered from nowhere.
    order = iter(
        [entry for entries in files.values() for entry in entries if entry.name in chosen.names]
    )

    def fetch(entry: Entry) -> Tensor:
        if entry.name in chosen.constants:
            return torch.tensor(chosen.constants[entry.name])
        found = source.fetch(chosen.names[next(order).name])
        assert found is not None
        factor = chosen.factors.get(entry.name, 1.0)
        # In fp32, and rounded once, when it is written.
        return found if factor == 1.0 else found.float() * factor

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
