"""A merge from claim to publication. mergekit's `run_merge` does all of it but execute the plan; that is done here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from mergekit_monosoup import report
from mergekit_monosoup.checkpoints.inputs import Inputs
from mergekit_monosoup.distributed import folder as folders
from mergekit_monosoup.distributed.engines import Engine
from mergekit_monosoup.distributed.fingerprint import Fingerprint, document, fingerprint, versions
from mergekit_monosoup.distributed.folder import Done, FolderError, WorkFolder
from mergekit_monosoup.distributed.plan import (
    Batch,
    Plan,
    PlanError,
    batch_bytes,
    divide,
    footprint,
    in_order,
    take_apart,
)
from mergekit_monosoup.distributed.progress import Bar
from mergekit_monosoup.distributed.worker import Failed, Job, method_of

LOG = logging.getLogger("mergekit_monosoup")


class MergeError(RuntimeError):
    """What a worker reported; ``details`` is its traceback."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.details = f"on {failed.worker}:\n{failed.traceback}"


@dataclass(frozen=True)
class Request:
    """A merge as it was asked for.

    Attributes:
        source: text of the configuration, which the model card quotes.
        threads: of each worker; None: as many as this process has.
        seed: see :class:`mergekit_monosoup.distributed.worker.Job`.
        engine: starts the workers, once it is clear that there is something for them to do.
    """

    config: MergeConfiguration
    source: str
    out: Path
    options: MergeOptions
    threads: int | None
    seed: int | None
    engine: Callable[[], Engine]


def merge(request: Request, *, resume: bool, force: bool) -> list[Done]:
    """Merges, or goes on with what an earlier run left, and publishes the model; returns the record of each batch.

    Raises:
        FolderError, PlanError, EngineError, MergeError: and nothing in OUT looks finished.
        ValueError, RuntimeError, ...: what mergekit raises for this configuration.
    """
    work = WorkFolder(request.out)
    # mergekit's planner rewrites the configuration.
    asked = request.config.model_copy(deep=True)
    with work.claimed(resume=resume, force=force):
        if work.publishing:
            work.check_same({"configuration": document(request.source)})
        else:
            distributor = Distributor(request, asked, work)
            with distributor.in_place_of_executor():
                # Quiet: there is one bar, ours.
                options = request.options.model_copy(update={"quiet": True})
                mergekit.merge.run_merge(
                    request.config, str(work.files), options, config_source=request.source
                )
            distributor.write_reports()
            work.prepare(distributor.shards())
        records = list(map(folders.read_done, sorted(work.done.glob("*.json"))))
        work.publish()
        work.remove()
    return records


