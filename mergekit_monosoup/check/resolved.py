"""What a merge by our methods comes to: which tensors it edits, and with which values.

mergekit resolves filters and gradients for each tensor when it plans. What it makes of them is
said here in a few lines, for whoever has written them to compare with what was meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.base import MergeMethod
from mergekit.parameter_resolver import resolve_parameters

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.checkpoints.headers import LackingError
from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.names import EXPERTS, layer
from mergekit_monosoup.checkpoints.places import arrange, depth
from mergekit_monosoup.checkpoints.sections import filters
from mergekit_monosoup.parameters import MONOSOUP, SVC
from mergekit_monosoup.report.inspected import family_names

# An update as large as the weights is none: a `min_rel_update` from here on switches the edit off.
SWITCHED_OFF = 1.0
# Values that a summary names: those that decide which tensors are edited have sentences of their
# own.
SHOWN = {
    MONOSOUP.name: ("R", "alpha", "coefficients"),
    SVC.name: ("alpha", "scaling", "normalize"),
}


@dataclass(frozen=True)
class Resolved:
    """A tensor of a merge, and the values of the method's parameters for it.

    Attributes:
        name: as mergekit has it.
        matrix: whether it has two dimensions or more.
        kind: what it does in the network, ``self_attn.q_proj``.
        values: those of the first model that is not the base; the rest agrees, but for weights.
    """

    name: str
    matrix: bool
    kind: str
    values: Mapping[str, Any]


def summary(document: Document) -> list[str]:
    """Return a few lines about a merge that has no errors; none where too little is known."""
    method = document.own_method
    tensors = _resolved(document) if method is not None else []
    if method is None or not tensors:
        return []
    lines = [_edits(method.name, tensors)]
    edited = [tensor for tensor in tensors if _edited(tensor)]
    for name in SHOWN[method.name]:
        default = method[name].default
        values = {tensor.values[name] for tensor in edited}
        if name == "R":
            told = any(tensor.values["mode"] == "variance" for tensor in edited)
        else:
            told = bool(values - {default})
        if told:
            lines.append(f"{name}: {_by_kind(name, edited)}")
    lines += _without_default(document, tensors)
    return [": ".join(filter(None, (document.label, line))) for line in lines]


def _edited(tensor: Resolved) -> bool:
    return tensor.matrix and tensor.values.get("min_rel_update", 0.0) < SWITCHED_OFF


# -- in words --------------------------------------------------------------------------------------


def _edits(method: str, tensors: Sequence[Resolved]) -> str:
    """Return ``monosoup, freevariance: edits 12 of 36 tensors: self_attn.*; not: …``."""
    edited = [tensor for tensor in tensors if _edited(tensor)]
    off = [tensor for tensor in tensors if tensor.matrix and not _edited(tensor)]
    others = [tensor for tensor in tensors if not tensor.matrix]
    modes = " and ".join(dict.fromkeys(str(t.values["mode"]) for t in edited if "mode" in t.values))
    verb = "calibrates" if method == SVC.name else "edits"
    label = f"{method}, {modes}" if modes else method
    line = f"{label}: {verb} {len(edited)} of {len(tensors)} tensors"
    line += f": {_kinds(edited, tensors)}" if edited else ""
    stay = []
    if off:
        stay.append(f"{len(off)} by `min_rel_update`: {_kinds(off, tensors)}")
    if others:
        stay.append(f"{len(others)} that are no matrices, as norms and biases")
    return f"{line}; not: {'; '.join(stay)}" if stay else line


def _kinds(tensors: Iterable[Resolved], all_tensors: Iterable[Resolved]) -> str:
    """Return the kinds of some tensors among all, ``self_attn.*, lm_head``."""
    chosen, known = ({t.kind: None for t in each if t.matrix} for each in (tensors, all_tensors))
    return family_names(list(chosen), list(known))


def _by_kind(name: str, tensors: Sequence[Resolved]) -> str:
    """Return ``0.9 in self_attn.*; 0.9 → 0.6 by depth in mlp.*``; one value alone if it is one."""
    courses: dict[str, list[str]] = defaultdict(list)
    for kind in dict.fromkeys(tensor.kind for tensor in tensors):
        values = [tensor.values[name] for tensor in tensors if tensor.kind == kind]
        courses[_course(values)].append(kind)
    if len(courses) == 1:
        return next(iter(courses))
    kinds = list(dict.fromkeys(tensor.kind for tensor in tensors))
    return "; ".join(f"{text} in {family_names(of, kinds)}" for text, of in courses.items())


def _course(values: Sequence[Any]) -> str:
    """Return the values of the tensors of a kind, in the order of depth."""
    course = list(dict.fromkeys(map(_shown, values)))
    if len(course) == 1:
        return course[0]
    monotone = values in (sorted(values), sorted(values, reverse=True))
    return f"{course[0]} → {course[-1]} by depth" if monotone else " / ".join(course)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _without_default(document: Document, tensors: Sequence[Resolved]) -> Iterator[str]:
    """Yield a line for each list of filters without a last entry that fits everything else."""
    method = document.own_method
    assert method is not None
    known = {parameter.name for parameter in method.parameters}
    for place, parameters, _ in document.sections:
        for name, value in parameters.items():
            texts = [str(entry.get("filter") or "*") for entry in filters(value)]
            if not texts or name not in known or "*" in texts:
                continue
            rest = [t for t in tensors if t.matrix and not any(text in t.name for text in texts)]
            values = dict.fromkeys(_shown(t.values[name]) for t in rest if name in t.values)
            if rest and values:
                written = "the default " if list(values) == [_shown(method[name].default)] else ""
                yield (
                    f"{place}.{name} has no entry without `filter`: {len(rest)} matrices that none "
                    f"matches take {written}{' / '.join(values)}"
                )


# -- what is resolved ------------------------------------------------------------------------------


def _resolved(document: Document) -> list[Resolved]:
    """Return the tensors of a merge in the order of depth; none where they are not known."""
    found = list(_planned(document)) or list(_by_names(document))
    places = arrange(name for name, _, _ in found)
    found.sort(key=lambda entry: depth(entry[0], places[entry[0]]))
    return [Resolved(name, ndim > 1, places[name].kind, v) for name, ndim, v in found]


def _planned(document: Document) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield (name, dimensions, values) of what mergekit plans."""
    planning = document.planning
    if not planning.tasks:
        return
    inputs = Inputs(planning.loaders, headers=planning.headers)
    stored = {
        name: len(tensor.shape)
        for each in document.tensors.values()
        for name, tensor in each.items()
    }
    for task in planning.tasks:
        merging: Any = task.tensor_task
        # Of the base the planner has no values: all parameters are those of the other models.
        values = [dict(v.items()) for v in merging.input_parameters.values()]
        dimensions = stored.get(task.tensor_name) or _dimensions(inputs, task)
        if dimensions and any(values):
            yield task.tensor_name, dimensions, next(filter(None, values))


