"""Every parameter of the merge methods, and every rule about them, in one place.

The methods' declarations, the checks of :func:`mergekit_monosoup.edit` and
:func:`mergekit_monosoup.calibrate`, `mergekit-monosoup check`, the command line and the tables of
the guide all read this file. It imports neither torch nor mergekit, which take seconds.

A new parameter of `monosoup` touches three places: its entry in :data:`MONOSOUP`, the method's
signature in ``methods.py``, and ``Settings`` with :func:`edit` in ``kernel/monosoup.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Mode = Literal["freevariance", "variance"]
Rule = Literal["monosoup", "rho", "cos", "uniform", "high", "low", "scalar"]

# Of the command `soup`: order of the candidates, which tensors count, and how cosines are joined.
Order = Literal["given", "scores", "similarity"]
Count = Literal["matrices", "all"]
Similarity = Literal["mean", "whole"]


# -- what a value may be ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number within a range; ``contains`` is False for NaN."""

    range: str
    contains: Callable[[float], bool]

    @property
    def words(self) -> str:
        return f"a number {self.range}"

    def accepts(self, value: object) -> bool:
        try:
            # YAML's yes/no/on/off is a bool, which float() would read as 1 or 0.
            if isinstance(value, bool | str):
                return False
            return self.contains(float(value))  # type: ignore[arg-type] # TypeError otherwise
        except (TypeError, ValueError, OverflowError):
            return False


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    options: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.options)}"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.options


@dataclass(frozen=True)
class Flag:
    """True or false, and no number in their place."""

    words: str = "true or false"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class FilePath:
    """The path of a file to write, or None."""

    words: str = "a file path"

    def accepts(self, value: object) -> bool:
        return value is None or isinstance(value, str)


