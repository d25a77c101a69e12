"""Which curve a merged model lies on, read off its configuration: methods with one number that somebody can vary."""

from __future__ import annotations

from typing import Any

WISE_FT, LINES, MONOSOUP, MONOSOUP_WISE, SCALAR = (
    "Wise-FT",
    "LiNeS",
    "MonoSoup, R",
    "MonoSoup + Wise-FT",
    "scalar control, R",
)


def family(merge: dict[str, Any] | None) -> tuple[str, float] | None:
    """(curve, the number) of a merge of one fine-tuned model; None for anything with more than one number."""
    config = (merge or {}).get("config")
    if not isinstance(config, dict) or (tuned := _tuned(config)) is None:
        return None
    parameters = {**(config.get("parameters") or {}), **(tuned.get("parameters") or {})}
    parameters.pop("report", None)
    if config.get("merge_method") == "task_arithmetic":
        return _task_arithmetic(parameters)
    if config.get("merge_method") == "monosoup":
        return _monosoup(parameters)
    return None


def inputs(merge: dict[str, Any]) -> tuple[str, str]:
    """(base model, fine-tuned model) of a merge that has a family, as its configuration calls them."""
    return str(merge["config"].get("base_model")), str(_tuned(merge["config"])["model"])


def _tuned(config: dict[str, Any]) -> Any:
    """The entry of the only fine-tuned model; None if there are several."""
    models = config.get("models") or []
    tuned = [
        m for m in models if isinstance(m, dict) and m.get("model") != config.get("base_model")
    ]
    return tuned[0] if len(tuned) == 1 else None


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
