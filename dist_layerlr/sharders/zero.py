"""DeepSpeed ZeRO 0 to 3: the engine's groups hold flat partitions, in which no name is left.

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

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.base import (
    Layout,
    ParamGroup,
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
from dist_layerlr.sharders.model import Kinds, live_parameters, materialize
from dist_layerlr.sharders.ranges import zero3_partition, zero3_range
from dist_layerlr.sharders.zero_modes import refuse_modes


class ZeroSharder(Sharder):
    """A DeepSpeed engine: the original parameters of each group, and this rank's fragments."""

    @classmethod
    def handles(cls, kinds: Kinds) -> bool:
        """Whether the model is a DeepSpeed engine."""
        # By the name of the class: deepspeed is optional, and slow to import.
        return any(kind.__name__ == "DeepSpeedEngine" for kind in kinds.model.__mro__)

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

        Raises:
            ConfigError: a mode under which names are lost (see ``refuse_modes``).
        """
        engine: Any = self.model
        refuse_modes(engine)
        names: dict[int, str] = {}
        trained: dict[str, bool] = {}
        for name, param in live_parameters(engine.module).items():
            names[id(param)] = name
            trained[name] = param.requires_grad
        pieces: list[Piece] = []
        strangers = 0
        for fragment in self._fragments():
            found = names.get(id(fragment.param))
            if found is None:
                strangers += 1
            else:
                pieces.append(_piece(found, fragment))
        return Pieces(
            pieces=pieces,
            requires_grad=trained,
            strangers=strangers,
            optimizer=_inner_optimizer(engine.optimizer),
        )

    def weights(self) -> list[Weight]:
        """Partitions at stage 3, else whole parameters.

        In the model's dtype, without the fp32 masters.
        """
        refuse_modes(self.model)
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

    def refresh(self) -> None:
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

    def _fragments(self) -> list[Fragment]:
        engine: Any = self.model
        stage = self.layout.stage
        try:
            return _fragments(engine.optimizer, stage)
        except (AttributeError, KeyError, IndexError) as error:
            raise internals_moved(f"ZeRO stage {stage}", "deepspeed 0.19.8", repr(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """What this rank's optimizer holds of one original parameter."""

    param: nn.Parameter
    """The model's own object: names are found by its identity."""
    group: ParamGroup
    owner: Tensor
    """The flat partition, or the fp32 copy, that DeepSpeed gives to the inner optimizer."""
    offset: int
    """First element in the owner."""
    numel: int
    start: int
    """First element in the flattened original parameter."""
    everywhere: bool = False
    """Whether every rank holds the same elements: stage 0."""


def _piece(name: str, fragment: Fragment) -> Piece:
    return Piece(
        name=name,
        start=fragment.start,
        numel=fragment.numel,
        owner=fragment.owner,
        offset=fragment.offset,
        group=fragment.group,
        replicas=world_size() if fragment.everywhere else 1,
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
            # Masters are flat: what is written into one needs no copy home to another memory order.
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
        # Behind `numel` elements the last rank's partition is padding.
        tensor=param.ds_tensor.detach().view(-1)[:numel],
        shape=tuple(param.ds_shape),
        trainable=param.requires_grad,
    )


def _refresh(optimizer: Any, stage: int | None) -> None:
    if stage == 3:
        # The order is that of DeepSpeed's own load: the prologue frees what is gathered, masters
        # are copied into the partitions, the epilogue gathers persistent parameters again.
        optimizer.checkpoint_event_prologue()
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    # Stages 1 and 2 have `update_lp_params`, too: what is quicker is asked for first.
    elif hasattr(optimizer, "parallel_partitioned_bit16_groups"):
        _spread(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for fragment in _fragments(optimizer, stage):
            param, end = fragment.param, fragment.offset + fragment.numel
            # In fp32 the engine steps the parameters themselves, and keeps no copy.
            if param is not fragment.owner:
                master = fragment.owner.detach().view(-1)[fragment.offset : end]
                param.data.copy_(master.view(param.shape))


def _spread(optimizer: Any) -> None:
    """Do what ``update_lp_params`` does, by broadcasts in place.

    Its all_gather takes gloo three times as long, and the memory of the model once more.
    """
    import torch.distributed as dist

    columns = (
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
    )
    for partitions, master, group in zip(*columns, strict=True):
        # The copy casts. It comes before the broadcasts, in which all ranks of the group take part
        # in one order, each as the source of its own partition.
        partitions[dist.get_rank(group)].data.copy_(master.data)
        for rank, partition in enumerate(partitions):
            dist.broadcast(partition.data, dist.get_global_rank(group, rank), group)


def partition_empty(model: nn.Module, config: dict[str, Any]) -> None:
    """Partition a meta-device model for ZeRO-3, with uninitialised memory, module by module.

    No rank ever holds the whole model. Call ``deepspeed.initialize`` and ``load_pretrained`` next.
    ``zero.Init`` partitions the parameters of every module constructed inside it. Our model exists
    already, so for each module we construct an ``nn.ParameterList`` of its parameters: DeepSpeed
    then partitions those same Parameter objects in place.

    Args:
        model: parameters on the meta device, buffers real.
        config: the ds_config, complete.
    """
    import deepspeed

    # zero.Init checks the config against the world size, which is 1 without a process group.
    deepspeed.init_distributed(verbose=False)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[key] for key in low if config.get(key, {}).get("enabled")), torch.float32)
    with deepspeed.zero.Init(config_dict_or_path=config):
        for module in model.modules():
            # A tied parameter is empty only where it is met first: DeepSpeed must partition it
            # once.
            empty = [p for p in module.parameters(recurse=False) if p.is_meta]
            materialize(module, "cpu", recurse=False)
            for param in empty:
                # zero.Init casts what a constructor makes; these were made before it.
                param.data = param.data.to(dtype)
            nn.ParameterList(empty)


