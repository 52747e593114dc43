"""DeepSpeed ZeRO 0 to 3: after ``deepspeed.initialize`` the groups hold flat partitions, and names
are gone.

Private, read in deepspeed 0.19.8. Stages 1 and 2: ``bit16_groups`` (original parameters of each
group), their ``_hp_mapping``, ``single_partition_of_fp32_groups``,
``parallel_partitioned_bit16_groups``, ``real_dp_process_group``. Stage 3: ``fp16_groups`` per
sub-group, ``sub_group_to_group_id``, ``fp32_partitioned_groups_flat``; ``ds_numel``, ``ds_shape``,
``ds_tensor`` and ``partition_numel()`` per parameter. Stage 0: the client optimizer, or
``bf16_groups`` / ``fp16_groups`` of the mixed precision wrappers. To refresh copies:
``update_lp_params`` (0); ``_reassign_or_swap_out_partitioned_parameters`` between
``checkpoint_event_prologue`` and ``_epilogue`` (3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.plan.names import canonical_name
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.base import (
    Layout,
    Piece,
    Pieces,
    Sharder,
    Slice,
    Weight,
    buffers,
    internals_moved,
    parameters_with_names,
    whole_weight,
)
from dist_layerlr.sharders.model import materialize
from dist_layerlr.sharders.ranges import zero3_partition, zero3_range


class ZeroSharder(Sharder):
    """A DeepSpeed engine: original parameters of each group, and the fragment of them that this
    rank steps.
    """

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        """Whether the model is a DeepSpeed engine."""
        return any(c.__name__ == "DeepSpeedEngine" for c in type(model).__mro__)

    def _read_layout(self) -> Layout:
        engine: Any = self.model
        stage = int(engine.zero_optimization_stage())
        return Layout(name="zero", stage=stage, shards=stage > 0, flat=stage > 0, engine_steps=True)

    def slices(self) -> list[Slice]:
        """Refuse: the engine has already partitioned its optimizer.

        Raises:
            PlanMismatch: always.
        """
        raise PlanMismatch(
            "attach() was called on a DeepSpeed engine, which has already built its optimizer."
            " Attach to the model first, then deepspeed.initialize(model=model,"
            " optimizer=optimizer, config=...)."
        )

    def pieces(self, optimizer: Any = None) -> Pieces:
        """Read the engine's own optimizer.

        The ``optimizer`` argument is ignored, it may be a stale outer object.
        """
        engine: Any = self.model
        names = {id(p): canonical_name(n) for n, p in engine.module.named_parameters()}
        pieces: list[Piece] = []
        strangers = 0
        for param, place in self._walk():
            name = names.get(id(param))
            if name is None:
                strangers += 1
            else:
                pieces.append(_piece(name, *place))
        return Pieces(
            pieces=pieces, strangers=strangers, optimizer=_inner_optimizer(engine.optimizer)
        )

    def weights(self) -> list[Weight]:
        """Partitions at stage 3, else whole parameters.

        In the model's dtype, without the fp32 masters.
        """
        return [_weight(*found) for found in parameters_with_names(self.model)] + buffers(
            self.model
        )

    def true_weights(self) -> list[Weight]:
        """The fp32 masters of what is trained, and the weights of the rest."""
        masters: dict[str, list[Piece]] = {}
        for piece in self.pieces().pieces:
            masters.setdefault(piece.name, []).append(piece)
        return [
            true
            for weight in self.weights()
            for true in _masters(weight, masters.get(weight.name, []))
        ]

    def refresh(self, optimizer: Any = None) -> None:
        """Masters into the low-precision parameters, on every rank.

        Raises:
            PlanMismatch: the private attributes this relies on have changed.
        """
        engine: Any = self.model
        stage = self.layout.stage
        try:
            _refresh(engine.optimizer, stage)
        except AttributeError as error:
            raise internals_moved(f"ZeRO stage {stage}", "deepspeed 0.19.8", repr(error)) from None

    def _walk(self) -> list[Found]:
        engine: Any = self.model
        stage = self.layout.stage
        try:
            return _walk(engine.optimizer, stage)
        except (AttributeError, KeyError, IndexError) as error:
            raise internals_moved(f"ZeRO stage {stage}", "deepspeed 0.19.8", repr(error)) from None


def _piece(
    name: str, group: Any, owner: Tensor, offset: int, numel: int, start: int, everywhere: bool
) -> Piece:
    replicas = world_size() if everywhere else 1
    return Piece(
        name=name,
        start=start,
        numel=numel,
        owner=owner,
        offset=offset,
        group=group,
        replicas=replicas,
    )


def _inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside DeepSpeed's; its state is keyed by the owners."""
    return optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", None)


def _masters(weight: Weight, pieces: list[Piece]) -> list[Weight]:
    """A weight as its masters have it: one span per piece; the weight itself where it has none."""
    if not pieces:
        return [weight]
    return [
        replace(
            weight,
            tensor=p.of(p.owner),
            numel=p.numel,
            home=None,
            start=p.start,
            replicas=p.replicas,
        )
        for p in pieces
    ]


def _weight(param: Any, name: str, aliases: tuple[str, ...]) -> Weight:
    if not hasattr(param, "ds_tensor"):
        return whole_weight(
            name, param, world_size(), aliases=aliases, trainable=param.requires_grad
        )
    ranks, rank = _ranks(param)
    start, numel = zero3_range(param.ds_numel, ranks, rank)
    return Weight(
        name=name,
        start=start,
        numel=numel,
        aliases=aliases,
        tensor=param.ds_tensor.detach().view(-1)[:numel],
        shape=tuple(param.ds_shape),
        trainable=param.requires_grad,
    )


