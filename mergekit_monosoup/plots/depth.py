"""The horizontal axis of what is drawn by depth: layers by number, all else by upright names.

Layers are as wide as they have matrices. An upright name gets the width of a line of text, however
many layers there are, and a stack of layers beside another begins with its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_monosoup.checkpoints.places import Place
from mergekit_monosoup.plots.text import figure_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

NAME_LIMIT = 22  # characters of an upright name
NAME_SIZE = 7  # points
# Of the axis, the share that an upright name of this size needs: in half a figure, in a whole one.
NAME_SHARE, WIDE_NAME_SHARE = 0.045, 0.022
MOST_NAMES = 0.6  # of the axis, the share of all of them; beyond it they are thinned out
MOST_EDGES = 60  # with more of them the lines between layers are a grey area


class Group(NamedTuple):
    """Matrices beside each other that share a tick.

    Attributes:
        label: number of the layer, or an upright name.
        size: how many there are; none where a name begins a stack of layers.
        upright: whether the label is a name.
    """

    label: str
    size: int
    upright: bool


class Axis(NamedTuple):
    """Where everything stands: places of the matrices, ticks of the groups, edges between them."""

    places: list[float]
    centres: list[float]
    edges: list[float]
    length: float
    groups: list[Group]


def groups(places: Sequence[Place]) -> list[Group]:
    """Return the groups of matrices that are in the order of depth."""
    found: list[Group] = []
    tower = ""
    names = []
    for place, members in itertools.groupby(places, key):
        if place.layer and place.tower != tower:
            tower = place.tower
            names.append(f"{tower}:")
            found.append(Group(names[-1], 0, True))
        label = ".".join(map(str, place.layer)) or place.kind
        names += [] if place.layer else [label]
        found.append(Group(label, len(list(members)), not place.layer))
    labels = dict(zip(names, figure_labels(names, NAME_LIMIT), strict=True))
    return [g._replace(label=labels[g.label]) if g.upright else g for g in found]


def key(place: Place) -> Place:
    """Return what the matrices of a group have in common."""
    return place._replace(kind="") if place.layer else place


def lay_out(found: Sequence[Group], wide: bool) -> Axis:
    """Return the places on the axis, one matrix of a layer apart."""
    upright = sum(group.upright for group in found)
    numbered = sum(group.size for group in found if not group.upright)
    share = min(WIDE_NAME_SHARE if wide else NAME_SHARE, MOST_NAMES / max(upright, 1))
    name_width = numbered * share / (1 - share * upright) if numbered else 1.0
    places: list[float] = []
    centres, edges, at = [], [], 0.0
    for group in found:
        width = name_width if group.upright else float(group.size)
        places += [at + width * (i + 0.5) / group.size for i in range(group.size)]
        centres.append(at + width / 2)
        at += width
        edges.append(at)
    return Axis(places, centres, edges[:-1], at, list(found))


def draw_axis(axes: Axes, axis: Axis, edges: bool = True) -> None:
    """Write all ticks; :func:`thin` takes those away that touch, when places are known."""
    _write(axes, axis, range(len(axis.groups)))
    margin = 0.02 * axis.length
    axes.set_xlim(-margin, axis.length + margin)
    axes.set_xlabel("layer")
    if edges and len(axis.edges) <= MOST_EDGES:
        for edge in axis.edges:
            axes.axvline(edge, color="0.8", linewidth=0.6, zorder=0)


def _write(axes: Axes, axis: Axis, kept: Sequence[int]) -> None:
    axes.set_xticks([axis.centres[i] for i in kept], [axis.groups[i].label for i in kept])
    for i, tick in zip(kept, axes.get_xticklabels(), strict=True):
        if axis.groups[i].upright:
            tick.set(rotation=90, fontsize=NAME_SIZE)


def thin(axes: Axes, axis: Axis, renderer: Any) -> None:
    """Keep the ticks that do not touch: names first, then every second, third, … layer."""
    boxes = [tick.get_window_extent(renderer) for tick in axes.get_xticklabels()]
    stretches = [
        (upright, list(members))
        for upright, members in itertools.groupby(
            range(len(boxes)), lambda i: axis.groups[i].upright
        )
    ]
    uprights = [i for upright, members in stretches if upright for i in members]
    names = _apart([uprights], boxes, [], gap=0.0)
    numbers = [members for upright, members in stretches if not upright]
    kept = _apart(numbers, boxes, [boxes[i] for i in names], gap=4.0)
    _write(axes, axis, sorted({*names, *kept}))


def _apart(
    stretches: Sequence[Sequence[int]], boxes: Sequence[Bbox], taken: Sequence[Bbox], gap: float
) -> list[int]:
    """Return every n-th tick of each stretch, with the smallest n by which all are apart."""
    free = {
        i
        for i in itertools.chain.from_iterable(stretches)
        if not any(boxes[i].padded(gap, 0).overlaps(box) for box in taken)
    }
    longest = max(map(len, stretches), default=0)
    for step in range(1, longest + 1):
        kept = [i for members in stretches for i in members[::step] if i in free]
        if all(boxes[a].x1 + gap < boxes[b].x0 for a, b in itertools.pairwise(kept)):
            return kept
    return []
