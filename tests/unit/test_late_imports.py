"""What importing a module loads: plans and the command line work without torch, all but three
modules without DeepSpeed.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support.imports import imported, trees

MODULES = trees("dist_layerlr")
PURE = ("errors", "fields", "files", "plan", "exchange", "report", "cli", "__init__")
"""Importing these loads the standard library and each other only."""
LAZY = ("offload", "checkpoint")
"""Packages whose own import loads nothing; see test_doors.py."""
DEEPSPEED = {
    f"dist_layerlr.{name}"
    for name in ("sharders.zero", "checkpoint.deepspeed", "integrations.deepspeed")
}


def on_import(tree: ast.Module) -> ast.Module:
    """What runs on import: no bodies of functions, nothing under ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: N802
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):  # noqa: N802
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def is_pure(module: str) -> bool:
    return module.split(".")[1] in PURE


def roots(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree)}


@pytest.mark.parametrize("module", sorted(filter(is_pure, MODULES)))
def test_pure_folders_load_the_standard_library_and_each_other_only(module: str):
    for name in imported(on_import(MODULES[module])):
        top, _, inner = name.partition(".")
        ours = top == "dist_layerlr" and inner.partition(".")[0] in (*PURE, *LAZY)
        assert ours or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_deepspeed_is_imported_inside_functions_of_its_own_modules_only(module: str):
    assert "deepspeed" not in roots(on_import(MODULES[module]))
    assert module in DEEPSPEED or "deepspeed" not in roots(MODULES[module])


def test_importing_the_package_the_plan_or_the_command_line_does_not_import_torch():
    pure = "dist_layerlr, dist_layerlr.plan, dist_layerlr.report, dist_layerlr.cli"
    code = f"import sys, {pure}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_walker_sees_what_it_should():
    tree = ast.parse(
        "import torch\nfrom dist_layerlr import ranks\n"
        "def f():\n    import numpy\nif TYPE_CHECKING:\n    import peft\n"
    )
    assert set(imported(tree)) == {"torch", "dist_layerlr.ranks", "numpy", "peft"}
    assert set(imported(on_import(tree))) == {"torch", "dist_layerlr.ranks"}
