"""The commands, run in this process: what each of them prints and how it ends."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from click.testing import CliRunner

ENCODINGS = ["utf-8", "utf-8", "cp1252", "ascii", "cp437", "latin-1"]
PLANNED = "the merge was planned, which is all that is asked of it here"

Program = Callable[[Sequence[str]], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command; what it raised, if anything."""

    code: int
    output: str
    errors: str
    raised: BaseException | None = None


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what is expected of it.

    Attributes:
        names: an error must have one of them in it.
        writes: paths in the work folder that it may write.
    """

    program: Program
    arguments: Sequence[str]
    names: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [argument if len(argument) < 200 else "…" for argument in self.arguments]
        return f"{getattr(self.program, '__name__', self.program)} {words}"


def monosoup(arguments: Sequence[str], encoding: str = "utf-8") -> Outcome:
    """Run `mergekit-monosoup`, with an output in some encoding."""
    from mergekit_monosoup.cli import main

    result = CliRunner(charset=encoding).invoke(main, list(arguments))
    raised = None if isinstance(result.exception, SystemExit) else result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr, raised)


def in_some_encoding(rng: random.Random) -> Program:
    """Return :func:`monosoup` with the output of some system."""
    return partial(monosoup, encoding=rng.choice(ENCODINGS))


class _Planned:
    """In the place of mergekit's executor: all is read and planned, and nothing merged."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def run(self, *_: Any, **__: Any) -> Any:
        raise ValueError(PLANNED)


@contextmanager
def _without_merging() -> Any:
    import mergekit.merge

    module: Any = mergekit.merge
    original, module.Executor = module.Executor, _Planned
    try:
        yield
    finally:
        module.Executor = original


def reading_part_of_run(arguments: Sequence[str]) -> Outcome:
    """Run `mergekit-monosoup run` up to the end of mergekit's planning."""
    with _without_merging():
        outcome = monosoup(["run", *arguments])
    return replace(outcome, code=0) if PLANNED in outcome.errors else outcome


def _python(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Outcome:
    output, errors, raised, code = io.StringIO(), io.StringIO(), None, 1
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception as error:
            raised = error
    return Outcome(code, output.getvalue(), errors.getvalue(), raised)


def tables(arguments: Sequence[str]) -> Outcome:
    """Run `python -m evaluation.tables`."""
    from evaluation import tables as program

    return _python(program.main, arguments)


def figures(arguments: Sequence[str]) -> Outcome:
    """Run `python -m evaluation.figures`."""
    from evaluation import figures as program

    return _python(program.main, arguments)


def load_suite(arguments: Sequence[str]) -> Outcome:
    """Load a suite as every program of evaluation/ does before anything else."""
    from evaluation import options, suite

    return _python(
        lambda paths: options.exit_code(lambda: suite.load(*paths), interruption=""), arguments
    )
