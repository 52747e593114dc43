"""What may import what, read from the folders.

``a <- b`` means that b may import a, and everything left of it:
errors <- fields, files, ranks <- plan <- sharders, offload <- optim, weights <- proof, report
<- checkpoint <- export <- cli. Folders that share a place do not know each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_layerlr"
ORDER = (
    {"errors"},
    {"fields", "files", "ranks"},
    {"plan"},
    {"sharders", "offload"},
    {"optim", "weights"},
    {"proof", "report"},
    {"checkpoint"},
    {"export", "integrations"},
    {"cli"},
)
PLACE = {folder: place for place, folders in enumerate(ORDER) for folder in folders}
PURE = ("errors", "fields", "files", "plan", "report", "cli", "__init__")
"""Importing these imports the standard library and each other only."""
DEEPSPEED = {"sharders.zero", "checkpoint.deepspeed", "integrations.deepspeed"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(p): ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported below a node; ``from dist_layerlr import x`` is ``dist_layerlr.x``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            inside = node.module == "dist_layerlr"
            yield from (
                [f"{node.module}.{a.name}" for a in node.names] if inside else [str(node.module)]
            )


def on_import(tree: ast.Module) -> ast.Module:
    """What runs on import: no bodies of functions, nothing under ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: N802
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):  # noqa: N802
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def folder(module: str) -> str:
    return module.removeprefix("dist_layerlr.").partition(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_every_module_imports_its_own_folder_and_what_stands_left_of_it(module: str):
    for name in imports(MODULES[module]):
        if name.startswith("dist_layerlr.") and folder(name) not in (folder(module), "__version__"):
            assert PLACE[folder(name)] < PLACE[folder(module)], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder(m) in PURE))
def test_pure_folders_import_the_standard_library_and_each_other_only(module: str):
    for name in imports(on_import(MODULES[module])):
        known = name.partition(".")[0] in sys.stdlib_module_names or folder(name) in (
            *PURE,
            "offload",
            "checkpoint",
        )
        assert known, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder(m) == "plan"))
def test_the_plan_imports_the_standard_library_errors_fields_and_files_only(module: str):
    names = {
        name
        for name in imports(MODULES[module])
        if name.partition(".")[0] not in sys.stdlib_module_names
    }
    own = {name for name in names if name.startswith("dist_layerlr")}
    assert {folder(name) for name in own} <= {"plan", "errors", "fields", "files"}
    assert not names - own


@pytest.mark.parametrize("module", sorted(MODULES))
def test_deepspeed_is_imported_inside_functions_of_its_own_modules_only(module: str):
    roots = {name.partition(".")[0] for name in imports(on_import(MODULES[module]))}
    assert "deepspeed" not in roots
    if module not in DEEPSPEED:
        assert "deepspeed" not in {name.partition(".")[0] for name in imports(MODULES[module])}


def test_importing_the_package_the_plan_or_the_command_line_does_not_import_torch():
    import subprocess

    pure = "dist_layerlr, dist_layerlr.plan, dist_layerlr.report, dist_layerlr.cli"
    code = f"import sys, {pure}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_walker_sees_what_it_should():
    tree = ast.parse(
        "import torch\nfrom dist_layerlr import ranks\n"
        "def f():\n    import numpy\nif TYPE_CHECKING:\n    import peft\n"
    )
    assert set(imports(tree)) == {"torch", "dist_layerlr.ranks", "numpy", "peft"}
    assert set(imports(on_import(tree))) == {"torch", "dist_layerlr.ranks"}
