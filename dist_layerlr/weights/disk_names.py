"""Tensors of a checkpoint under the live model's names, where transformers stores others.

transformers 5 renames, joins and parts tensors while it loads: the experts of a layer lie one by
one in a file and are one 3-D parameter in the model. The rules belong to the model's class
(``transformers.conversion_mapping``), and this module is their only user here; it was written
against transformers 5.23.0. The rules are not run on weights but on numbers of rows, which tells
where every row of a live tensor lies: a rank then reads the bytes of its own elements, as ever.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan.entries import Shape
from dist_layerlr.plan.names import canonical_name
from dist_layerlr.weights.tensorfile import FileTensor, Part

READ_IN = "5.23.0"
"""The release of transformers whose functions this module calls."""
_SOURCE_SHIFT = 40
"""Bits below a source's number that hold a row's: no tensor has a trillion rows."""


@dataclass(frozen=True, kw_only=True)
class JoinedTensor:
    """A live tensor that lies in several places of the files, one after the other."""

    name: str
    """For messages."""
    shape: Shape
    pieces: tuple[Part, ...]
    """In the order of the live tensor's elements."""
    _ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ends = list(accumulate(piece.numel for piece in self.pieces))
        object.__setattr__(self, "_ends", ends)

    @property
    def file(self) -> Path:
        """The first of the files."""
        return self.pieces[0].stored.file

    @property
    def dtype(self) -> torch.dtype:
        """Of the first piece; each is cast by itself."""
        return self.pieces[0].stored.dtype

    def parts(self, start: int, numel: int) -> Iterator[Part]:
        """Where elements [start, start + numel) of the live tensor lie."""
        at = bisect_right(self._ends, start)
        while numel > 0:
            piece = self.pieces[at]
            skipped = start - (self._ends[at] - piece.numel)
            taken = min(numel, piece.numel - skipped)
            yield Part(stored=piece.stored, start=piece.start + skipped, numel=taken)
            start, numel, at = start + taken, numel - taken, at + 1


Stored = FileTensor | JoinedTensor


def under_live_names(
    model: nn.Module, live: Set[str], stored: Mapping[str, FileTensor]
) -> Mapping[str, Stored]:
    """Give stored tensors the names that the model has for them.

    Args:
        model: without DDP and engines; sharded or not, with adapters or without.
        live: names of its parameters and buffers in the base model.
        stored: what the files hold.

    Returns:
        ``stored`` as it is, if all of it is named as in the model or no class has rules for it.

    Raises:
        ModelSourceError: a rule changes values or columns, so that no rows can be read by it, or
            transformers' functions are no longer those that this module knows.
    """
    # A model of transformers exists only where transformers is imported: it is not loaded for the
    # others. Its releases before 5 store what is live.
    if stored.keys() <= live or "transformers" not in sys.modules:
        return stored
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return stored
    skeleton = _Skeleton(model)
    if not skeleton.modules:
        return stored
    try:
        return _converted(skeleton, get_model_conversion_mapping(skeleton), live, stored)
    except (ImportError, AttributeError, TypeError) as error:
        import transformers

        raise ModelSourceError(
            f"Cannot read the conversion mapping of transformers {transformers.__version__}:"
            f" {error}. It was read in {READ_IN}: use that release, or store the live names with"
            " save_pretrained(folder, save_original_format=False)."
        ) from error


class _Skeleton:
    """The sub-models of a model by path, as transformers' mapping asks for them.

    Wrappers and adapters are taken off the paths. FSDP2 gives a module a class of its own, under
    whose name the mapping knows nothing: the module is shown with the class that it had.
    """

    def __init__(self, model: nn.Module):
        from transformers import PreTrainedModel

        self.modules: dict[str, Any] = {}
        for raw, module in model.named_modules():
            if isinstance(module, PreTrainedModel):
                self.modules.setdefault(_path(raw), _with_own_class(module))
        root = self.modules.get("")
        self.base_model_prefix: str = "" if root is None else root.base_model_prefix
        self.config = None if root is None else root.config

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """The one thing that the mapping asks of a model, beside its prefix."""
        yield from self.modules.items()


def _path(raw: str) -> str:
    # Only the name of a parameter is canonical: `x` stands for one.
    return canonical_name(f"{raw}.x" if raw else "x").rpartition(".")[0]


def _with_own_class(module: nn.Module) -> nn.Module:
    own: Any = type(module)
    if "FSDPModule" in {base.__name__ for base in own.__mro__}:
        # FSDP2's class stands before the module's own one in the order of bases.
        own = own.__mro__[2]
    if own is type(module):
        return module
    twin: nn.Module = own.__new__(own)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