def _fragments(optimizer: Any, stage: int | None) -> list[Fragment]:
    """Tell DeepSpeed's optimizers apart by what they hold: class names differ between versions."""
    if stage == 3:
        return _stage3(optimizer)
    if hasattr(optimizer, "bit16_groups"):
        masters = optimizer.single_partition_of_fp32_groups
        return _mapped(optimizer, optimizer.bit16_groups, masters)
    if hasattr(optimizer, "bf16_groups"):
        return _mapped(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    if hasattr(optimizer, "fp16_groups"):
        return _copies(optimizer) if hasattr(optimizer, "fp32_groups") else _flat_copies(optimizer)
    found: list[Fragment] = []
    # What is left is stage 0 in fp32: DeepSpeed steps the client's optimizer as it was given.
    for group in optimizer.param_groups:
        found += [_whole(param, group, param, 0) for param in group["params"]]
    return found


def _whole(param: nn.Parameter, group: ParamGroup, owner: Tensor, offset: int) -> Fragment:
    return Fragment(
        param=param,
        group=group,
        owner=owner,
        offset=offset,
        numel=param.numel(),
        start=0,
        everywhere=True,
    )


def _mapped(optimizer: Any, originals: Any, owners: Any) -> list[Fragment]:
    """Stage 1, 2 and BF16_Optimizer: a parameter's fragment in this rank's flat fp32 partition."""
    found: list[Fragment] = []
    here, wanted = len(optimizer.param_groups), len(originals)
    if here != wanted:
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise PlanMismatch(
            f"DeepSpeed has built {kind} anew, with {here} parameter groups in place of {wanted}:"
            " the planned rates are gone. It does so with Adagrad. Use initialize_deepspeed(plan,"
            " model, make, config), which hands it one group, or AdamW."
        )
    for group, params, owner in zip(optimizer.param_groups, originals, owners, strict=True):
        for param in params:
            offset, numel, start = 0, 0, 0
            if param._hp_mapping is not None:  # None: the parameter lies on other ranks only
                address = param._hp_mapping.hp_fragment_address
                offset, numel = address.start, address.numel
                start = param._hp_mapping.lp_fragment_address.start
            found.append(
                Fragment(
                    param=param, group=group, owner=owner, offset=offset, numel=numel, start=start
                )
            )
    return found


def _copies(optimizer: Any) -> list[Fragment]:
    """FP16_UnfusedOptimizer, stage 0 with bf16 or fp16: each rank has fp32 copies of everything."""
    found: list[Fragment] = []
    columns = zip(optimizer.param_groups, optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    for group, params, copies in columns:
        for param, copy in zip(params, copies, strict=True):
            # The copy has the parameter's own shape, so it begins at its first element.
            found.append(_whole(param, group, copy, 0))
    return found


def _flat_copies(optimizer: Any) -> list[Fragment]:
    """FP16_Optimizer at stage 0: one flat fp32 copy of a group on every rank."""
    found: list[Fragment] = []
    owners = optimizer.fp32_groups_flat
    for group, params, owner in zip(
        optimizer.param_groups, optimizer.fp16_groups, owners, strict=True
    ):
        offset = 0
        for param in params:
            found.append(_whole(param, group, owner, offset))
            # Flattened end to end without padding, as nothing is partitioned at stage 0.
            offset += param.numel()
    return found


def _stage3(optimizer: Any) -> list[Fragment]:
    """Stage 3: partitions of the parameters of a sub-group, laid end to end, padding included."""
    found: list[Fragment] = []
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
            found.append(
                Fragment(
                    param=param, group=group, owner=owner, offset=offset, numel=numel, start=start
                )
            )
            # The last rank's partition is padded: the next parameter begins behind the padding.
            offset += partition
    return found


def _ranks(param: Any) -> tuple[int, int]:
    """(ranks that share a ZeRO-3 parameter, this rank among them)."""
    import torch.distributed as dist

    group = param.ds_process_group
    return dist.get_world_size(group), dist.get_rank(group)
