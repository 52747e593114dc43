"""Streaming a model through a device that is smaller than it."""
