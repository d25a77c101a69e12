"""Figures from records alone: `mergekit-monosoup plot`.

Readable in grey print and by colour-blind people: the palette is Okabe & Ito's, and whatever a
colour says is also said by a marker or a line style.
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
    """matplotlib, an optional dependency, is not installed or cannot be imported."""


def check_suffix(path: Path) -> None:
    """Check that a figure can be written to ``path``. For use before it is drawn.

    Raises:
        ValueError: the suffix is none of :data:`SUFFIXES`, or there is no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a figure is a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def draw(files: Mapping[str, Sequence[Record]], *, mode: str | None = None) -> Figure:
    """Return one figure with all that the records of each file hold.

    That is λ_high and λ_low by depth (a panel per mode; the paper's Figure 12), effective rank by
    depth and type, and where they were asked for spectra with the cut and cosines.

    Args:
        files: records by the label of their file.
        mode: draw only this one.

    Raises:
        ValueError: there is nothing to draw; names the file.
        MissingMatplotlibError: matplotlib is missing; gives the command that installs it.
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
            row, column = divmod(number, columns)
            alone = number == len(panels) - 1 and column == 0
            panel(figure.add_subplot(grid[row, :] if alone else grid[row, column]))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write PNG, SVG or PDF by suffix, the same bytes for the same records."""
    from matplotlib import rc_context

    check_suffix(path)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context(STYLE):
        figure.savefig(path, metadata=dates.get(path.suffix.lower()), facecolor="white")


def _panels(prefix: str, label: str, records: Sequence[Record], mode: str | None) -> list[Panel]:
    """Return the panels of one file. ``prefix`` begins their titles, ``label`` names the file."""
    split = [r for r in records if r.lambda_high is not None and mode in (None, r.mode)]
    if not split:
        modes = sorted({r.mode for r in records if r.mode})
        content = (
            f"it has those of {', '.join(modes)}"
            if modes
            else "none of its matrices has λ_high and λ_low"
        )
        raise ValueError(
            f"{label}: no coefficients to draw{f' for mode {mode}' if mode else ''}; {content}"
        )
    panels: list[Panel] = []
    for drawn_mode in dict.fromkeys(r.mode for r in split):
        of_mode = [r for r in split if r.mode == drawn_mode]
        panels.append(partial(coefficients, records=of_mode, prefix=prefix))
    # What does not depend on the mode is drawn once.
    matrices = list({r.name: r for r in split}.values())
    panels.append(partial(ranks, records=matrices, prefix=prefix))
    if any(r.spectrum for r in split):
        panels.append(partial(spectra, records=split, prefix=prefix))
    if any(r.cosine for r in matrices):
        panels.append(partial(cosines, records=matrices, prefix=prefix))
    return panels


# -- panels ----------------------------------------------------------------------------------------


