"""Results with prescribed outcomes, written as evaluation.run writes them, for the programs that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.store import Pair, Row, TaskResult
from evaluation.suite import Suite


def suite(**changes: Any) -> Suite:
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


def write(
    folder: Path,
    model: str,
    outcomes: Mapping[str, Sequence[float]],
    *,
    made: Suite | None = None,
    merge: dict[str, Any] | None = None,
    item: str = "",
    cluster: str = "",
    weights: str = "f" * 64,
    limit: int | None = None,
    torch: str = "2.13.0",
) -> None:
    """One finished result.

    `weights` are those of W0; those of the model have its name. `item` makes the questions others; `cluster` is the same in
    all tasks if given.
    """
    made = made or suite()
    key = {task.task: task.key for task in made.tasks}
    results = [
        TaskResult(
            task,
            [
                Row(
                    task,
                    task,
                    n,
                    f"{item}{task}{n}",
                    "p",
                    "t",
                    f"{cluster or task} {n}",
                    {key[task]: float(value)},
                    {},
                )
                for n, value in enumerate(values)
            ],
        )
        for task, values in outcomes.items()
    ]
    Pair(folder, model, made.name).finish(
        {
            "key": "k",
            "model": model,
            "suite": made.model_dump(),
            "source": {"given": model, "merge": merge, "fingerprint": {"weights": model}},
            "versions": {"torch": torch, "transformers": "5.23.0", "lm-eval": "0.4.13"},
            "w0": {"given": "some/base", "fingerprint": {"weights": weights}},
            "settings": {"limit": limit, "backend": "hf", "dtype": "auto", "device": "cpu"},
        },
        results,
    )
