"""The panels of a figure: coefficients, updates, rounding, ranks, spectra and cosines.

Each is made of records in the order of depth, and the places of their matrices. Readable in grey
print and by colour-blind people: the palette is Okabe & Ito's, and whatever a colour says is also
said by a marker or a line style.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.checkpoints.places import Place
from mergekit_monosoup.plots import depth
from mergekit_monosoup.plots.text import figure_labels, figure_text
from mergekit_monosoup.report import Record, rank_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
MODE_MARKERS = {"freevariance": "o", "variance": "s"}

LABEL_LIMIT, WIDE_LABEL_LIMIT = 28, 25  # characters of an entry of a legend
COLUMN = 16  # entries in a column of a legend
MOST_ENTRIES = 3 * COLUMN  # of a legend; the rest is counted
WIDE_NAMES = 12  # with more upright names a panel is as wide as the figure

Places = Mapping[str, Place]


@dataclass(frozen=True)
class Panel:
    """What a panel shows, and how much room it needs.

    Attributes:
        title: what is drawn.
        entries: lines of its legend.
        wide: half of a figure cannot hold its legend, or its names.
        draw: draws it, without title and legend.
        axis: of depth, if it has one.
    """

    title: str
    entries: int
    wide: bool
    draw: Callable[[Axes], None]
    axis: depth.Axis | None = None


def coefficients(records: Sequence[Record], places: Places) -> Panel:
    """Return λ_high and λ_low of each matrix in the order of depth.

    Of the experts of a layer, which may be hundreds, the means.
    """
    grouped: dict[Place, list[Record]] = defaultdict(list)
    for record in records:
        grouped[places[record.name]].append(record)
    high = [mean(record.lambda_high or 0.0 for record in group) for group in grouped.values()]
    low = [mean(record.lambda_low or 0.0 for record in group) for group in grouped.values()]
    found = depth.groups(list(grouped))
    wide = _is_wide(2, found)
    axis = depth.lay_out(found, wide)
    threshold = records[0].R
    title = figure_text(str(records[0].mode), LABEL_LIMIT)
    title += f", R = {threshold:g}" if threshold is not None else ""
    title += ", means over experts" if len(grouped) < len({r.name for r in records}) else ""
    draw = partial(_draw_coefficients, axis=axis, high=high, low=low)
    return Panel(title, 2, wide, draw, axis)


def _draw_coefficients(
    axes: Axes, axis: depth.Axis, high: Sequence[float], low: Sequence[float]
) -> None:
    size = 4 if len(high) <= 60 else 2
    axes.fill_between(axis.places, high, low, color="0.88", linewidth=0, zorder=1)
    style: dict[str, Any] = {"markersize": size, "linewidth": 1, "zorder": 3}
    axes.plot(axis.places, high, color=COLOURS[0], marker="o", label=r"$\lambda_{high}$", **style)
    style |= {"linestyle": "--", "markerfacecolor": "white"}
    axes.plot(axis.places, low, color=COLOURS[1], marker="s", label=r"$\lambda_{low}$", **style)
    depth.draw_axis(axes, axis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("coefficient")


def ranks(records: Sequence[Record], places: Places) -> Panel:
    """Return effective rank / rank by depth."""
    how = ByType("Effective rank of the update", "effective rank / rank", rank_share)
    return by_type(records, places, how)


def updates(records: Sequence[Record], places: Places) -> Panel:
    """Return by depth how far fine-tuning moved the weights."""
    label = r"$\|\Delta W\|\,/\,\|W_0\|$"
    how = ByType("Relative update", label, lambda record: record.rel_update or None, "log")
    return by_type(records, places, how)


def survival(records: Sequence[Record], places: Places) -> Panel:
    """Return by depth the share of the edit that survives rounding, of records of one mode."""
    dtypes = figure_text(", ".join(dict.fromkeys(map(_rounded_to, records))), LABEL_LIMIT)
    title = f"After rounding to {dtypes}: {figure_text(str(records[0].mode), LABEL_LIMIT)}"
    how = ByType(title, "surviving share of the edit", lambda record: record.realised)
    return by_type(records, places, how)


def _rounded_to(record: Record) -> str:
    """Return the dtype that ``realised`` is about; an inspection predicts it for bfloat16."""
    return "bfloat16" if record.action == "inspected" else record.dtype


@dataclass(frozen=True)
class ByType:
    """What a panel of a line per type shows.

    Attributes:
        title, label: of the panel, and of its vertical axis.
        value: of a matrix; None where it has none, which draws nothing.
        scale: of the vertical axis; a linear one begins at 0 and shows 1.
    """

    title: str
    label: str
    value: Callable[[Record], float | None]
    scale: str = "linear"


def by_type(records: Sequence[Record], places: Places, how: ByType) -> Panel:
    """Return a value by depth, a line per type (mean over the experts of a layer)."""
    keys = list(dict.fromkeys(depth.key(places[record.name]) for record in records))
    found, number = depth.groups(keys), {key: i for i, key in enumerate(keys)}
    types: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        place, value = places[record.name], how.value(record)
        if value is not None:
            types[place.kind][number[depth.key(place)]].append(value)
    wide = _is_wide(len(types), found)
    axis = depth.lay_out(found, wide)
    lines = {
        label: ([axis.places[i] for i in by_place], list(map(mean, by_place.values())))
        for label, by_place in zip(_labels(list(types), wide), types.values(), strict=True)
    }
    draw = partial(_draw_by_type, axis=axis, lines=lines, how=how)
    return Panel(how.title, len(types), wide, draw, axis)


def _draw_by_type(
    axes: Axes, axis: depth.Axis, lines: Mapping[str, tuple[list[float], list[float]]], how: ByType
) -> None:
    for (label, (xs, ys)), style in zip(lines.items(), styles(), strict=False):
        axes.plot(xs, ys, label=label, markersize=4, linewidth=1, **style)
    depth.draw_axis(axes, axis, edges=False)
    if how.scale == "log":
        axes.set_yscale("log")
    else:
        highest = max((y for _, ys in lines.values() for y in ys), default=1.0)
        axes.set_ylim(0, 1.03 * max(highest, 1.0))
    axes.set_ylabel(how.label)


def spectra(records: Sequence[Record], places: Places) -> Panel:
    """Return σ/σ₁ against the place in the spectrum: medians over the matrices of a type.

    A marker stands at the median cut of each mode.
    """
    types: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.spectrum:
            types[places[record.name].kind].append(record)
    modes = sorted({str(r.mode) for members in types.values() for r in members})
    entries = len(types) + len(modes)
    wide = _is_wide(entries, [])
    labelled = dict(zip(_labels(list(types), wide), types.values(), strict=True))
    draw = partial(_draw_spectra, types=labelled, modes=modes)
    return Panel("Singular values (medians) and the cut", entries, wide, draw)


def _draw_spectra(axes: Axes, types: Mapping[str, list[Record]], modes: Sequence[str]) -> None:
    for (label, members), style in zip(types.items(), styles(), strict=False):
        xs, curve = _median_spectrum(members)
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        axes.plot(xs, curve, linewidth=1.2, label=label, **line)
        for mode in dict.fromkeys(str(record.mode) for record in members):
            cuts = [r.k / r.rank for r in members if str(r.mode) == mode and r.k and r.rank]
            if cuts:
                marker = _cut_marker(mode, style["color"])
                height = _interpolate(xs, curve, median(cuts))
                axes.plot([median(cuts)], [height], markeredgewidth=0.6, zorder=4, **marker)
    for mode, label in zip(modes, figure_labels(modes, LABEL_LIMIT - 5), strict=True):
        axes.plot([], [], label=f"k of {label}", **_cut_marker(mode, "0.6"))
    axes.set_yscale("log")
    axes.set_xlim(-0.01, 1.03)
    axes.set_xlabel("place in the spectrum, i / rank")
    axes.set_ylabel(r"$\sigma_i\,/\,\sigma_1$")


def _median_spectrum(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Return places in [0, 1] and the median of the spectra there."""
    curves = [
        record.spectrum for record in {r.name: r for r in records}.values() if record.spectrum
    ]
    shortest = min(map(len, curves))
    curve = [median(values) for values in zip(*(c[:shortest] for c in curves), strict=True)]
    places = [i / (len(curve) - 1) if len(curve) > 1 else 0.0 for i in range(len(curve))]
    return places, curve


