"""The pages are one site: each is reached from docs/index.md, and what is generated is fresh."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from tests.support.pages import PAGES, ROOT, fenced, read

LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
SITE = [page for page in PAGES if page.startswith("docs/")]


def prose(page: str) -> str:
    """A page's text without its blocks, in which brackets are code."""
    text = read(page)
    for block in fenced(page):
        text = text.replace(block.text, "\n")
    return text


def links(page: str) -> list[tuple[str, str]]:
    """(path in the repository, anchor) of every relative link of a page."""
    found = []
    for link in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            found.append((target.resolve().relative_to(ROOT).as_posix(), anchor))
    return found


def anchors(page: str) -> set[str]:
    """Those that a page's headings have on GitHub and in mkdocs alike."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        # GitHub writes one dash for each space, mkdocs one for several.
        if plain.replace(" ", "-") == re.sub(r"[\s-]+", "-", plain):
            found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_resolves(page: str) -> None:
    for target, anchor in links(page):
        assert (ROOT / target).exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(target), f"{page}: {target}#{anchor}"


def test_every_page_is_reached_from_the_index_at_once_and_the_index_from_readme() -> None:
    assert ("docs/index.md", "") in links("README.md")
    reached = {target for target, _ in links("docs/index.md")}
    assert {*SITE, *reached} - {"docs/index.md"} == reached


def test_the_sites_navigation_is_the_indexs_order() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    order: dict[str, list[str]] = {}
    for line in read("docs/index.md").splitlines():
        if part := re.match(r"\d\. (.*)", line):
            order[part[1]] = []
        elif page := re.match(r"    - \[.*?\]\((\w+\.md)\)", line):
            [*order.values()][-1].append(page[1])
    index, *parts = site["nav"]
    assert index == "index.md"
    assert {title: pages for part in parts for title, pages in part.items()} == order
    assert [title for part in parts for title in part] == [*order]


def test_pages_name_each_other_by_links() -> None:
    generated = ("docs/api.md", "docs/evidence.md")  # from docstrings, and by a benchmark
    for page in PAGES:
        outside = re.sub(r"<!-- (?!end).*?<!-- end.*?-->", "", prose(page), flags=re.DOTALL)
        named = re.findall(r"`docs/\w+\.md`", outside)
        assert page in generated or named == [], f"{page}: {named}"


@pytest.mark.parametrize("name", ["api", "cli"])
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    written = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))["page"]()
    assert read(f"docs/{name}.md") == written, f"run `python docs/{name}.py` and commit the page"


def test_the_reference_has_every_public_name_and_every_flag() -> None:
    import dist_layerlr
    from launch import train

    api, cli = read("docs/api.md"), read("docs/cli.md")
    assert [n for n in dist_layerlr.__all__ if f"### dist_layerlr.{n}\n" not in api] == []
    section = cli.partition("## launch/train.py\n")[2].partition("\n## ")[0]
    help_text = train.make_parser().format_help()
    flags = set(re.findall(r"^  (--[\w-]+)", help_text, re.MULTILINE))
    assert flags - set(re.findall(r"`(--[\w-]+)`", section)) == set()
    assert Path(ROOT / "docs" / "api.py").is_file() and "--resume" in flags


def test_names_without_a_docstring_are_not_public() -> None:
    api = read("docs/api.md")
    bare = re.findall(r"^### (\S+)\n\n```text\n(?:class |\w+\()[^`]*```\n\n\n", api, re.MULTILINE)
    assert bare == []
