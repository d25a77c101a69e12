"""A page for reports, of merges and inspections: `mergekit-monosoup report --html`.

One file that holds everything, and loads nothing. Whatever a report contains is shown as text: the
page's policy lets no script run but the two that stand in it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.files import write_text
from mergekit_monosoup.pages import charts
from mergekit_monosoup.pages.quantities import present
from mergekit_monosoup.pages.rows import collect
from mergekit_monosoup.report import Record

if TYPE_CHECKING:
    from jinja2 import Template

SUFFIXES = (".html", ".htm")
MADE_BY = "mergekit-monosoup"
SCRIPTS = ("start.js", "spectrum.js", "text.js", "charts.js", "table.js", "page.js")
HEAD = 4096  # bytes of a page within which it says what made it


def check_path(path: Path) -> None:
    """Check that a page may be written to ``path``: a new file, or one that holds a page of ours.

    Raises:
        ValueError: it has another suffix, no folder, or is somebody's file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a page is a {' or '.join(SUFFIXES)} file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if f'name="generator" content="{MADE_BY}'.encode() not in file.read(HEAD):
                raise ValueError(
                    f"{path} exists and is not a page of {MADE_BY}; it would be replaced: name "
                    "another file, or move that one"
                )


def write(files: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write the page of some reports, whole or not at all; see :func:`render`."""
    check_path(path)
    write_text(path, render(files))


def render(files: Mapping[str, Sequence[Record]]) -> str:
    """Return the page of some reports, as HTML.

    Args:
        files: records by the label of their file; none of them empty.

    Raises:
        MissingAltairError: the extra `html` is not installed; gives the command that installs it.
    """
    specifications, vega = charts.specifications(), charts.program()
    from markupsafe import Markup

    from mergekit_monosoup import __version__

    ours = "\n".join(map(_source, SCRIPTS))
    collected = collect(files)
    data: dict[str, Any] = {
        "files": collected,
        "specifications": specifications,
        **present(collected),
    }
    kind = "Inspection" if all(file["inspection"] for file in collected) else "Merge"
    return _template().render(
        title=f"{kind}: {', '.join(file['label'] for file in collected)}",
        files=collected,
        data=data,
        policy=_policy([vega, ours]),
        generator=f"{MADE_BY} {__version__}",
        # No part of a report is in these.
        style=Markup(_source("page.css")),
        vega=Markup(vega),
        program=Markup(ours),
    )


def _template() -> Template:
    """Return the template of a page; whatever is put into it is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_source("page.html.jinja"))


def _source(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text("utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: nothing from elsewhere, and no script but these."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()) for script in scripts)
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
