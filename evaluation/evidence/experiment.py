"""The experiment of one seed: train, merge, ask, and write what claims and figures need."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation import features, fingerprint, sources
from evaluation.configs import Config, same_norm_weight, wise_ft, write_config
from evaluation.engines import Options
from evaluation.evaluator import evaluate
from evaluation.evidence import collect, models
from evaluation.options import without_tokenizer_threads
from evaluation.suite import load


def model_count() -> int:
    """Return how many models one seed asks questions, in both suites."""
    folder = Path()
    merged = [*models.merges(folder), *models.rounded("", ""), *models.two_task_merges(folder)]
    trained = len(models.TRAINED) + len(models.TWO_TASKS_TRAINED)
    return len(merged) + trained + len(models.CONTROLLED) + len(models.IN_BFLOAT16)


def run_seed(seed: int, folder: Path, results: Path, limit: int | None = None) -> None:
    """Train, merge and ask in `folder`, and write `results`/seed-N.json.

    `limit`: only the first so many items of each task. What is finished is not done again.
    """
    import torch

    torch.set_num_threads(1)
    without_tokenizer_threads()
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    trained = models.make_checkpoints(seed, folder)
    paths = {models.SUITE: _models(folder), models.TWO_TASKS: _two_task_models(folder)}
    for suite, by_name in paths.items():
        evaluate(
            load(suite).model_copy(update={"world": seed}),
            by_name,
            folder / "results",
            # All in float32: bfloat16 arithmetic would add its own errors to those of bfloat16
            # weights.
            Options(device="cpu", dtype="float32", limit=limit),
            command=f"python -m evaluation.evidence --seeds {seed}",
            merge_cache=folder / "merged",
        )
    tunes = (models.FINETUNED, models.SECOND, models.LORA)
    content = collect.SeedFile(
        seed=seed,
        limit=limit,
        trained=trained,
        suites={suite: collect.suite_results(folder / "results", suite, folder) for suite in paths},
        cka=_similarities(folder, paths[models.SUITE]),
        records={
            name: matrix_records(str(folder / models.PRETRAINED), str(folder / name))
            for name in tunes
        },
        git=fingerprint.git_hash(),
        minutes=round((time.perf_counter() - started) / 60, 1),
    )
    content.write(results / f"seed-{seed}.json")


def _models(folder: Path) -> dict[str, str]:
    """Return the paths of all models of the suite `tiny`.

    Folders, and configurations that are merged when they are asked.
    """
    folder = folder.resolve()
    cache = folder / "merged"
    paths = {name: str(folder / name) for name in models.TRAINED}
    paths |= written(folder, dict(models.merges(folder)))
    pretrained, finetuned = folder / models.PRETRAINED, folder / models.FINETUNED
    for label in models.CONTROLLED:
        merged = sources.find(label, paths[f"monosoup_{label}"], cache)
        weight = same_norm_weight(merged.folder, finetuned, pretrained)
        control = wise_ft(str(pretrained), str(finetuned), weight)
        paths |= written(folder, {f"same_norm_{label}": control})
    pair = {f"bf16_{name}": models.in_bfloat16(paths[name]) for name in models.IN_BFLOAT16}
    narrow = written(folder, pair)
    base, tuned = (
        str(sources.find(name, path, cache).folder.resolve())
        for name, path in zip(models.IN_BFLOAT16, narrow.values(), strict=True)
    )
    return paths | narrow | written(folder, dict(models.rounded(base, tuned)))


def _two_task_models(folder: Path) -> dict[str, str]:
    folder = folder.resolve()
    paths = {name: str(folder / name) for name in models.TWO_TASKS_TRAINED}
    return paths | written(folder, dict(models.two_task_merges(folder)))


def written(folder: Path, configs: Mapping[str, Config]) -> dict[str, str]:
    """Return the paths of configurations, which it writes into `folder`/configs."""
    return {
        name: str(write_config(folder / "configs" / f"{name}.yml", config))
        for name, config in configs.items()
    }


def matrix_records(pretrained: str, finetuned: str) -> list[collect.MatrixRecord]:
    """Return what both modes do to each matrix of a fine-tune, and what would survive bfloat16."""
    from mergekit_monosoup.checkpoints.reader import Checkpoints
    from mergekit_monosoup.inspection import inspect_tensor

    checkpoints = Checkpoints([pretrained, finetuned])
    fields = collect.MatrixRecord.model_fields
    return [
        collect.MatrixRecord(**{field: _short(getattr(record, field)) for field in fields})
        for name in checkpoints.names
        for record in inspect_tensor(checkpoints, name, R=models.R)
    ]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _similarities(folder: Path, paths: Mapping[str, str]) -> features.Similarities:
    """Return CKA with the pretrained model, block by block, on the questions of ID and of OOD."""
    texts: dict[str, list[str]] = {
        group: [
            json.loads(line)["prompt"]
            for task in tasks
            for line in _items(folder, task.task.removeprefix("tiny_"))
        ]
        for group, tasks in load(models.SUITE).grouped()
    }
    names = [models.PRETRAINED, models.FINETUNED]
    for label in models.SETTINGS:
        names += [f"{kind}_{label}" for kind in ("monosoup", "scalar", "high", "low")]
    compared = [sources.find(name, paths[name], folder / "merged") for name in names]
    reading = features.Reading(device="cpu", batch_size=256)
    return shortened(features.similarities(compared, texts, folder / "cka", reading))


def shortened(values: features.Similarities) -> features.Similarities:
    """Return similarities with as many digits as are worth storing."""
    return {
        group: {model: [_short(value) for value in blocks] for model, blocks in by_model.items()}
        for group, by_model in values.items()
    }


def _items(folder: Path, skill: str) -> list[str]:
    file = folder / "results" / f"{models.SUITE}.tasks" / f"{skill}.jsonl"
    return file.read_text(encoding="utf-8").rstrip("\n").split("\n")
