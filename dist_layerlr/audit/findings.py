"""What is wrong with how a script trains, by kind, with the names. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_layerlr.audit.merge import Row, Seen, whole
from dist_layerlr.errors import LayerLRError
from dist_layerlr.plan.build import build_plan
from dist_layerlr.plan.config import Config
from dist_layerlr.plan.diff import Rows, plan_diff
from dist_layerlr.plan.entries import Plan

WARNINGS = {
    "decay": "with weight decay, though norms or biases",
    "precision": "with moments in fewer than 32 bits",
    "no gradient": "in an optimizer, without a gradient other than 0 in the steps watched",
    "outside": "trained by the optimizer, in no module",
    "clipping": "gradients are clipped by a default",
    "schedule": "a schedule runs ahead of the optimizer",
    "audit": "the audit itself failed in part, and what it says may be incomplete",
}
"""Kinds that a script may mean: exit status 1 only under ``--strict``."""
FAULTS = {
    "dead": "trainable, in no optimizer",
    "unmoved": "stepped with a gradient at a rate above 0, not changed by one bit",
    "stale": "the optimizer holds tensors that are no model's: it was built before sharding",
    "twice": "stepped by two groups or two optimizers",
    "incomplete": "of which the ranks together do not step each element once",
    "flattened": "several rates were given, one is in force",
    "changed": "the ratios between the groups' rates are not those that were given",
    "unread": "a multiplier of the group's rate is read by nobody",
    "effect": "moved at another rate than their group says",
    "mixing": "the optimizer mixes elements of a tensor, of which each rank holds a part",
    "ranks": "trained with different settings by the ranks",
    "sharder": "the model is not sharded as the launcher was told",
    "unreadable": "the names of what is stepped cannot be told",
    "plan": "trains otherwise than planned",
}
"""Kinds that are no script's intention: exit status 1."""
KINDS = {**FAULTS, **WARNINGS}
_HALF = frozenset({"float16", "bfloat16"})
_CLOSE = 1e-6
"""Relative; some optimizers keep their rate as a float32 tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of fault, and whom it concerns."""

    kind: str
    names: tuple[str, ...] = ()
    text: str = ""
    """What cannot be said by names."""

    @property
    def is_fault(self) -> bool:
        """Whether it decides the exit status without ``--strict``."""
        return self.kind in FAULTS

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind,
            "fault": self.is_fault,
            "meaning": KINDS[self.kind],
            "names": list(self.names),
            "text": self.text,
        }


def find(seen: Seen, plan: Plan | Rows | None = None) -> list[Finding]:
    """Everything that is wrong, faults first.

    Args:
        seen: what the ranks saw.
        plan: what is to train, if anybody has said so.
    """
    named: dict[str, list[str]] = {}
    for name, known in seen.parameters.items():
        if known["trainable"] and name not in seen.rows and name not in seen.waiting:
            named.setdefault("dead", []).append(name)
    exempt = _exempt(seen)
    for name, row in seen.rows.items():
        for kind in _of_row(seen, name, row, exempt):
            named.setdefault(kind, []).append(name)
    if seen.apart:
        named["ranks"] = list(seen.apart)
    found = [Finding(kind=kind, names=tuple(names)) for kind, names in named.items()]
    found += [Finding(kind=kind, text=text) for kind, text in seen.problems]
    found += [Finding(kind="audit", text=text) for text in seen.faults]
    if plan is not None:
        found += [Finding(kind="plan", text=line) for line in against(seen, plan)]
    # Faults stand first in the tables above, the gravest of them at the top.
    order = list(KINDS)
    return sorted(found, key=lambda one: order.index(one.kind))


def _of_row(seen: Seen, name: str, row: Row, exempt: frozenset[str]) -> Iterable[str]:
    # At lr 0 a name is held on purpose. Without a gradient it may be an expert that no token chose.
    if not row["moved"] and row["lr"] > 0.0:
        yield "unmoved" if row["gradient"] else "no gradient"
    if row["twice"]:
        yield "twice"
    # A name in two groups is counted twice as well, and is told as that.
    elements = whole(seen, name)
    if elements is not None and not row["twice"] and round(row["elements"]) != elements:
        yield "incomplete"
    if not row.get("obeys", True):
        yield "effect"
    if row["weight_decay"] > 0.0 and name in exempt:
        yield "decay"
    if any(kind in _HALF for kind in (row.get("state") or {}).values()):
        yield "precision"


def _exempt(seen: Seen) -> frozenset[str]:
    """Names of norms and biases, by the rule of the plan: true shapes and owners."""
    block = {"enabled": True, "unmatched": "default", "no_decay": ["ndim<=1", "norm"]}
    if not any(known["trainable"] for known in seen.parameters.values()):
        return frozenset()
    # The plan's own rules, so that `dist-layerlr plan` and an audit mean the same by a norm.
    try:
        plan = build_plan(seen.infos(), {"per_layer_lr": block})
    except LayerLRError:
        # kohya's scripts flatten names so that only their base model tells them: shapes are left.
        return frozenset(n for n, known in seen.parameters.items() if len(known["shape"]) <= 1)
    return frozenset(n for n, entry in plan.entries.items() if entry.weight_decay == 0.0)


def against(seen: Seen, plan: Plan | Rows) -> list[str]:
    """What trains otherwise than planned, in the words of ``dist-layerlr diff``."""
    rows: Rows = plan.to_dict()["parameters"] if isinstance(plan, Plan) else plan
    return plan_diff(rows, live_rows(seen, rows), called=("plan", "script"))


def live_rows(seen: Seen, planned: Rows) -> dict[str, Mapping[str, Any]]:
    """What was seen, as rows of a plan; rates without the multiplier of a schedule."""
    cells = build_plan(seen.infos(), Config()).to_dict()["parameters"] if seen.rows else {}
    live: dict[str, Mapping[str, Any]] = {}
    for name, row in seen.rows.items():
        wanted = planned.get(name, {})
        # A plan knows no schedule: its multiplier, read from initial_lr, is taken off.
        lr = row["lr"] / (row["factor"] or 1.0)
        if math.isclose(lr, wanted.get("lr", -1.0), rel_tol=_CLOSE):
            lr = wanted["lr"]  # a product and a quotient end a rounding away
        decay = row["weight_decay"]
        if name in planned and wanted["weight_decay"] is None:
            decay = None  # the plan leaves it to the optimizer
        place = wanted or cells.get(name) or {"stack": None, "block": None, "component": "default"}
        live[name] = {
            **{key: place[key] for key in ("stack", "block", "component")},
            "lr": lr,
            "weight_decay": decay,
            "numel": whole(seen, name) or wanted.get("numel", 0),
        }
    return live
