"""From results on disk to numbers: scores of every model, and paired differences from one of them.

One results folder is one run. Several are combined: see `statistics.over_runs`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import fingerprint, sources, statistics, store
from evaluation.statistics import Difference, Estimate
from evaluation.suite import Suite, Task

FIRST = ("pretrained", "finetuned")  # rows of a table start with these


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
    merges: dict[str, dict[str, Any] | None]  # what made each model, see `sources.Source.merge`
    weights: dict[str, str]  # digest of each model's
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def compare(
    folders: Sequence[Path], reference: str = "finetuned", only: Collection[str] | None = None
) -> list[Comparison]:
    """One comparison per suite that has results in all of the folders, of all models or `only` some."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ComparisonError(
            "a folder is given twice; several folders are runs of their own, with spread between them"
        )
    runs = [_by_suite(folder, only) for folder in folders]
    names = sorted(set.intersection(*(set(run) for run in runs)))
    if not names:
        raise ComparisonError(f"no suite has results in {' and '.join(map(str, folders))}")
    found = [
        _compare(name, [run[name] for run in runs], list(map(str, folders)), reference)
        for name in names
    ]
    if others := set.union(*(set(run) for run in runs)) - set(names):
        found[0].warnings.append(
            f"Left out, for not every folder has them: the suites {', '.join(sorted(others))}."
        )
    return found


def _by_suite(folder: Path, only: Collection[str] | None) -> dict[str, dict[str, store.Result]]:
    if not folder.is_dir():
        raise ComparisonError(f"{folder}: no such folder; `python -m evaluation.run` makes it")
    found: dict[str, dict[str, store.Result]] = {}
    for result in store.read(folder, only):
        found.setdefault(result.data["suite"]["name"], {})[result.data["model"]] = result
    return found


def _compare(
    name: str, runs: list[dict[str, store.Result]], folders: list[str], reference: str
) -> Comparison:
    models = [m for m in FIRST if all(m in run for run in runs)]
    models += sorted(m for m in runs[0] if m not in FIRST and all(m in run for run in runs))
    if reference not in models:
        raise ComparisonError(
            f"suite {name}: no model named {reference} in every folder; there are {', '.join(models)}"
        )
    suites = [
        [Suite.model_validate(run[m].data["suite"], strict=False) for m in models] for run in runs
    ]
    suite = suites[0][0]
    # Several runs may differ in the world of their items and in the seed, in nothing else; the models of one run in nothing.
    alike = all(one == run[0] for run in suites for one in run)
    if not alike or any(
        run[0].model_copy(update={"world": suite.world, "seed": suite.seed}) != suite
        for run in suites
    ):
        raise ComparisonError(
            f"suite {name}: the results come from different versions of it; run the older ones again"
        )
    for run, folder in zip(runs, folders, strict=True):
        _same_questions(run, models, reference, folder)
    columns = _columns(suite)
    shared = len(runs) == 1 or _same_items([run[reference] for run in runs])
    cells = {
        model: [
            _cell(column, [run[model] for run in runs], [run[reference] for run in runs], shared)
            for column in columns
        ]
        for model in models
    }
    cells[reference] = [replace(cell, difference=None, p_value=None) for cell in cells[reference]]
    merges = {model: runs[0][model].data["source"]["merge"] for model in models}
    weights = {model: runs[0][model].data["source"]["fingerprint"]["weights"] for model in models}
    out = Comparison(
        suite, folders, reference, columns, cells, _w0(runs[0], models), merges, weights
    )
    out.notes = _notes(out, shared)
    out.warnings = list(_warnings(out, runs))
    return out


def _same_questions(
    run: dict[str, store.Result], models: Iterable[str], reference: str, folder: str
) -> None:
    """Paired differences of answers to different questions would be nonsense that looks fine."""
    for model in models:
        for task, rows in run[reference].rows.items():
            theirs = run[model].rows.get(task, [])
            if [row.item() for row in theirs] == [row.item() for row in rows]:
                continue
            equal = {row.item()[:3] for row in theirs} == {row.item()[:3] for row in rows}
            what = (
                "prompts (shots, chat template)"
                if equal
                else f"items ({len(theirs)} and {len(rows)})"
            )
            raise ComparisonError(
                f"{folder}: {model} and {reference} were asked different {what} in {task}; run both again with the same "
                "suite and --limit"
            )


def _same_items(results: Sequence[store.Result]) -> bool:
    """Whether several runs asked the same items (prompts aside: shots may be drawn by seed)."""
    first, *others = (
        {task: [row.item()[:3] for row in rows] for task, rows in result.rows.items()}
        for result in results
    )
    return all(other == first for other in others)


def _columns(suite: Suite) -> list[Column]:
    found = []
    for group, tasks in suite.grouped():
        found += [Column(task.header, group, (task,), False) for task in tasks]
        if len(tasks) > 1:
            found.append(Column(f"{group} average", group, tasks, True))
    return found


def _values(column: Column, result: store.Result) -> dict[str, NDArray[np.float64]]:
    return {
        t.task: np.array([row.values[t.key] for row in result.rows[t.task]]) for t in column.tasks
    }


