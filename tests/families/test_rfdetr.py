"""RF-DETR by its own package: trained on synthetic COCO folders, and loaded by the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rfdetr.datasets.coco import build_roboflow_from_coco
from rfdetr.models.lwdetr import build_criterion_from_config
from rfdetr.utilities.tensors import make_collate_fn
from safetensors.torch import load_file

from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
from dist_layerlr.weights import load_pretrained
from dist_layerlr.weights.picklefile import pickled_tensors
from launch.tiny import write
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.data.coco import ANNOTATIONS, CocoBoxes
from launch.trainer.families import get_family
from launch.trainer.families.rfdetr import BACKBONE, CHECKPOINT, _settings, backbone_of
from tests.support.jobs import Config, largest_difference, weights
from tests.support.sharders import EVERY_SHARDER, SHARED, Runs, losses, shipped, train_all

NAMES = ("cat", "dog", "eel")
BOXES = (3, 0, 1, 2)
"""Of each picture."""
SIDE = 64


def coco(root: Path, classes: int) -> Path:
    """A folder of four pictures, laid out as the package's own loader wants it."""
    folder = root / f"coco{classes}" / "train"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for i, count in enumerate(BOXES):
        pixels = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 70, "width": 90})
        for j in range(count):
            left, top = (int(one) for one in random.integers(0, 40, 2))
            wide, high = (int(one) for one in random.integers(8, 25, 2))
            number = len(annotations)
            row = {"id": number, "image_id": i, "category_id": 3 + 4 * ((i + j) % classes)}
            box = {"bbox": [left, top, wide, high], "area": wide * high, "iscrowd": 0}
            annotations.append({**row, **box, "segmentation": []})
    # Numbers with gaps, as COCO's own are.
    kinds = [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(NAMES[:classes])]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / ANNOTATIONS).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rfdetr")
    write("rfdetr", root / "model")
    coco(root, 3)
    coco(root, 2)
    # The same weights as the package saves them.
    (root / "pickled").mkdir()
    shutil.copy(root / "model" / "config.json", root / "pickled")
    saved = {"model": load_file(str(root / "model" / "model.safetensors")), "args": {}}
    torch.save(saved, root / "pickled" / "some.pth")
    return root / "model"


def config_of(model: Path, classes: int = 3, **train: Any) -> Config:
    data = {"kind": "coco", "folder": str(model.parent / f"coco{classes}" / "train")}
    return shipped("rfdetr", model, data, **train)


@pytest.fixture(scope="module")
def runs(model: Path) -> Runs:
    again = {**config_of(model, steps=4, global_batch=4), "learning_rate": 1e-3}
    pickled = {**config_of(model), "model_path": str(model.parent / "pickled")}
    head = {**config_of(model, 2), "objective": {"classes": 2}}
    alone = {"pickled": pickled, "head": head, "again": again}
    return train_all(model.parent, {"full": config_of(model)}, alone)


@EVERY_SHARDER
def test_the_shipped_config_trains_and_the_plan_is_verified(sharder: str, runs: Runs) -> None:
    runs.check("full", sharder)
    assert "no gradient: backbone.0.encoder.encoder.embeddings.mask_token" in (
        runs.ended["full", sharder].said
    )


@SHARED
def test_ranks_change_nothing(sharder: str, runs: Runs) -> None:
    found = [weights(runs.folder("full", one)) for one in ("none", sharder)]
    for tensors in found:
        for name, value in tensors.items():
            if name.endswith("self_attn.in_proj_bias"):
                # The bias of the keys adds one number to all scores of a query: its gradient is
                # rounding alone, and Adam makes a step of whatever there is.
                value.view(3, -1)[1] = 0
    assert largest_difference(*found) <= 1e-5


def test_weights_of_torch_save_are_read_as_those_of_safetensors(runs: Runs, model: Path) -> None:
    runs.check("pickled", "none")
    full, pickled = (weights(runs.folder(case)) for case in ("full", "pickled"))
    assert largest_difference(full, pickled) == 0.0
    found = pickled_tensors(model.parent / "pickled" / "some.pth")
    stored = load_file(str(model / "model.safetensors"))
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        whole = tensor.read(0, stored[name].numel()).view(stored[name].shape)
        assert torch.equal(whole, stored[name]), name


def test_the_loss_of_a_repeated_batch_falls(runs: Runs) -> None:
    found = losses(runs.folder("again"))
    assert len(found) == 4 and found[-1] < 0.95 * found[0]


def test_rates_and_weight_decay_are_those_of_the_packages_own_groups(
    runs: Runs, model: Path
) -> None:
    from rfdetr._namespace import _namespace_from_configs
    from rfdetr.config import TrainConfig
    from rfdetr.training.param_groups import get_param_dict

    config = json.loads((model / "config.json").read_text())
    train = TrainConfig(dataset_dir=".", output_dir=".", lr=1e-4, lr_encoder=1.5e-4)
    live: Any = get_family("rfdetr").build(config)
    groups = get_param_dict(_namespace_from_configs(_settings(config), train), live)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    wanted = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    plan = json.loads((runs.folder("full") / "out" / "plan.json").read_text())["parameters"]
    names = {name for name, _ in live.named_parameters() if not name.endswith("mask_token")}
    assert plan.keys() == names
    for name, row in plan.items():
        lr, decay = wanted[id(live.get_parameter(name))]
        assert row["lr"] == pytest.approx(lr, rel=1e-9), name
        given = row["weight_decay"]
        assert (1e-4 if given is None else given) == decay, name


