"""Predict time and memory of a streamed step from names and shapes, a link and a speed. No torch.

Take a unit of P parameters, T tokens in a microbatch that attend to S of them each, width d,
achieved FLOP/s F, link B byte/s:

- forward compute ``t_c = (2 P T + 4 T S d) / F``: two operations per parameter and token, two
  matrix products of attention, 2 S d each per token (Kaplan et al., arXiv 2001.08361, appendix B;
  PaLM, arXiv 2204.02311, appendix B);
- transfer ``t_x = bytes / B``. The forward pass is hidden iff ``t_c >= t_x``; without attention P
  cancels: ``T >= T* = w F / (2 B)`` with w bytes per parameter on the link;
- backward: input gradients cost ``t_c``, weight gradients ``t_c`` more, recomputation under
  checkpointing ``t_c`` more;
- at each turn of direction the units in the ring are used again: of n streamed units, S_l =
  min(window + 2, n) are not fetched. LoRA keeps the ring over the step, so it fetches ``2 (n -
  S_l)`` units per microbatch; a full finetune starts from the host and fetches ``2 n - S_l``, and
  sends one gradient per parameter back;
- a CPU optimizer moves 28 bytes per parameter: Adam in float32 reads p, g, m, v and writes p, m, v.

The attention of a backward pass is counted as its linear layers are, 1 to 2 times the forward;
flash attention takes 2.5 times. The inputs of checkpointed blocks are the only activations counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from dist_layerlr import fields
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.prediction import GB, Layout, Machine, Phase, Prediction, Workload
from dist_layerlr.offload.stats import UnitInfo
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.plan.stacks import StackMap

ADAM_BYTES = 28
"""DRAM traffic of one float32 Adam step, per parameter: seven numbers of 4 bytes."""
DUPLEX = 1.5
"""Both directions of PCIe at once carry 1.5 times one direction, not 2 (measured in OneTrainer's
pull request 1644)."""


def predict(layout: Layout, work: Workload, machine: Machine, *, window: int) -> Prediction:
    """Predict one optimizer step.

    Args:
        layout: what is streamed; ``layout_from_names``, or a handle's.
        work: what is computed.
        machine: how fast.
        window: units fetched ahead; the ring has ``window + 2`` slots.

    Raises:
        ConfigError: a count or speed out of range.
    """
    _check_ranges(work, machine, window)
    units = layout.units
    streamed = layout.streamed
    slots = min(window + 2, len(streamed))
    forward, backward = _phases(layout, work, machine, window)
    at_start, at_turn = _already_in_ring(streamed, slots, layout.stepped)
    reused = _host_bytes((*at_start, *at_turn))
    return Prediction(
        units=len(units),
        resident=len(units) - len(streamed),
        slots=slots,
        forward=forward,
        backward=backward,
        fetches=(2 * len(streamed) - len(at_start) - len(at_turn)) * work.micro_steps,
        h2d_bytes=(2 * _host_bytes(streamed) - reused) * work.micro_steps,
        d2h_bytes=_grad_bytes(streamed) * work.micro_steps,
        optimizer_s=_optimizer_s(layout, machine),
        device_weight_bytes=_held_bytes(layout, streamed, slots),
        model_bytes=sum(u.device_bytes for u in units) + layout.fixed_bytes,
        block_input_bytes=_block_input_bytes(layout, work),
        suggested_resident=_fewest_resident(layout, work, machine, window),
        hidden_from_tokens=_hidden_from_tokens(units, streamed, machine),
    )


def layout_from_names(
    parameters: Iterable[ParamInfo],
    *,
    full: bool = False,
    resident: int = 0,
    device_bytes: float = 2.0,
    host_bytes: float | None = None,
    min_numel: int | None = None,
) -> Layout:
    """Find the blocks of a model in its names, as the plan finds them.

    Args:
        parameters: of the base model, without adapters.
        full: a full finetune; False: LoRA on a frozen base.
        resident: blocks that stay on the device, evenly spaced.
        device_bytes: per parameter, and per element of its gradient; 2 is bf16.
        host_bytes: per parameter on the host and the link; None: as on the device.
        min_numel: smaller parameters are not streamed; None: as many as a policy has by default.

    Raises:
        ConfigError: no block in any name, or more resident blocks than there are.
    """
    parameters = list(parameters)
    smallest = StreamPolicy().min_numel if min_numel is None else min_numel
    sizes, streamed = _block_sizes(parameters, smallest)
    if not 0 <= resident <= len(sizes):
        raise fields.invalid(
            "resident", resident, f"an integer in [0, {len(sizes)}], the number of blocks"
        )
    chosen = spread(resident, len(sizes))
    link = device_bytes if host_bytes is None else host_bytes
    total = sum(p.numel for p in parameters)
    units: list[UnitInfo] = []
    for i, ((stack, index), numel) in enumerate(sizes.items()):
        moving = streamed[stack, index]
        units.append(
            UnitInfo(
                name=f"{stack}.{index}",
                numel=numel,
                streamed=moving,
                host_bytes=round(moving * link),
                device_bytes=round(moving * device_bytes),
                grad_bytes=round(moving * device_bytes) if full else 0,
                resident=i in chosen,
            )
        )
    return Layout(
        units=tuple(units),
        fixed_bytes=(total - sum(streamed.values())) * device_bytes,
        width=common_width(p.shape for p in parameters),
        stepped=total if full else 0,
    )


def common_width(shapes: Iterable[tuple[int, ...]]) -> int:
    """The hidden width of a model: the commonest dimension of its matrices, by elements.

    0 without any.
    """
    elements: Counter[int] = Counter()
    for shape in shapes:
        if len(shape) == 2:
            # A square matrix counts once, not once for each of its dimensions; fromkeys keeps the
            # order, which decides between widths that are equally common.
            for dimension in dict.fromkeys(shape):
                elements[dimension] += prod(shape)
    return elements.most_common(1)[0][0] if elements else 0


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` indices, evenly spaced."""
    # The middles of ``count`` equal parts: (i + 1/2) * total / count, rounded down.
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def _check_ranges(work: Workload, machine: Machine, window: int) -> None:
    at_least_one, positive = fields.integer(1), fields.number(0.0, open_low=True)
    at_least_one("tokens", work.tokens)
    at_least_one("micro_steps", work.micro_steps)
    at_least_one("window", window)
    positive("gb_s", machine.gb_s)
    positive("tflops", machine.tflops)


