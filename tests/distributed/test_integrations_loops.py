"""DeepSpeed's engine, scripts of diffusers and timm, and TRL: the docs' own diffs on two ranks.

Where a real network trains, its gradients are its own: the first step of Adam moves each element
that has one by the rate of its name, and a run that was stopped must end in the same weights.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import PreTrainedTokenizerFast

from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.families import wan, wan_batch
from tests.support.hf_trainer import OnCpu, fresh_accelerate, make_model
from tests.support.plugged import (
    HALF,
    STEPS,
    Net,
    expected,
    farthest,
    fsdp_plugin,
    full,
    on_cpu,
    run_script,
    sgd,
    zero_plugin,
)

BAR = 1e-6
cases = Cases(2, start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).mean()


def engine(folder: Path, stage: int, steps: int, *, resume: bool = False) -> Any:
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    mine = {
        "batches": [torch.zeros(2)] * steps,
        "ds_config": ds_config,
        "loss_of": loss_of,
        "model": Net(seed=9 if resume else 0),
        "resume": resume,
        "sgd": sgd,
        "steps": STEPS,
    }
    return full(run_script("DeepSpeed", folder, **mine)[0]["engine"])


def engine_case(stage: int) -> Callable[[At], None]:
    def body(at: At) -> None:
        assert farthest(engine(at.folder / "whole", stage, STEPS), expected()) < BAR
        engine(at.folder / "parts", stage, HALF)
        resumed = engine(at.folder / "parts", stage, STEPS - HALF, resume=True)
        assert farthest(resumed, expected()) < BAR

    body.__name__ = f"test_an_engine_at_stage_{stage}_trains_and_resumes_at_the_plan"
    return body


for _stage in range(4):
    _test = cases(engine_case(_stage))
    # Stage 2 is what stage 1 is, and more.
    globals()[_test.__name__] = pytest.mark.full(_test) if _stage == 1 else _test


def timm_script(folder: Path, last: int, wrap: Callable[[Any], Any], *, resume: bool) -> Any:
    mine = {
        "batches": [torch.zeros(2)],
        "epochs": STEPS,
        "last": last,
        "loss_of": loss_of,
        "model": Net(seed=9 if resume else 0),
        "resume": resume,
        "wrap": wrap,
    }
    # Each rank of these saves to a folder of its own: timm leaves it to the script who writes.
    space, _ = run_script("A loop of timm", folder / os.environ["RANK"], **mine)
    return full(space["model"])


@cases
def test_a_loop_of_timm_trains_and_resumes_at_the_plan(at: At) -> None:
    wanted = expected(lambda k: 0.5 * (1 + math.cos(math.pi * k / STEPS)))
    for label, wrap in (("ddp", DDP), ("none", lambda model: model)):
        trained = timm_script(at.folder / label, STEPS, wrap, resume=False)
        assert farthest(trained, wanted) < BAR
        parts = at.folder / f"{label} parts"
        timm_script(parts, HALF, wrap, resume=False)
        assert farthest(timm_script(parts, STEPS, wrap, resume=True), wanted) < BAR


ADAPTED = {
    "learning_rate": 1e-3,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-3, "cross_attn": 1e-3, "ffn": 2e-3},
        "depth_strategy": "flat",
        "lora_plus_ratio": 4,
        "regions": [{"match": "*.1.*", "lr_multiplier": 0.5}],
    },
}
"""Of the second block half, of LoRA's B four times."""


def adapted_rate(name: str) -> float:
    """The planned rate of an adapter, told from the name by hand."""
    found = 1e-3 if ".attn2." in name else 2e-3 if "up_proj" in name else 4e-3
    return found * (4 if ".lora_B." in name else 1) * (0.5 if ".1." in name else 1.0)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {n: v for n, v in full(model).items() if "lora_" in n}


def check_first_step(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> None:
    assert before.keys() == now.keys() and len(before) >= 8
    for name, value in before.items():
        moves = (now[name] - value).abs()
        assert float(moves.median()) == pytest.approx(adapted_rate(name), rel=2e-3), name


def flux2() -> Any:
    torch.manual_seed(0)
    return diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )


def flux2_batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "hidden_states": torch.randn(1, 6, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(1, 6, 4),
        "txt_ids": torch.zeros(1, 5, 4),
        "return_dict": False,
    }


