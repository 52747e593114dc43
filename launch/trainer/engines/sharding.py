"""Every way in which ranks share a model: one row each, and the checks that read the rows.

To add a sharder, write its wrap function in ``wrap.py`` and one row here. The library must know it
too: ``dist_layerlr/sharders``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import StreamPolicy
from launch.trainer.engines import wrap
from launch.trainer.engines.offload import FOLLOWED, Stagehand, refused
from launch.trainer.options import FULL, RunOptions
from launch.trainer.runtime import launched_world_size

MicroStep = Callable[[Any, bool], AbstractContextManager[Any]]
"""(wrapped model, is it the last microbatch of the step) -> context of its forward and backward."""
TORCHRUN, DEEPSPEED = "torchrun --nproc_per_node 2", "deepspeed --num_gpus 2"


def _always_reduce(model: Any, last: bool) -> AbstractContextManager[Any]:
    """Nothing is reduced, or the engine decides by itself when."""
    return nullcontext()


def _no_sync(model: Any, last: bool) -> AbstractContextManager[Any]:
    """DDP and FSDP1 reduce in backward unless it runs in their context."""
    context: AbstractContextManager[Any] = nullcontext() if last else model.no_sync()
    return context


def _set_sync(model: Any, last: bool) -> AbstractContextManager[Any]:
    """FSDP2 keeps a switch, which must be on again for the last microbatch."""
    model.set_requires_gradient_sync(last)
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What differs between the ways in which ranks share a model."""

    name: str
    """As ``dist_layerlr.sharders.Layout.name`` spells it, and `hsdp` for FSDP2 on a 2D mesh."""
    wrap: wrap.Wrap | None
    """Puts a meta model under the sharder; None: DeepSpeed's engine does."""
    launcher: str | None = TORCHRUN
    """What starts its ranks; None: nothing may, it trains in one process."""
    micro_step: MicroStep = _always_reduce
    """Skips the gradient reduction of all but the last microbatch."""
    one_dtype: bool = False
    """Whether it flattens parameters, which must then have one dtype: a base in 16 bits becomes
    fp32 beside an adapter."""
    stagehand: Stagehand
    """Who keeps weights in host memory when ``memory.stagehand`` is on."""
    refuses: str = ""
    """Why it cannot do so: at all, or in a full finetune where ``stagehand`` is STREAMS."""
    several: bool = False
    """Whether one process can hold two models of which one trains at a time. A whole copy leaves
    the device while the other trains; shards stay."""
    accelerate: str | None = None
    """Flags by which ``accelerate launch`` asks for the same; None: there are none."""

    @property
    def alone(self) -> bool:
        """Whether it trains in one process."""
        return self.launcher is None

    @property
    def by_deepspeed(self) -> bool:
        """Whether a ds_config asks for it, not ``--sharding``."""
        return self.wrap is None

    @property
    def flag(self) -> str:
        """How the command line asks for it."""
        return "--deepspeed_config" if self.by_deepspeed else f"--sharding {self.name}"


_FLAT = "it keeps flat parameters on the device"
_FSDP1 = "--use_fsdp --fsdp_version 1"
_FSDP2 = "--use_fsdp --fsdp_version 2"
# Names are spelled as the library, the command line, run.sh and the tests spell them.
_ROWS = (
    # One process has no gradients to reduce and no launcher to wait for.
    Sharding(
        name="none", wrap=wrap.whole, launcher=None, stagehand=Stagehand.STREAMS, several=True
    ),
    Sharding(
        name="ddp",
        wrap=wrap.ddp,
        micro_step=_no_sync,
        stagehand=Stagehand.STREAMS,
        several=True,
        refuses="its gradient reduction needs them on the device",
    ),
    Sharding(
        name="fsdp1",
        wrap=wrap.fsdp1,
        micro_step=_no_sync,
        one_dtype=True,
        stagehand=Stagehand.REFUSES,
        refuses=_FLAT,
        accelerate=_FSDP1,
    ),
    Sharding(
        name="fsdp1_flat",
        wrap=wrap.fsdp1_flat,
        micro_step=_no_sync,
        one_dtype=True,
        stagehand=Stagehand.REFUSES,
        refuses=_FLAT,
        accelerate=_FSDP1,
    ),
    Sharding(
        name="fsdp2",
        wrap=wrap.fsdp2,
        micro_step=_set_sync,
        stagehand=Stagehand.DELEGATES,
        several=True,
        accelerate=_FSDP2,
    ),
    Sharding(
        name="hsdp",
        wrap=wrap.hsdp,
        micro_step=_set_sync,
        stagehand=Stagehand.DELEGATES,
        several=True,
        accelerate=_FSDP2,
    ),
    # DeepSpeed refuses stages below 3 with the ds_config in hand: see offload_zero.
    Sharding(
        name="zero",
        wrap=None,
        launcher=DEEPSPEED,
        stagehand=Stagehand.DELEGATES,
        accelerate="--use_deepspeed",
    ),
)
SHARDINGS = {row.name: row for row in _ROWS}
NONE, ZERO = SHARDINGS["none"], SHARDINGS["zero"]


