"""Evaluate many settings, each MonoSoup beside its controls: `python -m evaluation.sweep SUITE …`.

For every MonoSoup there are two models that shrink ΔW by the same norm without looking at its
spectrum: `scalar`, tensor by tensor, and `same_norm`, Wise-FT with one number for the whole model.
A gain that they show too is a gain of shrinking.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from evaluation import configs, drawings, file_merges, options, sources
from evaluation.comparison import compare
from evaluation.configs import ABLATIONS, KINDS, write_config
from evaluation.evaluator import evaluate
from evaluation.formatting import difference_text
from evaluation.sources import FINETUNED, PRETRAINED
from evaluation.suite import load
from mergekit_monosoup import terminal


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    given = _parser().parse_args(arguments)
    options.without_tokenizer_threads()
    command = options.command_line("evaluation.sweep", arguments)
    return options.exit_code(lambda: _sweep(given, command))


def _sweep(given: argparse.Namespace, command: str) -> None:
    suite = load(given.suite)
    out = given.out or Path("results", f"{suite.name}-sweep")
    models = _models(given, out)
    evaluate(
        suite,
        models,
        out,
        options.engine(given),
        command=command,
        merge_cache=given.merge_cache,
    )
    for line in against_controls(out, suite.name, list(models)):
        print(line)
    if "monosoup" in given.methods:
        ends = sources.local(given.finetuned), sources.local(given.pretrained)
        if remark := configs.dominant_tensor(*ends):
            print(remark)
    for path in drawings.draw(compare([out], FINETUNED, models), out, "png"):
        print(path)


def _models(given: argparse.Namespace, out: Path) -> dict[str, str]:
    """Write the configurations into `out` and return the paths of all models by name."""
    pretrained, finetuned = (
        str(file_merges.mergeable(sources.local(place).resolve()))
        for place in (given.pretrained, given.finetuned)
    )
    methods = given.methods
    if Path(finetuned).is_file() and "lines" in methods:
        print("lines is left out: mergekit-pytorch, which merges files, knows no layers")
        methods = [name for name in methods if name != "lines"]
    models = {PRETRAINED: given.pretrained, FINETUNED: given.finetuned}

    def add(name: str, config: configs.Config) -> None:
        models[name] = str(write_config(out / "configs" / f"{name}.yml", config))

    for name, config in configs.grid(pretrained, finetuned, methods, given.R, given.alpha):
        add(name, config)
        if name.startswith("monosoup") and "alpha" not in config["parameters"]:
            merged = sources.find(name, models[name], given.merge_cache)
            weight = configs.same_norm_weight(merged.folder, Path(finetuned), Path(pretrained))
            control = name.replace("monosoup", "same_norm")
            add(control, configs.wise_ft(pretrained, finetuned, weight))
    return models


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.sweep", description=__doc__)
    options.add_suite(parser)
    parser.add_argument("--pretrained", required=True, help="W0: a folder, a hub name or a file")
    parser.add_argument("--finetuned", required=True, help="W1: the same")
    parser.add_argument(
        "--R",
        type=options.numbers,
        default=options.numbers("0.5:0.95:0.05"),
        help="FROM:TO:STEP or a list (default: 0.5:0.95:0.05)",
    )
    parser.add_argument(
        "--alpha",
        type=options.numbers,
        default=options.numbers("0:1:0.1"),
        help="the same, of curves (default: 0:1:0.1)",
    )
    parser.add_argument(
        "--methods",
        type=_methods,
        default=list(KINDS),
        help=f"default: {','.join(KINDS)}; {ABLATIONS}: other rules for the two coefficients",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: results/SUITE-sweep)"
    )
    options.add_engine(parser)
    options.add_merge_cache(
        parser,
        "where merged models stay, one of the model's size per setting (default: %(default)s)",
    )
    return parser


def _methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in (*KINDS, ABLATIONS)]:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join([*KINDS, ABLATIONS])}"
        )
    return names


def against_controls(out: Path, suite: str, models: Collection[str]) -> list[str]:
    """Return one line per MonoSoup of `models` and control: the paired difference.

    The folder may hold models of an earlier sweep, of another fine-tune.
    """
    lines = []
    for model in sorted(models):
        for kind in ("scalar", "same_norm"):
            control = model.replace("monosoup", kind)
            if control == model or control not in models:
                continue
            comparisons = compare([out], control, {model, control})
            comparison = next(c for c in comparisons if c.suite.name == suite)
            id_, ood = (difference_text(cell) for cell in comparison.averages(model))
            lines.append(f"{model} minus {control}: ID {id_}; OOD {ood}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