@dataclass(slots=True)
class _Target:
    """A rule that makes live tensors, and what it makes them from."""

    rule: Any
    sources: list[FileTensor] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


def _converted(
    skeleton: _Skeleton,
    mapping: list[Any],
    live: Set[str],
    stored: Mapping[str, FileTensor],
) -> dict[str, Stored]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings: list[Any] = []
    converters: list[Any] = []
    by_pattern: dict[str, Any] = {}
    for rule in mapping:
        if isinstance(rule, WeightRenaming):
            renamings.append(rule)
        elif isinstance(rule, WeightConverter):
            # Two sub-models may have a pattern in common; each rule then looks at its own names.
            converters.append(rule)
            by_pattern.update(dict.fromkeys(rule.source_patterns, rule))
    prefix = skeleton.base_model_prefix or None
    known = dict.fromkeys(live, True)
    found: dict[str, Stored] = {}
    targets: dict[str, _Target] = {}
    # Experts are joined in this order, 2 before 10; a renaming may wait for an earlier name, too.
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in live and name in live:
            renamed, pattern = name, None
        if pattern is None:
            found[renamed if renamed in live else name] = stored[name]
            continue
        target = targets.setdefault(renamed, _Target(deepcopy(by_pattern[pattern])))
        target.sources.append(stored[name])
        target.patterns.append(pattern)
    for name, target in targets.items():
        found |= _joined(name, target, skeleton)
    return found


def _joined(name: str, target: _Target, skeleton: _Skeleton) -> dict[str, Stored]:
    """What one rule makes, as places in the files."""
    sources = target.sources
    # Vectors are numbered by element, everything else by row, which leaves the last dimension out.
    whole = any(len(source.shape) < 2 for source in sources)
    width = 1 if whole else sources[0].shape[-1]
    text = f"{sources[0].name!r} in {str(sources[0].file)!r}"
    if not whole and any(source.shape[-1] != width for source in sources):
        raise _refused(text, name, "its sources differ in their last dimension")
    for number, source in enumerate(sources):
        shape = source.shape if whole else (*source.shape[:-1], 1)
        rows = torch.arange(prod(shape)).view(shape) + (number << _SOURCE_SHIFT)
        target.rule.add_tensor(name, source.name, target.patterns[number], rows)
    try:
        made = target.rule.convert(name, model=skeleton, config=skeleton.config)
    except (ValueError, RuntimeError) as error:
        raise _refused(text, name, str(error)) from error
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    found: dict[str, Stored] = {}
    for key, value in made.items():
        rows = value[0] if isinstance(value, list) else value
        shape = tuple(rows.shape) if whole else (*rows.shape[:-1], width * rows.shape[-1])
        if not whole and rows.shape[-1] != 1 or not _only_moved(rows, sources, width):
            raise _refused(text, key, f"{type(target.rule).__name__} changes more than places")
        pieces = _pieces(rows.reshape(-1), sources, width)
        found[key] = JoinedTensor(name=f"{sources[0].name}{more}", shape=shape, pieces=pieces)
    return found


def _only_moved(rows: Tensor, sources: list[FileTensor], width: int) -> bool:
    """Whether every number is one that was given, and none is there twice."""
    flat = rows.reshape(-1)
    counts = torch.tensor([prod(source.shape) // width for source in sources])
    source, row = flat >> _SOURCE_SHIFT, flat & ((1 << _SOURCE_SHIFT) - 1)
    known = bool(((source >= 0) & (source < len(sources))).all())
    once = bool((flat.sort().values.diff() > 0).all())
    return known and once and bool((row < counts[source]).all())


def _pieces(rows: Tensor, sources: list[FileTensor], width: int) -> tuple[Part, ...]:
    """Runs of rows that follow each other in a file, each as one part."""
    breaks = ((rows.diff() != 1).nonzero().flatten() + 1).tolist()
    pieces: list[Part] = []
    for first, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        number = int(rows[first])
        source, row = number >> _SOURCE_SHIFT, number & ((1 << _SOURCE_SHIFT) - 1)
        part = Part(stored=sources[source], start=row * width, numel=(end - first) * width)
        pieces.append(part)
    return tuple(pieces)


def _refused(source: str, name: str, why: str) -> ModelSourceError:
    return ModelSourceError(
        f"Tensor {source} cannot be read into shards of {name!r} by transformers' own rule: {why}."
        " Load the model with from_pretrained, and store its live names with"
        " save_pretrained(folder, save_original_format=False)."
    )
