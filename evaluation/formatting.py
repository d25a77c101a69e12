"""Scores and differences as text: per cent, points, and intervals; and names of files."""

from __future__ import annotations

import hashlib
import re
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


LONGEST_NAME = 100  # bytes of a name within a file's name, which may have 255


def file_name(name: str) -> str:
    """Return a name that a file of others gives, as a part of a file's name.

    Letters, digits and `_ . , + -` stay; anything else, as a separator of folders, becomes %XX. One
    that is too long ends in a digest; one that begins with a dot would be hidden, or the folder
    itself.
    """
    safe = "".join(
        letter if re.fullmatch(r"[\w.,+-]", letter) else f"%{ord(letter):02X}" for letter in name
    )
    if safe.startswith("."):
        safe = f"%2E{safe[1:]}"
    if len(safe.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        safe = f"{safe.encode()[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"
    return safe or "%"