def _block_sizes(
    parameters: Sequence[ParamInfo], smallest: int
) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """{(stack, block): elements} of all parameters, and of those that are streamed."""
    paths = [parse(canonical_name(p.name)) for p in parameters]
    stacks = StackMap(paths)
    sizes: Counter[tuple[str, int]] = Counter()
    streamed: Counter[tuple[str, int]] = Counter()
    for parameter, path in zip(parameters, paths, strict=True):
        place = stacks.locate(path)
        if place is not None:
            sizes[place.stack, place.block] += parameter.numel
            if parameter.numel >= smallest:
                streamed[place.stack, place.block] += parameter.numel
    if not sizes:
        names = f"{len(parameters)} names"
        raise fields.invalid(
            "MODEL", names, "a model with blocks, such as blocks.0.attn.to_q.weight"
        )
    return sizes, streamed


def _host_bytes(units: Iterable[UnitInfo]) -> int:
    return sum(u.host_bytes for u in units)


def _grad_bytes(units: Iterable[UnitInfo]) -> float:
    return sum(u.grad_bytes for u in units)


def _held_bytes(layout: Layout, streamed: Sequence[UnitInfo], slots: int) -> float:
    """Bytes of weights on the device. Every slot is as large as the largest streamed unit."""
    ring = slots * max((u.device_bytes for u in streamed), default=0.0)
    resident = sum(u.device_bytes for u in layout.units if u.resident)
    return ring + (resident + layout.fixed_bytes)


def _optimizer_s(layout: Layout, machine: Machine) -> float:
    if not machine.host_gb_s:
        return 0.0
    return ADAM_BYTES * layout.stepped / (machine.host_gb_s * GB)


def _block_input_bytes(layout: Layout, work: Workload) -> float:
    """Bytes of what checkpointing keeps: the (tokens, width) input of every block."""
    if not work.checkpointing:
        return 0.0
    return len(layout.units) * work.tokens * layout.width * work.activation_bytes