def check_launch(sharding: Sharding, global_batch: int) -> None:
    """Refuse a launcher that does not fit the sharding, before any process group exists.

    Raises:
        ConfigError: a sharder without a launcher, several ranks without a sharder, or a batch that
            ranks cannot share.
    """
    world = launched_world_size()
    # RANK and not WORLD_SIZE: torchrun with a single rank is a launcher too.
    if not sharding.alone and "RANK" not in os.environ:
        raise ConfigError(
            f"Invalid {sharding.flag}: it needs a launcher. Start it with: {sharding.launcher}"
            " launch/train.py ..."
        )
    if sharding.alone and world > 1:
        raise ConfigError(
            f"Invalid {sharding.flag} with {world} ranks: each would train alone. "
            "Pass --sharding ddp or fsdp2, or --deepspeed_config ds_configs/zero2.json."
        )
    if global_batch % world:
        raise ConfigError(
            f"Invalid train.global_batch={global_batch}: must be a multiple of the world size"
            f" {world}. The nearest are {global_batch - global_batch % world} and"
            f" {global_batch + world - global_batch % world}."
        )


def check_accelerate_env(sharding: Sharding) -> None:
    """Refuse an ``accelerate launch`` whose own sharding options contradict ours.

    Accelerate only passes them on, as environment variables; train.py shards by its own flags.

    Raises:
        ConfigError: names what Accelerate was told, and both ways out.
    """
    told = _told_accelerate()
    if told is None or sharding.accelerate == told:
        return
    # Megatron has no row: then the only way out is another launch.
    same = [row for row in _ROWS if row.accelerate == told]
    choice = "Launch"
    if same:
        flag = same[0].flag + (" FILE" if same[0].by_deepspeed else "")
        choice = f"Pass {flag} to train.py, or launch"
    raise ConfigError(
        f"Invalid {sharding.flag}: accelerate launch was told {told}, which train.py would ignore."
        f" {choice} with `accelerate launch --multi_gpu` and no sharding of its own (check its"
        " config file)."
    )


def _told_accelerate() -> str | None:
    """Flags of ``accelerate launch`` that ask for a sharder; None where there were none."""
    # The variables by which accelerate 1.15 hands its flags, or its config file, to the ranks.
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return "--use_deepspeed"
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        return "--use_megatron_lm"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"--use_fsdp --fsdp_version {os.environ.get('FSDP_VERSION', '1')}"
    return None


def _flag(name: str) -> bool:
    # The words that accelerate's own str_to_bool takes for true.
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def check_streaming(options: RunOptions, sharding: Sharding) -> None:
    """Refuse a sharder that cannot do what ``memory.stagehand`` asks for.

    ZeRO stages are checked with the ds_config.

    Raises:
        ConfigError: names the sharder and what to pass instead.
    """
    if options.stream is None:
        return
    if sharding.stagehand is Stagehand.REFUSES:
        raise refused(sharding.flag, sharding.refuses)
    if sharding.stagehand is Stagehand.DELEGATES:
        _check_delegated(options.stream, sharding.name)
    elif sharding.refuses and options.training_method == FULL:
        raise refused(f"{sharding.flag} in a full finetune", sharding.refuses)


def _check_delegated(policy: StreamPolicy, sharding: str) -> None:
    """Refuse the policy's fields that a sharder's own offload has no counterpart for."""
    plain = StreamPolicy()
    for field in ("mode", "resident_blocks", "stream_trainable", "host", "host_dtype", "min_numel"):
        given, default = getattr(policy, field), getattr(plain, field)
        if given != default:
            raise ConfigError(
                f"Invalid memory.stagehand.{field}={given!r} with {sharding}, whose own offload"
                f" takes {' and '.join(sorted(FOLLOWED))} only: remove it, or train with"
                " --sharding none or ddp."
            )
