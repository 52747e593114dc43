"""The plan as text: the grid printed at start, a CSV table, and the derivation of one name."""

from __future__ import annotations

import csv
import io

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan.depth import LAYER_DECAY, DepthSettings
from dist_layerlr.plan.entries import Plan, PlanEntry, cell_name
from dist_layerlr.plan.names import canonical_name, natural_key
from dist_layerlr.plan.patterns import nearest

Cell = tuple[str | None, int | None, str]
NAME_WIDTH = 51
FOLDED, FULL = "folded", "full"
GRIDS = (FOLDED, FULL)
"""What ``--grid`` takes."""


def cells(plan: Plan) -> dict[Cell, list[PlanEntry]]:
    """Entries of each (stack, block, component), stacks in forward order, outside blocks last."""
    grouped: dict[Cell, list[PlanEntry]] = {}
    order: dict[str | None, int] = {}
    first_block: dict[str | None, int] = {}
    for entry in plan.entries.values():
        grouped.setdefault(entry.cell, []).append(entry)
        order.setdefault(entry.stack, len(order))
        block = entry.block or 0
        first_block[entry.stack] = min(block, first_block.get(entry.stack, block))

    def place(cell: Cell) -> tuple[bool, int, int, int, str]:
        # A UNet's stages are numbered through, so sorting stacks by their first block puts mid and
        # up after down, whatever order they are registered in.
        stack, block, component = cell
        return stack is None, first_block[stack], order[stack], block or 0, component

    return {cell: grouped[cell] for cell in sorted(grouped, key=place)}


def grid(plan: Plan, form: str = FULL) -> str:
    """The startup log: a header, one line per (stack, block, component), then warnings.

    Args:
        plan: of the model.
        form: ``folded`` gives one line to blocks that follow each other, as long as their rates
            rise, fall or stay.
    """
    block = plan.config.per_layer_lr
    head = f"[per_layer_lr] model_type={plan.config.model_type}"
    if not block.enabled:
        return (
            f"{head} off: flat lr={format_lr(plan.config.flat_lr)} total_params={len(plan.entries)}"
        )
    lines = [
        f"{head} strategy={block.depth.depth_strategy} {_shape(block.depth)} "
        f"groups={len(plan.groups)} total_params={len(plan.entries)}"
    ]
    runs = _runs(plan) if form == FOLDED else [[row] for row in cells(plan).items()]
    width = max([NAME_WIDTH, *(len(_name(run)) for run in runs)])
    lines += [f"  {_name(run):<{width}} {_rates(run)}" for run in runs]
    lines += [f"[per_layer_lr] warning: {text}" for text in plan.warnings]
    return "\n".join(lines)


Run = list[tuple[Cell, list[PlanEntry]]]
"""Cells of one stack and component, and their entries, in the order of their blocks."""


def _runs(plan: Plan) -> list[Run]:
    """Cells joined as ``grid`` folds them, each run in the place of its first cell."""
    runs: list[Run] = []
    last: dict[tuple[str | None, str], Run] = {}
    for cell, rows in cells(plan).items():
        stack, _, component = cell
        run = last.get((stack, component))
        # Outside blocks nothing has a number that a range could be made of.
        if run is None or stack is None or not _continues(run, cell, rows):
            run = last[stack, component] = []
            runs.append(run)
        run.append((cell, rows))
    return runs


def _continues(run: Run, cell: Cell, rows: list[PlanEntry]) -> bool:
    """Whether a cell goes on as the run did: in blocks, and in the sign of its rates' change."""
    (before, held) = run[-1]
    here = (cell[1] or 0) - (before[1] or 0), *_change(held, rows)
    if len(run) == 1:
        # Where least and greatest rate of a cell move apart, no line could say both.
        return here[1] == here[2]
    (earlier, first) = run[-2]
    return here == ((before[1] or 0) - (earlier[1] or 0), *_change(first, held))


def _change(old: list[PlanEntry], new: list[PlanEntry]) -> tuple[int, int]:
    """Signs of the change of the least and of the greatest rate."""
    (low, high), (least, most) = _bounds(old), _bounds(new)
    return (least > low) - (least < low), (most > high) - (most < high)


def _bounds(rows: list[PlanEntry]) -> tuple[float, float]:
    rates = {entry.lr for entry in rows}
    return min(rates), max(rates)


def _name(run: Run) -> str:
    (stack, first, component), last = run[0][0], run[-1][0][1]
    if len(run) == 1:
        return cell_name(run[0][0])
    return f"{stack}.{first:03d}-{last:03d}.{component}"


def _rates(run: Run) -> str:
    """The first cell's rates, the last one's where they differ, and what is counted."""
    first, last = _lrs(run[0][1]), _lrs(run[-1][1])
    if first == last:
        rates = first
    elif " .. " in first:
        # Cells with several rates each: brackets tell which two dots join what.
        rates = f"({first}) .. ({last})"
    else:
        rates = f"{first} .. {last}"
    params = sum(len(rows) for _, rows in run)
    blocks = f"  blocks={len(run)}" if len(run) > 1 else ""
    return f"lr={rates}{blocks}  params={params}{_windows(run)}"