def _refresh(optimizer: Any, stage: int | None) -> None:
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # frees what is gathered
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers small parameters again
    elif hasattr(optimizer, "parallel_partitioned_bit16_groups"):
        _spread(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for param, (_, owner, offset, numel, _, _) in _walk(optimizer, stage):
            if param is not owner:
                param.data.copy_(owner.detach().view(-1)[offset : offset + numel].view(param.shape))


def _spread(optimizer: Any) -> None:
    """What ``update_lp_params`` does, in place: its all_gather takes gloo thrice the time, and the
    model's memory again.
    """
    import torch.distributed as dist

    columns = (
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
    )
    for partitions, master, group in zip(*columns, strict=True):
        partitions[dist.get_rank(group)].data.copy_(master.data)
        for rank, partition in enumerate(partitions):
            dist.broadcast(partition.data, dist.get_global_rank(group, rank), group)


def partition_empty(model: nn.Module, config: dict[str, Any]) -> None:
    """Make a meta-device model a ZeRO-3 one, its partitions uninitialised, one module's own
    parameters at a time.

    Then ``deepspeed.initialize`` and ``load_pretrained``. ``deepspeed.zero.Init`` partitions the
    modules that are built inside it. Our model exists already, so each module's parameters go into
    an ``nn.ParameterList`` built inside it: DeepSpeed then partitions those same Parameter objects
    in place.

    Args:
        model: parameters on the meta device, buffers real.
        config: the ds_config, complete.
    """
    import deepspeed

    deepspeed.init_distributed(verbose=False)  # else the config is checked against one rank
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[key] for key in low if config.get(key, {}).get("enabled")), torch.float32)
    with deepspeed.zero.Init(config_dict_or_path=config):
        for module in model.modules():
            empty = [p for p in module.parameters(recurse=False) if p.is_meta]
            materialize(module, "cpu", recurse=False)
            for param in empty:
                param.data = param.data.to(dtype)
            nn.ParameterList(empty)


Found = tuple[nn.Parameter, tuple[Any, Tensor, int, int, int, bool]]
"""(original parameter, (group, owner, offset, numel, start, whole on every rank))."""


def _walk(optimizer: Any, stage: int | None) -> list[Found]:
    if stage == 3:
        return _stage3(optimizer)
    if hasattr(optimizer, "bit16_groups"):
        return _fragments(
            optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        )
    if hasattr(optimizer, "bf16_groups"):
        return _fragments(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    if hasattr(optimizer, "fp16_groups"):
        return _copies(optimizer) if hasattr(optimizer, "fp32_groups") else _flat_copies(optimizer)
    return [
        (p, (group, p, 0, p.numel(), 0, True))
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _fragments(optimizer: Any, originals: Any, owners: Any) -> list[Found]:
    """Stage 1, 2 and BF16_Optimizer: a parameter's fragment in this rank's flat fp32 partition."""
    found: list[Found] = []
    for group, params, owner in zip(optimizer.param_groups, originals, owners, strict=True):
        for param in params:
            mapping = param._hp_mapping
            if mapping is None:
                found.append((param, (group, owner, 0, 0, 0, False)))
            else:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                found.append((param, (group, owner, here.start, here.numel, there.start, False)))
    return found


def _copies(optimizer: Any) -> list[Found]:
    """FP16_UnfusedOptimizer, stage 0 with bf16 or fp16: an fp32 copy of each parameter on every
    rank.
    """
    return [
        (param, (group, copy, 0, param.numel(), 0, True))
        for group, params, copies in zip(
            optimizer.param_groups, optimizer.fp16_groups, optimizer.fp32_groups, strict=True
        )
        for param, copy in zip(params, copies, strict=True)
    ]


def _flat_copies(optimizer: Any) -> list[Found]:
    """FP16_Optimizer at stage 0: whole flat fp32 copies on every rank."""
    found: list[Found] = []
    for group, params, owner in zip(
        optimizer.param_groups, optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True
    ):
        offset = 0
        for param in params:
            found.append((param, (group, owner, offset, param.numel(), 0, True)))
            offset += param.numel()
    return found


def _stage3(optimizer: Any) -> list[Found]:
    """Stage 3: partitions of the parameters of a sub-group, laid end to end, padding included."""
    found: list[Found] = []
    for sub_group, params in enumerate(optimizer.fp16_groups):
        group = optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        owner = optimizer.fp32_partitioned_groups_flat[sub_group]
        offset = 0
        for param in params:
            ranks, rank = _ranks(param)
            partition = param.partition_numel()
            if partition != zero3_partition(param.ds_numel, ranks):
                raise internals_moved(
                    "ZeRO stage 3", "deepspeed 0.19.8", f"a partition of {partition} elements"
                )
            start, numel = zero3_range(param.ds_numel, ranks, rank)
            found.append((param, (group, owner, offset, numel, start, False)))
            offset += partition
    return found


def _ranks(param: Any) -> tuple[int, int]:
    """(ranks that share a ZeRO-3 parameter, this rank among them)."""
    import torch.distributed as dist

    group = param.ds_process_group
    return dist.get_world_size(group), dist.get_rank(group)
