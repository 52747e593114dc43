"""Where each parameter sits: (stack, block index, block count), decided from ALL names of a model.

A stack is the outermost integer-keyed container of which two or more children hold an
attention-named segment. That leaves out `to_out.0`, `net.2`, `experts.3`, a lone `backbone.0` and
T5's sub-layers, whatever the container is called. Containers without attention count when their
name is a known stack name. A UNet's down, mid and up blocks are one ordered stack. Frozen
parameters count too: a LoRA on a few blocks does not make the model shallower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from dist_layerlr.plan.name_rules import PLAIN_STACKS, STACKS, NameRules, is_attention
from dist_layerlr.plan.names import ParamPath

Segments = tuple[str, ...]

# A UNet's stages in forward order, as diffusers and as CompVis call them. The middle one has no
# index in its name, and is registered last although it runs second.
UNET_STAGES = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
)
# Side branches run beside the trunk (Wan's vace_blocks) or before it (refiner stacks of Z-Image and
# HunyuanVideo), so the trunk's depth says nothing about them.
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
    """Children that hold an attention-named segment."""
    is_middle: bool = False
    """A UNet's middle stage: one block, whatever lies in it."""

    @property
    def length(self) -> int:
        return 1 if self.is_middle else max(self.children) + 1


class StackMap:
    """Answers ``locate(path)`` for one model."""

    def __init__(self, paths: Iterable[ParamPath]):
        """Find the stacks of a model from the paths of ALL its parameters, in the model's order."""
        containers = _find_containers(paths)
        stacks = _choose_stacks(containers)
        self._middles = _unet_middles(containers)
        self._locations = _number_blocks(stacks, self._middles, containers)

    def locate(self, path: ParamPath) -> Location | None:
        """The block of a parameter, or None outside blocks."""
        owner = path.owner
        for i, segment in enumerate(owner):
            key: tuple[Segments, int | None] | None = None
            if segment.isdecimal():
                key = (owner[:i], int(segment))
            elif owner[: i + 1] in self._middles:
                key = (owner[: i + 1], None)
            if key is not None and key in self._locations:
                return self._locations[key]
        return None


def _find_containers(paths: Iterable[ParamPath]) -> dict[Segments, _Container]:
    """Every integer-keyed container, plus UNet middle stages, which are one block without a key."""
    containers: dict[Segments, _Container] = {}
    middles = {stages[1] for stages in UNET_STAGES}
    for order, path in enumerate(paths):
        owner = path.owner
        keyed = [i for i, segment in enumerate(owner) if segment.isdecimal()]
        last_attention = -1
        for i, segment in enumerate(owner):
            if is_attention(segment):
                last_attention = i
            if segment in middles:
                middle = containers.setdefault(owner[: i + 1], _Container(order))
                middle.is_middle = True
                middle.children.add(0)
        for i in keyed:
            container = containers.setdefault(owner[:i], _Container(order))
            child = int(owner[i])
            container.children.add(child)
            # The attention must lie below the child, not above: in `attn.to_out.0` the list is
            # part of the attention.
            if last_attention > i:
                container.attention_children.add(child)
    return containers


def _choose_stacks(containers: dict[Segments, _Container]) -> list[Segments]:
    """The outermost containers that qualify; nothing nested in a stack is a stack.

    Three kinds are asked in turn: containers with two or more attention children and those of a
    known name; then containers with one attention child, where no stack is near; then, in a model
    without any stack so far, containers of a plain name such as ``layers``.
    """
    many = [path for path, found in containers.items() if len(found.attention_children) >= 2]
    # A pipeline saved as a list of models (`0.layers.1...`): each member has stacks of its own, so
    # the list itself is none.
    if () in many and any(len(path) > 1 for path in many):
        many.remove(())
    chosen = _outermost(many + _named(containers, STACKS))

    chosen_set = set(chosen)
    above = {path[:i] for path in chosen for i in range(len(path))}
    single = []
    for path, found in containers.items():
        lone = len(found.attention_children) == 1
        if lone and path not in above and not _is_below(path, chosen_set):
            single.append(path)
    chosen = _outermost(chosen + single)
    return chosen or _outermost(_named(containers, PLAIN_STACKS))


def _named(containers: dict[Segments, _Container], names: NameRules) -> list[Segments]:
    """Containers whose own name is in a table."""
    return [path for path in containers if path and names.first(path[-1]) is not None]


def _outermost(paths: list[Segments]) -> list[Segments]:
    """Paths that lie below no other, without repeats."""
    candidates = set(paths)
    kept = []
    for path in dict.fromkeys(paths):
        if not _is_below(path, candidates):
            kept.append(path)
    return kept


def _is_below(path: Segments, others: Set[Segments]) -> bool:
    return any(path[:i] in others for i in range(len(path)))


def _unet_middles(containers: dict[Segments, _Container]) -> set[Segments]:
    """Middle stages that stand beside a down or an up stage: a lone `mid_block` is no UNet's."""
    middles: set[Segments] = set()
    for down, middle, up in UNET_STAGES:
        for path in containers:
            beside = {path[:-1] + (down,), path[:-1] + (up,)}
            if path and path[-1] == middle and beside & containers.keys():
                middles.add(path)
    return middles


def _number_blocks(
    stacks: list[Segments], middles: set[Segments], containers: dict[Segments, _Container]
) -> dict[tuple[Segments, int | None], Location]:
    """Give every block its place; a middle stage is keyed by None, for it has no index."""
    # Lists inside a middle stage (its resnets) are no stacks: the whole stage is one block.
    outside = [s for s in stacks if s not in middles and not _is_below(s, middles)]
    trunks: dict[Segments, list[Segments]] = defaultdict(list)
    for stack in [*outside, *middles]:
        # Stacks under one parent run one after the other and form a trunk; a branch stands alone.
        trunks[stack if _is_auxiliary(stack) else stack[:-1]].append(stack)
    locations: dict[tuple[Segments, int | None], Location] = {}
    for members in trunks.values():
        members.sort(key=lambda s: (_forward_rank(s[-1] if s else ""), containers[s].first_seen))
        _number_trunk(members, middles, containers, locations)
    return locations


def _number_trunk(
    members: list[Segments],
    middles: set[Segments],
    containers: dict[Segments, _Container],
    locations: dict[tuple[Segments, int | None], Location],
) -> None:
    """Number the blocks of stacks that run one after the other, in this order."""
    total = sum(containers[stack].length for stack in members)
    is_unet = not middles.isdisjoint(members)
    together = ", ".join(map(".".join, members))
    start = 0
    for stack in members:
        count = containers[stack].length
        is_middle = stack in middles
        for i in [0] if is_middle else containers[stack].children:
            locations[(stack, None if is_middle else i)] = Location(
                stack=".".join(stack),
                block=start + i if is_unet else i,
                blocks=total if is_unet else count,
                trunk_block=start + i,
                trunk_blocks=total,
                auxiliary=_is_auxiliary(stack),
                panel=together if is_unet else ".".join(stack),
                depth=len(stack) + (0 if is_middle else 1),
            )
        start += count


def _is_auxiliary(stack: Segments) -> bool:
    return any(AUXILIARY_WORDS & set(segment.split("_")) for segment in stack)


def _forward_rank(name: str) -> int:
    """Order of siblings in the forward pass, where it differs from the order of registration."""
    for stages in UNET_STAGES:
        if name in stages:
            return stages.index(name)
    # Flux runs its double blocks first, whatever order a checkpoint lists them in.
    return 1 if name.startswith("single_") else 0
