"""Names of one model in another's files: what a wrapper put before them, or into them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """What tells the names of one file from those of another, of the same model.

    Attributes:
        prefix: what the names begin with; empty where parts lie within.
        parts: what lies within, as ``_fsdp_wrapped_module``.
        more: whether it is the first file whose names have them, or the second.
        count: names that are the same without.
    """

    prefix: str
    parts: tuple[str, ...]
    more: bool
    count: int

    def described(self, other: str) -> str:
        """Return what differs and what to do, to be read after the name of the second file.

        ``other``: what the first is called.
        """
        if self.prefix:
            kind, listed = "begin with", f"`{self.prefix}`"
            change = f"name.removeprefix({self.prefix!r}): tensor … if name.startswith(…)"
        else:
            kind, listed = "have within", ", ".join(f"`{part}`" for part in self.parts)
            replaced = "".join(f".replace({part + '.'!r}, '')" for part in self.parts)
            change = f"name{replaced}: tensor …"
        if self.more:
            what = f"the names of {other} {kind} {listed}, its own do not"
        else:
            what = f"its names {kind} {listed}, those of {other} do not"
        return (
            f"{what} ({self.count} tensors are the same otherwise): save the model inside of its "
            f"wrapper, or rename the tensors, `{{{change}}}`"
        )


def renaming(first: Collection[str], second: Collection[str]) -> Renaming | None:
    """Return what tells the second file's names from the first's; None where nothing does.

    A wrapper (torch.compile, DistributedDataParallel, FSDP, a trainer's own class) puts its name
    before those of the model, or into them. Which one is found by comparing, not looked up.
    """
    common = len(set(first) & set(second))
    if 2 * common >= min(len(first), len(second)):
        return None
    found = [
        *_prefixes(first, second, more=False),
        *_prefixes(second, first, more=True),
        *_parts(first, second, more=False),
        *_parts(second, first, more=True),
    ]
    best = max(found, key=lambda candidate: candidate.count, default=None)
    return best if best and 2 * best.count > min(len(first), len(second)) else None


def _prefixes(
    plain: Collection[str], wrapped: Collection[str], *, more: bool
) -> Iterator[Renaming]:
    """Yield the most frequent beginning without which wrapped names are plain ones."""
    known = set(plain)
    counts: Counter[str] = Counter()
    for name in wrapped:
        for dot in (match.end() for match in re.finditer(r"\.", name)):
            if name[dot:] in known:
                counts[name[:dot]] += 1
                break  # the shortest beginning: `model.model.` also ends in `model.`
    for prefix, count in counts.most_common(1):
        yield Renaming(prefix, (), more, count)


def _parts(plain: Collection[str], wrapped: Collection[str], *, more: bool) -> Iterator[Renaming]:
    """Yield the parts that only wrapped names have, if those are plain ones without them."""
    known = set(plain)
    usual = {part for name in plain for part in name.split(".")}
    found: Counter[str] = Counter()
    same = set()
    for name in wrapped:
        parts = name.split(".")
        kept = ".".join(part for part in parts if part in usual)
        if kept != name and kept in known:
            same.add(kept)
            found.update(set(parts) - usual)
    if same:
        yield Renaming("", tuple(part for part, _ in found.most_common(3)), more, len(same))