DIFFUSERS: dict[str, tuple[Callable[[], Any], Callable[[int], Any], Callable[[], Any]]] = {
    "flux2_ddp": (flux2, flux2_batch, dict),
    "wan_ddp": (wan, wan_batch, dict),
    "flux2_fsdp2": (flux2, flux2_batch, lambda: {"fsdp_plugin": fsdp2()}),
    "flux2_zero2": (flux2, flux2_batch, lambda: {"deepspeed_plugin": zero_plugin(2)}),
}


def fsdp2() -> Any:
    plugin = fsdp_plugin(2)
    plugin.transformer_cls_names_to_wrap = ["Flux2TransformerBlock"]
    return plugin


class Numbered(torch.utils.data.Dataset):
    """Batches by their number, the same on every rank."""

    def __init__(self, numbers: range, make: Callable[[int], Any]):
        self.numbers, self.make = numbers, make

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, self.numbers)


def lora_script(label: str, folder: Path, numbers: range, *, resume: bool = False) -> Any:
    """The adapters at the end, and before and after the first step."""
    make, batch, mode = DIFFUSERS[label]
    seen: list[dict[str, torch.Tensor]] = []

    def loss(model: Any, inputs: Any) -> torch.Tensor:
        if len(seen) < 2:
            seen.append(adapters(model))
        return model(**inputs)[0].square().mean()

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    mine = {
        "loader": Numbered(numbers, batch),
        "lora": LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
        "loss_of": loss,
        "resume": resume,
        "steps": STEPS,
        "transformer": make(),
    }
    with fresh_accelerate(), pytest.MonkeyPatch.context() as patch:
        settings = mode()
        patch.setattr(accelerate, "Accelerator", lambda **given: on_cpu(**given, **settings))
        title = "A LoRA script of diffusers"
        space, printed = run_script(title, folder, config=ADAPTED, **mine)
        return adapters(space["transformer"]), seen, printed


def lora_case(label: str) -> Callable[[At], None]:
    def body(at: At) -> None:
        trained, seen, printed = lora_script(label, at.folder / "whole", range(STEPS))
        assert printed.count("verified on 2 ranks") == (at.rank == 0)
        check_first_step(*seen)
        lora_script(label, at.folder / "parts", range(HALF))
        rest = range(HALF, STEPS)
        resumed, _, _ = lora_script(label, at.folder / "parts", rest, resume=True)
        assert farthest(resumed, trained) < BAR

    body.__name__ = f"test_a_lora_script_of_diffusers_trains_and_resumes_{label}"
    return body


for _label in DIFFUSERS:
    _test = cases(lora_case(_label))
    globals()[_test.__name__] = _test


class SftOnCpu(OnCpu, trl.SFTTrainer):
    """Accelerate's FSDP on gloo ranks."""


def tokenizer() -> Any:
    words = {"<eos>": 0, **{f"w{n}": n for n in range(1, 64)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}
ZERO2 = {
    "deepspeed": {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
}
TRL: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": FSDP2, "zero2": ZERO2}


def sft(folder: Path, mode: dict[str, Any], start_from: str | None = None) -> Any:
    """The adapters at the end, and before and after the first step."""
    seen: list[dict[str, torch.Tensor]] = []

    class Recording(SftOnCpu):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if len(seen) < 2:
                seen.append(adapters(self.model_wrapped))
            return super().training_step(*args, **kwargs)

    ids = torch.randint(1, 64, (4 * STEPS, 8), generator=torch.Generator().manual_seed(1))
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": HALF,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-12,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": "deepspeed" not in mode,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 8,
        **mode,
    }
    mine = {
        "data": Dataset.from_dict({"input_ids": ids.tolist()}),
        "lora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "model": make_model(),
        "settings": copy.deepcopy(settings),
        "start_from": start_from,
        "tokenizer": tokenizer(),
    }
    torch.manual_seed(3)  # of the adapters, which the trainer injects
    with fresh_accelerate(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "SFTTrainer", Recording)
        space, printed = run_script("TRL", folder, config=ADAPTED, **mine)
        return adapters(space["trainer"].model_wrapped), seen, printed


def sft_case(label: str) -> Callable[[At], None]:
    def body(at: At) -> None:
        trained, seen, _ = sft(at.folder, TRL[label])
        check_first_step(*seen)
        resumed, _, _ = sft(at.folder, TRL[label], f"out/checkpoint-{HALF}")
        assert farthest(resumed, trained) < BAR

    body.__name__ = f"test_an_sft_trainer_of_trl_trains_and_resumes_{label}"
    return body


for _label in TRL:
    _test = cases(sft_case(_label))
    globals()[_test.__name__] = _test
