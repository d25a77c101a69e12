"""Comparisons of results whose every number is known."""

from __future__ import annotations

import math

import pytest
from helpers import evaluations
from helpers.evaluations import SOUP, TUNED, merge_of
from scipy import stats

from evaluation import store, tables
from evaluation.comparison import ComparisonError, compare


def test_every_number_by_hand(folder):
    [comparison] = compare([folder])
    assert list(comparison.cells) == ["pretrained", "finetuned", "soup"]
    assert [column.header for column in comparison.columns] == ["a", "b", "c", "OOD average"]
    means = {
        model: [cell.estimate.mean for cell in cells] for model, cells in comparison.cells.items()
    }
    assert means == {
        "pretrained": [0, 1, 1, 1],
        "finetuned": [0.75, 0.25, 0.25, 0.25],
        "soup": [0.75, 1, 0.5, 0.75],
    }
    errors = [cell.estimate.standard_error for cell in comparison.cells["finetuned"]]
    assert errors == pytest.approx([math.sqrt(0.1875 / 4)] * 3 + [math.sqrt(2 * 0.1875 / 4) / 2])
    gains = [cell.difference for cell in comparison.cells["soup"]]
    assert [gain.mean for gain in gains] == [0, 0.75, 0.25, 0.5]
    assert [gain.covers_zero for gain in gains] == [True, False, True, False] and gains[0].identical
    # 3 gained of 3: 2/2³.
    assert [cell.p_value for cell in comparison.cells["soup"]] == [1.0, 0.25, 1.0, None]
    assert all(cell.difference is None for cell in comparison.cells["finetuned"])


def test_another_reference(folder):
    [comparison] = compare([folder], "pretrained")
    gains = [cell.difference.mean for cell in comparison.cells["finetuned"]]
    assert gains == [0.75, -0.75, -0.75, -0.75]
    with pytest.raises(ComparisonError, match="no model named best"):
        compare([folder], "best")


def test_answers_to_other_questions_are_not_paired(folder, capsys):
    evaluations.write(folder, "other", SOUP, item="new")
    assert tables.main([str(folder)]) == 1
    assert (
        "other and finetuned were asked different items (4 and 4) in a" in capsys.readouterr().err
    )
    evaluations.write(folder, "other", {**SOUP, "b": [1, 1]})
    with pytest.raises(ComparisonError, match=r"different items \(2 and 4\) in b"):
        compare([folder])


def test_another_version_of_the_suite_is_not_compared(folder):
    evaluations.write(folder, "soup", SOUP, made=evaluations.suite(version=2))
    with pytest.raises(ComparisonError, match="different versions"):
        compare([folder])


def test_damage_is_found(folder, capsys):
    samples = folder / "soup.made.samples.jsonl.gz"
    samples.write_bytes((folder / "finetuned.made.samples.jsonl.gz").read_bytes())
    assert tables.main([str(folder)]) == 1
    assert "not the answers that soup.made.json was made from" in capsys.readouterr().err
    with pytest.raises(store.DamagedError):
        store.read(folder)


def test_settings_compared_on_a_public_test_set(folder):
    def merge(R):
        return merge_of("monosoup", R=R, report=f"{R}.jsonl")

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


def test_other_settings_and_another_w0_are_warned_of(folder):
    evaluations.write(folder, "soup", SOUP, weights="e" * 64, limit=4)
    warnings = " ".join(compare([folder])[0].warnings)
    assert "different W0" in warnings and "Only 4 items" in warnings
    assert "different limit: 4, None" in warnings
    merge = merge_of("monosoup", inputs={"base": "0" * 64})
    evaluations.write(folder, "soup", SOUP, merge=merge)
    assert "not the W0" in " ".join(compare([folder])[0].warnings)


def test_what_else_differed_is_warned_of(folder):
    evaluations.write(folder, "soup", SOUP, torch="2.9.0")
    assert "different versions of torch: 2.13.0, 2.9.0" in " ".join(compare([folder])[0].warnings)


def test_one_folder_is_one_suite(folder):
    """Several folders may differ in seed and world; models of one were asked the same."""
    evaluations.write(folder, "soup", SOUP, made=evaluations.suite(seed=2))
    with pytest.raises(ComparisonError, match="different versions"):
        compare([folder])


def test_what_not_every_folder_has_is_named(folder, tmp_path):
    other = tmp_path / "other"
    for model in ("pretrained", "finetuned"):
        evaluations.write(other, model, TUNED, item="other")
    evaluations.write(other, "finetuned", TUNED, made=evaluations.suite(name="more"))
    assert [w for w in compare([folder, other])[0].warnings if "Left out" in w] == [
        "Left out, for not every folder has them: soup.",
        "Left out, for not every folder has them: the suites more.",
    ]


def test_a_folder_is_one_run(folder):
    with pytest.raises(ComparisonError, match="given twice"):
        compare([folder, folder / "."])


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
        error = 0.25 / math.sqrt(3)
        assert cell.estimate.mean == 0.5
        assert cell.estimate.standard_error == pytest.approx(error)
        ends = cell.difference.low, cell.difference.high
        assert ends == pytest.approx(stats.t.interval(0.95, 2, 0.5, error))
        assert cell.difference.covers_zero
        assert "3 runs" in comparison.notes[-1] and "items of its own" in comparison.notes[-1]

    def test_shared_items_count_too(self, tmp_path):
        for run in range(3):
            evaluations.write(tmp_path / str(run), "finetuned", TUNED)
            evaluations.write(tmp_path / str(run), "soup", SOUP)
        [comparison] = compare([tmp_path / str(run) for run in range(3)])
        # The runs do not differ, so all of the error is that of the items.
        cell = comparison.cells["soup"][2]
        assert cell.estimate.standard_error == pytest.approx(math.sqrt(0.25 / 4))
        assert comparison.cells["soup"][0].difference.identical
        assert "which all runs share" in comparison.notes[-1]
