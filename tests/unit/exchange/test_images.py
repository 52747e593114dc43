"""kohya's block weights and timm's layer decay: rates of a converted config against their rules."""

from __future__ import annotations

import csv
import gzip
import re
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.exchange import convert
from dist_layerlr.plan import build_plan, read_model
from dist_layerlr.plan.kohya import SD, SDXL, weights
from dist_layerlr.sharders import plan_model
from tests.support import census
from tests.support.extras import needs_families

README = {"down_lr_weight": "sine+.5", "mid_lr_weight": "1.5", "up_lr_weight": "cosine+.5"}
"""The example of sd-scripts' README."""
# What running its own function on that example gives.
SD_DOWN = [0.5, 0.6423, 0.7817, 0.9154, 1.0406, 1.1549, 1.2557, 1.3413, 1.4096, 1.4595, 1.4898, 1.5]
SDXL_DOWN = [0.5, 0.6951, 0.8827, 1.0556, 1.2071, 1.3315, 1.4239, 1.4808, 1.5]
_PLACE = re.compile(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_")


def test_curves_are_those_of_sd_scripts():
    found = weights(SD, README)
    assert found["down"] == pytest.approx(SD_DOWN, abs=5e-5)
    assert (found["mid"], found["up"]) == ([1.5], pytest.approx(SD_DOWN[::-1], abs=5e-5))
    wide = weights(SDXL, README)
    assert wide["down"] == pytest.approx(SDXL_DOWN, abs=5e-5)
    # A short list is filled with 1.
    assert wide["mid"] == [1.5, 1.0, 1.0]


def slot_by_kohya_name(name: str) -> int | None:
    """The slot (0 to 24) of a flattened LoRA name, by sd-scripts' rule for SD 1 and 2."""
    found = _PLACE.search(name)
    if found is None:
        return 12 if "mid_block_" in name else None
    kind, stage, module, number = found[1], int(found[2]), found[3], int(found[4])
    place = 3 * stage + (2 if module.endswith("samplers") else number)
    return (1 if kind == "down" else 13) + place


def test_every_name_of_a_lora_gets_the_rate_that_its_flattened_name_gets_there():
    down = ",".join(f"{0.1 + i / 100:.2f}" for i in range(12))
    up = ",".join(f"{0.5 + i / 100:.2f}" for i in range(12))
    settings = {
        "unet_lr": "2e-4",
        "network_args": [f"down_lr_weight={down}", "mid_lr_weight=.3", f"up_lr_weight={up}"],
    }
    with gzip.open(census.FOLDER / "sd15.kohya.tsv.gz", "rt") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    infos = read_model(census.FOLDER / "sd15.lora.tsv.gz")
    found = convert("kohya", settings, [info.name for info in infos])
    base = read_model(census.FOLDER / "sd15.tsv.gz")
    plan = build_plan(infos, found.config, base=base)
    # What sd-scripts looks numbers up in: no LoRA has the first of them.
    numbers = [*(0.1 + i / 100 for i in range(12)), 0.3, *(0.5 + i / 100 for i in range(12))]
    slots = {row["peft_name"]: slot_by_kohya_name(row["name"]) for row in rows}
    assert slots.keys() == plan.entries.keys()
    for name, slot in slots.items():
        assert slot is not None
        assert plan.entries[name].lr == pytest.approx(2e-4 * numbers[slot]), (name, slot)
    assert set(slots.values()) == {*range(1, 12), 12, *range(13, 25)}
    # And back: the same numbers, but for the first, which nothing tells.
    told = plan.to_kohya()
    assert told["unet_lr"] == pytest.approx(2e-4 * max(numbers))
    lists = [argument.partition("=")[2].split(",") for argument in told["network_args"]]
    ratios = [float(text) * told["unet_lr"] for values in lists for text in values]
    assert ratios[1:] == pytest.approx([2e-4 * number for number in numbers[1:]])


def test_sdxl_counts_input_blocks_middle_blocks_and_output_blocks():
    # diffusers' names of the original's input_blocks 1, 3 and 8, middle_block 1, output_blocks 5.
    known = {
        "down_blocks.0.resnets.0.conv1.weight": ("down", 1),
        "down_blocks.0.downsamplers.0.conv.weight": ("down", 3),
        "down_blocks.2.attentions.1.proj_in.weight": ("down", 8),
        "mid_block.attentions.0.proj_in.weight": ("mid", 1),
        "mid_block.resnets.1.conv1.weight": ("mid", 2),
        "up_blocks.1.attentions.2.proj_in.weight": ("up", 5),
        "up_blocks.1.upsamplers.0.conv.weight": ("up", 5),
        "conv_in.weight": None,
        "time_embedding.linear_1.weight": None,
    }
    assert {name: SDXL.slot_of(name) for name in known} == known


def test_a_weight_of_zero_is_said_and_two_ways_of_scaling_are_refused():
    found = convert("kohya", {"unet_lr": 1e-4, "down_lr_weight": "1,0,1", "sdxl": True})
    regions = found.config["per_layer_lr"]["regions"]
    assert [region["lr_multiplier"] for region in regions] == [0.0]
    assert "held at lr 0" in found.notes[0]
    both = {"unet_lr": 1e-4, "mid_lr_weight": "2", "network_reg_lrs": "a=1e-4"}
    with pytest.raises(ConfigError, match="scaled twice"):
        convert("kohya", both)
    with pytest.raises(ConfigError, match="scaled twice"):
        convert("timm", {"lr": 1e-3, "per_layer_lr": {}})
    with pytest.raises(ConfigError, match=r"13 numbers for 12 slots"):
        convert("kohya", {"unet_lr": 1e-4, "up_lr_weight": ",".join("1" * 13)})


def test_the_first_regex_that_fits_a_whole_module_path_gives_its_rate():
    text = r"blocks\.0\..*=1e-3,.*self_attn.*=2e-3,blocks=9e-3"
    settings = {"unet_lr": 1e-4, "network_args": [f"network_reg_lrs={text}"]}
    names = [f"blocks.{i}.{part}.lora_A.weight" for i in (0, 1) for part in ("self_attn.q", "mlp")]
    found = convert("kohya", settings, names)
    plan = build_plan({name: (4, 4) for name in names}, found.config)
    assert [plan.entries[name].lr for name in names] == [1e-3, 1e-3, 2e-3, 1e-4]
    assert any("'re:^(?:blocks)" in note for note in found.notes)


def vit() -> nn.Module:
    torch.manual_seed(0)
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=4
    )


