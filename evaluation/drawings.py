"""Drawings of a comparison: the ID–OOD plane, bars of differences, and scores over R."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.comparison import Comparison
from evaluation.families import MONOSOUP, SCALAR, curves
from evaluation.formatting import file_name
from evaluation.statistics import Difference
from mergekit_monosoup import files
from mergekit_monosoup.plots.text import figure_labels, figure_text

Z = 1.959964  # of a 95 % normal interval
# More bars than these beside each other cannot be told apart, nor can the colours.
MOST_MODELS = 8
MOST_LABELLED = 12  # models of a plane; with more, the points of curves would fill the legend
NAME_LIMIT, TITLE_LIMIT = 36, 120  # characters of a model or task, and of a suite's title
REFERENCE_LIMIT = 24  # characters of it in the label of an axis, which is as long as the axis
TITLE_LINE = 60  # characters that fit over the axes
COLUMN = 20  # entries in a column of a legend


def draw(comparisons: Sequence[Comparison], out: Path, suffix: str) -> Iterator[Path]:
    """Write what the results allow into `out`, in the format of `suffix`, and yield the paths."""
    for comparison in comparisons:
        kinds: dict[str, Callable[[Comparison], Any]] = {"plane": plane, "bars": bars}
        if any(name.startswith(MONOSOUP) for name in curves(comparison)):
            kinds["R"] = energy
        for kind, figure in kinds.items():
            path = out / f"{file_name(comparison.suite.name)}-{kind}.{suffix}"
            drawn = io.BytesIO()  # whole first: an earlier figure survives a full disk
            figure(comparison).savefig(drawn, format=suffix, bbox_inches="tight", dpi=150)
            files.write_bytes(path, drawn.getvalue())
            yield path


def plane(comparison: Comparison) -> Any:
    """Return ID against OOD in per cent, with 95 % intervals of the scores over items."""
    figure, axes = _figure(6.4, 4.8)
    points = curves(comparison)
    labels = _labels([*points, *comparison.cells])
    for number, (name, on_curve) in enumerate(points.items()):
        ends = [comparison.averages(model) for _, model in on_curve]
        axes.plot(
            [100 * cell.estimate.mean for cell, _ in ends],
            [100 * cell.estimate.mean for _, cell in ends],
            "-",
            color=f"C{number}",
            alpha=0.6,
            zorder=1,
            label=f"{labels[name]} curve",
        )
    inner = {
        model
        for on_curve in points.values()
        for place, model in on_curve
        if place not in (0.0, 1.0)
    }
    for number, model in enumerate(comparison.cells):
        # In a sweep the points of a curve would fill the legend and hide each other's intervals.
        crowded = len(comparison.cells) > MOST_LABELLED and model in inner
        _place(axes, comparison, model, number, None if crowded else labels[model])
    axes.set(xlabel="ID, %", ylabel="OOD, %", title=_title(comparison))
    _legend_beside(axes)
    return figure


def _place(axes: Any, comparison: Comparison, model: str, number: int, label: str | None) -> None:
    """Draw one model of the plane; without a label, as a dot without interval."""
    crowded = label is None
    id_, ood = (cell.estimate for cell in comparison.averages(model))
    axes.errorbar(
        100 * id_.mean,
        100 * ood.mean,
        xerr=None if crowded else 100 * Z * id_.standard_error,
        yerr=None if crowded else 100 * Z * ood.standard_error,
        fmt="." if crowded else "osD^v<>Ph*X"[number % 11],
        color="0.3" if crowded else None,
        capsize=2,
        label=label,
        zorder=2,
    )


def bars(comparison: Comparison) -> Any:
    """Return paired differences from the reference, per task and average, with 95 % intervals.

    Of more than MOST_MODELS models only the averages.
    """
    models = [model for model in comparison.cells if model != comparison.reference]
    if len(models) > MOST_MODELS:
        return _averages(comparison, models)
    figure, axes = _figure(max(6.4, 1.1 * len(comparison.columns)), 4.0)
    width, labels = 0.8 / max(len(models), 1), _labels(comparison.cells)
    for number, model in enumerate(models):
        for place, cell in enumerate(comparison.cells[model]):
            gain = cell.difference
            assert gain is not None
            x = place + (number + 0.5) * width - 0.4
            label = labels[model] if place == 0 else None
            axes.bar(x, 100 * gain.mean, width, color=f"C{number}", label=label)
            if (reach := _reach(gain)) is not None:
                axes.errorbar(x, 100 * gain.mean, yerr=reach, color="black", capsize=2, fmt="none")
    axes.axhline(0, color="black", linewidth=0.8)
    tasks = _labels(column.header for column in comparison.columns)
    headers = [
        tasks[c.header] + ("" if c.average else f"\n({c.group})") for c in comparison.columns
    ]
    axes.set_xticks(range(len(headers)), headers, rotation=45, ha="right")
    axes.set(ylabel=f"difference from {_reference(comparison)}, points")
    axes.set_title(_title(comparison))
    _legend_beside(axes)
    return figure


def _averages(comparison: Comparison, models: Sequence[str]) -> Any:
    """Return a panel for each group, with a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 0.22 * len(models)), layout="constrained")
    panels, labels = figure.subplots(1, 2, sharey=True), _labels(comparison.cells)
    for number, (panel, group) in enumerate(zip(panels, ("ID", "OOD"), strict=True)):
        for place, model in enumerate(models):
            gain = comparison.averages(model)[number].difference
            assert gain is not None
            mean = 100 * gain.mean
            panel.barh(place, mean, color=f"C{number}")
            if (reach := _reach(gain)) is not None:
                panel.errorbar(mean, place, xerr=reach, color="black", capsize=2, fmt="none")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(
            xlabel=f"{group}: difference from\n{_reference(comparison)}, points",
            ylim=(len(models) - 0.4, -0.6),
        )
        panel.set_yticks(range(len(models)), [labels[model] for model in models])
    figure.suptitle(_title(comparison))
    return figure


