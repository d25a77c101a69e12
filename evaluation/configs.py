"""Merge configurations: what sweeps, soups and ablations merge, and the controls of equal norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from evaluation.sources import SourceError
from mergekit_monosoup.checkpoints.pickles import named_tensors
from mergekit_monosoup.files import write_text

KINDS = ("monosoup", "wise_ft", "lines", "monosoup_wise")  # of `grid`
ABLATIONS = "ablations"  # one more, which is not swept unless it is asked for
RULES = ("rho", "cos", "uniform", "high", "low")  # of coefficients (paper, Figure 6, right)

Config = dict[str, Any]


def monosoup(pretrained: str, finetuned: Sequence[str], **parameters: Any) -> Config:
    """Return a MonoSoup of one fine-tuned model, or of the average of several."""
    models = [{"model": model} for model in finetuned]
    return {
        "merge_method": "monosoup",
        "base_model": pretrained,
        "models": models,
        "parameters": parameters,
    }


def wise_ft(pretrained: str, finetuned: str, weight: float | list[float]) -> Config:
    """Return a Wise-FT: W0 + weight·ΔW; a list of weights is a gradient over the layers (LiNeS)."""
    models = [{"model": finetuned, "parameters": {"weight": weight}}]
    return {"merge_method": "task_arithmetic", "base_model": pretrained, "models": models}


def average(models: Sequence[str]) -> Config:
    """Return the uniform average of the models."""
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": entries}


def write_config(path: Path, config: Config) -> Path:
    """Write a configuration as YAML and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    return path


def grid(
    pretrained: str,
    finetuned: str,
    methods: Sequence[str],
    energies: Sequence[float],
    alphas: Sequence[float],
) -> Iterator[tuple[str, Config]]:
    """Yield (name, configuration) of many settings, each MonoSoup beside its scalar control.

    `methods` are some of KINDS and ABLATIONS, `energies` values of R, `alphas` weights on a curve.
    Weights 0 and 1 of a curve are W0 and W1 themselves and are not merged.
    """
    if "monosoup" in methods:
        settings: dict[str, dict[str, Any]] = {"free": {"mode": "freevariance"}}
        settings |= {f"R{R:g}": {"mode": "variance", "R": R} for R in energies if R > 0}
        for name, setting in settings.items():
            yield f"monosoup_{name}", monosoup(pretrained, [finetuned], **setting)
            scalar = monosoup(pretrained, [finetuned], **setting, coefficients="scalar")
            yield f"scalar_{name}", scalar
    for rule in RULES if ABLATIONS in methods else ():
        yield f"{rule}_free", monosoup(pretrained, [finetuned], coefficients=rule)
    for alpha in (alpha for alpha in alphas if 0 < alpha < 1):
        if "wise_ft" in methods:
            yield f"wise_ft_{alpha:g}", wise_ft(pretrained, finetuned, alpha)
        if "lines" in methods:  # the weight grows with depth
            yield f"lines_{alpha:g}", wise_ft(pretrained, finetuned, [alpha, 1.0])
        if "monosoup_wise" in methods:
            config = monosoup(pretrained, [finetuned], mode="freevariance", alpha=alpha)
            yield f"monosoup_wise_{alpha:g}", config


def update_norms(model: Path, base: Path) -> dict[str, float]:
    """Return ‖W − W0‖_F of each tensor that both have in the same shape.

    In float64, one tensor at a time.
    """
    readers, norms = _readers(base), {}
    for name, read in _readers(model).items():
        if name in readers:
            tensor, origin = read(), readers[name]()
            if tensor.shape == origin.shape:
                norms[name] = float((tensor.double() - origin.double()).norm())
    return norms


def same_norm_weight(model: Path, finetuned: Path, base: Path) -> float:
    """Return the weight at which Wise-FT moves the whole model as far from W0 as `model` is.

    Raises:
        SourceError: W1 is W0.
    """
    whole = math.hypot(*update_norms(finetuned, base).values())
    if whole == 0.0:
        raise SourceError(
            f"{finetuned}: no .safetensors tensor of it differs from {base}: "
            "there is no update to sweep"
        )
    return math.hypot(*update_norms(model, base).values()) / whole


def dominant_tensor(finetuned: Path, base: Path) -> str | None:
    """Return a remark if one tensor is most of the update, else None.

    A norm of the whole model then says little about the rest of it.
    """
    squares = {name: norm**2 for name, norm in update_norms(finetuned, base).items()}
    name = max(squares, key=lambda tensor: squares[tensor])
    share = squares[name] / sum(squares.values())
    if share <= 0.5:
        return None
    return (
        f"{name} alone is {100 * share:.0f} % of ‖ΔW‖² of the whole model, "
        "so same_norm mostly follows how that one shrank"
    )


def _readers(place: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a function for each tensor of a checkpoint, a folder or a file, which reads it."""
    if place.is_file() and place.suffix != ".safetensors":
        loaded = named_tensors(str(place), "cpu")
        return {name: lambda name=name: loaded[name] for name in loaded}  # type: ignore[misc]
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for path in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        file = safe_open(path, framework="pt")  # maps the file; nothing is read yet
        for name in file.keys():  # noqa: SIM118 - not a mapping
            readers[name] = lambda file=file, name=name: file.get_tensor(name)  # type: ignore[misc]
    return readers
