"""The numbers of a page: for each report rows in the order of depth, and their spectra.

A page has one row for each matrix and mode. Where that would be more than a browser draws with
ease, matrices are put together: first the experts of a layer, then the layers of a projection.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from mergekit_monosoup.checkpoints.places import Place, arrange
from mergekit_monosoup.report import Record, by_depth, card, inspected, rank_share
from mergekit_monosoup.report.labels import shorten
from mergekit_monosoup.report.record import rel_edit
from mergekit_monosoup.terminal import plain, shortened

# Matrices of a page. Measured on two cores: 1500 inspected ones open in a second and a half.
MOST_MATRICES = 1500
# Singular values of a page, over all its matrices, that the slider for R works on: 16 bytes each.
MOST_VALUES = 2**24
NAME_LIMIT = 300  # characters of a name, and of any other text of a record
LABEL_LIMIT = 24  # characters of what stands at an axis
TITLE_LIMIT = 60  # characters of the name of a file

Numbers = float | int | None
Rows = list[dict[str, Any]]

_TEXTS = ("name", "shape", "dtype", "action", "reason", "mode", "solver")
_CURVES = ("spectrum", "leading", "cosine")
NUMBERS = tuple(f.name for f in fields(Record) if f.name not in (*_TEXTS, *_CURVES))
DERIVED: dict[str, Callable[[Record], float | None]] = {
    "k_share": lambda record: record.k / record.rank if record.k and record.rank else None,
    "rank_share": rank_share,
    "rel_edit": rel_edit,
}


@dataclass(frozen=True)
class Level:
    """A way to put matrices together.

    Attributes:
        key: what those of one row have in common, beside the mode.
        note: what the page says of it, with their number in the place of {}; empty for none.
    """

    key: Callable[[Record, Place], tuple[Any, ...]]
    note: str


LEVELS = (
    Level(lambda record, place: (record.name,), ""),
    Level(
        lambda record, place: place,
        "{} matrices are too many for a page: those of one layer and projection (experts) are put "
        "together. Rows hold their means; seconds are sums, spectra medians.",
    ),
    Level(
        lambda record, place: (place.kind,),
        "{} matrices are too many for a page: all those of one projection are put together. Rows "
        "hold their means; seconds are sums, spectra medians.",
    ),
)


def collect(files: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return what a page shows of each report, ready for JSON.

    Args:
        files: records by the label of their file, not empty.

    Returns:
        For each: ``label``; ``inspection``; ``modes``; ``lines``, sentences; ``note``, empty unless
        matrices were put together or left out; ``columns`` and ``rows``; ``spectra``, for the
        slider and the drawing of singular values.
    """
    ordered = {label: by_depth(records) for label, records in files.items()}
    places = {label: arrange(r.name for r in records) for label, records in ordered.items()}
    level = _level(ordered, places)
    every = [place for of_file in places.values() for place in of_file.values()]
    kinds = _labels([place.kind for place in every], LABEL_LIMIT)
    axis = _labels([_at(place) for place in every], LABEL_LIMIT)
    titles = _labels(list(files), TITLE_LIMIT)
    room = max(MOST_MATRICES // len(files), 1)
    collected = []
    for label, records in ordered.items():
        part = _Part(places[label], kinds, axis, level)
        collected.append({"label": titles[label], **_file(records, part, room)})
    values = sum(curve["rank"] for file in collected for curve in file["spectra"])
    for file in collected:
        file["slider"] = bool(file["spectra"]) and values <= MOST_VALUES
    return collected


@dataclass(frozen=True)
class _Part:
    """Where the matrices of a file stand, how that is written, and how they are put together."""

    places: Mapping[str, Place]
    kinds: Mapping[str, str]
    axis: Mapping[str, str]
    level: int

    @property
    def by_layer(self) -> bool:
        return self.level < len(LEVELS) - 1

    def key(self, record: Record) -> tuple[Any, ...]:
        return LEVELS[self.level].key(record, self.places[record.name])

    def place(self, record: Record) -> dict[str, str]:
        """Return what a row says of the place of its matrices."""
        place = self.places[record.name]
        at = self.axis[_at(place)] if self.by_layer or not place.layer else "all layers"
        return {"at": at, "kind": self.kinds[place.kind]}


def _labels(texts: Sequence[str], limit: int) -> dict[str, str]:
    """Return a short and harmless label for each text; two texts never get the same one."""
    shown = [plain(text) or "(unnamed)" for text in texts]
    return dict(zip(texts, shorten(shown, limit), strict=True))


def _at(place: Place) -> str:
    """Return what stands at the axis of depth: the number of a layer, or what is outside of all."""
    number = ".".join(map(str, place.layer))
    return f"{place.tower} {number}".strip() if place.layer else place.kind


def _level(ordered: Mapping[str, Sequence[Record]], places: Mapping[str, dict[str, Place]]) -> int:
    """Return the first level at which a page has few enough matrices, else the last one."""
    for number, level in enumerate(LEVELS):
        counts = (
            len({level.key(record, places[label][record.name]) for record in records})
            for label, records in ordered.items()
        )
        if sum(counts) <= MOST_MATRICES:
            return number
    return len(LEVELS) - 1


def _file(records: Sequence[Record], part: _Part, room: int) -> dict[str, Any]:
    groups: dict[tuple[Any, ...], dict[str | None, list[Record]]] = defaultdict(dict)
    for record in records:
        groups[part.key(record)].setdefault(record.mode, []).append(record)
    shown = list(groups.values()) if part.by_layer else list(groups.values())[:room]
    names = len({record.name for record in records})
    note = LEVELS[part.level].note.format(names)
    if len(shown) < len(groups):
        note += f" {len(groups) - len(shown)} of {len(groups)} projections are not shown."
    rows, spectra = _rows_of(shown, part)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    is_inspection = all(record.action == "inspected" for record in records)
    return {
        "inspection": is_inspection,
        "modes": list(dict.fromkeys(r.mode for r in records if r.mode is not None)),
        "matrices": names,
        "lines": _lines(records) if is_inspection else card.sentences(records),
        "note": note,
        "columns": columns,
        "rows": [[row.get(key) for key in columns] for row in rows],
        "spectra": spectra,
    }


def _lines(records: Sequence[Record]) -> list[str]:
    return [plain(x) for x in [*inspected.reading(records), *inspected.cosine_lines(records)]]


def _rows_of(
    groups: Iterable[Mapping[str | None, Sequence[Record]]], part: _Part
) -> tuple[Rows, list[dict[str, Any]]]:
    """Return the rows of each group, one per mode, and the spectrum that they share."""
    rows: Rows = []
    spectra: list[dict[str, Any]] = []
    for by_mode in groups:
        first = next(iter(by_mode.values()))
        curve = _spectrum(first)
        for members in by_mode.values():
            row = part.place(members[0]) | _row(members)
            if curve:
                row["spectrum"] = len(spectra)
            rows.append(row)
        spectra += [curve] if curve else []
    return rows, spectra


def _row(records: Sequence[Record]) -> dict[str, Any]:
    """Return the row of some matrices: means of numbers, sums of seconds, and what texts share."""
    row: dict[str, Any] = {"members": len(records), "name": common([r.name for r in records])}
    for key in _TEXTS[1:]:
        row[key] = _shared([_text(getattr(record, key)) for record in records])
    for key in NUMBERS:
        row[key] = mean([getattr(record, key) for record in records])
    for key, derive in DERIVED.items():
        row[key] = mean([derive(record) for record in records])
    row["seconds"] = mean([sum(record.seconds for record in records)])
    return row


def mean(values: Iterable[Numbers]) -> Numbers:
    """Return the mean of the finite numbers that are there, one alone as it is; None without any.

    A quotient of two numbers of a report may be infinite, for which JSON has no word.
    """
    present = [value for value in values if value is not None and math.isfinite(value)]
    if len(present) < 2:
        return present[0] if present else None
    largest = max(map(abs, present)) or 1.0  # a sum of numbers near the largest would be infinite
    return fmean(value / largest for value in present) * largest


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value[:8])) + "×…" * (len(value) > 8)
    return "" if value is None else plain(shortened(str(value), NAME_LIMIT))


