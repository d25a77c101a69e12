"""Seeds of which every answer is a coin's, for pages of evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from evaluation.evidence import collect, tweets
from evaluation.evidence.paper import MODES
from evaluation.suite import load

ITEMS = 9  # of each task
BLOCKS = 2  # of each model


def models_of_tweets() -> set[str]:
    """Return the names of all models that a seed of tweets asks."""
    merged = [name for name, _ in (*tweets.merges(Path()), *tweets.rounded("", ""))]
    assert len(merged) == len(set(merged))
    controls = {f"{p}same_norm_{label}" for p in tweets.CONTROLLED for label in tweets.SETTINGS}
    return {*merged, *controls, *tweets.RECIPES, tweets.PRETRAINED, *tweets.BASES.values()}


def coins(
    seed: int,
    models: Mapping[str, Iterable[str]],
    suite: str,
    *,
    records: Iterable[str],
    cka: Iterable[str],
) -> collect.SeedFile:
    """Return a seed; `models` are their names by what the file calls their suite."""
    random = np.random.default_rng(seed)
    tasks = {
        task.task: collect.TaskItems(group=group, label=task.header, clusters=list(range(ITEMS)))
        for group, of_group in load(suite).grouped()
        for task in of_group
    }

    def answers() -> collect.ModelAnswers:
        right = {
            task: collect._packed(random.integers(0, 2, ITEMS).astype(float)) for task in tasks
        }
        return collect.ModelAnswers(weights="", config=None, right=right)

    packages = ("timm", "torchvision", "torch", "mergekit", "transformers", "python")
    record = {
        "k": 1,
        "rank": 2,
        "effective_rank": 1.5,
        "rel_update": 0.1,
        "realised": 1.0,
        "lambda_high": 0.6,
        "lambda_low": 0.4,
    }
    fields = dict.fromkeys(collect.MatrixRecord.model_fields) | record | {"name": "w"}
    every = sorted({name for names in models.values() for name in names})
    return collect.SeedFile(
        seed=seed,
        suites={
            name: collect.SuiteAnswers(
                versions=dict.fromkeys(packages, "1"),
                tasks=tasks,
                models={model: answers() for model in sorted(names)},
            )
            for name, names in models.items()
        },
        cka={name: {model: [1.0, random.random()] for model in every} for name in sorted(cka)},
        records={
            name: [collect.MatrixRecord(**{**fields, "mode": mode}) for mode in MODES]
            for name in records
        },
    )
