"""Merge and evaluate many settings, each MonoSoup beside its controls: `python -m evaluation.sweep SUITE …`.

For every MonoSoup there are two models that shrink ΔW by the same norm without looking at its spectrum: `scalar`, tensor by
tensor, and `same_norm`, Wise-FT with one number for the whole model. A gain that they show too is a gain of shrinking.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from evaluation import sources
from evaluation.comparison import compare
from evaluation.figures import averages, draw
from evaluation.run import PRETRAINED, positive, problems, run
from evaluation.suite import load, shipped
from evaluation.tables import difference_text

FINETUNED = "finetuned"
METHODS = ("monosoup", "wise_ft", "lines", "monosoup_wise")

Config = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in evaluation.run
    command = shlex.join(
        ["python", "-m", "evaluation.sweep", *(sys.argv[1:] if arguments is None else arguments)]
    )

    def work() -> None:
        suite = load(options.suite)
        out = options.out or Path("results", f"{suite.name}-sweep")
        pretrained, finetuned = (
            str(sources.local(place).resolve()) for place in (options.pretrained, options.finetuned)
        )
        made = list(configs(pretrained, finetuned, options.methods, options.R, options.alpha))
        given = {PRETRAINED: options.pretrained, FINETUNED: options.finetuned}
        for name, config in made:
            given[name] = str(write_config(out / "configs" / f"{name}.yml", config))
            if name.startswith("monosoup") and "alpha" not in config["parameters"]:
                merged = sources.find(name, given[name], options.merge_cache)
                weight = same_norm_weight(merged.folder, Path(finetuned), Path(pretrained))
                control = name.replace("monosoup", "same_norm")
                given[control] = str(
                    write_config(
                        out / "configs" / f"{control}.yml", wise_ft(pretrained, finetuned, weight)
                    )
                )
        run(
            suite,
            given,
            out,
            command=command,
            limit=options.limit,
            device=options.device,
            dtype=options.dtype,
            merge_cache=options.merge_cache,
        )
        for line in against_controls(out, suite.name, list(given)):
            print(line)
        if "monosoup" in options.methods and (
            remark := dominated(Path(finetuned), Path(pretrained))
        ):
            print(remark)
        for path in draw(compare([out], FINETUNED, given), out, "png"):
            print(path)

    return problems(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.sweep", description=__doc__)
    parser.add_argument(
        "suite", metavar="SUITE", help=f"{', '.join(shipped())}, or the path of a suite file"
    )
    parser.add_argument("--pretrained", required=True, help="W0: a folder or a hub name")
    parser.add_argument("--finetuned", required=True, help="W1: a folder or a hub name")
    parser.add_argument(
        "--R",
        type=numbers,
        default=numbers("0.5:0.95:0.05"),
        help="FROM:TO:STEP or a list (default: 0.5:0.95:0.05)",
    )
    parser.add_argument(
        "--alpha",
        type=numbers,
        default=numbers("0:1:0.1"),
        help="the same, of curves (default: 0:1:0.1)",
    )
    parser.add_argument(
        "--methods", type=_methods, default=list(METHODS), help=f"default: {','.join(METHODS)}"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: results/SUITE-sweep)"
    )
    parser.add_argument("--limit", type=positive, help="only the first N items of each task")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="for loading (default: the checkpoint's)")
    parser.add_argument(
        "--merge-cache",
        type=Path,
        default=Path("results", "merged"),
        help="where merged models stay, one of the model's size per setting (default: %(default)s)",
    )
    return parser


def numbers(text: str) -> list[float]:
    """`0.5:0.95:0.05` with both ends, or `0.5,0.8`."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            if step <= 0 or last < first:
                raise ValueError(text)
            found = [first + step * i for i in range(math.floor((last - first) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither FROM:TO:STEP nor a list of numbers"
        ) from None
    if not all(0 <= number <= 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} leaves the range from 0 to 1")
    return [round(number, 10) for number in found]


def _methods(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in METHODS]:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join(METHODS)}"
        )
    return found


def configs(
    pretrained: str,
    finetuned: str,
    methods: Sequence[str],
    energies: Sequence[float],
    alphas: Sequence[float],
) -> Iterator[tuple[str, Config]]:
    """(name, merge configuration). Weights 0 and 1 of a curve are W0 and W1 themselves and are not merged."""
    inner = [alpha for alpha in alphas if 0 < alpha < 1]

    if "monosoup" in methods:
        settings = {"free": {"mode": "freevariance"}} | {
            f"R{R:g}": {"mode": "variance", "R": R} for R in energies if R > 0
        }
        for name, setting in settings.items():
            yield f"monosoup_{name}", monosoup(pretrained, [finetuned], **setting)
            yield (
                f"scalar_{name}",
                monosoup(pretrained, [finetuned], **setting, coefficients="scalar"),
            )
    for alpha in inner:
        if "wise_ft" in methods:
            yield f"wise_ft_{alpha:g}", wise_ft(pretrained, finetuned, alpha)
        if "lines" in methods:
            yield (
                f"lines_{alpha:g}",
                wise_ft(pretrained, finetuned, [alpha, 1.0]),
            )  # grows with depth
        if "monosoup_wise" in methods:
            yield (
                f"monosoup_wise_{alpha:g}",
                monosoup(pretrained, [finetuned], mode="freevariance", alpha=alpha),
            )


def monosoup(pretrained: str, finetuned: Sequence[str], **parameters: Any) -> Config:
    models = [{"model": model} for model in finetuned]
    return {
        "merge_method": "monosoup",
        "base_model": pretrained,
        "models": models,
        "parameters": parameters,
    }


def wise_ft(pretrained: str, finetuned: str, weight: float | list[float]) -> Config:
    models = [{"model": finetuned, "parameters": {"weight": weight}}]
    return {"merge_method": "task_arithmetic", "base_model": pretrained, "models": models}


def write_config(path: Path, config: Config) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def update_norms(model: Path, base: Path) -> dict[str, float]:
    """‖W − W0‖_F of each tensor that both have in the same shape, in float64, one tensor at a time."""
    readers, found = _readers(base), {}
    for name, read in _readers(model).items():
        if name in readers:
            tensor, origin = read(), readers[name]()
            if tensor.shape == origin.shape:
                found[name] = float((tensor.double() - origin.double()).norm())
    return found


def same_norm_weight(model: Path, finetuned: Path, base: Path) -> float:
    """The weight at which Wise-FT moves the whole model as far from W0 as `model` is."""
    whole = math.hypot(*update_norms(finetuned, base).values())
    if whole == 0.0:
        raise sources.SourceError(
            f"{finetuned}: no .safetensors tensor of it differs from {base}: there is no update to sweep"
        )
    return math.hypot(*update_norms(model, base).values()) / whole


def dominated(finetuned: Path, base: Path) -> str | None:
    """Said if one tensor is most of the update: a norm of the whole model then says little about the rest of it."""
    squares = {name: norm**2 for name, norm in update_norms(finetuned, base).items()}
    name = max(squares, key=lambda each: squares[each])
    share = squares[name] / sum(squares.values())
    if share <= 0.5:
        return None
    return f"{name} alone is {100 * share:.0f} % of ‖ΔW‖² of the whole model, so same_norm mostly follows how that one shrank"


def _readers(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")  # maps the file; nothing is read yet
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found[name] = lambda file=file, name=name: file.get_tensor(name)  # type: ignore[misc]
    return found


def against_controls(out: Path, suite: str, models: Collection[str]) -> list[str]:
    """One line per MonoSoup and control of `models`: the paired difference, in words that cannot be misread.

    The folder may hold models of an earlier sweep, of another fine-tune.
    """
    lines = []
    for model in sorted(models):
        for kind in ("scalar", "same_norm"):
            control = model.replace("monosoup", kind)
            if control == model or control not in models:
                continue
            against = next(
                c for c in compare([out], control, {model, control}) if c.suite.name == suite
            )
            id_, ood = (difference_text(cell) for cell in averages(against, model))
            lines.append(f"{model} minus {control}: ID {id_}; OOD {ood}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
