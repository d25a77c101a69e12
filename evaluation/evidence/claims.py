"""Claims: numbers of every seed, their means with intervals, and the verdicts that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluation.evidence.collect import Effect, Seed
from evaluation.formatting import points, with_interval

MARGIN = 0.01  # "keeps" a score: the whole interval lies above −1 point

HOLDS, CONTRADICTED, UNDECIDED = "holds here", "contradicted here", "undecided"

Judge = Callable[[Effect], str]
"""Gives the verdict of an effect."""


@dataclass(frozen=True)
class Measurement:
    """One number with its interval, and what it says of the claim that it stands under."""

    label: str
    effect: Effect
    verdict: str | None  # None: shown, not judged
    in_points: bool = True  # else as it is: CKA, shares, areas

    def text(self) -> str:
        """Return the number with its interval."""
        scale, digits = (100.0, 1) if self.in_points else (1.0, 3)
        if self.effect.flat:
            return f"{points(self.effect.mean, scale, digits)} in every seed"
        return with_interval(self.effect.mean, self.effect.low, self.effect.high, scale, digits)


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper makes it, and what was measured of it."""

    text: str
    source: str
    measurements: tuple[Measurement, ...]

    @property
    def verdict(self) -> str:
        """That of all measurements if they agree."""
        verdicts = {m.verdict for m in self.measurements if m.verdict}
        return verdicts.pop() if len(verdicts) == 1 else "mixed"


def more(effect: Effect) -> str:
    """Judge the claim that this is above zero."""
    return HOLDS if effect.low > 0 else CONTRADICTED if effect.high < 0 else UNDECIDED


def less(effect: Effect) -> str:
    """Judge the claim that this is below zero."""
    return {HOLDS: CONTRADICTED, CONTRADICTED: HOLDS}.get(more(effect), UNDECIDED)


def kept(effect: Effect) -> str:
    """Judge the claim that nothing is lost."""
    return HOLDS if effect.low > -MARGIN else CONTRADICTED if effect.high < 0 else UNDECIDED


def at_most(most: float) -> Judge:
    """Return the judge of the claim that this is at most so much."""

    def judge(effect: Effect) -> str:
        return HOLDS if effect.high < most else CONTRADICTED if effect.low > most else UNDECIDED

    return judge


def always(share: Effect) -> str:
    """Judge the claim that this share is one."""
    return HOLDS if share.mean == 1 else CONTRADICTED


def verdict(effect: Effect, judge: Judge | None) -> str | None:
    """Return a judge's verdict; None where nothing is claimed.

    Seeds that agree to the last digit give no interval, and say nothing of the next one.
    """
    if judge is None:
        return None
    return UNDECIDED if effect.flat and judge is not always else judge(effect)


@dataclass(frozen=True)
class Quantity:
    """Something that every seed has a number of, and what a claim says of it."""

    label: str
    value: Callable[[Seed], float]
    judge: Judge | None
    in_points: bool = True

    def measure(self, seeds: Sequence[Seed]) -> Measurement:
        """Return its mean over the seeds, with the verdict."""
        effect = Effect.of([self.value(seed) for seed in seeds])
        return Measurement(self.label, effect, verdict(effect, self.judge), self.in_points)
