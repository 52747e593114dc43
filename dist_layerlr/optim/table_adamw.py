"""AdamW at many rates in one launch: rates stand in a table on the device, one column a tensor.

torch's fused kernel takes one rate a call, so a plan of 1,000 rates makes 1,000 calls a step. Here
one Triton kernel takes all tensors of one precision, whatever their rates. On which card and from
how many rates on that is faster has not been measured: nothing chooses this class by itself
(benchmarks/step_cost.py --device cuda measures it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.groups import EPS, LR, WEIGHT_DECAY
from dist_layerlr.optim.tables import STEP, Kind, Member, Settings, Table, is_capturing
from dist_layerlr.sharders.base import ParamGroup, local, local_gradient

BETAS, CAPTURABLE = "betas", "capturable"
MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_TORCH = ("foreach", "fused", "amsgrad", "maximize", "differentiable")
"""Arguments of torch's AdamW that this one has nothing for."""
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ELSE = "or use torch.optim.AdamW(groups, fused=True)"


class TableAdamW(Optimizer):
    """AdamW that steps any number of parameter groups in one kernel launch per precision.

    ``attach(plan, model, TableAdamW)``, or ``functools.partial(TableAdamW, betas=...)``. It needs
    Triton and a CUDA device; on the CPU Triton's interpreter runs it for tests
    (``TRITON_INTERPRET=1``). Updates are those of ``torch.optim.AdamW(fused=True)`` to rounding,
    and its state has the same names, so that either loads the other's ``state_dict``. Under
    ``attach(..., emission="groups")`` and with ``capturable=True`` a whole step may be captured in
    a CUDA graph. After ``add_param_group`` or a load, capture anew.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        **others: Any,
    ):
        """Hold parameters.

        Args:
            params: parameters or groups, each with ``lr``, ``betas``, ``eps`` and ``weight_decay``
                of its own where it gives them.
            lr: of groups that give none.
            betas: decay of the moments.
            eps: is added to the root of the second moment.
            weight_decay: decoupled, so it is multiplied by the rate.
            capturable: keep counters and rates on the device, so that a step can be captured in a
                CUDA graph. A replay does not see what the host writes into groups: call
                ``write_rates`` after a schedule's step.
            state_dtype: precision of both moments, such as "float32" beside bfloat16 parameters;
                None: that of the parameter.
            others: torch's remaining arguments; none may be set.

        Raises:
            ConfigError: an argument that is out of range or not supported, no Triton, or
                parameters where Triton does not run.
        """
        _refuse_of_torch(others, "")
        unknown = [name for name in others if name not in _OF_TORCH]
        if unknown:
            raise TypeError(f"TableAdamW got an unexpected keyword argument {unknown[0]!r}")
        self._kernel = _kernel()
        self._tables: dict[Kind, Table] = {}
        defaults = {
            LR: lr,
            BETAS: betas,
            EPS: eps,
            WEIGHT_DECAY: weight_decay,
            CAPTURABLE: capturable,
            "state_dtype": None if state_dtype is None else _dtype(state_dtype),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, which may have any rate of its own.

        Raises:
            ConfigError: as the constructor does.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @staticmethod
    def runs_on() -> str:
        """The type of device of parameters: ``cuda``, or ``cpu`` under TRITON_INTERPRET=1.

        Raises:
            ConfigError: no Triton.
        """
        return "cuda" if _kernel().IS_COMPILED else "cpu"

    def _check(self, group: ParamGroup) -> None:
        _refuse_of_torch(group, "groups.")
        if isinstance(group[LR], Tensor):
            raise fields.invalid(
                "lr", group[LR], "a number", " Rates lie on the device already: see write_rates."
            )
        _settings(group)
        for param in group["params"]:
            if not param.is_meta:
                self._check_param(param)

    def _check_param(self, param: Tensor) -> None:
        if param.dtype not in _DTYPES.values():
            allowed = "of " + ", ".join(_DTYPES)
            raise fields.invalid("parameter of dtype", param.dtype, allowed)
        runs_on = self.runs_on()
        # Segments keep the place of a group that has nothing on this rank by an empty tensor.
        if param.numel() and param.device.type != runs_on:
            why = (
                f"TableAdamW runs on CUDA: move the model there first, {_ELSE}. To test it on the"
                " CPU, set TRITON_INTERPRET=1 before Python starts."
                if runs_on == "cuda"
                else "TRITON_INTERPRET=1 is set, with which Triton runs on the CPU alone: unset it."
            )
            raise ConfigError(f"Invalid parameter on device {str(param.device)!r}: {why}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step what has a gradient; one launch for each combination of precisions.

        Raises:
            ConfigError: in a CUDA graph's capture, without ``capturable``, or where something that
                the graph could not follow has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_capturing() and not self.defaults[CAPTURABLE]:
            raise ConfigError(
                "Invalid capturable=False in the capture of a CUDA graph: counters and rates would"
                " stand still in its replays. Give capturable=True."
            )
        found: dict[Kind, list[Member]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is not None:
                    kind, member = self._member(number, param, copies)
                    found.setdefault(kind, []).append(member)
        settings = [_settings(group) for group in self.param_groups]
        for kind, members in found.items():
            if kind not in self._tables:
                self._tables[kind] = Table(kind, self.defaults[CAPTURABLE])
            launch(self._kernel, self._tables[kind], members, settings)
        for tensor, stepped in copies:
            tensor.copy_(stepped)
        return loss

    def write_rates(self) -> None:
        """Put the groups' rates and settings into the tables that captured graphs read.

        Call it before the replay that they are to hold for. It does not wait for the device.
        """
        settings = [_settings(group) for group in self.param_groups]
        for table in self._tables.values():
            table.write_settings(settings)

    def _member(
        self, number: int, param: Tensor, copies: list[tuple[Tensor, Tensor]]
    ) -> tuple[Kind, Member]:
        """A tensor as the kernel takes it; ``copies`` gets (tensor, what to copy into it after)."""
        state = self.state[param]
        if not state:
            self._begin(param, state)
        here = local(param)
        gradient = local_gradient(param)
        if gradient.is_sparse:
            raise ConfigError(
                f"Invalid gradient of a parameter {tuple(param.shape)}: it is sparse, and"
                " TableAdamW steps dense ones. Build the embedding with sparse=False."
            )
        moments = [local(state[key]) for key in MOMENTS]
        tensors = (here, gradient, moments[0], moments[1])
        kind = Kind(here.device, tuple(tensor.dtype for tensor in tensors))
        if not _alike(tensors):
            tensors = _repacked(tensors)
            for before, after in zip((here, *moments), (tensors[0], *tensors[2:]), strict=True):
                if after is not before:
                    copies.append((before, after))
        return kind, Member(number, tensors, state)

    def _begin(self, param: Tensor, state: dict[str, Any]) -> None:
        """Make the state of a tensor, as torch's AdamW names and lays it out."""
        home = local(param).device if self.defaults[CAPTURABLE] else "cpu"
        state[STEP] = torch.zeros((), dtype=torch.float32, device=home)
        for key in MOMENTS:
            state[key] = torch.zeros_like(
                param, dtype=self.defaults["state_dtype"], memory_format=torch.preserve_format
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or ``torch.optim.AdamW`` has saved.

        ``capturable`` and ``state_dtype`` stay as this optimizer was built.

        Raises:
            ConfigError: settings that this class has nothing for (amsgrad, maximize).
        """
        for group in state_dict["param_groups"]:
            given = {key: group.get(key) for key in ("amsgrad", "maximize")}
            _refuse_of_torch(given, "param_groups.")
        super().load_state_dict(state_dict)
        if self.defaults["state_dtype"] is not None:
            self._load_moments(state_dict)

    def _load_moments(self, state_dict: Mapping[str, Any]) -> None:
        """Moments at their own precision: torch has cast them to the parameter's."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(saved, params, strict=True):
            for key in MOMENTS:
                value = state_dict["state"].get(number, {}).get(key)
                if value is not None:
                    to = {"device": param.device, "dtype": self.defaults["state_dtype"]}
                    self.state[param][key] = value.to(**to)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and state, of a copy or a load, without torch's own settings in groups."""
        super().__setstate__(state)
        self._kernel = _kernel()
        # Tables hold addresses, which a copy must not have from its original.
        self._tables = {}
        for group in self.param_groups:
            for name in (*_OF_TORCH, "decoupled_weight_decay"):
                group.pop(name, None)
            group[LR] = float(group[LR])
            for name in (CAPTURABLE, "state_dtype"):
                group[name] = self.defaults[name]


def launch(
    kernel: ModuleType, table: Table, members: list[Member], settings: list[Settings]
) -> None:
    """Count a step of all members, and step them in one launch."""
    counters = table.count(members)
    chunks = table.chunks(members, kernel.BLOCK)
    addresses = table.addresses(members, kernel.ALIGNMENT)
    rates = table.rates(members, settings, counters)
    if not len(chunks):
        return
    types = [kernel.TYPES[dtype] for dtype in (*table.kind.dtypes, table.kind.work)]
    # Triton launches on the current device, wherever its arguments lie.
    with torch.cuda.device_of(addresses):  # type: ignore[no-untyped-call]
        kernel.adamw[(len(chunks),)](
            addresses,
            chunks,
            rates,
            len(members),
            *types,
            kernel.BLOCK,
            table.aligned,
            not kernel.IS_COMPILED,
            num_warps=kernel.WARPS,
        )


def _kernel() -> ModuleType:
    """The module of the kernel.

    Raises:
        ConfigError: no Triton.
    """
    try:
        from dist_layerlr.optim import table_kernel
    except ImportError as error:
        raise ConfigError(
            f"TableAdamW needs Triton, which cannot be imported here ({error}): pip install triton,"
            f" {_ELSE}."
        ) from error
    return table_kernel


def _settings(group: ParamGroup) -> Settings:
    lr, decay, eps, betas = (group[key] for key in (LR, WEIGHT_DECAY, EPS, BETAS))
    # Written so that NaN is refused, too.
    for name, value in ((LR, lr), (WEIGHT_DECAY, decay), (EPS, eps)):
        if not 0.0 <= value < math.inf:
            raise fields.invalid(name, value, "a finite number >= 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise fields.invalid(BETAS, betas, "two numbers in [0, 1)")
    return float(lr), float(decay), float(betas[0]), float(betas[1]), float(eps)


def _dtype(given: torch.dtype | str) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.invalid("state_dtype", given, "one of " + ", ".join(_DTYPES))
    return _DTYPES[name]


def _refuse_of_torch(given: Mapping[str, Any], where: str) -> None:
    for name in _OF_TORCH:
        if given.get(name):
            raise ConfigError(
                f"Invalid {where}{name}={given[name]!r}: TableAdamW has one way to step. Leave it"
                " out, or use torch.optim.AdamW."
            )


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether equal places in memory hold equal elements, with no gaps."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    return _has_no_gaps(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)


def _has_no_gaps(tensor: Tensor) -> bool:
    wanted = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != wanted:
            return False
        wanted *= size
    return True


def _repacked(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    param, gradient, first, second = (tensor.contiguous() for tensor in tensors)
    return param, gradient, first, second
