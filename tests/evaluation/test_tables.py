"""Statistics against SciPy and hand calculation; tables against results whose every number is known."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import yaml
from helpers import evaluations
from scipy import stats

from evaluation import statistics, store, tables
from evaluation.comparison import ComparisonError, compare
from evaluation.suite import load

ALONE = {"a": [f"a{i}" for i in range(200)]}


def zeros_and_ones(share: float, number: int = 200, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(number) < share).astype(float)


class TestStatistics:
    def test_one_task_of_independent_items_is_the_binomial_error(self):
        right = zeros_and_ones(0.7)
        estimate = statistics.estimate({"a": right}, ALONE)
        assert estimate.mean == right.mean()
        assert estimate.standard_error == pytest.approx(stats.sem(right, ddof=0))
        assert estimate.standard_error == pytest.approx(
            math.sqrt(right.mean() * (1 - right.mean()) / 200)
        )

    def test_tasks_weigh_the_same_and_their_errors_add_in_squares(self):
        values = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0, 1.0, 0.0])}
        estimate = statistics.estimate(values, {"a": ["1", "2"], "b": ["3", "4", "5", "6"]})
        assert estimate.mean == pytest.approx((0.5 + 0.75) / 2)
        assert estimate.standard_error == pytest.approx(math.sqrt(0.25 / 2 + 0.1875 / 4) / 2)

    def test_the_same_questions_in_a_second_language_add_no_precision(self):
        right, other = zeros_and_ones(0.7), zeros_and_ones(0.5, seed=1)
        clusters = {"a": ALONE["a"], "b": ALONE["a"]}
        once = statistics.difference({"a": right - other}, ALONE)
        twice = statistics.difference({"a": right - other, "b": right - other}, clusters)
        apart = statistics.difference(
            {"a": right - other, "b": right - other}, {**ALONE, "b": [f"b{i}" for i in range(200)]}
        )
        assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
        assert apart.high - apart.low == pytest.approx(
            (once.high - once.low) / math.sqrt(2), rel=0.1
        )
        error = statistics.estimate({"a": right, "b": right}, clusters).standard_error
        assert error == pytest.approx(statistics.estimate({"a": right}, ALONE).standard_error)

    def test_the_interval_is_scipys(self):
        gains = zeros_and_ones(0.7) - zeros_and_ones(0.5, seed=1)
        ours = statistics.difference({"a": gains}, ALONE, seed=5)
        theirs = stats.bootstrap(
            (gains,),
            np.mean,
            n_resamples=statistics.RESAMPLES,
            batch=50,
            method="percentile",
            rng=np.random.default_rng(5),
        ).confidence_interval
        assert ours.mean == gains.mean() and not ours.covers_zero
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs))
        normal = stats.norm.interval(0.95, gains.mean(), stats.sem(gains))
        assert (ours.low, ours.high) == pytest.approx(normal, abs=0.01)

    def test_the_interval_of_a_group_agrees_with_the_standard_error(self):
        gains = {
            "a": zeros_and_ones(0.6) - zeros_and_ones(0.5, seed=1),
            "b": -zeros_and_ones(0.2, 50, seed=2),
        }
        clusters = {
            **ALONE,
            "b": [f"a{i}" if i < 20 else f"b{i}" for i in range(50)],
        }  # 20 clusters have both tasks
        ours = statistics.difference(gains, clusters)
        reach = 1.96 * statistics.estimate(gains, clusters).standard_error
        assert (ours.low, ours.high) == pytest.approx(
            (ours.mean - reach, ours.mean + reach), abs=0.01
        )

    def test_equal_answers_are_no_certainty(self):
        same = statistics.difference({"a": np.zeros(200)}, ALONE)
        assert same.identical and same.low is None and same.covers_zero
        assert (
            statistics.difference({"a": np.ones(1)}, {"a": ["x"]}).covers_zero is None
        )  # one item: no interval

    def test_a_single_cluster_joins_a_stratum_that_covers_it(self):
        gains = {"a": zeros_and_ones(0.5, 40) - 0.2, "b": zeros_and_ones(0.5, 41, seed=3)}
        clusters = {"a": [f"x{i}" for i in range(40)], "b": [f"x{i}" for i in range(41)]}
        [stratum] = statistics._strata(gains, clusters)
        assert len(stratum) == 41 and statistics.difference(gains, clusters).low is not None

    def test_mcnemar_by_hand(self):
        model, reference = (
            np.array([1.0] * 8 + [0.0] + [1.0] * 11),
            np.array([0.0] * 8 + [1.0] + [1.0] * 11),
        )
        assert statistics.mcnemar(model, reference) == pytest.approx(2 * (1 + 9) / 2**9)
        assert statistics.mcnemar(model, model) == 1.0
        assert statistics.mcnemar(model / 2, reference) is None

    def test_runs_by_hand(self):
        estimate, reach = statistics.over_runs([0.1, 0.2, 0.3], 0.0)
        assert estimate.mean == pytest.approx(0.2)
        assert estimate.standard_error == pytest.approx(0.1 / math.sqrt(3))
        assert reach == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
        assert (0.2 - reach, 0.2 + reach) == pytest.approx(
            stats.t.interval(0.95, 2, 0.2, 0.1 / math.sqrt(3))
        )
        assert statistics.over_runs([0.1, 0.2, 0.3], 0.04)[0].standard_error == pytest.approx(
            math.sqrt(0.01 / 3 + 0.04**2)
        )


TUNED = {"a": [1, 1, 1, 0], "b": [0, 0, 0, 1], "c": [1, 0, 0, 0]}
SOUP = {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1], "c": [1, 1, 0, 0]}


class TestTables:
    @pytest.fixture
    def folder(self, tmp_path):
        evaluations.write(tmp_path, "finetuned", TUNED)
        evaluations.write(tmp_path, "soup", SOUP)
        evaluations.write(
            tmp_path, "pretrained", {"a": [0, 0, 0, 0], "b": [1, 1, 1, 1], "c": [1, 1, 1, 1]}
        )
        return tmp_path

    def test_every_number_by_hand(self, folder):
        [comparison] = compare([folder])
        assert list(comparison.cells) == ["pretrained", "finetuned", "soup"]
        assert [column.header for column in comparison.columns] == ["a", "b", "c", "OOD average"]
        means = {
            model: [cell.estimate.mean for cell in cells]
            for model, cells in comparison.cells.items()
        }
        assert means == {
            "pretrained": [0, 1, 1, 1],
            "finetuned": [0.75, 0.25, 0.25, 0.25],
            "soup": [0.75, 1, 0.5, 0.75],
        }
        errors = [cell.estimate.standard_error for cell in comparison.cells["finetuned"]]
        assert errors == pytest.approx(
            [math.sqrt(0.1875 / 4)] * 3 + [math.sqrt(2 * 0.1875 / 4) / 2]
        )
        gains = [cell.difference for cell in comparison.cells["soup"]]
        assert [gain.mean for gain in gains] == [0, 0.75, 0.25, 0.5]
        assert [gain.covers_zero for gain in gains] == [True, False, True, False] and gains[
            0
        ].identical
        assert [cell.p_value for cell in comparison.cells["soup"]] == [
            1.0,
            0.25,
            1.0,
            None,
        ]  # 3 gained of 3: 2/2³
        assert all(cell.difference is None for cell in comparison.cells["finetuned"])

    def test_markdown(self, folder, capsys):
        assert tables.main([str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "| finetuned | 75.0 ± 21.7 | 25.0 ± 21.7 | 25.0 ± 21.7 | 25.0 ± 15.3 |" in shown
        gains = next(
            line for line in shown.split("Difference")[1].splitlines() if line.startswith("| soup")
        )
        cells = [cell.strip() for cell in gains.strip("|").split("|")]
        assert (
            cells[1] == "same answers"
            and cells[2].startswith("+75.0 [")
            and not cells[2].endswith("covers 0")
        )
        assert cells[3] == "+25.0 [0.0, +75.0] covers 0"
        assert "| finetuned" not in shown.split("Difference")[1]
        assert "W0 (pretrained): some/base, weights ffffffffffff." in shown

    def test_csv_has_the_same_numbers_unrounded(self, folder, capsys):
        assert tables.main([str(folder), "--csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert len(rows) == 3 * 4
        row = next(row for row in rows if (row["model"], row["column"]) == ("soup", "c"))
        assert (float(row["mean"]), float(row["difference"]), row["covers_zero"]) == (
            0.5,
            0.25,
            "True",
        )
        assert float(row["mcnemar_p"]) == 1.0 and row["items"] == "4"

    def test_latex_escapes_what_latex_reads(self, folder, capsys):
        evaluations.write(folder, "soup_R0.8", SOUP)
        assert tables.main([str(folder), "--latex"]) == 0
        shown = capsys.readouterr().out
        assert shown.count(r"\begin{tabular}{lrrrr}") == shown.count(r"\end{tabular}") == 2
        body = [line for line in shown.splitlines() if not line.startswith("%")]
        assert any(
            line.startswith(r"soup\_R0.8 & 75.0 $\pm$ 21.7 &") and line.endswith(r"\\")
            for line in body
        )
        assert not any("±" in line or "−" in line or " [" in line for line in body)

    def test_another_reference(self, folder):
        [comparison] = compare([folder], "pretrained")
        assert [cell.difference.mean for cell in comparison.cells["finetuned"]] == [
            0.75,
            -0.75,
            -0.75,
            -0.75,
        ]
        with pytest.raises(ComparisonError, match="no model named best"):
            compare([folder], "best")

    def test_answers_to_other_questions_are_not_paired(self, folder, capsys):
        evaluations.write(folder, "other", SOUP, item="new")
        assert tables.main([str(folder)]) == 1
        assert (
            "other and finetuned were asked different items (4 and 4) in a"
            in capsys.readouterr().err
        )
        evaluations.write(folder, "other", {**SOUP, "b": [1, 1]})
        with pytest.raises(ComparisonError, match=r"different items \(2 and 4\) in b"):
            compare([folder])

    def test_another_version_of_the_suite_is_not_compared(self, folder):
        evaluations.write(folder, "soup", SOUP, made=evaluations.suite(version=2))
        with pytest.raises(ComparisonError, match="different versions"):
            compare([folder])

    def test_damage_is_found(self, folder, capsys):
        samples = folder / "soup.made.samples.jsonl.gz"
        samples.write_bytes((folder / "finetuned.made.samples.jsonl.gz").read_bytes())
        assert tables.main([str(folder)]) == 1
        assert "not the answers that soup.made.json was made from" in capsys.readouterr().err
        with pytest.raises(store.DamagedError):
            store.read(folder)

    def test_settings_compared_on_a_public_test_set(self, folder):
        def merge(R):
            return {
                "config": {
                    "merge_method": "monosoup",
                    "parameters": {"R": R, "report": f"{R}.jsonl"},
                },
                "inputs": {},
            }

        evaluations.write(folder, "soup", SOUP, merge=merge(0.8))
        assert compare([folder])[0].warnings == []
        evaluations.write(folder, "soup2", SOUP, merge=merge(0.9))
        [warning] = compare([folder])[0].warnings
        assert "Several settings of monosoup" in warning and "tunes on the test set" in warning
        for model in ("pretrained", "finetuned", "soup", "soup2"):
            outcomes = {"pretrained": SOUP, "finetuned": TUNED}.get(model, SOUP)
            made = evaluations.suite(public=False)
            evaluations.write(
                folder,
                model,
                outcomes,
                merge=merge(len(model)) if "soup" in model else None,
                made=made,
            )
        assert compare([folder])[0].warnings == []

    def test_other_settings_and_another_w0_are_said(self, folder):
        evaluations.write(folder, "soup", SOUP, weights="e" * 64, limit=4)
        said = " ".join(compare([folder])[0].warnings)
        assert (
            "different W0" in said
            and "different limit: 4, None" in said
            and "first 4 items" in said
        )
        merge = {
            "config": {"merge_method": "monosoup", "base_model": "b"},
            "inputs": {"b": "0" * 64},
        }
        evaluations.write(folder, "soup", SOUP, merge=merge)
        assert "not the W0" in " ".join(compare([folder])[0].warnings)

    def test_what_else_differed_is_said(self, folder):
        evaluations.write(folder, "soup", SOUP, torch="2.9.0")
        assert "different versions of torch: 2.13.0, 2.9.0" in " ".join(
            compare([folder])[0].warnings
        )

    def test_one_folder_is_one_suite(self, folder):
        """Several folders may differ in seed and world; models of one were asked the same."""
        evaluations.write(folder, "soup", SOUP, made=evaluations.suite(seed=2))
        with pytest.raises(ComparisonError, match="different versions"):
            compare([folder])

    def test_what_not_every_folder_has_is_named(self, folder, tmp_path):
        other = tmp_path / "other"
        for model in ("pretrained", "finetuned"):
            evaluations.write(other, model, TUNED, item="other")
        evaluations.write(other, "finetuned", TUNED, made=evaluations.suite(name="more"))
        assert [w for w in compare([folder, other])[0].warnings if "Left out" in w] == [
            "Left out, for not every folder has them: soup.",
            "Left out, for not every folder has them: the suites more.",
        ]

    def test_a_folder_is_one_run(self, folder):
        with pytest.raises(ComparisonError, match="given twice"):
            compare([folder, folder / "."])

    def test_the_papers_numbers_are_marked(self, tmp_path, capsys):
        made = load("qwen-mgsm")
        for model in ("pretrained", "finetuned"):
            evaluations.write(
                tmp_path, model, {task.task: [1, 0] for task in made.tasks}, made=made, cluster="q"
            )
        assert tables.main([str(tmp_path), "--paper"]) == 0
        shown = capsys.readouterr().out
        assert (
            "| MonoSoup [quoted] | 47.6 | 37.1 | 37.5 | 30.2 | 38.8 | 21.1 | 34.8 | 23.4 |  |"
            in shown
        )
        assert "[quoted]: numbers printed in the paper" in shown
        assert tables.main([str(tmp_path)]) == 0
        assert "quoted" not in capsys.readouterr().out

    def test_the_papers_rows_name_tasks_of_the_suite(self):
        for name, rows in yaml.safe_load(tables.PAPER.read_text()).items():
            for row, numbers in rows.items():
                assert set(numbers) == {task.task for task in load(name).tasks}, (name, row)


class TestRuns:
    """Several folders."""

    def test_items_of_their_own(self, tmp_path):
        for run, extra in enumerate(([0, 0], [1, 0], [1, 1])):
            evaluations.write(
                tmp_path / str(run), "finetuned", {**TUNED, "a": [0, 0, 0, 0]}, item=str(run)
            )
            evaluations.write(
                tmp_path / str(run), "soup", {**SOUP, "a": [1, 0, *extra]}, item=str(run)
            )
        [comparison] = compare([tmp_path / str(run) for run in range(3)])
        cell = comparison.cells["soup"][0]
        assert cell.estimate.mean == 0.5 and cell.estimate.standard_error == pytest.approx(
            0.25 / math.sqrt(3)
        )
        low, high = stats.t.interval(0.95, 2, 0.5, 0.25 / math.sqrt(3))
        assert (cell.difference.low, cell.difference.high) == pytest.approx(
            (low, high)
        ) and cell.difference.covers_zero
        assert "3 runs" in comparison.notes[-1] and "items of its own" in comparison.notes[-1]

    def test_shared_items_count_too(self, tmp_path):
        for run in range(3):
            evaluations.write(tmp_path / str(run), "finetuned", TUNED)
            evaluations.write(tmp_path / str(run), "soup", SOUP)
        [comparison] = compare([tmp_path / str(run) for run in range(3)])
        cell = comparison.cells["soup"][
            2
        ]  # the runs do not differ, so all of the error is that of the items
        assert cell.estimate.standard_error == pytest.approx(math.sqrt(0.25 / 4))
        assert comparison.cells["soup"][0].difference.identical
        assert "which all runs share" in comparison.notes[-1]
