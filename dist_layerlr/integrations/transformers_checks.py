"""What a LayerLRTrainer refuses before training, and the optimizer that it takes."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations.checks import refuse_ds_config, refuse_replaced_optimizer
from dist_layerlr.optim.segmented import MakeOptimizer
from dist_layerlr.sharders.base import ParamGroup

_OWN_GROUPS = ("params", "model", "optimizer_dict")
"""Arguments that replace the groups which a Trainer hands to an optimizer (GaLore, LOMO ...)."""


def refuse_unproven(trainer: Any) -> None:
    """Refuse ways of training that would change the plan, or in which nothing was proven.

    Raises:
        ConfigError: names the argument, its value and what to do.
    """
    args = trainer.args
    if trainer.optimizer is not None:
        raise ConfigError(
            f"Invalid optimizers=({type(trainer.optimizer).__name__}, ...): LayerLRTrainer builds"
            " the optimizer. Name it in TrainingArguments(optim=...), or in"
            " optimizer_cls_and_kwargs=(class, arguments)."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"Invalid start: {args.n_gpu} devices in one process (nn.DataParallel). Start one"
            " process per device: torchrun --nproc_per_node N."
        )
    tensor_parallel = getattr(trainer.model, "tp_size", None) or 1
    if tensor_parallel > 1 or getattr(args, "parallelism_config", None) is not None:
        raise ConfigError(
            "Invalid parallelism_config or tp_plan: tensor, context and sequence parallelism are"
            " not proven inside Trainer. Leave them out, or use attach and verify in a loop of your"
            " own."
        )
    if args.fsdp and (trainer.is_fsdp_xla_enabled or not trainer.is_fsdp_enabled):
        raise ConfigError(
            f"Invalid fsdp={args.fsdp!r}: Accelerate has dropped it (it does so on CPU), or it is"
            " XLA's, which is not supported. Remove it, or train on CUDA."
        )
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer)


def _check_deepspeed(trainer: Any) -> None:
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    # DeepSpeed clips at 1.0 where nothing is said; the Trainer's users say it here.
    config.setdefault("gradient_clipping", trainer.args.max_grad_norm)
    refuse_ds_config(config, scheduler="TrainingArguments(lr_scheduler_type=...)")
    refuse_replaced_optimizer(config)


def maker(trainer: Any, model: Any) -> MakeOptimizer:
    """Groups -> the optimizer of TrainingArguments.

    Raises:
        ConfigError: one that does not take the groups which it is given.
    """
    chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, model
    )
    made, kwargs = chosen
    takes_groups = isinstance(made, type) and issubclass(made, Optimizer)
    if not takes_groups or kwargs.keys() & set(_OWN_GROUPS):
        raise ConfigError(
            f"Invalid optim={trainer.args.optim!s} ({getattr(made, '__name__', made)}): it makes"
            " parameter groups of its own, which have no planned rates. Use 'adamw_torch_fused'."
        )

    def make(groups: list[ParamGroup]) -> Optimizer:
        built: Optimizer = made(groups, **kwargs)
        return built

    return make
