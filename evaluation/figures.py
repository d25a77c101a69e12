"""The ID–OOD plane and bars per task, from results alone: `python -m evaluation.figures results/NAME…`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.comparison import Cell, Comparison, ComparisonError, compare
from evaluation.families import LINES, MONOSOUP, MONOSOUP_WISE, SCALAR, WISE_FT, family, inputs
from evaluation.store import DamagedError

Z = 1.959964  # of a 95 % normal interval
MANY = 8  # models; more bars than these beside each other cannot be told apart, nor can the colours
# W0 and W1 are the ends of Wise-FT, W1 is the end of LiNeS and W0 that of MonoSoup + Wise-FT.
ENDS = {
    WISE_FT: [(0.0, "pretrained"), (1.0, "finetuned")],
    LINES: [(1.0, "finetuned")],
    MONOSOUP_WISE: [(0.0, "pretrained")],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.figures", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="as for evaluation.tables"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default: the first FOLDER)"
    )
    parser.add_argument(
        "--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s"
    )
    parser.add_argument(
        "--reference", default="finetuned", help="what differences are from (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        comparisons = compare(options.folders, options.reference)
    except (ComparisonError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = options.out or options.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    for path in draw(comparisons, out, options.format):
        print(path)
    return 0


def draw(comparisons: Sequence[Comparison], out: Path, form: str) -> Iterator[Path]:
    """Write what the results allow, and name the files."""
    for comparison in comparisons:
        kinds: dict[str, Callable[[Comparison], Any]] = {"plane": plane, "bars": bars}
        if any(name.startswith(MONOSOUP) for name in curves(comparison)):
            kinds["R"] = energy
        for kind, figure in kinds.items():
            path = out / f"{comparison.suite.name}-{kind}.{form}"
            figure(comparison).savefig(path, bbox_inches="tight", dpi=150)
            yield path


def averages(comparison: Comparison, model: str) -> tuple[Cell, Cell]:
    """The ID and the OOD cell of a model: the group's average, or its only task."""
    found = {}
    for column, cell in zip(comparison.columns, comparison.cells[model], strict=True):
        if column.average or column.group not in found:
            found[column.group] = cell
    return found["ID"], found["OOD"]


def curves(comparison: Comparison) -> dict[str, list[tuple[float, str]]]:
    """(number, model) by curve, see `families`; fewer than three points are no curve.

    A curve belongs to one W0 and one W1. Where there are several of a family, their names say of which fine-tuned model.
    """
    found: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    weights, called = {}, {}
    for model in comparison.cells:
        merge = comparison.merges.get(model)
        if merge is None or (place := family(merge)) is None:
            continue
        digests, (base, tuned) = merge.get("inputs") or {}, inputs(merge)
        key = place[0], digests.get(base, base), digests.get(tuned, tuned)
        found.setdefault(key, []).append((place[1], model))
        weights[key] = {"pretrained": digests.get(base), "finetuned": digests.get(tuned)}
        called[key] = base, tuned
    for key, points in found.items():
        for number, end in ENDS.get(key[0], []):
            # Where the weights are not known (a folder that somebody merged elsewhere) the names are believed.
            if end in comparison.cells and weights[key][end] in (None, comparison.weights[end]):
                points.append((number, end))
    kept = {key: sorted(points) for key, points in found.items() if len(points) >= 3}
    # The shortest name that tells them apart.
    labels = {
        key: [
            key[0],
            f"{key[0]} of {Path(tuned).name}",
            f"{key[0]} of {tuned} from {base}",
            " ".join(key),
        ]
        for key, (base, tuned) in called.items()
        if key in kept
    }
    return {
        next(
            name
            for i, name in enumerate(labels[key])
            if [other[i] for other in labels.values()].count(name) == 1
        ): points
        for key, points in kept.items()
    }


