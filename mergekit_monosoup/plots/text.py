"""Text of figures: names from files, so that matplotlib draws them as they are and they fit.

Everything in a figure that came from a file goes through here: matplotlib reads `$` as mathematics,
leaves labels with a leading underscore out of legends, and warns of what its font cannot draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from mergekit_monosoup.report.labels import shorten
from mergekit_monosoup.terminal import plain


def figure_text(text: str, limit: int) -> str:
    """Return one text as a label, at most ``limit`` characters of it."""
    return figure_labels([text], limit)[0]


def figure_labels(names: Sequence[str], limit: int) -> list[str]:
    """Return labels of at most ``limit`` characters; names that differ keep labels that differ."""
    return [_literal(label) for label in shorten([_drawable(name) for name in names], limit)]


def _drawable(text: str) -> str:
    """Return text with `\\u4e2d` for each character that the font lacks; never nothing."""
    glyphs = _glyphs()
    return "".join(
        c if ord(c) in glyphs else c.encode("unicode_escape").decode("ascii")
        for c in plain(text) or "(unnamed)"
    )


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _literal(label: str) -> str:
    """Return a label in which nothing is mathematics, and that a legend does not leave out."""
    escaped = label.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped
