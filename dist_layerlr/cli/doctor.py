"""``dist-layerlr doctor``: versions and devices here, what works with them and what does not."""

from __future__ import annotations

import importlib
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

GOOD, ABSENT, BAD = "ok", "absent", "bad"
_DISTRIBUTION = "dist_layerlr"
_FOR = {
    "torch": "everything but plans",
    "deepspeed": "ZeRO",
    "accelerate": "launch/train.py and Accelerate's loops",
    "safetensors": "checkpoints and exports",
    "diffusers": "diffusion models in launch/train.py",
    "transformers": "language models, and LayerLRTrainer",
    "peft": "adapters",
    "matplotlib": "dist-layerlr plot",
    "pyyaml": "configs in YAML",
    "timm": "timm's own numbering of layers",
    "lightning": "Lightning's trainer",
    "trl": "TRL's trainers",
}
"""{package: what needs it}."""
_PROGRAMS = ("torchrun", "accelerate", "deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    part: str
    """versions, devices, sharding or programs."""
    what: str
    state: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Everything that was looked at."""

    rows: tuple[Row, ...]

    @property
    def is_well(self) -> bool:
        """Whether all that is installed works; what is absent may not be wanted."""
        return all(row.state != BAD for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"well": self.is_well, "rows": [asdict(row) for row in self.rows]}


def examine() -> Examination:
    """Look at this machine. Nothing is changed, and no network is used."""
    return Examination(rows=tuple([*_versions(), *_devices(), *_sharding(), *_programs()]))


def report(found: Examination) -> str:
    """The examination as text."""
    lines: list[str] = []
    part = ""
    for row in found.rows:
        if row.part != part:
            part = row.part
            lines.append(f"{part}:")
        lines.append(f"  {row.state:<7} {row.what:<22} {row.text}")
    return "\n".join(lines) + "\n"


def _versions() -> list[Row]:
    rows = [_row("versions", "python", GOOD, platform.python_version())]
    for package, purpose in _FOR.items():
        wanted = _wanted(package)
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            asked = f"{package}{wanted}"
            text = f"not installed; {purpose} need{'' if ' and ' in purpose else 's'} it: {asked}"
            rows.append(_row("versions", package, ABSENT, text))
            continue
        if _is_in(version, wanted):
            rows.append(_row("versions", package, GOOD, version))
        else:
            text = f"{version}, but {wanted} is needed for {purpose}"
            rows.append(_row("versions", package, BAD, text))
    return rows


def _row(part: str, what: str, state: str, text: str) -> Row:
    return Row(part=part, what=what, state=state, text=text)


def _wanted(package: str) -> str:
    """The range that this package's metadata asks for; empty where it names none."""
    from packaging.requirements import Requirement

    found = ""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []  # a checkout on the path, not installed
    for line in lines:
        requirement = Requirement(line)
        # Several extras may name one package; the first range is that of the smaller extra.
        if requirement.name.lower() == package and not found:
            found = str(requirement.specifier)
    return found


def _is_in(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _devices() -> list[Row]:
    def look() -> str:
        import torch

        if not torch.cuda.is_available():
            return "no CUDA device: training runs on the CPU, streaming has nothing to hide"
        names = []
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            names.append(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
        return "; ".join(names)

    return [_tried("devices", "accelerators", look)]


def _sharding() -> list[Row]:
    def backends() -> str:
        import torch.distributed as dist

        if not dist.is_available():
            raise RuntimeError("this torch was built without torch.distributed")
        found = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
        return "backends " + ", ".join(found)

    def fsdp() -> str:
        importlib.import_module("torch.distributed.fsdp").fully_shard  # noqa: B018
        return "FSDP1, FSDP2 and DDP"

    def deepspeed() -> str:
        # While it is imported DeepSpeed logs to stdout which accelerator it chose: that line would
        # stand before the report, and break its JSON.
        logging.disable(logging.WARNING)
        try:
            importlib.import_module("deepspeed")
        finally:
            logging.disable(logging.NOTSET)
        compiler = shutil.which("c++") or shutil.which("g++")
        built = "its CPU optimizers can be compiled" if compiler else "no C++ compiler: no CPU Adam"
        return f"ZeRO 0 to 3; {built}"

    return [
        _tried("sharding", "torch.distributed", backends),
        _tried("sharding", "FSDP", fsdp),
        _tried("sharding", "DeepSpeed", deepspeed),
    ]


def _tried(part: str, what: str, look: Callable[[], str]) -> Row:
    try:
        return _row(part, what, GOOD, look())
    except ModuleNotFoundError as error:
        return _row(part, what, ABSENT, f"{error.name} is not installed")
    except Exception as error:
        # A broken installation fails in ways of its own; which one is what the user asks.
        first = str(error).partition("\n")[0]
        return _row(part, what, BAD, f"{type(error).__name__}: {first}")


def _programs() -> list[Row]:
    rows = []
    for name in _PROGRAMS:
        path = shutil.which(name)
        rows.append(_row("programs", name, GOOD if path else ABSENT, path or "not on PATH"))
    return rows
