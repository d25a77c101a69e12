"""Statistics against SciPy and hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics

ALONE = {"a": [f"a{i}" for i in range(200)]}


def zeros_and_ones(share: float, number: int = 200, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(number) < share).astype(float)


def test_one_task_of_independent_items_is_the_binomial_error():
    right = zeros_and_ones(0.7)
    estimate = statistics.estimate({"a": right}, ALONE)
    assert estimate.mean == right.mean()
    assert estimate.standard_error == pytest.approx(stats.sem(right, ddof=0))
    assert estimate.standard_error == pytest.approx(
        math.sqrt(right.mean() * (1 - right.mean()) / 200)
    )


def test_tasks_weigh_the_same_and_their_errors_add_in_squares():
    values = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0, 1.0, 0.0])}
    estimate = statistics.estimate(values, {"a": ["1", "2"], "b": ["3", "4", "5", "6"]})
    assert estimate.mean == pytest.approx((0.5 + 0.75) / 2)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.25 / 2 + 0.1875 / 4) / 2)


def test_the_same_questions_in_a_second_language_add_no_precision():
    right, other = zeros_and_ones(0.7), zeros_and_ones(0.5, seed=1)
    clusters = {"a": ALONE["a"], "b": ALONE["a"]}
    once = statistics.difference({"a": right - other}, ALONE)
    twice = statistics.difference({"a": right - other, "b": right - other}, clusters)
    apart = statistics.difference(
        {"a": right - other, "b": right - other}, {**ALONE, "b": [f"b{i}" for i in range(200)]}
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / math.sqrt(2), rel=0.1)
    error = statistics.estimate({"a": right, "b": right}, clusters).standard_error
    assert error == pytest.approx(statistics.estimate({"a": right}, ALONE).standard_error)


def test_the_interval_is_scipys():
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


def test_the_interval_of_a_group_agrees_with_the_standard_error():
    gains = {
        "a": zeros_and_ones(0.6) - zeros_and_ones(0.5, seed=1),
        "b": -zeros_and_ones(0.2, 50, seed=2),
    }
    # 20 clusters have both tasks.
    clusters = {**ALONE, "b": [f"a{i}" if i < 20 else f"b{i}" for i in range(50)]}
    ours = statistics.difference(gains, clusters)
    reach = 1.96 * statistics.estimate(gains, clusters).standard_error
    assert (ours.low, ours.high) == pytest.approx((ours.mean - reach, ours.mean + reach), abs=0.01)


def test_equal_answers_are_no_certainty():
    same = statistics.difference({"a": np.zeros(200)}, ALONE)
    assert same.identical and same.low is None and same.covers_zero
    single = statistics.difference({"a": np.ones(1)}, {"a": ["x"]})
    assert single.covers_zero is None  # no interval


def test_a_single_cluster_joins_a_stratum_that_covers_it():
    gains = {"a": zeros_and_ones(0.5, 40) - 0.2, "b": zeros_and_ones(0.5, 41, seed=3)}
    clusters = {"a": [f"x{i}" for i in range(40)], "b": [f"x{i}" for i in range(41)]}
    [stratum] = statistics._strata(gains, clusters)
    assert len(stratum) == 41 and statistics.difference(gains, clusters).low is not None


def test_mcnemar_by_hand():
    model = np.array([1.0] * 8 + [0.0] + [1.0] * 11)
    reference = np.array([0.0] * 8 + [1.0] + [1.0] * 11)
    assert statistics.mcnemar(model, reference) == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.mcnemar(model, model) == 1.0
    assert statistics.mcnemar(model / 2, reference) is None


def test_runs_by_hand():
    estimate, reach = statistics.over_runs([0.1, 0.2, 0.3], 0.0)
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert reach == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    interval = stats.t.interval(0.95, 2, 0.2, 0.1 / math.sqrt(3))
    assert (0.2 - reach, 0.2 + reach) == pytest.approx(interval)
    error = statistics.over_runs([0.1, 0.2, 0.3], 0.04)[0].standard_error
    assert error == pytest.approx(math.sqrt(0.01 / 3 + 0.04**2))
