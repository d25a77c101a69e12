"""The table of a report: means over the edited matrices of each layer group."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_monosoup.checkpoints.names import natural
from mergekit_monosoup.report.labels import name_cells
from mergekit_monosoup.report.record import LEFT_OUT, Record, rel_edit
from mergekit_monosoup.terminal import cell

if TYPE_CHECKING:
    from rich.table import Table


def layer_group(name: str) -> str:
    """Return the group of tensors that differ only in their numbers.

    For example ``model.layers.*.mlp.up_proj.weight``.
    """
    return re.sub(r"\d+", "*", name) or "(unnamed)"


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the edited matrices of a layer group.

    None where there are none. ``R_min`` and ``R_max``, ``gamma_min`` and ``gamma_max`` are the
    extremes of the group, not means; ``rel_edit`` is ‖W − W1‖/‖ΔW‖, ``rel_update`` ‖ΔW‖/‖W0‖, of
    the copied ones where none was edited.
    """

    group: str
    edited: int
    copied: int
    parameters: int
    R_min: float | None
    R_max: float | None
    rank_share: float | None
    P_k: float | None
    lambda_high: float | None
    lambda_low: float | None
    gamma_min: float | None
    gamma_median: float | None
    gamma_max: float | None
    amplified: float | None
    rel_update: float | None
    rel_edit: float | None
    realised: float | None
    seconds: float
    reasons: tuple[str, ...]


def summarise(records: Iterable[Record]) -> list[Row]:
    """Return a row per layer group in the order of appearance, then one of totals."""
    records = list(records)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[layer_group(record.name)].append(record)
    return [*(_row(group, members) for group, members in groups.items()), _row("total", records)]


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None if none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _realised(records: Iterable[Record]) -> float | None:
    return realised_share(
        (r.edit_norm, r.realised)
        for r in records
        if r.realised is not None and r.edit_norm is not None
    )


def realised_share(edits: Iterable[tuple[float, float]]) -> float | None:
    """Return the share of edits that survived rounding, weighted by their squared size.

    One tiny tensor that rounds away must not hide, or stand for, the model.

    Args:
        edits: (‖W − W1‖, share that survived) of each matrix.
    """
    edits = list(edits)
    largest = max((norm for norm, _ in edits), default=0.0) or 1.0  # squares may overflow
    weighted = [((norm / largest) ** 2, share) for norm, share in edits]
    total = sum(weight for weight, _ in weighted)
    if not total:
        return _mean(share for _, share in weighted)
    return sum(weight * share for weight, share in weighted) / total


def _row(group: str, records: Sequence[Record]) -> Row:
    merged = [r for r in records if r.action != LEFT_OUT]
    edited = [r for r in merged if r.action == "edited"]
    thresholds = [r.R for r in edited if r.R is not None]
    return Row(
        group=group,
        edited=len(edited),
        copied=len(merged) - len(edited),
        parameters=sum(math.prod(r.shape) for r in merged),
        R_min=min(thresholds, default=None),
        R_max=max(thresholds, default=None),
        rank_share=_mean(r.k / r.rank if r.k and r.rank else None for r in edited),
        P_k=_mean(r.P_k for r in edited),
        lambda_high=_mean(r.lambda_high for r in edited),
        lambda_low=_mean(r.lambda_low for r in edited),
        gamma_min=min((r.gamma_min for r in edited if r.gamma_min is not None), default=None),
        gamma_median=_mean(r.gamma_median for r in edited),
        gamma_max=max((r.gamma_max for r in edited if r.gamma_max is not None), default=None),
        amplified=_mean(r.amplified for r in edited),
        rel_update=_mean(r.rel_update for r in edited or merged),
        rel_edit=_mean(map(rel_edit, edited)),
        realised=_realised(edited),
        seconds=sum(r.seconds for r in records),
        reasons=tuple(dict.fromkeys(r.reason for r in records if r.reason)),
    )


