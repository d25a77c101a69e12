"""The evaluation itself: merge what has to be merged, ask every model every task, write results."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation import fingerprint, sources, statistics, store
from evaluation.engines import Settings
from evaluation.sources import PRETRAINED, Source
from evaluation.statistics import Estimate
from evaluation.suite import GroupName, Suite
from evaluation.worlds.tasks import write_tasks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class _Unfinished:
    """A model that has to be asked, where its result goes and under which key."""

    source: Source
    files: store.ResultFiles
    key: str


@dataclass(frozen=True)
class _Evaluator:
    """What all models of one call share."""

    suite: Suite
    settings: Settings
    manager: TaskManager
    w0: store.Pretrained | None
    versions: dict[str, str]
    command: str
    fresh: bool


def evaluate(
    suite: Suite,
    models: Mapping[str, str],
    out: Path,
    *,
    command: str = "",
    limit: int | None = None,
    backend: str = "hf",
    device: str | None = None,
    dtype: str = "auto",
    merge_cache: Path = Path("results", "merged"),
    fresh: bool = False,
) -> None:
    """Make the results of every model in `out`, and leave alone what is finished there.

    Finished is what has the same key: of suite, weights, settings and versions. `models` are paths
    by name, see `sources.find`; the one called pretrained is W0. `command` is recorded; `fresh`
    asks again what is finished or begun.

    Raises:
        SourceError: a model cannot be had.
        EvaluationError: the engine cannot do what the suite or the settings ask for.
    """
    from evaluation.engines import language  # imports lm-eval, which takes seconds

    language.quiet()
    folder = None
    if suite.world is not None:
        folder = out / f"{suite.name}.tasks"
        write_tasks(suite.world, folder)
    manager = language.task_manager(folder)
    language.check_tasks(manager, suite, backend)
    settings = Settings(backend, device or language.default_device(), dtype, limit)
    language.check_settings(settings)
    found = [sources.find(name, path, merge_cache) for name, path in models.items()]
    _warn(suite, found)

    w0 = next((source.origin for source in found if source.name == PRETRAINED), None)
    pretrained = store.Pretrained(w0.given, w0.fingerprint) if w0 else None
    versions = fingerprint.versions()
    evaluator = _Evaluator(suite, settings, manager, pretrained, versions, command, fresh)
    local_tasks = fingerprint.of_files(folder, ("*.jsonl",)) if folder else None
    unfinished = list(_unfinished(evaluator, found, out, local_tasks))
    if unfinished:
        language.check_data(manager, suite.tasks)
    for number, model in enumerate(unfinished, 1):
        _finish(evaluator, model, f"[{number}/{len(unfinished)}] {model.source.name}")


def _warn(suite: Suite, models: Sequence[Source]) -> None:
    merges = {source.name: source.origin.merge for source in models}
    if message := sources.tuning_warning(suite.public, merges):
        print(f"warning: {message}", file=sys.stderr)
    if PRETRAINED not in merges:
        print(
            f"warning: no model is named {PRETRAINED}: the results will not say what W0 is",
            file=sys.stderr,
        )
    if len({source.origin.fingerprint.tokenizer for source in models}) > 1:
        print(
            "warning: the models' tokenizer files differ; end-of-text tokens and prompts may, too",
            file=sys.stderr,
        )


def _unfinished(
    evaluator: _Evaluator, models: Sequence[Source], out: Path, local_tasks: str | None
) -> list[_Unfinished]:
    """Return the models without a result of their key; bring the W0 of other results up to date."""
    suite, settings = evaluator.suite, asdict(evaluator.settings)
    context = {
        "suite": suite.digest(),
        # Which of two GPUs makes no difference.
        "settings": settings | {"device": settings["device"].split(":")[0]},
        "versions": fingerprint.deciding(evaluator.versions),
        "local_tasks": local_tasks,
    }
    unfinished = []
    for source in models:
        files = store.ResultFiles(out, source.name, suite.name)
        key = fingerprint.digest({**context, "model": asdict(source.origin.fingerprint)})
        if evaluator.fresh or (result := files.finished(key)) is None:
            unfinished.append(_Unfinished(source, files, key))
            continue
        print(f"{source.name}: finished before ({files.result})", flush=True)
        if evaluator.w0 is not None and result.w0 != evaluator.w0:
            # W0 is this run's, not that of the run that asked.
            files.rewrite(result.model_copy(update={"w0": evaluator.w0}))
    return unfinished


def _finish(evaluator: _Evaluator, model: _Unfinished, title: str) -> None:
    """Ask one model what it has not answered yet, and write its result."""
    started = time.perf_counter()
    if evaluator.fresh:
        model.files.forget()
    results = _ask(evaluator, model, title)
    _keep_old(model, title)
    samples = model.files.write_samples(results.values())
    model.files.finish(
        store.Result(
            key=model.key,
            model=model.source.name,
            source=model.source.origin,
            w0=evaluator.w0,
            command=evaluator.command,
            suite=evaluator.suite,
            suite_digest=evaluator.suite.digest(),
            settings=evaluator.settings,
            versions=evaluator.versions,
            git=fingerprint.git_hash(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started, 1),
            groups=_groups(evaluator.suite, results),
            tasks={name: _scores(result) for name, result in results.items()},
            samples=samples,
        )
    )
    print(f"{title}: {model.files.result}", flush=True)


def _ask(evaluator: _Evaluator, model: _Unfinished, title: str) -> dict[str, store.TaskResult]:
    """Return the results of all tasks; what an interrupted run finished comes from its files."""
    from evaluation.engines import language

    suite = evaluator.suite
    results = model.files.resume(model.key)
    if results:
        print(f"{title}: {len(results)} of {len(suite.tasks)} tasks finished before", flush=True)
    missing = [task for task in suite.tasks if task.task not in results]
    if missing:
        folder = model.source.folder
        print(f"{title}: loading {folder}", flush=True)
        with language.Model(folder, suite, evaluator.settings) as loaded:
            for task in missing:
                result = loaded.ask(task, suite, evaluator.settings, evaluator.manager)
                if evaluator.fresh and not results:
                    # Before the first is kept: an interrupted run could not go on beside a result
                    # of the same key.
                    _keep_old(model, title)
                model.files.keep(model.key, result)
                results[task.task] = result
                score = 100 * np.mean([sample.values[task.key] for sample in result.samples])
                done = f"{len(results)}/{len(suite.tasks)}"
                print(f"{title}: {task.task} {score:.1f} ({done})", flush=True)
    return {task.task: results[task.task] for task in suite.tasks}


def _keep_old(model: _Unfinished, title: str) -> None:
    if model.files.keep_old():
        print(f"{title}: the result that was there is now {model.files.result}.old", flush=True)


def _groups(suite: Suite, results: Mapping[str, store.TaskResult]) -> dict[GroupName, Estimate]:
    """Return the averages of ID and OOD by the metrics of the suite."""
    averages = {}
    for group, tasks in suite.grouped():
        samples = {task.task: results[task.task].samples for task in tasks}
        values = {
            task.task: np.array([sample.values[task.key] for sample in samples[task.task]])
            for task in tasks
        }
        clusters = {
            name: [sample.cluster for sample in of_task] for name, of_task in samples.items()
        }
        averages[group] = statistics.estimate(values, clusters)
    return averages


def _scores(result: store.TaskResult) -> store.TaskScores:
    """Return every metric and filter of a task, not only the one that counts."""
    keys = sorted(set.intersection(*(set(sample.values) for sample in result.samples)))
    clusters = {result.task: [sample.cluster for sample in result.samples]}
    scores = {}
    for key in keys:
        values = np.array([sample.values[key] for sample in result.samples])
        scores[key] = statistics.estimate({result.task: values}, clusters)
    return store.TaskScores(items=len(result.samples), scores=scores, **result.info)