def _windows(run: Run) -> str:
    """When the first cell trains, and the last one where that differs; nothing if always."""
    known = list(dict.fromkeys(_window(rows) for _, rows in (run[0], run[-1])))
    return f"  ({' .. '.join(known)})" if any(known) else ""


def _window(rows: list[PlanEntry]) -> str:
    return " / ".join(sorted({str(entry.timing) for entry in rows if entry.timing is not None}))


def _shape(depth: DepthSettings) -> str:
    """The number that shapes the curve most."""
    if depth.depth_strategy == LAYER_DECAY:
        return f"layer_decay={depth.layer_decay:g}"
    return f"min_depth_factor={depth.floor:g}"


def format_lr(lr: float) -> str:
    """Six decimals as in the seed, or three significant digits of an LR too small for that."""
    text = f"{lr:.6f}"
    return text if abs(float(text) - lr) <= 0.005 * lr else f"{lr:.3e}"


def _lrs(rows: list[PlanEntry]) -> str:
    low, high = _bounds(rows)
    return format_lr(low) if low == high else f"{format_lr(low)} .. {format_lr(high)}"


def to_csv(plan: Plan) -> str:
    """One row per parameter, with a header row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "name",
            "shape",
            "component",
            "stack",
            "block",
            "blocks",
            "factor",
            "lr",
            "weight_decay",
            "numel",
        ]
    )
    for e in plan.entries.values():
        place = ["" if v is None else v for v in (e.stack, e.block, e.blocks)]
        decay = "" if e.weight_decay is None else e.weight_decay
        writer.writerow(
            [
                e.name,
                "x".join(map(str, e.shape)),
                e.component,
                *place,
                # repr has all digits: what reads the table gets the same float back.
                repr(e.factor),
                repr(e.lr),
                decay,
                e.numel,
            ]
        )
    return out.getvalue()


def explain(plan: Plan, name: str) -> str:
    """How one parameter came to its learning rate.

    Raises:
        ModelSourceError: the plan has no such trainable parameter; names the nearest.
    """
    entry = plan.entries.get(canonical_name(name))
    if entry is None:
        # A name that resembles none is answered with the first ones, which show how names look.
        near = nearest(name, plan.entries) or sorted(plan.entries, key=natural_key)[:3]
        raise ModelSourceError(
            f"No trainable parameter {name!r} in this model. Nearest: {', '.join(near)}."
        )
    place = "outside every block" if entry.depth is not None else "not asked: per_layer_lr is off"
    if entry.stack is not None and entry.block is not None:
        place = f"container {entry.stack!r}, block {entry.block} of {entry.blocks}"
    decay = "the optimizer's" if entry.weight_decay is None else f"{entry.weight_decay:g}"
    return "\n".join(
        [
            entry.name,
            (
                f"  shape         {'x'.join(map(str, entry.shape)) or 'scalar'} ({entry.numel:,}"
                " elements)"
            ),
            f"  component     {entry.component}: {entry.rule}",
            f"  place         {place}",
            f"  region        {entry.region or 'none'}",
            f"  base lr       {entry.base_lr:g}",
            f"  depth factor  {entry.factor:.6g} ({_curve(entry)})",
            f"  multiplier    {entry.multiplier:g} (the region's)",
            f"  LoRA+         {entry.lora_plus:g}",
            *_steered(plan, entry),
            f"  lr            {entry.lr:.6g}",
            f"  weight decay  {decay}",
            *([] if entry.timing is None else [f"  trains        {entry.timing}"]),
            *_stepper(entry),
            *_width(entry),
        ]
    )


def _steered(plan: Plan, entry: PlanEntry) -> list[str]:
    """What changes of the running plan have made of the rate."""
    planned = plan.origin.entries[entry.name].lr if plan.origin is not None else entry.lr
    if planned == entry.lr:
        return []
    return [f"  steered       x {entry.lr / planned:.6g} of {planned:.6g}"]


def _stepper(entry: PlanEntry) -> list[str]:
    """Which optimizer, where the plan names several."""
    if entry.optimizer is None:
        return []
    times = f", lr x {entry.optimizer_multiplier:g}" if entry.optimizer_multiplier != 1.0 else ""
    return [f"  optimizer     {entry.optimizer}: {entry.optimizer_why}{times}"]


def _width(entry: PlanEntry) -> list[str]:
    """What its shape multiplies, where rates are scaled by shapes."""
    if entry.width is None:
        return []
    scales = entry.width
    lines = [f"  width         lr x {scales.lr:g}, decay x {scales.weight_decay:g}: {scales.why}"]
    return lines if entry.eps is None else [*lines, f"  epsilon       {entry.eps:g}"]


def _curve(entry: PlanEntry) -> str:
    """Which curve at which place gave the factor."""
    depth = entry.depth
    if depth is None or (entry.block is None and depth.depth_strategy != LAYER_DECAY):
        return "no depth here"
    if depth.depth_strategy == LAYER_DECAY:
        return f"layer_decay {depth.layer_decay:g}, convention {depth.convention}"
    place = (
        f"x = {entry.block}/{(entry.blocks or 1) - 1}"
        if (entry.blocks or 1) > 1
        else "the only block"
    )
    return f"{depth.depth_strategy}, {_shape(depth)}, {place}, scope {depth.depth_scope}"
