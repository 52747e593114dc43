"""ViT layer decay: ``rate ** (top - layer_id)``, slow at the embeddings, 1.0 at the head.

Projects number layers differently; each numbering is a convention. L is the number of blocks.

- ``seed``: pos_embed, patch_embed and embeddings are layer 0, block k is k + 1, the rest L + 1. As
  detectron2 and LW-DETR.
- ``rfdetr``: as seed, L = out_feature_indexes[-1] + 1 (give it as num_layers). As RF-DETR's code.
- ``beit``: as seed, class and mask tokens 0 too. As BEiT, EVA, MAE, MMPretrain, MMSegmentation.
- ``dinov3``: as beit, storage and register tokens 0 too. As DINOv2 and DINOv3.
- ``timm``: the final norm joins the last block; a model without a head shifts up by one. As timm's
  group matcher.
- ``mmdet``: ConvNeXt layer-wise over its stages, else as beit. As MMDetection (needs num_layers).
- ``mmdet_stage``: ConvNeXt stage-wise. As MMDetection (needs num_layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import name_rules
from dist_layerlr.plan.name_rules import NameRules
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.stacks import Location

Member = tuple[ParamPath, Location | None]
LayerId = Callable[[ParamPath, Location | None, int], int]
"""(path, location, L) -> layer id in 0..L+1."""

_SEED_EMBEDDINGS = name_rules.VIT_EMBEDDINGS
_BEIT_EMBEDDINGS = NameRules(*_SEED_EMBEDDINGS.rules, *name_rules.CLASS_TOKENS.rules)
_DINO_EMBEDDINGS = NameRules(*_BEIT_EMBEDDINGS.rules, *name_rules.REGISTER_TOKENS.rules)
# MMDetection's layer ids of a ConvNeXt: its four downsampling layers, and its four stages, of which
# the third is long and has three blocks to a layer.
_MMDET_DOWNSAMPLE = (0, 2, 3)
_MMDET_STAGES = (1, 2)


def layer_decay_factors(
    members: Sequence[Member],
    *,
    rate: float,
    convention: str,
    num_layers: int | None = None,
    floor: float = 0.0,
) -> list[float]:
    """Factors of all parameters of one scope (a model or a region), frozen ones included.

    Args:
        members: path and location of each parameter.
        rate: of decay per layer, (0, 1].
        convention: how layers are numbered, a key of ``CONVENTIONS``.
        num_layers: L, where it is not the block count.
        floor: smallest factor, 0..1.

    Raises:
        ConfigError: the scope has no blocks to number.
    """
    blocks = max((loc.blocks for _, loc in members if loc is not None), default=0)
    layers = num_layers or blocks
    if not layers:
        raise ConfigError(
            "depth_strategy='layer_decay' found no transformer blocks to number. "
            "Check the region's match, or use another depth_strategy."
        )
    if layers < blocks:
        raise ConfigError(
            f"Invalid num_layers={layers}: the model has {blocks} blocks, and rates would rise"
            f" above the head's. Must be >= {blocks} (for RF-DETR: the last of out_feature_indexes"
            " plus 1)."
        )
    layer_id = CONVENTIONS[convention]
    ids, tops = [], []
    for path, loc in members:
        # Several stacks of one scope (two encoders) have an L each, unless the user gives it.
        count = num_layers or (loc.blocks if loc is not None else layers)
        auxiliary = loc is not None and loc.auxiliary
        ids.append(count + 1 if auxiliary else layer_id(path, loc, count))
        tops.append(count + 1)
    at_the_top = [layer == top for layer, top in zip(ids, tops, strict=True)]
    # timm gives factor 1 to the last layer that exists: without a head that is the final norm's.
    if convention == "timm" and not any(at_the_top):
        tops = [top - 1 for top in tops]
    factors = []
    for layer, top in zip(ids, tops, strict=True):
        factors.append(max(floor, decay(layer, top, rate)))
    return factors


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
    "rfdetr": _numbered(_SEED_EMBEDDINGS),
    "beit": _beit,
    "dinov3": _numbered(_DINO_EMBEDDINGS),
    "timm": _timm,
    "mmdet": _mmdet,
    "mmdet_stage": _mmdet_stage,
}