def _reach(gain: Difference) -> list[list[float]] | None:
    """Return how far the interval reaches below and above the mean, in points."""
    if gain.low is None or gain.high is None:
        return None
    return [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]


def energy(comparison: Comparison) -> Any:
    """Return ID and OOD against R (paper, Figures 6 and 10); bands are 95 % intervals.

    With the scalar control if it was run.
    """
    figure, axes = _figure(6.4, 4.0)
    points = curves(comparison)
    labels = _labels(points)
    for kind, style in ((MONOSOUP, "-"), (SCALAR, "--")):
        for place, name in enumerate(name for name in points if name.startswith(kind)):
            values = [x for x, _ in points[name]]
            for number, group in enumerate(("ID", "OOD")):
                cells = [comparison.averages(model)[number] for _, model in points[name]]
                estimates = [cell.estimate for cell in cells]
                color = f"C{2 * place + number}"
                label = f"{group}, {labels[name].replace(', R', '')}"
                axes.plot(
                    values, [100 * e.mean for e in estimates], style, color=color, label=label
                )
                low, high = (
                    [100 * (e.mean + sign * Z * e.standard_error) for e in estimates]
                    for sign in (-1, 1)
                )
                axes.fill_between(values, low, high, color=color, alpha=0.12)
    axes.set(xlabel="R", ylabel="%", title=_title(comparison))
    _legend_beside(axes)
    return figure


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Return what a figure calls each of the models, curves or tasks."""
    listed = list(names)
    return dict(zip(listed, figure_labels(listed, NAME_LIMIT), strict=True))


def _title(comparison: Comparison) -> str:
    return textwrap.fill(figure_text(comparison.suite.title, TITLE_LIMIT), TITLE_LINE)


def _reference(comparison: Comparison) -> str:
    return figure_text(comparison.reference, REFERENCE_LIMIT)


def _legend_beside(axes: Any) -> None:
    entries = len(axes.get_legend_handles_labels()[1])
    columns = -(-entries // COLUMN) or 1
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()
