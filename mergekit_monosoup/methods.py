"""The merge methods `monosoup` and `svc` as mergekit sees them: the only file that imports mergekit at module level.

Values arrive here from YAML through mergekit's planner (filters and gradients resolved), leave as one tensor and its
records. The mathematics is in :mod:`mergekit_monosoup.kernel.monosoup` and :mod:`mergekit_monosoup.kernel.svc`.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar, get_args

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

from mergekit_monosoup.checkpoints.names import TRANSPOSED, Index, matrices
from mergekit_monosoup.kernel import monosoup as monosoup_kernel
from mergekit_monosoup.kernel import svc as svc_kernel
from mergekit_monosoup.kernel.batch import Job, each, edit_each
from mergekit_monosoup.kernel.eigen import SolverError
from mergekit_monosoup.kernel.monosoup import Mode, Rule, edit
from mergekit_monosoup.kernel.svc import calibrate
from mergekit_monosoup.kernel.task_vector import NonFiniteError
from mergekit_monosoup.report import Journal, Record, check_path

LOG = logging.getLogger("mergekit_monosoup")
JOURNAL = Journal()

T = TypeVar("T")


@dataclass(frozen=True)
class _Parameters:
    """What is said about one method's parameters: in errors and in the table."""

    method: str
    kernel: Callable[..., Any]  # defaults exist once, in its signature
    ranges: Mapping[str, tuple[str, Callable[[float], bool]]]
    meaning: Mapping[str, str]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    @property
    def defaults(self) -> dict[str, Any]:
        return {p.name: p.default for p in inspect.signature(self.kernel).parameters.values()}

    def values(self, name: str) -> str:
        """What a parameter may be."""
        if name in self.ranges:
            return f"a number {self.ranges[name][0]}"
        if name in self.choices:
            return f"one of {', '.join(self.choices[name])}"
        return "true or false" if name in self.flags else "a file path"

    def checked(self, name: str) -> WrapValidator:
        """Words errors so that they name method, parameter and range; pydantic's own name only the type."""

        def check(value: Any, handler: Any) -> Any:
            try:
                # YAML's yes/no/on/off is a bool; pydantic would read `R: yes` as 1.0, and `merged: 1` as true.
                if isinstance(value, bool) != (name in self.flags):
                    raise ValueError(value)
                result = handler(value)
                if name in self.ranges and not self.ranges[name][1](result):
                    raise ValueError(value)
            except (ValidationError, ValueError):
                raise ValueError(
                    f"merge method {self.method}: `{name}` must be {self.values(name)}, got {value!r}"
                ) from None
            if name == "report" and result is not None:
                try:
                    check_path(result)
                except ValueError as error:
                    raise ValueError(f"merge method {self.method}: `report`: {error}") from None
            return result

        return WrapValidator(check)

    def agreed(self, name: str, values: PerInputValues[T]) -> T:
        """The one value of a merge-wide parameter, which mergekit hands over once per fine-tuned model."""
        first, *others = values.values()
        if any(other != first for other in others):
            listed = ", ".join(f"{model}: {value}" for model, value in values.items())
            raise ValueError(
                f"merge method {self.method}: `{name}` holds for the whole merge, but the models disagree ({listed}; the "
                f"default is {self.defaults.get(name)}). Write it once, under the top-level `parameters`."
            )
        return first


# Every parameter is declared per non-base model, also the merge-wide ones: mergekit accepts such a parameter globally
# *and* under a model, while a shared one written under a model is dropped without a word.
_REPORT = "path of a report, one JSON line per matrix; none by default"
_MONOSOUP = _Parameters(
    "monosoup",
    edit,
    monosoup_kernel.RANGES,
    {
        "mode": "how the cut k is chosen: `freevariance` takes ceil(exp(entropy of σ/Σσ)), `variance` the smallest k "
        "with energy >= R",
        "R": "energy threshold of `variance`; ignored in `freevariance`",
        "weight": "per model: weight of the average when several fine-tuned models are given (normalised)",
        "alpha": "Wise-FT: interpolates the edited model towards `base_model`, in the same pass (0: base, 1: the edit)",
        "coefficients": "rule for (λ_high, λ_low): the paper's, its ablations, and `scalar`, the control that shrinks ΔW by "
        "the same norm without a split",
        "min_rel_update": "‖ΔW‖/‖W0‖ below which a tensor stays as fine-tuned; a huge value with a filter switches the "
        "edit off",
        "report": _REPORT,
    },
    choices={"mode": get_args(Mode), "coefficients": get_args(Rule)},
)
_SVC = _Parameters(
    "svc",
    calibrate,
    svc_kernel.RANGES,
    {
        "weight": "per model: weight of its task vector in the merge",
        "merged": "per model: this model is the merge of the others; it is calibrated, and nothing is merged here",
        "alpha": "lower bound of every projection coefficient, so γ <= 1/alpha: below 1 it can amplify, from 1 on never",
        "scaling": "factor of the merged update (task arithmetic)",
        "normalize": "divide by the sum of the weights: average instead of task arithmetic",
        "report": _REPORT,
    },
    flags=frozenset({"merged", "normalize"}),
)


