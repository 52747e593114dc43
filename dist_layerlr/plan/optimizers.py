"""Which optimizer steps a name: matrices inside blocks to one, the rest to another. Pure.

Orthogonalising optimizers (Muon) and preconditioning ones (SOAP, Shampoo) are made for matrices of
hidden layers. Whether a parameter is one is decided here, from its name and its true shape: after
sharding a matrix may be 1-D, empty, or a stretch of a flat tensor that it shares with biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_layerlr import fields
from dist_layerlr.fields import setting
from dist_layerlr.plan.components import Label
from dist_layerlr.plan.name_rules import CROSS_ATTN, FFN, FUSED, SELF_ATTN
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.patterns import PATTERN, compile_pattern

OPTIMIZERS_BLOCK = "optimizers"
"""Key of the config, beside ``per_layer_lr``."""
REST = "rest"
SPLIT, WHOLE = "split", "whole"

Shape = tuple[int, ...]


def _parse_patterns(path: str, value: object) -> tuple[str, ...]:
    patterns = fields.strings(path, value)
    for number, pattern in enumerate(patterns):
        PATTERN(f"{path}[{number}]", pattern)
    return patterns


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRule:
    """What one optimizer of several takes, and how it steps it."""

    components: tuple[str, ...] = setting(
        fields.strings,
        default=(SELF_ATTN, CROSS_ATTN, FFN),
        doc="Components whose matrices it takes. A fine one (`embed`, `head`, `modulation` ...) is"
        " taken only if it is listed.",
    )
    match: tuple[str, ...] = setting(
        fields.Check(_parse_patterns, "a list of name patterns, section 5"),
        default=(),
        doc="Further parameters that it takes, whatever their component.",
    )
    matrices: bool = setting(
        fields.boolean,
        default=True,
        doc="Only matrices, by true shape, of more than one row and column. false: any tensor.",
    )
    fused: str = setting(
        fields.one_of(lambda: (SPLIT, WHOLE, REST)),
        default=SPLIT,
        doc="Matrices that hold several (qkv, qkv_mlp, gate_up): stepped part by part, as one, or"
        " by the rest's optimizer.",
    )
    lora: bool = setting(fields.boolean, default=False, doc="Take the pairs of adapters, too.")
    lr_multiplier: float = setting(
        fields.number(0.0), default=1.0, doc="Multiplies the planned rates of what it takes."
    )
    weight_decay: float | None = setting(
        fields.number(0.0),
        default=None,
        shown="the plan's",
        doc="Of what it takes, where neither a region nor no_decay says other.",
    )
    momentum: float = setting(fields.number(0.0, 1.0), default=0.95, doc="Muon only.")
    nesterov: bool = setting(fields.boolean, default=True, doc="Muon only.")
    ns_steps: int = setting(
        fields.integer(1), default=5, doc="Muon only: Newton-Schulz iterations, below 100."
    )
    adjust_lr: str = setting(
        fields.one_of(lambda: ("original", "match_rms_adamw")),
        default="original",
        doc="Muon only: how a rate follows from the matrix's shape; `match_rms_adamw` takes"
        " AdamW's rates as they are.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizers:
    """The ``optimizers`` block: rules in order, and who takes the rest."""

    rules: Mapping[str, OptimizerRule]
    rest: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the rest's last."""
        return (*self.rules, self.rest)


def _parse(path: str, value: object) -> Optimizers:
    given = fields.mapping(path, value)
    rests = list(filter(lambda name: given[name] == REST, given))
    if len(rests) != 1 or len(given) < 2:
        allowed = f"blocks by optimizer, and exactly one optimizer with {REST!r} in place of one"
        raise fields.invalid(path, dict(given), allowed)
    rules: dict[str, OptimizerRule] = {}
    for name, rule in given.items():
        if name == rests[0]:
            continue
        where = f"{path}.{name}"
        row = dict(fields.mapping(where, rule))
        # `fused: adamw` is as good as `fused: rest`, where adamw takes the rest.
        if row.get("fused") == rests[0]:
            row["fused"] = REST
        rules[name] = OptimizerRule(**fields.read(where, row, OptimizerRule))
        # torch.optim.Muon refuses it too, but in its first step.
        if rules[name].ns_steps >= 100:
            raise fields.invalid(f"{where}.ns_steps", rules[name].ns_steps, "an integer below 100")
    return Optimizers(rules=rules, rest=rests[0])