class Distributor:
    """Stands in for the executor within `run_merge`: executes the plan's tensors elsewhere, and keeps them.

    So planning, adapters, config.json, tokenizer, chat template and model card are mergekit's own, of whatever version.
    """

    def __init__(self, request: Request, asked: MergeConfiguration, work: WorkFolder):
        self.request, self.asked, self.work = request, asked, work
        self.finished: dict[int, Done] = {}
        self._plan: Plan | None = None
        # Only for the warning that is given once per merge: the workers cannot know of each other.
        self._journal = report.Journal()
        self._logged: set[tuple[str, int, str]] = set()

    @contextmanager
    def in_place_of_executor(self) -> Iterator[None]:
        """Raises PlanError: mergekit did not come by."""
        module: Any = mergekit.merge
        original = module.Executor
        module.Executor = self._made
        try:
            yield
        finally:
            module.Executor = original
        if self._plan is None:
            raise PlanError(
                "this mergekit executes its plans in another way than 0.1.5: merge with mergekit-yaml"
            )

    def _made(self, targets: list[Task[Any]], math_device: Any, storage_device: Any) -> Distributor:
        """What `run_merge` takes for the constructor of an executor."""
        self._plan = take_apart(targets)
        self._devices = str(math_device), str(storage_device)
        return self

    def run(self, quiet: bool = False) -> Iterator[tuple[Task[Any], Any]]:
        """Executes the plan. Of its values `run_merge` looks at the tokenizer only."""
        assert self._plan is not None
        plan, request = self._plan, self.request
        loaders = {model: LoaderCache().get(model) for model in self.asked.referenced_models()}
        wanted = self._fingerprint(loaders)
        if self.work.begun:
            self.work.check_same(wanted)
        if plan.tokenizer is not None:
            yield plan.tokenizer, self._tokenizer(plan.tokenizer)
        inputs = Inputs(loaders, request.options.trust_remote_code)
        footprints = [footprint(inputs, task, self._threads) for task in plan.tensors]
        size = sum(one.written for one in footprints)
        with contextlib.closing(request.engine()) as engine:
            limit = self.work.division(
                wanted, batch_bytes(size, engine.workers, request.options.out_shard_size)
            )
            batches = divide(plan.tensors, footprints, limit)
            bar = Bar(
                len(plan.tensors),
                size,
                attempts=lambda: folders.attempts(self.work),
                quiet=request.options.quiet,
                verbose=request.options.verbosity > 0,
            )
            with bar:
                self._resume(batches, bar)
                job = self._job(plan, loaders, engine)
                left = [
                    batch for batch in in_order(batches, limit) if batch.number not in self.finished
                ]
                with contextlib.closing(engine.run(job, left)) as results:
                    for result in results:
                        if isinstance(result, Failed):
                            raise MergeError(result)
                        self._take(result)
                        bar.count(result)

    @property
    def _threads(self) -> int:
        return self.request.threads or torch.get_num_threads()

    def _fingerprint(self, loaders: Mapping[ModelReference, LazyTensorLoader]) -> Fingerprint:
        request = self.request
        return fingerprint(
            request.source, request.options, loaders, threads=self._threads, seed=request.seed
        )

    def _tokenizer(self, task: BuildTokenizer) -> TokenizerInfo:
        """Built once per merge and kept: a union of vocabularies comes out in another order in another process."""
        if not self.work.tokenizer.exists():
            targets: list[Task[Any]] = [task]
            ((_, value),) = Executor(targets).run(quiet=True)
            folders.write_bytes(self.work.tokenizer, pickle.dumps(value))
        return pickle.loads(self.work.tokenizer.read_bytes())

    def _resume(self, batches: Sequence[Batch], bar: Bar) -> None:
        for found in self.work.finished():
            if isinstance(found, str):
                bar.say(found)
                continue
            names = (
                {task.tensor_name for task in batches[found.batch].tensors}
                if found.batch < len(batches)
                else set()
            )
            if not all(names.issuperset(shard.tensors) for shard in found.shards):
                raise FolderError(
                    f"{self.work.out}: the merge was divided in another way; start over with --force"
                )
            self._take(found)
        if self.finished:
            bar.already(self.finished.values())
            bar.say(f"resuming: {len(self.finished)} of {len(batches)} batches are done")

    def _take(self, record: Done) -> None:
        self.finished[record.batch] = record
        for _, method, line in record.reports:
            self._journal.add([report.Record(**json.loads(line))], None, method)
        for name, level, message in record.logs:
            logger = logging.getLogger(name)
            if (name, level, message) not in self._logged and logger.isEnabledFor(level):
                self._logged.add((name, level, message))
                logger.handle(logger.makeRecord(name, level, "worker", 0, message, (), None))

    def _job(
        self, plan: Plan, loaders: Mapping[ModelReference, LazyTensorLoader], engine: Engine
    ) -> Job:
        return Job(
            out=str(self.work.out),
            token=self.work.token.read_text(encoding="utf-8"),
            node=socket.gethostname(),
            cwd=os.getcwd(),
            versions=versions(),
            sources={
                model: os.path.abspath(loader.index.base_path) for model, loader in loaders.items()
            },
            methods=frozenset(filter(None, map(method_of, plan.tensors))),
            options=self.request.options,
            writer=plan.writer,
            tokenizer=plan.tokenizer,
            math_device=self._devices[0],
            storage_device=self._devices[1],
            threads=self.request.threads,
            seed=self.request.seed,
            own_process=engine.own_process,
        )

    # -- when all batches are done ------------------------------------------------------------------------------------

    def write_reports(self) -> None:
        """The reports that the methods were asked for, in the order of the plan."""
        lines: dict[str, list[str]] = defaultdict(list)
        for number in sorted(self.finished):
            for path, _, line in self.finished[number].reports:
                if path:
                    lines[os.path.abspath(os.path.expanduser(path))].append(line + "\n")
        for number, (path, text) in enumerate(lines.items()):
            try:
                folders.write_text(Path(report.start(path)), "".join(text))
            except (OSError, ValueError) as error:
                # Hours of merging are not thrown away for it; mergekit-yaml would have stopped at the first tensor.
                name = f"monosoup-report{number or ''}.jsonl"
                folders.write_text(self.work.files / name, "".join(text))
                LOG.warning(
                    "the report could not be written (%s): it is %s instead",
                    error,
                    self.work.out / name,
                )

    def shards(self) -> dict[str, str]:
        """Final name → file in `done`, named as transformers expects; writes the index that goes with more than one."""
        assert self._plan is not None
        safe = self._plan.writer.safe_serialization
        stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
        records = [self.finished[number] for number in sorted(self.finished)]
        shards = [shard for record in records for shard in record.shards]
        if len(shards) == 1:
            return {f"{stem}.{suffix}": shards[0].file}
        names = [
            f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
            for number in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {
                "total_size": sum(record.bytes for record in records),
                "mergekit_version": version("mergekit"),
            },
            "weight_map": {
                tensor: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard.tensors
            },
        }
        folders.write_text(
            self.work.files / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2)
        )
        return {name: shard.file for name, shard in zip(names, shards, strict=True)}
