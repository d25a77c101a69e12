"""What `mergekit-monosoup check` finds in a file, in short."""

from __future__ import annotations

from pathlib import Path

from mergekit_monosoup.check import check


def messages(path: str | Path, level: str = "error") -> list[str]:
    """`where: message` of the findings of one level."""
    return [f"{f.where}: {f.message}" for f in check(path) if f.level == level]
