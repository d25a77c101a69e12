"""Print scores and paired differences: `python -m evaluation.tables results/NAME…`.

As Markdown, LaTeX or CSV.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from evaluation import options
from evaluation.comparison import Cell, Column, Comparison, compare
from evaluation.formatting import difference_text, with_error
from mergekit_monosoup import terminal
from mergekit_monosoup.report.labels import shorten

PAPER = Path(__file__).parent / "paper.yml"
NAME_LIMIT = 40  # characters of a model or task in Markdown and LaTeX; CSV has the whole name
# fmt: off
CSV = [
    "suite", "model", "group", "column", "items", "runs", "mean", "standard_error",
    "difference", "low", "high", "covers_zero", "mcnemar_p",
]
# fmt: on

Quoted = dict[str, dict[str, float]]
"""What the paper reports of its models, by task."""


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.tables", description=__doc__)
    options.add_comparison(parser, "of evaluation.run; several are runs to combine")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--latex", action="store_true", help="tabular environments instead of Markdown"
    )
    form.add_argument(
        "--csv", action="store_true", help="one line per model and column, with all numbers"
    )
    parser.add_argument(
        "--paper", action="store_true", help="also show what the paper reports, marked as quoted"
    )
    given = parser.parse_args(arguments)
    return options.exit_code(lambda: _print(given), interruption="")


def _print(given: argparse.Namespace) -> None:
    comparisons = compare(given.folders, given.reference)
    if given.csv:
        print(as_csv(comparisons), end="")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    table = as_latex if given.latex else partial(as_markdown, width=width)
    tables = [table(c, quoted(c) if given.paper else {}) for c in comparisons]
    print("\n\n".join(tables))


def quoted(comparison: Comparison) -> Quoted:
    """Return the paper's rows for this suite; empty for suites that it has not."""
    rows: Quoted = _paper().get(comparison.suite.name, {})
    return rows


@functools.cache
def _paper() -> dict[str, Any]:
    return dict(yaml.safe_load(PAPER.read_text(encoding="utf-8")))


def grids(comparison: Comparison, paper: Quoted) -> list[tuple[str, list[list[str]]]]:
    """Return (title, rows of text) of the two tables; the first row holds the headers."""
    headers = [c.header if c.average else f"{c.header} ({c.group})" for c in comparison.columns]
    scores = [["model", *headers]]
    scores += [
        [model, *(with_error(cell.estimate) for cell in cells)]
        for model, cells in comparison.cells.items()
    ]
    for name, numbers in paper.items():
        by_column = [
            numbers.get(f"{c.group} average" if c.average else c.tasks[0].task)
            for c in comparison.columns
        ]
        scores.append([f"{name} [quoted]", *("" if n is None else f"{n:g}" for n in by_column)])
    gains = [["model", *headers]]
    gains += [
        [model, *(difference_text(cell) for cell in cells)]
        for model, cells in comparison.cells.items()
        if model != comparison.reference
    ]
    reference = terminal.shortened(comparison.reference, terminal.LONGEST_CELL)
    title = f"Difference from {reference}, points"
    return [("Scores, %", _shown(scores)), (terminal.plain(title), _shown(gains))]


def _shown(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows whose names, in the first row and column, are harmless and not endless."""
    header, *body = [[terminal.plain(cell) for cell in row] for row in rows]
    names = shorten([row[0] for row in body], NAME_LIMIT)
    return [
        shorten(header, NAME_LIMIT),
        *([n, *row[1:]] for n, row in zip(names, body, strict=True)),
    ]


def as_markdown(comparison: Comparison, paper: Quoted, width: int | None = None) -> str:
    """Return both tables and the notes; for a terminal in as many parts as its width needs."""
    lines = [f"## {terminal.plain(comparison.suite.title)}", ""]
    for title, rows in grids(comparison, paper):
        lines += [f"**{title}**", ""]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        for part in _parts(escaped, width):
            header, *body = [f"| {' | '.join(row)} |" for row in part]
            lines += [header, "|---" * len(part[0]) + "|", *body, ""]
    lines += [f"* {note}" for note in notes(comparison, paper)]
    return "\n".join(lines)


def _parts(rows: list[list[str]], width: int | None) -> Iterator[list[list[str]]]:
    """Yield tables with the first column and as many of the others as fit, in padded cells."""
    if width is None:
        yield rows
        return
    columns = zip(*rows, strict=True)
    names, *others = [[c.ljust(max(map(len, column))) for c in column] for column in columns]
    while others:
        part = [names, others.pop(0)]
        while others and sum(len(column[0]) + 3 for column in [*part, others[0]]) < width:
            part.append(others.pop(0))
        yield [list(row) for row in zip(*part, strict=True)]


def notes(comparison: Comparison, paper: Quoted) -> list[str]:
    """Return the lines below the tables: what the numbers are, and warnings."""
    lines = list(comparison.notes)
    if paper:
        lines.append(
            "[quoted]: numbers printed in the paper (arXiv 2602.09689), not measured here."
        )
        lines += _paper()["notes"].get(comparison.suite.name, [])
    lines += [f"Warning: {warning}" for warning in comparison.warnings]
    return list(map(terminal.plain, lines))


# fmt: off
_LATEX = str.maketrans({
    "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "−": "$-$", "…": r"\ldots{}",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "\\": r"\textbackslash{}",
})
# fmt: on


def as_latex(comparison: Comparison, paper: Quoted) -> str:
    """Return both tables as tabular environments (booktabs), and the notes as comments."""
    lines = [f"% {terminal.plain(comparison.suite.title)}"]
    for title, rows in grids(comparison, paper):
        # In braces: a row that starts with "[" would be read as an argument of the \\ before it.
        header, *body = [
            " & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows
        ]
        columns = "l" + "r" * (len(rows[0]) - 1)
        lines += [f"% {title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header]
        lines += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {note}" for note in notes(comparison, paper))])


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """Return fractions of 1, unrounded; empty where there is no such number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV)
    for comparison in comparisons:
        for model, cells in comparison.cells.items():
            for column, cell in zip(comparison.columns, cells, strict=True):
                writer.writerow(_csv_row(comparison, model, column, cell))
    return out.getvalue()


def _csv_row(comparison: Comparison, model: str, column: Column, cell: Cell) -> list[Any]:
    gain = cell.difference
    numbers: list[Any] = [cell.estimate.mean, cell.estimate.standard_error]
    numbers += [gain.mean, gain.low, gain.high, gain.covers_zero] if gain else [None] * 4
    numbers.append(cell.p_value)
    names = [comparison.suite.name, model, column.group, terminal.plain(column.header)]
    filled = ["" if number is None else number for number in numbers]
    return [*names, cell.items, len(comparison.runs), *filled]


if __name__ == "__main__":
    sys.exit(main())
