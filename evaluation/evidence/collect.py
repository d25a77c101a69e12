"""One seed as one JSON file, small enough to commit: every answer, and what tables need besides."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evaluation import statistics, store
from evaluation.features import Similarities
from evaluation.store import DamagedError, Evaluation
from evaluation.suite import GroupName, Suite
from mergekit_monosoup.checkpoints.texts import check_file

GROUPS: tuple[GroupName, ...] = get_args(GroupName)
Outcomes = dict[str, NDArray[np.float64]]  # 0 or 1 per item, by task


class TaskItems(BaseModel):
    """The items of one task: which group they count in, and the cluster of each."""

    group: GroupName
    label: str
    clusters: list[int]


class ModelAnswers(BaseModel):
    """The answers of one model: a bit per item, in base64, by task; and what made the model."""

    weights: str  # first digits of the digest
    config: dict[str, Any] | None
    right: dict[str, str]


class SuiteAnswers(BaseModel):
    """All finished models of one suite."""

    versions: dict[str, str]
    tasks: dict[str, TaskItems]
    models: dict[str, ModelAnswers]


class MatrixRecord(BaseModel):
    """What one mode does to one matrix, see `mergekit_monosoup.inspection`."""

    name: str
    mode: str | None
    k: int | None
    rank: int | None
    effective_rank: float | None
    P_k: float | None
    lambda_high: float | None
    lambda_low: float | None
    rel_update: float | None
    realised: float | None


class SeedFile(BaseModel):
    """What the file of one seed holds."""

    seed: int
    limit: int | None = None
    trained: dict[str, dict[str, int | float | None]] = {}  # settings of each checkpoint
    suites: dict[str, SuiteAnswers]
    cka: Similarities = {}
    records: dict[str, list[MatrixRecord]] = {}  # by fine-tune
    git: str | None = None
    minutes: float | None = None  # of the last call: a resumed one says less

    def write(self, path: Path) -> None:
        """Write one line per part.

        That is half the size of an indented file, and a changed part still shows as one.
        """
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(part, separators=(',', ':'))}"
            for key, part in self.model_dump().items()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def suite_results(folder: Path, suite: str, root: Path) -> SuiteAnswers:
    """Return all finished models of a suite in `folder`; paths under `root` become relative to it.

    Raises:
        DamagedError: models were asked different items.
    """
    evaluations = [e for e in store.read(folder) if e.result.suite.name == suite]
    first = evaluations[0]
    for evaluation in evaluations:
        _check_items(evaluation, first)
    keys = {task.task: task.key for task in first.result.suite.tasks}
    models = {}
    for evaluation in evaluations:
        origin = evaluation.result.source
        models[evaluation.result.model] = ModelAnswers(
            weights=origin.fingerprint.weights[:16],
            config=_relative(origin.merge.config if origin.merge else None, root),
            right={
                task: _packed([sample.values[keys[task]] for sample in samples])
                for task, samples in evaluation.samples.items()
            },
        )
    tasks = _task_items(first.result.suite, first)
    return SuiteAnswers(versions=first.result.versions, tasks=tasks, models=models)


def _check_items(evaluation: Evaluation, first: Evaluation) -> None:
    for task, samples in evaluation.samples.items():
        if [s.item() for s in samples] != [s.item() for s in first.samples[task]]:
            raise store.DamagedError(
                f"{evaluation.path}: {task} has other items than in {first.path}; run it again"
            )


def _task_items(suite: Suite, evaluation: Evaluation) -> dict[str, TaskItems]:
    names = {sample.cluster for samples in evaluation.samples.values() for sample in samples}
    number = {name: place for place, name in enumerate(sorted(names))}
    return {
        task.task: TaskItems(
            group=group,
            label=task.label,
            clusters=[number[sample.cluster] for sample in evaluation.samples[task.task]],
        )
        for group, tasks in suite.grouped()
        for task in tasks
    }


def _packed(outcomes: Sequence[float]) -> str:
    """Return a bit per item: 2700 answers in 450 bytes of text."""
    if set(outcomes) - {0.0, 1.0}:
        raise ValueError("an outcome is neither right nor wrong")
    return base64.b64encode(np.packbits(np.array(outcomes, dtype=bool)).tobytes()).decode()


def _unpacked(right: str, items: int) -> NDArray[np.float64]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(right), np.uint8))
    return bits[:items].astype(float)


def _relative(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {key: _relative(part, root) for key, part in value.items()}
    if isinstance(value, list):
        return [_relative(part, root) for part in value]
    return value.removeprefix(f"{root.resolve()}/") if isinstance(value, str) else value


@dataclass(frozen=True)
class Seed:
    """The file of one seed, read back."""

    path: Path
    content: SeedFile

    @classmethod
    def read(cls, path: Path) -> Seed:
        """Read a file that `SeedFile.write` wrote.

        Raises:
            DamagedError: it is not one.
        """
        try:
            check_file(path)
            return cls(path, SeedFile.model_validate_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"{path}: not the results of a seed; move it away, or delete it and run "
                "`python -m evaluation.evidence` again"
            ) from error

    @property
    def seed(self) -> int:
        """The number of the seed."""
        return self.content.seed

    def models(self, suite: str) -> list[str]:
        """Return the names of the models of a suite."""
        return list(self.content.suites[suite].models)

    def outcomes(self, suite: str, model: str, group: GroupName) -> Outcomes:
        """Return the answers of a model to the items of a group."""
        right = self.content.suites[suite].models[model].right
        return {
            name: _unpacked(right[name], len(task.clusters))
            for name, task in self._tasks(suite, group).items()
        }

    def clusters(self, suite: str, group: GroupName) -> dict[str, list[str]]:
        """Return the clusters of the items of a group, by task."""
        return {
            name: list(map(str, task.clusters)) for name, task in self._tasks(suite, group).items()
        }

    def score(self, suite: str, model: str, group: GroupName) -> float:
        """Return the mean of the tasks' means, a fraction of 1."""
        outcomes = self.outcomes(suite, model, group)
        return float(np.mean([of_task.mean() for of_task in outcomes.values()]))

    def _tasks(self, suite: str, group: GroupName) -> Mapping[str, TaskItems]:
        tasks = self.content.suites[suite].tasks
        return {name: task for name, task in tasks.items() if task.group == group}


@dataclass(frozen=True)
class Effect:
    """A number of each seed, and their mean with its 95 % interval.

    Most are differences between two models in one group, fractions of 1.
    """

    by_seed: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether all seeds have the same number, so that there is no interval."""
        return len(set(self.by_seed)) == 1

    @classmethod
    def of(cls, by_seed: Sequence[float]) -> Effect:
        """Return the effect of these numbers."""
        # Every seed has a world and items of its own, so the spread over seeds holds the noise of
        # the items, too.
        estimate, reach = statistics.over_runs(by_seed, 0.0)
        return cls(tuple(by_seed), estimate.mean, estimate.mean - reach, estimate.mean + reach)


def effect(
    seeds: Sequence[Seed], suite: str, model: str, reference: str, group: GroupName
) -> Effect:
    """Return the difference between two models in one group."""
    return Effect.of(
        [s.score(suite, model, group) - s.score(suite, reference, group) for s in seeds]
    )
