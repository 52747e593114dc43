"""Image classifiers of timm and transformers: trained, and loaded again where they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
from dist_layerlr.weights import check_pretrained, load_pretrained
from launch import train
from launch.tiny import write
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.data.classes import ClassFolders
from launch.trainer.families import get_family
from launch.trainer.tiny.vit import CLASSES, SIDE
from tests.support.jobs import Config, weights
from tests.support.sharders import (
    CONFIGS,
    EVERY_SHARDER,
    SHARED,
    Runs,
    losses,
    shipped,
    train_all,
)

NAMES = ("ant", "bee", "cat", "dog", "eel")
MODELS = ("vit", "vit_swin", "vit_transformers", "vit_dinov2")
CASES = {
    "timm": ("vit", None),
    "swin": ("vit_swin", 3),
    "transformers": ("vit_transformers", 3),
    "dinov2": ("vit_dinov2", None),
}
"""Case -> tiny model, classes of a new head."""
EVERY_CASE = pytest.mark.parametrize("case", CASES)
RATE, DECAY = 5e-4, 0.05


def picture(number: int, height: int = 20, width: int = 24) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def folders(root: Path, classes: int) -> Path:
    folder = root / f"pictures{classes}"
    for i, name in enumerate(NAMES[:classes]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for j in range(2):
            picture(10 * i + j).save(folder / name / f"{j}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vit")
    for name in MODELS:
        write(name, root / name)
    for classes in (3, CLASSES):
        folders(root, classes)
    return root


def config_of(models: Path, model: str, classes: int | None, **steps: Any) -> Config:
    data = {"kind": "classes", "folder": str(models / f"pictures{classes or CLASSES}")}
    config = shipped("vit", models / model, data, **steps)
    return {**config, "objective": {} if classes is None else {"classes": classes}}


@pytest.fixture(scope="module")
def runs(models: Path) -> Runs:
    cases = {case: config_of(models, *found) for case, found in CASES.items()}
    again = config_of(models, "vit", 3, steps=5, global_batch=6)
    again["learning_rate"] = 0.01
    return train_all(models, cases, {"again": again})


@EVERY_CASE
@EVERY_SHARDER
def test_the_shipped_config_trains_and_the_plan_is_verified(
    sharder: str, case: str, runs: Runs
) -> None:
    runs.check(case, sharder)


@EVERY_CASE
@SHARED
def test_ranks_change_nothing(sharder: str, case: str, runs: Runs) -> None:
    assert runs.differ(case, sharder) <= 1e-5


def test_the_loss_of_a_repeated_batch_falls(runs: Runs) -> None:
    found = losses(runs.folder("again"))
    assert len(found) == 5 and found[-1] < 0.9 * found[0]


def test_the_log_says_what_is_new_frozen_and_spared(runs: Runs) -> None:
    said = {case: runs.ended[case, "none"].said for case in CASES}
    assert "new, not read from model_path: head.fc.bias, head.fc.weight" in said["swin"]
    assert "new, not read from model_path: classifier.bias, classifier.w" in said["transformers"]
    assert "no gradient: dinov2.embeddings.mask_token" in said["dinov2"]
    assert "no weight decay for cls_token, pos_embed" in said["timm"]
    assert "new, not" not in said["timm"] and "no weight decay for" not in said["dinov2"]


@pytest.mark.parametrize("case", ["timm", "swin"])
def test_rates_and_weight_decay_of_a_run_are_those_of_timms_own_groups(
    case: str, runs: Runs
) -> None:
    from timm.optim import create_optimizer_v2

    model = timm.create_model(f"local-dir:{runs.final(case)}")
    theirs = create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=DECAY, layer_decay=0.75)
    wanted = {
        id(p): (group["lr"] * group["lr_scale"], group["weight_decay"])
        for group in theirs.param_groups
        for p in group["params"]
    }
    plan = json.loads((runs.folder(case) / "out" / "plan.json").read_text())
    found = plan["parameters"]
    names = dict(model.named_parameters())
    assert found.keys() == names.keys()
    for name, parameter in names.items():
        lr, decay = wanted[id(parameter)]
        assert found[name]["lr"] == pytest.approx(lr, rel=1e-9), name
        assert found[name]["weight_decay"] == decay, name
    # And in the first step, weights moved at these rates.
    proof = json.loads((runs.final(case) / "verify.json").read_text())
    for name, lr in proof["first_step_lr"].items():
        if name in names:
            assert lr == pytest.approx(wanted[id(names[name])][0], rel=1e-2), name


@EVERY_CASE
def test_the_result_loads_in_its_library_and_gives_what_was_trained(case: str, runs: Runs) -> None:
    final, (name, classes) = runs.final(case), CASES[case]
    pixels = torch.rand(2, 3, SIDE, SIDE)
    if name in ("vit", "vit_swin"):
        model = timm.create_model(f"local-dir:{final}", pretrained=True).eval()
        logits = model(pixels)
        twin = timm.create_model(f"local-dir:{runs.root / name}", num_classes=classes or CLASSES)
        config = json.loads((final / "config.json").read_text())
        assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == logits.shape[1]
    else:
        auto = transformers.AutoModelForImageClassification
        model, told = auto.from_pretrained(final, output_loading_info=True)
        assert not any(told.values())
        logits = model.eval()(pixels).logits
        twin = auto.from_config(model.config)
        mean = transformers.AutoImageProcessor.from_pretrained(final).image_mean
        assert list(mean) == [0.4, 0.5, 0.6]
    assert logits.shape == (2, classes or CLASSES)
    # The exported tensors by name, without any loader.
    tensors = weights(runs.folder(case))
    for key, parameter in twin.named_parameters():
        parameter.data.copy_(tensors[key])
    again = twin.eval()(pixels)
    torch.testing.assert_close(logits, getattr(again, "logits", again))


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_cross_entropy_of_pixels_as_the_checkpoint_normalises(
    name: str, models: Path
) -> None:
    family = get_family("vit")
    data = ClassFolders(str(models / f"pictures{CLASSES}"), size=SIDE)
    samples = [data[0], data[9]]
    if name in ("vit", "vit_swin"):
        model: Any = timm.create_model(f"local-dir:{models / name}", pretrained=True)
        mean = deviation = [0.5] * 3
        if name == "vit_swin":
            mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    else:
        model = transformers.AutoModelForImageClassification.from_pretrained(models / name)
        mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    model.eval()
    pixels = torch.stack([one["pixels"] for one in samples])
    for channel in range(3):
        pixels[:, channel] = (pixels[:, channel] - mean[channel]) / deviation[channel]
    said = model(pixels)
    wanted = cross_entropy(getattr(said, "logits", said), torch.tensor([0, 4]))
    objective = family.objective({}, models / name)
    found = objective.loss(model, family.collate(samples), [0, 1], 0)
    torch.testing.assert_close(found, wanted)


def test_classes_are_folders_by_name_and_images_cover_the_size(models: Path) -> None:
    data = ClassFolders(str(models / "pictures3"), size=SIDE)
    assert data.classes == list(NAMES[:3]) and len(data) == 6
    assert [int(data[i]["label"]) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert data.name(3) == "bee/1.png"
    # 20 x 24 scaled to cover 16 x 16 loses columns on the left and right alone.
    whole = np.asarray(picture(11).resize((SIDE, SIDE), Image.BICUBIC, box=(2, 0, 22, 20)))
    found = (data[3]["pixels"] * 255).permute(1, 2, 0).numpy()
    assert np.abs(found - whole).max() < 2


def test_a_new_head_is_the_same_in_every_process_and_not_what_the_file_holds(
    models: Path,
) -> None:
    family = get_family("vit", {"classes": 3})
    config = json.loads((models / "vit" / "config.json").read_text())
    anew = family.fresh_weights(config)  # type: ignore[attr-defined]
    assert anew == {"head.weight": 0.0, "head.bias": 0.0}
    model = family.build(config)
    with pytest.raises(ModelSourceError, match=r"'head.weight'.*shape"):
        check_pretrained(model, models / "vit")
    check_pretrained(model, models / "vit", fresh=True, anew=anew)
    load_pretrained(
        model, models / "vit", fresh=lambda name, shape: torch.full(shape, 7.0), anew=anew
    )
    named = dict(model.named_parameters())
    assert all(bool((named[name] == 7).all()) for name in anew)
    assert not any(bool((p == 7).any()) for name, p in named.items() if name not in anew)
    with pytest.raises(ValueError, match="need fresh="):
        load_pretrained(model, models / "vit", anew=anew)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {}}, "holds 3 classes, and the model's head has 5. Set objective.classes=3"),
        ({"objective": {"classes": 0}}, "Invalid objective.classes=0"),
        ({"data": {"kind": "classes", "folder": "nowhere"}}, "Invalid data.folder='nowhere'"),
        ({"adapter": {"rank": 2}, "training_method": "lora"}, "head.bias begins anew"),
    ],
    ids=["classes", "none", "folder", "adapter"],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    change: dict[str, Any],
    said: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {**config_of(models, "vit", 3), **change}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    monkeypatch.setattr(train, "stop", lambda: None)
    assert train.main(["--config", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint and "\n" not in complaint


def test_checkpoints_and_images_that_do_not_fit_are_refused(models: Path) -> None:
    family = get_family("vit")
    with pytest.raises(ModelSourceError, match="architecture='vit_of_mine'"):
        family.check_config({"architecture": "vit_of_mine"})
    with pytest.raises(ModelSourceError, match="holds a ViTModel"):
        family.check_config({"architectures": ["ViTModel"]})
    config = json.loads((models / "vit" / "config.json").read_text())
    data = open_dataset(
        {"kind": "classes", "folder": str(models / f"pictures{CLASSES}"), "size": 8}
    )
    with pytest.raises(ModelSourceError, match=r"pixels has shape \(3, 8, 8\).*data.size"):
        fit_dataset(data, family, config)
    (models / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(ConfigError, match="ant/ holds no image"):
        ClassFolders(str(models / "empty"))
    with pytest.raises(LayerLRError, match="vit' is trained on 'classes'"):
        fit_dataset(open_dataset({"kind": "digits"}), family, config)


def test_the_published_model_is_planned_without_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "stop", lambda: None)
    for name in ("vit", "llm"):
        assert train.main(["--plan-only", "--config", str(CONFIGS / f"{name}.json")]) == 0
    said = capsys.readouterr().out
    assert "total_params=152" in said and "model.layers.000-035.self_attn" in said


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks_give_the_same_gradients(name: str, models: Path) -> None:
    family = get_family("vit")
    config = json.loads((models / name / "config.json").read_text())
    data = ClassFolders(str(models / f"pictures{CLASSES}"), size=SIDE)
    found: list[dict[str, torch.Tensor]] = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model: nn.Module = family.build(config).train()
        load_pretrained(model, models / name)
        if checkpointed:
            family.checkpoint_blocks(model)
        torch.manual_seed(0)
        batch = family.collate([data[0], data[3]])
        family.objective({}, models / name).loss(model, batch, [0, 1], 0).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad)
