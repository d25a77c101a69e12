"""Scores and differences as text: per cent, points, and intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.statistics import Estimate

if TYPE_CHECKING:
    from evaluation.comparison import Cell


def with_error(estimate: Estimate) -> str:
    """Return `75.0 ± 2.1`, in per cent."""
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.standard_error:.1f}"


def difference_text(cell: Cell) -> str:
    """Return a cell's difference in points, with its interval and a word where that covers zero."""
    gain = cell.difference
    assert gain is not None
    if gain.identical:
        return "same answers"
    if gain.low is None or gain.high is None:
        return f"{points(gain.mean)} [too few items]"
    shown = with_interval(gain.mean, gain.low, gain.high)
    return f"{shown} covers 0" if gain.covers_zero else shown


def with_interval(
    mean: float, low: float, high: float, scale: float = 100.0, digits: int = 1
) -> str:
    """Return `+1.2 [−0.3, +2.7]`, in points unless `scale` says otherwise."""
    ends = f"{points(low, scale, digits)}, {points(high, scale, digits)}"
    return f"{points(mean, scale, digits)} [{ends}]"


def points(fraction: float, scale: float = 100.0, digits: int = 1) -> str:
    """Return a signed number of points, and never "−0.0"."""
    rounded = round(scale * fraction, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