OPTIMIZERS = fields.Check(
    _parse, '`{"muon": {...}, "adamw": "rest"}`: blocks by optimizer, one of them `"rest"`'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which optimizer steps a name, and why."""

    optimizer: str | None = None
    """None: the plan names no optimizers."""
    why: str = ""
    parts: tuple[int, ...] = ()
    """Rows of each matrix inside a fused one; empty: it is stepped as one."""
    multiplier: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the choice is made from."""

    name: str
    shape: Shape
    path: ParamPath
    label: Label
    in_block: bool
    owner_class: str | None


def choose(given: Optimizers | None, asked: Candidate, shapes: Mapping[str, Shape]) -> Choice:
    """The optimizer of one parameter.

    Args:
        given: the config's block.
        asked: the parameter.
        shapes: of all parameters, by name in the base model: neighbours tell the parts of a fused
            matrix apart.
    """
    if given is None:
        return Choice()
    # Why the last block that listed it did not take it; else, that none did.
    reason = f"component {asked.label.fine or asked.label.component}, which no other lists"
    for name, rule in given.rules.items():
        taken = _why_taken(rule, asked)
        if taken is None:
            continue
        # The first rule that lists a name need not be able to take it: a later one may.
        refused, parts = _why_not(rule, asked, shapes) if rule.matrices else (None, ())
        if refused is None:
            if len(parts) > 1:
                taken += f", as {len(parts)} matrices of {', '.join(map(str, parts))} rows"
            return Choice(
                optimizer=name,
                why=taken,
                parts=parts,
                multiplier=rule.lr_multiplier,
                weight_decay=rule.weight_decay,
            )
        reason = f"not {name}: {refused}"
    return Choice(optimizer=given.rest, why=reason)


def _why_taken(rule: OptimizerRule, asked: Candidate) -> str | None:
    """Why a rule lists a parameter; None: it does not."""
    label = asked.label
    for pattern in rule.match:
        matches = compile_pattern(pattern)
        if matches(asked.name) or matches(asked.path.base_name):
            return f"match {pattern!r}"
    if label.fine is not None and label.fine in rule.components:
        return f"component {label.fine}"
    # A fine label is what the tensor is; the coarse one only says where it stands: a modulation's
    # matrix under a norm, or an expert's router, is no hidden layer.
    if label.component in rule.components and label.fine in (None, FUSED):
        where = "in a block" if asked.in_block else "outside every block"
        return f"component {label.component}, {where}"
    return None


def _why_not(
    rule: OptimizerRule, asked: Candidate, shapes: Mapping[str, Shape]
) -> tuple[str | None, tuple[int, ...]]:
    """(why a listed parameter is no matrix for this optimizer, or None; parts)."""
    if len(asked.shape) != 2:
        return f"a {len(asked.shape)}-D tensor is no matrix", ()
    if min(asked.shape) < 2:
        return "a single row or column is no matrix", ()
    if asked.path.is_adapter:
        # The product of the pair is the update; neither factor is a hidden layer's matrix.
        return (None if rule.lora else "a factor of an adapter (lora is false)"), ()
    kind = fused_kind(asked.path)
    if kind is None or rule.fused == WHOLE:
        return None, ()
    if rule.fused == REST:
        return "several matrices in one (fused is 'rest')", ()
    # transformers' Conv1D (GPT-2) keeps its weight as (inputs, outputs): the matrices are columns,
    # and parts are cut by rows.
    if asked.owner_class == "Conv1D":
        return "several matrices side by side in a Conv1D, which are not split", ()
    parts = fused_parts(kind, asked.path, asked.shape, shapes)
    return ("several matrices in one, whose sizes nothing tells" if not parts else None), parts


_QKV, _KV, _PAIR, _QKV_MLP, _MIXED = "qkv", "kv", "pair", "qkv_mlp", "interleaved"
_FUSED: Mapping[str, str] = {
    **dict.fromkeys(
        "qkv to_qkv qkv_proj Wqkv in_proj_weight to_added_qkv add_qkv_proj".split(), _QKV
    ),
    **dict.fromkeys("img_attn_qkv txt_attn_qkv self_attn_qkv c_attn".split(), _QKV),
    **dict.fromkeys("kv to_kv kv_proj Wkv to_added_kv cross_attn_kv".split(), _KV),
    **dict.fromkeys("gate_up_proj w12 gate_up fc1_gate".split(), _PAIR),
    **dict.fromkeys("to_qkv_mlp_proj qkv_mlp".split(), _QKV_MLP),
    # Falcon, BLOOM and GPT-NeoX store query, key and value head by head.
    "query_key_value": _MIXED,
}
"""{last segment: how several matrices lie in one}."""
_OUTPUTS = ("proj", "out_proj", "o_proj", "to_out", "to_out.0", "dense", "c_proj", "wo")
"""The output projection beside a fused one: its columns are the query's rows."""


def fused_kind(path: ParamPath) -> str | None:
    """How several matrices lie in one; None: it is one."""
    if path.leaf in _FUSED:
        return _FUSED[path.leaf]
    return _FUSED.get(path.owner[-1]) if path.owner else None


def fused_parts(
    kind: str, path: ParamPath, shape: Shape, shapes: Mapping[str, Shape]
) -> tuple[int, ...]:
    """Rows of each matrix in a fused one; empty: unknown."""
    rows, width = shape
    if kind in (_KV, _PAIR):
        return (rows // 2, rows // 2) if rows % 2 == 0 else ()
    if kind == _QKV_MLP:
        return _with_mlp(rows, width, _columns(path, shapes))
    if kind != _QKV:
        return ()
    # Grouped queries: keys and values have fewer heads than the query. First, because a query
    # wider than the model and its few keys may add up to three widths by chance.
    query = _columns(path, shapes)
    if query is not None and query < rows and (rows - query) % 2 == 0:
        heads = (rows - query) // 2
        if query % heads == 0 or rows != 3 * width:
            return (query, heads, heads)
    return (width, width, width) if rows == 3 * width else ()


def _with_mlp(rows: int, width: int, columns: int | None) -> tuple[int, ...]:
    """Query, key, value, and the feed-forward's first matrix, or its two of a gated one."""
    left = rows - 3 * width
    if left <= 0 or columns is None:
        return ()
    # The output projection of a parallel block takes attention and feed-forward side by side.
    hidden = columns - width
    if left == hidden:
        return (width, width, width, hidden)
    return (width, width, width, hidden, hidden) if left == 2 * hidden else ()


def _columns(path: ParamPath, shapes: Mapping[str, Shape]) -> int | None:
    """Columns of the output projection beside a fused one."""
    # torch's MultiheadAttention holds the fused matrix itself, with no layer around it.
    owner = path.owner if path.leaf == "in_proj_weight" else path.owner[:-1]
    for name in _OUTPUTS:
        shape = shapes.get(".".join((*owner, name, "weight")))
        if shape is not None and len(shape) == 2:
            return shape[1]
    return None