# -- parameters ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method.

    Attributes:
        name: as in YAML.
        default: its value where none is written.
        values: what it may be.
        meaning: for the tables of the guide.
        per_model: whether it may differ between models; others hold for the whole merge.
    """

    name: str
    default: Any
    values: Number | Choice | Flag | FilePath
    meaning: str
    per_model: bool = False

    def fault(self, value: object) -> str:
        """Return what is wrong with a value, to be read after the name; empty if nothing."""
        return "" if self.values.accepts(value) else self.refusal(value)

    def refusal(self, value: object) -> str:
        """Return what the parameter must be, and that it is ``value`` instead."""
        return f"must be {self.values.words}, got {value!r}"


@dataclass(frozen=True)
class Method:
    """A merge method: its name in YAML and its parameters, in the order of the tables.

    Attributes:
        ingredient: what its models other than the base are called.
        fewest: how many of them it needs.
    """

    name: str
    ingredient: str
    fewest: int
    parameters: tuple[Parameter, ...]

    def __getitem__(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def __contains__(self, name: object) -> bool:
        return any(parameter.name == name for parameter in self.parameters)

    def check(self, **values: object) -> None:
        """Check the values of some parameters.

        Raises:
            ValueError: names the first parameter whose value is wrong, and what it may be.
        """
        for name, value in values.items():
            if fault := self[name].fault(value):
                raise ValueError(f"{name} {fault}")


_NOT_NEGATIVE = Number(">= 0 and finite", lambda v: 0 <= v < math.inf)
_REPORT = Parameter(
    "report", None, FilePath(), "path of a report, one JSON line per matrix; none by default"
)

MONOSOUP = Method(
    "monosoup",
    "fine-tuned model",
    1,
    (
        Parameter(
            "mode",
            "freevariance",
            Choice(get_args(Mode)),
            "how the cut k is chosen: `freevariance` takes ceil(exp(entropy of σ/Σσ)), "
            "`variance` the smallest k with energy >= R",
        ),
        Parameter(
            "R",
            0.8,
            Number("in (0, 1]", lambda v: 0 < v <= 1),
            "energy threshold of `variance`; ignored in `freevariance`",
        ),
        Parameter(
            "weight",
            1.0,
            _NOT_NEGATIVE,
            "per model: weight of the average when several fine-tuned models are given "
            "(normalised)",
            per_model=True,
        ),
        Parameter(
            "alpha",
            1.0,
            Number("in [0, 1]", lambda v: 0 <= v <= 1),
            "Wise-FT: interpolates the edited model towards `base_model`, in the same pass "
            "(0: base, 1: the edit); not the `alpha` of svc",
        ),
        Parameter(
            "coefficients",
            "monosoup",
            Choice(get_args(Rule)),
            "rule for (λ_high, λ_low): the paper's, its ablations, and `scalar`, the control "
            "that shrinks ΔW by the same norm without a split",
        ),
        Parameter(
            "min_rel_update",
            1e-6,
            Number(">= 0", lambda v: v >= 0),
            "‖ΔW‖/‖W0‖ below which a tensor stays as fine-tuned; a huge value with a filter "
            "switches the edit off",
        ),
        _REPORT,
    ),
)

SVC = Method(
    "svc",
    "task model",
    2,
    (
        Parameter(
            "weight",
            1.0,
            _NOT_NEGATIVE,
            "per model: weight of its task vector in the merge",
            per_model=True,
        ),
        Parameter(
            "merged",
            False,
            Flag(),
            "per model: this model is the merge of the others; it is calibrated, and nothing is "
            "merged here",
            per_model=True,
        ),
        Parameter(
            "alpha",
            0.1,
            Number("> 0 and finite", lambda v: 0 < v < math.inf),
            "lower bound of every projection coefficient, so γ <= 1/alpha: below 1 it can "
            "amplify, from 1 on never; not the `alpha` of monosoup, which is Wise-FT",
        ),
        Parameter("scaling", 1.0, _NOT_NEGATIVE, "factor of the merged update (task arithmetic)"),
        Parameter(
            "normalize",
            False,
            Flag(),
            "divide by the sum of the weights: average instead of task arithmetic",
        ),
        _REPORT,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (MONOSOUP, SVC)}


def parameter_table(method: str = "monosoup") -> str:
    """Return the parameters of a method as a Markdown table; the guide shows exactly this."""

    def cell(value: object) -> str:
        if value is None:
            return "none"
        return f"`{str(value).lower() if isinstance(value, bool) else value}`"

    rows = [
        f"| `{p.name}` | {cell(p.default)} | {p.values.words} | {p.meaning} |"
        for p in METHODS[method].parameters
    ]
    return "\n".join(["| parameter | default | values | meaning |", "|---|---|---|---|", *rows])


# -- rules about several values --------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """A rule that the values of a parameter break; ``message`` is read after its name."""

    parameter: str
    message: str


def weight_violations(method: Method, weights: Sequence[object]) -> Iterator[Violation]:
    """Check that at least one model has a positive weight; gradients are passed over."""
    numbers = [weight for weight in weights if isinstance(weight, int | float)]
    if weights and len(numbers) == len(weights) and not any(numbers):
        yield Violation(
            "weight", f"is 0 for every {method.ingredient}; give at least one a weight > 0"
        )


def agreement_violations(
    method: Method, name: str, values: Mapping[str, object]
) -> Iterator[Violation]:
    """Check that a merge-wide parameter has one value; ``values``: by model."""
    first, *others = values.values()
    if any(other != first for other in others):
        by_model = ", ".join(f"{model}: {value}" for model, value in values.items())
        yield Violation(
            name,
            f"holds for the whole merge, but the models disagree ({by_model}; the default is "
            f"{method[name].default}). Write it once, under the top-level `parameters`.",
        )


def merged_violations(
    merged: Sequence[str], tasks: Sequence[str], *, one_tensor: bool = False
) -> Iterator[Violation]:
    """Check that at most one model of `svc` is the merge of the others, and those are two or more.

    ``one_tensor``: the models are those that have one tensor, which all task models may lack.
    """
    if len(merged) > 1:
        yield Violation(
            "merged",
            f"is true for {', '.join(merged)}; at most one model is the merge of the others",
        )
    elif merged and len(tasks) < SVC.fewest and (tasks or not one_tensor):
        tasks_given = f"{tasks[0]} alone" if tasks else "none"
        yield Violation(
            "merged",
            f"is true for {merged[0]}, beside which at least two task models are needed, got "
            f"{tasks_given}; list the models that were merged under `models`",
        )


def unused_violations(merged: str, values: Mapping[str, Sequence[object]]) -> Iterator[Violation]:
    """Check that nothing says how to merge where one model of `svc` is the merge already.

    ``values``: all that are written of `weight`, `scaling` and `normalize`.
    """
    for name, written in values.items():
        if any(value != SVC[name].default for value in written):
            yield Violation(
                name,
                f"would have no effect, for {merged} is `merged` already: write it where that "
                "merge is made",
            )


def unread_violations(values: Mapping[str, Sequence[object]]) -> Iterator[Violation]:
    """Check that something reads `R`; ``values``: all that are written, by parameter."""
    modes = values.get("mode") or [MONOSOUP["mode"].default]
    if values.get("R") and "variance" not in modes:
        yield Violation("R", f"is read by `mode: variance` only, and the mode is {modes[0]}")
