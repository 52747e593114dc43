"""What may import what, read from the source.

``a <- b`` means that b may import a and anything left of it:
errors <- names, depth, checks, schedule, patterns <- stacks, components, presets, layer_decay <- config <- plan
<- matching, warn, report, sources, build <- policy, ring and figures of offload <- offload.predict <- the torch side.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_layerlr"
LAYERS = (
    {"errors"},
    {"names", "depth", "checks", "schedule", "patterns"},
    {"stacks", "components", "presets", "layer_decay"},
    {"config"},
    {"plan"},
    {"matching", "warn", "report", "sources", "build"},
    {"offload.policy", "offload.ring", "offload.figures"},
    {"offload.predict"},
)
WITHIN_LAYER = {("components", "stacks"), ("layer_decay", "stacks"), ("build", "warn"), ("build", "matching")}
"""(importer, imported) that share a layer."""
TOOLS = {"cli", "plot", "__init__"}
"""Pure programs on top of the core."""
PURE = set().union(*LAYERS) | TOOLS
HEAVY = {"torch", "numpy", "deepspeed", "accelerate", "safetensors", "matplotlib", "transformers", "diffusers", "peft"}


def modules() -> dict[str, ast.Module]:
    """{dotted name below the package: syntax tree}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of everything imported below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            origin = (base + (node.module or "")).strip(".")
            inside = origin == "dist_layerlr" or origin.endswith(".adapters")
            yield from ([f"{origin}.{alias.name}" for alias in node.names] if inside else [origin])


def top_level(tree: ast.Module) -> ast.Module:
    """The tree without functions and without ``if TYPE_CHECKING``: what runs on import."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: N802
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):  # noqa: N802
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def own(names: Iterator[str]) -> set[str]:
    """Modules of this package among imported names."""
    return {name.removeprefix("dist_layerlr.") for name in names if name.startswith("dist_layerlr.")}


def layer(module: str) -> int:
    return next((i for i, members in enumerate(LAYERS) if module in members), len(LAYERS))


def package_of(module: str) -> str:
    return ".".join(["dist_layerlr", *module.split(".")[:-1]])


def test_every_module_of_the_core_exists():
    assert PURE <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_the_core_imports_only_to_its_left(module: str):
    for other in own(imports(MODULES[module], package_of(module))):
        assert layer(other) < layer(module) or (module, other) in WITHIN_LAYER, f"{module} imports {other}"


def test_every_exception_within_a_layer_is_used():
    for module, other in WITHIN_LAYER:
        assert other in own(imports(MODULES[module], package_of(module)))


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_import_the_standard_library_and_each_other_only(module: str):
    roots = {name.partition(".")[0] for name in imports(top_level(MODULES[module]), package_of(module))}
    assert roots <= sys.stdlib_module_names | {"dist_layerlr"}
    others = own(imports(top_level(MODULES[module]), package_of(module)))
    assert others <= PURE | {"__version__"}


@pytest.mark.parametrize("module", sorted(PURE - TOOLS))
def test_the_core_names_no_framework_even_inside_functions(module: str):
    roots = {name.partition(".")[0] for name in imports(MODULES[module], package_of(module))}
    assert roots & HEAVY <= ({"safetensors"} if module == "sources" else set())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_deepspeed_appears_inside_functions_of_its_adapter_only(module: str):
    assert "deepspeed" not in {n.partition(".")[0] for n in imports(top_level(MODULES[module]), package_of(module))}
    if module != "adapters.zero":
        assert "deepspeed" not in {n.partition(".")[0] for n in imports(MODULES[module], package_of(module))}


@pytest.mark.parametrize(
    "module", sorted(m for m in MODULES if m.startswith("adapters.") and not m.endswith("__init__"))
)
def test_adapters_know_each_other_through_base_only(module: str):
    siblings = {m for m in own(imports(MODULES[module], package_of(module))) if m.startswith("adapters.")}
    allowed = {m for m in MODULES if m.startswith("adapters.")} if module == "adapters.base" else {"adapters.base"}
    assert {".".join(s.split(".")[:2]) for s in siblings} <= allowed


def test_the_walker_sees_what_it_should():
    tree = ast.parse(
        "import torch\nfrom . import names\ndef f():\n    import numpy\nif TYPE_CHECKING:\n    import peft\n"
    )
    assert set(imports(tree, "dist_layerlr")) == {"torch", "dist_layerlr.names", "numpy", "peft"}
    assert set(imports(top_level(tree), "dist_layerlr")) == {"torch", "dist_layerlr.names"}
