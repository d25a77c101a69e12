"""What can be known before merging, and how well it predicts the gain out of distribution.

Each fine-tune of each seed is a case. A straight line through one number is fitted on some cases
and tested on others: on other seeds of the same worlds, and on a world that it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.evidence import page, panels
from evaluation.evidence.collect import Seed
from evaluation.evidence.paper import MODES, edited
from evaluation.evidence.subjects import EVERY, Subject, world_of
from evaluation.suite import GroupName

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One fine-tune of one seed.

    Attributes:
        world: what the seed's file begins with.
        seed: its number.
        known: what can be known before merging, by name.
        gains: OOD of the edited model minus OOD of the fine-tuned one, in points, by mode.
    """

    world: str
    seed: int
    known: dict[str, float]
    gains: dict[str, float]


GAP = "OOD of pretrained − of fine-tuned"
LEARNED = "ID of fine-tuned − of pretrained"
CONSTANT = "nothing: the mean of the others"


def cases(worlds: Mapping[str, Sequence[Seed]]) -> list[Case]:
    """Return all cases."""
    return [_case(seed, s) for s in EVERY for seed in worlds[s.stem]]


def _case(seed: Seed, s: Subject) -> Case:
    def difference(model: str, reference: str, group: GroupName) -> float:
        own, other = (seed.score(s.suite, name, group) for name in (model, reference))
        return 100 * (own - other)

    known = {
        GAP: difference(s.base, s.tuned, "OOD"),
        LEARNED: difference(s.tuned, s.base, "ID"),
        **_of_weights(seed, s),
    }
    gains = {m: difference(s.named(f"monosoup_{x}"), s.tuned, "OOD") for m, x in MODES.items()}
    return Case(s.stem, seed.seed, known, gains)


def _of_weights(seed: Seed, s: Subject) -> dict[str, float]:
    """Return what `inspect` sees, medians over the matrices that are edited."""
    free, fixed = edited(seed, s, "freevariance"), edited(seed, s, "variance")

    def median(values: Iterable[float | None]) -> float:  # no ‖ΔW‖/‖W0‖ of a head of zeros
        return float(np.median([value for value in values if value is not None]))

    return {
        "log₁₀ of ‖ΔW‖/‖W0‖": float(np.log10(median(r.rel_update for r in free))),
        "effective rank, share of the rank": median(
            r.effective_rank / r.rank if r.effective_rank and r.rank else None for r in free
        ),
        "λ_low, freevariance": median(r.lambda_low for r in free),
        "λ_high, variance": median(r.lambda_high for r in fixed),
    }


Predictor = Callable[[Sequence[Case], Sequence[Case], str], Numbers]
"""Fits on the first cases and predicts the gains of a mode for the second, in points."""


def _line(name: str) -> Predictor:
    def predict(fitted: Sequence[Case], tested: Sequence[Case], mode: str) -> Numbers:
        slope, offset = np.polyfit([c.known[name] for c in fitted], _gains(fitted, mode), 1)
        return offset + slope * np.array([c.known[name] for c in tested])

    return predict


def _share(fitted: Sequence[Case], tested: Sequence[Case], mode: str) -> Numbers:
    """Predict the same share of the gap for all."""
    return share(fitted, mode) * np.array([c.known[GAP] for c in tested])


def share(fitted: Sequence[Case], mode: str) -> float:
    """Return the share of the gap that the edit brings back, by least squares."""
    gap = np.array([c.known[GAP] for c in fitted])
    return float(gap @ _gains(fitted, mode) / (gap @ gap))


def _mean(fitted: Sequence[Case], tested: Sequence[Case], mode: str) -> Numbers:
    return np.full(len(tested), _gains(fitted, mode).mean())


def _gains(chosen: Sequence[Case], mode: str) -> Numbers:
    return np.array([case.gains[mode] for case in chosen])


def predictors(found: Sequence[Case]) -> dict[str, Predictor]:
    """Return the rules that are tried, by what they know."""
    lines = {name: _line(name) for name in found[0].known}
    return {CONSTANT: _mean, f"{GAP}: a share of it": _share, **lines}


@dataclass(frozen=True)
class Test:
    """How far off a rule is on cases that it was not fitted on.

    Attributes:
        error: root mean square, points.
        right: share of cases in which the sign of the gain is the predicted one.
    """

    error: float
    right: float


def test(found: Sequence[Case], predict: Predictor, mode: str, fold: Callable[[Case], object]
         ) -> Test:  # fmt: skip
    """Predict every fold from the others."""
    errors: list[float] = []
    right: list[bool] = []
    for held_out in dict.fromkeys(map(fold, found)):
        tested = [case for case in found if fold(case) == held_out]
        predicted = predict([c for c in found if fold(c) != held_out], tested, mode)
        gained = _gains(tested, mode)
        errors += list(predicted - gained)
        right += list((predicted > 0) == (gained > 0))
    return Test(float(np.sqrt(np.mean(np.square(errors)))), float(np.mean(right)))


FOLDS: dict[str, Callable[[Case], object]] = {
    "other seeds": lambda case: case.seed,
    "another world": lambda case: case.world,
}


def table(found: Sequence[Case]) -> str:
    """Return how many cases there are, and the errors of all rules as a table in Markdown."""
    rows = [[name, *_row(found, predict)] for name, predict in predictors(found).items()]
    header = ["known before merging"] + [f"{mode}, {fold}" for mode in MODES for fold in FOLDS]
    return f"{len(found)} cases.\n\n{page.table(header, rows)}"


def _row(found: Sequence[Case], predict: Predictor) -> Iterator[str]:
    for mode in MODES:
        for fold in FOLDS.values():
            result = test(found, predict, mode, fold)
            yield f"{result.error:.1f}; {result.right:.0%}"


def rule(found: Sequence[Case]) -> str:
    """Return the shares of the gap that the edit brings back, fitted on each world and on all."""
    worlds = _by_world(found)
    rows = []
    for mode in MODES:
        by_world = [share(own, mode) for own in worlds.values()]
        rows.append([mode, *(f"{s:.2f}" for s in (*by_world, share(found, mode)))])
    return page.table(["share of the gap", *worlds, "all"], rows)


def figure(found: Sequence[Case]) -> Any:
    """Return the gain against the gap: a dot for each case, and the share that fits all."""
    drawn, axes = panels.grid(len(MODES), (9.6, 3.8))
    for axis, mode in zip(axes, MODES, strict=True):
        for marker, (world, own) in zip(cycle("os^"), _by_world(found).items(), strict=False):
            gaps = [case.known[GAP] for case in own]
            axis.plot(gaps, _gains(own, mode), marker, label=world, alpha=0.6, markersize=5)
        ends = np.array(axis.get_xlim())
        slope = share(found, mode)
        axis.plot(ends, slope * ends, "--", color="black", label=f"{slope:.2f} of the gap")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlim=ends, xlabel=f"{GAP}, points", ylabel="OOD gain, points", title=mode)
        axis.legend(frameon=False, loc="upper left")
    return drawn


def _by_world(found: Sequence[Case]) -> dict[str, list[Case]]:
    """Return the cases of each world, by its name in tables."""
    worlds: dict[str, list[Case]] = {}
    for case in found:
        worlds.setdefault(world_of(case.world), []).append(case)
    return worlds
