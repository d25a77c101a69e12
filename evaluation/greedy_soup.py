"""Plain greedy soup (Wortsman et al. 2022), by held-out score: `python -m evaluation.greedy_soup SUITE --model A=PATH …`.

Models by falling score; each is kept if the uniform average of the kept ones and it scores higher than without it. mergekit
averages (`linear`), lm-eval scores, and what either has finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation import sources, store
from evaluation.run import model_argument, positive, problems, run
from evaluation.suite import GroupName, Suite, SuiteError, load, shipped
from evaluation.sweep import write_config


@dataclass(frozen=True)
class Step:
    """One candidate: the score of the soup with it, and whether it stays."""

    model: str
    score: float
    kept: bool


def greedy_soup(scores: Mapping[str, float], score: Callable[[Sequence[str]], float]) -> list[Step]:
    """The greedy pass over ``scores``, of which more is better; ``score`` is that of an average of several models.

    Raises:
        ValueError: there is no model.
    """
    if not scores:
        raise ValueError("a soup needs at least one model")
    first, *others = sorted(scores, key=lambda model: -scores[model])  # stable: ties stay as given
    steps, soup, best = [Step(first, scores[first], True)], [first], scores[first]
    for candidate in others:
        reached = score([*soup, candidate])
        kept = reached > best
        steps.append(Step(candidate, reached, kept))
        if kept:
            soup, best = [*soup, candidate], reached
    return steps


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in evaluation.run
    command = shlex.join(
        [
            "python",
            "-m",
            "evaluation.greedy_soup",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
    )

    def work() -> None:
        suite, models = load(options.suite), dict(options.model)
        if len(models) < len(options.model):
            raise SuiteError("--model: two models have the same name")
        if joined := [name for name in models if "+" in name]:
            raise SuiteError(
                f"--model: {joined[0]}: a + joins the names of a soup's models; take another character"
            )
        if suite.public:
            print(
                f"warning: {suite.name} is made of public test sets; a soup chosen by its score is tuned on them",
                file=sys.stderr,
            )
        out = options.out or Path("results", f"{suite.name}-greedy-soup")
        _choose(suite, models, options.group, out, command, options.limit, options.device)

    return problems(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.greedy_soup", description=__doc__)
    parser.add_argument(
        "suite", metavar="SUITE", help=f"{', '.join(shipped())}, or the path of a suite file"
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=model_argument,
        metavar="NAME=PATH",
        help="an ingredient; give several",
    )
    parser.add_argument(
        "--group",
        choices=("ID", "OOD"),
        default="ID",
        help="whose average decides (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results and configurations (default: results/SUITE-greedy-soup)",
    )
    parser.add_argument("--limit", type=positive, help="only the first N items of each task")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    return parser


def _choose(
    suite: Suite,
    models: Mapping[str, str],
    group: GroupName,
    out: Path,
    command: str,
    limit: int | None,
    device: str | None,
) -> None:
    def scored(given: dict[str, str]) -> dict[str, float]:
        run(
            suite,
            given,
            out,
            command=command,
            limit=limit,
            device=device,
            merge_cache=out / "merged",
        )
        results = {name: store.Pair(out, name, suite.name).result for name in given}
        return {
            name: json.loads(path.read_text("utf-8"))["groups"][group]["mean"]
            for name, path in results.items()
        }

    # What a configuration merges to is what is averaged, not the configuration.
    ingredients = {
        name: str(sources.find(name, path, out / "merged").folder)
        if path.lower().endswith((".yml", ".yaml"))
        else path
        for name, path in models.items()
    }

    def average(chosen: Sequence[str]) -> Path:
        entries = [
            {"model": _reference(ingredients[name]), "parameters": {"weight": 1.0}}
            for name in chosen
        ]
        config = {"merge_method": "linear", "models": entries}
        return write_config(out / "configs" / f"{'+'.join(chosen)}.yml", config)

    def score(chosen: Sequence[str]) -> float:
        name = "+".join(chosen)
        return scored({name: str(average(chosen))})[name]

    steps = greedy_soup(scored(dict(models)), score)
    for step in steps:
        print(f"{'kept' if step.kept else 'left'}  {step.model}: {group} {100 * step.score:.2f} %")
    print(f"greedy soup: {average([step.model for step in steps if step.kept])}")


def _reference(path: str) -> str:
    """mergekit reads a relative path from the folder it runs in, and takes `a/b` for a hub name."""
    return str(Path(path).resolve()) if Path(path).exists() else path


if __name__ == "__main__":
    sys.exit(main())
