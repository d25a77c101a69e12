"""Results on disk: one JSON file per model and suite, its samples, and finished tasks of a run.

    NAME/<model>.<suite>.json              scores, settings, versions, fingerprints
    NAME/<model>.<suite>.samples.jsonl.gz  one line per item
    NAME/<model>.<suite>.partial/KEY/      one file per finished task, until all are

KEY is of model, suite and settings. Every file is written under another name and renamed: what has
its name is whole. Names of models, suites and tasks may come out of files of others: those of files
are made of them by `formatting.file_name`, which leads nowhere else.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from evaluation.engines import Settings
from evaluation.fingerprint import ModelDigests
from evaluation.formatting import file_name
from evaluation.sources import Origin
from evaluation.statistics import Estimate
from evaluation.suite import GroupName, Suite
from mergekit_monosoup import files
from mergekit_monosoup.checkpoints.texts import UnreadableError, check_file, check_new_folder

AGAIN = "run it again, or move the file away"
MODEL_NAME = r"^[\w,+-][\w.,+-]*$"
FILE_NAME = r"^[\w,+%-][\w.,+%-]*$"  # what `file_name` makes of any name

Finite = Annotated[float, Field(allow_inf_nan=False)]


class DamagedError(ValueError):
    """A result file does not hold what was written."""


@dataclass(frozen=True)
class Sample:
    """One item of one task, and what a model made of it."""

    task: str  # as in the suite
    leaf: str  # lm-eval's own task: differs from `task` for groups
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    cluster: str
    values: dict[str, Finite]  # by "metric,filter"
    answers: dict[str, Any]  # by filter

    def item(self) -> tuple[str, int, str, str, str]:
        """Return what two models' samples have to share to be answers to the same question."""
        return self.leaf, self.doc_id, self.doc_hash, self.prompt_hash, self.target_hash


@dataclass(frozen=True)
class TaskResult:
    """The samples of one finished task."""

    task: str
    samples: list[Sample]
    info: dict[str, Any] = field(default_factory=dict)  # shots, version, … as the engine used them


@dataclass(frozen=True)
class Pretrained:
    """W0 of a run, as a result of any of its models names it."""

    given: str
    fingerprint: ModelDigests


class TaskScores(BaseModel):
    """Every metric and filter of a task, and what the engine says of how it was asked."""

    model_config = ConfigDict(frozen=True, extra="allow")

    items: int
    scores: dict[str, Estimate]  # by "metric,filter"


class SamplesFile(BaseModel):
    """The file of the samples that a result was made from."""

    model_config = ConfigDict(frozen=True)

    file: Annotated[str, Field(pattern=FILE_NAME)]  # beside the result, nowhere else
    rows: int
    sha256: str


class Result(BaseModel):
    """The result of one model and suite: what its JSON file holds, field by field."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    key: str
    model: Annotated[str, Field(pattern=MODEL_NAME)]
    source: Origin
    w0: Pretrained | None
    command: str
    suite: Suite
    suite_digest: str
    settings: Settings
    versions: dict[str, str]
    git: str | None
    date: str
    seconds: float
    groups: dict[GroupName, Estimate]
    tasks: dict[str, TaskScores]
    samples: SamplesFile


class _Part(BaseModel):
    """What the file of one finished task holds."""

    key: str
    task: str
    rows: list[Sample]
    info: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A finished model and suite, read back: the result and the samples of each task."""

    path: Path
    result: Result
    samples: dict[str, list[Sample]]