def parameter_table(method: str = "monosoup") -> str:
    """The parameters of a method as Markdown; README shows exactly this."""
    words = {_MONOSOUP.method: _MONOSOUP, _SVC.method: _SVC}[method]
    spec = next(known.spec for known in METHODS if known.spec.name == method)

    def shown(value: Any) -> str:
        if value is None:
            return "none"
        return f"`{str(value).lower() if isinstance(value, bool) else value}`"

    rows = [
        f"| `{p.name}` | {shown(p.default)} | {words.values(p.name)} | {words.meaning[p.name]} |"
        for p in spec.parameters
    ]
    return "\n".join(["| parameter | default | values | meaning |", "|---|---|---|---|", *rows])


@merge_method(
    name="monosoup",
    pretty_name="MonoSoup",
    reference_url="https://arxiv.org/abs/2602.09689",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
)
def _monosoup(
    group: TensorGroup,
    mode: PerNonBase[Annotated[Mode, _MONOSOUP.checked("mode")]] = _MONOSOUP.defaults["mode"],
    R: PerNonBase[Annotated[float, _MONOSOUP.checked("R")]] = _MONOSOUP.defaults["R"],
    weight: PerNonBase[Annotated[float, _MONOSOUP.checked("weight")]] = 1.0,  # type: ignore[assignment]
    alpha: PerNonBase[Annotated[float, _MONOSOUP.checked("alpha")]] = _MONOSOUP.defaults["alpha"],
    coefficients: PerNonBase[
        Annotated[Rule, _MONOSOUP.checked("coefficients")]
    ] = _MONOSOUP.defaults["coefficients"],
    min_rel_update: PerNonBase[
        Annotated[float, _MONOSOUP.checked("min_rel_update")]
    ] = _MONOSOUP.defaults["min_rel_update"],
    report: PerNonBase[Annotated[str | None, _MONOSOUP.checked("report")]] = None,  # type: ignore[assignment]
) -> torch.Tensor:
    """One tensor of the merge: cut it into matrices, edit each, write the records."""
    name = group.metadata.name or ""
    if not group.non_base:
        return _only_in_base(name, group)

    settings: dict[str, Any] = {
        "mode": _MONOSOUP.agreed("mode", mode),
        "R": _MONOSOUP.agreed("R", R),
        "alpha": _MONOSOUP.agreed("alpha", alpha),
        "coefficients": _MONOSOUP.agreed("coefficients", coefficients),
        "min_rel_update": _MONOSOUP.agreed("min_rel_update", min_rel_update),
    }
    path = _MONOSOUP.agreed("report", report)
    weights = weight.values_for(group.non_base)
    if not any(weights):
        raise ValueError(
            f"monosoup: {name or 'a tensor'}: `weight` is 0 for every fine-tuned model; give at least one a weight > 0"
        )

    tuned = [entry.tensor for entry in group.non_base]
    way_out = "`min_rel_update: 1e9` under a filter with its name leaves it as fine-tuned."
    with _worded(_MONOSOUP.method, group, way_out):
        if group.base is None:
            merged, records = _without_update(name, tuned, weights, "not in the base model")
        else:
            merged, records = _each_matrix(
                name, group.base.tensor, tuned, partial(edit_each, weights=weights, **settings)
            )
    JOURNAL.add(records, path)
    return merged


