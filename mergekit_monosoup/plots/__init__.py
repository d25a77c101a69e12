"""Figures from records alone: `mergekit-monosoup plot`.

A figure is a grid of two columns of panels, as high as its names need: a panel keeps its size
whatever the matrices are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.checkpoints.places import arrange
from mergekit_monosoup.plots import depth
from mergekit_monosoup.plots.panels import (
    COLUMN,
    Panel,
    Places,
    coefficients,
    cosines,
    legend_beside,
    ranks,
    spectra,
    survival,
    updates,
)
from mergekit_monosoup.plots.text import figure_text
from mergekit_monosoup.report import Record, by_depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

SUFFIXES = (".png", ".svg", ".pdf")
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
    "text.usetex": False,  # names are escaped for matplotlib, not for LaTeX
}
# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 6.2, 2.45
ABOVE, BELOW = 0.45, 0.5  # title, and ticks with the label of the axis
ENTRY = 0.155  # of a legend
CHARACTER = 0.058  # of an upright name
FILE_LIMIT = 48  # characters of a file's name in a title
TITLE_LINE = 64  # characters that fit over a panel; a file's name beyond gets a line of its own


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

    That is by depth λ_high and λ_low (a panel per mode; the paper's Figure 12), and for each type
    the relative update, what rounding leaves of the edit (a panel per mode), and the effective
    rank; where they were asked for, spectra with the cut and cosines.

    Args:
        files: records by the label of their file.
        mode: draw only this one.

    Raises:
        ValueError: there is nothing to draw; names the file.
        MissingMatplotlibError: matplotlib is missing; gives the command that installs it.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlibError(
            f"figures need matplotlib ({error}): pip install 'mergekit-monosoup[plots]'"
        ) from error
    with rc_context(STYLE):
        titled = [
            (_title(label if len(files) > 1 else "", panel.title), panel)
            for label, records in files.items()
            for panel in _panels(label, by_depth(records), mode)
        ]
        rows = _rows(titled)
        heights = [_height(row) for row in rows]
        width = PANEL_WIDTH * (1 if len(titled) == 1 and not titled[0][1].wide else 2)
        figure = Figure(figsize=(width, sum(heights)), layout="constrained", dpi=100)
        # A figure of its own for each row: the legend of one panel must not squeeze those above.
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            _draw_row(part, row)
        _thin(figure, [panel for _, panel in titled])
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write PNG, SVG or PDF by suffix, the same bytes for the same records."""
    from matplotlib import rc_context

    check_suffix(path)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context(STYLE):
        figure.savefig(path, metadata=dates.get(path.suffix.lower()), facecolor="white")


def _panels(label: str, records: Sequence[Record], mode: str | None) -> list[Panel]:
    """Return the panels of one file, which ``label`` names in errors."""
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
    places = arrange(record.name for record in split)
    panels = [
        coefficients([r for r in split if r.mode == drawn], places)
        for drawn in dict.fromkeys(r.mode for r in split)
    ]
    # What does not depend on the mode is drawn once.
    matrices = list({r.name: r for r in split}.values())
    if any(r.rel_update for r in matrices):
        panels.append(updates(matrices, places))
    panels += _survival_panels(split, places)
    panels.append(ranks(matrices, places))
    if any(r.spectrum for r in split):
        panels.append(spectra(split, places))
    if any(r.cosine for r in matrices):
        panels.append(cosines(matrices))
    return panels


def _survival_panels(records: Sequence[Record], places: Places) -> list[Panel]:
    """Return a panel for each mode in which it is known what rounding leaves of the edits."""
    modes = dict.fromkeys(r.mode for r in records if r.realised is not None)
    return [survival([r for r in records if r.mode == mode], places) for mode in modes]


# -- layout ----------------------------------------------------------------------------------------

Titled = tuple[str, Panel]


def _title(file: str, title: str) -> str:
    if not file:
        return title
    name = figure_text(file, FILE_LIMIT)
    return f"{name}: {title}" if len(name) + len(title) < TITLE_LINE else f"{name}:\n{title}"


def _rows(panels: Sequence[Titled]) -> list[list[Titled]]:
    """Return rows of two panels, or of one that is wide or has no other beside it."""
    rows: list[list[Titled]] = []
    for panel in panels:
        beside = rows and len(rows[-1]) == 1 and not rows[-1][0][1].wide
        if beside and not panel[1].wide:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    return rows


def _height(row: Sequence[Titled]) -> float:
    """Return the height of a row in which the panels have theirs, in inches."""
    above = ABOVE + max(title.count("\n") for title, _ in row) * 0.17
    below = BELOW + max(_name_height(panel) for _, panel in row)
    legend = max(min(panel.entries, COLUMN) for _, panel in row) * ENTRY
    return above + max(PANEL_HEIGHT + below, legend)


def _name_height(panel: Panel) -> float:
    """Return how far the upright names of a panel reach below the numbers, in inches."""
    groups = panel.axis.groups if panel.axis else []
    return CHARACTER * max((len(group.label) for group in groups if group.upright), default=0)


def _draw_row(part: SubFigure, row: Sequence[Titled]) -> None:
    for axes, (title, panel) in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
        panel.draw(axes)
        axes.set_title(title)
        legend_beside(axes)


def _thin(figure: Figure, panels: Sequence[Panel]) -> None:
    """Take away the ticks that touch, once it is known where they are, and keep everything there.

    Fewer ticks need no other layout, and laying out takes longer than drawing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes, panel in zip(figure.axes, panels, strict=True):
        if panel.axis is not None:
            depth.thin(axes, panel.axis, renderer)