def _interpolate(places: Sequence[float], curve: Sequence[float], at: float) -> float:
    """Return the height of a curve on the straight line that a logarithmic axis draws."""
    for (a, fa), (b, fb) in itertools.pairwise(zip(places, curve, strict=True)):
        if a <= at <= b and fa > 0 and fb > 0:
            return fa * (fb / fa) ** ((at - a) / (b - a))
    return curve[-1]


def _cut_marker(mode: str, colour: str) -> dict[str, Any]:
    return {
        "color": colour,
        "marker": MODE_MARKERS.get(mode, "D"),
        "markersize": 6,
        "markeredgecolor": "black",
        "linestyle": "none",
    }


def cosines(records: Sequence[Record]) -> Panel:
    """Return histograms over matrices of the cosine between the task vectors of two fine-tunes.

    One for each two of them (paper, Figure 1).
    """
    pairs: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for pair, value in (record.cosine or {}).items():
            if value is not None:
                pairs[pair].append(value)
    drawn = dict(itertools.islice(pairs.items(), MOST_ENTRIES // 2))
    wide = _is_wide(2 * len(drawn), [])
    draw = partial(
        _draw_cosines, values=dict(zip(_pair_labels(drawn), drawn.values(), strict=True))
    )
    title = "Alignment of fine-tunes, matrix by matrix"
    if len(drawn) < len(pairs):
        title += f": the first {len(drawn)} of {len(pairs)} pairs"
    return Panel(title, 2 * len(drawn), wide, draw)


def _pair_labels(pairs: Iterable[str]) -> list[str]:
    """Return ``a ~ b`` for each pair of paths."""
    names = [[Path(model).name or model for model in pair.split(" ~ ")] for pair in pairs]
    labels = iter(figure_labels(list(itertools.chain.from_iterable(names)), LABEL_LIMIT // 2 - 1))
    return [" ~ ".join(itertools.islice(labels, len(models))) for models in names]


def _draw_cosines(axes: Axes, values: Mapping[str, list[float]]) -> None:
    if not values:
        message = "no two task vectors move the same matrix"
        axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
        return
    all_values = list(itertools.chain.from_iterable(values.values()))
    low, high = min(*all_values, 0.0), max(*all_values, 0.1)
    bins = [low + (high - low) * i / 20 for i in range(21)]
    for (label, of_pair), style in zip(values.items(), styles(), strict=False):
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        text = f"{label}\n(mean {mean(of_pair):.2f})"
        axes.hist(of_pair, bins=bins, histtype="step", linewidth=1.4, label=text, **line)
        axes.axvline(mean(of_pair), color=style["color"], linestyle=":", linewidth=1)
    axes.set_xlabel("cosine of the task vectors")
    axes.set_ylabel("matrices")


# -- shared ----------------------------------------------------------------------------------------


def _is_wide(entries: int, found: Sequence[depth.Group]) -> bool:
    return entries > COLUMN or sum(group.upright for group in found) > WIDE_NAMES


def _labels(kinds: Sequence[str], wide: bool) -> list[str]:
    return figure_labels(kinds, WIDE_LABEL_LIMIT if wide else LABEL_LIMIT)


def styles() -> Iterator[dict[str, Any]]:
    """Yield colour, marker and line style, of which no two of the first seventy are alike.

    Each has a period of its own.
    """
    for number in itertools.count():
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes: over the lines it would hide some."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > MOST_ENTRIES:
        rest = len(handles) - MOST_ENTRIES + 1
        handles, labels = handles[: MOST_ENTRIES - 1], labels[: MOST_ENTRIES - 1]
        handles += axes.plot([], [], linestyle="none")
        labels.append(f"… and {rest} more")
    lines = sum(label.count("\n") + 1 for label in labels)
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        borderaxespad=0,
        ncols=-(-lines // COLUMN) or 1,
    )