def _shared(texts: Sequence[str]) -> str:
    """Return the text that all have, or the first two of those that they have."""
    different = list(dict.fromkeys(texts))
    if len(different) == 1:
        return different[0]
    more = f", and {len(different) - 2} more" if len(different) > 2 else ""
    return ", ".join(text or "none" for text in different[:2]) + more


def common(names: Sequence[str]) -> str:
    """Return one name for several, with a star for numbers that differ."""
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return _text(names[0]) or "(unnamed)"
    parts = [re.split(r"(\d+)", name) for name in names]
    if len(set(map(len, parts))) > 1:
        return f"{_text(names[0])} and {len(names) - 1} more"
    columns = [set(column) for column in zip(*parts, strict=True)]
    return _text("".join(c.pop() if len(c) == 1 else "*" for c in columns))


def _spectrum(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the singular values that are stored of some matrices: the medians of their curves.

    They are taken as those of a matrix with the mean rank.
    """
    stored = [record for record in records if record.spectrum and record.rank]
    if not stored:
        return None
    curves = [record.spectrum for record in stored if record.spectrum]
    heads = [record.leading for record in stored if record.leading]
    rank = round(fmean(record.rank for record in stored if record.rank))
    head = _medians(heads)[:rank] if len(heads) == len(stored) else []
    return {"rank": rank, "spectrum": _medians(curves), "leading": head}


def _medians(curves: Sequence[Sequence[float]]) -> list[float]:
    shortest = min(map(len, curves))
    return [median(values) for values in zip(*(c[:shortest] for c in curves), strict=True)]
