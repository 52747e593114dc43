"""``dist-layerlr``: one file per group of commands, none of which imports torch before it runs."""

from dist_layerlr.cli.program import main as main
