"""Language models of transformers: trained, and loaded again where they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from dist_layerlr.errors import ConfigError, LayerLRError, ModelSourceError
from launch.tiny import write
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.data.text import TextBlocks
from launch.trainer.families import get_family
from launch.trainer.objectives.causal_lm import IGNORED, TOKENS, Routing, unbalanced
from tests.support.jobs import Config
from tests.support.sharders import EVERY_SHARDER, SHARED, Runs, losses, shipped, train_all

LENGTH = 24
TEXTS = (
    "a red cat runs left and a red dog",
    "cat",
    "red " * 9,
    "runs left, runs right, a cat sits",
)
CASES = {
    "llama-full": ("llm", "llm_full"),
    "llama-lora": ("llm", "llm"),
    "qwen3-full": ("llm_qwen3", "llm_full"),
    "moe-full": ("llm_moe", "llm_full"),
    "moe-lora": ("llm_moe", "llm"),
}
"""Case -> tiny model, shipped config."""
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def text_data(root: Path, tokenizer: Path, **more: Any) -> dict[str, Any]:
    files = root / "texts"
    files.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (files / "a.jsonl").write_text("\n".join([*lines, ""]))
    (files / "b.txt").write_text("a cat and a dog\nran left\n" * 3)
    settings = {"kind": "text", "files": str(files), "tokenizer": str(tokenizer)}
    return {**settings, "length": LENGTH, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm")
    for name in ("llm", "llm_qwen3", "llm_moe"):
        write(name, root / name)
    return root


@pytest.fixture(scope="module")
def runs(models: Path) -> Runs:
    cases: dict[str, Config] = {}
    for case, (model, config) in CASES.items():
        # Lines of several lengths for one of them, so that batches are padded.
        pack = case != "moe-full"
        data = text_data(models, models / model, pack=pack)
        cases[case] = shipped(config, models / model, data)
    moe = cases["moe-full"]
    # Two batches of two from one, and one and the same batch five times.
    split = {**moe, "train": {**moe["train"], "micro_batch": 1}}
    falls = shipped("llm_full", models / "llm", text_data(models, models / "llm", pack=False))
    again = {**falls, "train": {"steps": 5, "global_batch": len(TEXTS) + 6, "seed": 0}}
    again["learning_rate"] = 0.01
    again["per_layer_lr"] = {"enabled": True, "default_lr": 0.01}
    return train_all(models, cases, {"moe-micro": split, "again": again})


@EVERY_CASE
@EVERY_SHARDER
def test_the_shipped_configs_train_and_the_plan_is_verified(
    sharder: str, case: str, runs: Runs
) -> None:
    runs.check(case, sharder)


@EVERY_CASE
@SHARED
def test_ranks_change_nothing(sharder: str, case: str, runs: Runs) -> None:
    assert runs.differ(case, sharder) <= 1e-5


def test_microbatches_change_nothing_with_padding_and_routers(runs: Runs) -> None:
    from tests.support.jobs import largest_difference, weights

    whole, split = (weights(runs.folder(case)) for case in ("moe-full", "moe-micro"))
    assert largest_difference(whole, split) <= 1e-6


def test_the_loss_of_a_repeated_batch_falls(runs: Runs) -> None:
    found = losses(runs.folder("again"))
    assert len(found) == 5 and found == sorted(found, reverse=True) and found[-1] < 0.9 * found[0]


@EVERY_CASE
def test_the_result_loads_in_transformers_and_is_what_was_trained(case: str, runs: Runs) -> None:
    final, model_path = runs.final(case), runs.root / CASES[case][0]
    base = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.arange(10)[None]
    before = base(ids).logits
    if case.endswith("lora"):
        import peft

        model: Any = peft.PeftModel.from_pretrained(base, str(final))
    else:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            final, output_loading_info=True
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        assert transformers.AutoTokenizer.from_pretrained(final)("cat")["input_ids"]
        assert (final / "generation_config.json").is_file()
    after = model(ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, by_hand(case, runs)(ids).logits, rtol=1e-5, atol=1e-6)


def by_hand(case: str, runs: Runs) -> Any:
    """The base model with the exported tensors put in by name, without any loader."""
    from peft import LoraConfig, inject_adapter_in_model

    from tests.support.jobs import weights

    base: Any = transformers.AutoModelForCausalLM.from_pretrained(runs.root / CASES[case][0])
    tensors = weights(runs.folder(case))
    if case.endswith("lora"):
        family = get_family("llm")
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(family.lora_targets({})))
        inject_adapter_in_model(lora, base, "default")
        named = dict(base.named_parameters())
        for name, value in tensors.items():
            plain = name.removeprefix("base_model.model.")
            owner, leaf = plain.rsplit(".", 1)
            named[f"{owner}.default.{leaf}"].data.copy_(value)
        return base
    for name, parameter in base.named_parameters():
        parameter.data.copy_(tensors[name])
    return base


def test_packed_blocks_hold_the_texts_and_are_kept_apart_by_positions(models: Path) -> None:
    data = TextBlocks(**_settings(text_data(models, models / "llm")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "llm")
    end = tokenizer.eos_token_id
    wanted: list[int] = []
    for text in (*TEXTS, "a cat and a dog\nran left\n" * 3):
        wanted += [*tokenizer(text)["input_ids"], end]
    found = torch.cat([data[i]["input_ids"] for i in range(len(data))]).tolist()
    assert len(data) == len(wanted) // LENGTH and found == wanted[: len(data) * LENGTH]
    for i in range(len(data)):
        sample = data[i]
        ends = (sample["input_ids"] == end).nonzero().flatten() + 1
        starts = [0, *ends[ends < LENGTH].tolist()]
        assert (sample["position_ids"] == 0).nonzero().flatten().tolist() == starts
        assert (sample["labels"] == IGNORED).nonzero().flatten().tolist() == starts
    assert data.name(0) == "a.jsonl:1" and data.name(len(data) - 1) == "b.txt"


@pytest.mark.parametrize("name", ["llm", "llm_qwen3", "llm_moe"])
def test_the_loss_of_packed_blocks_is_that_of_the_documents_alone(name: str, models: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models / name)
    data = TextBlocks(**_settings(text_data(models, models / name)))
    family = get_family("llm")
    samples = [data[0], data[1], data[2]]
    each = []
    for sample in samples:
        sums, targets = torch.zeros(()), 0
        starts = (sample["position_ids"] == 0).nonzero().flatten().tolist()
        for first, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            ids = sample["input_ids"][first:end]
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            sums = sums + cross_entropy(logits, ids[1:], reduction="sum")
            targets += len(ids) - 1
        each.append(sums / targets)
    objective = family.objective({"router_weight": 0.0}, models / name)
    batch = family.collate(samples)
    torch.testing.assert_close(objective.loss(model, batch, [0, 1, 2], 0), torch.stack(each).mean())


def test_a_padded_batch_costs_what_its_texts_cost_alone(models: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "llm_moe")
    data = TextBlocks(**_settings(text_data(models, models / "llm_moe", pack=False)))
    family = get_family("llm")
    samples = sorted((data[i] for i in range(4)), key=lambda one: len(one["input_ids"]))
    assert len({len(one["input_ids"]) for one in samples}) > 2
    # transformers' own loss, its auxiliary part included, of one text at a time.
    each = []
    for sample in samples:
        ids = sample["input_ids"][None]
        each.append(model(ids, labels=ids, output_router_logits=True).loss)
    objective = family.objective({}, models / "llm_moe")
    found = objective.loss(model, family.collate(samples), range(4), 0)
    torch.testing.assert_close(found, torch.stack(each).mean())
    without = family.objective({"router_weight": 0.0}, models / "llm_moe")
    assert not torch.isclose(without.loss(model, family.collate(samples), range(4), 0), found)


def test_experts_that_all_get_the_same_are_balanced() -> None:
    # A share of 1/E each, k of E experts chosen: E * sum(k/E * 1/E) = k, the least there is.
    even = Routing(logits=(torch.zeros(6, 4),), chosen=2, weight=1.0)
    tokens = torch.ones(2, 3, dtype=torch.bool)
    assert unbalanced(even, tokens).item() == pytest.approx(2.0)
    # All tokens to two experts, each with half of the share: 4 * (1 * 1/2 + 1 * 1/2) = 4.
    skewed = torch.tensor([50.0, 50.0, 0.0, 0.0]).repeat(6, 1)
    assert unbalanced(Routing(logits=(skewed,), chosen=2, weight=1.0), tokens).item() == (
        pytest.approx(4.0)
    )


def test_padding_goes_on_counting_so_that_no_document_begins_there(models: Path) -> None:
    data = TextBlocks(**_settings(text_data(models, models / "llm", pack=False)))
    short, long = sorted((data[0], data[1]), key=lambda one: len(one["input_ids"]))
    batch = get_family("llm").collate([short, long])
    assert batch["position_ids"].tolist() == [list(range(len(long["input_ids"])))] * 2
    assert batch[TOKENS].sum(1).tolist() == [len(short["input_ids"]), len(long["input_ids"])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": "nowhere"}, "Invalid data.files='nowhere': must be a .txt or .jsonl file"),
        ({"tokenizer": "nowhere"}, "Invalid data.tokenizer='nowhere'"),
        ({"length": 1}, "Invalid data.length=1"),
        ({"length": 5000}, "fill no sample of data.length=5000. Lower data.length, or add text."),
        ({"field": "body"}, 'a.jsonl\', line 1 (\'body\'); needed: {"body": "..."} on each line'),
        ({"lenght": 9}, "length"),
    ],
    ids=str,
)
def test_text_that_cannot_be_is_said_in_one_line(
    change: dict[str, Any], said: str, models: Path
) -> None:
    with pytest.raises(LayerLRError) as caught:
        open_dataset({**text_data(models, models / "llm"), **change})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_none_for_text_is_refused(models: Path) -> None:
    family = get_family("llm")
    for config, said in (
        ({"_class_name": "WanTransformer3DModel"}, "holds a WanTransformer3DModel"),
        ({"architectures": ["BertForMaskedLM"]}, "needs a class of transformers whose name ends"),
        ({"architectures": ["NoSuchForCausalLM"]}, "has no NoSuchForCausalLM"),
    ):
        with pytest.raises(ModelSourceError, match=said):
            family.check_config(config)
    config = json.loads((models / "llm" / "config.json").read_text())
    data = open_dataset(text_data(models, models / "llm"))
    with pytest.raises(ConfigError, match="embedding has 7 rows"):
        fit_dataset(data, family, {**config, "vocab_size": 7})
    with pytest.raises(ModelSourceError, match=r"input_ids has shape \(24,\).*lower data.length"):
        fit_dataset(data, family, {**config, "max_position_embeddings": 8})


def test_checkpointed_blocks_give_the_same_gradients(models: Path) -> None:
    family = get_family("llm")
    data = TextBlocks(**_settings(text_data(models, models / "llm_moe")))
    found: list[dict[str, torch.Tensor]] = []
    for checkpointed in (False, True):
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(models / "llm_moe")
        model.train()
        if checkpointed:
            family.checkpoint_blocks(model)
        objective = family.objective({}, models / "llm_moe")
        objective.loss(model, family.collate([data[0], data[1]]), [0, 1], 0).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "kind"}
