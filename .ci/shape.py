"""Print the shape of the code in numbers, and fail where one is out of its bounds: ``make shape``.

The bounds are habits of this project that no linter knows: few modules at the root, comments that
say why, short files and functions, typed public names, one toy model in the tests.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "dist_layerlr"
TREES = ("dist_layerlr", "launch", "benchmarks", "tests", ".ci")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
SKIP = "[mypy-torch.*,numpy.*,accelerate.*]\nfollow_imports = skip\n"
"""Only our own signatures are read: torch's would take a minute."""


def main() -> int:
    """Print one line per number; return 1 if any is out of its bound."""
    core = list(python_files("dist_layerlr"))
    everything = [path for tree in TREES for path in python_files(tree)]
    comments, comprehensions = densities(core)
    file, lines = max(((p, line_count(p)) for p in everything), key=lambda found: found[1])
    function, length = longest_function(everything)
    calls, any_names = list(wide_calls("launch")), untyped()
    rows: list[tuple[str, float, str, float, str]] = [
        ("modules at the root of dist_layerlr", len(list(CORE.glob("*.py"))), "<=", 7, ""),
        ("public names that mypy reveals as Any", len(any_names), "<=", 0, ", ".join(any_names)),
        ("comments per 100 lines of code, core", comments, ">=", 5, ""),
        ("comprehensions per 100 lines of code, core", comprehensions, "<=", 4, ""),
        ("'fmt: skip'", matches(everything, r"fmt: skip$"), "<=", 10, ""),
        ("lines of the longest file", lines, "<=", 400, str(file.relative_to(ROOT))),
        ("lines of the longest function", length, "<=", 60, function),
        ("calls with more than 6 arguments, launch", len(calls), "<=", 0, ", ".join(calls[:5])),
        ("attention classes, tests", matches(tests(), r"^\s*class \w*Attention\b"), "<=", 1, ""),
        ("labels parsed as types", matches(everything, r"\blabel\.startswith\("), "<=", 0, ""),
    ]
    failed = False
    for what, value, relation, bound, where in rows:
        holds = value <= bound if relation == "<=" else value >= bound
        failed |= not holds
        mark = "" if holds else "  <-- out of bounds"
        print(f"{what:<45}{value:>7.4g}  ({relation} {bound:g})  {where}{mark}")
    return int(failed)


def python_files(tree: str) -> Iterator[Path]:
    """Python files below a folder of the repository, in order."""
    yield from sorted((ROOT / tree).rglob("*.py"))


def tests() -> list[Path]:
    """Files of the test suite."""
    return list(python_files("tests"))


def line_count(path: Path) -> int:
    """Lines of a file."""
    return path.read_text(encoding="utf-8").count("\n")


def densities(paths: list[Path]) -> tuple[float, float]:
    """(comment lines, comprehensions) per 100 lines of code, docstrings not counted."""
    code = comments = comprehensions = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))
        with_code: set[int] = set()
        with_comment: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                with_comment.add(token.start[0])
            elif token.type not in NO_CODE:
                with_code.update(range(token.start[0], token.end[0] + 1))
        code += len(with_code - string_lines(tree))
        comments += len(with_comment)
    return 100 * comments / code, 100 * comprehensions / code


def string_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone: docstrings of modules, functions, classes and fields."""
    found: set[int] = set()
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(node, DOCUMENTED) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
                found.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return found


def longest_function(paths: list[Path]) -> tuple[str, int]:
    """(file: name, lines) of the longest function."""
    name, longest = "", 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > longest:
                    name, longest = f"{path.relative_to(ROOT)}: {node.name}", lines
    return name, longest


def wide_calls(tree: str) -> Iterator[str]:
    """Places of calls of our own functions that pass more than six arguments.

    A class is left out: a frozen dataclass is built once, by field names.
    """
    functions = {
        node.name
        for path in python_files(tree)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, FUNCTIONS)
    }
    for path in python_files(tree):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) + len(node.keywords) > 6:
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in functions:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {called}"


def matches(paths: list[Path], pattern: str) -> int:
    """Lines that a pattern is found in."""
    compiled = re.compile(pattern)
    return sum(
        compiled.search(line) is not None
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
    )


def untyped() -> list[str]:
    """Names of ``dist_layerlr.__all__`` of which a type checker knows nothing."""
    import dist_layerlr

    names = dist_layerlr.__all__
    with tempfile.TemporaryDirectory() as folder:
        script, config = Path(folder, "doors.py"), Path(folder, "mypy.ini")
        reveals = [f"reveal_type(dist_layerlr.{name})" for name in names]
        script.write_text("\n".join(["import dist_layerlr", *reveals]) + "\n")
        config.write_text(f"[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n{SKIP}")
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(script)]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    revealed = [line for line in output.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names), output
    return [name for name, line in zip(names, revealed, strict=True) if line.endswith('is "Any"')]


if __name__ == "__main__":
    sys.exit(main())
