"""The user's half of the scripts in docs/integrations.md, and what their training must end in.

Each element has one gradient of its own at every step, so that SGD with momentum moves it by the
rate of its name times a number that a formula gives: nothing of ours, and no trainer, is asked.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dist_layerlr.plan import canonical_name
from tests.support.drivers import whole
from tests.support.pages import blocks, read

Weights = dict[str, torch.Tensor]
RATES = {"attn": 4e-3, "mlp": 2e-3, "norm": 5e-4}
CONFIG: dict[str, Any] = {
    "learning_rate": 1e-3,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": RATES["attn"], "ffn": RATES["mlp"], "norm": RATES["norm"]},
        "depth_strategy": "flat",
        "regions": [{"match": "*.blocks.1.*", "lr_multiplier": 0.5}],
    },
}
MOMENTUM = 0.9
STEPS, HALF = 6, 3


def slope(shape: torch.Size) -> torch.Tensor:
    """The gradients of a weight: no two elements have the same, so that none may change places."""
    return torch.linspace(0.5, 1.5, shape.numel()).reshape(shape)


class Leaf(nn.Module):
    """One weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 5))
        self.slope = slope(self.weight.shape)

    def forward(self) -> torch.Tensor:
        return (self.weight * self.slope).sum()


class Block(nn.Module):
    """A sum of all its weights, under the names of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Leaf(3), Leaf(7)
        self.attn = nn.ModuleDict({"to_q": Leaf(4), "to_out": Leaf(9)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.norm, self.mlp, self.attn["to_q"], self.attn["to_out"])
        return x + sum(part() for part in parts)


class Body(nn.Module):
    """Blocks on a batch of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Net(nn.Module):
    """A body, so that the names of its parameters are as deep in every script."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = Body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def rate(name: str) -> float:
    """The planned rate, told from the name by hand."""
    part = next(part for part in RATES if f".{part}." in name)
    return RATES[part] * (0.5 if "blocks.1." in name else 1.0)


SWAPPED = copy.deepcopy(CONFIG)
"""Two components of equal size in every block trade their rates."""
SWAPPED["per_layer_lr"]["component_lr"].update(self_attn=RATES["mlp"], ffn=RATES["attn"])


def swapped(name: str) -> float:
    """The rate under SWAPPED, told by hand."""
    other = name.replace(".attn.", ".x.").replace(".mlp.", ".attn.").replace(".x.", ".mlp.")
    return rate(other)


def sgd(groups: Any) -> torch.optim.Optimizer:
    """What the scripts of the docs build."""
    return torch.optim.SGD(groups, lr=1e-3, momentum=MOMENTUM)


def linear(step: int) -> float:
    """To 0 at the last step."""
    return 1.0 - step / (STEPS - 1)


def moved(factor: Callable[[int], float], steps: range) -> float:
    """By how much of its rate each element moves, by the formula of SGD's momentum."""
    return sum(factor(k) * (1 - MOMENTUM ** (k + 1)) / (1 - MOMENTUM) for k in steps)


def expected(
    factor: Callable[[int], float] = linear, then: Callable[[str], float] = rate
) -> Weights:
    """The weights at the end of a run.

    Args:
        factor: the schedule's multiplier at each optimizer step.
        then: the rates of the second half.
    """
    halves = moved(factor, range(HALF)), moved(factor, range(HALF, STEPS))
    return {
        name: value - slope(value.shape) * (rate(name) * halves[0] + then(name) * halves[1])
        for name, value in start().items()
    }


def start() -> Weights:
    """The weights before a run."""
    return {name: param.detach().clone() for name, param in Net().named_parameters()}


def farthest(a: Weights, b: Weights) -> float:
    """Largest difference of any element; the smallest movement of a whole run is 3e-3."""
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def full(model: Any) -> Weights:
    """Whole weights under plain names, by means of torch and DeepSpeed. Collective."""
    if hasattr(model, "zero_optimization_stage"):
        return {canonical_name(n): whole(p) for n, p in model.module.named_parameters()}
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    named = {canonical_name(n.removeprefix("module.")): v for n, v in found.items()}
    return {n: v.detach().clone() for n, v in named.items()}


def after(title: str) -> tuple[str, int]:
    """The script that a diff of docs/integrations.md ends in, and how many lines it adds."""
    section = read("docs/integrations.md").split(f"\n## {title}\n")[1].split("\n## ")[0]
    (diff,) = (diff for diff in blocks("docs/integrations.md", "diff") if diff in section)
    lines = diff.splitlines()
    added = sum(line.startswith("+") for line in lines)
    return "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n", added


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Scripts write to the working folder, and find the rates there."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_script(
    title: str, folder: Path, config: dict[str, Any] = CONFIG, **mine: Any
) -> tuple[dict[str, Any], str]:
    """Run a script of the docs on this rank; ``mine`` is what it imports from ``my_project``.

    Returns:
        Its variables, and what it printed.
    """
    text, added = after(title)
    assert added <= 4, f"{title}: {added} lines added"
    project = types.ModuleType("my_project")
    project.__dict__.update(mine)
    printed, space = io.StringIO(), {"__name__": "script"}
    with in_folder(folder), contextlib.redirect_stdout(printed):
        # Ranks share the folder: one must not read what another has only begun to write.
        whole = Path(f"rates.{os.getpid()}.json")
        whole.write_text(json.dumps(config))
        whole.replace("rates.json")
        sys.modules["my_project"] = project
        try:
            exec(compile(text, title, "exec"), space)
        finally:
            del sys.modules["my_project"]
    return space, printed.getvalue()


def fsdp_plugin(version: int, **fields: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
        # Without an accelerator torch empties full weights that it offloads.
        state_dict_type="SHARDED_STATE_DICT",
        **fields,
    )


def zero_plugin(stage: int, accumulate: int = 1, **fields: Any) -> DeepSpeedPlugin:
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulate,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            **fields,
        }
    )


def on_cpu(**settings: Any) -> Accelerator:
    """An Accelerator that shards on gloo ranks. Without an accelerator it drops FSDP, and counts
    one process under DeepSpeed: its state is written by hand."""
    shards = settings.get("fsdp_plugin") or settings.get("deepspeed_plugin")
    accelerator = Accelerator(cpu="deepspeed_plugin" not in settings, **settings)
    ranks = {"num_processes": int(os.environ["WORLD_SIZE"])}
    ranks |= dict.fromkeys(("process_index", "local_process_index"), int(os.environ["RANK"]))
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state.update(ranks)
        if isinstance(shards, FullyShardedDataParallelPlugin):
            state["distributed_type"] = DistributedType.FSDP
    if isinstance(shards, FullyShardedDataParallelPlugin):
        AcceleratorState._shared_state["fsdp_plugin"] = shards
    return accelerator
