"""Model without weights, then weights straight from safetensors into it, whole or sharded, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_layerlr import checks
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.names import canonical_name, parse
from dist_layerlr.sources import checkpoint_files, read_header

from .blame import blame
from .families.base import Family
from .flow import mix_seed
from .options import LORA, AdapterOptions, RunOptions

ADAPTER = "default"


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """Content of a diffusers checkpoint's ``config.json``.

    Raises:
        ModelSourceError: missing, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        checks.mapping("content", loaded)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSourceError(
            f"Cannot read {str(path)!r}: {error}. model_path must be a model folder in diffusers format."
        ) from None
    return dict(loaded)


def empty_model(family: Family, options: RunOptions) -> nn.Module:
    """Build the model on the meta device, adapters injected and ``requires_grad`` set. Buffers are real.

    Raises:
        ModelSourceError: no such folder, or one of another model class.
        ConfigError: adapter targets that match no module.
    """
    from accelerate import init_empty_weights

    config = read_model_config(options.model_path)
    wanted = family.model_class.__name__
    found = config.get("_class_name", wanted)
    if found != wanted:
        raise ModelSourceError(f"model_path {options.model_path!r} holds a {found}, but model_type needs a {wanted}.")
    path = Path(options.model_path) / "config.json"
    with blame(f"{path}: no {wanted} can be built", "restore the file"), init_empty_weights(include_buffers=False):
        model: nn.Module = family.model_class.from_config(config)  # type: ignore[attr-defined]
    if options.train.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if options.training_method == LORA:
        _inject_lora(model, options.adapter, family.lora_targets)
    return model


def _inject_lora(model: Any, adapter: AdapterOptions, family_targets: tuple[str, ...]) -> None:
    from peft import LoraConfig

    model.requires_grad_(False)
    targets = list(adapter.target_modules or family_targets)
    try:
        model.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets), ADAPTER)
    except ValueError:  # whose text is the whole module, printed
        allowed = f"name endings of linear or convolution layers of {type(model).__name__}"
        hint = f" Such as {family_targets[0]!r}; see model.named_modules()."
        raise checks.invalid("adapter.target_modules", targets, allowed, hint) from None


def check_weights(model: nn.Module, folder: str | Path) -> dict[str, Path]:
    """Match a checkpoint's headers with the model. Returns {base name: file}.

    Raises:
        ModelSourceError: damaged file, or a tensor that is missing, too many, or of another shape.
    """
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files(folder):
        for name, shape in read_header(file):
            files[name], shapes[name] = file, shape
    wanted = {base_name(n): tuple(p.shape) for n, p in model.named_parameters() if not _is_adapter(n)}
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelSourceError(f"Checkpoint {str(folder)!r} lacks tensor {name!r} that config.json calls for.")
        if shapes[name] != shape:
            raise ModelSourceError(
                f"Tensor {name!r} in {str(files[name])!r} has shape {shapes[name]}; config.json calls for {shape}."
            )
    extra = sorted(shapes.keys() - wanted.keys() - {n for n, _ in model.named_buffers()})
    if extra:
        raise ModelSourceError(
            f"Checkpoint {str(folder)!r} has tensor {extra[0]!r}, which config.json does not call for."
        )
    return files


def load_weights(model: nn.Module, files: Mapping[str, Path], *, seed: int, device: torch.device) -> None:
    """Replace meta parameters by real ones: base weights from files, fresh adapters from (seed, name).

    Every rank reads one tensor at a time and keeps its own shard of it, so no rank ever holds the whole model when
    parameters are DTensors. Weights take the dtype of the meta parameters: float32, unless it was changed.
    """
    loaded = {
        name: _placed_like(param, read_tensor(name, tuple(param.shape), files, seed=seed).to(device, param.dtype))
        for name, param in model.named_parameters()
        if param.is_meta
    }
    model.load_state_dict(loaded, strict=False, assign=True)
    for name, param in model.named_parameters():
        assert not param.is_meta, f"{name} was not loaded"
    model.to(device)


def load_module(module: nn.Module, path: str, files: Mapping[str, Path], *, seed: int, device: torch.device) -> None:
    """Load the parameters that ``module`` itself owns, in place of meta ones. ``path`` is its name in the model."""
    for leaf, param in list(module.named_parameters(recurse=False)):
        name = f"{path}.{leaf}" if path else leaf
        full = read_tensor(name, tuple(param.shape), files, seed=seed)
        setattr(module, leaf, nn.Parameter(full.to(device), param.requires_grad))


def read_tensor(name: str, shape: tuple[int, ...], files: Mapping[str, Path], *, seed: int) -> Tensor:
    """One whole parameter, float32, on the CPU: from its file, or fresh if an adapter owns it."""
    from safetensors import safe_open

    if _is_adapter(name):
        return _fresh_adapter(name, shape, seed)
    with safe_open(str(files[base_name(name)]), framework="pt") as file:
        tensor: Tensor = file.get_tensor(base_name(name))
    return tensor.float()


def base_name(name: str) -> str:
    """Name in the base checkpoint: ``blocks.0.to_q.base_layer.weight`` -> ``blocks.0.to_q.weight``."""
    path = parse(canonical_name(name))
    return ".".join((*path.owner, path.leaf))


def full_tensors(model: nn.Module, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, whole CPU tensor) of all trained weights; collective, a tensor or FSDP1 unit at a time.

    Args:
        model: without DDP or engine around it, maybe sharded by FSDP1, FSDP2 or ZeRO-3.
        keep: False on ranks that only take part in the gathering.
    """
    lora = _has_adapter(model)
    for name, full in _gathered(model):
        if keep and (not lora or _is_adapter(name)):
            yield canonical_name(name), full.detach().cpu().clone().contiguous()


def _gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, valid until the next one is asked for."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

    units = [(path, module) for path, module in model.named_modules() if isinstance(module, FSDP1)]
    for path, unit in units:
        with FSDP1.summon_full_params(unit, recurse=False, writeback=False):
            inner = [m for m in unit.modules() if isinstance(m, FSDP1) and m is not unit]
            below = {id(p) for m in inner for p in m.parameters()}
            for name, param in unit.named_parameters():
                if id(param) not in below:
                    yield f"{path}.{name}" if path else name, param
    if units:
        return
    for name, param in model.named_parameters():
        if param.requires_grad and (hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")):
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(param)  # the fp32 master, also where the model is bf16
        elif hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                yield name, param
        elif isinstance(param, DTensor):
            shard: Any = param.detach()
            yield name, shard.full_tensor()
        else:
            yield name, param


def _has_adapter(model: nn.Module) -> bool:
    """Whether PEFT injected an adapter; parameter names do not tell under FSDP1's flat parameters."""
    return bool(getattr(model, "peft_config", None) or getattr(getattr(model, "module", None), "peft_config", None))


def _placed_like(param: nn.Parameter, full: Tensor) -> Tensor:
    """Shard as the meta parameter is, without communication: every rank has the same ``full``."""
    data: Any = param.data
    if isinstance(data, DTensor):
        return nn.Parameter(
            distribute_tensor(full, data.device_mesh, data.placements, src_data_rank=None), param.requires_grad
        )
    return nn.Parameter(full, param.requires_grad)


def _is_adapter(name: str) -> bool:
    return parse(canonical_name(name)).is_adapter


def _fresh_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """PEFT's default start (A: kaiming uniform with a = sqrt(5); B: zero), drawn by name so that ranks agree."""
    full = torch.zeros(shape)
    if not parse(canonical_name(name)).is_lora_b:
        generator = torch.Generator().manual_seed(mix_seed(seed, *name.encode()))
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
    return full
