"""Rules of thumb: fitted on some cases, tested on others."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.evidence import prediction
from evaluation.evidence.prediction import GAP, Case

MODE = "variance"


def made(share: dict[str, float], noise: float = 0.0) -> list[Case]:
    """Worlds in which the edit brings back a share of the gap; `other` is a number of chance."""
    random = np.random.default_rng(0)
    return [
        Case(
            world,
            seed,
            {GAP: gap, "other": random.normal()},
            {MODE: by * gap + noise * random.normal()},
        )
        for world, by in share.items()
        for seed, gap in enumerate(np.linspace(-10, 30, 40))
    ]


def error(cases: list[Case], name: str, fold: str) -> prediction.Test:
    return prediction.test(cases, prediction.predictors(cases)[name], MODE, prediction.FOLDS[fold])


def test_what_is_a_share_of_the_gap_is_predicted_exactly():
    cases = made({"a": 0.5, "b": 0.5})
    assert prediction.share(cases, MODE) == pytest.approx(0.5)
    for fold in prediction.FOLDS:
        found = error(cases, f"{GAP}: a share of it", fold)
        assert found.error == pytest.approx(0, abs=1e-9) and found.right == 1
    assert error(cases, prediction.CONSTANT, "another world").error > 5


def test_a_world_is_predicted_from_the_others_alone():
    """b's share is 0.8 and a's is 0.4: each is predicted by the other's."""
    cases = made({"a": 0.4, "b": 0.8})
    gaps = np.array([case.known[GAP] for case in cases])
    expected = 0.4 * np.sqrt(np.mean(gaps**2))
    found = error(cases, f"{GAP}: a share of it", "another world")
    assert found.error == pytest.approx(expected) and found.right == 1


def test_chance_predicts_no_better_than_the_mean():
    cases = made({"a": 0.5, "b": 0.5}, noise=1.0)
    by_chance = error(cases, "other", "other seeds").error
    assert by_chance > 0.9 * error(cases, prediction.CONSTANT, "other seeds").error
    assert error(cases, GAP, "other seeds").error < 2
