"""Parameter names as data: cut by dotted segment, never by substring.

``canonical_name`` undoes wrappers and is the key of a plan. ``parse`` looks further, through
adapters, to the module of the base model that a tensor belongs to; that is what stacks and
components are decided by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dist_layerlr.errors import ModelSourceError

WRAPPER_SEGMENTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
PEFT_PREFIX = ("base_model", "model")
PEFT_SEGMENTS = frozenset({"base_layer", "original_module"})

# Such a segment opens the adapter's own part of a name: `to_q.lora_A.default.weight`,
# `to_q.hada_w1_a`. Whole keys, so that a real module called `bone_encoder` is none.
_ADAPTER = re.compile(
    r"^(lora_(A|B|down|up|mid|embedding_A|embedding_B|magnitude_vector)|lokr_(w1|w2|t1|t2)(_a|_b)?|hada_(w1|w2)_(a|b)"
    r"|hada_t[12]|oft_(R|L|diag|blocks)|boft_(R|s)|vera_(A|B|lambda_b|lambda_d)|ia3_l|fourierft_spectrum|shira_weight"
    r"|randlora_(A|B|lambda|gamma)|hra_u|road_(theta|alpha)|miss_block|bone_block|dora_scale|ln_tuning_layers|alpha"
    r"|diff(_b)?)$"
)
_ADAPTER_B = frozenset({"lora_B", "lora_up", "lora_embedding_B"})
# kohya and musubi flatten a module path into one segment behind one of these.
_FLAT_PREFIX = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_")
# What pipelines and trainers put before the model's own names.
_PIPELINE_PREFIXES = (
    ("transformer",),
    ("transformer_2",),
    ("unet",),
    ("diffusion_model",),
    ("model", "diffusion_model"),
    ("lora_unet",),
    ("lora_transformer",),
)

_RANK = "@rank"

FlatIndex = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamPath:
    """Where a tensor sits in the base model."""

    owner: tuple[str, ...]
    """Segments of the module that owns the tensor, adapters looked through."""
    leaf: str
    """Name of the tensor in its owner (`weight`, `scale_shift_table`), or the adapter segment
    (`lora_A`)."""
    is_adapter: bool = False
    is_lora_b: bool = False

    @property
    def base_name(self) -> str:
        """Owner and leaf in one, as the base checkpoint spells them."""
        return ".".join((*self.owner, self.leaf))


@lru_cache(maxsize=1 << 16)  # of one model, asked for at every attach, verify and save
def canonical_name(name: str) -> str:
    """Undo every wrapper, by whole segments.

    The adapter's own segments stay, so names remain unique.

    ``base_model.model.blocks.0._orig_mod.attn.to_q.lora_A.default.weight``
    -> ``blocks.0.attn.to_q.lora_A.default.weight``

    A DDP or engine ``module.`` is not touched: only the owner's type tells it from a user's own
    attribute.
    """
    segments = [s for s in name.split(".") if s not in WRAPPER_SEGMENTS]
    if tuple(segments[:2]) == PEFT_PREFIX:
        del segments[:2]
    return ".".join(segments)


def of_rank(name: str, rank: int) -> str:
    """The name under which a checkpoint keeps one rank's values of a parameter.

    For those that differ by rank on purpose. A module's own name has no ``@``.
    """
    return f"{name}{_RANK}{rank}"


def without_rank(name: str) -> str | None:
    """The parameter's own name; None for what is one for all ranks."""
    own, found, rank = name.rpartition(_RANK)
    return own if found and rank.isdigit() else None


def parse(name: str, modules: FlatIndex | None = None) -> ParamPath:
    """Split a canonical name into owner module, leaf and adapter role.

    ``blocks.0.attn.to_q.base_layer.weight`` and ``blocks.0.attn.to_q.lora_A.default.weight`` both
    have the owner ``blocks.0.attn.to_q``.

    Args:
        name: a canonical name; ai-toolkit's ``$$`` and kohya's flattened spelling are undone.
        modules: the base model's modules (see ``module_index``). Needed for flattened names, and
            used to drop a pipeline prefix such as ``transformer.`` that the base model does not
            have.

    Raises:
        ModelSourceError: a flattened name that the base model does not have, or that comes without
            a base model.
    """
    segments = re.split(r"\.|\$\$", name) if "$$" in name else name.split(".")
    tail = next((i for i, s in enumerate(segments) if i > 0 and _ADAPTER.match(s)), None)
    if tail is None:
        owner, leaf = _drop_peft(segments[:-1]), segments[-1]
    else:
        owner, leaf = _drop_peft(segments[:tail]), segments[tail]
    path = tuple(owner)
    if modules is not None or (len(path) == 1 and _FLAT_PREFIX.match(path[0])):
        path = _resolve(name, path, modules)
    return ParamPath(
        owner=path, leaf=leaf, is_adapter=tail is not None, is_lora_b=leaf in _ADAPTER_B
    )


def base_name(name: str) -> str:
    """The name of a tensor in the base checkpoint, which knows no adapter.

    ``blocks.0.to_q.base_layer.weight`` -> ``blocks.0.to_q.weight``
    """
    return parse(name).base_name


def is_lora_b(name: str) -> bool:
    """Whether a canonical name is the factor of a LoRA that starts at zero."""
    return parse(name).is_lora_b


def module_index(paths: Iterable[ParamPath]) -> dict[str, tuple[str, ...]]:
    """Index the base model's modules by both spellings, ``a.b_c`` and kohya's ``a_b_c``."""
    index: dict[str, tuple[str, ...]] = {}
    for path in paths:
        index.setdefault("_".join(path.owner), path.owner)
        index[".".join(path.owner)] = path.owner
    return index


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts ``blocks.2`` before ``blocks.10``."""
    return tuple(
        (0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part
    )


def strip_common_module(names: Iterable[str]) -> list[str]:
    """Drop the leading ``module.`` of a checkpoint that was saved from DDP.

    Every name carries it there; a model with one module of that name keeps it.
    """
    names = list(names)
    if names and all(name.startswith("module.") for name in names):
        return [name.partition(".")[2] for name in names]
    return names


def _drop_peft(segments: list[str]) -> list[str]:
    """Drop ``base_layer``, ``original_module`` and ``modules_to_save.<adapter>``."""
    kept: list[str] = []
    skip_next = False
    for segment in segments:
        if skip_next:
            skip_next = False
        elif segment == "modules_to_save":
            skip_next = True
        elif segment not in PEFT_SEGMENTS:
            kept.append(segment)
    return kept


def _resolve(name: str, path: tuple[str, ...], modules: FlatIndex | None) -> tuple[str, ...]:
    if modules is None:
        raise ModelSourceError(
            f"Parameter {name!r} has a flattened (kohya) name, which cannot be read without the"
            " full model. Give the full model's names too (--base MODEL)."
        )
    flat = _FLAT_PREFIX.match(path[0]) if len(path) == 1 else None
    spellings = [path, *(path[len(p) :] for p in _PIPELINE_PREFIXES if path[: len(p)] == p)]
    keys = [".".join(s) for s in spellings] + ([path[0][flat.end() :]] if flat else [])
    found = next((modules[key] for key in keys if key in modules), None)
    if found is None:
        raise ModelSourceError(
            f"Parameter {name!r} names a module that the base model does not have. "
            "Check that --base is the model this adapter was trained on, in the same naming."
        )
    return found
