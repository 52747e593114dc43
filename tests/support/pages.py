"""The blocks of README and of the documentation, as the tests that run them take them.

``test_blocks.py`` finds every call of ``block`` and ``blocks`` in the tests: what no test takes,
and no table excuses, fails there. So both are called with words that stand in the call itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "ds_configs/README.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```$", re.M | re.S)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """A page's text; the page by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = read(page)
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            text=found["text"],
        )
        for found in FENCE.finditer(text)
    ]


def blocks(page: str, language: str) -> list[str]:
    """All blocks of a page in a language."""
    return [block.text for block in fenced(page) if block.language == language]


def block(page: str, language: str, holds: str) -> str:
    """The one block of a page in a language that holds a piece of text."""
    (found,) = (text for text in blocks(page, language) if holds in text)
    return found


def lines(text: str) -> list[str]:
    """The command lines of a block, those that end in a backslash joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
