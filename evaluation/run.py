"""Ask checkpoints the same questions: `python -m evaluation.run SUITE --model NAME=PATH …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation import options
from evaluation.evaluator import evaluate
from evaluation.sources import FINETUNED, PRETRAINED
from evaluation.suite import load
from mergekit_monosoup import terminal


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    given = _parser().parse_args(arguments)
    options.without_tokenizer_threads()
    command = options.command_line("evaluation.run", arguments)
    return options.exit_code(lambda: _run(given, command))


def _run(given: argparse.Namespace, command: str) -> None:
    suite = load(given.suite)
    evaluate(
        suite,
        options.by_name(given.model),
        given.out or Path("results", suite.name),
        options.engine(given),
        command=command,
        merge_cache=given.merge_cache,
        fresh=given.fresh,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description=__doc__)
    options.add_suite(parser)
    options.add_models(
        parser,
        "a checkpoint, a hub name, or a merge configuration (.yml), which is merged first; give "
        f"several. The one named {PRETRAINED} is W0, the one named {FINETUNED} what others are "
        "compared with",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/SUITE)")
    options.add_engine(parser)
    options.add_merge_cache(parser, "what merges go to (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="ask again what is finished or begun")
    return parser


if __name__ == "__main__":
    sys.exit(main())
