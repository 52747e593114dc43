"""Checkpoints keyed by canonical name, that any layout loads. See docs/checkpoints.md."""