def coefficients(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Draw λ_high and λ_low of each matrix in the order of depth, with a line between layers."""
    high = [record.lambda_high or 0.0 for record in records]
    low = [record.lambda_low or 0.0 for record in records]
    groups = [
        (label, len(list(members)))
        for label, members in itertools.groupby(_place(r) for r in records)
    ]
    places, centres, edges = _spread(groups)
    size = 4 if len(records) <= 60 else 2
    axes.fill_between(places, high, low, color="0.88", linewidth=0, zorder=1)
    style: dict[str, Any] = {"markersize": size, "linewidth": 1, "zorder": 3}
    axes.plot(places, high, color=COLOURS[0], marker="o", label=r"$\lambda_{high}$", **style)
    style |= {"linestyle": "--", "markerfacecolor": "white"}
    axes.plot(places, low, color=COLOURS[1], marker="s", label=r"$\lambda_{low}$", **style)
    for edge in edges:
        axes.axvline(edge, color="0.8", linewidth=0.6, zorder=0)
    _label_depth(axes, centres, [label for label, _ in groups])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("coefficient")
    threshold = records[0].R
    suffix = f", R = {threshold:g}" if threshold is not None else ""
    axes.set_title(f"{prefix}{records[0].mode}{suffix}")
    _legend_beside(axes)


def ranks(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Draw effective rank / rank by depth, a line per type (mean over the experts of a layer)."""
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
    """Draw σ/σ₁ against the place in the spectrum: medians over the matrices of a type.

    A marker stands at the median cut of each mode.
    """
    types: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.spectrum:
            types[projection(record.name)].append(record)
    modes: set[str] = set()
    for (kind, members), style in zip(types.items(), _styles(), strict=False):
        places, curve = _median_spectrum(members)
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        axes.plot(places, curve, linewidth=1.2, label=kind, **line)
        for mode in dict.fromkeys(record.mode for record in members):
            cut = median(r.k / r.rank for r in members if r.mode == mode and r.k and r.rank)
            height = _interpolate(places, curve, cut)
            marker = _cut_marker(str(mode), style["color"])
            axes.plot([cut], [height], markeredgewidth=0.6, zorder=4, **marker)
            modes.add(str(mode))
    for mode in sorted(modes):
        axes.plot([], [], label=f"k of {mode}", **_cut_marker(mode, "0.6"))
    axes.set_yscale("log")
    axes.set_xlim(-0.01, 1.03)
    axes.set_xlabel("place in the spectrum, i / rank")
    axes.set_ylabel(r"$\sigma_i\,/\,\sigma_1$")
    axes.set_title(f"{prefix}Singular values (medians) and the cut")
    _legend_beside(axes)


def _median_spectrum(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Return places in [0, 1] and the median of the spectra there."""
    curves = [
        record.spectrum for record in {r.name: r for r in records}.values() if record.spectrum
    ]
    shortest = min(map(len, curves))
    curve = [median(values) for values in zip(*(c[:shortest] for c in curves), strict=True)]
    places = [i / (len(curve) - 1) if len(curve) > 1 else 0.0 for i in range(len(curve))]
    return places, curve


def _cut_marker(mode: str, colour: str) -> dict[str, Any]:
    return {
        "color": colour,
        "marker": MODE_MARKERS.get(mode, "D"),
        "markersize": 6,
        "markeredgecolor": "black",
        "linestyle": "none",
    }


def cosines(axes: Axes, records: Sequence[Record], prefix: str = "") -> None:
    """Draw histograms over matrices of the cosine between the task vectors of two fine-tunes.

    One for each two of them (paper, Figure 1).
    """
    pairs: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for pair, value in (record.cosine or {}).items():
            if value is not None:
                pairs[pair].append(value)
    if not pairs:
        message = "no two task vectors move the same matrix"
        axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
        return
    all_values = list(itertools.chain.from_iterable(pairs.values()))
    low, high = min(*all_values, 0.0), max(*all_values, 0.1)
    bins = [low + (high - low) * i / 20 for i in range(21)]
    for (pair, values), style in zip(pairs.items(), _styles(), strict=False):
        name = " ~ ".join(Path(model).name for model in pair.split(" ~ "))
        axes.hist(
            values,
            bins=bins,
            histtype="step",
            linewidth=1.4,
            color=style["color"],
            linestyle=style["linestyle"],
            label=f"{name}\n(mean {mean(values):.2f})",
        )
        axes.axvline(mean(values), color=style["color"], linestyle=":", linewidth=1)
    axes.set_xlabel("cosine of the task vectors")
    axes.set_ylabel("matrices")
    axes.set_title(f"{prefix}Alignment of fine-tunes, matrix by matrix")
    _legend_beside(axes)


# -- shared ----------------------------------------------------------------------------------------


def _place(record: Record) -> str:
    """Return the layer number of a matrix, or its type where it stands outside of layers."""
    return ".".join(map(str, layer(record.name))) or projection(record.name)


def _spread(groups: Sequence[tuple[str, int]]) -> tuple[list[float], list[float], list[float]]:
    """Return places of all matrices, centres of the groups, and edges between them.

    ``groups`` are (label, number of matrices). What stands outside of layers keeps a distance, or
    its name would cover the number of the layer beside it.
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
    """Write layer numbers, thinned where they would touch; names upright, and always."""
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
    """Yield colour, marker and line style, of which no two of the first seventy are alike.

    Each has a period of its own.
    """
    for number in itertools.count():
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }


def _legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes: over the lines it would hide some."""
    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        borderaxespad=0,
        ncols=1 if entries <= 14 else 2,
    )


def _interpolate(places: Sequence[float], curve: Sequence[float], at: float) -> float:
    """Return the height of a curve on the straight line that a logarithmic axis draws."""
    for (a, fa), (b, fb) in itertools.pairwise(zip(places, curve, strict=True)):
        if a <= at <= b:
            return fa * (fb / fa) ** ((at - a) / (b - a))
    return curve[-1]
