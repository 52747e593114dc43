"""Which component a parameter is: self_attn, cross_attn, ffn, norm, else default.

The first rule that hits wins. Rules look at whole segments of the path below the block; the words
they look for are the tables of ``name_rules``. Cross attention is asked before self attention,
because the bare ``to_q`` of an adapter would otherwise swallow every ``attn2.to_q``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_layerlr.plan import name_rules
from dist_layerlr.plan.name_rules import (
    CONV,
    CROSS_ATTN,
    DEFAULT,
    EMBED,
    FFN,
    FUSED,
    HEAD,
    MODULATION,
    NORM,
    ROUTER,
    SELF_ATTN,
    NameRule,
    is_attention,
)

COMPONENTS = (SELF_ATTN, CROSS_ATTN, FFN, NORM)
FINE_COMPONENTS = (MODULATION, EMBED, HEAD, CONV, FUSED, ROUTER)

# A norm's own tensors, next to its statistics; any other name below a norm is a matrix of AdaLN.
_NORM_LEAVES = frozenset({"weight", "bias", "gamma", "beta", "scale"})
# Classes that hold a matrix whatever they are called: `norm1.linear` is no norm.
_MATRIX_CLASSES = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"})


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
    row: NameRule | None = None
    """The row of ``name_rules`` that decided, if one did."""


Rule = Callable[[ParamView], str | None]
_CUSTOM_RULES: list[Rule] = []
_CUSTOM_COMPONENTS: set[str] = set()


def register_component_rule(rule: Rule, *, components: tuple[str, ...] = ()) -> None:
    """Ask a rule of the user's before the built-in ones.

    ``register_component_rule(lambda p: "ffn" if "moe" in p.path else None)``

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
    """Whether a rule of the user's is registered.

    It may look at whole names, so labels cannot be shared between equal blocks.
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
    fine, row = _fine_label(view)
    return Label(component=DEFAULT, fine=fine, rule="no component rule names it", row=row)


def _norm_label(view: ParamView) -> Label | None:
    """A norm's own weight or bias, or a matrix that stands below a module called a norm."""
    if view.owner_class is not None:
        rule = name_rules.NORM_CLASSES.first(view.owner_class)
        if rule is not None:
            why = f"owner module is a {view.owner_class}"
            return Label(component=NORM, rule=why, is_norm=True, row=rule)
    named = [segment for segment in view.path if name_rules.NORMS.first(segment)]
    if not named:
        return None
    # `norms.3.weight` belongs to the norm `norms`: the index is a list's, not a module's name.
    in_list = view.path[-1].isdigit() and len(view.path) > 1
    owner = view.path[-2] if in_list else view.path[-1]
    holds_matrix = view.owner_class in _MATRIX_CLASSES
    rule = name_rules.NORMS.first(named[-1])
    if owner == named[-1] and view.leaf in _NORM_LEAVES and not holds_matrix:
        why = f"segment {owner!r} names a norm"
        return Label(component=NORM, rule=why, is_norm=True, row=rule)
    why = f"segment {named[-1]!r} names a norm, the tensor is a matrix in it"
    return Label(component=NORM, fine=MODULATION, rule=why, row=rule)


def _block_label(view: ParamView) -> Label | None:
    """Attention or feed-forward, inside a block."""
    leaf_module = view.path[-1] if view.path else ""
    fused = name_rules.FUSED_LEAF.first(leaf_module)
    if fused is not None:
        why = f"segment {leaf_module!r} fuses attention and mlp"
        return Label(component=SELF_ATTN, fine=FUSED, rule=why, row=fused)
    label = _cross_label(view, leaf_module) or _self_label(view, leaf_module)
    label = label or _router_label(view)
    if label is not None:
        return label
    for segment in view.path:
        rule = name_rules.FEED_FORWARD.first(segment)
        if rule is not None:
            why = f"segment {segment!r} names a feed-forward"
            return Label(component=FFN, rule=why, row=rule)
    rule = name_rules.FFN_BESIDE_ATTENTION.first_of(view.path)
    if rule is not None and any(is_attention(sibling) for sibling in view.siblings):
        return Label(component=FFN, rule="linear layer beside an attention module", row=rule)
    return None


def _cross_label(view: ParamView, leaf_module: str) -> Label | None:
    rule = name_rules.CROSS_LEAF.first(leaf_module)
    if rule is not None:
        why = f"segment {leaf_module!r} projects the other stream"
        return Label(component=CROSS_ATTN, rule=why, row=rule)
    for segment in view.path:
        # SD 3.5 medium calls its second self attention `attn2`; UNets and Wan, whose `attn2` reads
        # the prompt, call the first one `attn1`.
        if segment == "attn2" and "attn" in view.siblings and "attn1" not in view.siblings:
            why = "'attn2' beside a plain 'attn' and no 'attn1' attends to itself"
            return Label(component=SELF_ATTN, rule=why)
        rule = name_rules.CROSS.first(segment)
        if rule is not None:
            why = f"segment {segment!r} names cross attention"
            return Label(component=CROSS_ATTN, rule=why, row=rule)
    return None


def _self_label(view: ParamView, leaf_module: str) -> Label | None:
    for segment in view.path:
        # A UNet's `attentions` lists whole transformers, whose norms and feed-forwards are not
        # attention.
        if segment == "attentions" or not is_attention(segment):
            continue
        # Flux 2's single blocks: the output projection of the fused matrix is fused too.
        fused = leaf_module == "to_out" and "to_qkv_mlp_proj" in view.siblings
        return Label(
            component=SELF_ATTN,
            fine=FUSED if fused else None,
            rule=f"segment {segment!r} names self attention",
            row=name_rules.ATTENTION.first(segment),
        )
    return None


def _router_label(view: ParamView) -> Label | None:
    """What chooses among experts: no component of the four, so that `ffn` does not move it."""
    for segment in view.path:
        rule = name_rules.ROUTERS.first(segment)
        alone = segment == "gate" and "experts" not in view.siblings
        if rule is not None and not alone:
            why = f"segment {segment!r} chooses among experts"
            return Label(component=DEFAULT, fine=ROUTER, rule=why, row=rule)
    return None


def _fine_label(view: ParamView) -> tuple[str | None, NameRule | None]:
    """The fine component of a parameter that no component takes, and the row that says so."""
    segments = (*view.path, view.leaf)
    modulation = name_rules.MODULATIONS.first_of(segments)
    if modulation is not None:
        return MODULATION, modulation
    if view.inside:
        last = view.path[-1] if view.path else ""
        # Flux's single blocks: `proj_out` ends attention and feed-forward together; the original
        # repository calls the two fused matrices `linear1` and `linear2`.
        if (last == "proj_out" and "proj_mlp" in view.siblings) or last in ("linear1", "linear2"):
            return FUSED, None
        # Heads and embeddings are looked for outside blocks only, and a leaf is no convolution.
        rule = name_rules.CONVS.first_of(view.path)
    else:
        rule = (
            name_rules.HEADS.first_of(segments)
            or name_rules.EMBEDS.first_of(segments)
            or name_rules.CONVS.first_of(segments)
        )
    return (None, None) if rule is None else (rule.label, rule)
