"""Engines: the libraries that ask models questions, one module each, the only ones to import them.

A suite names its engine. To add one: a module here with a class `Engine`, as the protocol below
describes it, and its name in `ENGINES`. Everything else (results and resuming, pairs of answers,
tables, figures, sweeps, soups) knows engines by the protocol alone. What a task needs of one engine
is a key of its own in `suite.Task`, which the engine checks.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from evaluation.sources import Source
    from evaluation.store import TaskResult
    from evaluation.suite import Suite, Task


T = TypeVar("T")


class EvaluationError(RuntimeError):
    """An engine cannot do what the suite asks for; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """What decides answers besides suite and model."""

    backend: str = "hf"
    device: str = "cpu"
    dtype: str = "auto"
    limit: int | None = None  # only some items of each task, the first so many unless it says more


@dataclass(frozen=True)
class Options:
    """What a command line tells an engine; None where it says nothing and the engine chooses."""

    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    data: Path | None = None  # folder that the suite's data lies in
    batch_size: int | None = None
    workers: int | None = None  # processes that read data
    architecture: str | None = None  # of files that hold weights alone


NOTHING_SAID = Options()


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return `limit` items from all over: files and folders are often sorted by class."""
    total = len(items)
    if limit is None or limit >= total:
        return items
    return [items[number * total // limit] for number in range(limit)]


class Model(Protocol):
    """A checkpoint that is loaded."""

    def ask(self, task: Task) -> TaskResult:
        """Ask all items of one task of the suite.

        The score of `task.key` is in the values of every sample, and a task's score is their mean.
        An item has the same `Sample.item()` whichever model is asked.

        Raises:
            EvaluationError: this model cannot answer it.
        """


class Engine(Protocol):
    """A suite that is about to be asked, with settings. Its module's class has this name.

    Its constructor checks suite and options, which takes no model: what cannot be asked is said
    before anything is merged or loaded.
    """

    settings: Settings  # with the engine's choice where the options say nothing

    def __init__(self, suite: Suite, options: Options, out: Path) -> None:
        """Check suite and options; `out` is the results folder, for files that items lie in.

        Raises:
            EvaluationError: the engine cannot do what they ask for.
        """

    @property
    def decides(self) -> Mapping[str, Any]:
        """What decides answers beside suite, settings, versions and model: digests of data, say.

        As JSON has it; part of the key of every result.
        """

    def warnings(self, models: Sequence[Source]) -> Iterator[str]:
        """Yield what differs between models that are to be compared, and may decide answers."""

    def check(self, models: Sequence[Source]) -> None:
        """Check what can be checked of data and of models that are to be asked, before the first.

        Raises:
            EvaluationError: asking them would stop half-way.
        """

    def model(self, source: Source) -> AbstractContextManager[Model]:
        """Load a checkpoint; leaving the context frees its memory for the next.

        Raises:
            EvaluationError: it cannot be loaded.
        """


@dataclass(frozen=True)
class Library:
    """What is known of an engine without importing it."""

    extra: str  # of pyproject.toml, that brings it
    packages: tuple[str, ...]  # whose versions decide what a model is asked and answers
    options: frozenset[str]  # of `Options`, beside device, dtype and limit, that it knows


ENGINES = {
    "language": Library(
        extra="eval",
        packages=("lm-eval", "transformers", "torch"),
        options=frozenset({"backend"}),
    ),
    "vision": Library(
        extra="vision",
        packages=("timm", "open-clip-torch", "torchvision", "pillow", "transformers", "torch"),
        options=frozenset({"data", "batch_size", "workers", "architecture"}),
    ),
    "text_classifier": Library(
        extra="eval",
        packages=("transformers", "torch"),
        options=frozenset({"data", "batch_size"}),
    ),
}
"""Every engine by the name that suites give it, which is its module's."""

COMMON = frozenset({"device", "dtype", "limit"})  # options that every engine knows


def start(suite: Suite, options: Options, out: Path) -> Engine:
    """Return the engine of a suite, which takes seconds: it imports its library.

    Raises:
        EvaluationError: the engine is not installed, or cannot do what suite or options ask for.
    """
    library = ENGINES[suite.engine]
    for option in fields(options):
        given = getattr(options, option.name) is not None
        if given and option.name not in library.options | COMMON:
            raise EvaluationError(_unknown(option.name, suite))
    try:
        module = importlib.import_module(f"evaluation.engines.{suite.engine}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("evaluation", "mergekit_monosoup")):
            raise
        raise EvaluationError(
            f"suite {suite.name} needs {error.name}, which is not installed: pip install "
            f'--constraint constraints.txt --editable ".[{library.extra}]"'
        ) from error
    engine: Engine = module.Engine(suite, options, out)
    return engine


def _unknown(option: str, suite: Suite) -> str:
    engines = [name for name, library in ENGINES.items() if option in library.options]
    return (
        f"--{option.replace('_', '-')} is for suites of the engine {', '.join(engines)}; "
        f"{suite.name} is one of {suite.engine}"
    )
