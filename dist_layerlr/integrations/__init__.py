"""The plan inside other people's trainers. Each module imports its library inside functions."""

from dist_layerlr.integrations.deepspeed import initialize_deepspeed as initialize_deepspeed
