"""Tables of results whose every number is known."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import yaml
from helpers import evaluations
from helpers.evaluations import SOUP

from evaluation import tables
from evaluation.comparison import compare
from evaluation.suite import load


def test_markdown(folder, capsys):
    assert tables.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "| finetuned | 75.0 ± 21.7 | 25.0 ± 21.7 | 25.0 ± 21.7 | 25.0 ± 15.3 |" in shown
    gains = next(
        line for line in shown.split("Difference")[1].splitlines() if line.startswith("| soup")
    )
    cells = [cell.strip() for cell in gains.strip("|").split("|")]
    assert cells[1] == "same answers"
    assert cells[2].startswith("+75.0 [") and not cells[2].endswith("covers 0")
    assert cells[3] == "+25.0 [0.0, +75.0] covers 0"
    assert "| finetuned" not in shown.split("Difference")[1]
    assert "W0 (pretrained): some/base, weights ffffffffffff." in shown


def test_csv_has_the_same_numbers_unrounded(folder, capsys):
    assert tables.main([str(folder), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 3 * 4
    row = next(row for row in rows if (row["model"], row["column"]) == ("soup", "c"))
    assert float(row["mean"]) == 0.5 and float(row["difference"]) == 0.25
    assert row["covers_zero"] == "True"
    assert float(row["mcnemar_p"]) == 1.0 and row["items"] == "4"


def test_latex_escapes_what_latex_reads(folder, capsys):
    evaluations.write(folder, "soup_R0.8", SOUP)
    assert tables.main([str(folder), "--latex"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(r"\begin{tabular}{lrrrr}") == shown.count(r"\end{tabular}") == 2
    body = [line for line in shown.splitlines() if not line.startswith("%")]
    assert any(
        line.startswith(r"soup\_R0.8 & 75.0 $\pm$ 21.7 &") and line.endswith(r"\\") for line in body
    )
    assert not any("±" in line or "−" in line or " [" in line for line in body)


def test_the_papers_numbers_are_marked(tmp_path, capsys):
    made = load("qwen-mgsm")
    for model in ("pretrained", "finetuned"):
        evaluations.write(
            tmp_path, model, {task.task: [1, 0] for task in made.tasks}, made=made, cluster="q"
        )
    assert tables.main([str(tmp_path), "--paper"]) == 0
    shown = capsys.readouterr().out
    assert (
        "| MonoSoup [quoted] | 47.6 | 37.1 | 37.5 | 30.2 | 38.8 | 21.1 | 34.8 | 23.4 |  |" in shown
    )
    assert "[quoted]: numbers printed in the paper" in shown
    assert tables.main([str(tmp_path)]) == 0
    assert "quoted" not in capsys.readouterr().out


def test_the_papers_rows_name_tasks_of_the_suite():
    quoted = yaml.safe_load(tables.PAPER.read_text())
    assert set(quoted.pop("notes")) < set(quoted)
    for name, rows in quoted.items():
        suite = load(name)
        expected = {task.task for task in suite.tasks}
        if suite.engine == "vision":  # the paper prints one number of each group
            expected = {suite.ID[0].task, "OOD average"}
        for row, numbers in rows.items():
            assert set(numbers) == expected, (name, row)


def test_averages_that_the_paper_prints_stand_in_their_column(tmp_path, capsys):
    made = load("imagenet-shifts")
    outcomes = {task.task: [1, 0] for task in made.tasks}
    for model in ("pretrained", "finetuned"):
        evaluations.write(tmp_path, model, outcomes, made=made)
    assert tables.main([str(tmp_path), "--paper"]) == 0
    shown = capsys.readouterr().out
    assert "| T1 model_31 + MonoSoup [quoted] | 77.38 |  |  |  |  |  | 45.22 |" in shown
    assert "…" not in "".join(line for line in shown.splitlines() if "[quoted] |" in line)
    assert "model_61 (OOD+), model_14 (OOD−), model_43 (ID+) and model_31 (ID−)" in shown


def test_any_names_and_widths(folder):
    """Names are shortened, numbers never; a terminal gets tables that it can hold."""
    [comparison] = compare([folder])
    names = {model: "/models/" + "deep/" * 40 + f"{model}|" for model in comparison.cells}
    cells = {names[model]: row for model, row in comparison.cells.items()}
    named = replace(comparison, cells=cells, reference=names[comparison.reference])
    whole, narrow = (tables.as_markdown(named, {}, width) for width in (None, 80))
    for shown in (whole, narrow):
        rows = " ".join(line for line in shown.splitlines() if r"soup\|" in line)
        assert "+75.0 [" in rows and "+25.0 [0.0, +75.0] covers 0" in rows and "75.0 ± 21.7" in rows
    assert whole.count("| model |") == 2 and narrow.count("| model") > 4
    assert max(len(line) for line in narrow.splitlines() if line.startswith("|")) <= 80
    assert r"\ldots{}" in tables.as_latex(named, {})
