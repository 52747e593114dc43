"""Public names: typed for a type checker, lazy at run time; old ones say where they went."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dist_layerlr
from tests.support.imports import ROOT, imported, trees

LAZY = {"": "_PACKAGE_OF", "checkpoint": "_MODULE_OF", "offload": "_MODULE_OF"}
SKIP = "[mypy-torch.*,numpy.*,accelerate.*]\nfollow_imports = skip\n"
EAGER = ("export", "integrations", "optim", "plan", "proof", "report", "sharders", "weights")


def tables(package: str) -> tuple[dict[str, str], dict[str, str]]:
    """({name: module} for type checkers, {name: module} at run time) of a lazy package."""
    path = ROOT / "dist_layerlr" / package / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed: dict[str, str] = {}
    lazy: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for entry in node.body:
                assert isinstance(entry, ast.ImportFrom)
                assert entry.names[0].asname == entry.names[0].name, "re-exported as itself"
                typed[entry.names[0].name] = str(entry.module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == LAZY[package]:
            lazy = ast.literal_eval(node.value)
    return typed, lazy


def public_names() -> dict[str, list[str]]:
    """{package, "" for the top: the names that it re-exports}."""
    names = {"": list(dist_layerlr.__all__)}
    for package in (*EAGER, "checkpoint", "offload"):
        tree = ast.parse((ROOT / "dist_layerlr" / package / "__init__.py").read_text("utf-8"))
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names[package] = [a.name for n in imported for a in n.names if a.asname == a.name]
    return names


@pytest.mark.parametrize("package", sorted(LAZY))
def test_type_checkers_and_the_running_program_know_the_same_names(package: str):
    typed, lazy = tables(package)
    assert typed and typed.keys() == lazy.keys()
    for name, module in typed.items():
        home = lazy[name] if not package else f"{package}.{lazy[name]}"
        # A type checker may be sent deeper than the package, where name and module are alike.
        assert module.startswith(f"dist_layerlr.{home}")


def test_mypy_reveals_a_concrete_type_for_every_public_name(tmp_path: Path):
    names = public_names()
    lines = ["import dist_layerlr"]
    for package, found in names.items():
        place = f"dist_layerlr.{package}" if package else "dist_layerlr"
        lines += [f"import {place}", *(f"reveal_type({place}.{name})" for name in found)]
    lines.append("from dist_layerlr import typo_name")
    script = tmp_path / "doors.py"
    script.write_text("\n".join(lines) + "\n")
    config = tmp_path / "mypy.ini"
    # Only our own signatures are under test: reading torch's would take a minute.
    config.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n" + SKIP)
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(script)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    revealed = [line for line in found.splitlines() if "Revealed type" in line]
    assert len(revealed) == sum(map(len, names.values()))
    assert not [line for line in revealed if 'is "Any"' in line]
    assert 'has no attribute "typo_name"' in found


def test_the_trainer_imports_public_names_only():
    public = public_names()
    public[""] += ["errors", "fields", "files", "ranks"]
    private = []
    for module, tree in trees("launch").items():
        for place, _, name in (found.rpartition(".") for found in imported(tree)):
            top, _, package = place.partition(".")
            # A module at the root is a door of its own.
            if top == "dist_layerlr" and package not in public[""]:
                private += [] if name in public.get(package, ()) else [f"{module}: {place}.{name}"]
    assert not private


def test_packages_are_attributes_without_an_import_of_their_own():
    code = "import dist_layerlr; dist_layerlr.offload; dist_layerlr.plan.Plan; dist_layerlr.report"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_every_public_name_resolves():
    for name in dist_layerlr.__all__:
        assert getattr(dist_layerlr, name) is not None


@pytest.mark.parametrize("name", sorted(dist_layerlr._MOVED))
def test_an_old_name_still_works_and_names_its_new_place(name: str):
    place = f"dist_layerlr.{dist_layerlr._MOVED[name]}"
    with pytest.warns(DeprecationWarning, match=f"Import {name} from {place}"):
        old = getattr(dist_layerlr, name)
    assert old is getattr(sys.modules[place], name)


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="typo_name"):
        _ = dist_layerlr.typo_name
