"""DeepSpeed ZeRO: the plan's groups go in, the engine partitions them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import attach, bind, fields, load_checkpoint, save_checkpoint, verify
from dist_layerlr.checkpoint import Restored, Saving
from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json
from dist_layerlr.offload import Prediction
from dist_layerlr.optim import check_ds_config, scale_lrs
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof, put_in_force
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import materialize, partition_empty
from launch.trainer.engines.native import kept, observe
from launch.trainer.engines.offload import ZERO_STAGE, offload_zero
from launch.trainer.engines.wrap import blocks_of
from launch.trainer.optimizers import make_optimizers
from launch.trainer.options import RunOptions, TrainOptions
from launch.trainer.runtime import Runtime
from launch.trainer.weights import load_base

STAGES = (0, 1, 2, 3)
# Blocks of a ds_config that are read here, so that they must be JSON objects.
_BLOCKS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")


class ZeroEngine:
    """A DeepSpeed engine around a client optimizer.

    Batch sizes and clipping come from the training config.
    """

    optimizer: Any = None

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        options: RunOptions,
        runtime: Runtime,
        config_file: str,
    ):
        import deepspeed

        largest = _largest_block(model, plan)
        config = alike(
            lambda: read_zero_config(config_file, options, runtime.world_size, block_numel=largest)
        )
        _quiet()
        if config.get("zero_optimization", {}).get("stage", 0) == ZERO_STAGE:
            # Stage 3 partitions the parameters while they are created: no rank holds the model.
            with _worded(config_file):
                partition_empty(model, config)
        else:
            materialize(model, runtime.device)
        model.train()
        # Before deepspeed.initialize, which flattens what the optimizer holds; bind() below finds
        # the names in the flat tensors again.
        optimizer = attach(
            plan,
            model,
            make_optimizers(options.optimizer, options.plan),
            emission="segmented",
        )
        self.plan = plan
        # DeepSpeed prints a banner on standard output, where a launcher's user looks for ours.
        with _worded(config_file), contextlib.redirect_stdout(None):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model: Any = engine
        bind(plan, self.model)
        load_base(self.model, options)

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Tell the engine where a step ends, so that it does not go by a count of its own."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; ``loss`` is already divided by the number of micro steps."""
        # Otherwise DeepSpeed divides by gradient_accumulation_steps once more.
        self.model.backward(loss, scale_wrt_gas=False)

    def begin(self, factor: float, step: int) -> None:
        """Put the rates of optimizer step ``step`` in force, before its backward passes."""
        scale_lrs(self.model.optimizer, factor, step)

    def step(self, factor: float, *, observed: dict[str, float] | None = None) -> float:
        """Step at plan x ``factor``."""
        scale_lrs(self.model.optimizer, factor)
        with observe(self.plan, self.model, None, factor, observed):
            self.model.step()
        norm = self.model.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def rest(self) -> None:
        """Stay: partitions share flat memory with the engine. No two models train in turn here."""

    def wake(self) -> None:
        """Stay; see ``rest``."""

    def steer(self, plan: Plan, factor: float) -> None:
        """Step at the rates of another plan from now on. Collective."""
        put_in_force(plan, self.model, factor=factor)
        self.plan = plan

    def prove(self, factor: float, steps: int) -> Proof:
        """Verify the live learning rates on all ranks, and values after ``steps`` steps."""
        return verify(self.plan, self.model, factor=factor, deep=True, steps=steps)

    def predict(self, tokens: int, micro_steps: int, options: RunOptions) -> Prediction | None:
        """Return None: DeepSpeed's own offload is not predicted."""
        return None

    def traffic(self) -> dict[str, int]:
        """Return nothing: DeepSpeed does not count."""
        return {}

    def save(self, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions) -> Saving:
        """Write a checkpoint, in the same format as every other engine."""
        return save_checkpoint(root, self.plan, self.model, step=step, extra=extra, **kept(train))

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint."""
        return load_checkpoint(path, self.plan, self.model, factor=1.0)


def _largest_block(model: nn.Module, plan: Plan) -> int:
    """Parameters of the largest block; 0 without blocks."""
    sizes = [0]
    for block in blocks_of(model, plan):
        sizes.append(sum(p.numel() for p in block.parameters()))
    return max(sizes)


def read_zero_config(
    path: str, options: RunOptions, world_size: int, *, block_numel: int = 0
) -> dict[str, Any]:
    """Read a ds_config and fill in what the training config decides.

    Args:
        path: of the ds_config.
        options: of the run.
        world_size: number of ranks.
        block_numel: parameters of the largest block, for ``memory.stagehand``.

    Raises:
        ConfigError: settings that would take the plan's rates over, or that contradict the training
            config.
    """
    config = read_json(path)
    _check_blocks(path, config)
    if config.get("bf16", {}).get("enabled") and options.train.dtype != "bf16":
        raise ConfigError(
            f"Invalid {path}: bf16.enabled=true needs train.dtype='bf16', got"
            f" {options.train.dtype!r}."
        )
    filled = _batch_sizes(options.train, world_size)
    for key, value in filled.items():
        if config.get(key, value) not in (value, "auto"):
            raise ConfigError(
                f"Invalid {path}: {key}={config[key]}, but train.global_batch needs {value}. Remove"
                " the key."
            )
    clip = options.train.grad_clip
    if config.get("gradient_clipping", 0) not in (0, clip, "auto"):
        raise ConfigError(
            f"Invalid {path}: gradient_clipping={config['gradient_clipping']}, but"
            f" train.grad_clip={clip} decides. Set it to 0, or to the same."
        )
    # A torch optimizer is what the plan was attached to; DeepSpeed would otherwise insist on its
    # own for offload.
    fixed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    complete = {**config, **filled, **fixed, "gradient_clipping": clip}
    if options.stream is not None:
        complete["zero_optimization"] = offload_zero(
            config.get("zero_optimization", {}), options.stream, block_numel, path
        )
    check_ds_config(complete)
    return complete


def _check_blocks(path: str, config: Mapping[str, Any]) -> None:
    """Refuse blocks that are no JSON objects, and what DeepSpeed's own schema refuses."""
    for block in _BLOCKS:
        given = fields.mapping(f"{path}: {block}", config.get(block, {}))
        fields.boolean(f"{path}: {block}.enabled", given.get("enabled", False))
    stage = config.get("zero_optimization", {}).get("stage", 0)
    fields.one_of(lambda: tuple(map(str, STAGES)))(f"{path}: zero_optimization.stage", str(stage))
    with _worded(path, "zero_optimization"):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))


def _batch_sizes(train: TrainOptions, world_size: int) -> dict[str, int]:
    """Return the three batch sizes of a ds_config, as the training config decides them."""
    share = train.global_batch // world_size
    micro = train.micro_batch or share
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
    }


@contextlib.contextmanager
def _worded(path: str, block: str | None = None) -> Iterator[None]:
    """Reword DeepSpeed's refusal of a value as one line, its first problem."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([block or error.title, *map(str, first["loc"])])
        raise ConfigError(f"Invalid {path}: {field}={first['input']!r}: {first['msg']}.") from None


def _quiet() -> None:
    """Switch off DeepSpeed's progress lines, its own deprecations, and a needless compilation."""
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    if not torch.cuda.is_available():
        # gloo needs no shared-memory op; building it takes 40 s and a compiler. Read in deepspeed
        # 0.19.8.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
