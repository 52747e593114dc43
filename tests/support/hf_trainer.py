"""transformers' Trainer on a tiny Llama: every mode on gloo ranks, and an oracle without it."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dist_layerlr.integrations import LayerLRTrainer
from tests.support.drivers import whole

Weights = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-3, "ffn": 2e-3, "norm": 5e-4},
        "default_lr": 1e-3,
        "depth_strategy": "flat",
        "regions": [{"match": "model.layers.1.*", "lr_multiplier": 0.5}],
    }
}
SAMPLES = 8
"""Every optimizer step sees all of them, so that the order in which a sampler draws is of no
account."""
STEPS = 4
DECAY = 0.1
EPS = 1e-4
"""Of AdamW: the size of a gradient, so that rounding of a sum over ranks stays rounding."""
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 10**9,
}


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            attn_implementation="eager",
        )
    )


def samples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (SAMPLES, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    # Nothing predicts the first token. Old releases (4.56) count it in the mean all the same.
    labels[:, 0] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def rate(name: str, config: dict[str, Any] = CONFIG) -> float:
    """The planned rate, told from the name by hand."""
    rates = config["per_layer_lr"]["component_lr"]
    found = config["per_layer_lr"]["default_lr"]
    for part, component in (("self_attn", "self_attn"), ("mlp", "ffn"), ("norm", "norm")):
        if part in name:
            found = rates[component]
    return found * (0.5 if "layers.1." in name else 1.0)


class OnCpu(Trainer):
    """Accelerate drops FSDP on CPU; here its own code for FSDP runs on gloo ranks."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True


class Ours(LayerLRTrainer, OnCpu):
    """What a user writes."""


def _gloo(state: Any, cpu: bool, *_: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_CPU


def arguments(folder: Path, mode: dict[str, Any], **more: Any) -> TrainingArguments:
    ranks = int(os.environ["WORLD_SIZE"])
    fields = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": SAMPLES // ranks // 2,
        "max_steps": STEPS,
        "save_steps": 2,
        "weight_decay": DECAY,
        "adam_epsilon": EPS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": "deepspeed" not in mode,
        "save_safetensors": True,
        "logging_strategy": "no",
    }
    known = TrainingArguments.__dataclass_fields__
    given = {**fields, **mode, **more}
    return TrainingArguments(**{k: v for k, v in given.items() if k in known})


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[io.StringIO]:
    """One trainer's settings must not reach the next: Accelerate keeps them in the environment."""
    before, backend = dict(os.environ), PartialState._prepare_backend
    said = io.StringIO()
    # Without an accelerator it would take DeepSpeed's ranks for single processes.
    PartialState._prepare_backend = _gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # else cpu:0, which FSDP1 refuses
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._prepare_backend = backend
        os.environ.clear()
        os.environ.update(before)


def full(trainer: Any) -> Weights:
    """Whole weights under plain names, by means of torch and DeepSpeed."""
    if trainer.is_deepspeed_enabled:
        return {n: whole(p) for n, p in trainer.model_wrapped.module.named_parameters()}
    options = StateDictOptions(full_state_dict=True)
    found = get_model_state_dict(trainer.model_wrapped, options=options)
    if not found:  # torch gives full weights of FSDP to rank 0 only when they are offloaded
        return {}
    named = {n.removeprefix("module."): v.detach().clone() for n, v in found.items()}
    return {n: v for n, v in named.items() if n != "lm_head.bias"}


def oracle(steps: int = STEPS, then: dict[str, Any] = CONFIG) -> Weights:
    """Final weights of one plain process, whose groups, decay and schedule are written by hand.

    Args:
        steps: to train.
        then: the config whose rates hold after the checkpoint at half way.
    """
    model = make_model()
    named = dict(model.named_parameters())
    groups = [
        {"params": [p], "weight_decay": 0.0 if "norm" in n else DECAY} for n, p in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=EPS, foreach=False)
    ids = torch.stack([row["input_ids"] for row in samples()])
    for step in range(steps):
        for name, group in zip(named, optimizer.param_groups, strict=True):
            config = CONFIG if step < STEPS // 2 else then
            group["lr"] = rate(name, config) * (STEPS - step) / STEPS
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in named.items()}


def farthest(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
