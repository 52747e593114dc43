"""The packages of the vision families can be imported beside a CPU build of torch, without their
weights and without rfdetr's own `train` extra."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("rfdetr", reason="the extra `families` is not installed")
pytest.importorskip("timm", reason="the extra `families` is not installed")


def test_what_rfdetr_imports_when_it_trains_is_installed() -> None:
    from rfdetr.datasets.coco import CocoDetection
    from rfdetr.training import RFDETRDataModule, RFDETRModelModule
    from rfdetr.training.coco_map import OnePassCocoMeanAveragePrecision
    from torch.utils.data import Dataset

    assert issubclass(CocoDetection, Dataset)
    assert issubclass(RFDETRModelModule, torch.nn.Module)
    assert hasattr(RFDETRDataModule, "train_dataloader")
    OnePassCocoMeanAveragePrecision(backend="faster_coco_eval")


def test_a_model_of_timm_is_built_and_run() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_asking_whether_torchvision_is_there_does_not_import_torch() -> None:
    asked = "import importlib.util, sys; print(importlib.util.find_spec('torchvision').name)"
    loaded = "; print('torch' in sys.modules)"
    command = [sys.executable, "-c", asked + loaded]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["torchvision", "False"]
