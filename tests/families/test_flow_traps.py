"""What was measured to go wrong with these families, each as a test of the trainer's own path."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from dist_layerlr import plan_model
from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch
from launch.trainer.engines import build_engine
from launch.trainer.engines.sharding import SHARDINGS
from launch.trainer.families import get_family
from launch.trainer.options import load_options
from launch.trainer.runtime import Runtime
from launch.trainer.weights import empty_model, frozen_line
from tests.families.flow_cases import CASES, Told
from tests.support.forked import in_fork
from tests.support.oracle import make_pipeline, make_samples
from tests.support.ranks import run_ranks

Write = Callable[..., Path]


@pytest.fixture
def full_finetune(tmp_path: Path, write_config: Write) -> Callable[..., Path]:
    """Write the network of a case and a config that trains all of it."""

    def write(name: str, **train: Any) -> Path:
        case = CASES[name]
        case.parts()["transformer"].save_pretrained(tmp_path / name / "transformer")
        config = {
            "model_type": case.family.model_type,
            "model_path": str(tmp_path / name),
            "training_method": "fine_tune",
            "learning_rate": 1e-3,
            "per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 2e-3}},
            "data": {"kind": "digits"},
            "train": {"steps": 2, "global_batch": 2, **train},
        }
        return write_config(config, f"{name}{len(train)}.json")

    return write


def batch_of(name: str) -> Batch:
    case = CASES[name]
    return case.family.collate(make_samples(case, case.family, make_pipeline(case)))


# Chroma's mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_chroma_is_given_a_bool_mask_whatever_the_batch_holds(dtype: torch.dtype) -> None:
    family, batch = CASES["chroma_1"].family, batch_of("chroma_1")
    told = Told(CASES["chroma_1"].parts()["transformer"])
    mask = {PROMPT_MASK: batch[PROMPT_MASK].to(dtype)}
    with torch.no_grad():
        family.predict(told, batch[LATENTS], torch.tensor([300.0, 800.0]), {**batch, **mask})
    seen = told.seen["attention_mask"]
    assert seen.dtype == torch.bool
    # 3 and 5 tokens, and the patches of 16 x 32 latents.
    assert seen.sum(1).tolist() == [3 + 128, 5 + 128]


def _gradients(file: Path, batch: Batch, turn_on: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the trainer's own model, and its gradients by name."""
    options = load_options(file)
    family = get_family(options.model_type)
    model = empty_model(family, options)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    plan = plan_model(model, options.plan)
    engine = build_engine(SHARDINGS["none"], model, plan, options, runtime, None)
    if turn_on is not None:
        turn_on(engine.model)
    objective = family.objective(options.objective, Path(options.model_path))
    loss = objective.loss(engine.model, batch, [0, 1], 0)
    loss.backward()
    named = engine.model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def _largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest share of a gradient that is different."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-12)) for n in one)


def test_chroma_checkpointed_has_the_gradients_and_names_of_chroma_itself(
    full_finetune: Callable[..., Path],
) -> None:
    plain = full_finetune("chroma_1", checkpointing=False)
    checkpointed = full_finetune("chroma_1", checkpointing=True, micro_batch=2)

    def compare() -> None:
        batch = batch_of("chroma_1")
        assert batch[PROMPT_MASK] is not None
        loss, gradients = _gradients(plain, batch)
        found, recomputed = _gradients(checkpointed, batch)
        assert torch.equal(found, loss)
        assert _largest(gradients, recomputed) == 0
        # Diffusers' own, which forgets the mask, is far away: else nothing was tested.
        turn_on = "enable_gradient_checkpointing"
        _, forgotten = _gradients(plain, batch, lambda model: getattr(model, turn_on)())
        assert _largest(gradients, forgotten) > 0.1

    kind, text = in_fork(compare, "cpu")
    assert kind == "passed", text


# Qwen under DDP


