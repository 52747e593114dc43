"""Seeds that depend on what is drawn, and not on the rank, machine or order of the draws."""

from __future__ import annotations

TRAIN_STREAM, SAMPLE_STREAM, ORDER_STREAM, DROPOUT_STREAM = 1, 2, 3, 4
EXTRA_STREAM, EXPERT_STREAM, FIRST_FRAME_STREAM, MODEL_STREAM = 5, 6, 7, 8
VALIDATION_STREAM = 9
"""First number of a seed: what it is for. Equal numbers behind it then give unrelated draws."""
_MASK = (1 << 64) - 1  # splitmix64 computes modulo 2**64; Python's integers have no limit


def mix_seed(*numbers: int) -> int:
    """Mix integers into one seed in [0, 2**63), the same on every machine and Python version."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        # The finaliser of splitmix64: neighbouring numbers give unrelated seeds.
        state = ((state ^ (number & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    # torch.Generator takes signed 64-bit seeds.
    return state >> 1
