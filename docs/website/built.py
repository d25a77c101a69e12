"""Looks at the built pages: every link leads somewhere, and nothing comes from a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# A browser loads these without being asked.
LOADED = {"src", "srcset", "data", "poster"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect"}


class Page(HTMLParser):
    """What one page links to, loads, and can be linked to."""

    def __init__(self, path: Path) -> None:
        """Read a page."""
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag says."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.loaded += [value for name, value in values.items() if name in LOADED]
        if "href" in values:
            loads = tag == "link" and LOADED_LINKS & set(values.get("rel", "").split())
            (self.loaded if loads else self.links).append(values["href"])


def faults(site: Path) -> list[str]:
    """Return what is wrong with the pages of a site, a line each."""
    read = cache(Page)
    found = [
        f"{path.relative_to(site)}: {fault}"
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"  # its links start at the root of the server
        for fault in _of_page(read(path), path, read)
    ]
    for sheet in sorted(site.rglob("*.css")):
        outside = re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^\"')]+", sheet.read_text())
        found += [f"{sheet.relative_to(site)}: loads {address}" for address in outside]
    return found


def _of_page(page: Page, path: Path, read: Callable[[Path], Page]) -> Iterator[str]:
    for address in page.loaded:
        if urlsplit(address).netloc:
            yield f"loads {address}"
    for address in dict.fromkeys(page.links + page.loaded):
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        anchor = unquote(parts.fragment)
        if not target.exists():
            yield f"{address} leads to no file"
        elif anchor and target.suffix == ".html" and anchor not in read(target).anchors:
            yield f"{address} leads to no heading"
