"""Every error a user can cause, one class per cause.

The text of each names the field or parameter, the value, what is allowed, and what to do next, in
one line where it fits. Command line programs print that text as ``error_line`` and exit with status
2.
"""

from __future__ import annotations


class LayerLRError(Exception):
    """Base of all errors that are the user's to mend. Assertions are ours."""


class ConfigError(LayerLRError, ValueError):
    """A configuration value, file or rule that cannot be what the user wants."""


class ModelSourceError(LayerLRError, ValueError):
    """A checkpoint, name list or data file that is missing, damaged or of another kind."""


class UnmatchedParams(LayerLRError, ValueError):
    """Trainable parameters that no rule names, under ``unmatched: error``."""


class CheckpointError(LayerLRError, RuntimeError):
    """A checkpoint cannot be written, or is damaged, incomplete or of another model."""


class PlanMismatch(LayerLRError, RuntimeError):
    """The live optimizer does not train some parameter as the plan says."""


class OffloadError(LayerLRError, RuntimeError):
    """A model that cannot be streamed as asked, or one that was changed under a running stream."""


def error_line(program: str, message: object) -> str:
    """How a command line program says an error: ``PROGRAM: error: MESSAGE``, in one line."""
    return f"{program}: error: {' '.join(str(message).split())}"
