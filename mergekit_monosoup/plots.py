"""Figures from records alone: `mergekit-monosoup plot`.

Readable in grey print and by colour-blind people: the palette is Okabe & Ito's, and whatever a colour says is also said by
a marker or a line style.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.checkpoints.names import layer, projection
from mergekit_monosoup.report import Record, by_depth, rank_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe & Ito (2008), without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
MODE_MARKERS = {"freevariance": "o", "variance": "s"}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mergekit-monosoup",
    "pdf.fonttype": 42,
}

Panel = Callable[["Axes"], None]


class MissingMatplotlibError(ImportError):
    pass


def check_suffix(path: Path) -> None:
    """Raises ValueError: said before a figure is drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a figure is a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def draw(files: Mapping[str, Sequence[Record]], *, mode: str | None = None) -> Figure:
    """One figure with all that the records of each file hold: λ_high and λ_low by depth (a panel per mode; the paper's
    Figure 12), effective rank by depth and type, and where they were asked for spectra with the cut and cosines.

    Args:
        files: records by the label of their file.
        mode: draw only this one.

    Raises:
        ValueError: nothing to draw; names the file.
        MissingMatplotlibError: with the command that installs it.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlibError(
            f"figures need matplotlib ({error}): pip install 'mergekit-monosoup[plots]'"
        ) from error
    panels: list[Panel] = []
    for label, records in files.items():
        panels += _panels(f"{label}: " if len(files) > 1 else "", label, by_depth(records), mode)
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2 * columns, 3.3 * rows), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, columns)
        for number, panel in enumerate(panels):
            last_alone = number == len(panels) - 1 and number % columns == 0
            panel(
                figure.add_subplot(
                    grid[number // columns, :]
                    if last_alone
                    else grid[number // columns, number % columns]
                )
            )
    return figure


def save(figure: Figure, path: Path) -> None:
    """PNG, SVG or PDF by suffix, the same bytes for the same records."""
    from matplotlib import rc_context

    check_suffix(path)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context(STYLE):
        figure.savefig(path, metadata=dates.get(path.suffix.lower()), facecolor="white")


def _panels(prefix: str, label: str, records: Sequence[Record], mode: str | None) -> list[Panel]:
    split = [r for r in records if r.lambda_high is not None and mode in (None, r.mode)]
    if not split:
        modes = sorted({r.mode for r in records if r.mode})
        found = (
            f"it has those of {', '.join(modes)}"
            if modes
            else "none of its matrices has λ_high and λ_low"
        )
        raise ValueError(
            f"{label}: no coefficients to draw{f' for mode {mode}' if mode else ''}; {found}"
        )
    panels: list[Panel] = []
    for one in dict.fromkeys(r.mode for r in split):
        panels.append(
            partial(coefficients, records=[r for r in split if r.mode == one], prefix=prefix)
        )
    first = list(
        {r.name: r for r in split}.values()
    )  # what does not depend on the mode is drawn once
    panels.append(partial(ranks, records=first, prefix=prefix))
    if any(r.spectrum for r in split):
        panels.append(partial(spectra, records=split, prefix=prefix))
    if any(r.cosine for r in first):
        panels.append(partial(cosines, records=first, prefix=prefix))
    return panels


# -- panels ----------------------------------------------------------------------------------------------------------------


def coefficients(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """λ_high and λ_low of each matrix in the order of depth; layers are told apart by bands."""
    high, low = [r.lambda_high or 0.0 for r in records], [r.lambda_low or 0.0 for r in records]
    groups = [
        (label, len(list(members)))
        for label, members in itertools.groupby(_place(r) for r in records)
    ]
    places, centres, edges = _spread(groups)
    size = 4 if len(records) <= 60 else 2
    axes.fill_between(places, high, low, color="0.88", linewidth=0, zorder=1)
    axes.plot(
        places,
        high,
        color=COLOURS[0],
        marker="o",
        markersize=size,
        linewidth=1,
        label=r"$\lambda_{high}$",
        zorder=3,
    )
    axes.plot(
        places,
        low,
        color=COLOURS[1],
        marker="s",
        markersize=size,
        linewidth=1,
        linestyle="--",
        markerfacecolor="white",
        label=r"$\lambda_{low}$",
        zorder=3,
    )
    for edge in edges:
        axes.axvline(edge, color="0.8", linewidth=0.6, zorder=0)
    _label_depth(axes, centres, [label for label, _ in groups])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("coefficient")
    R = records[0].R
    axes.set_title(f"{prefix}{records[0].mode}" + (f", R = {R:g}" if R is not None else ""))
    _legend_beside(axes)


def ranks(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Effective rank / rank by depth, a line per projection type (mean over the experts of a layer)."""
    places = list(dict.fromkeys(map(_place, records)))
    types: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        share = rank_share(record)
        if share is not None:
            types[projection(record.name)][places.index(_place(record))].append(share)
    for (kind, by_place), style in zip(types.items(), _styles(), strict=False):
        axes.plot(
            list(by_place),
            [mean(shares) for shares in by_place.values()],
            label=kind,
            markersize=4,
            linewidth=1,
            **style,
        )
    _label_depth(axes, range(len(places)), places)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("effective rank / rank")
    axes.set_title(f"{prefix}Effective rank of the update")
    _legend_beside(axes)


