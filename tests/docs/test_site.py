"""The site: pages that link to each other and to the repository, built and looked at."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import pages
from helpers.pages import ROOT
from website import built, layout

import mergekit_monosoup

PLACES = layout.files()
REPOSITORY = "https://github.com/mergekit-monosoup/mergekit-monosoup"


@pytest.mark.parametrize(
    ("source", "target", "on_site"),
    [
        ("README.md", "docs/guide.md#svc", "guide.md#svc"),
        ("README.md", "LICENSE", f"{REPOSITORY}/blob/main/LICENSE"),
        ("docs/guide.md", "../README.md#which-mode-first", "index.md#which-mode-first"),
        ("docs/guide.md", "../configs/lora.yml", f"{REPOSITORY}/blob/main/configs/lora.yml"),
        ("docs/guide.md", "../configs", f"{REPOSITORY}/tree/main/configs"),
        ("docs/guide.md", "inspect.png", "inspect.png"),
        ("docs/guide.md", "#svc", "#svc"),
        ("docs/guide.md", "https://arxiv.org/abs/2602.05536", "https://arxiv.org/abs/2602.05536"),
        ("docs/api/index.md", "../guide.md#in-python", "../guide.md#in-python"),
        ("docs/api/index.md", "../../CONTRIBUTING.md", "../contributing.md"),
    ],
)
def test_links_lead_to_where_things_are_on_the_site(source, target, on_site):
    assert layout.link(target, Path(source), PLACES) == on_site


def test_code_is_left_alone_and_links_in_brackets_are_not():
    page = "`[a](LICENSE)` [`b`](docs/guide.md)\n\n  ```text\n  [c](LICENSE)\n  ```\n"
    expected = page.replace("docs/guide.md", "guide.md")
    assert layout.with_links(page, Path("README.md"), PLACES) == expected


def test_a_dead_link_stops_the_build():
    with pytest.raises(layout.DeadLinkError, match=r"README\.md: docs/none\.md"):
        layout.link("docs/none.md", Path("README.md"), PLACES)


def test_every_page_is_on_the_site():
    log = ROOT / "dev" / "log.md"  # of what did not work: for developers, in the repository
    placed = {ROOT / source for source in PLACES if source.suffix == ".md"}
    assert placed == set(pages.everything()) - {log}


def test_the_navigation_names_pages_that_exist():
    """Zensical, strict or not, makes a dead link of a line that names no page."""
    nav = yaml.safe_load((ROOT / "docs/website/nav.yml").read_text("utf-8"))["nav"]
    named = {entry for entry in leaves(nav) if "://" not in entry}
    assert len(named) > 8
    assert named <= {place.as_posix() for place in PLACES.values()} | {"api"}


def test_every_public_name_is_on_the_page_of_python():
    described = re.findall(r"^::: mergekit_monosoup\.(\w+)$", pages.text("docs/api/index.md"), re.M)
    assert sorted(described) == sorted(set(mergekit_monosoup.__all__) - {"__version__"})


def leaves(entries: list) -> list[str]:
    """The pages that a navigation names; patterns are left out."""
    found: list[str] = []
    for entry in entries:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        if isinstance(value, list):
            found += leaves(value)
        elif isinstance(entry, str) or "glob" not in entry:
            found.append(value)
    return found


def test_faults_of_built_pages_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#here"></a><a href="#top"></a><a href="https://x.org"></a>'
        '<a href="c.html"></a><a href="b.html#gone"></a><script src="https://x.org/y.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><link rel="stylesheet" href="s.css">')
    (tmp_path / "s.css").write_text("@font-face { src: url(https://x.org/f.woff) }")
    assert built.faults(tmp_path) == [
        "a.html: loads https://x.org/y.js",
        "a.html: c.html leads to no file",
        "a.html: b.html#gone leads to no heading",
        "s.css: loads url(https://x.org/f.woff",
    ]


def test_equations_need_no_script():
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    from website import equations

    assert "<mfrac>" in equations.fence(r"\frac{1}{2}")
    for block in pages.blocks("math"):
        assert equations.fence(block.text).startswith('<div class="equation"><math ')
    with pytest.raises(ValueError, match="does not know all of this"):
        equations.fence(r"\nonesuch{1}")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="needs the extra docs")
def test_the_site_is_built_without_a_complaint():
    done = subprocess.run(
        [sys.executable, "-m", "website"], cwd=ROOT / "docs", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (layout.SITE / "api" / "index.html").read_text("utf-8")
    assert 'id="mergekit_monosoup.edit"' in api and ":class:" not in api
    assert "<math" in (layout.SITE / "methods.html").read_text("utf-8")
