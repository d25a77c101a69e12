"""Lays the pages of the repository out as Zensical reads them: one folder, which links to itself.

On GitHub a page links to any file. The site has pages and pictures only, so that links to other
files (a configuration, a folder, the licence) are made to lead to the repository.
"""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Both are named in zensical.toml, too.
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"

# Files outside of docs/, and what they are on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/website/nav.yml": ".nav.yml",
    "docs/website/site.css": "site.css",
    "docs/website/search-from-a-folder.js": "iframe-worker.js",
}
# Of docs/; other files (the numbers behind a figure) are read in the repository.
KINDS = (".md", ".png", ".svg")

# Code, in which nothing is a link, or the target of a link.
CODE_OR_LINK = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`|(?<=\]\()[^)\s]+(?=\))", flags=re.M | re.S)


class DeadLinkError(Exception):
    """A page links to a file that is not there."""


def lay_out() -> None:
    """Write all pages and pictures to :data:`PAGES`; what was there before is gone."""
    shutil.rmtree(PAGES, ignore_errors=True)
    places = files()
    for source, place in places.items():
        (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = (ROOT / source).read_text(encoding="utf-8")
            (PAGES / place).write_text(with_links(text, source, places), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / source, PAGES / place)


def files() -> dict[Path, Path]:
    """Return where each file of the site lies in the repository, and where on the site."""
    places = {Path(source): Path(place) for source, place in ELSEWHERE.items()}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in KINDS:
            places[path.relative_to(ROOT)] = path.relative_to(ROOT / "docs")
    return places


def with_links(text: str, source: Path, places: dict[Path, Path]) -> str:
    """Return a page whose links lead to where things are on the site.

    Raises:
        DeadLinkError: a link leads nowhere.
    """

    def replaced(match: re.Match[str]) -> str:
        return match[0] if match[0].lstrip()[0] == "`" else link(match[0], source, places)

    return CODE_OR_LINK.sub(replaced, text)


def link(target: str, source: Path, places: dict[Path, Path]) -> str:
    """Return the target of a link of the page ``source`` as it must be on the site."""
    place, mark, anchor = target.partition("#")
    if not place or re.match(r"[a-z]+:", place):
        return target
    path = Path(os.path.normpath(source.parent / place))
    if not (ROOT / path).exists():
        raise DeadLinkError(f"{source}: {target} leads to no file of the repository")
    if path in places:
        return os.path.relpath(places[path], places[source].parent) + mark + anchor
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository()}/{kind}/main/{path.as_posix()}{mark}{anchor}"


@cache
def repository() -> str:
    """Return the address of the repository."""
    (address,) = re.findall(r'^Source = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    return str(address)
