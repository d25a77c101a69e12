"""One seed as one JSON file, small enough to commit: every answer to every item, and what figures and tables need besides."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from evaluation import statistics, store
from evaluation.suite import GroupName

GROUPS: tuple[GroupName, ...] = get_args(GroupName)
Outcomes = dict[str, NDArray[np.float64]]  # 0 or 1 per item, by task


def suite_results(folder: Path, suite: str, root: Path) -> dict[str, Any]:
    """All finished models of a suite in `folder`. Paths under `root` are cut to what follows it."""
    found = [result for result in store.read(folder) if result.data["suite"]["name"] == suite]
    first = found[0]
    names = sorted({row.cluster for rows in first.rows.values() for row in rows})
    number = {name: place for place, name in enumerate(names)}
    tasks = {
        task["task"]: {
            "group": group,
            "label": task["label"],
            "clusters": [number[row.cluster] for row in first.rows[task["task"]]],
        }
        for group in GROUPS
        for task in first.data["suite"][group]
    }
    keys = {
        task["task"]: f"{task['metric']},{task['filter']}"
        for g in GROUPS
        for task in first.data["suite"][g]
    }
    models = {}
    for result in found:
        for task, rows in result.rows.items():
            if [row.item() for row in rows] != [row.item() for row in first.rows[task]]:
                raise store.DamagedError(
                    f"{result.path}: {task} has other items than in {first.path}; run it again"
                )
        models[result.data["model"]] = {
            "weights": result.data["source"]["fingerprint"]["weights"][:16],
            "config": _relative((result.data["source"]["merge"] or {}).get("config"), root),
            "right": {
                task: _packed([row.values[keys[task]] for row in rows])
                for task, rows in result.rows.items()
            },
        }
    return {"versions": first.data["versions"], "tasks": tasks, "models": models}


def _packed(outcomes: Sequence[float]) -> str:
    """A bit per item: 2700 answers in 450 bytes of text."""
    if set(outcomes) - {0.0, 1.0}:
        raise ValueError("an outcome is neither right nor wrong")
    return base64.b64encode(np.packbits(np.array(outcomes, dtype=bool)).tobytes()).decode()


def _relative(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {key: _relative(each, root) for key, each in value.items()}
    if isinstance(value, list):
        return [_relative(each, root) for each in value]
    return value.removeprefix(f"{root.resolve()}/") if isinstance(value, str) else value


@dataclass(frozen=True)
class Seed:
    """One such file, read back."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Seed:
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def seed(self) -> int:
        return int(self.data["seed"])

    def models(self, suite: str) -> list[str]:
        return list(self.data["suites"][suite]["models"])

    def outcomes(self, suite: str, model: str, group: GroupName) -> Outcomes:
        """The answers of a model to the items of a group."""
        tasks = self._tasks(suite, group)
        packed = self.data["suites"][suite]["models"][model]["right"]
        return {
            task: np.unpackbits(np.frombuffer(base64.b64decode(packed[task]), np.uint8))[
                : len(about["clusters"])
            ].astype(float)
            for task, about in tasks.items()
        }

    def clusters(self, suite: str, group: GroupName) -> dict[str, list[str]]:
        return {
            task: list(map(str, about["clusters"]))
            for task, about in self._tasks(suite, group).items()
        }

    def score(self, suite: str, model: str, group: GroupName) -> float:
        """The mean of the tasks' means, a fraction of 1."""
        return float(
            np.mean([outcomes.mean() for outcomes in self.outcomes(suite, model, group).values()])
        )

    def _tasks(self, suite: str, group: GroupName) -> Mapping[str, Any]:
        return {
            task: about
            for task, about in self.data["suites"][suite]["tasks"].items()
            if about["group"] == group
        }


@dataclass(frozen=True)
class Effect:
    """A difference between two models in one group, over seeds: fractions of 1, with a 95 % interval of the mean."""

    by_seed: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """All seeds have the same number, so there is no interval."""
        return len(set(self.by_seed)) == 1

    @classmethod
    def of(cls, by_seed: Sequence[float]) -> Effect:
        # Every seed has a world and items of its own, so the spread over seeds holds the noise of the items, too.
        estimate, reach = statistics.over_runs(by_seed, 0.0)
        return cls(tuple(by_seed), estimate.mean, estimate.mean - reach, estimate.mean + reach)


def effect(
    seeds: Sequence[Seed], suite: str, model: str, reference: str, group: GroupName
) -> Effect:
    return Effect.of(
        [s.score(suite, model, group) - s.score(suite, reference, group) for s in seeds]
    )
