"""What a prediction is made from, and what it says. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dist_layerlr.offload.stats import UnitInfo

GB = 1e9
"""Bytes; speeds are given in these, sizes are shown in them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of a model's units, and of what lies outside them."""

    units: tuple[UnitInfo, ...]
    """In forward order."""
    fixed_bytes: float
    """Bytes of the weights that never leave the device: outside blocks, small ones, adapters."""
    width: int
    """Hidden width."""
    stepped: int = 0
    """Parameters that a CPU optimizer steps, in a full finetune; 0 for LoRA."""

    @property
    def streamed(self) -> list[UnitInfo]:
        """Units that do not stay on the device."""
        return [unit for unit in self.units if not unit.resident]


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
    """Time of the compute alone."""
    transfer_s: float
    """Time of the copies alone."""
    floor_s: float
    """Least time of both, overlapped as far as the ring allows."""
    hidden: bool
    """Whether the link keeps up with the compute."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Time and memory of one optimizer step.

    Times are lower bounds: nothing but compute, copies and the optimizer is counted. Measured steps
    come to a few percent above them.
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
    """Copied to the device."""
    d2h_bytes: float
    """Copied back: gradients."""
    optimizer_s: float
    """Time of the CPU optimizer; 0 for LoRA."""
    device_weight_bytes: float
    """Bytes of the ring, the resident units and everything outside blocks."""
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
        """Whether the link keeps up with the compute in both phases."""
        return self.forward.hidden and self.backward.hidden

    @property
    def compute_s(self) -> float:
        """Time of a step without streaming, the optimizer's left out."""
        return self.forward.compute_s + self.backward.compute_s

    @property
    def transfer_s(self) -> float:
        """Time of all copies of a step, alone."""
        return self.forward.transfer_s + self.backward.transfer_s

    @property
    def serial_s(self) -> float:
        """Time of a step in which copies overlap nothing."""
        return self.compute_s + self.transfer_s + self.optimizer_s

    @property
    def step_s(self) -> float:
        """Least time of a step."""
        # The three add up: backward needs the loss, and the optimizer all gradients.
        return self.forward.floor_s + self.backward.floor_s + self.optimizer_s

    def to_dict(self) -> dict[str, Any]:
        """Every field, and the properties that are computed from them."""
        # `asdict` knows fields alone; programs that read the JSON should not have to add up.
        return asdict(self) | {
            "hidden": self.hidden,
            "compute_s": self.compute_s,
            "transfer_s": self.transfer_s,
            "serial_s": self.serial_s,
            "step_s": self.step_s,
        }

    def line(self) -> str:
        """Say in one line, for a log, what the step will cost."""
        state = "hidden"
        if not self.hidden:
            state = f"exposed ({self.suggested_resident} resident units would hide it)"
        return (
            f"streaming {self.units - self.resident} of {self.units} units through {self.slots}"
            f" slots: {state}; step >= {_time(self.step_s)} (compute {_time(self.compute_s)}, link"
            f" {_time(self.transfer_s)}), weights on the device {self.device_weight_bytes / GB:.2f}"
            f" of {self.model_bytes / GB:.2f} GB"
        )

    def table(self) -> str:
        """Say the same in several lines, for a person."""
        rows = [f"{'':<10}{'compute':>10}{'link':>10}{'floor':>10}"]
        for name, phase in (("forward", self.forward), ("backward", self.backward)):
            state = "hidden" if phase.hidden else "exposed"
            rows.append(_row(name, phase.compute_s, phase.transfer_s, phase.floor_s, state))
        if self.optimizer_s:
            rows.append(f"{'optimizer':<10}{'':>20}{_time(self.optimizer_s):>10}   on the CPU")
        overlap = f"without overlap {_time(self.serial_s)}"
        rows.append(_row("step", self.compute_s, self.transfer_s, self.step_s, overlap))
        rows.append(
            f"copies     {self.fetches} to the device, {self.h2d_bytes / GB:.1f} GB;"
            f" {self.d2h_bytes / GB:.1f} GB back"
        )
        rows.append(
            f"weights    {self.device_weight_bytes / GB:.2f} of {self.model_bytes / GB:.2f} GB"
            f" on the device: {self.slots} slots, {self.resident} of {self.units} units"
            " resident, all that lies outside blocks"
        )
        # Without checkpointing the activations are not predicted, and a 0 would say that there are
        # none.
        if self.block_input_bytes:
            rows.append(f"inputs     {self.block_input_bytes / GB:.2f} GB for checkpointed blocks")
        rows.append(
            f"hidden     from {self.hidden_from_tokens:,.0f} tokens per microbatch (attention"
            f" left out), or with {self.suggested_resident} resident units"
        )
        return "\n".join(rows)


def _row(name: str, compute: float, link: float, floor: float, note: str) -> str:
    """One line of the table: three times, in columns of ten."""
    return f"{name:<10}{_time(compute):>10}{_time(link):>10}{_time(floor):>10}   {note}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
