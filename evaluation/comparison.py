"""From results on disk to numbers: every model's scores, and paired differences from one of them.

One results folder is one run. Several are combined: see `statistics.over_runs`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import fingerprint, sources, statistics, store
from evaluation.engines import ENGINES
from evaluation.sources import FINETUNED, PRETRAINED, Merge
from evaluation.statistics import Difference, Estimate
from evaluation.store import Evaluation
from evaluation.suite import Suite, Task

FIRST = (PRETRAINED, FINETUNED)  # rows of a table start with these

Run = Mapping[str, Evaluation]
"""What one results folder has of one suite, by model."""


class ComparisonError(ValueError):
    """These results cannot be compared; the message says why."""


@dataclass(frozen=True)
class Column:
    """One task, or the average of a group of tasks."""

    header: str
    group: str
    tasks: tuple[Task, ...]
    average: bool


@dataclass(frozen=True)
class Cell:
    """One model in one column. `difference` and `p_value` are None for the reference itself."""

    estimate: Estimate
    items: int
    difference: Difference | None = None
    p_value: float | None = None  # exact McNemar, where items are independent and 0/1


@dataclass
class Comparison:
    """Everything that a table or a figure shows of one suite."""

    suite: Suite
    runs: list[str]
    reference: str
    columns: list[Column]
    cells: dict[str, list[Cell]]  # by model
    w0: str
    merges: dict[str, Merge | None]  # what made each model
    weights: dict[str, str]  # digest of each model's
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def averages(self, model: str) -> tuple[Cell, Cell]:
        """Return the ID and the OOD cell of a model: the group's average, or its only task."""
        by_group = {}
        for column, cell in zip(self.columns, self.cells[model], strict=True):
            if column.average or column.group not in by_group:
                by_group[column.group] = cell
        return by_group["ID"], by_group["OOD"]


def compare(
    folders: Sequence[Path], reference: str = FINETUNED, only: Collection[str] | None = None
) -> list[Comparison]:
    """Return one comparison per suite that has results in all of the folders.

    Of all models, or `only` some.

    Raises:
        ComparisonError: models were asked different things, or there is nothing to compare.
        DamagedError: a result file does not hold what was written.
    """
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ComparisonError(
            "a folder is given twice; "
            "several folders are runs of their own, with spread between them"
        )
    runs = [_by_suite(folder, only) for folder in folders]
    names = sorted(set.intersection(*(set(run) for run in runs)))
    if not names:
        raise ComparisonError(f"no suite has results in {' and '.join(map(str, folders))}")
    comparisons = [
        _compare(name, [run[name] for run in runs], list(map(str, folders)), reference)
        for name in names
    ]
    if others := set.union(*(set(run) for run in runs)) - set(names):
        comparisons[0].warnings.append(
            f"Left out, for not every folder has them: the suites {', '.join(sorted(others))}."
        )
    return comparisons


def _by_suite(folder: Path, only: Collection[str] | None) -> dict[str, dict[str, Evaluation]]:
    if not folder.is_dir():
        raise ComparisonError(f"{folder}: no such folder; `python -m evaluation.run` makes it")
    suites: dict[str, dict[str, Evaluation]] = {}
    for evaluation in store.read(folder, only):
        store.check_answers(evaluation)
        suites.setdefault(evaluation.result.suite.name, {})[evaluation.result.model] = evaluation
    return suites


def _compare(name: str, runs: Sequence[Run], folders: list[str], reference: str) -> Comparison:
    models = [m for m in FIRST if all(m in run for run in runs)]
    models += sorted(m for m in runs[0] if m not in FIRST and all(m in run for run in runs))
    if reference not in models:
        raise ComparisonError(
            f"suite {name}: no model named {reference} in every folder; "
            f"there are {', '.join(models)}"
        )
    suite = _same_suite(name, runs, models)
    for run, folder in zip(runs, folders, strict=True):
        _check_questions(run, models, reference, folder)
    columns = _columns(suite)
    references = [run[reference] for run in runs]
    shared = len(runs) == 1 or _same_items(references)
    cells = {
        model: [
            _cell(column, [run[model] for run in runs], references, shared) for column in columns
        ]
        for model in models
    }
    cells[reference] = [replace(cell, difference=None, p_value=None) for cell in cells[reference]]
    first = {model: runs[0][model].result for model in models}
    comparison = Comparison(
        suite,
        folders,
        reference,
        columns,
        cells,
        w0=_w0(first[models[0]]),
        merges={model: result.source.merge for model, result in first.items()},
        weights={model: result.source.fingerprint.weights for model, result in first.items()},
    )
    comparison.notes = _notes(comparison, shared)
    comparison.warnings = list(_warnings(comparison, runs))
    return comparison


