"""ViT layer decay: ``rate ** (top - layer_id)``, slow at the embeddings, 1.0 at the head.

Projects number layers differently; each numbering is a convention. L is the number of blocks.

- ``seed``: pos_embed, patch_embed and embeddings are layer 0, block k is k + 1, the rest L + 1. As
  detectron2 and LW-DETR.
- ``rfdetr``: as seed, L = out_feature_indexes[-1] + 1: read from a live model, else give it as
  num_layers. As RF-DETR's code.
- ``beit``: as seed, class and mask tokens 0 too. As BEiT, EVA, MAE, MMPretrain, MMSegmentation.
- ``dinov3``: as beit, storage and register tokens 0 too. As DINOv2 and DINOv3.
- ``timm``: a live model's own group_matcher. By name alone, as a plain ViT's matcher: the final
  norm joins the last block; a model without a head shifts up by one.
- ``mmdet``: ConvNeXt layer-wise over its stages, else as beit. As MMDetection (needs num_layers).
- ``mmdet_stage``: ConvNeXt stage-wise. As MMDetection (needs num_layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import name_rules
from dist_layerlr.plan.name_rules import NameRules
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.stacks import Location

Member = tuple[ParamPath, Location | None]
Segments = tuple[str, ...]
LayerId = Callable[[ParamPath, Location | None, int], int]
"""(path, location, L) -> layer id in 0..L+1."""

TIMM, RFDETR = "timm", "rfdetr"
"""The conventions that ask the live model."""
_SEED_EMBEDDINGS = name_rules.VIT_EMBEDDINGS
_BEIT_EMBEDDINGS = NameRules(*_SEED_EMBEDDINGS.rules, *name_rules.CLASS_TOKENS.rules)
_DINO_EMBEDDINGS = NameRules(*_BEIT_EMBEDDINGS.rules, *name_rules.REGISTER_TOKENS.rules)
# MMDetection's layer ids of a ConvNeXt: its four downsampling layers, and its four stages, of which
# the third is long and has three blocks to a layer.
_MMDET_DOWNSAMPLE = (0, 2, 3)
_MMDET_STAGES = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayer:
    """What a live model's own code says of a parameter's layer."""

    layer: int | None
    """Its layer id; None: the name decides."""
    layers: int
    """L: what no layer takes is L + 1."""


def layer_decay_factors(
    members: Sequence[Member],
    *,
    rate: float,
    convention: str,
    num_layers: int | None = None,
    floor: float = 0.0,
    own: Sequence[ModelLayer | None] = (),
) -> list[float]:
    """Factors of all parameters of one scope (a model or a region), frozen ones included.

    Args:
        members: path and location of each parameter.
        rate: of decay per layer, (0, 1].
        convention: how layers are numbered, a key of ``CONVENTIONS``.
        num_layers: L, where it is not the block count.
        floor: smallest factor, 0..1.
        own: what the live model says of each member.

    Raises:
        ConfigError: the scope has no blocks to number.
    """
    said = _heard(convention, num_layers, own) or [None] * len(members)
    blocks = max((loc.blocks for _, loc in members if loc is not None), default=0)
    layers = num_layers or max((one.layers for one in said if one is not None), default=blocks)
    by_itself = any(one is not None and one.layer is not None for one in said)
    _check_layers(layers, blocks, convention, by_itself)
    layer_id = CONVENTIONS[convention]
    stacks = {tuple(loc.stack.split(".")) for _, loc in members if loc is not None}
    ids, tops = [], []
    for (path, loc), one in zip(members, said, strict=True):
        # Several stacks of one scope (two encoders) have an L each, unless the user or the model
        # gives it.
        given = num_layers or (one.layers if one is not None else None)
        count = given or (loc.blocks if loc is not None and not by_itself else layers)
        auxiliary = loc is not None and loc.auxiliary
        if one is not None and one.layer is not None:
            ids.append(one.layer)
        elif auxiliary:
            ids.append(count + 1)
        else:
            ids.append(layer_id(_below(path, loc, stacks), loc, count))
        tops.append(count + 1)
    at_the_top = [layer == top for layer, top in zip(ids, tops, strict=True)]
    # timm gives factor 1 to the last layer that exists: without a head that is the final norm's.
    if convention == TIMM and not any(at_the_top):
        tops = [top - 1 for top in tops]
    factors = []
    for layer, top in zip(ids, tops, strict=True):
        factors.append(max(floor, decay(layer, top, rate)))
    return factors


def note_by_name(
    members: Sequence[Member],
    *,
    convention: str,
    num_layers: int | None = None,
    own: Sequence[ModelLayer | None] = (),
) -> str | None:
    """What names alone could not tell about these layers; None: nothing is in doubt."""
    if num_layers is not None or any(_heard(convention, num_layers, own)):
        return None
    blocks = max((loc.blocks for _, loc in members if loc is not None), default=0)
    if convention == RFDETR:
        return (
            f"convention='rfdetr' counts {blocks} layers, the blocks: RF-DETR counts"
            " out_feature_indexes[-1] + 1, which names do not tell. Give out_feature_indexes (or"
            " num_layers), or plan the live model"
        )
    staged = next((loc for path, loc in members if loc is not None and _staged(path, loc)), None)
    if convention == TIMM and staged is not None:
        return (
            f"convention='timm' counts the {staged.blocks} stages of {staged.stack!r} as layers,"
            " because names do not tell whether timm counts their blocks. Plan the live model,"
            " whose group_matcher is asked"
        )
    return None


def _heard(
    convention: str, num_layers: int | None, own: Sequence[ModelLayer | None]
) -> list[ModelLayer | None]:
    """What the model says, under the conventions that ask it; the user's num_layers overrides."""
    if num_layers is not None or convention not in (TIMM, RFDETR):
        return []
    heard: list[ModelLayer | None] = []
    for one in own:
        fits = one is not None and (one.layer is not None) == (convention == TIMM)
        heard.append(one if fits else None)
    return heard


