"""Curves of merged models: methods with one number to vary, read off their configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.comparison import Comparison
from evaluation.sources import FINETUNED, PRETRAINED, Merge, parameters_of

WISE_FT = "Wise-FT"
LINES = "LiNeS"
MONOSOUP = "MonoSoup, R"
MONOSOUP_WISE = "MonoSoup + Wise-FT"
SCALAR = "scalar control, R"

# W0 and W1 are the ends of Wise-FT, W1 is the end of LiNeS and W0 that of MonoSoup + Wise-FT.
ENDS = {
    WISE_FT: [(0.0, PRETRAINED), (1.0, FINETUNED)],
    LINES: [(1.0, FINETUNED)],
    MONOSOUP_WISE: [(0.0, PRETRAINED)],
}


def family(merge: Merge | None) -> tuple[str, float] | None:
    """Return (curve, number) of a merge of one fine-tuned model; None if it has several numbers."""
    if merge is None or (tuned := _tuned(merge)) is None:
        return None
    config = merge.config
    parameters = {**parameters_of(config), **parameters_of(tuned)}
    parameters.pop("report", None)
    try:
        if config.get("merge_method") == "task_arithmetic":
            return _task_arithmetic(parameters)
        if config.get("merge_method") == "monosoup":
            return _monosoup(parameters)
    except OverflowError:  # a whole number that no curve goes through
        pass
    return None


def inputs(merge: Merge) -> tuple[str, str]:
    """Return (base, fine-tuned) model of a merge with a family, as its configuration names them."""
    return str(merge.config.get("base_model")), str(_tuned(merge)["model"])


def _tuned(merge: Merge) -> Any:
    """Return the entry of the only fine-tuned model; None if there are several."""
    base = merge.config.get("base_model")
    tuned = [entry for entry in merge.models if entry.get("model") != base]
    return tuned[0] if len(tuned) == 1 and "model" in tuned[0] else None


def _task_arithmetic(parameters: dict[str, Any]) -> tuple[str, float] | None:
    match parameters:
        case {"weight": int() | float() as weight, **others} if not others:
            return WISE_FT, float(weight)
        case {"weight": [int() | float() as first, int() | float() as last], **others} if (
            not others and last == 1
        ):
            return LINES, float(first)
    return None


def _monosoup(parameters: dict[str, Any]) -> tuple[str, float] | None:
    match parameters:
        case {"mode": "variance", "R": int() | float() as energy, **others} if not others:
            return MONOSOUP, float(energy)
        case {
            "mode": "variance",
            "R": int() | float() as energy,
            "coefficients": "scalar",
            **others,
        } if not others:
            return SCALAR, float(energy)
        case {"alpha": int() | float() as alpha, **others} if others in (
            {},
            {"mode": "freevariance"},
        ):
            return MONOSOUP_WISE, float(alpha)
        case {} if parameters in ({}, {"mode": "freevariance"}):
            return MONOSOUP_WISE, 1.0
    return None


class Point(NamedTuple):
    """A model on a curve, and the number that places it there."""

    number: float
    model: str


@dataclass
class _Curve:
    """The models of one family that were made from one W0 and one W1."""

    name: str
    base: str  # as the configurations call them
    tuned: str
    digests: dict[str, str | None]  # of W0 and W1, by their names in results; None: not known
    points: list[Point] = field(default_factory=list)

    def labels(self, key: tuple[str, str, str]) -> list[str]:
        """Return names from the shortest to the one that no other curve has."""
        return [
            self.name,
            f"{self.name} of {Path(self.tuned).name}",
            f"{self.name} of {self.tuned} from {self.base}",
            " ".join(key),
        ]


def curves(comparison: Comparison) -> dict[str, list[Point]]:
    """Return the points of each curve, by its name; fewer than three points are no curve.

    A curve belongs to one W0 and one W1. Where there are several of a family, their names say of
    which fine-tuned model.
    """
    grouped = _grouped(comparison)
    for curve in grouped.values():
        for number, end in ENDS.get(curve.name, []):
            # Where the weights are not known (a folder that somebody merged elsewhere) the names
            # are believed.
            if end in comparison.cells and curve.digests[end] in (None, comparison.weights[end]):
                curve.points.append(Point(number, end))
    labels = {key: curve.labels(key) for key, curve in grouped.items() if len(curve.points) >= 3}
    return {_shortest(key, labels): sorted(grouped[key].points) for key in labels}


def _grouped(comparison: Comparison) -> dict[tuple[str, str, str], _Curve]:
    """Return the curves without their ends, by family and digests of W0 and W1."""
    grouped: dict[tuple[str, str, str], _Curve] = {}
    for model in comparison.cells:
        merge = comparison.merges.get(model)
        if merge is None or (place := family(merge)) is None:
            continue
        base, tuned = inputs(merge)
        key = place[0], merge.inputs.get(base, base), merge.inputs.get(tuned, tuned)
        digests = {PRETRAINED: merge.inputs.get(base), FINETUNED: merge.inputs.get(tuned)}
        curve = grouped.setdefault(key, _Curve(place[0], base, tuned, digests))
        curve.base, curve.tuned, curve.digests = base, tuned, digests
        curve.points.append(Point(place[1], model))
    return grouped


def _shortest(key: tuple[str, str, str], labels: dict[tuple[str, str, str], list[str]]) -> str:
    """Return the shortest label of a curve that no other curve has."""
    return next(
        label
        for place, label in enumerate(labels[key])
        if [other[place] for other in labels.values()].count(label) == 1
    )
