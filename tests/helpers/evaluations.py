"""Results with prescribed outcomes, written as evaluation.run writes them, for their readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.engines import Settings
from evaluation.fingerprint import ModelDigests
from evaluation.sources import Merge, Origin
from evaluation.store import Pretrained, Result, ResultFiles, Sample, SamplesFile, TaskResult
from evaluation.suite import Suite

MINIMAL = {
    "title": "t",
    "version": 1,
    "public": False,
    "ID": [{"task": "a", "metric": "acc"}],
    "OOD": [{"task": "b", "metric": "acc"}],
}
"""A suite file with nothing that can be left out."""

NOT_READ = {"command": "", "suite_digest": "", "git": None, "date": "", "seconds": 0.0}


def suite(**changes: Any) -> Suite:
    """Return a suite with the tasks a (ID), b and c (OOD)."""
    tasks = {name: [{"task": name, "metric": "exact_match"}] for name in ("a", "b", "c")}
    data = {
        "name": "made",
        "title": "Made up",
        "version": 1,
        "public": True,
        "ID": tasks["a"],
        "OOD": tasks["b"] + tasks["c"],
    }
    return Suite.model_validate({**data, **changes})


def digests(weights: str) -> ModelDigests:
    """Return the digests of a model with these weights."""
    return ModelDigests(weights, config="c", tokenizer="t")


def result(samples: SamplesFile, **changes: Any) -> Result:
    """Return the result of a model called m on `suite()`, or of whatever the changes say."""
    fields = {
        "key": "k",
        "model": "m",
        "source": Origin("m", digests("m")),
        "w0": None,
        "suite": suite(),
        "settings": Settings(),
        "versions": {},
        "groups": {},
        "tasks": {},
        **NOT_READ,
    }
    return Result(samples=samples, **{**fields, **changes})


def write(
    folder: Path,
    model: str,
    outcomes: Mapping[str, Sequence[float]],
    *,
    made: Suite | None = None,
    merge: Merge | None = None,
    item: str = "",
    cluster: str = "",
    weights: str = "f" * 64,
    limit: int | None = None,
    torch: str = "2.13.0",
) -> None:
    """Write one finished result.

    `weights` are those of W0; those of the model have its name. `item` makes the questions others;
    `cluster` is the same in all tasks if given.
    """
    made = made or suite()
    key = {task.task: task.key for task in made.tasks}

    def sample(task: str, number: int, value: float) -> Sample:
        about = f"{cluster or task} {number}"
        hashes = f"{item}{task}{number}", "p", "t"
        return Sample(task, task, number, *hashes, about, {key[task]: float(value)}, {})

    files = ResultFiles(folder, model, made.name)
    samples = files.write_samples(
        TaskResult(task, [sample(task, number, value) for number, value in enumerate(values)])
        for task, values in outcomes.items()
    )
    files.finish(
        result(
            samples,
            model=model,
            suite=made,
            source=Origin(model, digests(model), merge),
            versions={"torch": torch, "transformers": "5.23.0", "lm-eval": "0.4.13"},
            w0=Pretrained("some/base", digests(weights)),
            settings=Settings(limit=limit),
        )
    )


TUNED = {"a": [1, 1, 1, 0], "b": [0, 0, 0, 1], "c": [1, 0, 0, 0]}
SOUP = {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1], "c": [1, 1, 0, 0]}
PRETRAINED = {"a": [0, 0, 0, 0], "b": [1, 1, 1, 1], "c": [1, 1, 1, 1]}


def merge_of(
    method: str,
    models: Sequence[Mapping[str, Any]] = ({"model": "tuned"},),
    inputs: Mapping[str, str] | None = None,
    **parameters: Any,
) -> Merge:
    """Return the merge of models with base model `base`."""
    config = {
        "merge_method": method,
        "base_model": "base",
        "models": list(models),
        "parameters": parameters,
    }
    return Merge(config, dict(inputs or {}))


def wise_ft(
    weight: float | list[float], tuned: str = "tuned", inputs: Mapping[str, str] | None = None
) -> Merge:
    """Return a Wise-FT."""
    models = [{"model": tuned, "parameters": {"weight": weight}}]
    return merge_of("task_arithmetic", models, inputs)
