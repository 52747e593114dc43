"""Which component a parameter is: self_attn, cross_attn, ffn, norm, else default.

First rule that hits wins.

Rules look at whole segments of the path below the block. Cross attention is asked before self
attention, because the bare ``to_q`` of an adapter would otherwise swallow every ``attn2.to_q``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dist_layerlr.plan.stacks import is_attention

SELF_ATTN, CROSS_ATTN, FFN, NORM, DEFAULT = "self_attn", "cross_attn", "ffn", "norm", "default"
COMPONENTS = (SELF_ATTN, CROSS_ATTN, FFN, NORM)
FINE_COMPONENTS = ("modulation", "embed", "head", "conv", "fused")

_NORM_CLASS = re.compile(r"(?<!Ada)(Layer|RMS|Group|Batch|Instance)Norm(\dd)?$|^Norm$")
_NORM = re.compile(r"norm(?!als?(_|$))|^ln(_\w+|\d*)$|^bn\d*$", re.IGNORECASE)
_MATRIX_CLASSES = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"})
_CROSS_LEAF = re.compile(r"^(add_\w+_proj|to_add_out|to_added_\w+|to_(q|k|v|out)_t)$")
_CROSS = re.compile(
    r"^ff_context$|^txt_attn|(^|_)attn2$|(^|_)cross_?attn|cross_?attention|^encoder_attn|_to_\w+_attn$|^EncDecAttention$"
    r"|^multihead_attn$",
    re.IGNORECASE,
)
_FFN = re.compile(
    r"(^|_)(ff|ffn|mlp|mlps|ff_in)$|^ff_[it]$|^feed_?forward|^DenseReluDense$|^intermediate$|^(gate|up|down)_proj$|^experts$"
    r"|^block_sparse_moe$"
)
_FFN_BESIDE_ATTENTION = re.compile(r"^(linear[12]|fc[12]|output)$")
_MODULATION = re.compile(
    r"modulation|scale_shift|^adaln|(^|_)ada_?ln|(^|_)mod$|^time_proj$|^distilled_guidance_layer$",
    re.I,
)
_EMBED = re.compile(
    r"embed|^(proj|conv|img|txt|x|audio_proj)_in$|_token$|_tokens$|^caption_projection$|^(shared|wte|wpe)$|^audio_caption",
    re.I,
)
_HEAD = re.compile(
    r"^(proj_out|audio_proj_out|conv_out|lm_head|heads?|classifier|score|final_layer|all_final_layer)$|_head$"
)
_CONV = re.compile(r"conv|^resnets$|samplers$")
_FUSED_LEAF = re.compile(r"^to_qkv_mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamView:
    """What a classifier rule may look at."""

    name: str
    """Canonical name, as in the plan."""
    path: tuple[str, ...]
    """Owner segments below the block (all of them outside blocks), adapters looked through."""
    leaf: str
    """`weight`, `scale_shift_table`, `lora_A` ..."""
    inside: bool
    """Whether the parameter lies in a block."""
    is_adapter: bool
    owner_class: str | None
    """Class name of the owner module when a live model was read, else None."""
    siblings: frozenset[str]
    """All segments found anywhere in the same block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A component and what gave it."""

    component: str
    """One of the seed's four, `default`, or what a user's rule said."""
    fine: str | None = None
    """Opt-in label that replaces ``component`` when the user lists it in component_lr."""
    rule: str = ""
    """The rule that hit, for `explain`."""
    is_norm: bool = False
    """Whether the tensor is a norm's own weight or bias, whatever component it is given."""


Rule = Callable[[ParamView], str | None]
_CUSTOM_RULES: list[Rule] = []
_CUSTOM_COMPONENTS: set[str] = set()


def register_component_rule(rule: Rule, *, components: tuple[str, ...] = ()) -> None:
    """Ask ``rule`` before the built-in ones: ``register_component_rule(lambda p: "ffn" if "moe" in
    p.path else None)``.

    Args:
        rule: returns a component or None. Rules registered later are asked later; a config's
            patterns come first.
        components: names beyond the known ones that the rule may return, so that component_lr may
            list them.
    """
    _CUSTOM_RULES.append(rule)
    _CUSTOM_COMPONENTS.update(components)


