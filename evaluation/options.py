"""What the programs share: types of arguments, options, and how errors are printed."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from evaluation.comparison import ComparisonError
from evaluation.engines import EvaluationError, Options
from evaluation.sources import FINETUNED, MERGE_CACHE, SourceError
from evaluation.store import MODEL_NAME, DamagedError
from evaluation.suite import SuiteError, shipped
from mergekit_monosoup import terminal

# What the user can put right: one line without a traceback.
ERRORS = (SuiteError, SourceError, EvaluationError, DamagedError, ComparisonError, OSError)
RESUMABLE = (
    ": what was finished is kept, and the same command goes on from there "
    "(with --fresh it starts over)"
)


MOST_SETTINGS = 1000  # of a sweep


def exit_code(work: Callable[[], None], interruption: str = RESUMABLE) -> int:
    """Do the work and return the program's exit code: 0, 1 after an error, 130 if interrupted.

    An error that the user can put right is printed in one line; others are raised.
    `interruption`: what is printed after "interrupted".
    """
    try:
        work()
    except KeyboardInterrupt:
        print(f"interrupted{interruption}", file=sys.stderr)
        return 130
    except ERRORS as error:
        if terminal.of_output(error):
            raise
        print(f"error: {terminal.message(_words(error))}", file=sys.stderr)
        return 1
    return 0


def _words(error: Exception) -> str:
    """Return what an error says; of the file system's the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def command_line(program: str, arguments: Sequence[str] | None) -> str:
    """Return the command that started this program, as results record it."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", program, *given])


def without_tokenizer_threads() -> None:
    """Let tokenizers start no threads: they and the forks of `datasets` would deadlock.

    To be called before transformers is imported, which reads the setting once.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def positive(text: str) -> int:
    """Return a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def count(text: str) -> int:
    """Return a whole number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def named_path(text: str) -> tuple[str, str]:
    """Return (name, path) of NAME=PATH."""
    name, separator, path = text.partition("=")
    if not separator or not path or not re.fullmatch(MODEL_NAME, name):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PATH (a name: letters, digits, _ . , + -, no dot in front)"
        )
    return name, path


def numbers(text: str) -> list[float]:
    """Return the numbers of `0.5:0.95:0.05`, both ends included, or of `0.5,0.8`; all in [0, 1]."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            if not (step > 0 and last >= first):
                raise ValueError(text)
            steps = math.floor(min((last - first) / step, MOST_SETTINGS) + 1e-9)
            values = [first + step * i for i in range(steps + 1)]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither FROM:TO:STEP nor a list of numbers"
        ) from None
    if len(values) > MOST_SETTINGS:
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} stands for more than {MOST_SETTINGS} numbers, each of which is a merge"
        )
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} leaves the range from 0 to 1")
    return [round(value, 10) for value in values]


def by_name(models: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the paths of --model by name.

    Raises:
        SuiteError: a name is given twice.
    """
    named = dict(models)
    if len(named) < len(models):
        raise SuiteError("--model: two models have the same name")
    return named


def add_suite(parser: argparse.ArgumentParser) -> None:
    """Add SUITE, the suite's name or path."""
    parser.add_argument(
        "suite", metavar="SUITE", help=f"{', '.join(shipped())}, or the path of a suite file"
    )


def add_models(parser: argparse.ArgumentParser, explanation: str) -> None:
    """Add --model, which is given once for each model."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=named_path,
        metavar="NAME=PATH",
        help=explanation,
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what engines know: see `engine`."""
    parser.add_argument(
        "--limit",
        type=positive,
        help="only N items of each task: lm-eval's first; of texts and images to classify some "
        "from all over, for they are often sorted by class",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one)"
    )
    parser.add_argument(
        "--dtype",
        help="for loading: float32, bfloat16 (default: the checkpoint's, of images float32)",
    )
    parser.add_argument(
        "--backend", choices=("hf", "vllm"), help="what runs language models (default: hf)"
    )
    images = parser.add_argument_group("suites of classifiers")
    images.add_argument("--data", type=Path, help="folder that the data sets lie in")
    images.add_argument("--batch-size", type=positive, help="default: the suite's")
    images.add_argument(
        "--workers", type=count, help="processes that read images (default: one for each core)"
    )
    images.add_argument(
        "--architecture",
        help="timm's name of it, for files of weights that do not say it, or open_clip's, for a "
        "CLIP that is none of OpenAI's",
    )


def engine(given: argparse.Namespace) -> Options:
    """Return what the command line tells an engine."""
    return Options(**{option.name: getattr(given, option.name, None) for option in fields(Options)})


def add_merge_cache(parser: argparse.ArgumentParser, explanation: str) -> None:
    """Add --merge-cache."""
    parser.add_argument("--merge-cache", type=Path, default=MERGE_CACHE, help=explanation)


def add_comparison(parser: argparse.ArgumentParser, folders: str) -> None:
    """Add the results folders to compare, and --reference; `folders`: the help of the former."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=folders)
    parser.add_argument(
        "--reference", default=FINETUNED, help="what differences are from (default: %(default)s)"
    )
