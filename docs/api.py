"""Write docs/api.md: the public names of the packages, from their signatures and docstrings.

    python docs/api.py

A name is public in the package whose ``__init__.py`` re-exports it. What ``import dist_layerlr``
gives stands under that, and not again. The test suite compares the page with the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dist_layerlr

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
TOP = "dist_layerlr"
PACKAGES = (
    *("plan", "sharders", "optim", "proof", "weights", "checkpoint", "export", "offload"),
    *("integrations", "report", "exchange", "audit"),
)
HEAD = """\
# API

Written by `python docs/api.py` from signatures and docstrings. A name belongs to the package that
is named in its heading: `from dist_layerlr.optim import check_scheduler`. What starts with an
underscore, and every module below a package, may change without notice. How the names are used
together stands in [own_trainer.md](own_trainer.md).
"""
SECTIONS = re.compile(r"^(Args|Returns|Yields|Raises):$")
ITEM = re.compile(r"^(\*{0,2}\w[\w.]*): (.*)$")


def page() -> str:
    """The whole page."""
    text = HEAD
    shown: set[tuple[str, int]] = set()
    for title, found in packages().items():
        # A package may hand on what the top level has: one description is enough.
        fresh = {n: v for n, v in found.items() if not (callable(v) and (n, id(v)) in shown)}
        shown |= {(name, id(value)) for name, value in fresh.items()}
        if not fresh:
            continue
        about = _prose(_parts(importlib.import_module(title))[0][1])
        text += f"\n## {title}\n\n{about}\n"
        for name, value in sorted(fresh.items(), key=lambda pair: pair[0].lower()):
            text += f"\n### {title}.{name}\n\n{described(title, name, value)}"
    return text


def packages() -> dict[str, dict[str, Any]]:
    """{package: {public name: what it is}}."""
    found = {TOP: {name: getattr(dist_layerlr, name) for name in dist_layerlr.__all__}}
    for package in PACKAGES:
        module = importlib.import_module(f"{TOP}.{package}")
        found[module.__name__] = {name: getattr(module, name) for name in public(module)}
    return found


def public(module: ModuleType) -> list[str]:
    """What a package re-exports: the names after ``as`` and before ``=`` in its ``__init__.py``."""
    tree = ast.parse(inspect.getsource(module))
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    found = {alias.asname for node in imports for alias in node.names if alias.asname}
    # A second name for what was imported is public too.
    renamed = (node.targets for node in tree.body if isinstance(node, ast.Assign))
    found |= {_id(target) for targets in renamed for target in targets}
    return sorted(name for name in found if not name.startswith("_"))


def described(package: str, name: str, value: Any) -> str:
    """Signature and docstring of one name as Markdown."""
    if inspect.isclass(value):
        return _class(name, value)
    # A cached function is an object of its own around the function.
    if inspect.isfunction(inspect.unwrap(value)):
        return f"```text\n{signature(name, value)}\n```\n\n{_docstring(value)}"
    kind, text = _constant(package, name)
    return f"```text\n{name} = {kind}\n```\n" + (f"\n{_prose(text)}\n" if text else "")


def _class(name: str, value: type) -> str:
    if issubclass(value, BaseException):
        parents = ", ".join(base.__name__ for base in value.__bases__)
        return f"```text\nclass {name}({parents})\n```\n\n{_docstring(value)}"
    text = f"```text\nclass {signature(name, value)}\n```\n\n{_docstring(value)}"
    members = [row for row in _members(value) if row]
    return text + ("\n" + "\n".join(members) + "\n" if members else "")


def _members(cls: type) -> Iterator[str]:
    """One line for each public method and property of a class itself."""
    for name, member in vars(cls).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not inspect.getdoc(member):
            continue
        first = _prose(_parts(plain)[0][1].split("\n\n")[0])
        if isinstance(member, property):
            yield f"- `{name}`: {first}"
        elif inspect.isfunction(plain):
            yield f"- `{signature(name, plain)}`: {first}"


def signature(name: str, value: Any) -> str:
    """Name, parameters and result, annotations as they are written."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return name
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    texts, kinds = [], [p.kind for p in parameters]
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and not {
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        } & set(kinds[:place]):
            texts.append("*")
        texts.append(_parameter(parameter))
    result = "" if inspect.isclass(value) else _annotation(found.return_annotation)
    short = f"{name}({', '.join(texts)})" + (f" -> {result}" if result else "")
    if len(short) <= 100 or not texts:
        return short
    lines = "".join(f"    {text},\n" for text in texts)
    return f"{name}(\n{lines})" + (f" -> {result}" if result else "")


def _parameter(parameter: inspect.Parameter) -> str:
    stars = ""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
    annotation = _annotation(parameter.annotation)
    text = f"{stars}{parameter.name}" + (f": {annotation}" if annotation else "")
    if parameter.default is parameter.empty:
        return text
    value = parameter.default
    # Addresses and private classes would differ from run to run, or say nothing.
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return f"{text} = {value!r}" if plain else f"{text} = ..."


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _constant(package: str, name: str) -> tuple[str, str]:
    """(value as it is written, the text under it) of a constant or an alias of a type."""
    module = importlib.import_module(package)
    tree = ast.parse(inspect.getsource(module))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    (origin,) = {n.module for n in imports if name in {a.name for a in n.names}}
    assert origin is not None
    body = ast.parse(inspect.getsource(importlib.import_module(origin))).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in map(_id, targets):
            assert node.value is not None
            said = following.value if isinstance(following, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) else ""
            return ast.unparse(node.value), text if isinstance(text, str) else ""
    # Assigned beside others on one line: its value says it all.
    return repr(getattr(module, name)), ""


def _id(target: ast.AST | None) -> str:
    return target.id if isinstance(target, ast.Name) else ""


def _docstring(value: Any) -> str:
    text = ""
    for title, body in _parts(value):
        if not title:
            text += f"{_prose(body)}\n"
        elif items := _items(body):
            text += f"\n{title}:\n\n" + "".join(f"- `{n}`: {_prose(t)}\n" for n, t in items)
        else:
            text += f"\n{title}: {_prose(body)}\n"
    return text


def _parts(value: Any) -> list[tuple[str, str]]:
    """(heading, text) of a docstring of Google's form; the first has no heading."""
    own = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    # A dataclass without a docstring gets its signature as one.
    name = getattr(value, "__name__", "")
    if own is None or (is_dataclass(value) and own.startswith(f"{name}(")):
        return [("", "")]
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(own).splitlines():
        heading = SECTIONS.match(line)
        if heading:
            parts.append((heading[1], []))
        else:
            parts[-1][1].append(line)
    return [(title, inspect.cleandoc("\n".join(lines))) for title, lines in parts]


def _items(text: str) -> list[tuple[str, str]]:
    """(name, meaning) of each argument or exception; empty where the text is a sentence."""
    items: list[tuple[str, str]] = []
    for line in text.splitlines():
        found = ITEM.match(line)
        if found:
            items.append((found[1], found[2]))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}".strip())
        else:
            return []
    return items


def _prose(text: str) -> str:
    """A docstring's text as Markdown: code in single backticks, no HTML, paragraphs kept."""
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        pieces = re.split(r"(`+[^`]+`+)", " ".join(paragraph.split()))
        for place, piece in enumerate(pieces):
            if piece.startswith("`"):
                pieces[place] = f"`{piece.strip('`')}`"
            else:
                pieces[place] = piece.replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")
        paragraphs.append("".join(pieces))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