def _cell(
    column: Column, models: Sequence[store.Result], references: Sequence[store.Result], shared: bool
) -> Cell:
    clusters = [
        {t.task: [row.cluster for row in r.rows[t.task]] for t in column.tasks} for r in references
    ]
    values = [_values(column, result) for result in models]
    paired = [
        statistics.paired(v, _values(column, r)) for v, r in zip(values, references, strict=True)
    ]
    items = sum(len(outcomes) for outcomes in values[0].values())
    if len(models) == 1:
        independent = all(
            len(set(clusters[0][t.task])) == len(clusters[0][t.task]) for t in column.tasks
        )
        p_value = None
        if independent and not column.average:
            task = column.tasks[0].task
            p_value = statistics.mcnemar(values[0][task], _values(column, references[0])[task])
        return Cell(
            statistics.estimate(values[0], clusters[0]),
            items,
            statistics.difference(paired[0], clusters[0]),
            p_value,
        )
    estimate, _ = statistics.over_runs(*_over(values, clusters, shared))
    means, within = _over(paired, clusters, shared)
    gain, reach = statistics.over_runs(means, within)
    identical = not any(d.any() for run in paired for d in run.values())
    low, high = (None, None) if identical else (gain.mean - reach, gain.mean + reach)
    return Cell(estimate, items, Difference(gain.mean, low, high, identical))


def _over(
    runs: Sequence[statistics.Values], clusters: Sequence[statistics.Clusters], shared: bool
) -> tuple[list[float], float]:
    """The runs' means, and the standard error over the items if all runs share them."""
    means = [float(np.mean([outcomes.mean() for outcomes in values.values()])) for values in runs]
    if not shared:
        return means, 0.0
    averaged = {task: np.mean([values[task] for values in runs], axis=0) for task in runs[0]}
    return means, statistics.estimate(averaged, clusters[0]).standard_error


def _w0(run: dict[str, store.Result], models: Sequence[str]) -> str:
    w0 = run[models[0]].data["w0"]
    if w0 is None:
        return "not given (no model was named pretrained)"
    return f"{w0['given']}, weights {w0['fingerprint']['weights'][:12]}"


def _notes(comparison: Comparison, shared: bool) -> list[str]:
    suite, runs = comparison.suite, len(comparison.runs)
    notes = [
        f"W0 (pretrained): {comparison.w0}.",
        f"Per cent of items right: the suite's metric of each task ({', '.join(sorted({t.key for t in suite.tasks}))}); "
        "averages weigh tasks equally. ±: one standard error, 0 if all are right or all wrong.",
    ]
    if any(task.cluster for task in suite.tasks):
        notes.append(
            "Items about the same thing (the suite's `cluster`) count together in errors and intervals."
        )
    if runs == 1:
        notes.append(
            f"Differences from {comparison.reference} are paired by item, in points, with 95 % percentile bootstrap intervals "
            f"over items ({statistics.RESAMPLES} resamples, scipy). One run: they say nothing about other seeds."
        )
    else:
        more = (
            ", plus the variance over the items, which all runs share"
            if shared
            else "; each run has items of its own"
        )
        notes.append(
            f"{runs} runs: means over runs. Variance of the runs' means{more}; 95 % intervals of paired differences from "
            f"{comparison.reference} by Student's t with {runs - 1} degrees of freedom."
        )
    return notes


def _warnings(comparison: Comparison, runs: list[dict[str, store.Result]]) -> Iterable[str]:
    models = list(comparison.cells)
    if message := sources.tuning_warning(comparison.suite.public, comparison.merges):
        yield message
    if others := {m for run in runs for m in run} - set(models):
        yield f"Left out, for not every folder has them: {', '.join(sorted(others))}."
    for run in runs:
        w0s = {(run[m].data["w0"] or {}).get("fingerprint", {}).get("weights") for m in models}
        if len(w0s) > 1:
            yield "The models were run beside different W0 (or none): run all of them in one command."
        yield from _other_base(run, models)
        for what, values in _circumstances(run, models):
            if len(found := set(values)) > 1:
                yield f"The models were run with different {what}: {', '.join(map(str, sorted(found, key=str)))}."
    if limits := {run[m].data["settings"]["limit"] for run in runs for m in models} - {None}:
        yield f"Only the first {max(limits)} items of each task were asked (--limit)."


def _circumstances(
    run: dict[str, store.Result], models: Sequence[str]
) -> Iterable[tuple[str, list[Any]]]:
    """(what, its value for each model) of all that reaches the key of a result beside suite and weights."""
    for setting in ("limit", "backend", "dtype", "device"):
        values = [run[m].data["settings"][setting] for m in models]
        yield setting, [str(v).partition(":")[0] for v in values] if setting == "device" else values
    versions = [fingerprint.that_matter(run[m].data["versions"]) for m in models]
    for package in sorted(set().union(*versions)):
        yield f"versions of {package}", [found.get(package) for found in versions]


def _other_base(run: dict[str, store.Result], models: Sequence[str]) -> Iterable[str]:
    for model in models:
        merge, w0 = run[model].data["source"]["merge"], run[model].data["w0"]
        base = (merge or {}).get("config", {}).get("base_model")
        known = (merge or {}).get("inputs", {}).get(str(base))
        if known and w0 and known != w0["fingerprint"]["weights"]:
            yield f"{model} was merged from base_model {base}, which is not the W0 of this table."
