"""TableAdamW where it cannot run: without Triton, and on the CPU without its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILD = """
import torch
import dist_layerlr, dist_layerlr.optim
try:
    dist_layerlr.optim.TableAdamW([torch.nn.Parameter(torch.ones(2))])
except dist_layerlr.ConfigError as error:
    print(error)
"""


def said(before: str = "") -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run(
        [sys.executable, "-c", before + BUILD], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_triton_everything_imports_and_the_class_says_what_to_install() -> None:
    text = said("import sys\nsys.modules['triton'] = None\n")
    assert text.startswith("TableAdamW needs Triton, which cannot be imported here")
    assert "pip install triton, or use torch.optim.AdamW" in text


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install triton",
)
def test_on_the_cpu_it_says_how_to_test_it_there() -> None:
    text = said()
    assert text.startswith("Invalid parameter on device 'cpu': TableAdamW runs on CUDA")
    assert "or use torch.optim.AdamW" in text and "TRITON_INTERPRET=1" in text
