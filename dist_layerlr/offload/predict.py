"""What streaming will cost, from names and shapes, a link and a speed: hidden or exposed, step
floor, memory. Pure.

Per unit of P parameters, T tokens in a microbatch that attend to S of them, width d, achieved
FLOP/s F, link B byte/s:

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
flash attention takes 2.5. Activation memory is counted for the inputs of checkpointed blocks only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from dist_layerlr import fields
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.stats import UnitInfo
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.plan.stacks import StackMap

GB = 1e9
ADAM_BYTES = 28
"""DRAM traffic of one float32 Adam step, per parameter."""
DUPLEX = 1.5
"""Both directions of PCIe at once carry 1.5 times one direction, not 2 (measured in OneTrainer's
pull request 1644)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model, cut into what is streamed and what is not."""

    units: tuple[UnitInfo, ...]
    """In forward order."""
    fixed_bytes: float
    """Weights that never leave the device: outside blocks, small ones, adapters."""
    width: int
    """Hidden width."""
    stepped: int = 0
    """Parameters that a CPU optimizer steps, in a full finetune; 0 for LoRA."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step on one device."""

    tokens: int
    """Of one microbatch, over all its samples, >= 1."""
    sequence: int | None = None
    """Tokens that attend to each other; None: all."""
    checkpointing: bool = True
    """Blocks are computed again in backward."""
    micro_steps: int = 1
    """Microbatches per optimizer step."""
    activation_bytes: float = 2.0
    """Per element; 2 is bf16."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured speeds of one device and its host."""

    gb_s: float
    """Host to device from pinned memory, 1e9 bytes per second."""
    tflops: float
    """Achieved, not peak, 1e12 operations per second."""
    copy_us: float = 0.0
    """Fixed time of one copy, microseconds."""
    host_gb_s: float | None = None
    """Memory bandwidth of the host, for the CPU optimizer of a full finetune; None: that step is
    left out."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """All forward or all backward passes of one step."""

    compute_s: float
    transfer_s: float
    """Time of the link alone."""
    floor_s: float
    """With both overlapped as far as the ring allows."""
    hidden: bool
    """Whether the link keeps up with the compute."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Time and memory of one optimizer step.

    No overhead is in it: a floor, reached to a few percent.
    """

    units: int
    resident: int
    """Units that stay on the device, evenly spaced."""
    slots: int
    """Units that the ring holds."""
    forward: Phase
    backward: Phase
    fetches: int
    """Copies to the device."""
    h2d_bytes: float
    d2h_bytes: float
    optimizer_s: float
    """CPU optimizer; 0 for LoRA."""
    device_weight_bytes: float
    """Ring, resident units and everything outside blocks."""
    model_bytes: float
    """All weights, as the device stores them."""
    block_input_bytes: float
    """Inputs of checkpointed blocks; 0 without checkpointing, where activations are not
    predicted."""
    suggested_resident: int
    """Fewest resident units that hide both phases."""
    hidden_from_tokens: float
    """T*: tokens per microbatch from which the forward pass is hidden, attention left out."""

    @property
    def hidden(self) -> bool:
        """Whether both phases are."""
        return self.forward.hidden and self.backward.hidden

    @property
    def compute_s(self) -> float:
        """Step without streaming, optimizer apart."""
        return self.forward.compute_s + self.backward.compute_s

    @property
    def transfer_s(self) -> float:
        """The link's share of a step, alone."""
        return self.forward.transfer_s + self.backward.transfer_s

    @property
    def serial_s(self) -> float:
        """Step without any overlap."""
        return self.compute_s + self.transfer_s + self.optimizer_s

    @property
    def step_s(self) -> float:
        """Step floor."""
        return self.forward.floor_s + self.backward.floor_s + self.optimizer_s

    def to_dict(self) -> dict[str, Any]:
        """Every field, and the sums."""
        sums = ("hidden", "compute_s", "transfer_s", "serial_s", "step_s")
        return {**asdict(self), **{key: getattr(self, key) for key in sums}}

    def line(self) -> str:
        """One line for a log."""
        state = (
            "hidden"
            if self.hidden
            else f"exposed ({self.suggested_resident} resident units would hide it)"
        )
        return (
            f"streaming {self.units - self.resident} of {self.units} units through {self.slots}"
            f" slots: {state}; step >= {_time(self.step_s)} (compute {_time(self.compute_s)}, link"
            f" {_time(self.transfer_s)}), weights on the device {self.device_weight_bytes / GB:.2f}"
            f" of {self.model_bytes / GB:.2f} GB"
        )

    def table(self) -> str:
        """Several lines for a person."""
        rows = [f"{'':<10}{'compute':>10}{'link':>10}{'floor':>10}"]
        for name, phase in (("forward", self.forward), ("backward", self.backward)):
            times = "".join(
                f"{_time(t):>10}" for t in (phase.compute_s, phase.transfer_s, phase.floor_s)
            )
            rows.append(f"{name:<10}{times}   {'hidden' if phase.hidden else 'exposed'}")
        if self.optimizer_s:
            rows.append(f"{'optimizer':<10}{'':>20}{_time(self.optimizer_s):>10}   on the CPU")
        rows += [
            (
                f"{'step':<10}{_time(self.compute_s):>10}{_time(self.transfer_s):>10}{_time(self.step_s):>10}"
                f"   without overlap {_time(self.serial_s)}"
            ),
            (
                f"copies     {self.fetches} to the device, {self.h2d_bytes / GB:.1f} GB;"
                f" {self.d2h_bytes / GB:.1f} GB back"
            ),
            (
                f"weights    {self.device_weight_bytes / GB:.2f} of {self.model_bytes / GB:.2f} GB"
                f" on the device: {self.slots} slots, {self.resident} of {self.units} units"
                " resident, all that lies outside blocks"
            ),
            (
                f"inputs     {self.block_input_bytes / GB:.2f} GB for checkpointed blocks"
                if self.block_input_bytes
                else ""
            ),
            (
                f"hidden     from {self.hidden_from_tokens:,.0f} tokens per microbatch (attention"
                f" left out), or with {self.suggested_resident} resident units"
            ),
        ]
        return "\n".join(row for row in rows if row)


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
    for path, count in (
        ("tokens", work.tokens),
        ("micro_steps", work.micro_steps),
        ("window", window),
    ):
        fields.integer(1)(path, count)
    for path, speed in (("gb_s", machine.gb_s), ("tflops", machine.tflops)):
        fields.number(0.0, open_low=True)(path, speed)
    units = layout.units
    streamed = [u for u in units if not u.resident]
    slots = min(window + 2, len(streamed))
    forward, backward = _phases(layout, work, machine, window)
    at_start, at_turn = _in_ring(streamed, slots, layout.stepped)
    link = sum(u.host_bytes for u in streamed)
    reused = sum(u.host_bytes for u in (*at_start, *at_turn))
    held = slots * max((u.device_bytes for u in streamed), default=0.0)
    held += sum(u.device_bytes for u in units if u.resident) + layout.fixed_bytes
    wanted = bisect_left(
        range(len(units)), True, key=lambda k: _hidden_with(k, layout, work, machine, window)
    )
    flop_bytes = machine.tflops * 1e12 / (2 * machine.gb_s * GB)
    return Prediction(
        units=len(units),
        resident=len(units) - len(streamed),
        slots=slots,
        forward=forward,
        backward=backward,
        fetches=(2 * len(streamed) - len(at_start) - len(at_turn)) * work.micro_steps,
        h2d_bytes=(2 * link - reused) * work.micro_steps,
        d2h_bytes=sum(u.grad_bytes for u in streamed) * work.micro_steps,
        optimizer_s=(
            ADAM_BYTES * layout.stepped / (machine.host_gb_s * GB) if machine.host_gb_s else 0.0
        ),
        device_weight_bytes=held,
        model_bytes=sum(u.device_bytes for u in units) + layout.fixed_bytes,
        block_input_bytes=work.checkpointing
        * len(units)
        * work.tokens
        * layout.width
        * work.activation_bytes,
        suggested_resident=wanted,
        hidden_from_tokens=flop_bytes * link / max(1, sum(u.numel for u in units)),
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
    """Cut a model into blocks, found in its names as the plan finds them.

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
    paths = [parse(canonical_name(p.name)) for p in parameters]
    stacks = StackMap(paths)
    sizes: Counter[tuple[str, int]] = Counter()
    streamed: Counter[tuple[str, int]] = Counter()
    for parameter, path in zip(parameters, paths, strict=True):
        if (place := stacks.locate(path)) is not None:
            sizes[place.stack, place.block] += parameter.numel
            streamed[place.stack, place.block] += parameter.numel * (parameter.numel >= smallest)
    if not sizes:
        names = f"{len(parameters)} names"
        raise fields.invalid(
            "MODEL", names, "a model with blocks, such as blocks.0.attn.to_q.weight"
        )
    if not 0 <= resident <= len(sizes):
        raise fields.invalid(
            "resident", resident, f"an integer in [0, {len(sizes)}], the number of blocks"
        )
    chosen = spread(resident, len(sizes))
    link = device_bytes if host_bytes is None else host_bytes
    total = sum(p.numel for p in parameters)
    units = tuple(
        UnitInfo(
            name=f"{stack}.{index}",
            numel=numel,
            streamed=streamed[stack, index],
            host_bytes=round(streamed[stack, index] * link),
            device_bytes=round(streamed[stack, index] * device_bytes),
            grad_bytes=round(streamed[stack, index] * device_bytes * full),
            resident=i in chosen,
        )
        for i, ((stack, index), numel) in enumerate(sizes.items())
    )
    return Layout(
        units=units,
        fixed_bytes=(total - sum(streamed.values())) * device_bytes,
        width=common_width(p.shape for p in parameters),
        stepped=total * full,
    )


def common_width(shapes: Iterable[tuple[int, ...]]) -> int:
    """The hidden width of a model: the commonest dimension of its matrices, by elements.

    0 without any.
    """
    dimensions: Counter[int] = Counter()
    for shape in shapes:
        if len(shape) == 2:
            dimensions.update(dict.fromkeys(shape, prod(shape)))
    return dimensions.most_common(1)[0][0] if dimensions else 0


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` indices, evenly spaced."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def _hidden_with(
    resident: int, layout: Layout, work: Workload, machine: Machine, window: int
) -> bool:
    """Whether the link would be hidden with that many resident units."""
    chosen = spread(resident, len(layout.units))
    units = tuple(replace(u, resident=i in chosen) for i, u in enumerate(layout.units))
    return all(
        phase.hidden for phase in _phases(replace(layout, units=units), work, machine, window)
    )


def _phases(layout: Layout, work: Workload, machine: Machine, window: int) -> tuple[Phase, Phase]:
    """Forward and backward of one optimizer step."""
    attention = 4 * work.tokens * (work.sequence or work.tokens) * layout.width
    compute = [
        (2 * u.numel * work.tokens + attention) / (machine.tflops * 1e12) for u in layout.units
    ]
    streamed = [u for u in layout.units if not u.resident]
    at_start, at_turn = _in_ring(streamed, min(window + 2, len(streamed)), layout.stepped)

    def copy_s(units: Sequence[UnitInfo]) -> float:
        return sum(u.host_bytes / (machine.gb_s * GB) + machine.copy_us * 1e-6 for u in units)

    full = layout.stepped > 0
    passes = 1 + full + work.checkpointing
    places = [i for i, u in enumerate(layout.units) if not u.resident] or [0]
    edges = sum(compute[: places[0] + 1]) + sum(compute[places[-1] :])
    up, back = (
        copy_s(streamed) - copy_s(at_turn),
        sum(u.grad_bytes for u in streamed) / (machine.gb_s * GB),
    )
    forward_link = copy_s(streamed) - copy_s(at_start)
    backward_link = max(up, back, (up + back) / DUPLEX)
    fill = copy_s(streamed[:1]) if full else 0.0
    return (
        _phase(sum(compute), forward_link, edges, fill=fill, count=work.micro_steps),
        _phase(
            passes * sum(compute), backward_link, passes * edges, fill=0.0, count=work.micro_steps
        ),
    )


def _in_ring(
    streamed: Sequence[UnitInfo], slots: int, stepped: int
) -> tuple[Sequence[UnitInfo], Sequence[UnitInfo]]:
    """Units that need no fetch: at the start of forward (none where trained weights went back), and
    of backward.
    """
    return () if stepped else streamed[:slots], streamed[len(streamed) - slots :]


def _phase(compute: float, link: float, edges: float, *, fill: float, count: int) -> Phase:
    """Overlap one pass.

    The ring is full at a turn: the link waits for the first streamed unit to end, the last one for
    it.

    ``edges`` is the compute up to the end of the first and from the start of the last. With
    ``fill`` the ring starts empty, and compute waits for the first copy instead.
    """
    floor = max(compute + fill, link + (edges / 2 if fill else edges)) if link else compute
    return Phase(
        compute_s=compute * count,
        transfer_s=link * count,
        floor_s=floor * count,
        hidden=floor <= compute + fill,
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