def _same_suite(name: str, runs: Sequence[Run], models: Sequence[str]) -> Suite:
    """Return the suite that all models were asked.

    Several runs may differ in the world of their items and in the seed, in nothing else; the
    models of one run in nothing.
    """
    suites = [[run[model].result.suite for model in models] for run in runs]
    suite = suites[0][0]
    alike = all(other == of_run[0] for of_run in suites for other in of_run)
    if not alike or any(
        of_run[0].model_copy(update={"world": suite.world, "seed": suite.seed}) != suite
        for of_run in suites
    ):
        raise ComparisonError(
            f"suite {name}: the results come from different versions of it; "
            "run the older ones again"
        )
    return suite


def _check_questions(run: Run, models: Iterable[str], reference: str, folder: str) -> None:
    """Refuse models that were asked other questions than the reference.

    Paired differences of answers to different questions would be nonsense that looks fine.
    """
    for model in models:
        for task, samples in run[reference].samples.items():
            theirs = run[model].samples.get(task, [])
            if [sample.item() for sample in theirs] == [sample.item() for sample in samples]:
                continue
            equal = {s.item()[:3] for s in theirs} == {s.item()[:3] for s in samples}
            what = (
                "prompts (shots, chat template)"
                if equal
                else f"items ({len(theirs)} and {len(samples)})"
            )
            raise ComparisonError(
                f"{folder}: {model} and {reference} were asked different {what} in {task}; "
                "run both again with the same suite and --limit"
            )


def _same_items(evaluations: Sequence[Evaluation]) -> bool:
    """Return whether several runs asked the same items.

    Prompts aside: shots may be drawn by seed.
    """
    first, *others = (
        {task: [s.item()[:3] for s in samples] for task, samples in evaluation.samples.items()}
        for evaluation in evaluations
    )
    return all(other == first for other in others)


def _columns(suite: Suite) -> list[Column]:
    columns = []
    for group, tasks in suite.grouped():
        columns += [Column(task.header, group, (task,), False) for task in tasks]
        if len(tasks) > 1:
            columns.append(Column(f"{group} average", group, tasks, True))
    return columns


def _values(column: Column, evaluation: Evaluation) -> dict[str, NDArray[np.float64]]:
    return {
        t.task: np.array([sample.values[t.key] for sample in evaluation.samples[t.task]])
        for t in column.tasks
    }


def _clusters(column: Column, evaluation: Evaluation) -> dict[str, list[str]]:
    return {t.task: [sample.cluster for sample in evaluation.samples[t.task]] for t in column.tasks}


def _cell(
    column: Column, models: Sequence[Evaluation], references: Sequence[Evaluation], shared: bool
) -> Cell:
    """Return the cell of a model, given its evaluation and the reference's in each run."""
    clusters = [_clusters(column, evaluation) for evaluation in references]
    values = [_values(column, evaluation) for evaluation in models]
    expected = [_values(column, evaluation) for evaluation in references]
    paired = [statistics.paired(v, r) for v, r in zip(values, expected, strict=True)]
    items = sum(len(outcomes) for outcomes in values[0].values())
    if len(models) == 1:
        return Cell(
            statistics.estimate(values[0], clusters[0]),
            items,
            statistics.difference(paired[0], clusters[0]),
            _p_value(column, values[0], expected[0], clusters[0]),
        )
    estimate, _ = statistics.over_runs(*_over(values, clusters, shared))
    gain, reach = statistics.over_runs(*_over(paired, clusters, shared))
    identical = not any(d.any() for run in paired for d in run.values())
    low, high = (None, None) if identical else (gain.mean - reach, gain.mean + reach)
    return Cell(estimate, items, Difference(gain.mean, low, high, identical))


