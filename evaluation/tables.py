"""Scores and paired differences as Markdown, LaTeX or CSV: `python -m evaluation.tables results/NAME…`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation.comparison import Cell, Comparison, ComparisonError, compare
from evaluation.store import DamagedError

PAPER = Path(__file__).parent / "paper.yml"
CSV = [
    "suite",
    "model",
    "group",
    "column",
    "items",
    "runs",
    "mean",
    "standard_error",
    "difference",
    "low",
    "high",
    "covers_zero",
    "mcnemar_p",
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.tables", description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of evaluation.run; several are runs to combine",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--latex", action="store_true", help="tabular environments instead of Markdown"
    )
    form.add_argument(
        "--csv", action="store_true", help="one line per model and column, with all numbers"
    )
    parser.add_argument(
        "--reference", default="finetuned", help="what differences are from (default: %(default)s)"
    )
    parser.add_argument(
        "--paper", action="store_true", help="also show what the paper reports, marked as quoted"
    )
    options = parser.parse_args(arguments)
    try:
        comparisons = compare(options.folders, options.reference)
    except (ComparisonError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.csv:
        print(as_csv(comparisons), end="")
        return 0
    show = as_latex if options.latex else as_markdown
    print(
        "\n\n".join(
            show(comparison, quoted(comparison) if options.paper else {})
            for comparison in comparisons
        )
    )
    return 0


def quoted(comparison: Comparison) -> dict[str, dict[str, float]]:
    """The paper's rows for this suite, by task; empty for suites that it has not."""
    rows: dict[str, dict[str, float]] = yaml.safe_load(PAPER.read_text(encoding="utf-8")).get(
        comparison.suite.name, {}
    )
    return rows


def grids(
    comparison: Comparison, paper: dict[str, dict[str, float]]
) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of text) of the two tables; the first row holds the headers."""
    headers = [f"{c.header} ({c.group})" if not c.average else c.header for c in comparison.columns]
    scores = [["model", *headers]]
    scores += [
        [model, *(_score(cell) for cell in cells)] for model, cells in comparison.cells.items()
    ]
    for name, numbers in paper.items():
        by_column = [
            None if c.average else numbers.get(c.tasks[0].task) for c in comparison.columns
        ]
        scores.append([f"{name} [quoted]", *("" if n is None else f"{n:g}" for n in by_column)])
    gains = [["model", *headers]]
    gains += [
        [model, *(difference_text(cell) for cell in cells)]
        for model, cells in comparison.cells.items()
        if model != comparison.reference
    ]
    return [("Scores, %", scores), (f"Difference from {comparison.reference}, points", gains)]


def _score(cell: Cell) -> str:
    return f"{100 * cell.estimate.mean:.1f} ± {100 * cell.estimate.standard_error:.1f}"


def difference_text(cell: Cell) -> str:
    """In points, with its interval and a word where that covers zero."""
    gain = cell.difference
    assert gain is not None
    if gain.identical:
        return "same answers"
    if gain.low is None or gain.high is None:
        return f"{points(gain.mean)} [too few items]"
    shown = with_interval(gain.mean, gain.low, gain.high)
    return f"{shown} covers 0" if gain.covers_zero else shown


def with_interval(
    mean: float, low: float, high: float, scale: float = 100.0, digits: int = 1
) -> str:
    """`+1.2 [−0.3, +2.7]`, in points unless `scale` says otherwise."""
    return f"{points(mean, scale, digits)} [{points(low, scale, digits)}, {points(high, scale, digits)}]"


def points(fraction: float, scale: float = 100.0, digits: int = 1) -> str:
    rounded = round(scale * fraction, digits)
    return (
        f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
    )  # never "−0.0"


def as_markdown(comparison: Comparison, paper: dict[str, dict[str, float]]) -> str:
    lines = [f"## {comparison.suite.title}", ""]
    for title, rows in grids(comparison, paper):
        lines += [f"**{title}**", ""]
        header, *body = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows
        ]
        lines += [header, "|---" * len(rows[0]) + "|", *body, ""]
    lines += [f"* {note}" for note in said(comparison, paper)]
    return "\n".join(lines)


def said(comparison: Comparison, paper: dict[str, dict[str, float]]) -> list[str]:
    notes = list(comparison.notes)
    if paper:
        notes.append(
            "[quoted]: numbers printed in the paper (arXiv 2602.09689), not measured here."
        )
    return [*notes, *(f"Warning: {warning}" for warning in comparison.warnings)]


_LATEX = str.maketrans(
    {
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
        "±": r"$\pm$",
        "−": "$-$",
        "[": "{[}",
        "]": "{]}",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "\\": r"\textbackslash{}",
    }
)


def as_latex(comparison: Comparison, paper: dict[str, dict[str, float]]) -> str:
    lines = [f"% {comparison.suite.title}"]
    for title, rows in grids(comparison, paper):
        # In braces: a row that starts with "[" would be read as an argument of the \\ before it.
        header, *body = [
            " & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows
        ]
        columns = "l" + "r" * (len(rows[0]) - 1)
        lines += [
            f"% {title}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            header,
            r"\midrule",
            *body,
        ]
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {note}" for note in said(comparison, paper))])


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """Fractions of 1, unrounded; empty where there is no such number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV)
    for comparison in comparisons:
        for model, cells in comparison.cells.items():
            for column, cell in zip(comparison.columns, cells, strict=True):
                gain = cell.difference
                numbers: list[Any] = [cell.estimate.mean, cell.estimate.standard_error]
                numbers += (
                    [gain.mean, gain.low, gain.high, gain.covers_zero] if gain else [None] * 4
                )
                writer.writerow(
                    [
                        comparison.suite.name,
                        model,
                        column.group,
                        column.header,
                        cell.items,
                        len(comparison.runs),
                    ]
                    + ["" if number is None else number for number in [*numbers, cell.p_value]]
                )
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