def plane(comparison: Comparison) -> Any:
    """ID against OOD in per cent, with 95 % intervals of the scores over items."""
    figure, axes = _figure(6.4, 4.8)
    for number, (name, points) in enumerate(curves(comparison).items()):
        ends = [averages(comparison, model) for _, model in points]
        axes.plot(
            [100 * c.estimate.mean for c, _ in ends],
            [100 * c.estimate.mean for _, c in ends],
            "-",
            color=f"C{number}",
            alpha=0.6,
            zorder=1,
            label=f"{name} curve",
        )
    on_curves = [
        model
        for points in curves(comparison).values()
        for x, model in points
        if x not in (0.0, 1.0)
    ]
    for number, model in enumerate(comparison.cells):
        id_, ood = averages(comparison, model)
        # In a sweep the points of a curve would fill the legend and hide each other's intervals.
        crowded = len(comparison.cells) > 12 and model in on_curves
        axes.errorbar(
            100 * id_.estimate.mean,
            100 * ood.estimate.mean,
            xerr=None if crowded else 100 * Z * id_.estimate.standard_error,
            yerr=None if crowded else 100 * Z * ood.estimate.standard_error,
            fmt="." if crowded else "osD^v<>Ph*X"[number % 11],
            color="0.3" if crowded else None,
            capsize=2,
            label=None if crowded else model,
            zorder=2,
        )
    axes.set(xlabel="ID, %", ylabel="OOD, %", title=comparison.suite.title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def bars(comparison: Comparison) -> Any:
    """Paired differences from the reference, per task and average, with their 95 % intervals; of many models the averages."""
    models = [model for model in comparison.cells if model != comparison.reference]
    if len(models) > MANY:
        return _many_bars(comparison, models)
    figure, axes = _figure(max(6.4, 1.1 * len(comparison.columns)), 4.0)
    width = 0.8 / max(len(models), 1)
    for number, model in enumerate(models):
        for place, cell in enumerate(comparison.cells[model]):
            gain = cell.difference
            assert gain is not None
            x = place + (number + 0.5) * width - 0.4
            axes.bar(
                x, 100 * gain.mean, width, color=f"C{number}", label=model if place == 0 else None
            )
            if gain.low is not None and gain.high is not None:
                reach = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
                axes.errorbar(x, 100 * gain.mean, yerr=reach, color="black", capsize=2, fmt="none")
    axes.axhline(0, color="black", linewidth=0.8)
    headers = [c.header if c.average else f"{c.header}\n({c.group})" for c in comparison.columns]
    axes.set_xticks(range(len(headers)), headers, rotation=45, ha="right")
    axes.set(ylabel=f"difference from {comparison.reference}, points", title=comparison.suite.title)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _many_bars(comparison: Comparison, models: Sequence[str]) -> Any:
    """A panel for each group, a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 0.22 * len(models)), layout="constrained")
    for panel, (number, group) in zip(
        figure.subplots(1, 2, sharey=True), enumerate(("ID", "OOD")), strict=True
    ):
        for place, model in enumerate(models):
            gain = averages(comparison, model)[number].difference
            assert gain is not None
            panel.barh(place, 100 * gain.mean, color=f"C{number}")
            if gain.low is not None and gain.high is not None:
                reach = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
                panel.errorbar(
                    100 * gain.mean, place, xerr=reach, color="black", capsize=2, fmt="none"
                )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(
            xlabel=f"{group}: difference from {comparison.reference}, points",
            ylim=(len(models) - 0.4, -0.6),
        )
        panel.set_yticks(range(len(models)), models)
    figure.suptitle(comparison.suite.title)
    return figure


def energy(comparison: Comparison) -> Any:
    """ID and OOD against R (paper, Figures 6 and 10), with the scalar control if it was run; bands are 95 % intervals."""
    figure, axes = _figure(6.4, 4.0)
    found = curves(comparison)
    for kind, style in ((MONOSOUP, "-"), (SCALAR, "--")):
        for place, name in enumerate(name for name in found if name.startswith(kind)):
            values = [x for x, _ in found[name]]
            for number, group in enumerate(("ID", "OOD")):
                cells = [averages(comparison, model)[number].estimate for _, model in found[name]]
                color, label = f"C{2 * place + number}", f"{group}, {name.replace(', R', '')}"
                axes.plot(values, [100 * c.mean for c in cells], style, color=color, label=label)
                low, high = (
                    [100 * (c.mean + sign * Z * c.standard_error) for c in cells]
                    for sign in (-1, 1)
                )
                axes.fill_between(values, low, high, color=color, alpha=0.12)
    axes.set(xlabel="R", ylabel="%", title=comparison.suite.title)
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


if __name__ == "__main__":
    sys.exit(main())
