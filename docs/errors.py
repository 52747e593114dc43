"""Write docs/troubleshooting.md: the error texts of the code's raises, by where they come from.

    python docs/errors.py

A text is read from its ``raise``; what is filled in when it is raised stands in angle brackets. The
test suite compares the page with the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dist_layerlr.ranks import CAUSES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
PLACES = {
    "dist_layerlr/plan": "Configs and plans",
    "dist_layerlr/sharders": "Wrapped models",
    "dist_layerlr/optim": "Optimizers and schedules",
    "dist_layerlr/proof": "Proofs",
    "dist_layerlr/weights": "Files of weights",
    "dist_layerlr/checkpoint": "Checkpoints",
    "dist_layerlr/export": "Exports",
    "dist_layerlr/offload": "Streaming",
    "dist_layerlr/integrations": "Other trainers",
    "dist_layerlr/exchange": "Other projects' settings",
    "dist_layerlr/audit": "Audits",
    "dist_layerlr/report": "Pictures, pages and advice",
    "dist_layerlr/cli": "Commands",
    "dist_layerlr": "Anywhere",
    "launch": "The trainer",
}
"""Folder: how its errors are headed. The first that holds a file has it."""
HEAD = """\
# Troubleshooting

Every error of the library and the trainer is one line that says which field or parameter, its
value, what is allowed, and what to do next. This page lists those whose text stands where they are
raised, so that a line that you met can be searched: by its first words, since what is filled in
stands in angle brackets here. It is written by `python docs/errors.py` from the code itself.

Most errors of a config have one form: `Invalid <field>=<value>: must be <what is allowed>.`, or
`Unknown key <key> in <block>. Did you mean <key>?`; the fields are those of [config.md](config.md)
and [names.md](names.md). A program ends with status 2 before it trains; `dist-layerlr doctor` says
what works on this machine.

## A plan that the live optimizer does not follow

`verify` raises `PlanMismatch` on every rank alike. It names the first parameters, the rank, and the
likely cause:

| What differs | Likely cause, and what to do |
|---|---|
"""


def page() -> str:
    """The whole page."""
    text = HEAD + "".join(f"| {kind} | {_cell(cause)} |\n" for kind, cause in CAUSES.items())
    found: dict[str, list[tuple[str, str]]] = {title: [] for title in PLACES.values()}
    for folder in ("dist_layerlr", "launch"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            place = file.relative_to(ROOT).as_posix()
            title = next(t for p, t in PLACES.items() if place.startswith(f"{p}/"))
            found[title] += raised(ast.parse(file.read_text(encoding="utf-8")))
    for title, rows in found.items():
        if rows:
            text += f"\n## {title}\n\n| Message | Error |\n|---|---|\n"
            text += "".join(f"| {_cell(m)} | `{kind}` |\n" for m, kind in sorted(set(rows)))
    return text


def raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(text, class) of every raise that gives its text where it stands."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        kind = node.exc.func
        if isinstance(kind, ast.Name) and kind.id[0].isupper() and node.exc.args:
            text = _text(node.exc.args[0])
            # Short ones are for programmers: an assertion in words.
            if text is not None and len(text) > 20:
                yield text, kind.id


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            parts.append(f"<{_name(part.value)}>")
    return "".join(parts)


def _name(node: ast.AST) -> str:
    """A word for what is filled in: the last name in its expression."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower()
    if isinstance(node, ast.Attribute):
        return _name(node.value) if node.attr == "__name__" else node.attr.strip("_").lower()
    if isinstance(node, ast.Call):
        return _name(node.args[0] if node.args else node.func)
    if isinstance(node, ast.Subscript | ast.Starred):
        return _name(node.value)
    return "..."


def _cell(text: str) -> str:
    """Text in a table of Markdown: what looks like HTML or a column is not."""
    flat = " ".join(text.split())
    for sign, written in (("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*"), ("_", "\\_")):
        flat = flat.replace(sign, written)
    return flat


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
