"""The merge method `monosoup` as mergekit sees it: the only file that imports mergekit at module level.

Values arrive here from YAML through mergekit's planner (filters and gradients resolved), leave as one tensor and its
records. The mathematics is in :mod:`mergekit_monosoup.monosoup`.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import threading
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, TypeVar, get_args

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

from mergekit_monosoup.eigen import SolverError
from mergekit_monosoup.layout import matrices
from mergekit_monosoup.monosoup import RANGES, Mode, Rule, edit
from mergekit_monosoup.report import Journal, Record
from mergekit_monosoup.task_vector import NonFiniteError

LOG = logging.getLogger("mergekit_monosoup")
JOURNAL = Journal()

T = TypeVar("T")

# Defaults exist once, in the signature of `edit`.
_DEFAULT: dict[str, Any] = {p.name: p.default for p in inspect.signature(edit).parameters.values()}

# Every parameter is declared per non-base model, also the merge-wide ones: mergekit accepts such a parameter globally
# *and* under a model, while a shared one written under a model is dropped without a word.
MEANING = {
    "mode": "how the cut k is chosen: `freevariance` takes ceil(exp(entropy of σ/Σσ)), `variance` the smallest k "
    "with energy >= R",
    "R": "energy threshold of `variance`; ignored in `freevariance`",
    "weight": "per model: weight of the average when several fine-tuned models are given (normalised)",
    "alpha": "Wise-FT: interpolates the edited model towards `base_model`, in the same pass (0: base, 1: the edit)",
    "coefficients": "rule for (λ_high, λ_low): the paper's, its ablations, and `scalar`, the control that shrinks ΔW by the "
    "same norm without a split",
    "min_rel_update": "‖ΔW‖/‖W0‖ below which a tensor stays as fine-tuned; a huge value with a filter switches the edit off",
    "report": "path of a report, one JSON line per matrix; none by default",
}


_CHOICES = {"mode": get_args(Mode), "coefficients": get_args(Rule)}


def _values(name: str) -> str:
    """What a parameter may be, for error messages and the table."""
    if name in RANGES:
        return f"a number {RANGES[name][0]}"
    return f"one of {', '.join(_CHOICES[name])}" if name in _CHOICES else "a file path"


def parameter_table() -> str:
    """The parameters of `monosoup` as Markdown; README shows exactly this."""
    rows = [
        f"| `{p.name}` | {'none' if p.default is None else f'`{p.default}`'} | {_values(p.name)} | {MEANING[p.name]} |"
        for p in monosoup.spec.parameters
    ]
    return "\n".join(["| parameter | default | values | meaning |", "|---|---|---|---|", *rows])


def _checked(name: str) -> WrapValidator:
    """Words errors so that they name method, parameter and range; pydantic's own name only the type."""

    def check(value: Any, handler: Any) -> Any:
        try:
            if isinstance(value, bool):  # YAML's yes/no/on/off; pydantic would read `R: yes` as 1.0
                raise ValueError(value)
            result = handler(value)
            if name in RANGES and not RANGES[name][1](result):
                raise ValueError(value)
        except (ValidationError, ValueError):
            raise ValueError(f"merge method monosoup: `{name}` must be {_values(name)}, got {value!r}") from None
        return result

    return WrapValidator(check)


@merge_method(
    name="monosoup",
    pretty_name="MonoSoup",
    reference_url="https://arxiv.org/abs/2602.09689",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
)
def _monosoup(
    group: TensorGroup,
    mode: PerNonBase[Annotated[Mode, _checked("mode")]] = _DEFAULT["mode"],
    R: PerNonBase[Annotated[float, _checked("R")]] = _DEFAULT["R"],
    weight: PerNonBase[Annotated[float, _checked("weight")]] = 1.0,  # type: ignore[assignment]
    alpha: PerNonBase[Annotated[float, _checked("alpha")]] = _DEFAULT["alpha"],
    coefficients: PerNonBase[Annotated[Rule, _checked("coefficients")]] = _DEFAULT["coefficients"],
    min_rel_update: PerNonBase[Annotated[float, _checked("min_rel_update")]] = _DEFAULT["min_rel_update"],
    report: PerNonBase[Annotated[str | None, _checked("report")]] = None,  # type: ignore[assignment]
) -> torch.Tensor:
    """One tensor of the merge: cut it into matrices, edit each, write the records."""
    name = group.metadata.name or ""
    if not group.non_base:
        assert group.base is not None
        JOURNAL.add([_untouched(name, group.base.tensor, "only in the base model")])
        return group.base.tensor

    settings: dict[str, Any] = {
        "mode": _agreed("mode", mode),
        "R": _agreed("R", R),
        "alpha": _agreed("alpha", alpha),
        "coefficients": _agreed("coefficients", coefficients),
        "min_rel_update": _agreed("min_rel_update", min_rel_update),
    }
    path = _agreed("report", report)
    weights = weight.values_for(group.non_base)
    if not any(weights):
        raise ValueError(f"monosoup: {name}: `weight` is 0 for every fine-tuned model; give at least one a weight > 0")

    tuned = [entry.tensor for entry in group.non_base]
    try:
        if group.base is None:
            merged, records = _without_base(name, tuned, weights)
        else:
            merged, records = _edit_matrices(name, group.base.tensor, tuned, weights, settings)
    except NonFiniteError:
        raise ValueError(_name_non_finite(name, group)) from None
    except SolverError as error:
        raise RuntimeError(
            f"monosoup: {name or 'a tensor'} {tuple(tuned[0].shape)}: its spectrum could not be computed ({error}). Please "
            "report it with the shape; `min_rel_update: 1e9` under a filter with its name leaves it as fine-tuned."
        ) from error
    JOURNAL.add(records, path)
    return merged


