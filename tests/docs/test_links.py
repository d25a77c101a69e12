"""Links of all Markdown files lead to files and headings that exist, in the repository as it is.

The pages of the site are checked when it is built: test_site.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import pages
from helpers.pages import ROOT

FILES = pages.everything()
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", flags=re.M | re.S)
# Inline links and images; links through a definition (`[text][name]`) are not in use.
LINK = re.compile(r"\]\(([^)\s]+)\)")
DEFINITION = re.compile(r"^ *\[[^\]]+\]: ", flags=re.M)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(path: Path) -> list[str]:
    """The targets of a page's links, but for those that lead out of the repository."""
    targets = LINK.findall(CODE.sub("`code`", path.read_text("utf-8")))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def dead(path: Path) -> list[str]:
    """The links of a page that lead to no file, out of the repository, or to no heading."""
    found = []
    for link in links(path):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        lost = not target.exists() or not target.is_relative_to(ROOT)
        if lost or (anchor and anchor not in pages.anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_lead_somewhere(path):
    assert dead(path) == []
    assert not DEFINITION.search(CODE.sub("", path.read_text("utf-8"))), "no test follows these"


def test_all_files_with_links_are_tested():
    """A Markdown file in a new folder has links, too."""
    # Environments and caches begin with a dot; the others are what programs write.
    no_part = re.compile(r"\.|build$|dist$|results$|.*-out$")
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not no_part.match(path.name)]
    every = {*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))}
    assert every == set(FILES)
    assert sum(len(links(path)) for path in FILES) > 50


def test_the_rules_of_links_have_teeth(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n## One `two`\n\n[a](page.md#one-two) [b](#title) [c](https://x.org) `[d](e)`\n"
        "[f](none.md) ![g](none.png) [`h`](#nothing) [i](/etc/passwd)\n"
    )
    assert dead(page) == ["none.md", "none.png", "#nothing", "/etc/passwd"]


def test_every_page_can_be_reached_from_the_readme():
    readme = pages.text("README.md")
    assert all(f"(docs/{path.name}" in readme for path in (ROOT / "docs").glob("*.md"))


def test_other_files_name_pages_that_exist():
    """Comments and configurations, too, send people to docs/."""
    files = [
        path
        for folder in ("mergekit_monosoup", "evaluation", "demo", "configs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yml")
    ]
    for path in [*files, ROOT / "pyproject.toml"]:
        for page in re.findall(r"\b(?:docs|dev)/[\w-]+\.md", path.read_text("utf-8")):
            assert (ROOT / page).exists(), f"{name(path)}: {page}"
