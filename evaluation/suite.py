"""Suites: YAML files with two groups of tasks, in and out of distribution, and how to ask them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from evaluation import questions
from evaluation.engines import ENGINES
from evaluation.questions import Questions, QuestionsError
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import read_document

SHIPPED = Path(__file__).parent / "suites"
GroupName = Literal["ID", "OOD"]
NAME = r"^[A-Za-z0-9_-]+$"  # of a suite; part of file names
MOST_MISTAKES = 5  # in a message; the rest are counted

Value = bool | int | float | str | list[str]


class SuiteError(ValueError):
    """A suite cannot be used; the message names file and key."""


class _Strict(BaseModel):
    # A misspelt key would otherwise be dropped without a word, and the default used in its place.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # Fields younger than the first stored results. They are written, and reach digests, only where
    # they are not the default: or every older result would be one of another suite.
    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in self.LATER}
        written: dict[str, Any] = handler(self)
        return {
            name: value
            for name, value in written.items()
            if name not in defaults or getattr(self, name) != defaults[name]
        }


class ImageSet(_Strict):
    """A data set of images: a folder of each class, below the folder that --data names."""

    folder: str
    folders: Literal["names", "numbers", "objectnet"] = "names"
    """What the folders of classes are called: as the class, by its column, or as in ObjectNet.

    ObjectNet's folders have names of their own, and tables that lead to the classes of ImageNet: an
    answer is the class of ObjectNet whose highest logit is the highest.
    """
    classes: str | Annotated[tuple[str, ...], Field(strict=False, min_length=2)] | None = None
    """Which classes compete, the logits of others are left out. None: all of the suite's."""
    border: Annotated[int, Field(ge=0)] = 0  # pixels that are cropped off each side first
    origin: str = ""  # where the data comes from, for who does not have it


