"""Draw the ID–OOD plane and bars per task: `python -m evaluation.figures results/NAME…`.

From results alone, see `drawings`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation import drawings, options
from evaluation.comparison import compare
from mergekit_monosoup import terminal


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.figures", description=__doc__)
    options.add_comparison(parser, "as for evaluation.tables")
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default: the first FOLDER)"
    )
    parser.add_argument(
        "--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s"
    )
    given = parser.parse_args(arguments)
    return options.exit_code(lambda: _draw(given), interruption="")


def _draw(given: argparse.Namespace) -> None:
    comparisons = compare(given.folders, given.reference)
    out = given.out or given.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    for path in drawings.draw(comparisons, out, given.format):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
