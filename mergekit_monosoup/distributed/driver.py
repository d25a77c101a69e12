"""A merge from claiming the output folder to publishing the model.

mergekit's `run_merge` does all of it but executing the plan, which is done here.
"""

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
from mergekit.graph import Task
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_monosoup import ending, files, report
from mergekit_monosoup.checkpoints.inputs import Inputs
from mergekit_monosoup.distributed import making, vocabulary
from mergekit_monosoup.distributed.dependencies import (
    Dependencies,
    as_json,
    asked,
    changed_inputs,
    input_files,
    states,
    versions,
)
from mergekit_monosoup.distributed.engines import Engine
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.plan import (
    Batch,
    Plan,
    PlanError,
    batch_bytes,
    divide,
    footprint,
    split_plan,
    start_order,
)
from mergekit_monosoup.distributed.preconditions import warn_of_little_room
from mergekit_monosoup.distributed.progress import Bar
from mergekit_monosoup.distributed.publication import FolderError
from mergekit_monosoup.distributed.records import Done
from mergekit_monosoup.distributed.worker import Failed, MergeContext, method_of
from mergekit_monosoup.planner import Strict

LOG = logging.getLogger("mergekit_monosoup")


class MergeError(RuntimeError):
    """A worker failed; ``details`` is its traceback."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.details = f"on {failed.worker}:\n{failed.traceback}"


@dataclass(frozen=True)
class Part:
    """What a merge that is one stage of several has of its own.

    Attributes:
        earlier: documents of the stages that it is made from, and they from; by name.
        card: the configuration that the model card quotes; None: as mergekit-multi writes it.
        names: path of each stage → what the model card calls it.
        kept: a record is left beside the model, by which --resume knows the stage.
    """

    earlier: Mapping[str, Any]
    card: str | None
    names: Mapping[str, str]
    kept: bool

    def finish(self, work: WorkFolder, shards: dict[str, str], *, hashed: bool) -> None:
        """Do what is to be done before the model is put into its place."""
        card = work.files / "README.md"
        if self.names and card.exists():
            text = card.read_text(encoding="utf-8")
            for path, name in self.names.items():
                text = text.replace(path, name)
            card.write_text(text, encoding="utf-8")
        if self.kept:
            work.keep_record(shards, hashed=hashed)


@dataclass(frozen=True)
class Request:
    """A merge as the user wants it.

    Attributes:
        config: mergekit's configuration.
        source: text of the configuration, which the model card quotes.
        out: the output folder.
        options: mergekit's.
        threads: of each worker; None: as many as this process has.
        seed: see :class:`mergekit_monosoup.distributed.worker.MergeContext`.
        hash_inputs: know the models' files by their content, not by size and time of change.
        engine: starts the workers, once it is clear that there is something for them to do.
        part: what it has of its own if it is one stage of several.
    """

    config: MergeConfiguration
    source: str
    out: Path
    options: MergeOptions
    threads: int | None
    seed: int | None
    hash_inputs: bool
    engine: Callable[[], Engine]
    part: Part | None = None

    def asked(self) -> Dependencies:
        """Return the part of what the result depends on that is no file."""
        found = asked(
            self.source,
            self.options,
            threads=self.threads or torch.get_num_threads(),
            seed=self.seed,
            hash_inputs=self.hash_inputs,
        )
        if self.part and self.part.earlier:
            found["earlier stages"] = dict(self.part.earlier)
        return found

    @property
    def card(self) -> str | None:
        """The configuration that the model card quotes; None: as mergekit writes it."""
        return self.part.card if self.part else self.source


def merge(
    request: Request, *, resume: bool, force: bool, strict: Strict | None = None
) -> list[Done]:
    """Merge, or go on with what an earlier run left, and publish the model.

    ``strict``: knows what mergekit's plan leaves out, for the reports.

    Returns:
        The record of each batch.

    Raises:
        FolderError, PlanError, EngineError, MergeError: the merge cannot be done; nothing in OUT
            looks finished then.
        ValueError, RuntimeError, ...: what mergekit raises for this configuration.
    """
    work = WorkFolder(request.out)
    with work.claimed(resume=resume, force=force):
        work.check_stages(())
        return merge_claimed(request, work, strict)


def merge_claimed(request: Request, work: WorkFolder, strict: Strict | None) -> list[Done]:
    """Do what :func:`merge` does, in a folder that the caller has claimed."""
    # mergekit's planner rewrites the configuration.
    original = request.config.model_copy(deep=True)
    if work.publishing:
        work.check_complete(request.asked())
    else:
        distributor = Distributor(request, original, work)
        with distributor.in_place_of_executor():
            # Quiet: there is one bar, ours.
            options = request.options.model_copy(update={"quiet": True})
            mergekit.merge.run_merge(
                request.config, str(work.files), options, config_source=request.card
            )
        distributor.write_reports(strict.left_out if strict else ())
        shards = distributor.shards()
        if request.part:
            request.part.finish(work, shards, hashed=request.hash_inputs)
        work.prepare(shards)
    records = work.records()
    work.publish()
    work.remove()
    ending.say(str(request.out), _tally(records))
    return records


def _tally(records: Sequence[Done]) -> report.Tally:
    """Return what all batches did, those of an earlier run among them."""
    return report.Tally.of(
        (path, method, report.Record.from_json(line))
        for record in records
        for path, method, line in record.reports
    )


def check_inputs(out: Path, before: Mapping[str, str], *, hashed: bool) -> None:
    """Check, before a model is published, that its inputs are still those that it was begun with.

    Raises:
        FolderError: they are not; the message names the files.
    """
    if changes := changed_inputs(before, hashed=hashed):
        raise FolderError(
            f"{out}: inputs were changed while they were merged, so nothing is published: the "
            "result would be half of one model and half of another:\n  "
            + "\n  ".join(changes)
            + "\nMerge again with --force when nobody writes to them."
        )


class Distributor:
    """The executor that `run_merge` gets: it has the plan's tensors merged by an engine.

    So planning, adapters, config.json, tokenizer, chat template and model card are mergekit's own,
    of whatever version.
    """

    def __init__(self, request: Request, config: MergeConfiguration, work: WorkFolder):
        """``config``: as it was read, for `run_merge` changes the one of ``request``."""
        self.request, self.config, self.work = request, config, work
        self.finished: dict[int, Done] = {}
        self._plan: Plan | None = None
        self._built = b""
        # Only for the warning that is given once per merge: the workers cannot know of each other.
        self._journal = report.Journal()
        self._logged: set[tuple[str, int, str]] = set()

    @contextmanager
    def in_place_of_executor(self) -> Iterator[None]:
        """Put this object in the place of mergekit's executor, for as long as the block runs.

        Raises:
            PlanError: mergekit did not use it.
        """
        module: Any = mergekit.merge
        original = module.Executor
        module.Executor = self._receive_plan
        try:
            yield
        finally:
            module.Executor = original
        if self._plan is None:
            raise PlanError(
                "this mergekit executes its plans in another way than 0.1.5: merge with "
                "mergekit-yaml"
            )

    def _receive_plan(
        self, targets: list[Task[Any]], math_device: Any, storage_device: Any
    ) -> Distributor:
        """Take the plan; `run_merge` calls this for the constructor of an executor."""
        self._plan = split_plan(targets)
        self._devices = str(math_device), str(storage_device)
        return self

    def run(self, quiet: bool = False) -> Iterator[tuple[Task[Any], Any]]:
        """Execute the plan. Of its values `run_merge` looks at the tokenizer only."""
        assert self._plan is not None
        plan, request = self._plan, self.request
        loaders = {model: LoaderCache().get(model) for model in self.config.referenced_models()}
        needs = self._dependencies(loaders)
        if self.work.begun:
            self.work.check_same(needs)
        if plan.tokenizer is not None:
            info = vocabulary.build(plan.tokenizer, self.work.vocabulary, resuming=self.work.begun)
            self._built = pickle.dumps(info)
            yield plan.tokenizer, info
        inputs = Inputs(loaders, request.options.trust_remote_code)
        footprints = [footprint(inputs, task, self._threads) for task in plan.tensors]
        size = sum(tensor.written for tensor in footprints)
        with contextlib.closing(request.engine()) as engine:
            shard_size = request.options.out_shard_size
            seconds = sum(tensor.seconds for tensor in footprints)
            fair = batch_bytes(size, engine.workers, shard_size, seconds)
            limit = self.work.division(needs, fair)
            batches = divide(plan.tensors, footprints, limit)
            with self._bar(len(plan.tensors), size) as bar:
                self._resume(batches, bar)
                waiting = [
                    batch
                    for batch in start_order(batches, limit)
                    if batch.number not in self.finished
                ]
                warn_of_little_room(self.work.out, sum(batch.written for batch in waiting))
                self._execute(engine, self._context(plan, loaders, engine), waiting, bar)
        check_inputs(self.work.out, needs["inputs"], hashed=request.hash_inputs)

    def _bar(self, tensors: int, size: int) -> Bar:
        return Bar(
            tensors,
            size,
            attempts=lambda: making.attempts(self.work),
            quiet=self.request.options.quiet,
            verbose=self.request.options.verbosity > 0,
        )

    def _execute(
        self, engine: Engine, context: MergeContext, batches: Sequence[Batch], bar: Bar
    ) -> None:
        """Have ``batches`` merged.

        Raises:
            MergeError: one of them failed; those at work are stopped.
        """
        with contextlib.closing(engine.run(context, batches)) as results:
            for result in results:
                if isinstance(result, Failed):
                    raise MergeError(result)
                self._take(result)
                bar.count(result)

    @property
    def _threads(self) -> int:
        return self.request.threads or torch.get_num_threads()

    def _dependencies(self, loaders: Mapping[ModelReference, LazyTensorLoader]) -> Dependencies:
        """Return everything that the weights depend on, in types that JSON knows."""
        inputs = states(input_files(loaders.values()), hashed=self.request.hash_inputs)
        return {**self.request.asked(), "inputs": inputs, "versions": versions()}

    def _resume(self, batches: Sequence[Batch], bar: Bar) -> None:
        """Take over the batches that an earlier run has finished."""
        for record in self.work.finished():
            if isinstance(record, str):
                bar.print(record)
                continue
            of_plan = batches[record.batch].tensors if record.batch < len(batches) else ()
            names = {task.tensor_name for task in of_plan}
            if not all(names.issuperset(shard.tensors) for shard in record.shards):
                raise FolderError(
                    f"{self.work.out}: the merge was divided in another way; start over with "
                    "--force"
                )
            if foreign := {path for path, _, _ in record.reports} - self._reports():
                raise FolderError(
                    f"{self.work.out}: a finished batch names a report that the configuration does "
                    f"not ({foreign.pop()!r}); start over with --force"
                )
            self._take(record)
        if self.finished:
            bar.already(self.finished.values())
            bar.print(f"resuming: {len(self.finished)} of {len(batches)} batches are done")

    def _reports(self) -> set[str | None]:
        """Return the values of `report` in the configuration, wherever they stand; and None."""
        found: set[str | None] = {None}
        waiting: list[tuple[bool, Any]] = [(False, as_json(self.request.source))]
        while waiting:
            within, value = waiting.pop()
            if isinstance(value, str) and within:
                found.add(value)
            elif isinstance(value, dict):
                waiting += [(within or key == "report", entry) for key, entry in value.items()]
            elif isinstance(value, list):
                waiting += [(within, entry) for entry in value]
        return found

    def _take(self, record: Done) -> None:
        """Count a batch as finished, and repeat what its worker logged."""
        self.finished[record.batch] = record
        for _, method, line in record.reports:
            self._journal.add([report.Record.from_json(line)], None, method)
        for name, level, message in record.logs:
            logger = logging.getLogger(name)
            if (name, level, message) not in self._logged and logger.isEnabledFor(level):
                self._logged.add((name, level, message))
                logger.handle(logger.makeRecord(name, level, "worker", 0, message, (), None))

    def _context(
        self, plan: Plan, loaders: Mapping[ModelReference, LazyTensorLoader], engine: Engine
    ) -> MergeContext:
        return MergeContext(
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
            built=self._built,
            math_device=self._devices[0],
            storage_device=self._devices[1],
            threads=self.request.threads,
            seed=self.request.seed,
            own_process=engine.own_process,
        )

    # -- when all batches are done -----------------------------------------------------------------

    def write_reports(self, left_out: Sequence[tuple[str, report.Record]] = ()) -> None:
        """Write the reports that the configuration names, in the order of the plan.

        ``left_out``: (report, record) of what no batch merges.
        """
        lines: dict[str, list[str]] = defaultdict(list)
        for named, record in left_out:
            lines[os.path.abspath(os.path.expanduser(named))].append(record.to_json() + "\n")
        for number in sorted(self.finished):
            for path, _, line in self.finished[number].reports:
                if path:
                    lines[os.path.abspath(os.path.expanduser(path))].append(line + "\n")
        for number, (path, text) in enumerate(lines.items()):
            try:
                report.replace(path, "".join(text))
            except (OSError, ValueError) as error:
                # Hours of merging are not thrown away for it; mergekit-yaml would have stopped at
                # the first tensor.
                name = f"monosoup-report{number or ''}.jsonl"
                files.write_text(self.work.files / name, "".join(text))
                LOG.warning(
                    "the report could not be written (%s): it is %s instead",
                    error,
                    self.work.out / name,
                )

    def shards(self) -> dict[str, str]:
        """Return final name → file in `done`, with the names that transformers expects.

        Writes the index that goes with more than one.
        """
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
        files.write_text(
            self.work.files / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2)
        )
        return {name: shard.file for name, shard in zip(names, shards, strict=True)}