class ResultFiles:
    """The files of one model and one suite in a results folder."""

    def __init__(self, folder: Path, model: str, suite: str) -> None:
        stem = f"{file_name(model)}.{file_name(suite)}"
        self.result = folder / f"{stem}.json"
        self.samples = folder / f"{stem}.samples.jsonl.gz"
        self.partial = folder / f"{stem}.partial"

    def finished(self, key: str) -> Result | None:
        """Return the result under this key; None if it is missing, of another key, or damaged."""
        try:
            result = _read_result(self.result)
            whole = result.key == key and result.samples.sha256 == _sha256(self.samples)
        except (OSError, DamagedError):
            return None
        return result if whole else None

    def read(self) -> Result:
        """Return the result.

        Raises:
            DamagedError: it is not one.
        """
        return _read_result(self.result)

    def keep_old(self) -> bool:
        """Put a result that another one is about to replace aside, as ….old; whether there was one.

        It was made from other weights, settings or versions, and may have taken hours.
        """
        # Without a result, samples are what a full disk left of the next one: they must not drive
        # out those of the result that is kept.
        if not self.result.exists():
            return False
        for path in (self.samples, self.result):  # samples first: a result alone is not finished
            if path.exists():
                os.replace(path, path.with_name(path.name + ".old"))
        return True

    def resume(self, key: str) -> dict[str, TaskResult]:
        """Return the tasks finished under this key by a run that was interrupted."""
        finished = {}
        for path in sorted(self._parts(key).glob("*.json.gz")):
            try:
                part = _Part.model_validate_json("".join(_unzipped(path)))
            except (OSError, DamagedError, ValidationError):
                continue
            if part.key == key:
                finished[part.task] = TaskResult(part.task, part.rows, part.info)
        return finished

    def _parts(self, key: str) -> Path:
        # A folder for each key: a quick look with --limit must not cost the tasks of the whole run
        # that it came between.
        return self.partial / file_name(key[:16])

    def keep(self, key: str, result: TaskResult) -> None:
        """Save one finished task."""
        rows = [asdict(sample) for sample in result.samples]
        content = {"key": key, "task": result.task, "rows": rows, "info": result.info}
        zipped = _zipped([json.dumps(content, ensure_ascii=False)])
        _write(self._parts(key) / f"{file_name(result.task)}.json.gz", zipped)

    def write_samples(self, results: Iterable[TaskResult]) -> SamplesFile:
        """Write the samples of all tasks, which the result then names by their digest."""
        lines = [
            json.dumps(asdict(sample), ensure_ascii=False)
            for result in results
            for sample in result.samples
        ]
        _write(self.samples, _zipped(lines))
        return SamplesFile(file=self.samples.name, rows=len(lines), sha256=_sha256(self.samples))

    def finish(self, result: Result) -> None:
        """Write the result of samples that are written, then drop the parts."""
        self.rewrite(result)
        shutil.rmtree(self._parts(result.key), ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: parts of another run
            self.partial.rmdir()

    def rewrite(self, result: Result) -> None:
        """Write the result."""
        text = json.dumps(result.model_dump(), indent=1, ensure_ascii=False)
        _write(self.result, (text + "\n").encode())

    def forget(self) -> None:
        """Drop what interrupted runs have finished, under any key."""
        shutil.rmtree(self.partial, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Make a results folder, and see that files can be written there; before hours of asking.

    Raises:
        OSError: they cannot; names the folder.
    """
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def read(folder: Path, only: Collection[str] | None = None) -> list[Evaluation]:
    """Return what is finished in a folder, of all models or `only` some.

    Raises:
        DamagedError: a file does not hold what was written.
    """
    evaluations = []
    for path in sorted(folder.glob("*.json")):
        result = _read_result(path)
        if only is None or result.model in only:
            evaluations.append(Evaluation(path, result, _read_samples(path, result)))
    return evaluations


def check_answers(evaluation: Evaluation) -> None:
    """Check that every task of the suite was answered, and scored by its metric.

    Raises:
        DamagedError: one was not.
    """
    for task in evaluation.result.suite.tasks:
        answers = evaluation.samples.get(task.task, [])
        if not answers or any(task.key not in answer.values for answer in answers):
            raise DamagedError(
                f"{evaluation.path}: its answers to {task.task} are missing, or without "
                f"{task.key}; {AGAIN}"
            )


def _read_result(path: Path) -> Result:
    try:
        check_file(path)
        # In two steps: pydantic's own reader of JSON knows no such thing as a tuple or a date.
        return Result.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "top level"
        raise DamagedError(
            f"{path}: not a result of this version of evaluation.run ({place}: {first['msg']}); "
            f"{AGAIN}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: {_reason(error)}; {AGAIN}") from error


def _read_samples(path: Path, result: Result) -> dict[str, list[Sample]]:
    """Return the samples of each task of a result.

    Raises:
        DamagedError: their file is not the one, or holds something else.
    """
    file = path.parent / result.samples.file
    if file.name != result.samples.file:
        raise DamagedError(f"{path}: names samples in another folder, {result.samples.file!r}")
    try:
        check_file(file)
        whole = _sha256(file) == result.samples.sha256
    except (OSError, UnreadableError):
        whole = False
    if not whole:
        raise DamagedError(
            f"{file}: missing, or not the answers that {path.name} was made from; run it again"
        )
    by_task: dict[str, list[Sample]] = {}
    parse = TypeAdapter(Sample).validate_json
    for number, line in enumerate(_unzipped(file), 1):
        try:
            sample = parse(line)
        except ValidationError as error:
            raise DamagedError(
                f"{file}, line {number}: not an answer of this version of evaluation.run; {AGAIN}"
            ) from error
        by_task.setdefault(sample.task, []).append(sample)
    return by_task


def _unzipped(path: Path) -> Iterator[str]:
    """Yield the lines of a zipped file.

    Raises:
        OSError: it cannot be opened, or is not zipped.
        DamagedError: it is cut off, or is not text.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (EOFError, zlib.error, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise DamagedError(f"{path}: {error}; {AGAIN}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _zipped(lines: Iterable[str]) -> bytes:
    # Without the time, equal answers are equal files.
    return gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
