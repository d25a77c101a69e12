"""Where matrices stand in a network, told from all of their names together."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_monosoup.checkpoints.names import natural, split, type_of

# With more stacks of layers than these their names say something else, such as a layer each.
MOST_TOWERS = 6
# A list of more parts than these is one type, such as the heads of 32 codebooks.
MOST_PARTS = 8
_FIRST = re.compile(r"embed|stem|patch|\bwte\b|\bwpe\b|(?:^|\.)_?conv(?:\d|_in)\b|^shared\b")
_EARLY = re.compile(r"encoder|vision|visual|down")
_LATE = re.compile(r"decoder|(?:^|_)up")


class Place(NamedTuple):
    """Where a matrix stands in its network.

    Attributes:
        tower: its stack of layers, ``encoder``; empty where there is only one.
        layer: the numbers of its layer, as :func:`layer` returns them.
        kind: what it does there, as :func:`projection`; begins with the tower.
    """

    tower: str
    layer: tuple[int, ...]
    kind: str


def arrange(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each tensor, as all of the names together tell it.

    One name cannot tell whether `encoder` is a stack of layers beside another or the only one, nor
    whether a prefix is in all of the names.
    """
    names = list(dict.fromkeys(names))
    if chain := _chain(names):
        return chain
    stacks = list(dict.fromkeys(parts.stack for name in names if (parts := split(name)).layer))
    paths = [stack[:-1] for stack in stacks] or [split(name).rest[:-1] for name in names]
    root = _shared(paths) if len(names) > 1 else ()
    towers = _tower_names(stacks, len(root))
    places = {name: _placed(name, towers, root) for name in names}
    return _starred(places)


def _chain(names: Sequence[str]) -> dict[str, Place]:
    """Return the places in a network that is one list of matrices, as VGG's `features.28.weight`.

    Empty for any other: there `lm_heads.31.weight` is one of many heads, not a layer.
    """
    if any(split(name).layer for name in names):
        return {}
    places = {}
    for name in names:
        item = re.fullmatch(r"(.+)\.([0-9]{1,9})(?:\.weight)?", name)
        word, number = (item[1], (int(item[2]),)) if item else (type_of(name), ())
        places[name] = Place("", number, word.removeprefix("model."))
    kinds = Counter(place.kind for place in places.values())
    longest, count = max(kinds.items(), key=lambda kind: kind[1], default=("", 0))
    if count <= MOST_PARTS:
        return {}
    return {
        name: place if place.kind == longest else Place("", (), type_of(name))
        for name, place in places.items()
    }


def _placed(name: str, towers: Mapping[tuple[str, ...], str], root: Sequence[str]) -> Place:
    parts = split(name)
    if parts.layer:
        tower = towers.get(parts.stack, "")
        kind = type_of(".".join(parts.rest))
        return Place(tower, parts.layer, f"{tower}.{kind}" if tower else kind)
    shared = len(_shared([root, parts.rest[:-1]]))
    return Place("", (), type_of(".".join(parts.rest[shared:]).removeprefix("model.")))


def _starred(places: dict[str, Place]) -> dict[str, Place]:
    """Return places where the parts of a long list, ``heads.0`` to ``heads.31``, are one type."""
    kinds: dict[str, set[str]] = defaultdict(set)
    pattern = {kind: re.sub(r"\b[0-9]+\b", "*", kind) for _, _, kind in places.values()}
    for kind, star in pattern.items():
        kinds[star].add(kind)
    return {
        name: place._replace(kind=pattern[place.kind])
        if len(kinds[pattern[place.kind]]) > MOST_PARTS
        else place
        for name, place in places.items()
    }


def _shared(paths: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the parts with which all of the paths begin."""
    return tuple(
        column[0]
        for column in itertools.takewhile(
            lambda column: len(set(column)) == 1, zip(*paths, strict=False)
        )
    )


def _tower_names(stacks: Sequence[tuple[str, ...]], root: int) -> dict[tuple[str, ...], str]:
    """Return the shortest name of each stack; none where there is one stack, or too many."""
    if not 1 < len(stacks) <= MOST_TOWERS:
        return {}
    lengths = range(root + 1, max(map(len, stacks)) + 1)
    length = next(n for n in lengths if len({stack[:n] for stack in stacks}) == len(stacks))
    return {stack: ".".join(stack[root:length]) for stack in stacks}


def depth(name: str, place: Place) -> tuple[Any, ...]:
    """Return a sort key by which tensors come in the order of the network, as far as names tell.

    What stands outside of layers comes first, but for heads.
    """
    when = 1 if place.layer else 0 if _FIRST.search(name) else 2
    tower = 0 if _EARLY.search(place.tower) else 2 if _LATE.search(place.tower) else 1
    return when, tower if place.layer else 0, place.tower, place.layer, natural(name)
