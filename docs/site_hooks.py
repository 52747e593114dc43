"""What mkdocs does beside reading docs/: pictures of benchmarks/results belong to the pages too.

The pages link them by their paths in the repository, where its own viewer shows them; a site ends
at its root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OUTSIDE, INSIDE = "../benchmarks/results/", "benchmarks/results/"
FOLDER = Path(__file__).resolve().parent.parent / INSIDE


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to what is copied."""
    from mkdocs.structure.files import File  # type: ignore[import-not-found, unused-ignore]

    for path in sorted(FOLDER.glob("*.png")):
        files.append(File.generated(config, INSIDE + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link them where they are copied to."""
    return markdown.replace(f"]({OUTSIDE}", f"]({INSIDE}")