def _p_value(
    column: Column,
    values: statistics.Values,
    reference: statistics.Values,
    clusters: statistics.Clusters,
) -> float | None:
    """Return McNemar's p-value of one task whose items are independent; else None."""
    if column.average:
        return None
    task = column.tasks[0].task
    if len(set(clusters[task])) < len(clusters[task]):
        return None
    return statistics.mcnemar(values[task], reference[task])


def _over(
    runs: Sequence[statistics.Values], clusters: Sequence[statistics.Clusters], shared: bool
) -> tuple[list[float], float]:
    """Return the runs' means, and the standard error over the items if all runs share them."""
    means = [float(np.mean([outcomes.mean() for outcomes in values.values()])) for values in runs]
    if not shared:
        return means, 0.0
    averaged = {task: np.mean([values[task] for values in runs], axis=0) for task in runs[0]}
    return means, statistics.estimate(averaged, clusters[0]).standard_error


def _w0(result: store.Result) -> str:
    if result.w0 is None:
        return "not given (no model was named pretrained)"
    return f"{result.w0.given}, weights {result.w0.fingerprint.weights[:12]}"


def _notes(comparison: Comparison, shared: bool) -> list[str]:
    suite, runs = comparison.suite, len(comparison.runs)
    metrics = ", ".join(sorted({task.key for task in suite.tasks}))
    notes = [
        f"W0 (pretrained): {comparison.w0}.",
        f"Per cent of items right: the suite's metric of each task ({metrics}); averages weigh "
        "tasks equally. ±: one standard error, 0 if all are right or all wrong.",
    ]
    if any(task.cluster for task in suite.tasks):
        notes.append(
            "Items about the same thing (the suite's `cluster`) "
            "count together in errors and intervals."
        )
    if runs == 1:
        notes.append(
            f"Differences from {comparison.reference} are paired by item, in points, with 95 % "
            f"percentile bootstrap intervals over items ({statistics.RESAMPLES} resamples, "
            "scipy). One run: they say nothing about other seeds."
        )
    else:
        more = (
            ", plus the variance over the items, which all runs share"
            if shared
            else "; each run has items of its own"
        )
        notes.append(
            f"{runs} runs: means over runs. Variance of the runs' means{more}; 95 % intervals of "
            f"paired differences from {comparison.reference} by Student's t with {runs - 1} "
            "degrees of freedom."
        )
    return notes


def _warnings(comparison: Comparison, runs: Sequence[Run]) -> Iterable[str]:
    models = list(comparison.cells)
    if message := sources.tuning_warning(comparison.suite.public, comparison.merges):
        yield message
    if others := {m for run in runs for m in run} - set(models):
        yield f"Left out, for not every folder has them: {', '.join(sorted(others))}."
    for run in runs:
        results = [run[model].result for model in models]
        if len({r.w0.fingerprint.weights if r.w0 else None for r in results}) > 1:
            yield (
                "The models were run beside different W0 (or none): run all of them in one command."
            )
        yield from _other_base(results)
        for name, values in _circumstances(results):
            if len(different := set(values)) > 1:
                listed = ", ".join(map(str, sorted(different, key=str)))
                yield f"The models were run with different {name}: {listed}."
    limits = {run[m].result.settings.limit for run in runs for m in models}
    if given := [limit for limit in limits if limit is not None]:
        yield f"Only {max(given)} items of each task were asked (--limit)."


def _circumstances(results: Sequence[store.Result]) -> Iterable[tuple[str, list[Any]]]:
    """Yield (name, each model's value) of what reaches a result's key beside suite and weights."""
    settings = [result.settings for result in results]
    yield "limit", [s.limit for s in settings]
    yield "backend", [s.backend for s in settings]
    yield "dtype", [s.dtype for s in settings]
    yield "device", [s.device.partition(":")[0] for s in settings]
    versions = [
        fingerprint.deciding(result.versions, ENGINES[result.suite.engine].packages)
        for result in results
    ]
    for package in sorted(set().union(*versions)):
        yield f"versions of {package}", [installed.get(package) for installed in versions]


def _other_base(results: Iterable[store.Result]) -> Iterable[str]:
    for result in results:
        merge, w0 = result.source.merge, result.w0
        if merge is None or w0 is None:
            continue
        base = merge.config.get("base_model")
        if merge.inputs.get(str(base), w0.fingerprint.weights) != w0.fingerprint.weights:
            yield (
                f"{result.model} was merged from base_model {base}, "
                "which is not the W0 of this table."
            )
