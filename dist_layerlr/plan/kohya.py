"""kohya's slots of a UNet: which modules one number of ``down_lr_weight`` and its like stands for.

sd-scripts numbers what its LoRA holds as the original UNets do: three places per stage, of which
the third is the sampler. SD 1 and 2 have 12 down, 1 mid and 12 up; SDXL has 9, 3 and 9. The first
down place is that of the first convolution, which no LoRA of theirs adapts: its number holds for
nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_layerlr.errors import ConfigError

PARTS = ("down", "mid", "up")
_START = r"(?:^|\.)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """The numbering of one kind of UNet."""

    stages: int
    mid: int

    @property
    def down(self) -> int:
        """Numbers in ``down_lr_weight``, and in ``up_lr_weight``."""
        return 3 * self.stages

    def count(self, part: str) -> int:
        """Numbers that a part takes."""
        return self.mid if part == "mid" else self.down

    def pattern(self, part: str, number: int) -> str | None:
        """Regular expression, in our names, of what a slot holds; None: nothing."""
        if part == "mid":
            inside = (r"resnets\.0", r"attentions\.0", r"resnets\.1")[number]
            return _START + r"mid_block\." + (inside + r"\." if self.mid > 1 else "")
        if part == "down" and number == 0:
            return None
        # Behind the first convolution down places begin at 1, up places at 0.
        stage, place = divmod(number - 1 if part == "down" else number, 3)
        inside = rf"(?:resnets|attentions)\.{place}"
        if place == 2:
            # An up stage has three blocks, and its sampler shares the place of the third.
            inside = (
                "downsamplers" if part == "down" else r"(?:(?:resnets|attentions)\.2|upsamplers)"
            )
        return _START + rf"{part}_blocks\.{stage}\.{inside}\."

    def slot_of(self, name: str) -> tuple[str, int] | None:
        """(part, number) of a parameter; None for what no number scales."""
        for part in PARTS:
            for number in range(self.count(part)):
                pattern = self.pattern(part, number)
                if pattern is not None and re.search(pattern, name):
                    return part, number
        return None


SD, SDXL = Slots(stages=4, mid=1), Slots(stages=3, mid=3)
_PRESETS = ("cosine", "sine", "linear", "reverse_linear", "zeros")


def weights(slots: Slots, given: Mapping[str, str]) -> dict[str, list[float]]:
    """{part: its numbers} from ``down_lr_weight`` and its like, as sd-scripts reads them.

    A short list is filled with 1, a part that is not given is 1 throughout; what does not exceed
    ``block_lr_zero_threshold`` is 0.

    Raises:
        ConfigError: more numbers than slots (which sd-scripts drops), or no number.
    """
    threshold = _number("block_lr_zero_threshold", str(given.get("block_lr_zero_threshold", 0)))
    found: dict[str, list[float]] = {}
    for part in PARTS:
        key, count = f"{part}_lr_weight", slots.count(part)
        text = given.get(key)
        if text is None or not str(text).strip():
            found[part] = [1.0] * count
            continue
        values = _values(key, str(text), count, is_list=part == "mid")
        if len(values) > count:
            raise ConfigError(
                f"Invalid {key}={text!r}: {len(values)} numbers for {count} slots. Remove the rest,"
                " which sd-scripts leaves out, or say which UNet it is (--sdxl)."
            )
        # The threshold is compared after a short list has been filled, so it acts on that 1 too.
        kept = [value if value > threshold else 0.0 for value in values]
        filled = 1.0 if 1.0 > threshold else 0.0
        found[part] = kept + [filled] * (count - len(values))
    return found


def _values(key: str, text: str, count: int, *, is_list: bool) -> list[float]:
    # One number without a comma is a preset's name to sd-scripts, but for the middle.
    if "," in text or is_list:
        return [_number(key, item) if item.strip() else 0.0 for item in text.split(",")]
    name, _, more = text.partition("+")
    base = _number(key, more) if more else 0.0
    if name.strip() not in _PRESETS:
        raise ConfigError(
            f"Invalid {key}={text!r}: must be {count} numbers with commas between them, or one of"
            f" {', '.join(_PRESETS)}, with +NUMBER behind it or not."
        )
    return [value + base for value in _curve(name.strip(), count)]


def _curve(name: str, count: int) -> Sequence[float]:
    if name == "zeros":
        return [0.0] * count
    rising = [i / (count - 1) for i in range(count)]
    if name in ("sine", "cosine"):
        rising = [math.sin(math.pi * x / 2) for x in rising]
    return rising[::-1] if name in ("cosine", "reverse_linear") else rising


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"Invalid {key}: {text!r} is no number >= 0. Check the list.")
    return value