class Task(_Strict):
    """One data set, and which metric counts: a task of lm-eval, or a group of them, or images."""

    LATER = frozenset({"images", "questions", "extract"})

    questions: str | None = None  # a file of one's own, relative to the suite; see `questions`
    extract: str | None = None  # regular expression: its first group, or all, is the answer
    task: str
    label: str = ""  # column header; the task's name if empty
    metric: str
    filter: str = "none"
    images: ImageSet | None = None  # for the engine vision
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # none: the task's own number
    generation: dict[str, Value] = {}
    cluster: str | None = None
    """Which items are about the same thing and count together in standard errors.

    The name of a document field, or `doc_id` for tasks that ask the same questions in the same
    order (MGSM's languages). None: each item by itself.
    """

    @property
    def header(self) -> str:
        """The header of its column."""
        return self.label or self.task

    @property
    def key(self) -> str:
        """The name of its score in lm-eval's results and in ours."""
        return f"{self.metric},{self.filter}"

    @field_validator("extract")
    @classmethod
    def _extract_is_a_regular_expression(cls, extract: str | None) -> str | None:
        try:
            re.compile(extract or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return extract

    @model_validator(mode="after")
    def _extract_is_for_answers_that_are_written(self) -> Task:
        if self.extract is not None and (self.questions is None or self.metric != "exact_match"):
            raise ValueError(
                "extract: only for `questions` without choices; a task of lm-eval has filters"
            )
        return self

    @model_validator(mode="after")
    def _sampling_is_on_when_it_is_configured(self) -> Task:
        sampled = {"temperature", "top_p", "top_k"} & set(self.generation)
        if sampled and self.generation.get("do_sample") is not True:
            # lm-eval's tasks are greedy by default and would ignore the rest.
            raise ValueError(f"generation sets {', '.join(sorted(sampled))}: add `do_sample: true`")
        return self


class Suite(_Strict):
    """Everything that is asked of every model.

    Every field reaches the key of a result: a changed suite never reuses an old one.
    """

    LATER = frozenset({"engine", "classes", "include_path"})

    name: Annotated[str, Field(pattern=NAME)]  # the file's name, not a key of the file
    engine: str = "language"  # what asks it, see `engines.ENGINES`
    title: str
    version: int
    # Its items are a public test set: choosing R or alpha by its scores would tune on that set.
    public: bool
    seed: Annotated[int, Field(ge=0)] = 1234
    chat_template: bool = False
    enable_thinking: bool | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    world: int | None = None  # seed of a world of sums, whose test items become local tasks
    classes: str | Annotated[tuple[str, ...], Field(strict=False, min_length=2)] | None = None
    """Of the engine vision: what the columns of logits stand for, listed or by a name of timm's."""
    include_path: str | None = None
    """A folder of one's own task files for lm-eval, relative to the suite."""
    ID: Annotated[tuple[Task, ...], Field(min_length=1, strict=False)]
    OOD: Annotated[tuple[Task, ...], Field(min_length=1, strict=False)]
    # Of a suite that comes from a file, not from a result.
    _folder: Path = PrivateAttr(Path())
    _own: dict[str, Questions] = PrivateAttr({})

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, engine: str) -> str:
        if engine not in ENGINES:
            raise ValueError(f"no engine {engine}; there are {', '.join(ENGINES)}")
        return engine

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names = [task.task for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(twice)}")
        own = self.include_path is not None or any(task.questions for task in self.tasks)
        if own and self.engine != "language":
            raise ValueError("questions and include_path are for the engine language")
        if self.enable_thinking is not None and not self.chat_template:
            raise ValueError("enable_thinking has no effect without `chat_template: true`")
        if self.enable_thinking:
            raise ValueError(
                "enable_thinking: true is not supported: log-likelihood tasks cannot think"
            )
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, ID first."""
        return self.ID + self.OOD

    @property
    def own(self) -> Mapping[str, Questions]:
        """The questions of one's own that it asks, by the name of their task."""
        return self._own

    @property
    def included(self) -> Path | None:
        """The folder of `include_path`."""
        return None if self.include_path is None else self._folder / self.include_path

    def grouped(self) -> Iterator[tuple[GroupName, tuple[Task, ...]]]:
        """Yield both groups with their tasks."""
        yield "ID", self.ID
        yield "OOD", self.OOD

    def digest(self) -> str:
        """Return a digest of every field."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def shipped() -> list[str]:
    """Return the names of the suites that come with this folder."""
    return sorted(path.stem for path in SHIPPED.glob("*.yml"))


def load(name_or_path: str) -> Suite:
    """Return the suite of that name, or of that YAML file.

    Raises:
        SuiteError: there is none, or it, or a file of questions that it names, cannot be used.
    """
    path = SHIPPED / f"{name_or_path}.yml" if name_or_path in shipped() else Path(name_or_path)
    try:
        data: Any = read_document(path)
    except UnreadableError as error:
        if path.exists():
            raise SuiteError(f"{path}: {error}") from error
        raise SuiteError(
            f"suite {name_or_path}: No such file; shipped suites: {', '.join(shipped())}"
        ) from error
    if not isinstance(data, dict):
        raise SuiteError(f"{path}: must be a mapping, not {type(data).__name__}")
    if not re.fullmatch(NAME, path.stem):
        raise SuiteError(
            f"{path}: the file's name becomes part of result files: use letters, digits, - and _"
        )
    if "name" in data:
        raise SuiteError(f"{path}: name: not a key; a suite has the name of its file")
    try:
        data, own = questions.filled(path, data)
        suite = Suite.model_validate({**data, "name": path.stem})
    except QuestionsError as error:
        raise SuiteError(_few(path, str(error).splitlines())) from error
    except ValidationError as error:
        raise SuiteError(_messages(path, error)) from error
    suite._folder, suite._own = path.parent, own
    if suite.included is not None and not suite.included.is_dir():
        raise SuiteError(f"{path}: include_path: {suite.included} is not a folder")
    return suite


def _messages(path: Path, error: ValidationError) -> str:
    """Return a line for each mistake, if they are few: file, key, message."""
    mistakes = error.errors()
    # A group whose only task is wrong is also said to be too short.
    mistakes = [mistake for mistake in mistakes if mistake["type"] != "too_short"] or mistakes
    return _few(path, list(dict.fromkeys(f"{path}: {_message(mistake)}" for mistake in mistakes)))


def _few(path: Path, lines: list[str]) -> str:
    rest = len(lines) - MOST_MISTAKES
    return "\n".join(lines[:MOST_MISTAKES] + [f"{path}: {rest} more mistakes"] * (rest > 0))


def _message(mistake: ErrorDetails) -> str:
    """Return key and message of a mistake; one for all kinds that a value could have been of."""
    place, words = [str(key) for key in mistake["loc"]], mistake["msg"]
    if "generation" in place[:-2] and place[-1] != "[key]":
        del place[place.index("generation") + 2 :]
        words = "must be true or false, a number, text or a list of texts"
    return f"{'.'.join(place) or 'suite'}: {words}"
