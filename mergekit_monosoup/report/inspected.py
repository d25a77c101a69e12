"""The table and the sentences that `inspect` prints, made from its records alone.

The records may come from a file as well (`report FILE`), so nothing here imports torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_monosoup.checkpoints.names import natural
from mergekit_monosoup.checkpoints.places import Place, arrange
from mergekit_monosoup.report.labels import name_cells, shorten
from mergekit_monosoup.report.record import REALISED_WARNING, Record, by_depth, rank_share, rel_edit
from mergekit_monosoup.report.table import descending
from mergekit_monosoup.terminal import plain

if TYPE_CHECKING:
    from rich.table import Table

# λ_high and λ_low this close are one factor for most purposes: the parts are orthogonal, so the
# result is within 0.05·‖ΔW‖ of ΔW scaled by their mean.
FLAT = 0.1
# With λ_low this small the tail is gone and the head stays: what the paper calls preserving the
# principal subspace.
DROPPED = 0.1
# Where λ_high differs by more than that among the matrices of one type, their mean describes none
# of them. Trained models stayed below 0.12 (five fine-tunes of small models, both modes).
UNLIKE = 0.3
# Columns of text from which on the table shows P_k too; 80 hold all the rest.
WIDE = 100
FLAGS_ROOM = 18  # columns that the flags keep beside long names; more of them wrap
# Of a sentence: types that it names, and characters of each.
MOST_TYPES, TYPE_LIMIT = 12, 60

EVERYTHING = "all matrices"

Modes = Sequence[str | None]
Rows = dict[tuple[str, str], list[Record]]  # by (layer, tensor) or ("", type)


def flag(record: Record) -> str:
    """Return why MonoSoup would not change a matrix, or not in bfloat16; empty for all others."""
    if record.lambda_high is None:
        return "no update" if record.delta_norm == 0 else "tiny update"
    if record.k == record.rank:
        return "k = rank"
    return "rounds away" if _rounds_away(record.realised) else ""


def cosine_lines(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each two fine-tunes: mean and range of their cosine over the matrices."""
    cosines: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        for pair, value in (record.cosine or {}).items():
            if value is not None:
                cosines[pair][record.name] = value  # the records of both modes carry the same
    for pair, by_name in cosines.items():
        values = list(by_name.values())
        yield (
            f"cosine of the updates, {pair}: mean {sum(values) / len(values):.3f} over "
            f"{len(values)} matrices, from {min(values):.3f} to {max(values):.3f}"
        )


def _rounds_away(share: float | None) -> bool:
    return share is not None and share < REALISED_WARNING


def _mean(records: Iterable[Record], value: Callable[[Record], float | None]) -> float | None:
    """Return the mean of a value over the records that have it; None if none has."""
    values = [number for record in records if (number := value(record)) is not None]
    return sum(values) / len(values) if values else None


def _mean_high(records: Iterable[Record]) -> float | None:
    return _mean(records, lambda record: record.lambda_high)


def _mean_low(records: Iterable[Record]) -> float | None:
    return _mean(records, lambda record: record.lambda_low)


def _mean_realised(records: Iterable[Record]) -> float | None:
    return _mean(records, lambda record: record.realised)


# As those of a merge's report.
_KEYS: dict[str, Callable[[Sequence[Record]], float | None]] = {
    "update": lambda records: _mean(records, lambda record: record.rel_update),
    "edit": lambda records: _mean(records, rel_edit),
    "rank": lambda records: _mean(records, rank_share),
    "realised": _mean_realised,
    "params": lambda records: sum(math.prod(record.shape) for record in records),
    "seconds": lambda records: sum(record.seconds for record in records),
}


# -- table -----------------------------------------------------------------------------------------


def table(
    records: Sequence[Record],
    width: int = 100,
    *,
    every_layer: bool = False,
    sort: str | None = None,
) -> Table:
    """Return a table of projection types, means over layers, for ``width`` columns of text.

    With ``every_layer`` it has a row for each matrix. Rows are in the order of depth, or one of
    :data:`report.SORTS`.
    """
    records = by_depth(records)
    modes = list(dict.fromkeys(record.mode for record in records))
    wide = width >= WIDE
    places = arrange(record.name for record in records)
    rows = _sorted(_rows(records, places, every_layer), sort)
    firsts, numbers, flags = [], [], []
    for (layer_number, _), members in rows.items():
        of_first_mode = [record for record in members if record.mode == modes[0]]
        firsts.append(layer_number if every_layer else str(len(of_first_mode)))
        numbers.append(_number_cells(members, of_first_mode, modes, wide))
        flags.append(_flags_cell(members, modes))
    headers = _headers(modes, wide)
    columns = [list(column) for column in zip(*numbers, strict=True)]
    room = min(max(map(len, [*flags, "flags"])), FLAGS_ROOM)
    kinds = [places[members[0].name].kind for members in rows.values()]
    titled = [[header, *column] for header, column in zip(headers, columns, strict=True)]
    others = [["layer" if every_layer else "n", *firsts], *titled, [" " * room]]
    names = name_cells(kinds, others, width)
    table = _empty_table(headers, every_layer)
    table.caption = _caption(records, every_layer)
    for row in zip(firsts, names, *columns, flags, strict=True):
        table.add_row(*row)
    return table


