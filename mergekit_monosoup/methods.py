"""The merge methods `monosoup` and `svc` as mergekit sees them.

Values arrive here from YAML through mergekit's planner (filters and gradients resolved), leave as
one tensor and its records. The mathematics is in :mod:`mergekit_monosoup.kernel`, the parameters
and their rules are in :mod:`mergekit_monosoup.parameters`.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    FunctionalGroupMergeMethod,
    InputContract,
    MergeMethod,
    PerInputValues,
    PerNonBase,
    TensorGroup,
)
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register as register_with_mergekit
from mergekit.merge_methods.registry import registered_methods
from pydantic import ValidationError, WrapValidator
from torch import Tensor

from mergekit_monosoup import parameters
from mergekit_monosoup.checkpoints.names import TRANSPOSED, Index, matrices
from mergekit_monosoup.errors import NonFiniteError, SolverError
from mergekit_monosoup.kernel.batch import Job, Result, calibrate_each, edit_each
from mergekit_monosoup.kernel.monosoup import edit
from mergekit_monosoup.kernel.padding import Padding
from mergekit_monosoup.parameters import (
    MONOSOUP,
    SVC,
    Flag,
    Method,
    Mode,
    Number,
    Rule,
    Violation,
    agreement_violations,
    merged_violations,
    unused_violations,
    weight_violations,
)
from mergekit_monosoup.report.journal import Journal
from mergekit_monosoup.report.output import check_path
from mergekit_monosoup.report.record import Record

LOG = logging.getLogger("mergekit_monosoup")
JOURNAL = Journal()

T = TypeVar("T")
Kernel = Callable[[Sequence[Job]], Iterator[Result]]


# -- parameters ------------------------------------------------------------------------------------


def checked(method: Method, name: str) -> WrapValidator:
    """Return a validator whose errors name method, parameter and range.

    pydantic's own errors name only the type.
    """
    parameter = method[name]

    def validate(value: Any, handler: Any) -> Any:
        try:
            # YAML's yes/no/on/off is a bool; pydantic would read `R: yes` as 1.0, and `merged: 1`
            # as true.
            if isinstance(value, bool) != isinstance(parameter.values, Flag):
                raise ValueError(value)
            result = handler(value)
            if isinstance(parameter.values, Number) and not parameter.values.accepts(result):
                raise ValueError(value)
        except (ValidationError, ValueError):
            raise ValueError(
                f"merge method {method.name}: `{name}` {parameter.refusal(value)}"
            ) from None
        if name == "report" and result is not None:
            try:
                check_path(result)
            except ValueError as error:
                raise ValueError(f"merge method {method.name}: `report`: {error}") from None
        return result

    return WrapValidator(validate)


def agreed(method: Method, name: str, values: PerInputValues[T]) -> T:
    """Return the one value of a merge-wide parameter.

    mergekit hands it over once per fine-tuned model.

    Raises:
        ValueError: the models disagree.
    """
    by_model = {str(model): value for model, value in values.items()}
    for violation in agreement_violations(method, name, by_model):
        raise ValueError(f"merge method {method.name}: `{violation.parameter}` {violation.message}")
    return next(iter(values.values()))


def _refuse(method: Method, name: str, violations: Iterator[Violation]) -> None:
    """Raise ValueError if the values of a tensor break a rule."""
    if faults := [f"`{violation.parameter}` {violation.message}" for violation in violations]:
        raise ValueError(f"{method.name}: {name or 'a tensor'}: {'; '.join(faults)}")


# -- the methods -----------------------------------------------------------------------------------


# Every parameter is declared per non-base model, also the merge-wide ones: mergekit accepts such a
# parameter globally *and* under a model, while a shared one written under a model is dropped
# without a word.
@merge_method(
    name=MONOSOUP.name,
    pretty_name="MonoSoup",
    reference_url="https://arxiv.org/abs/2602.09689",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=MONOSOUP.fewest),
)
def _monosoup(
    group: TensorGroup,
    mode: PerNonBase[Annotated[Mode, checked(MONOSOUP, "mode")]] = MONOSOUP["mode"].default,
    R: PerNonBase[Annotated[float, checked(MONOSOUP, "R")]] = MONOSOUP["R"].default,
    weight: PerNonBase[Annotated[float, checked(MONOSOUP, "weight")]] = MONOSOUP["weight"].default,
    alpha: PerNonBase[Annotated[float, checked(MONOSOUP, "alpha")]] = MONOSOUP["alpha"].default,
    coefficients: PerNonBase[Annotated[Rule, checked(MONOSOUP, "coefficients")]] = MONOSOUP[
        "coefficients"
    ].default,
    min_rel_update: PerNonBase[Annotated[float, checked(MONOSOUP, "min_rel_update")]] = MONOSOUP[
        "min_rel_update"
    ].default,
    report: PerNonBase[Annotated[str | None, checked(MONOSOUP, "report")]] = MONOSOUP[
        "report"
    ].default,
) -> Tensor:
    """Merge one tensor: cut it into matrices, edit each, write the records."""
    name = group.metadata.name or ""
    if not group.non_base:
        return _only_in_base(name, group)

    settings: dict[str, Any] = {
        "mode": agreed(MONOSOUP, "mode", mode),
        "R": agreed(MONOSOUP, "R", R),
        "alpha": agreed(MONOSOUP, "alpha", alpha),
        "coefficients": agreed(MONOSOUP, "coefficients", coefficients),
        "min_rel_update": agreed(MONOSOUP, "min_rel_update", min_rel_update),
    }
    path = agreed(MONOSOUP, "report", report)
    weights = weight.values_for(group.non_base)
    _refuse(MONOSOUP, name, weight_violations(MONOSOUP, weights))

    tuned = [entry.tensor for entry in group.non_base]
    way_out = "`min_rel_update: 1e9` under a filter with its name leaves it as fine-tuned."
    with _errors_named(MONOSOUP, group, way_out):
        if group.base is None:
            merged, records = _without_update(name, tuned, weights, "not in the base model")
        else:
            kernel = partial(edit_each, weights=weights, **settings)
            merged, records = _merge_matrices(group, group.base.tensor, tuned, kernel)
    JOURNAL.add(records, path)
    return merged


@merge_method(
    name=SVC.name,
    pretty_name="Singular Value Calibration",
    reference_url="https://arxiv.org/abs/2602.05536",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=SVC.fewest),
)
def _svc(
    group: TensorGroup,
    weight: PerNonBase[Annotated[float, checked(SVC, "weight")]] = SVC["weight"].default,
    merged: PerNonBase[Annotated[bool, checked(SVC, "merged")]] = SVC["merged"].default,
    alpha: PerNonBase[Annotated[float, checked(SVC, "alpha")]] = SVC["alpha"].default,
    scaling: PerNonBase[Annotated[float, checked(SVC, "scaling")]] = SVC["scaling"].default,
    normalize: PerNonBase[Annotated[bool, checked(SVC, "normalize")]] = SVC["normalize"].default,
    report: PerNonBase[Annotated[str | None, checked(SVC, "report")]] = SVC["report"].default,
) -> Tensor:
    """Merge one tensor: cut it into matrices, merge and calibrate each, write the records."""
    name = group.metadata.name or ""
    if not group.non_base:
        return _only_in_base(name, group)

    settings: dict[str, Any] = {
        "alpha": agreed(SVC, "alpha", alpha),
        "scaling": agreed(SVC, "scaling", scaling),
        "normalize": agreed(SVC, "normalize", normalize),
    }
    path = agreed(SVC, "report", report)
    flagged = [entry for entry in group.non_base if merged[entry.id]]
    tasks = [entry for entry in group.non_base if not merged[entry.id]]
    weights = weight.values_for(tasks)
    ids = [str(entry.id) for entry in flagged], [str(entry.id) for entry in tasks]
    _refuse(SVC, name, merged_violations(*ids, one_tensor=True))
    if flagged:
        written = {
            "scaling": [settings["scaling"]],
            "normalize": [settings["normalize"]],
            "weight": weights + weight.values_for(flagged),
        }
        _refuse(SVC, name, unused_violations(ids[0][0], written))
    else:  # one task alone can only be a tensor that the other models lack
        _refuse(SVC, name, weight_violations(SVC, weights))

    tensors = [entry.tensor for entry in tasks]
    with _errors_named(SVC, group):
        if flagged and (group.base is None or not tasks):
            reason = "not in the base model" if group.base is None else "in no task model"
            result, records = _without_update(name, [flagged[0].tensor], [1.0], reason)
        elif group.base is None:
            result, records = _without_update(name, tensors, weights, "not in the base model")
        elif flagged:
            kernel = partial(calibrate_each, with_merged=True, alpha=settings["alpha"])
            inputs = [*tensors, flagged[0].tensor]
            result, records = _merge_matrices(group, group.base.tensor, inputs, kernel)
        else:
            kernel = partial(calibrate_each, weights=weights, **settings)
            result, records = _merge_matrices(group, group.base.tensor, tensors, kernel)
    JOURNAL.add(records, path, SVC.name)
    return result


# -- shared by the methods -------------------------------------------------------------------------


def _only_in_base(name: str, group: TensorGroup) -> Tensor:
    """Keep a tensor that no fine-tuned model has."""
    assert group.base is not None
    JOURNAL.add([_untouched(name, group.base.tensor, "only in the base model")])
    return group.base.tensor


def _merge_matrices(
    group: TensorGroup, base: Tensor, tuned: Sequence[Tensor], kernel: Kernel
) -> tuple[Tensor, list[Record]]:
    """Return the merged tensor and a record for each of its matrices; ``kernel`` merges them."""
    name = group.metadata.name or ""
    parts = matrices(name, base.shape)
    if parts == [("", ())]:
        padding = Padding.of([base, *tuned], group.metadata.vocabulary_axis)
        job = Job(padding.without(base), [padding.without(w) for w in tuned], name)
        ((merged, record),) = kernel([job])
        return padding.restored(merged), [padding.noted(record)]
    if not parts:
        # No matrix in it: through the kernel all the same, for the average, alpha and the check
        # for NaN.
        column = Job(base.reshape(-1), [w.reshape(-1) for w in tuned], name)
        ((merged, record),) = kernel([column])
        return merged.reshape(base.shape), [replace(record, shape=tuple(base.shape))]
    return _merge_stack(name, parts, base, tuned, kernel)


def _merge_stack(
    name: str,
    parts: Sequence[tuple[str, Index]],
    base: Tensor,
    tuned: Sequence[Tensor],
    kernel: Kernel,
) -> tuple[Tensor, list[Record]]:
    """Merge a stack of experts, matrix by matrix."""
    transposed = bool(TRANSPOSED.search(name))

    def matrix(stack: Tensor, index: Index) -> Tensor:
        # [out, in], which svc's answer depends on.
        return stack[index].mT if transposed else stack[index]

    jobs = [
        Job(matrix(base, index), [matrix(w, index) for w in tuned], name + suffix)
        for suffix, index in parts
    ]
    merged, records = torch.empty_like(base), []
    for (_, index), (part, record) in zip(parts, kernel(jobs), strict=True):
        merged[index] = part.mT if transposed else part
        records.append(replace(record, shape=tuple(base[index].shape)))  # as stored
    return merged, records


def _without_update(
    name: str, tuned: Sequence[Tensor], weights: Sequence[float], reason: str
) -> tuple[Tensor, list[Record]]:
    """Keep a tensor that the base model lacks.

    As fine-tuned, averaged if several models have it.
    """
    # Any of the inputs serves as the origin of an average.
    merged, record = edit(tuned[0], tuned, weights=weights, min_rel_update=math.inf, name=name)
    return merged, [_untouched(name, merged, reason, record.seconds)]


def _untouched(name: str, tensor: Tensor, reason: str, seconds: float = 0.0) -> Record:
    """Return the record of a tensor that has no update to look at."""
    return Record(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action="copied",
        reason=reason,
        seconds=seconds,
    )


# -- errors ----------------------------------------------------------------------------------------


@contextmanager
def _errors_named(method: Method, group: TensorGroup, way_out: str = "") -> Iterator[None]:
    """Add to errors of the kernel the names that only mergekit's group knows."""
    name = group.metadata.name or "a tensor"
    try:
        yield
    except NonFiniteError as error:
        raise ValueError(_non_finite(method, name, group, error.name)) from None
    except OverflowError as error:
        where = "" if str(error).startswith(name) else f"{name}: "  # a stack's names the expert
        raise ValueError(
            f"{method.name}: {where}{error}. Nothing of this tensor was written. "
            "`dtype: float32` has a wider range than float16"
        ) from error
    except SolverError as error:
        raise RuntimeError(
            f"{method.name}: {name} {tuple(group.entries[0].tensor.shape)}: its spectrum could "
            f"not be computed ({error}). Please report it with the shape"
            f"{'; ' if way_out else '.'}{way_out}"
        ) from error


