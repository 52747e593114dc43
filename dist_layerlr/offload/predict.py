"""What streaming will cost, from names and shapes, a link and a speed: hidden or exposed, step floor, memory. Pure.

Per unit of P parameters, T tokens in a microbatch that attend to S of them, width d, achieved FLOP/s F, link B byte/s:

- forward compute ``t_c = (2 P T + 4 T S d) / F``: two operations per parameter and token, two matrix products of
  attention, 2 S d each per token (Kaplan et al., arXiv 2001.08361, appendix B; PaLM, arXiv 2204.02311, appendix B);
- transfer ``t_x = bytes / B``. The forward pass is hidden iff ``t_c >= t_x``; without attention P cancels:
  ``T >= T* = w F / (2 B)`` with w bytes per parameter on the link;
- backward: input gradients cost ``t_c``, weight gradients ``t_c`` more, recomputation under checkpointing ``t_c`` more;
- at each turn of direction the units in the ring are used again: of n streamed units, S_l = min(window + 2, n) are not
  fetched. LoRA keeps the ring over the step, so it fetches ``2 (n - S_l)`` units per microbatch; a full finetune starts
  from the host and fetches ``2 n - S_l``, and sends one gradient per parameter back;
- a CPU optimizer moves 28 bytes per parameter: Adam in float32 reads p, g, m, v and writes p, m, v.

The attention of a backward pass is counted as its linear layers are, 1 to 2 times the forward; flash attention takes
2.5. Activation memory is counted for the inputs of checkpointed blocks only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_layerlr import checks
from dist_layerlr.names import canonical_name, parse
from dist_layerlr.plan import ParamInfo
from dist_layerlr.stacks import StackMap

GB = 1e9
ADAM_BYTES = 28
"""DRAM traffic of one float32 Adam step, per parameter."""
DUPLEX = 1.5
"""Both directions of PCIe at once carry 1.5 times one direction, not 2 (measured in OneTrainer's pull request 1644)."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """Sizes of a model, cut into what is streamed."""

    numel: tuple[int, ...]
    """Parameters of each block, in forward order."""
    outside: int
    """Parameters outside blocks; they stay on the device."""
    width: int
    """Hidden width: the commonest dimension of the matrices in blocks."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step on one device."""

    tokens: int
    """Of one microbatch, over all its samples, >= 1."""
    sequence: int | None = None
    """Tokens that attend to each other; None: all."""
    full: bool = False
    """Full finetune; False: LoRA, whose own small cost is left out."""
    checkpointing: bool = True
    """Blocks are computed again in backward."""
    micro_steps: int = 1
    """Microbatches per optimizer step."""


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
    """Memory bandwidth of the host, for the CPU optimizer of a full finetune; None: that step is left out."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How one parameter is stored."""

    device_bytes: float = 2.0
    """Per parameter on the device, and of its gradient; 2 is bf16."""
    host_bytes: float | None = None
    """Per parameter on the host and the link; None: as on the device."""

    @property
    def link_bytes(self) -> float:
        """Bytes per parameter on the link."""
        return self.device_bytes if self.host_bytes is None else self.host_bytes


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
    """Time and memory of one optimizer step. No overhead is in it: a floor, reached to a few percent."""

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
    """Inputs of checkpointed blocks; 0 without checkpointing, where activations are not predicted."""
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
        state = "hidden" if self.hidden else f"exposed ({self.suggested_resident} resident units would hide it)"
        return (
            f"streaming {self.units - self.resident} of {self.units} units through {self.slots} slots: {state}; "
            f"step >= {_time(self.step_s)} (compute {_time(self.compute_s)}, link {_time(self.transfer_s)}), weights on "
            f"the device {self.device_weight_bytes / GB:.2f} of {self.model_bytes / GB:.2f} GB"
        )

    def table(self) -> str:
        """Several lines for a person."""
        rows = [f"{'':<10}{'compute':>10}{'link':>10}{'floor':>10}"]
        for name, phase in (("forward", self.forward), ("backward", self.backward)):
            times = "".join(f"{_time(t):>10}" for t in (phase.compute_s, phase.transfer_s, phase.floor_s))
            rows.append(f"{name:<10}{times}   {'hidden' if phase.hidden else 'exposed'}")
        if self.optimizer_s:
            rows.append(f"{'optimizer':<10}{'':>20}{_time(self.optimizer_s):>10}   on the CPU")
        rows += [
            f"{'step':<10}{_time(self.compute_s):>10}{_time(self.transfer_s):>10}{_time(self.step_s):>10}"
            f"   without overlap {_time(self.serial_s)}",
            f"copies     {self.fetches} to the device, {self.h2d_bytes / GB:.1f} GB; {self.d2h_bytes / GB:.1f} GB back",
            f"weights    {self.device_weight_bytes / GB:.2f} of {self.model_bytes / GB:.2f} GB on the device: "
            f"{self.slots} slots, {self.resident} of {self.units} units resident, all that lies outside blocks",
            f"inputs     {self.block_input_bytes / GB:.2f} GB for checkpointed blocks"
            if self.block_input_bytes
            else "",
            f"hidden     from {self.hidden_from_tokens:,.0f} tokens per microbatch (attention left out), or with "
            f"{self.suggested_resident} resident units",
        ]
        return "\n".join(row for row in rows if row)


def predict(
    units: Units,
    work: Workload,
    machine: Machine,
    *,
    window: int = 2,
    resident: int = 0,
    storage: Storage | None = None,
) -> Prediction:
    """Predict one optimizer step.

    Args:
        units: sizes; see ``block_units``.
        work: what is computed.
        machine: how fast.
        window: units fetched ahead; the ring has ``window + 2`` slots.
        resident: units that never leave the device, in [0, number of units].
        storage: bytes per parameter; bf16 unless given.

    Raises:
        ConfigError: a count or speed out of range.
    """
    _check(units, work, machine, window, resident)
    storage = storage or Storage()
    forward, backward, chosen, slots = _phases(units, work, machine, window, resident, storage)
    streamed = [n for i, n in enumerate(units.numel) if i not in chosen]
    ring = slots * max(streamed, default=0)
    held = ring + sum(units.numel[i] for i in chosen) + units.outside
    trained = sum(units.numel) + units.outside if work.full else 0
    reused = _reused(streamed, slots)
    link = storage.link_bytes * work.micro_steps
    kept = 1 if work.full else 2
    return Prediction(
        units=len(units.numel),
        resident=resident,
        slots=slots,
        forward=forward,
        backward=backward,
        fetches=(2 * len(streamed) - kept * slots) * work.micro_steps,
        h2d_bytes=(2 * sum(streamed) - sum(reused[2 - kept :])) * link,
        d2h_bytes=storage.device_bytes * sum(streamed) * work.micro_steps * work.full,
        optimizer_s=ADAM_BYTES * trained / (machine.host_gb_s * GB) if machine.host_gb_s else 0.0,
        device_weight_bytes=held * storage.device_bytes,
        model_bytes=(sum(units.numel) + units.outside) * storage.device_bytes,
        block_input_bytes=work.checkpointing * len(units.numel) * work.tokens * units.width * storage.device_bytes,
        suggested_resident=bisect_left(
            range(len(units.numel)), True, key=lambda k: _is_hidden(units, work, machine, window, k, storage)
        ),
        hidden_from_tokens=storage.link_bytes * machine.tflops * 1e12 / (2 * machine.gb_s * GB)
        * (1 - resident / len(units.numel)),
    )  # fmt: skip


def block_units(parameters: Iterable[ParamInfo]) -> Units:
    """Cut a model into blocks, found in its names as the plan finds them.

    Raises:
        ConfigError: no block in any name.
    """
    parameters = list(parameters)
    paths = [parse(canonical_name(p.name)) for p in parameters]
    stacks = StackMap(paths)
    sizes: Counter[tuple[str, int]] = Counter()
    dimensions: Counter[int] = Counter()
    outside = 0
    for parameter, path in zip(parameters, paths, strict=True):
        place = stacks.locate(path)
        if place is None:
            outside += parameter.numel
            continue
        sizes[place.stack, place.block] += parameter.numel
        if len(parameter.shape) == 2:
            dimensions.update({size: parameter.numel for size in parameter.shape})
    if not sizes:
        raise checks.invalid(
            "MODEL", f"{len(parameters)} names", "a model with blocks, such as blocks.0.attn.to_q.weight"
        )
    width = dimensions.most_common(1)[0][0] if dimensions else 0
    return Units(numel=tuple(sizes.values()), outside=outside, width=width)


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` indices, evenly spaced."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def _is_hidden(units: Units, work: Workload, machine: Machine, window: int, resident: int, storage: Storage) -> bool:
    forward, backward, _, _ = _phases(units, work, machine, window, resident, storage)
    return forward.hidden and backward.hidden


def _phases(
    units: Units, work: Workload, machine: Machine, window: int, resident: int, storage: Storage
) -> tuple[Phase, Phase, frozenset[int], int]:
    """Forward, backward, indices of resident units, slots in use."""
    attention = 4 * work.tokens * (work.sequence or work.tokens) * units.width
    compute = [(2 * n * work.tokens + attention) / (machine.tflops * 1e12) for n in units.numel]
    chosen = frozenset(spread(resident, len(units.numel)))
    streamed = [i for i in range(len(units.numel)) if i not in chosen]
    slots = min(window + 2, len(streamed))
    link = [units.numel[i] * storage.link_bytes / (machine.gb_s * GB) + machine.copy_us * 1e-6 for i in streamed]
    back = [units.numel[i] * storage.device_bytes / (machine.gb_s * GB) * work.full for i in streamed]
    passes = 1 + work.full + work.checkpointing
    edges = compute[0] + compute[-1]
    forward_link = sum(link) - (0 if work.full else sum(link[:slots]))
    forward = _phase(sum(compute), forward_link, edges, fill=link[0] if work.full and link else 0.0)
    up = sum(link[: len(link) - slots])
    both = max(up, sum(back), (up + sum(back)) / DUPLEX)
    backward = _phase(passes * sum(compute), both, passes * edges, fill=0.0)
    return _times(forward, work.micro_steps), _times(backward, work.micro_steps), chosen, slots


def _phase(compute: float, link: float, edges: float, *, fill: float) -> Phase:
    """Overlap one pass. The ring is full at a turn: the first copy waits for a unit to end, the last unit for its copy.

    With ``fill`` the ring starts empty, and compute waits for the first copy instead.
    """
    floor = max(compute + fill, link + (edges / 2 if fill else edges)) if link else compute
    return Phase(compute_s=compute, transfer_s=link, floor_s=floor, hidden=floor <= compute + fill)


def _times(phase: Phase, count: int) -> Phase:
    return Phase(
        compute_s=phase.compute_s * count,
        transfer_s=phase.transfer_s * count,
        floor_s=phase.floor_s * count,
        hidden=phase.hidden,
    )


def _reused(streamed: Sequence[int], slots: int) -> tuple[int, int]:
    """Parameters in the ring at the two turns: the start of the forward pass, and the start of backward."""
    return sum(streamed[:slots]), sum(streamed[len(streamed) - slots :])


def _check(units: Units, work: Workload, machine: Machine, window: int, resident: int) -> None:
    for path, count, low in (("tokens", work.tokens, 1), ("micro_steps", work.micro_steps, 1), ("window", window, 1)):
        checks.integer(low)(path, count)
    for path, speed in (("gb_s", machine.gb_s), ("tflops", machine.tflops)):
        checks.number(0.0, open_low=True)(path, speed)
    if not 0 <= resident <= len(units.numel):
        raise checks.invalid("resident", resident, f"an integer in [0, {len(units.numel)}], the number of units")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
