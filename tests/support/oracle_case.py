"""What ``oracle`` checks: one family on its tiny parts, and the path from data to noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from launch.trainer.families.diffusion import Diffusion
from launch.trainer.objectives.flow import FlowMatching

Tree = Any
"""A tensor, or a list or mapping of them."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheduler to walk with."""

    make: Callable[[], Any] | None = None
    """None: the one among the family's tiny parts, as it is shipped."""
    tolerance: float = 1e-4
    """Of the picture in [0, 1]. More where the scheduler rounds what it tells the network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One family on its tiny parts, and how its network is called by the pipeline.

    Compared by identity: what its pipeline said is kept for all of its mutants.
    """

    family: Diffusion
    parts: Callable[[], dict[str, Any]]
    """``PARTS[model_type]`` of ``launch/trainer/tiny``."""
    read: Callable[[tuple[Any, ...], dict[str, Any], Tree], tuple[Tree, Tensor]]
    """(args, kwargs of the pipeline's call of the network, latents of one batch) -> noisy latents
    in the layout of the cache, and the timestep (B,) as ``predict`` takes it. The batch of the call
    may be twice that of the latents."""
    answer: Callable[[Tree], Any] = staticmethod(lambda prediction: prediction)
    """A prediction in the layout of the cache -> what the network returns in its tuple's place 0,
    or, where ``whole_answer``, all that it returns."""
    said: Callable[[Any, Tree], Tree] = staticmethod(lambda output, latents: output)
    """What the network returned (as ``answer``), latents of one batch -> the prediction."""
    whole_answer: bool = False
    samplers: Sequence[Sampler] = (Sampler(),)
    networks: tuple[str, ...] = ()
    """Components that are called as networks; empty: the family's subfolder."""
    pixels: tuple[int, int, int] = (1, 32, 64)
    """Frames, height, width. Height and width differ, so that a swap shows."""
    video_vae: bool = False
    """Whether the VAE takes a frame axis."""
    given: Callable[[Tensor], dict[str, Any]] = staticmethod(lambda pixels: {})
    """Pixels (B, 3, F, H, W) -> what else the pipeline is given: an image, for example."""
    network_class: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the full-size network, where its class's defaults are another variant."""
    lengths: tuple[int, int] | None = None
    """Tokens of the two prompts, where the family leaves their number free; None: ``LENGTHS``."""
    mend: Callable[[Any], None] = staticmethod(lambda pipeline: None)
    """Corrects the pipeline in place, where it does not call its network as the model was trained.
    """
    said_at: int = 1
    """Which call of the network ``check_call`` compares; 1 is the second: sigma is not 1."""

    @property
    def components(self) -> tuple[str, ...]:
        return self.networks or (self.family.subfolder,)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a network by the pipeline."""

    network: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


# The path from data to noise


def shares(case: Case, pipeline: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of noisy = a * clean + s * noise, each (B,)."""
    if issubclass(case.family.objective_class, FlowMatching):
        return 1 - timestep / 1000, timestep / 1000
    from diffusers import DDPMScheduler

    # Not the pipeline's own scheduler: one that is the definition of the path.
    kept = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod[timestep.long()]
    return kept.sqrt(), (1 - kept).sqrt()


def wanted(case: Case, pipeline: Any, a: Tensor, s: Tensor, clean: Tree, drawn: Tree) -> Tree:
    """The prediction that is true: a velocity, the noise, or v."""
    if issubclass(case.family.objective_class, FlowMatching):
        return tree_map(lambda x, n: n - x, clean, drawn)
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        return tree_map(lambda x, n: per_sample(a, x) * n - per_sample(s, x) * x, clean, drawn)
    return drawn


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def apart(one: Tree, other: Tree) -> float:
    """Largest difference of two trees; infinite where shapes differ."""
    flat, form = tree_flatten(one)
    flat_other, form_other = tree_flatten(other)
    if form != form_other or any(a.shape != b.shape for a, b in zip(flat, flat_other, strict=True)):
        return float("inf")
    # A comparison with NaN is false: it must count as far apart.
    pairs = zip(flat, flat_other, strict=True)
    gaps = [float((a.float() - b.float()).abs().max()) for a, b in pairs]
    return max(float("inf") if gap != gap else gap for gap in gaps)