def _two_steps(rank: int, world_size: int, file: Path, freeze: bool) -> list[str]:
    """Train two steps on this rank's sample. Returns the frozen names."""
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    options = load_options(file)
    family: Any = copy.copy(get_family(options.model_type))
    if not freeze:
        family.without_gradient = lambda config: ()
    model = empty_model(family, options)
    plan = plan_model(model, options.plan)
    engine = build_engine(SHARDINGS["ddp"], model, plan, options, runtime, None)
    case = CASES["qwen"]
    samples = make_samples(case, family, make_pipeline(case))
    batch = family.collate(samples[rank : rank + 1])
    objective = family.objective(options.objective, Path(options.model_path))
    for step in range(2):
        engine.backward(objective.loss(engine.model, batch, [2 * step + rank], 0))
        engine.step(1.0)
    assert engine.prove(1.0, 2).parameters == len(plan.entries)
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def test_qwen_trains_in_full_on_two_ranks_of_ddp(full_finetune: Callable[..., Path]) -> None:
    first, second = run_ranks(_two_steps, 2, full_finetune("qwen"), True)
    last = "transformer_blocks.2"
    layers = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    expected = {f"{last}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(first) == set(second) == expected


def test_ddp_would_wait_for_the_names_that_get_no_gradient(
    full_finetune: Callable[..., Path],
) -> None:
    with pytest.raises(AssertionError, match="Expected to have finished reduction"):
        run_ranks(_two_steps, 2, full_finetune("qwen"), False)


def test_what_qwen_freezes_is_said(full_finetune: Callable[..., Path]) -> None:
    options = load_options(full_finetune("qwen"))
    family = get_family("qwen")
    line = frozen_line(family, empty_model(family, options), options)
    assert line is not None and "transformer_blocks.2.attn.to_add_out" in line and "5 more" in line


# Z-Image's two signs


def test_zimage_counts_time_from_noise_to_data_and_its_answer_is_negated() -> None:
    family, batch = CASES["zimage"].family, batch_of("zimage")
    model = CASES["zimage"].parts()["transformer"]
    told, noisy = Told(model), batch[LATENTS]
    with torch.no_grad():
        found = family.predict(told, noisy, torch.tensor([250.0, 500.0]), batch)
        prompts = [batch[PROMPT_EMBEDS][0, :3], batch[PROMPT_EMBEDS][1]]
        answer = model([one[:, None] for one in noisy], torch.tensor([0.75, 0.5]), prompts)[0]
    assert told.seen["t"].tolist() == [0.75, 0.5]
    assert torch.equal(found, torch.stack([-one[:, 0] for one in answer]))


# What a family refuses


REFUSED = [
    ("flux_2_dev", {"guidance_embeds": False}, "flux_2_klein_4b"),
    ("flux_2_klein_4b", {"guidance_embeds": True}, "flux_2_dev"),
    ("flux_2_klein_9b", {"guidance_embeds": True}, "flux_2_dev"),
    ("sd35", {"qk_norm": None}, "Stable Diffusion 3.0"),
    ("sd35", {}, "Stable Diffusion 3.0"),
    ("qwen", {"zero_cond_t": True}, "edit or layered"),
    ("qwen", {"use_additional_t_cond": True}, "edit or layered"),
    ("qwen", {"use_layer3d_rope": True}, "edit or layered"),
    ("qwen", {"guidance_embeds": True}, "guidance-distilled"),
    ("zimage", {"siglip_feat_dim": 1152}, "Z-Image-Omni"),
    ("sana", {"guidance_embeds": True}, "Sana Sprint"),
    ("sana", {"timestep_scale": 0.001}, "Sana Sprint"),
]


@pytest.mark.parametrize(("model_type", "config", "said"), REFUSED)
def test_other_variants_are_refused_by_the_key_that_tells_them(
    model_type: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelSourceError, match=said) as caught:
        get_family(model_type).check_config(config)
    assert next(iter(config), "qk_norm") in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "index", "said"),
    [
        ("flux_2_klein_4b", {"is_distilled": True}, "FLUX.2-klein-base"),
        ("flux_2_klein_9b", {"is_distilled": True}, "FLUX.2-klein-base"),
        ("qwen", {"_class_name": "QwenImageEditPipeline"}, "edit or layered"),
    ],
)
def test_variants_with_the_same_network_are_refused_by_their_pipelines_index(
    model_type: str, index: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    family = get_family(model_type)
    own = {"_class_name": family.pipeline_class, "is_distilled": False}
    for content in ({}, own):
        (tmp_path / "model_index.json").write_text(json.dumps(content))
        assert family.model_folder(tmp_path) == tmp_path / "transformer"
    (tmp_path / "model_index.json").write_text(json.dumps({**own, **index}))
    for path in (tmp_path, tmp_path / "transformer"):
        with pytest.raises(ModelSourceError, match=said) as caught:
            family.model_folder(path)
        assert next(iter(index)) in str(caught.value)


def test_chroma_is_built_without_a_warning() -> None:
    network = CASES["chroma_1"].parts()["transformer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        get_family("chroma_1").build(dict(network.config))


@pytest.mark.parametrize("name", CASES)
def test_the_familys_own_checkpoints_are_taken(name: str) -> None:
    case = CASES[name]
    network = case.parts()["transformer"]
    case.family.check_config(json.loads(network.to_json_string()))


@pytest.mark.parametrize(
    ("name", "field", "shape", "said"),
    [
        ("flux_2_dev", PROMPT_EMBEDS, (511, 24), r"\(512, 24\)"),
        ("sd35_medium", PROMPT_EMBEDS, (77, 24), r"\(333, 24\)"),
        ("sd35_medium", "pooled", (9,), r"\(10,\)"),
        ("sd35_medium", LATENTS, (4, 34, 16), "at most 32"),
        ("sd35_medium", LATENTS, (4, 15, 16), "multiples of 2"),
        ("qwen", LATENTS, (4, 16, 15), "multiples of 2"),
        ("zimage", LATENTS, (4, 15, 16), "multiples of 2"),
        ("chroma_1", LATENTS, (16, 16, 16), r"\(4, H, W\)"),
        ("sana", PROMPT_EMBEDS, (5, 23), r"\(L, 24\)"),
    ],
)
def test_a_sample_of_other_sizes_is_refused(
    name: str, field: str, shape: tuple[int, ...], said: str
) -> None:
    case, pipeline = CASES[name], make_pipeline(CASES[name])
    sample, config = make_samples(case, case.family, pipeline)[0], pipeline.transformer.config
    case.family.check_sample(config, sample)
    with pytest.raises(ModelSourceError, match=said):
        case.family.check_sample(config, {**sample, field: torch.zeros(shape)})


# Numbers


TOKENS = {
    "flux_2_dev": (64, 64, 512, 4096 + 512),
    "flux_2_klein_4b": (48, 64, 512, 3072 + 512),
    "sd35_medium": (128, 96, 333, 3072 + 333),
    "qwen": (128, 96, 40, 3072 + 40),
    "zimage": (126, 98, 33, 3104 + 64),
    "chroma_1": (128, 96, 40, 3072 + 40),
    "sana": (32, 24, 300, 768),
}
"""Height and width of latents, rows of the prompt, tokens."""


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_what_the_blocks_see(name: str) -> None:
    height, width, rows, tokens = TOKENS[name]
    case = CASES[name]
    sample = {LATENTS: torch.zeros(4, height, width), PROMPT_EMBEDS: torch.zeros(rows, 24)}
    config = case.parts()["transformer"].config
    assert case.family.tokens(config, sample) == tokens


ADAPTED = {
    # Four projections in each of two double blocks, two fused matrices in each of three others.
    "flux_2_dev": 2 * 4 + 3 * 2,
    # Eight in each of three blocks but the last one's to_add_out; medium's attn2 is left alone.
    "sd35_medium": 3 * 8 - 1,
    "sd35_large": 3 * 8 - 1,
    "qwen": 3 * 4,
    "zimage": (3 + 2 + 2) * 4,
    "chroma_1": 2 * 4 + 3 * 3,
    "sana": 3 * 2 * 3,
}


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_adapts_what_the_familys_recipe_adapts(name: str) -> None:
    case = CASES[name]
    network = case.parts()["transformer"]
    targets = case.family.lora_targets(network.config)
    targets = list(targets) if isinstance(targets, tuple) else targets
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), network)
    adapted = {n.split(".lora_A.")[0] for n, _ in network.named_parameters() if ".lora_A." in n}
    assert len(adapted) == ADAPTED[name]
    assert all(".attn2." not in path for path in adapted) or name == "sana"
    if name == "flux_2_dev":
        singles = {f"single_transformer_blocks.{i}.attn.to_out" for i in range(3)}
        assert singles <= adapted


