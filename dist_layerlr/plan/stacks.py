"""Where each parameter sits: (stack, block index, block count), decided from ALL names of a model.

A stack is the outermost integer-keyed container of which two or more children hold an
attention-named segment. That leaves out `to_out.0`, `net.2`, `experts.3`, a lone `backbone.0` and
T5's sub-layers, whatever the container is called. Containers without attention count when their
name is a known stack name. A UNet's down, mid and up blocks are one ordered stack. Frozen
parameters count too: a LoRA on a few blocks does not make the model shallower.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dist_layerlr.plan.names import ParamPath

Segments = tuple[str, ...]

_ATTENTION = re.compile(r"(^|_)(attn|attention|attentions|crossattn)\d*($|_)|Attention$|^qkv$")

STACK_NAMES = frozenset(
    "transformer_blocks single_transformer_blocks double_blocks single_blocks joint_blocks"
    " double_stream_blocks single_stream_blocks down_blocks up_blocks input_blocks output_blocks"
    " refiner_blocks vace_blocks".split()
)
"""Stacks even when no child holds an attention-named segment (original Flux ``single_blocks``)."""
PLAIN_STACK_NAMES = frozenset("blocks block layers layer stages h resblocks".split())
"""Stacks only in a model that has none by the other rules (a ConvNeXt, an MLP mixer)."""
UNET_STAGES = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
)
AUXILIARY_WORDS = frozenset({"refiner", "vace"})
"""A stack with one of these words in its path does not lie on the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """The block that a parameter belongs to."""

    stack: str
    """Dotted path of the container, as in the model."""
    block: int
    blocks: int
    """Index and count within the stack; over down, mid and up for a UNet."""
    trunk_block: int
    trunk_blocks: int
    """Index and count over all stacks of the trunk in forward order."""
    auxiliary: bool
    """A refiner or control branch: its depth factor is 1.0 unless a region says otherwise."""
    panel: str
    """Stacks that share one numbering: the stack itself, or a UNet's three stages."""
    depth: int
    """Number of leading owner segments that the container and the block's key take up."""


@dataclass(slots=True)
class _Container:
    first_seen: int
    children: set[int] = field(default_factory=set)
    attention_children: set[int] = field(default_factory=set)

    is_middle: bool = False
    """A UNet's middle stage: one block, whatever lies in it."""

    @property
    def length(self) -> int:
        return 1 if self.is_middle else max(self.children) + 1


def is_attention(segment: str) -> bool:
    """Whether a segment names an attention module (`attn1`, `audio_attn2`, `SelfAttention`,
    `attentions`).
    """
    return _ATTENTION.search(segment) is not None


class StackMap:
    """Answers ``locate(path)`` for one model."""

    def __init__(self, paths: Iterable[ParamPath]):
        containers = _find_containers(paths)
        stacks = _choose_stacks(containers)
        self._stages = _unet_stages(containers)
        self._locations = _number_blocks(stacks, self._stages, containers)

    def locate(self, path: ParamPath) -> Location | None:
        """The block of a parameter, or None outside blocks."""
        owner = path.owner
        for i, segment in enumerate(owner):
            if segment.isdecimal():
                found = self._locations.get((owner[:i], int(segment)))
            else:
                found = (
                    self._locations.get((owner[: i + 1], None))
                    if owner[: i + 1] in self._stages
                    else None
                )
            if found is not None:
                return found
        return None


def _find_containers(paths: Iterable[ParamPath]) -> dict[Segments, _Container]:
    """Every integer-keyed container, plus UNet middle stages, which are one block without a key."""
    containers: dict[Segments, _Container] = {}
    middles = {stages[1] for stages in UNET_STAGES}
    attention: dict[str, bool] = {}
    for order, path in enumerate(paths):
        owner = path.owner
        keyed = [i for i, segment in enumerate(owner) if segment.isdecimal()]
        last_attention = -1
        for i, segment in enumerate(owner):
            if segment not in attention:
                attention[segment] = is_attention(segment)
            if attention[segment]:
                last_attention = i
            if segment in middles:
                middle = containers.setdefault(owner[: i + 1], _Container(order))
                middle.is_middle = True
                middle.children.add(0)
        for i in keyed:
            container = containers.setdefault(owner[:i], _Container(order))
            child = int(owner[i])
            container.children.add(child)
            if last_attention > i:
                container.attention_children.add(child)
    return containers


def _choose_stacks(containers: dict[Segments, _Container]) -> list[Segments]:
    """The outermost containers that qualify; nothing nested in a stack is a stack."""
    many = [path for path, c in containers.items() if len(c.attention_children) >= 2]
    if () in many and any(len(path) > 1 for path in many):
        many.remove(())  # a list of models, each with stacks of its own
    named = [path for path in containers if path and path[-1] in STACK_NAMES]
    chosen = _outermost(many + named)
    above = {path[:i] for path in chosen for i in range(len(path))}
    single = [p for p, c in containers.items() if len(c.attention_children) == 1 and p not in above]
    single = [p for p in single if not any(p[:i] in set(chosen) for i in range(len(p)))]
    chosen = _outermost(chosen + single)
    if not chosen:
        chosen = _outermost([path for path in containers if path and path[-1] in PLAIN_STACK_NAMES])
    return chosen


def _outermost(paths: list[Segments]) -> list[Segments]:
    candidates = set(paths)
    return [p for p in dict.fromkeys(paths) if not any(p[:i] in candidates for i in range(len(p)))]


def _unet_stages(containers: dict[Segments, _Container]) -> set[Segments]:
    """Middle stages that stand beside a down or an up stage."""
    middles: set[Segments] = set()
    for down, middle, up in UNET_STAGES:
        for path in containers:
            if (
                path
                and path[-1] == middle
                and {path[:-1] + (down,), path[:-1] + (up,)} & containers.keys()
            ):
                middles.add(path)
    return middles


def _number_blocks(
    stacks: list[Segments], middles: set[Segments], containers: dict[Segments, _Container]
) -> dict[tuple[Segments, int | None], Location]:
    stacks = [s for s in stacks if not any(s[:i] in middles for i in range(len(s) + 1))] + list(
        middles
    )
    trunks: dict[Segments, list[Segments]] = defaultdict(list)
    for stack in stacks:
        trunks[stack[:-1] if not _is_auxiliary(stack) else stack].append(stack)
    locations: dict[tuple[Segments, int | None], Location] = {}
    for members in trunks.values():
        members.sort(key=lambda s: (_forward_rank(s[-1] if s else ""), containers[s].first_seen))
        total = sum(containers[s].length for s in members)
        is_unet = any(s in middles for s in members)
        start = 0
        together = ", ".join(".".join(s) for s in members)
        for stack in members:
            count = containers[stack].length
            for i in [0] if stack in middles else containers[stack].children:
                locations[(stack, None if stack in middles else i)] = Location(
                    stack=".".join(stack),
                    block=start + i if is_unet else i,
                    blocks=total if is_unet else count,
                    trunk_block=start + i,
                    trunk_blocks=total,
                    auxiliary=_is_auxiliary(stack),
                    panel=together if is_unet else ".".join(stack),
                    depth=len(stack) + (stack not in middles),
                )
            start += count
    return locations


def _is_auxiliary(stack: Segments) -> bool:
    return any(AUXILIARY_WORDS & set(segment.split("_")) for segment in stack)


def _forward_rank(name: str) -> int:
    """Order of siblings in the forward pass where it differs from registration (a UNet registers
    mid last).
    """
    for stages in UNET_STAGES:
        if name in stages:
            return stages.index(name)
    return 1 if name.startswith("single_") else 0
