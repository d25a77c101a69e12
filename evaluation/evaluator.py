"""The evaluation itself: merge what has to be merged, ask every model every task, write results."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import engines, fingerprint, sources, statistics, store
from evaluation.engines import ENGINES, NOTHING_SAID, Engine, Options
from evaluation.sources import MERGE_CACHE, PRETRAINED, Source
from evaluation.statistics import Estimate
from evaluation.suite import GroupName, Suite


def evaluate(
    suite: Suite,
    paths: Mapping[str, str],
    out: Path,
    options: Options = NOTHING_SAID,
    *,
    command: str = "",
    merge_cache: Path = MERGE_CACHE,
    fresh: bool = False,
) -> None:
    """Make the results of every model in `out`, and leave alone what is finished there.

    Finished is what has the same key: of suite, weights, settings and versions. `paths` are those
    of the models by name, see `sources.find`; the one called pretrained is W0. `command` is
    recorded; `fresh` asks again what is finished or begun.

    Raises:
        SourceError: a model cannot be had.
        EvaluationError: the engine cannot do what the suite or the options ask for.
        OSError: nothing can be written to `out`.
    """
    store.check_folder(out)
    engine = engines.start(suite, options, out)
    models = [sources.find(name, path, merge_cache) for name, path in paths.items()]
    _warn(suite, engine, models)

    evaluator = _Evaluator(suite, engine, dict(engine.decides), _w0(models), command, fresh)
    todo = [model for source in models if (model := evaluator.unfinished(source, out))]
    if todo:
        engine.check([model.source for model in todo])
    for number, model in enumerate(todo, 1):
        evaluator.finish(model, f"[{number}/{len(todo)}] {model.source.name}")


def _warn(suite: Suite, engine: Engine, models: Sequence[Source]) -> None:
    merges = {source.name: source.origin.merge for source in models}
    found = [sources.tuning_warning(suite.public, merges)]
    if PRETRAINED not in merges:
        found.append(f"no model is named {PRETRAINED}: the results will not say what W0 is")
    for message in filter(None, [*found, *engine.warnings(models)]):
        print(f"warning: {message}", file=sys.stderr)


def _w0(models: Sequence[Source]) -> store.Pretrained | None:
    for source in models:
        if source.name == PRETRAINED:
            return store.Pretrained(source.origin.given, source.origin.fingerprint)
    return None


@dataclass(frozen=True)
class _Unfinished:
    """A model that has to be asked, where its result goes and under which key."""

    source: Source
    files: store.ResultFiles
    key: str


@dataclass(frozen=True)
class _Evaluator:
    """Asks models the tasks of one suite, with the same settings and beside the same W0."""

    suite: Suite
    engine: Engine
    decides: dict[str, Any]  # see `Engine.decides`
    w0: store.Pretrained | None
    command: str
    fresh: bool

    @cached_property
    def versions(self) -> dict[str, str]:
        return fingerprint.versions(ENGINES[self.suite.engine].packages)

    def key(self, source: Source) -> str:
        """Return a digest of what decides the answers of a model."""
        settings = asdict(self.engine.settings)
        # Which of two GPUs makes no difference.
        settings["device"] = self.engine.settings.device.split(":")[0]
        packages = ENGINES[self.suite.engine].packages
        return fingerprint.digest(
            {
                "suite": self.suite.digest(),
                "settings": settings,
                "versions": fingerprint.deciding(self.versions, packages),
                "model": asdict(source.origin.fingerprint),
                **self.decides,
            }
        )

    def unfinished(self, source: Source, out: Path) -> _Unfinished | None:
        """Return what has to be asked of a model, None if `out` has a result of its key."""
        files = store.ResultFiles(out, source.name, self.suite.name)
        key = self.key(source)
        if self.fresh or (result := files.finished(key)) is None:
            return _Unfinished(source, files, key)
        print(f"{source.name}: finished before ({files.result})", flush=True)
        if self.w0 is not None and result.w0 != self.w0:
            # W0 is this run's, not that of the run that asked.
            files.rewrite(result.model_copy(update={"w0": self.w0}))
        return None

    def finish(self, model: _Unfinished, title: str) -> None:
        """Ask one model what it has not answered yet, and write its result."""
        started = time.perf_counter()
        if self.fresh:
            model.files.forget()
        results = self._ask(model, title)
        _keep_old(model, title)
        samples = model.files.write_samples(results.values())
        model.files.finish(
            store.Result(
                key=model.key,
                model=model.source.name,
                source=model.source.origin,
                w0=self.w0,
                command=self.command,
                suite=self.suite,
                suite_digest=self.suite.digest(),
                settings=self.engine.settings,
                versions=self.versions,
                git=fingerprint.git_hash(),
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - started, 1),
                groups=_groups(self.suite, results),
                tasks={name: _scores(result) for name, result in results.items()},
                samples=samples,
            )
        )
        print(f"{title}: {model.files.result}", flush=True)

    def _ask(self, model: _Unfinished, title: str) -> dict[str, store.TaskResult]:
        """Return the results of all tasks; those of an interrupted run come from its files."""
        tasks, folder = self.suite.tasks, model.source.folder
        results = model.files.resume(model.key)
        if results:
            print(f"{title}: {len(results)} of {len(tasks)} tasks finished before", flush=True)
        missing = [task for task in tasks if task.task not in results]
        if missing:
            print(f"{title}: loading {folder}", flush=True)
            with self.engine.model(model.source) as loaded:
                for task in missing:
                    result = loaded.ask(task)
                    if self.fresh and not results:
                        # Before the first is kept: an interrupted run could not go on beside a
                        # result of the same key.
                        _keep_old(model, title)
                    model.files.keep(model.key, result)
                    results[task.task] = result
                    score = 100 * np.mean([sample.values[task.key] for sample in result.samples])
                    done = f"{len(results)}/{len(tasks)}"
                    print(f"{title}: {task.task} {score:.1f} ({done})", flush=True)
        return {task.task: results[task.task] for task in tasks}


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
