"""Ask several checkpoints the same questions: `python -m evaluation.run SUITE --model NAME=PATH …`."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import fingerprint, sources, statistics, store
from evaluation.comparison import ComparisonError
from evaluation.suite import GroupName, Suite, SuiteError, load, shipped
from evaluation.worlds import tasks as tiny

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from evaluation.engines.language import Settings

PRETRAINED = "pretrained"  # the model of this name is W0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # read at import; its threads and datasets' forks deadlock
    command = shlex.join(
        ["python", "-m", "evaluation.run", *(sys.argv[1:] if arguments is None else arguments)]
    )

    def work() -> None:
        suite = load(options.suite)
        given = dict(options.model)
        if len(given) < len(options.model):
            raise SuiteError("--model: two models have the same name")
        out = options.out or Path("results", suite.name)
        run(
            suite,
            given,
            out,
            command=command,
            limit=options.limit,
            backend=options.backend,
            device=options.device,
            dtype=options.dtype,
            merge_cache=options.merge_cache,
            fresh=options.fresh,
        )

    return problems(work)


ASIDE = "the result that was there is now {}.old"
KEPT = ": what was finished is kept, and the same command goes on from there (with --fresh it starts over)"


def problems(work: Callable[[], None], kept: str = KEPT) -> int:
    """Do it; what the user can put right is said in one line, without a traceback. ``kept``: said of an interruption."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    except Exception as error:
        from evaluation.engines.language import EngineError

        ours = SuiteError | sources.SourceError | EngineError | store.DamagedError | ComparisonError
        if not isinstance(error, ours | OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description=__doc__)
    parser.add_argument(
        "suite", metavar="SUITE", help=f"{', '.join(shipped())}, or the path of a suite file"
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=model_argument,
        metavar="NAME=PATH",
        help="a checkpoint, a hub name, or a merge configuration (.yml), which is merged first; give several. "
        f"The one named {PRETRAINED} is W0, the one named finetuned what others are compared with",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/SUITE)")
    parser.add_argument("--limit", type=positive, help="only the first N items of each task")
    parser.add_argument(
        "--backend", choices=("hf", "vllm"), default="hf", help="default: %(default)s"
    )
    parser.add_argument(
        "--device", help="for hf: cpu, cuda, cuda:1, mps (default: cuda if there is one)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="for loading: float32, bfloat16 (default: the checkpoint's)"
    )
    parser.add_argument(
        "--merge-cache",
        type=Path,
        default=Path("results", "merged"),
        help="what merges go to (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="ask again what is finished or begun")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def model_argument(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path or not re.fullmatch(r"[\w.,+-]+", name):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PATH (a name: letters, digits, _ . , + -)"
        )
    return name, path


def run(
    suite: Suite,
    given: dict[str, str],
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
    """Make the results of every model in `out`; what is finished there under the same key is left alone."""
    from evaluation.engines import language as engine

    engine.quiet()
    folder = None
    if suite.world is not None:
        folder = out / f"{suite.name}.tasks"
        tiny.write_tasks(suite.world, folder)
    manager = engine.task_manager(folder)
    engine.check_tasks(manager, suite, backend)
    device = device or engine.default_device()
    settings = engine.Settings(backend, device, dtype, limit)
    engine.check_settings(settings)
    found = [sources.find(name, path, merge_cache) for name, path in given.items()]
    _warn(suite, found)

    versions = fingerprint.versions()
    context = {
        "suite": suite.digest(),
        "settings": {
            **asdict(settings),
            "device": device.split(":")[0],
        },  # which of two GPUs makes no difference
        "versions": fingerprint.that_matter(versions),
        "local_tasks": fingerprint.of_files(folder, ("*.jsonl",)) if folder else None,
    }
    w0 = next((source for source in found if source.name == PRETRAINED), None)
    started_with: dict[str, Any] = {
        "w0": {"given": w0.given, "fingerprint": w0.fingerprint} if w0 else None,
        "command": command,
    }
    todo = []
    for source in found:
        pair = store.Pair(out, source.name, suite.name)
        key = fingerprint.digest({**context, "model": source.fingerprint})
        if not fresh and (old := pair.finished(key)) is not None:
            print(f"{source.name}: finished before ({pair.result})", flush=True)
            if started_with["w0"] and old["w0"] != started_with["w0"]:
                pair.rewrite(
                    {**old, "w0": started_with["w0"]}
                )  # W0 is this run's, not that of the run that asked
        else:
            todo.append((source, pair, key))
    if todo:
        engine.check_data(manager, suite.tasks)
    for number, (source, pair, key) in enumerate(todo, 1):
        title = f"[{number}/{len(todo)}] {source.name}"
        begun = time.perf_counter()
        if fresh:
            pair.forget()
        done = _ask(title, source, pair, key, suite, settings, manager, fresh)
        if pair.keep_old():
            print(f"{title}: {ASIDE.format(pair.result)}", flush=True)
        pair.finish(
            {
                "key": key,
                "model": source.name,
                "source": source.record(),
                **started_with,
                "suite": suite.model_dump(),
                "suite_digest": suite.digest(),
                "settings": asdict(settings),
                "versions": versions,
                "git": fingerprint.git_hash(),
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - begun, 1),
                "groups": _groups(suite, done),
                "tasks": {name: _scores(result) for name, result in done.items()},
            },
            done.values(),
        )
        print(f"{title}: {pair.result}", flush=True)


def _warn(suite: Suite, found: Sequence[sources.Source]) -> None:
    if message := sources.tuning_warning(
        suite.public, {source.name: source.merge for source in found}
    ):
        print(f"warning: {message}", file=sys.stderr)
    if PRETRAINED not in {source.name for source in found}:
        print(
            f"warning: no model is named {PRETRAINED}: the results will not say what W0 is",
            file=sys.stderr,
        )
    if len({source.fingerprint["tokenizer"] for source in found}) > 1:
        print(
            "warning: the models' tokenizer files differ; end-of-text tokens and prompts may, too",
            file=sys.stderr,
        )


def _ask(
    title: str,
    source: sources.Source,
    pair: store.Pair,
    key: str,
    suite: Suite,
    settings: Settings,
    manager: TaskManager,
    fresh: bool,
) -> dict[str, store.TaskResult]:
    """All tasks, those that an interrupted run finished from its files."""
    from evaluation.engines import language as engine

    done = pair.resume(key)
    if done:
        print(f"{title}: {len(done)} of {len(suite.tasks)} tasks finished before", flush=True)
    missing = [task for task in suite.tasks if task.task not in done]
    if missing:
        print(f"{title}: loading {source.folder}", flush=True)
        with engine.Model(source.folder, suite, settings) as model:
            for task in missing:
                result = model.ask(task, suite, settings, manager)
                # Before the first is kept: an interrupted run could not go on beside a result of the same key.
                if fresh and not done and pair.keep_old():
                    print(f"{title}: {ASIDE.format(pair.result)}", flush=True)
                pair.keep(key, result)
                done[task.task] = result
                score = np.mean([row.values[task.key] for row in result.rows])
                print(
                    f"{title}: {task.task} {100 * score:.1f} ({len(done)}/{len(suite.tasks)})",
                    flush=True,
                )
    return {task.task: done[task.task] for task in suite.tasks}


def _groups(suite: Suite, done: dict[str, store.TaskResult]) -> dict[GroupName, dict[str, float]]:
    """The averages of ID and OOD by the metrics of the suite."""
    found = {}
    for group, tasks in suite.grouped():
        values = {
            task.task: np.array([row.values[task.key] for row in done[task.task].rows])
            for task in tasks
        }
        clusters = {task.task: [row.cluster for row in done[task.task].rows] for task in tasks}
        found[group] = asdict(statistics.estimate(values, clusters))
    return found


def _scores(result: store.TaskResult) -> dict[str, Any]:
    """Every metric and filter of a task, not only the one that counts."""
    keys = sorted(set.intersection(*(set(row.values) for row in result.rows)))
    clusters = {result.task: [row.cluster for row in result.rows]}
    return {
        "items": len(result.rows),
        "scores": {
            key: asdict(
                statistics.estimate(
                    {result.task: np.array([row.values[key] for row in result.rows])}, clusters
                )
            )
            for key in keys
        },
        **result.info,
    }


if __name__ == "__main__":
    sys.exit(main())