def _number_cells(
    members: Sequence[Record], of_first_mode: Sequence[Record], modes: Modes, wide: bool
) -> list[str]:
    return [
        _number(_mean(of_first_mode, lambda record: record.rel_update), ".1e"),
        _number(_mean(of_first_mode, rank_share)),
        *_mode_cells(members, modes, wide),
        _realised_cell(members, modes),
    ]


def _rows(records: Iterable[Record], places: Mapping[str, Place], every_layer: bool) -> Rows:
    """Return the records of each row by (layer, tensor), or by ("", projection type)."""
    rows: Rows = defaultdict(list)
    for record in records:
        place = places[record.name]
        number = ".".join(map(str, place.layer))
        key = (number, record.name) if every_layer else ("", place.kind)
        rows[key].append(record)
    return rows


def _sorted(rows: Rows, sort: str | None) -> Rows:
    """Return rows, which are in the order of depth, in another."""
    if sort is None:
        return rows
    if sort == "name":
        return dict(sorted(rows.items(), key=lambda row: natural(row[0][1])))
    return dict(sorted(rows.items(), key=lambda row: descending(_KEYS[sort](row[1]))))


def _headers(modes: Modes, wide: bool) -> list[str]:
    """Return the headers of the columns of numbers."""
    headers = ["‖ΔW‖\n/‖W0‖", "e.rank\n/rank"]
    for mode in modes:
        label = {"freevariance": "free", "variance": "var"}.get(str(mode), str(mode))
        headers += [f"P_k\n{label}"] * wide + [f"λ {label}\nhigh/low"]
    labels = "/".join("free" if mode == "freevariance" else "var" for mode in modes)
    return [*headers, f"in bf16\n{labels}"]


