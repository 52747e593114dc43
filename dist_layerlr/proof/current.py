"""What the model trains now: adapters, modules and ``requires_grad`` may change after attach."""

from __future__ import annotations

from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import Problem
from dist_layerlr.sharders import Pieces


def current_problems(plan: Plan, found: Pieces) -> list[Problem]:
    """Compare the plan with what requires a gradient on this rank now. Not collective."""
    trained = found.requires_grad
    problems: list[Problem] = []
    for name in plan.entries:
        if not trained.get(name, True):
            text = f"{name}: planned, but it requires no gradient any more (requires_grad=False)"
            problems.append(("frozen", text))
        elif name not in trained:
            problems.append(("gone", f"{name}: planned, but no parameter of the model any more"))
    for name, requires_grad in trained.items():
        if requires_grad and name not in plan.entries:
            text = f"{name}: requires a gradient, but is not in the plan"
            problems.append(("new", text))
    return problems