def timm_config(model: Any) -> dict[str, Any]:
    spared = sorted(model.no_weight_decay())
    settings = {"lr": 1e-3, "layer_decay": 0.6, "weight_decay": 0.05, "no_weight_decay": spared}
    return dict(convert("timm", settings, [name for name, _ in model.named_parameters()]).config)


@needs_families
def test_timms_groups_and_the_converted_plan_give_each_name_one_rate_and_decay():
    from timm.optim import param_groups_layer_decay

    model = vit()
    plan = plan_model(model, timm_config(model))
    names = {id(param): name for name, param in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.6)
    for group in groups:
        for param in group["params"]:
            entry = plan.entries[names.pop(id(param))]
            assert entry.lr == pytest.approx(1e-3 * group["lr_scale"], rel=1e-12), entry.name
            assert entry.weight_decay == group["weight_decay"], entry.name
    assert not names


@needs_families
@pytest.mark.parametrize("form", ["timm", "torch"])
def test_a_schedule_scales_exported_groups_once(form: str):
    from timm.scheduler import CosineLRScheduler

    model = vit()
    plan = plan_model(model, timm_config(model))
    live = dict(model.named_parameters())
    groups = plan.to_timm(live) if form == "timm" else plan.to_param_groups(live)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    if form == "timm":
        CosineLRScheduler(optimizer, t_initial=10).step(5)
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for _ in range(5):
            optimizer.step()
            schedule.step()
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            # Half of the way a cosine is at one half.
            assert group["lr"] == pytest.approx(0.5 * plan.entries[name].lr), name


@pytest.mark.parametrize("rates", [1e-5, [1e-5, 1e-6], "1e-5"])
def test_rates_of_text_encoders_are_told_as_left_out(rates: object):
    found = convert("kohya", {"unet_lr": 1e-4, "text_encoder_lr": rates})
    assert any("text_encoder_lr is left out" in note for note in found.notes)


def test_what_one_rate_per_block_cannot_say_is_refused():
    names = [f"down_blocks.1.attentions.0.attn{i}.to_q.lora_A.weight" for i in (1, 2)]
    rates = {"self_attn": 1e-4, "cross_attn": 2e-4}
    block = {"enabled": True, "component_lr": rates, "depth_strategy": "flat"}
    plan = build_plan({name: (4, 4) for name in names}, {"per_layer_lr": block})
    with pytest.raises(ConfigError, match="both lie in down slot 4"):
        plan.to_kohya()
    with pytest.raises(ConfigError, match="not in it"):
        plan.to_timm({names[0]: None})