def known_components() -> set[str]:
    """Every key that component_lr may have without a user pattern that names it."""
    return {*COMPONENTS, *FINE_COMPONENTS, *_CUSTOM_COMPONENTS}


def has_custom_rules() -> bool:
    """Whether a Python rule is registered (it may look at whole names, so labels cannot be shared
    between blocks).
    """
    return bool(_CUSTOM_RULES)


def classify(view: ParamView) -> Label:
    """Label one parameter. Cross, self and ffn only inside blocks; norm anywhere."""
    for rule in _CUSTOM_RULES:
        component = rule(view)
        if component is not None:
            return Label(
                component=component, rule=f"registered rule {getattr(rule, '__name__', rule)!s}"
            )
    label = _norm_label(view)
    if label is None and view.inside:
        label = _block_label(view)
    if label is not None:
        return label
    return Label(component=DEFAULT, fine=_fine_label(view), rule="no component rule names it")


def _norm_label(view: ParamView) -> Label | None:
    if view.owner_class is not None and _NORM_CLASS.search(view.owner_class):
        return Label(component=NORM, rule=f"owner module is a {view.owner_class}", is_norm=True)
    named = [s for s in view.path if _NORM.search(s)]
    if not named:
        return None
    owner = view.path[-2] if view.path[-1].isdigit() and len(view.path) > 1 else view.path[-1]
    plain = view.leaf in ("weight", "bias", "gamma", "beta", "scale")
    if owner == named[-1] and plain and view.owner_class not in _MATRIX_CLASSES:
        return Label(component=NORM, rule=f"segment {owner!r} names a norm", is_norm=True)
    return Label(
        component=NORM,
        fine="modulation",
        rule=f"segment {named[-1]!r} names a norm, the tensor is a matrix in it",
    )


def _block_label(view: ParamView) -> Label | None:
    leaf_module = view.path[-1] if view.path else ""
    if _FUSED_LEAF.match(leaf_module):
        return Label(
            component=SELF_ATTN,
            fine="fused",
            rule=f"segment {leaf_module!r} fuses attention and mlp",
        )
    label = _cross_label(view, leaf_module) or _self_label(view, leaf_module)
    if label is not None:
        return label
    for segment in view.path:
        if _FFN.search(segment):
            return Label(component=FFN, rule=f"segment {segment!r} names a feed-forward")
    beside = any(is_attention(s) for s in view.siblings)
    if beside and any(_FFN_BESIDE_ATTENTION.match(s) for s in view.path):
        return Label(component=FFN, rule="linear layer beside an attention module")
    return None


def _cross_label(view: ParamView, leaf_module: str) -> Label | None:
    if _CROSS_LEAF.match(leaf_module):
        return Label(
            component=CROSS_ATTN, rule=f"segment {leaf_module!r} projects the other stream"
        )
    for segment in view.path:
        if segment == "attn2" and "attn" in view.siblings and "attn1" not in view.siblings:
            return Label(
                component=SELF_ATTN,
                rule="'attn2' beside a plain 'attn' and no 'attn1' attends to itself",
            )
        if _CROSS.search(segment):
            return Label(component=CROSS_ATTN, rule=f"segment {segment!r} names cross attention")
    return None


def _self_label(view: ParamView, leaf_module: str) -> Label | None:
    found = next((s for s in view.path if is_attention(s) and s != "attentions"), None)
    if found is None:
        return None
    fused = leaf_module == "to_out" and "to_qkv_mlp_proj" in view.siblings
    return Label(
        component=SELF_ATTN,
        fine="fused" if fused else None,
        rule=f"segment {found!r} names self attention",
    )


def _fine_label(view: ParamView) -> str | None:
    segments = (*view.path, view.leaf)
    if any(_MODULATION.search(s) for s in segments):
        return "modulation"
    if view.inside:
        last = view.path[-1] if view.path else ""
        if (last == "proj_out" and "proj_mlp" in view.siblings) or (last in ("linear1", "linear2")):
            return "fused"
        return "conv" if any(_CONV.search(s) for s in view.path) else None
    if any(_HEAD.search(s) for s in segments):
        return "head"
    if any(_EMBED.search(s) for s in segments):
        return "embed"
    return "conv" if any(_CONV.search(s) for s in segments) else None
