"""Means with standard errors, and paired differences with intervals, from outcomes per item.

All are fractions of 1. `values` are the outcomes of one model by task, `clusters` the clusters of
the same items: items about the same thing (one question in eight languages) are drawn together,
since counting them as independent promises too much precision. A group's score is the unweighted
mean of its tasks' means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = Mapping[str, NDArray[np.float64]]
Clusters = Mapping[str, Sequence[str]]

# The end points of a 95 % interval then vary by some 3 % of its width from seed to seed.
RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both as fractions of 1."""

    mean: float
    standard_error: float

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the normal interval around the mean."""
        reach = float(stats.norm.ppf(0.5 + confidence / 2)) * self.standard_error
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % interval, fractions of 1.

    `low` and `high` are None where no interval can be had; `identical`: equal on every item.
    """

    mean: float
    low: float | None
    high: float | None
    identical: bool = False

    @property
    def covers_zero(self) -> bool | None:
        """Whether zero lies in the interval; None where there is none."""
        if self.identical:
            return True
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def estimate(values: Values, clusters: Clusters) -> Estimate:
    """Return the unweighted mean of the tasks' means, with its standard error over the items.

    Item i of task k of K moves the mean by (v_i − mean_k) / (K n_k); moves are summed within
    clusters, then squared. For one task without clusters this is √(variance/n), for 0/1 outcomes
    the binomial √(p(1−p)/n).
    """
    moves: dict[str, float] = {}
    for task, outcomes in values.items():
        centred = (outcomes - outcomes.mean()) / (len(values) * len(outcomes))
        for cluster, move in zip(clusters[task], centred, strict=True):
            moves[cluster] = moves.get(cluster, 0.0) + float(move)
    mean = float(np.mean([outcomes.mean() for outcomes in values.values()]))
    return Estimate(mean, float(np.sqrt(sum(move**2 for move in moves.values()))))


def paired(model: Values, reference: Values) -> dict[str, NDArray[np.float64]]:
    """Return the differences of two models' outcomes on the same items, by task."""
    return {task: model[task] - reference[task] for task in reference}


def difference(differences: Values, clusters: Clusters, seed: int = 0) -> Difference:
    """Return the mean paired difference with its percentile bootstrap interval.

    Clusters are drawn, not items.
    """
    mean = float(np.mean([d.mean() for d in differences.values()]))
    if not any(d.any() for d in differences.values()):
        # A bootstrap would answer [0, 0], a certainty that no finite test gives.
        return Difference(mean, None, None, identical=True)
    strata = _strata(differences, clusters)
    if any(len(stratum) < 2 for stratum in strata):
        return Difference(mean, None, None)
    width = len(differences)

    def statistic(*drawn: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        # Row i of a stratum: the sums over tasks of cluster i, then its numbers of items.
        totals = np.asarray(
            sum(stratum[i].sum(axis=-2) for stratum, i in zip(strata, drawn, strict=True))
        )
        return np.asarray((totals[..., :width] / totals[..., width:]).mean(axis=-1))

    result = stats.bootstrap(
        tuple(np.arange(len(stratum)) for stratum in strata),
        statistic,
        n_resamples=RESAMPLES,
        batch=50,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Difference(
        mean, float(result.confidence_interval.low), float(result.confidence_interval.high)
    )


def _strata(differences: Values, clusters: Clusters) -> list[NDArray[np.float64]]:
    """Return the strata of clusters that have items in the same tasks, as arrays.

    Each is (clusters, 2·tasks): sums of the outcomes per task, then numbers of items per task.
    Drawn within such strata, every resample has items of every task.
    """
    width = len(differences)
    sums: dict[str, NDArray[np.float64]] = {}
    for column, (task, outcomes) in enumerate(differences.items()):
        for cluster, outcome in zip(clusters[task], outcomes, strict=True):
            row = sums.setdefault(cluster, np.zeros(2 * width))
            row[column] += outcome
            row[width + column] += 1
    groups: dict[tuple[bool, ...], list[NDArray[np.float64]]] = {}
    for row in sums.values():
        groups.setdefault(tuple(row[width:] > 0), []).append(row)
    # A single cluster cannot be resampled by itself; it joins the largest stratum that covers its
    # tasks.
    for signature in [signature for signature, rows in groups.items() if len(rows) < 2]:
        covering = [
            s
            for s in groups
            if s != signature and all(b or not a for a, b in zip(signature, s, strict=True))
        ]
        if covering:
            groups[max(covering, key=lambda s: len(groups[s]))] += groups.pop(signature)
    return [np.stack(rows) for rows in groups.values()]


def mcnemar(model: NDArray[np.float64], reference: NDArray[np.float64]) -> float | None:
    """Return the exact two-sided p-value for 0/1 outcomes of two models on the same items.

    Items have to be independent. None if outcomes are not 0 and 1.
    """
    if not np.isin(np.concatenate([model, reference]), (0.0, 1.0)).all():
        return None
    gained, lost = int((model > reference).sum()), int((model < reference).sum())
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def over_runs(means: Sequence[float], within: float) -> tuple[Estimate, float]:
    """Return the mean of several runs with its standard error, and half its 95 % interval.

    The spread of the runs gives the variance s²/S, with Student's t on S − 1 degrees of freedom.
    `within` is the standard error over items that all runs share, and is added in squares, since
    such runs do not sample items: that counts some noise twice and is never too small (Owen &
    Eckles, 2012). For runs with items of their own it is 0.
    """
    runs = np.asarray(means, dtype=np.float64)
    spread = float(np.sqrt(runs.var(ddof=1) / len(runs) + within**2))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(runs) - 1)) * spread
    return Estimate(float(runs.mean()), spread), reach
