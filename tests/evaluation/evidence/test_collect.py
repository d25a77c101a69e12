"""The JSON of a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import write
from scipy import stats

from evaluation.evidence import collect
from evaluation.sources import Merge
from evaluation.store import DamagedError


def made_seed(
    folder: Path, seed: int, outcomes: dict[str, dict[str, list[int]]], **extra: Any
) -> collect.Seed:
    for model, by_task in outcomes.items():
        write(
            folder / f"results-{seed}",
            model,
            by_task,
            merge=Merge({"base_model": f"{folder.resolve()}/pretrained"}),
        )
    answers = collect.suite_results(folder / f"results-{seed}", "made", folder)
    path = folder / f"seed-{seed}.json"
    path.write_text(json.dumps({"seed": seed, "suites": {"made": answers.model_dump()}, **extra}))
    return collect.Seed.read(path)


def test_answers_and_clusters_come_back(tmp_path):
    right = {"a": [1, 0, 1, 1, 0, 0, 1, 0, 1], "b": [0, 0], "c": [1, 1, 0]}
    seed = made_seed(tmp_path, 0, {"m": right})
    read = {**seed.outcomes("made", "m", "ID"), **seed.outcomes("made", "m", "OOD")}
    assert {task: values.tolist() for task, values in read.items()} == right
    assert {task: len(set(names)) for task, names in seed.clusters("made", "OOD").items()} == {
        "b": 2,
        "c": 3,
    }
    assert seed.score("made", "m", "ID") == pytest.approx(5 / 9)
    assert seed.score("made", "m", "OOD") == pytest.approx((0 + 2 / 3) / 2)  # tasks weigh equally


def test_no_path_of_a_machine_is_kept(tmp_path):
    seed = made_seed(tmp_path, 0, {"m": {"a": [1], "b": [1], "c": [1]}})
    assert str(tmp_path) not in seed.path.read_text()
    assert seed.content.suites["made"].models["m"].config == {"base_model": "pretrained"}


def test_models_that_were_asked_other_questions_are_not_put_together(tmp_path):
    write(tmp_path / "r", "m", {"a": [1], "b": [1], "c": [1]})
    write(tmp_path / "r", "n", {"a": [1], "b": [1], "c": [1]}, item="other")
    with pytest.raises(DamagedError, match="other items"):
        collect.suite_results(tmp_path / "r", "made", tmp_path)


def test_an_effect_is_the_mean_over_seeds_with_students_interval(tmp_path):
    ones = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    seeds = [
        made_seed(
            tmp_path,
            n,
            {"m": {"a": [1, 1, 1, 1], "b": [1], "c": [1]}, "r": {"a": a, "b": [1], "c": [1]}},
        )
        for n, a in enumerate(ones)
    ]
    effect = collect.effect(seeds, "made", "m", "r", "ID")
    assert effect.by_seed == (0.5, 0.75, 0.25)
    expected = stats.ttest_1samp(effect.by_seed, 0).confidence_interval(0.95)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