@pytest.mark.parametrize(
    ("name", "settings", "shape", "sigma"),
    [
        # Half of the noise, bent by exp(0.5) and exp(1.15).
        ("flux_2_dev", {}, (128, 16, 16), 0.622459),
        ("flux_2_dev", {}, (128, 64, 64), 0.759511),
        ("flux_2_klein_4b", {"shift": 1.0}, (128, 64, 64), 0.5),
        ("sd35_medium", {}, (16, 128, 128), 3 / 4),
        ("qwen", {}, (16, 128, 128), 2.2 / 3.2),
        # 1024 tokens, on the line from 0.5 at 256 to 0.9 at 8192: mu = 0.5 + 0.4 * 768 / 7936.
        ("qwen", {"shift": "resolution"}, (16, 64, 64), 0.631512),
        ("zimage", {}, (16, 128, 128), 3 / 4),
        ("chroma_1", {}, (16, 128, 128), 1 / 2),
        ("sana", {}, (32, 32, 32), 3 / 4),
    ],
)
def test_the_noise_share_in_the_middle_is_bent_as_the_family_recommends(
    name: str, settings: dict[str, Any], shape: tuple[int, ...], sigma: float
) -> None:
    objective: Any = CASES[name].family.objective({"std": 1e-9, **settings}, Path("nowhere"))
    assert objective.draw_sigma(torch.Generator(), shape) == pytest.approx(sigma, abs=1e-5)


def test_a_family_without_a_line_of_shifts_refuses_one() -> None:
    with pytest.raises(ConfigError, match=r"objective\.shift"):
        get_family("sana").objective({"shift": "resolution"}, Path("nowhere"))