def _check_layers(layers: int, blocks: int, convention: str, by_itself: bool) -> None:
    if not layers:
        live = " A live timm model is numbered by itself." if convention == TIMM else ""
        raise ConfigError(
            "depth_strategy='layer_decay' found no transformer blocks to number. "
            f"Check the region's match, or use another depth_strategy.{live}"
        )
    if layers < blocks and not by_itself:
        raise ConfigError(
            f"Invalid num_layers={layers}: the model has {blocks} blocks, and rates would rise"
            f" above the head's. Must be >= {blocks} (for RF-DETR: the last of out_feature_indexes"
            " plus 1)."
        )


def _below(path: ParamPath, loc: Location | None, stacks: set[Segments]) -> ParamPath:
    """The path without the modules that hold a stack too: `vit.layernorm` beside `vit.layers`."""
    if loc is not None:
        return path
    shared = 0
    for stack in stacks:
        same = 0
        while same < min(len(stack), len(path.owner)) and stack[same] == path.owner[same]:
            same += 1
        shared = max(shared, same)
    return replace(path, owner=path.owner[shared:])


def _staged(path: ParamPath, loc: Location) -> bool:
    """Whether a block of the stack is a stage, with a list of blocks in it."""
    first, second = (*path.owner[loc.depth :], "", "")[:2]
    listed = name_rules.PLAIN_STACKS.first(first) is not None and second.isdecimal()
    return first.isdecimal() or listed


def decay(layer_id: int, top: int, rate: float) -> float:
    """``rate ** (top - layer_id)``: 1.0 at ``layer_id == top``."""
    return float(rate ** (top - layer_id))


def _numbered(embeddings: NameRules) -> LayerId:
    """Layer ids of a ViT whose layer 0 is what a table names."""

    def layer_id(path: ParamPath, loc: Location | None, layers: int) -> int:
        # detectron2 adds residual branches to a pretrained ViT; they are new and not slowed.
        if loc is not None and "residual" not in path.owner:
            return loc.block + 1
        if embeddings.first_of((*path.owner, path.leaf)) is not None:
            return 0
        return layers + 1

    return layer_id


_beit = _numbered(_BEIT_EMBEDDINGS)
_timm_numbered = _numbered(name_rules.TIMM_EMBEDDINGS)


def _timm(path: ParamPath, loc: Location | None, layers: int) -> int:
    if loc is None and name_rules.FINAL_NORMS.first((*path.owner, path.leaf)[0]) is not None:
        return layers
    return _timm_numbered(path, loc, layers)


def _stage(path: ParamPath, container: str) -> tuple[int, int] | None:
    """(stage, block) below a ConvNeXt container, or None elsewhere."""
    if container not in path.owner:
        return None
    keys = path.owner[path.owner.index(container) + 1 :]
    stage = int(keys[0]) if keys and keys[0].isdigit() else 0
    return stage, int(keys[1]) if len(keys) > 1 and keys[1].isdigit() else 0


def _mmdet(path: ParamPath, loc: Location | None, layers: int) -> int:
    down, stage = _stage(path, "downsample_layers"), _stage(path, "stages")
    if down is not None:
        return (*_MMDET_DOWNSAMPLE, layers)[down[0]]
    if stage is not None:
        return (*_MMDET_STAGES, 3 + stage[1] // 3, layers)[stage[0]]
    return _beit(path, loc, layers)


def _mmdet_stage(path: ParamPath, loc: Location | None, layers: int) -> int:
    if _stage(path, "downsample_layers") is not None:
        return 0
    stage = _stage(path, "stages")
    return stage[0] + 1 if stage is not None else _beit(path, loc, layers)


CONVENTIONS: dict[str, LayerId] = {
    "seed": _numbered(_SEED_EMBEDDINGS),
    RFDETR: _numbered(_SEED_EMBEDDINGS),
    "beit": _beit,
    "dinov3": _numbered(_DINO_EMBEDDINGS),
    TIMM: _timm,
    "mmdet": _mmdet,
    "mmdet_stage": _mmdet_stage,
}