def _hidden_from_tokens(
    units: Sequence[UnitInfo], streamed: Sequence[UnitInfo], machine: Machine
) -> float:
    """T* of the formulas above, with w = bytes on the link per parameter of the model."""
    flop_bytes = machine.tflops * 1e12 / (2 * machine.gb_s * GB)
    return flop_bytes * _host_bytes(streamed) / max(1, sum(u.numel for u in units))


def _fewest_resident(layout: Layout, work: Workload, machine: Machine, window: int) -> int:
    """Fewest resident units that hide both phases."""

    def hidden(resident: int) -> bool:
        chosen = spread(resident, len(layout.units))
        units = tuple(replace(u, resident=i in chosen) for i, u in enumerate(layout.units))
        forward, backward = _phases(replace(layout, units=units), work, machine, window)
        return forward.hidden and backward.hidden

    # More resident units leave less to copy, so the answers are False up to some count and True
    # from there: bisection finds it. With all units resident nothing is copied.
    return bisect_left(range(len(layout.units)), True, key=hidden)


def _phases(layout: Layout, work: Workload, machine: Machine, window: int) -> tuple[Phase, Phase]:
    """Forward and backward of one optimizer step."""
    compute = _compute_s(layout, work, machine)
    streamed = layout.streamed
    slots = min(window + 2, len(streamed))
    at_start, at_turn = _already_in_ring(streamed, slots, layout.stepped)

    def copy_s(units: Sequence[UnitInfo]) -> float:
        return sum(u.host_bytes / (machine.gb_s * GB) + machine.copy_us * 1e-6 for u in units)

    full = layout.stepped > 0
    # Compute up to the end of the first streamed unit, and from the start of the last one.
    places = [i for i, u in enumerate(layout.units) if not u.resident] or [0]
    edges = sum(compute[: places[0] + 1]) + sum(compute[places[-1] :])
    forward = _phase(
        sum(compute),
        copy_s(streamed) - copy_s(at_start),
        edges,
        fill=copy_s(streamed[:1]) if full else 0.0,
        count=work.micro_steps,
    )
    # Backward computes input gradients, weight gradients of a full finetune, and recomputation.
    passes = 1 + int(full) + int(work.checkpointing)
    to_device = copy_s(streamed) - copy_s(at_turn)
    to_host = _grad_bytes(streamed) / (machine.gb_s * GB)
    backward = _phase(
        passes * sum(compute),
        max(to_device, to_host, (to_device + to_host) / DUPLEX),
        passes * edges,
        fill=0.0,
        count=work.micro_steps,
    )
    return forward, backward


def _compute_s(layout: Layout, work: Workload, machine: Machine) -> list[float]:
    """Forward time of each unit: ``t_c`` of the formulas above."""
    attention = 4 * work.tokens * (work.sequence or work.tokens) * layout.width
    flops = machine.tflops * 1e12
    return [(2 * u.numel * work.tokens + attention) / flops for u in layout.units]


def _already_in_ring(
    streamed: Sequence[UnitInfo], slots: int, stepped: int
) -> tuple[Sequence[UnitInfo], Sequence[UnitInfo]]:
    """Units that need no fetch: when a forward begins, and when its backward begins."""
    # A backward ends with the first units in the ring. A full finetune drops them, because the
    # optimizer is about to change their masters.
    at_start = () if stepped else streamed[:slots]
    at_turn = streamed[len(streamed) - slots :]
    return at_start, at_turn


def _phase(compute: float, link: float, edges: float, *, fill: float, count: int) -> Phase:
    """Lower bound of one pass when copies overlap compute, times ``count`` passes.

    At its start every slot is taken, so the first copy can begin only when the first streamed block
    has finished; and the last block cannot begin before its copy has arrived. ``edges`` is the
    compute of these two. With ``fill``, the time of one copy, the ring starts empty instead:
    copies begin at once, and compute waits for the first.
    """
    floor = compute
    if link:
        # With an empty ring one of the two edges is left: the last block's.
        alone = edges / 2 if fill else edges
        floor = max(compute + fill, link + alone)
    return Phase(
        compute_s=compute * count,
        transfer_s=link * count,
        floor_s=floor * count,
        hidden=floor <= compute + fill,
    )