# (header, value of a row, shown in a terminal of 80 columns too). λ_high is 1 − λ_low but for the
# rule `scalar`.
Columns = list[tuple[str, Callable[["Row"], str], bool]]
_FIRST: Columns = [
    ("edited", lambda row: f"{row.edited}/{row.edited + row.copied}", True),
    ("params", lambda row: f"{row.parameters:,}", False),
]
_SPLIT: Columns = [
    ("R", lambda row: _range(row.R_min, row.R_max), False),
    ("k/rank", lambda row: _number(row.rank_share), True),
    ("P_k", lambda row: _number(row.P_k), False),
    ("λ_high", lambda row: _number(row.lambda_high), False),
    ("λ_low", lambda row: _number(row.lambda_low), True),
]
_CALIBRATION: Columns = [
    ("γ min", lambda row: _number(row.gamma_min), False),
    ("γ median", lambda row: _number(row.gamma_median), True),
    ("γ max", lambda row: _number(row.gamma_max), False),
    ("γ > 1", lambda row: _number(row.amplified, ".2f"), True),
]
_LAST: Columns = [
    ("‖ΔW‖/‖W0‖", lambda row: _number(row.rel_update, ".1e"), True),
    ("edit/‖ΔW‖", lambda row: _number(row.rel_edit, ".2f"), False),
    ("realised", lambda row: _number(row.realised, ".2f"), True),
    ("seconds", lambda row: f"{row.seconds:.1f}", False),
]


WIDE = 140  # columns of a terminal that hold all of them beside the longest layer groups


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{low:g}" if low == high else f"{low:.2g}–{high:.2g}"


# What rows are sorted by, the largest first, and what has no value last; a name from A to Z.
_KEYS: dict[str, Callable[[Row], float | None]] = {
    "update": lambda row: row.rel_update,
    "edit": lambda row: row.rel_edit,
    "rank": lambda row: row.rank_share,
    "realised": lambda row: row.realised,
    "params": lambda row: row.parameters,
    "seconds": lambda row: row.seconds,
}
SORTS = ("name", *_KEYS)


def sort_rows(rows: Sequence[Row], sort: str | None) -> list[Row]:
    """Return rows in one of the orders :data:`SORTS`; the total stays at the end."""
    *groups, total = rows
    if sort == "name":
        groups.sort(key=lambda row: natural(row.group))
    elif sort is not None:
        groups.sort(key=lambda row: descending(_KEYS[sort](row)))
    return [*groups, total]


def descending(value: float | None) -> float:
    """Return a sort key by which the largest comes first, and nothing last."""
    return math.inf if value is None else -value


def table(records: Iterable[Record], width: int = 160, *, sort: str | None = None) -> Table:
    """Return the summary as a rich table for a terminal of ``width`` columns.

    In the order of the file, or one of :data:`SORTS`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = sort_rows(summarise(records), sort)
    calibrated = rows[-1].gamma_max is not None
    chosen = [*_FIRST, *(_CALIBRATION if calibrated else _SPLIT), *_LAST]
    columns = [(header, value) for header, value, narrow in chosen if narrow or width >= WIDE]
    title = f"{'SVC' if calibrated else 'MonoSoup'} by layer group: means over edited matrices"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    out.padding, out.pad_edge = (0, 1, 0, 0), False
    out.add_column("layer group")
    cells = [[header, *map(value, rows)] for header, value in columns]
    for header, _ in columns:
        out.add_column(header, justify="right", no_wrap=True)
    names = name_cells([_short(row.group) for row in rows], cells, width)
    for number, (name, *values) in enumerate(zip(names, *(c[1:] for c in cells), strict=True)):
        if number == len(rows) - 1:
            out.add_section()
        out.add_row(name, *values)
    remarks: dict[str, list[str]] = defaultdict(list)
    for row, name in zip(rows[:-1], names, strict=False):
        for reason in row.reasons:
            remarks[reason].append(name.plain)
    lines = [cell(f"{reason}: {', '.join(groups)}") for reason, groups in remarks.items()]
    out.caption = Text("\n").join(lines) if lines else None
    out.caption_justify = "left"
    return out


def _short(group: str) -> str:
    """Return what tells layer groups apart; `model.` and `.weight` are in nearly every name."""
    return group.removeprefix("model.").removesuffix(".weight")
