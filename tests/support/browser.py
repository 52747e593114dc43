"""A page in a real browser: what a script in it finds, and whether anything overlaps or is cut."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((found for n in ("chromium", "google-chrome") if (found := shutil.which(n))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed here")

LOOK = """
const told = [], near = 1;
const texts = [...document.querySelectorAll(
  "svg text, h1, h2, h3, p, td, th, .legend span, .scale span, label span, figure img")]
  .filter((e) => (e.textContent.trim() || e.tagName === "IMG") && e.getClientRects().length)
  .map((e) => [e, e.getBoundingClientRect(), (e.textContent || e.alt).slice(0, 40)]);
const wide = document.documentElement.scrollWidth;
if (wide > innerWidth) told.push(`the page is ${wide} wide, the window ${innerWidth}`);
for (const [e, r, name] of texts) {
  if (r.left < -near || r.right > innerWidth + near) told.push(`${name} leaves the window`);
  if (!e.ownerSVGElement && e.scrollWidth > e.clientWidth + near && e.clientWidth)
    told.push(`${name} is cut`);
  const frame = e.ownerSVGElement && e.ownerSVGElement.getBoundingClientRect();
  if (frame && (r.left < frame.left - near || r.right > frame.right + near
      || r.top < frame.top - near || r.bottom > frame.bottom + near))
    told.push(`${name} leaves its drawing`);
  const cell = e.style.pointerEvents === "none" && e.previousElementSibling.getBoundingClientRect();
  if (cell && r.width > cell.width) told.push(`${name} is wider than its cell`);
}
texts.sort((a, b) => a[1].top - b[1].top);
texts.forEach(([e, r, name], i) => {
  for (let j = i + 1; j < texts.length && texts[j][1].top < r.bottom - near; j++) {
    const [f, s, other] = texts[j];
    if (!e.contains(f) && !f.contains(e) && s.left < r.right - near && r.left < s.right - near
        && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 2 * near)
      told.push(`${name} overlaps ${other}`);
  }
});
found.problems = told;
found.texts = texts.length;
"""
"""Fills ``found.problems``."""


def look(page: Path, script: str = LOOK, *, width: int = 1200) -> dict[str, Any]:
    """Open a page, run a script at its end, and return what it put into ``found``."""
    assert BROWSER is not None
    ending = f"""<script>{{ const found = {{ drawn: document.body.dataset.drawn }};
        window.onerror = (text) => {{ found.error = text; }};
        try {{ {script} }} catch (error) {{ found.error = String(error); }}
        document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(found)); }}
        </script></body>"""
    copy = page.with_name(f"looked_at_{page.name}")
    copy.write_text(page.read_text().replace("</body>", ending))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [BROWSER, *flags, profile, "--dump-dom", copy.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    from urllib.parse import unquote

    (text,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    found: dict[str, Any] = json.loads(unquote(text))
    assert found["drawn"] == "yes" and "error" not in found, found
    return found
