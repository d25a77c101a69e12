"""Names as people read them: short enough for a table or a figure, and still told apart."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mergekit_monosoup.terminal import plain

if TYPE_CHECKING:
    from rich.text import Text

ELLIPSIS = "…"
EDGE, BETWEEN = 2, 2  # columns that a table of rich with a SIMPLE_HEAD needs for itself
NARROWEST = 12  # columns of a terminal that names keep, and the numbers beside them are cut then

Measure = Callable[[str], int]


def name_cells(names: Sequence[str], others: Iterable[Sequence[str]], width: int) -> list[Text]:
    """Return the cells of a table's column of names: as wide as the numbers beside it leave.

    Args:
        names: from files, as they are.
        others: the texts of each other column of the table, its header among them.
        width: of the terminal, in columns.
    """
    from rich.cells import cell_len
    from rich.text import Text

    lines = ([cell_len(line) for text in other for line in text.split("\n")] for other in others)
    taken = EDGE + sum(max(lengths, default=0) + BETWEEN for lengths in lines)
    room = max(width - taken, NARROWEST)
    labels = shorten([plain(name) for name in names], room, cell_len)
    return [Text(label, no_wrap=True) for label in labels]


def shorten(names: Sequence[str], limit: int, measure: Measure = len) -> list[str]:
    """Return a label for each name: its own up to ``limit``, else without its middle.

    Two names never get one label: where they differ in the middle only, another part is left out,
    and in the end a number tells them apart.

    Args:
        names: made harmless first (:func:`terminal.plain`); the same name gets the same label.
        limit: of the width of a label, 8 at least.
        measure: the width of a text; the number of its characters by default.
    """
    limit = max(limit, 8)
    chosen = {name: name for name in dict.fromkeys(names) if measure(name) <= limit}
    long = [name for name in dict.fromkeys(names) if name not in chosen]
    cuts: list[Callable[[str, int, Measure], str]] = [_ending]
    cuts += [partial(_cut, head=head) for head in _heads(limit)]
    for cut in cuts:
        labels = {name: cut(name, limit, measure) for name in long}
        counts = Counter([*chosen.values(), *labels.values()])
        chosen |= {
            name: label
            for name, label in labels.items()
            if counts[label] == 1 and measure(label) <= limit
        }
        long = [name for name in long if name not in chosen]
    chosen |= _numbered(long, set(chosen.values()), limit, measure)
    return [chosen[name] for name in names]


def _heads(limit: int) -> list[int]:
    """Return how much of the beginning to keep, the best first.

    The end of a tensor's name says more than its beginning.
    """
    third = (limit - 1) // 3
    return sorted(range(limit), key=lambda head: abs(head - third))


def _ending(name: str, limit: int, measure: Measure) -> str:
    """Return the longest whole parts at the end that fit, if they fill most of the room."""
    for at in re.finditer(r"[./]", name[-limit:]):
        ending = ELLIPSIS + name[-limit:][at.end() :]
        if measure(ending) <= limit:
            return ending if 3 * measure(ending) > 2 * limit else name
    return name


def _cut(name: str, limit: int, measure: Measure, *, head: int) -> str:
    """Return ``head`` of the beginning and as much of the end of a name as fits."""
    first = _fitting(name[:head], head, measure)
    last = _fitting(name[: -limit - 1 : -1], limit - 1 - measure(first), measure)[::-1]
    return f"{first}{ELLIPSIS}{last}"


def _fitting(text: str, limit: int, measure: Measure) -> str:
    """Return the longest beginning of a text that is at most ``limit`` wide."""
    widths = itertools.accumulate(map(measure, text))
    return text[: sum(width <= limit for width in widths)]


def _numbered(
    names: Sequence[str], taken: set[str], limit: int, measure: Measure
) -> dict[str, str]:
    """Return labels that end with a number, ``…/model~2``."""
    labels: dict[str, str] = {}
    numbers = itertools.count(1)
    for name in names:
        while True:
            suffix = f"~{next(numbers)}"
            room = limit - len(suffix)
            label = _cut(name, room, measure, head=(room - 1) // 3) + suffix
            if label not in taken:
                break
        labels[name] = label
    return labels