def _dimensions(inputs: Inputs, task: SaveTensor) -> int:
    """Return the dimensions of a tensor that mergekit renames or stacks; 0 if no model has it."""
    if EXPERTS.search(task.tensor_name):  # looking for the parts takes long in a large model
        return 3
    for load in loads(task.tensor_task):
        with suppress(LackingError):  # which a check reports
            if shape := inputs.sources(load)[1]:
                return len(shape)
    return 0


def _by_names(document: Document) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield the same by the names in the files, where mergekit does not plan here.

    That is for mergekit-pytorch, which knows no layers, and for whole models of a hub.
    """
    config, method = document.config, document.method
    whole = not isinstance(config, MergeConfiguration) or bool(config.models)
    if config is None or method is None or not whole or len(document.tensors) < 2:
        return
    shapes = {n: t.shape for tensors in document.tensors.values() for n, t in tensors.items()}
    layers = max((layer(name)[0] for name in shapes if layer(name)), default=0)
    for name, shape in shapes.items():
        number = layer(name)[0] if layer(name) and not document.raw else 0
        yield name, len(shape), _values(config, method, name, number / max(layers, 1))


def _values(config: Any, method: MergeMethod, name: str, t: float) -> Mapping[str, Any]:
    """Return the values for a tensor at the relative depth ``t``, as mergekit resolves them."""
    written = {str(model.model): model.parameters for model in config.models}
    tuned = next(model for model in written if model != str(config.base_model))
    _, values = resolve_parameters(
        method.spec,
        tensor_name=name,
        inputs={tuned: name},  # type: ignore[dict-item] # only compared with the base
        sources=lambda model: (written.get(str(model)), config.parameters),
        t=t,
    )
    return next(iter(values.values()))