@merge_method(
    name="svc",
    pretty_name="Singular Value Calibration",
    reference_url="https://arxiv.org/abs/2602.05536",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _svc(
    group: TensorGroup,
    weight: PerNonBase[Annotated[float, _SVC.checked("weight")]] = 1.0,  # type: ignore[assignment]
    merged: PerNonBase[Annotated[bool, _SVC.checked("merged")]] = False,  # type: ignore[assignment]
    alpha: PerNonBase[Annotated[float, _SVC.checked("alpha")]] = _SVC.defaults["alpha"],
    scaling: PerNonBase[Annotated[float, _SVC.checked("scaling")]] = _SVC.defaults["scaling"],
    normalize: PerNonBase[Annotated[bool, _SVC.checked("normalize")]] = _SVC.defaults["normalize"],
    report: PerNonBase[Annotated[str | None, _SVC.checked("report")]] = None,  # type: ignore[assignment]
) -> torch.Tensor:
    """One tensor of the merge: cut it into matrices, merge and calibrate each, write the records."""
    name = group.metadata.name or ""
    if not group.non_base:
        return _only_in_base(name, group)

    settings: dict[str, Any] = {
        "alpha": _SVC.agreed("alpha", alpha),
        "scaling": _SVC.agreed("scaling", scaling),
        "normalize": _SVC.agreed("normalize", normalize),
    }
    path = _SVC.agreed("report", report)
    flagged = [entry for entry in group.non_base if merged[entry.id]]
    tasks = [entry for entry in group.non_base if not merged[entry.id]]
    weights = weight.values_for(tasks)
    said = weights + weight.values_for(flagged)
    _check_svc_inputs(
        name, [entry.id for entry in flagged], [entry.id for entry in tasks], said, settings
    )

    tensors = [entry.tensor for entry in tasks]
    with _worded(_SVC.method, group, ""):
        if flagged and (group.base is None or not tasks):
            reason = "not in the base model" if group.base is None else "in no task model"
            result, records = _without_update(name, [flagged[0].tensor], [1.0], reason)
        elif group.base is None:
            result, records = _without_update(name, tensors, weights, "not in the base model")
        elif flagged:
            result, records = _each_matrix(
                name,
                group.base.tensor,
                [*tensors, flagged[0].tensor],
                partial(
                    each,
                    lambda job: calibrate(
                        job.pretrained,
                        job.tuned[:-1],
                        merged=job.tuned[-1],
                        alpha=settings["alpha"],
                        name=job.name,
                    ),
                ),
            )
        else:
            result, records = _each_matrix(
                name,
                group.base.tensor,
                tensors,
                partial(
                    each,
                    lambda job: calibrate(
                        job.pretrained, job.tuned, weights=weights, name=job.name, **settings
                    ),
                ),
            )
    JOURNAL.add(records, path, _SVC.method)
    return result


def _check_svc_inputs(
    name: str,
    flagged: Sequence[Hashable],
    tasks: Sequence[Hashable],
    weights: Sequence[float],
    settings: Mapping[str, Any],
) -> None:
    """Raises ValueError for what only the values of a tensor's parameters can tell."""
    name = name or "a tensor"
    if not flagged:
        if not any(weights):
            raise ValueError(
                f"svc: {name}: `weight` is 0 for every task model; give at least one a weight > 0"
            )
        return  # one task alone can only be a tensor that the other models lack
    if len(flagged) > 1:
        raise ValueError(
            f"svc: {name}: `merged` is true for {', '.join(map(str, flagged))}; at most one model is the merge of the others"
        )
    if len(tasks) == 1:
        raise ValueError(
            f"svc: {name}: beside the model that is `merged`, {flagged[0]}, at least two task models are needed, got "
            f"{tasks[0]} alone; list the models that were merged under `models`"
        )
    unused = [key for key in ("scaling", "normalize") if settings[key] != _SVC.defaults[key]]
    if unused := unused + ["weight"] * any(w != 1 for w in weights):
        raise ValueError(
            f"svc: {name}: {flagged[0]} is `merged` already, so {', '.join(f'`{key}`' for key in unused)} would have no "
            "effect: write it where that merge is made"
        )


# -- shared by the methods -------------------------------------------------------------------------------------------------


def _only_in_base(name: str, group: TensorGroup) -> torch.Tensor:
    assert group.base is not None
    JOURNAL.add([_untouched(name, group.base.tensor, "only in the base model")])
    return group.base.tensor


def _each_matrix(
    name: str,
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    kernel: Callable[[Sequence[Job]], Iterator[tuple[torch.Tensor, Record]]],
) -> tuple[torch.Tensor, list[Record]]:
    """``kernel(jobs)`` of all matrices in a tensor."""
    parts = matrices(name, base.shape)
    if parts == [("", ())]:
        merged, record = next(iter(kernel([Job(base, tuned, name)])))
        return merged, [record]
    if not parts:  # no matrix in it: through the kernel all the same, for the average, alpha and the check for NaN
        merged, record = next(
            iter(kernel([Job(base.reshape(-1), [w.reshape(-1) for w in tuned], name)]))
        )
        record.shape = tuple(base.shape)
        return merged.reshape(base.shape), [record]
    merged, records = torch.empty_like(base), []
    turned = bool(TRANSPOSED.search(name))

    def matrix(stack: torch.Tensor, index: Index) -> torch.Tensor:
        return (
            stack[index].mT if turned else stack[index]
        )  # [out, in], which svc's answer depends on

    jobs = [
        Job(matrix(base, index), [matrix(w, index) for w in tuned], name + suffix)
        for suffix, index in parts
    ]
    for (_, index), (part, record) in zip(parts, kernel(jobs), strict=True):
        merged[index] = part.mT if turned else part
        record.shape = tuple(base[index].shape)  # as stored
        records.append(record)
    return merged, records


def _without_update(
    name: str, tuned: Sequence[torch.Tensor], weights: Sequence[float], reason: str
) -> tuple[torch.Tensor, list[Record]]:
    """A tensor without an update (the base model lacks it): as fine-tuned, averaged if several models have it."""
    # Any of the inputs serves as the origin of an average.
    merged, record = edit(tuned[0], tuned, weights=weights, min_rel_update=math.inf, name=name)
    return merged, [_untouched(name, merged, reason, record.seconds)]


def _untouched(name: str, tensor: torch.Tensor, reason: str, seconds: float = 0.0) -> Record:
    return Record(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action="copied",
        reason=reason,
        seconds=seconds,
    )


@contextmanager
def _worded(method: str, group: TensorGroup, way_out: str) -> Iterator[None]:
    """Errors of the mathematics, with the names that only mergekit's group knows."""
    name = group.metadata.name or "a tensor"
    try:
        yield
    except NonFiniteError as error:
        raise ValueError(_name_non_finite(method, name, group, error.name)) from None
    except OverflowError as error:
        where = (
            "" if str(error).startswith(name) else f"{name}: "
        )  # of a stack the error names the expert
        raise ValueError(
            f"{method}: {where}{error}. Nothing of this tensor was written. `dtype: float32` has a wider range than float16"
        ) from error
    except SolverError as error:
        raise RuntimeError(
            f"{method}: {name} {tuple(group.entries[0].tensor.shape)}: its spectrum could not be computed ({error}). "
            f"Please report it with the shape{'; ' if way_out else '.'}{way_out}"
        ) from error


def _name_non_finite(method: str, name: str, group: TensorGroup, first: str) -> str:
    bad = {entry: int((~torch.isfinite(entry.tensor)).sum()) for entry in group.entries}
    found = [
        f"{count} of {entry.tensor.numel()} entries in {entry.id}{' (base_model)' if entry.is_base else ''}"
        for entry, count in bad.items()
        if count
    ]
    if first not in ("", name):  # one matrix of a stack
        found.append(f"the first of them in {first}")
    return (
        f"{method}: {name} is not finite: {'; '.join(found)}. Nothing of this tensor was written. "
        "Check that checkpoint: a diverged run or a damaged download is the usual cause."
    )


class EditingMethod(FunctionalGroupMergeMethod):
    """Words the structural errors of a method and keeps tensors that some inputs lack."""

    # (needed, what to list) by the smallest number of models beside the base
    _FEWEST: ClassVar = {
        1: ("a fine-tuned model", "one model"),
        2: ("two task models", "two models"),
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
        one_tensor = group_name is not None and not self._WHOLE_SLICE.search(group_name)
        if group_name is not None and not one_tensor:
            JOURNAL.begin()
        where = f" ({group_name})" if group_name else ""
        if base_id is None:
            raise ValueError(
                f"merge method {self.spec.name} needs the pretrained model{where}: add `base_model: <pretrained model>` to the "
                "YAML (in Python: base= or base_index=)"
            )
        if one_tensor and input_ids and len(set(input_ids)) == len(input_ids):
            return  # the tensor may be missing from the base, or from all fine-tuned models: it is kept as it is
        if base_id not in input_ids:
            raise ValueError(
                f"merge method {self.spec.name}: base_model {base_id} is not among the sources{where}: with `slices`, "
                "list it in every slice"
            )
        fewest = self.spec.contract.min_non_base or 1
        if len(input_ids) - 1 < fewest:
            needed, models = self._FEWEST[fewest]
            raise ValueError(
                f"merge method {self.spec.name} needs {needed}{where}: list at least {models} other than "
                "base_model under `models`"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)


monosoup = EditingMethod(_monosoup.spec, _monosoup.implementation)
svc = EditingMethod(_svc.spec, _svc.implementation)

METHODS: tuple[MergeMethod, ...] = (monosoup, svc)
_LOCK = threading.Lock()


def register() -> None:
    """Make the methods available to mergekit by name; does nothing the second time.

    A method that mergekit itself brings under the same name wins.
    """
    with _LOCK:
        known = {method.spec.name: method for method in registered_methods()}
        for method in METHODS:
            name = method.spec.name
            if name not in known:
                register_with_mergekit(method)
            elif known[name] is not method:
                LOG.warning(
                    "mergekit already has a merge method %r; mergekit-monosoup leaves it alone",
                    name,
                )


register()