def _edit_matrices(
    name: str, base: torch.Tensor, tuned: Sequence[torch.Tensor], weights: Sequence[float], settings: dict[str, Any]
) -> tuple[torch.Tensor, list[Record]]:
    parts = matrices(name, base.shape)
    if parts == [("", ())]:
        merged, record = edit(base, tuned, weights=weights, name=name, **settings)
        return merged, [record]
    if not parts:  # no matrix in it: through `edit` all the same, for the average, alpha and the check for NaN
        merged, record = edit(base.reshape(-1), [w.reshape(-1) for w in tuned], weights=weights, name=name, **settings)
        record.shape = tuple(base.shape)
        return merged.reshape(base.shape), [record]
    merged, records = torch.empty_like(base), []
    for suffix, index in parts:
        merged[index], record = edit(
            base[index], [w[index] for w in tuned], weights=weights, name=name + suffix, **settings
        )
        records.append(record)
    return merged, records


def _without_base(
    name: str, tuned: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, list[Record]]:
    """A tensor that the base model lacks has no update: it stays as fine-tuned, averaged if several models have it."""
    # Any of the inputs serves as the origin of an average.
    merged, record = edit(tuned[0], tuned, weights=weights, min_rel_update=math.inf, name=name)
    return merged, [_untouched(name, merged, "not in the base model", record.seconds)]


def _untouched(name: str, tensor: torch.Tensor, reason: str, seconds: float = 0.0) -> Record:
    return Record(
        name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), action="copied",
        reason=reason, seconds=seconds,
    )  # fmt: skip


def _agreed(name: str, values: PerInputValues[T]) -> T:
    """The one value of a merge-wide parameter, which mergekit hands over once per fine-tuned model."""
    first, *others = values.values()
    if any(other != first for other in others):
        listed = ", ".join(f"{model}: {value}" for model, value in values.items())
        raise ValueError(
            f"merge method monosoup: `{name}` holds for the whole merge, but the models disagree ({listed}; the default is "
            f"{_DEFAULT.get(name)}). Write it once, under the top-level `parameters`."
        )
    return first


def _name_non_finite(name: str, group: TensorGroup) -> str:
    bad = {entry: int((~torch.isfinite(entry.tensor)).sum()) for entry in group.entries}
    found = [
        f"{count} of {entry.tensor.numel()} entries in {entry.id}{' (base_model)' if entry.is_base else ''}"
        for entry, count in bad.items()
        if count
    ]
    return (
        f"monosoup: {name or 'a tensor'} is not finite: {'; '.join(found)}. Nothing of this tensor was written. "
        "Check that checkpoint: a diverged run or a damaged download is the usual cause."
    )


class MonoSoupMethod(FunctionalGroupMergeMethod):
    """Words the structural errors of the method and keeps tensors that some inputs lack."""

    # MergePlanner names the check of a whole slice so; every other check is that of one tensor.
    _WHOLE_SLICE = re.compile(r"\.slices\[\d+\]$")

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        one_tensor = group_name is not None and not self._WHOLE_SLICE.search(group_name)
        where = f" ({group_name})" if group_name else ""
        if base_id is None:
            raise ValueError(
                f"merge method monosoup needs the pretrained model{where}: add `base_model: <pretrained model>` to the "
                "YAML (in Python: base= or base_index=)"
            )
        if one_tensor and input_ids and len(set(input_ids)) == len(input_ids):
            return  # the tensor may be missing from the base, or from all fine-tuned models: it is kept as it is
        if base_id not in input_ids:
            raise ValueError(
                f"merge method monosoup: base_model {base_id} is not among the sources{where}: with `slices`, list it in "
                "every slice"
            )
        if len(input_ids) < 2:
            raise ValueError(
                f"merge method monosoup needs a fine-tuned model{where}: list at least one model other than "
                "base_model under `models`"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)


monosoup = MonoSoupMethod(_monosoup.spec, _monosoup.implementation)

METHODS: tuple[MergeMethod, ...] = (monosoup,)
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
                LOG.warning("mergekit already has a merge method %r; mergekit-monosoup leaves it alone", name)


register()
