"""Every field of a checkpoint's JSON files is input: deleted or wrong, it is one CheckpointError
that names the file, and nothing is changed."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr import Plan, attach, load_checkpoint, plan_model, save_checkpoint
from dist_layerlr.checkpoint.manifest import read_manifest
from dist_layerlr.errors import CheckpointError
from dist_layerlr.export import export_checkpoint

Path_ = tuple[Any, ...]
MANIFEST, INDEX, PLAN = "checkpoint.json", "index.json", "plan.json"
HUGE, FAR = 10**30, 2**62
# A value of every JSON type: one of them is wrong for every field.
TYPES: tuple[Any, ...] = (None, True, "x", 3.5, [], [[1]], {}, {"x": 1})
# Out of range, out of the folder, or of nothing that torch knows.
VALUES: dict[str, tuple[Any, ...]] = {
    "str": ("float33", "no_grad", "../rank_00000.safetensors", "/etc/passwd", ""),
    "int": (-1, HUGE, FAR, float("nan")),
    "float": (-1e300, HUGE, float("nan"), float("inf")),
}
# What may be said in a checkpoint without being wrong: another step, another class's name.
FREE = {
    ("content", "step"),
    ("content", "digest"),
    ("content", "sharder"),
    ("content", "objects"),
    ("content", "factor"),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.frozen = nn.Linear(4, 4)  # type: ignore[assignment]
    model.frozen.requires_grad_(False)
    return model


class Job:
    """One process that has trained a step, and its checkpoint."""

    def __init__(self, root: Path | None = None) -> None:
        self.model = net()
        rates = {"enabled": True, "default_lr": 1e-3, "unmatched": "default"}
        self.plan: Plan = plan_model(self.model, {"per_layer_lr": rates})
        self.optimizer = attach(self.plan, self.model, lambda groups: torch.optim.AdamW(groups))
        self.train()
        if root is not None:
            self.path = save_checkpoint(
                root,
                self.plan,
                self.model,
                self.optimizer,
                step=1,
                extra={"seen": {3: 1}},
                frozen=False,
            ).path

    def train(self) -> None:
        """A step without a backward pass, which a process that will fork must not run."""
        for param in self.model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, path: Path) -> None:
        load_checkpoint(path, self.plan, self.model, self.optimizer)

    def state(self) -> dict[str, Any]:
        """A copy of all that a load could change."""
        held = {str(n): s for n, s in enumerate(self.optimizer.state.values())}
        return copy.deepcopy({**self.model.state_dict(), **held})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("checkpoints"))


class Files:
    """The JSON files of a checkpoint, edited and sealed again."""

    def __init__(self, job: Job):
        self.path = job.path
        self.good = {n: json.loads((self.path / n).read_text()) for n in (MANIFEST, INDEX, PLAN)}

    def put(self, name: str, content: Any) -> None:
        files = {**self.good, name: content}
        files = copy.deepcopy(files)
        crcs = {}
        for other in (INDEX, PLAN):
            text = json.dumps(files[other])
            (self.path / other).write_text(text)
            crcs[other] = zlib.crc32(text.encode())
        manifest = files[MANIFEST]
        listed = manifest["content"].get("files") if isinstance(manifest["content"], dict) else None
        if name != MANIFEST:
            listed.update(crcs)
        elif isinstance(listed, dict):
            # The other files did not change, but their text did: only good seals follow.
            for other in set(listed) & set(crcs):
                if listed[other] == self.good[MANIFEST]["content"]["files"][other]:
                    listed[other] = crcs[other]
        canonical = json.dumps(manifest["content"], sort_keys=True, separators=(",", ":"))
        manifest["crc32"] = zlib.crc32(canonical.encode())
        (self.path / MANIFEST).write_text(json.dumps(manifest))

    def restore(self) -> None:
        self.put(PLAN, self.good[PLAN])


@pytest.fixture
def files(saved: Job) -> Iterator[Files]:
    found = Files(saved)
    yield found
    found.restore()


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place in a JSON value, inner ones included."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


def at(value: Any, path: Path_) -> Any:
    for key in path:
        value = value[key]
    return value


def edited(content: Any, path: Path_, change: Callable[[Any, str | int], None]) -> Any:
    content = copy.deepcopy(content)
    change(at(content, path[:-1]), path[-1])
    return content


def delete(parent: Any, key: Any) -> None:
    del parent[key]


def put(value: Any) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    return change


def changes(old: Any) -> Iterator[tuple[str, Callable[[Any, Any], None]]]:
    yield "deleted", delete
    for value in (*TYPES, *VALUES.get(type(old).__name__, ())):
        if not (type(value) is type(old) and value == old):
            yield f"= {value!r}", put(value)


def refused(job: Job, path: Path) -> str | None:
    """The text of the CheckpointError that a load raises; None: it loads. Nothing else may come."""
    try:
        job.load(path)
    except CheckpointError as error:
        return str(error)
    return None


# Where any content is good: the caller's own, and what has no meaning for a load.
def is_free(name: str, path: Path_) -> bool:
    if name == PLAN:
        return True  # another plan, which is compared with the live one, or an error
    if name == INDEX:
        # Another count, or a counter in a tensor of another dtype: nothing else knows the true one.
        return path[0] == "numbers" and len(path) == 4
    if path[-1] == "trainable":
        return True  # what trains is the live model's affair
    return name == MANIFEST and (path[:2] in FREE or path[:2] == ("content", "extra"))


CASES = [(MANIFEST, ("content",)), (INDEX, ()), (PLAN, ())]


@pytest.mark.parametrize(("name", "root"), CASES, ids=[name for name, _ in CASES])
def test_a_field_that_is_deleted_or_wrong_is_a_checkpoint_error_naming_its_file(
    saved: Job, files: Files, name: str, root: Path_
) -> None:
    job = Job()
    job.load(saved.path)
    silent: list[tuple[Path_, str]] = []
    tried = 0
    for path in leaves(at(files.good[name], root), root):
        if path == root:
            continue
        for what, change in changes(at(files.good[name], path)):
            before = job.state()
            files.put(name, edited(files.good[name], path, change))
            told = refused(job, saved.path)
            tried += 1
            if told is None:
                silent.append((path, what))
                job.train()  # what was loaded can be trained on
            else:
                assert same(before, job.state()), (path, what, told)
                assert "A part is loaded already" not in told, (path, what, told)
                assert str(saved.path) in told or "was trained with" in told, (path, what, told)
                assert "Error:" not in told, (path, what, told)
    assert tried > 150
    unexpected = [row for row in silent if not is_free(name, row[0])]
    assert not unexpected, unexpected


def test_no_path_of_an_index_leaves_the_folder(saved: Job, files: Files, tmp_path: Path) -> None:
    outside = saved.path.parent / "rank_00000.safetensors"
    outside.write_bytes((saved.path / "rank_00000.safetensors").read_bytes())
    index = json.loads(json.dumps(files.good[INDEX]).replace("rank_", "../rank_"))
    files.put(INDEX, index)
    for read in (
        lambda: Job().load(saved.path),
        lambda: export_checkpoint(saved.path, tmp_path, format="diffusers"),
    ):
        with pytest.raises(
            CheckpointError,
            match=r"index\.json' is damaged.*headers='\.\./rank_00000\.",
        ):
            read()


def test_a_dtype_is_looked_up_among_dtypes_and_not_in_torch(saved: Job, files: Files) -> None:
    for dtype in ("float33", "no_grad", "__name__", "Tensor"):
        index = copy.deepcopy(files.good[INDEX])
        index["runs"]["weight.0.weight"]["dtype"] = dtype
        files.put(INDEX, index)
        with pytest.raises(
            CheckpointError,
            match=rf"index\.json' is damaged.*\.0\.weight\.dtype='{dtype}': must be one of",
        ):
            Job().load(saved.path)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_adam_state_that_is_not_whole_is_refused_before_its_first_step_fails(
    saved: Job, files: Files, key: str
) -> None:
    index = copy.deepcopy(files.good[INDEX])
    if key == "step":
        del index["numbers"]["0.weight"][key]
    else:
        del index["runs"][f"optim.0.weight.{key}"]
    files.put(INDEX, index)
    with pytest.raises(
        CheckpointError, match=rf"index\.json.*optimizer state of 0\.weight: '{key}' is missing"
    ):
        Job().load(saved.path)


def test_names_of_engine_attributes_are_checked(saved: Job, files: Files) -> None:
    for state, told in (
        ({"counters": {"train": 1}, "scale": {}}, "Unknown key 'train'"),
        ({"counters": {"global_steps": "x"}, "scale": {}}, "global_steps='x'"),
        ({"counters": {}}, "scale=None"),
    ):
        manifest = copy.deepcopy(files.good[MANIFEST])
        manifest["content"]["sharder_state"] = state
        files.put(MANIFEST, manifest)
        with pytest.raises(CheckpointError, match=rf"checkpoint\.json' is damaged.*{told}"):
            Job().load(saved.path)


def test_the_good_files_load(saved: Job, files: Files) -> None:
    files.restore()
    assert read_manifest(saved.path).step == 1
    job = Job()
    job.load(saved.path)
    assert same(saved.state(), job.state())
