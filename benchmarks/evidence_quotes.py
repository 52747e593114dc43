"""Writes what was measured where the library and its pages quote it, between two markers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence_report import NAMES, NOT_MEASURED, Analysis, evidence
from evidence_studies import write_whole

ROOT = Path(__file__).resolve().parents[1]
MODULE = Path("dist_layerlr/report/evidence.py")
PAGE = Path("docs/names.md")
MARKS = {
    MODULE: ("    # Measured: written by benchmarks/does_it_help.py --report.\n", "    # End.\n"),
    PAGE: ("<!-- evidence -->\n", "<!-- end evidence -->\n"),
}
LINE, WIDTH = 100, 84
"""Of a line of the module, and of a string in it: its indent and quotes need room, too."""


def quote(analyses: Sequence[Analysis]) -> None:
    """Write the quotes."""
    for file, text in quotes(analyses).items():
        write_whole(ROOT / file, text)


def quotes(analyses: Sequence[Analysis]) -> dict[Path, str]:
    """{file: what it holds with the quotes}."""
    lines = evidence(analyses)
    return {MODULE: quoted(MODULE, _entries(lines)), PAGE: quoted(PAGE, _bullets(lines))}


def quoted(file: Path, text: str) -> str:
    """A file with new text between its markers."""
    start, end = MARKS[file]
    whole = (ROOT / file).read_text(encoding="utf-8")
    before, _, rest = whole.partition(start)
    _, found, after = rest.partition(end)
    assert found, f"{file} lacks its markers"
    return f"{before}{start}{text}{end}{after}"


def _entries(lines: Mapping[str, str]) -> str:
    """Entries of the module's table, as the formatter leaves them."""
    found = []
    for name, line in lines.items():
        if line == NOT_MEASURED:
            continue
        alone = f'    "{name}": "{line}",\n'
        # The formatter takes the brackets from what fits into a line, its end included.
        if len(alone) <= LINE + 1:
            found.append(alone)
            continue
        pieces = textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        strings = [f'        "{piece} "\n' for piece in pieces[:-1]] + [f'        "{pieces[-1]}"\n']
        found.append(f'    "{name}": (\n{"".join(strings)}    ),\n')
    return "".join(found)


def _bullets(lines: Mapping[str, str]) -> str:
    """A list for the page of names, wrapped as pages are."""
    found = []
    for name, line in lines.items():
        bullet = f"- `{name}` ({NAMES[name]}): {line}."
        wrapped = textwrap.wrap(bullet, 120, subsequent_indent="  ", break_on_hyphens=False)
        found.append("\n".join(wrapped) + "\n")
    return "".join(found)