def _non_finite(method: Method, name: str, group: TensorGroup, first: str) -> str:
    """Return the message that names the models whose entries are not finite."""
    counts = {entry: int((~torch.isfinite(entry.tensor)).sum()) for entry in group.entries}
    places = [
        f"{count} of {entry.tensor.numel()} entries in {entry.id}"
        f"{' (base_model)' if entry.is_base else ''}"
        for entry, count in counts.items()
        if count
    ]
    if first not in ("", name):  # one matrix of a stack
        places.append(f"the first of them in {first}")
    return (
        f"{method.name}: {name} is not finite: {'; '.join(places)}. Nothing of this tensor was "
        "written. Check that checkpoint: a diverged run or a damaged download is the usual cause."
    )


# -- what mergekit asks before a merge -------------------------------------------------------------


class EditingMethod(FunctionalGroupMergeMethod):
    """A merge method of this package, with plain errors about its inputs.

    It keeps tensors that some inputs lack.
    """

    # What it needs, and how many models to list.
    _FEWEST: ClassVar = {
        MONOSOUP.name: ("a fine-tuned model", "one model"),
        SVC.name: ("two task models", "two models"),
    }

    # MergePlanner names the check of a whole slice so; every other check is that of one tensor.
    _WHOLE_SLICE = re.compile(r"\.slices\[\d+\]$")

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check which models take part, in a slice or in one tensor.

        Raises:
            ValueError: the base model is missing, or there are too few others.
        """
        one_tensor = group_name is not None and not self._WHOLE_SLICE.search(group_name)
        if group_name is not None and not one_tensor:
            JOURNAL.begin()
        where = f" ({group_name})" if group_name else ""
        if base_id is None:
            raise ValueError(
                f"merge method {self.spec.name} needs the pretrained model{where}: add "
                "`base_model: <pretrained model>` to the YAML (in Python: base= or base_index=)"
            )
        if one_tensor and input_ids and len(set(input_ids)) == len(input_ids):
            # The tensor may be missing from the base, or from all fine-tuned models: it is kept
            # as it is.
            return
        if base_id not in input_ids:
            raise ValueError(
                f"merge method {self.spec.name}: base_model {base_id} is not among the "
                f"sources{where}: with `slices`, list it in every slice"
            )
        if len(input_ids) - 1 < parameters.METHODS[self.spec.name].fewest:
            needed, models = self._FEWEST[self.spec.name]
            raise ValueError(
                f"merge method {self.spec.name} needs {needed}{where}: list at least {models} "
                "other than base_model under `models`"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)


monosoup = EditingMethod(_monosoup.spec, _monosoup.implementation)
svc = EditingMethod(_svc.spec, _svc.implementation)

MERGE_METHODS: tuple[MergeMethod, ...] = (monosoup, svc)
_LOCK = threading.Lock()


def register() -> None:
    """Make the methods available to mergekit by name; does nothing the second time.

    A method that mergekit itself brings under the same name wins.
    """
    with _LOCK:
        known = {method.spec.name: method for method in registered_methods()}
        for method in MERGE_METHODS:
            name = method.spec.name
            if name not in known:
                register_with_mergekit(method)
            elif known[name] is not method:
                LOG.warning(
                    "mergekit already has a merge method %r; mergekit-monosoup leaves it alone",
                    name,
                )


register()