def test_samples_and_loss_are_those_of_the_package(model: Path) -> None:
    from rfdetr.config import TrainConfig

    config = json.loads((model / "config.json").read_text())
    family, settings = get_family("rfdetr"), _settings(config)
    data = CocoBoxes(str(model.parent / "coco3" / "train"))
    fit_dataset(data, family, config)
    told = {"dataset_dir": str(model.parent / "coco3"), "square_resize_div_64": True}
    off = {"multi_scale": False, "expanded_scales": False, "scale_jitter": False, "aug_config": {}}
    args = SimpleNamespace(
        **told, **off, segmentation_head=False, patch_size=16, num_windows=settings.num_windows
    )
    theirs = build_roboflow_from_coco("train", args, settings.resolution)
    assert len(data) == len(theirs) == 4
    for i in range(4):
        image, target = theirs[i]
        found = data[i]
        assert torch.equal(found["image"], image) and image.shape == (3, SIDE, SIDE)
        assert found["target"].keys() == target.keys()
        assert all(torch.equal(found["target"][key], target[key]) for key in target)
        assert len(target["labels"]) == BOXES[i]
    samples, targets = make_collate_fn(16 * settings.num_windows)([theirs[i] for i in range(4)])
    net: Any = family.build(config).to_empty(device="cpu")
    load_pretrained(net, model)
    net.train()
    criterion, _ = build_criterion_from_config(
        settings, TrainConfig(dataset_dir=".", output_dir=".")
    )
    said = criterion(net(samples, targets), targets)
    wanted = sum(said[key] * weight for key, weight in criterion.weight_dict.items() if key in said)
    objective = family.objective({}, model)
    loss = objective.loss(net, family.collate([data[i] for i in range(4)]), range(4), 0)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(("case", "classes"), [("full", 3), ("head", 2)])
def test_the_package_loads_the_result_and_gives_what_was_trained(
    case: str, classes: int, runs: Runs, model: Path
) -> None:
    from rfdetr import RFDETR

    runs.check(case, "none")
    final = runs.final(case)
    config = json.loads((final / "config.json").read_text())
    assert config["num_classes"] == classes
    with backbone_of(config[BACKBONE]):
        loaded = RFDETR.from_checkpoint(final / CHECKPOINT, device="cpu")
    net = loaded.model.model.eval()
    pixels = torch.rand(1, 3, SIDE, SIDE)
    found = net(pixels)["pred_logits"]
    assert found.shape[-1] == classes + 1
    # The exported tensors by name, without any loader.
    twin: Any = get_family("rfdetr").build(config).to_empty(device="cpu")
    tensors = weights(runs.folder(case))
    assert tensors.keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        value.copy_(tensors[name])
    torch.testing.assert_close(found, twin.eval()(pixels)["pred_logits"])
    before = load_file(str(model / "model.safetensors"))
    name = "transformer.decoder.layers.0.linear1.weight"
    assert not torch.equal(before[name], tensors[name])


def test_a_new_head_begins_where_the_packages_own_begins(model: Path) -> None:
    family: Any = get_family("rfdetr", {"classes": 2})
    config = json.loads((model / "config.json").read_text())
    anew = family.fresh_weights(config)
    heads = ["class_embed", *(f"transformer.enc_out_class_embed.{i}" for i in range(2))]
    assert anew.keys() == {f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")}
    assert all(
        torch.tensor(value).sigmoid().item() == pytest.approx(0.01) for value in anew.values()
    )
    assert family.fresh_weights({**config, "num_classes": 2}) == {}


def test_what_cannot_be_trained_is_said_in_one_line(model: Path, tmp_path: Path) -> None:
    family = get_family("rfdetr")
    config = json.loads((model / "config.json").read_text())
    cases: list[tuple[type[LayerLRError], str, Any]] = [
        (ModelSourceError, "model_name=None", lambda: family.check_config({})),
        (
            ModelSourceError,
            "does not fit the rfdetr package",
            lambda: family.check_config({**config, "hidden_dimension": 3}),
        ),
        (
            ModelSourceError,
            "segmentation_head is not trained here",
            lambda: family.check_config({"model_name": "RFDETRSegNano"}),
        ),
        (
            ConfigError,
            "has 2 categories, and the model's head 3. Set objective.classes=2",
            lambda: fit_dataset(open_dataset(config_of(model, 2)["data"]), family, config),
        ),
        (
            ConfigError,
            "'rfdetr' is trained on 'coco'",
            lambda: fit_dataset(open_dataset({"kind": "digits"}), family, config),
        ),
        (ConfigError, "Invalid data.folder='nowhere'", lambda: CocoBoxes("nowhere")),
        (
            ModelSourceError,
            "as weights of torch.save",
            lambda: pickled_tensors(tmp_path / "no.pth"),
        ),
    ]
    (tmp_path / ANNOTATIONS).write_text("{")
    broken = (ModelSourceError, "must be in COCO's format", lambda: CocoBoxes(str(tmp_path)))
    for kind, said, act in [*cases, broken]:
        with pytest.raises(kind) as caught:
            act()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpointed_encoder_gives_the_same_gradients(model: Path) -> None:
    family = get_family("rfdetr")
    config = json.loads((model / "config.json").read_text())
    data = CocoBoxes(str(model.parent / "coco3" / "train"))
    fit_dataset(data, family, config)
    found: list[dict[str, torch.Tensor]] = []
    for checkpointed in (False, True):
        net = family.build(config).to_empty(device="cpu").train()
        load_pretrained(net, model)
        if checkpointed:
            family.checkpoint_blocks(net)
            encoders = [m for m in net.modules() if getattr(m, "gradient_checkpointing", False)]
            assert len(encoders) == 1
        loss = family.objective({}, model).loss(net, family.collate([data[0], data[2]]), [0, 1], 0)
        loss.backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)
