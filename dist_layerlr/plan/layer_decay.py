"""ViT layer decay: ``rate ** (top - layer_id)``, slow at the embeddings and first blocks, 1.0 at
the head.

Projects number layers differently; each numbering is a convention. L is the number of blocks.

=============
==================================================================================================
seed           pos_embed, patch_embed, embeddings 0; block k -> k+1; rest L+1. As detectron2 and
LW-DETR. rfdetr         as seed, L = out_feature_indexes[-1] + 1 (give it as num_layers). As
RF-DETR's live code. beit           as seed, class and mask tokens 0 too. As BEiT, EVA, MAE,
MMPretrain, MMSegmentation. dinov3         as beit, storage and register tokens 0 too. As DINOv2 and
DINOv3. timm           final norm joins the last block; a model without a head shifts up by one. As
timm's group matcher. mmdet          ConvNeXt layer-wise over stages, else as beit. As MMDetection
(needs num_layers). mmdet_stage    ConvNeXt stage-wise. As MMDetection (needs num_layers).
=============
==================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.stacks import Location

Member = tuple[ParamPath, Location | None]
LayerId = Callable[[ParamPath, Location | None, int], int]
"""(path, location, L) -> layer id in 0..L+1."""

_EMBEDDINGS = r"^(pos_embed|patch_embed|embeddings$|position_embedding|patch_embedding"
_SEED_EMBEDDINGS = re.compile(_EMBEDDINGS + ")")
_BEIT_EMBEDDINGS = re.compile(_EMBEDDINGS + "|cls_token$|mask_token$)")
_TIMM_EMBEDDINGS = re.compile(r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre|^embeddings$")
_DINO_EMBEDDINGS = re.compile(
    _EMBEDDINGS + "|cls_token$|mask_token$|storage_tokens$|register_tokens$|reg_token$)"
)
_FINAL_NORM = re.compile(r"^(norm(?!_pre)|layernorm)")


def layer_decay_factors(members: Sequence[Member], settings: DepthSettings) -> list[float]:
    """Factors of all parameters of one scope (a model or a region), frozen ones included.

    Args:
        members: path and location of each parameter.
        settings: uses layer_decay, convention, num_layers, and min_depth_factor as a floor when it
            is given.

    Raises:
        ConfigError: the scope has no blocks to number.
    """
    blocks = max((loc.blocks for _, loc in members if loc is not None), default=0)
    layers = settings.num_layers or blocks
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
    layer_id = CONVENTIONS[settings.convention]
    floor = settings.min_depth_factor or 0.0
    ids, tops = [], []
    for path, loc in members:
        count = settings.num_layers or (loc.blocks if loc is not None else layers)
        auxiliary = loc is not None and loc.auxiliary
        ids.append(count + 1 if auxiliary else layer_id(path, loc, count))
        tops.append(count + 1)
    if settings.convention == "timm" and not any(i == t for i, t in zip(ids, tops, strict=True)):
        tops = [top - 1 for top in tops]
    return [
        max(floor, decay(i, top, settings.layer_decay)) for i, top in zip(ids, tops, strict=True)
    ]


def decay(layer_id: int, top: int, rate: float) -> float:
    """``rate ** (top - layer_id)``: 1.0 at ``layer_id == top``."""
    return float(rate ** (top - layer_id))


def _numbered(embeddings: re.Pattern[str]) -> LayerId:
    def layer_id(path: ParamPath, loc: Location | None, layers: int) -> int:
        if loc is not None and "residual" not in path.owner:
            return loc.block + 1
        if any(embeddings.search(segment) for segment in (*path.owner, path.leaf)):
            return 0
        return layers + 1

    return layer_id


_beit = _numbered(_BEIT_EMBEDDINGS)
_timm_numbered = _numbered(_TIMM_EMBEDDINGS)


def _timm(path: ParamPath, loc: Location | None, layers: int) -> int:
    if loc is None and _FINAL_NORM.search((*path.owner, path.leaf)[0]):
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
        return (0, 2, 3, layers)[down[0]]
    if stage is not None:
        return (1, 2, 3 + stage[1] // 3, layers)[stage[0]]
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