def spectra(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Median σ/σ₁ over the matrices of a type against the place in the spectrum; a marker at the median cut of each mode."""
    types: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.spectrum:
            types[projection(record.name)].append(record)
    shown = set()
    for (kind, members), style in zip(types.items(), _styles(), strict=False):
        curves = [
            record.spectrum for record in {r.name: r for r in members}.values() if record.spectrum
        ]
        shortest = min(map(len, curves))
        curve = [median(values) for values in zip(*(c[:shortest] for c in curves), strict=True)]
        where = [i / (len(curve) - 1) if len(curve) > 1 else 0.0 for i in range(len(curve))]
        axes.plot(
            where,
            curve,
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=1.2,
            label=kind,
        )
        for mode in dict.fromkeys(r.mode for r in members):
            cut = median(r.k / r.rank for r in members if r.mode == mode and r.k and r.rank)
            height = _interpolate(where, curve, cut)
            axes.plot(
                [cut],
                [height],
                color=style["color"],
                marker=MODE_MARKERS.get(str(mode), "D"),
                markersize=6,
                markeredgecolor="black",
                markeredgewidth=0.6,
                linestyle="none",
                zorder=4,
            )
            shown.add(mode)
    for mode in sorted(map(str, shown)):
        axes.plot(
            [],
            [],
            color="0.6",
            marker=MODE_MARKERS.get(mode, "D"),
            markeredgecolor="black",
            linestyle="none",
            markersize=6,
            label=f"k of {mode}",
        )
    axes.set_yscale("log")
    axes.set_xlim(-0.01, 1.03)
    axes.set_xlabel("place in the spectrum, i / rank")
    axes.set_ylabel(r"$\sigma_i\,/\,\sigma_1$")
    axes.set_title(f"{prefix}Singular values (medians) and the cut")
    _legend_beside(axes)


def cosines(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Histogram over matrices of the cosine between the task vectors of each two fine-tunes (paper, Figure 1)."""
    pairs: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for pair, value in (record.cosine or {}).items():
            if value is not None:
                pairs[pair].append(value)
    values = [value for found in pairs.values() for value in found]
    if not values:
        axes.text(
            0.5,
            0.5,
            "no two task vectors move the same matrix",
            ha="center",
            transform=axes.transAxes,
        )
        return
    low, high = min(*values, 0.0), max(*values, 0.1)
    bins = [low + (high - low) * i / 20 for i in range(21)]
    for (pair, found), style in zip(pairs.items(), _styles(), strict=False):
        name = " ~ ".join(Path(model).name for model in pair.split(" ~ "))
        axes.hist(
            found,
            bins=bins,
            histtype="step",
            linewidth=1.4,
            color=style["color"],
            linestyle=style["linestyle"],
            label=f"{name}\n(mean {mean(found):.2f})",
        )
        axes.axvline(mean(found), color=style["color"], linestyle=":", linewidth=1)
    axes.set_xlabel("cosine of the task vectors")
    axes.set_ylabel("matrices")
    axes.set_title(f"{prefix}Alignment of fine-tunes, matrix by matrix")
    _legend_beside(axes)


# -- shared ----------------------------------------------------------------------------------------------------------------


def _place(record: Record) -> str:
    """Layer number; what stands outside of layers by its type."""
    return ".".join(map(str, layer(record.name))) or projection(record.name)


def _spread(groups: Sequence[tuple[str, int]]) -> tuple[list[float], list[float], list[float]]:
    """Places of all matrices, centres of the groups, and edges between them.

    What stands outside of layers keeps a distance, or its name would cover the number of the layer beside it.
    """
    gap = 0.03 * sum(count for _, count in groups)
    places: list[float] = []
    centres, edges, at = [], [], 0.0
    for (label, count), (neighbour, _) in itertools.zip_longest(
        groups, groups[1:], fillvalue=("", 0)
    ):
        places += [at + i for i in range(count)]
        centres.append(at + (count - 1) / 2)
        distance = 0.0 if label[:1].isdigit() and neighbour[:1].isdigit() else gap
        at += count + distance
        edges.append(at - 0.5 - distance / 2)
    return places, centres, edges[:-1]


def _label_depth(axes: Axes, centres: Sequence[float], labels: Sequence[str]) -> None:
    """Layer numbers, thinned where they would touch; names upright, and always."""
    numbered = [i for i, label in enumerate(labels) if label[:1].isdigit()]
    longest = max((len(labels[i]) for i in numbered), default=1)
    step = max(1, math.ceil(len(numbered) * longest / 40))
    kept = sorted({*numbered[::step], *(i for i in range(len(labels)) if i not in numbered)})
    axes.set_xticks([centres[i] for i in kept], [labels[i] for i in kept])
    for i, tick in zip(kept, axes.get_xticklabels(), strict=True):
        if i not in numbered:
            tick.set(rotation=90, fontsize=7)
    axes.set_xlabel("layer")
    axes.xaxis.set_label_coords(0.5, -0.13)  # beside the upright names, not below them


def _styles() -> Any:
    """Colour, marker and line style, each with a period of its own: no two of the first seventy are alike."""
    for number in itertools.count():
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }


def _legend_beside(axes: Axes) -> None:
    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        borderaxespad=0,
        ncols=1 if entries <= 14 else 2,
    )


def _interpolate(where: Sequence[float], curve: Sequence[float], at: float) -> float:
    """On the straight line that a logarithmic axis draws."""
    for (a, fa), (b, fb) in itertools.pairwise(zip(where, curve, strict=True)):
        if a <= at <= b:
            return fa * (fb / fa) ** ((at - a) / (b - a))
    return curve[-1]