def _empty_table(headers: Sequence[str], every_layer: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.title = "Spectrum of the update and what MonoSoup makes of it" + (
        "" if every_layer else ": means over layers"
    )
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("layer" if every_layer else "n", justify="right", no_wrap=True)
    table.add_column("type")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("flags")
    return table


def _caption(records: Iterable[Record], every_layer: bool) -> str:
    threshold = next((record.R for record in records if record.R is not None), None)
    variance = "" if threshold is None else f"; var: variance, R = {threshold:g}"
    counted = "" if every_layer else "; n: matrices"
    return (
        f"e.rank: effective rank; free: freevariance{variance}{counted}\n"
        "in bf16: predicted share of the edit that survives rounding to bfloat16"
    )


def _mode_cells(records: Sequence[Record], modes: Modes, wide: bool) -> Iterator[str]:
    """Yield for each mode λ_high/λ_low, with P_k before it in a wide table."""
    for mode in modes:
        of_mode = [record for record in records if record.mode == mode]
        high, low = _mean_high(of_mode), _mean_low(of_mode)
        if wide:
            yield _number(_mean(of_mode, lambda record: record.P_k), ".3f")
        yield "" if high is None else f"{_share(high)}/{_share(low)}"


def _realised_cell(records: Sequence[Record], modes: Modes) -> str:
    shares = [_mean_realised(r for r in records if r.mode == mode) for mode in modes]
    return "/".join(map(_share, shares)) if any(share is not None for share in shares) else ""


def _flags_cell(records: Sequence[Record], modes: Modes) -> str:
    """Return flags such as ``rounds away (free 3)``.

    The mode is named where only one has the flag, the count where not all matrices have it.
    """
    flagged: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if word := flag(record):
            flagged[word].append(record)
    texts = []
    for word, members in flagged.items():
        flagged_modes = {record.mode for record in members}
        notes = []
        if len(flagged_modes) < len(modes):
            notes.append("free" if "freevariance" in flagged_modes else "var")
        names = {record.name for record in members}
        if len(names) < len({record.name for record in records}):
            notes.append(str(len(names)))
        texts.append(f"{word} ({' '.join(notes)})" if notes else word)
    texts += _unlike_flags(records, modes)
    return ", ".join(texts)


def _unlike_flags(records: Sequence[Record], modes: Modes) -> Iterator[str]:
    """Yield ``λ var .10–.95`` for each mode in which the mean describes none of the matrices."""
    for mode in modes:
        of_mode = [record for record in records if record.mode == mode]
        if _unlike(of_mode):
            low, high = _extremes(of_mode)
            label = "free" if mode == "freevariance" else "var"
            yield f"λ {label} {_share(low.lambda_high)}–{_share(high.lambda_high)}"


def _extremes(records: Sequence[Record]) -> tuple[Record, Record]:
    """Return the records with the smallest and the largest λ_high, of those that have one."""
    split = [record for record in records if record.lambda_high is not None]
    ordered = sorted(split, key=lambda record: record.lambda_high or 0.0)
    return ordered[0], ordered[-1]


def _unlike(records: Sequence[Record]) -> bool:
    """Whether matrices differ so much in λ_high that a mean is misleading."""
    values = [record.lambda_high for record in records if record.lambda_high is not None]
    return bool(values) and max(values) - min(values) > UNLIKE


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _share(value: float | None) -> str:
    """Return ``.95``: a column of shares is narrower without its zeros."""
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


# -- reading ---------------------------------------------------------------------------------------


def reading(records: Sequence[Record], *, partial: bool = False) -> list[str]:
    """Return a few sentences per mode, from means over the matrices of a projection type.

    ``partial``: the models hold others, too, so that these are not all matrices.
    """
    sentences = []
    for mode in dict.fromkeys(record.mode for record in records):
        of_mode = by_depth(record for record in records if record.mode == mode)
        threshold = of_mode[0].R
        label = str(mode) + (f", R = {threshold:g}" if threshold is not None else "")
        places = arrange(record.name for record in of_mode)
        types: dict[str, list[Record]] = defaultdict(list)
        for record in of_mode:
            types[places[record.name].kind].append(record)
        for verdict, kinds in _by_verdict(types).items():
            place = family_names(kinds, list(types))
            if partial and place == EVERYTHING:
                place = "all matrices that the models share"
            members = [record for kind in kinds for record in types[kind]]
            sentences.append(f"{label}: {_sentence(verdict, place, members)}")
    return sentences


def _by_verdict(types: dict[str, list[Record]]) -> dict[str, list[str]]:
    """Return the projection types of each verdict, in the order in which verdicts appear."""
    verdicts: dict[str, list[str]] = defaultdict(list)
    for kind, members in types.items():
        verdicts[_verdict(members)].append(kind)
        if _rounds_away(_mean_realised(members)):
            verdicts["rounds away"].append(kind)
    return verdicts


def _verdict(records: Sequence[Record]) -> str:
    high, low = _mean_high(records), _mean_low(records)
    if high is None or low is None:
        return "no update"
    if all(record.k == record.rank for record in records if record.rank is not None):
        return "nothing below the cut"
    if _unlike(records):
        return "unlike"
    if abs(high - low) <= FLAT:
        return "flat"
    if low > high:
        return "tail first"
    return "head only" if low <= DROPPED else "split"


def _sentence(verdict: str, place: str, records: Sequence[Record]) -> str:
    high, low = _mean_high(records) or 0.0, _mean_low(records) or 0.0
    if verdict == "unlike":
        least, most = _extremes(records)
        return (
            f"the matrices of {place} differ: the share of the head is from "
            f"{least.lambda_high:.2f} in {plain(least.name)} to {most.lambda_high:.2f} in "
            f"{plain(most.name)}; --layers shows each."
        )
    return {
        "no update": f"no update in {place}: nothing to edit there.",
        "nothing below the cut": f"the cut is at the rank in {place}: MonoSoup leaves it as "
        "fine-tuned.",
        "flat": f"the update is nearly flat in {place}, MonoSoup ≈ uniform scaling by "
        f"{(high + low) / 2:.2f} there.",
        "tail first": f"in {place} the tail weighs more than the head (λ_low {low:.2f} > "
        f"λ_high {high:.2f}): a flat spectrum with a low cut; look at R.",
        "head only": f"in {place} MonoSoup keeps the head ({high:.2f}) and drops the tail "
        f"({low:.2f}), an edit of {_mean(records, rel_edit) or 0.0:.0%} of the update in "
        "bfloat16.",
        "split": f"in {place} MonoSoup scales the head by {high:.2f} and the tail by {low:.2f}.",
        "rounds away": f"rounding to bfloat16 eats the edit in {place}, "
        f"{_mean_realised(records) or 0.0:.0%} survives: merge with `dtype: float32` and "
        "`out_dtype: float32`.",
    }[verdict]


def family_names(kinds: Sequence[str], all_kinds: Sequence[str]) -> str:
    """Return ``mlp.*`` for all of the types that begin so, ``all matrices`` for all there are."""
    if len(kinds) == len(all_kinds) > 1:
        return EVERYTHING
    names = []
    for kind in kinds:
        family = kind.split(".")[0] + "."
        relatives = [other for other in all_kinds if other.startswith(family)]
        whole = len(relatives) > 1 and set(relatives) <= set(kinds)
        names.append(f"{family}*" if whole else kind)
    names = shorten(list(dict.fromkeys(names)), TYPE_LIMIT)
    if len(names) > MOST_TYPES:
        names[MOST_TYPES - 1 :] = [f"{len(names) - MOST_TYPES + 1} more types"]
    return ", ".join(names)
