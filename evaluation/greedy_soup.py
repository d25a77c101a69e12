"""Plain greedy soup (Wortsman et al. 2022) by held-out score: `python -m evaluation.greedy_soup`.

Models by falling score; each is kept if the uniform average of the kept ones and it scores higher
than without it. mergekit averages (`linear`), the suite's engine scores, and what either has
finished is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation import configs, file_merges, options, sources, store
from evaluation.engines import Options
from evaluation.evaluator import evaluate
from evaluation.suite import GroupName, Suite, SuiteError, load
from mergekit_monosoup import terminal


@dataclass(frozen=True)
class Step:
    """One candidate: the score of the soup with it, and whether it stays."""

    model: str
    score: float
    kept: bool


def greedy_soup(scores: Mapping[str, float], score: Callable[[Sequence[str]], float]) -> list[Step]:
    """Return the steps of the greedy pass over ``scores``, of which more is better.

    ``score`` is that of an average of several models.

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


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    given = _parser().parse_args(arguments)
    options.without_tokenizer_threads()
    command = options.command_line("evaluation.greedy_soup", arguments)
    return options.exit_code(lambda: _choose(given, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.greedy_soup", description=__doc__)
    options.add_suite(parser)
    options.add_models(parser, "an ingredient; give several")
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
    options.add_engine(parser)
    return parser


@dataclass(frozen=True)
class _Scorer:
    """Scores of models on one group of a suite, from results in `out`."""

    suite: Suite
    group: GroupName
    out: Path
    command: str
    asking: Options

    def scores(self, models: Mapping[str, str]) -> dict[str, float]:
        """Ask the models and return their averages."""
        evaluate(
            self.suite,
            models,
            self.out,
            self.asking,
            command=self.command,
            merge_cache=self.out / "merged",
        )
        files = {name: store.ResultFiles(self.out, name, self.suite.name) for name in models}
        return {name: of_model.read().groups[self.group].mean for name, of_model in files.items()}


def _choose(given: argparse.Namespace, command: str) -> None:
    suite, models = load(given.suite), options.by_name(given.model)
    if joined := [name for name in models if "+" in name]:
        raise SuiteError(
            f"--model: {joined[0]}: a + joins the names of a soup's models; take another character"
        )
    if suite.public:
        print(
            f"warning: {suite.name} is made of public test sets; "
            "a soup chosen by its score is tuned on them",
            file=sys.stderr,
        )
    out = given.out or Path("results", f"{suite.name}-greedy-soup")
    scorer = _Scorer(suite, given.group, out, command, options.engine(given))
    ingredients = {name: _ingredient(name, path, out / "merged") for name, path in models.items()}

    def average(chosen: Sequence[str]) -> Path:
        config = configs.average([ingredients[name] for name in chosen])
        return configs.write_config(out / "configs" / f"{'+'.join(chosen)}.yml", config)

    def score(chosen: Sequence[str]) -> float:
        name = "+".join(chosen)
        return scorer.scores({name: str(average(chosen))})[name]

    steps = greedy_soup(scorer.scores(models), score)
    for step in steps:
        decision = "kept" if step.kept else "left"
        print(f"{decision}  {step.model}: {given.group} {100 * step.score:.2f} %")
    print(f"greedy soup: {average([step.model for step in steps if step.kept])}")


def _ingredient(name: str, path: str, cache: Path) -> str:
    """Return the path of a model as a configuration names it.

    What a configuration merges to is what is averaged, not the configuration. Paths that exist
    become absolute: mergekit reads a relative path from the folder it runs in, and takes `a/b` for
    a hub name.
    """
    if path.lower().endswith((".yml", ".yaml")):
        path = str(sources.find(name, path, cache).folder)
    return str(file_merges.mergeable(Path(path).resolve())) if Path(path).exists() else path


if __name__ == "__main__":
    sys.exit(main())
