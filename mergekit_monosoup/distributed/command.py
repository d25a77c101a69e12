"""The command `mergekit-monosoup run`.

It has mergekit-yaml's options, and those that divide a merge among workers.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit.scripts import run_yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from mergekit_monosoup.check.keys import refusals
from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text
from mergekit_monosoup.checkpoints.yaml import MOST_BYTES, PlainLoader, parse_documents
from mergekit_monosoup.distributed import stages
from mergekit_monosoup.distributed.alone import merge_alone
from mergekit_monosoup.distributed.driver import MergeError, Part, Request, merge, merge_claimed
from mergekit_monosoup.distributed.engines import (
    Engine,
    InProcess,
    OnRay,
    cores,
    import_ray,
    started_once,
)
from mergekit_monosoup.distributed.finished import command_to_resume, is_finished
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.plan import SMALLEST_BATCH
from mergekit_monosoup.distributed.preconditions import (
    any_of,
    check_no_input,
    check_places,
    names_compared,
    prepare_models,
)
from mergekit_monosoup.distributed.progress import size_in_words
from mergekit_monosoup.distributed.records import Done
from mergekit_monosoup.distributed.threads import InThreads
from mergekit_monosoup.planner import Strict, strictly

# Of disks, quotas and limits that are reached; libraries in Rust use the same words.
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
NOTHING_KEPT = (
    "No batch was finished, so nothing is kept. (With one worker batches are kept only if the "
    "merge was begun with --resume.)"
)
NEEDS_RAY = (
    "--gpus gives each of several workers a GPU: add --ray local --workers N, or take --cuda for "
    "one GPU"
)

# Every option of mergekit 0.1.5 reaches the workers, or the driver, as it is (`num_threads`: of
# each worker), but for `multi_gpu` and devices, which are checked below. One that a later mergekit
# brings is refused until it has been looked at.
SUPPORTED_OPTIONS = frozenset(
    {
        "allow_crimes",
        "unsafe_truncate_embeddings",
        "transformers_cache",
        "lora_merge_cache",
        "lora_merge_dtype",
        "cuda",
        "device",
        "low_cpu_memory",
        "out_shard_size",
        "copy_tokenizer",
        "clone_tensors",
        "trust_remote_code",
        "random_seed",
        "lazy_unpickle",
        "write_model_card",
        "safe_serialization",
        "verbosity",
        "quiet",
        "read_to_gpu",
        "multi_gpu",
        "num_threads",
        "gpu_rich",
        "async_write",
        "write_threads",
    }
)


@click.command("run", cls=PrettyPrintHelp, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config_file", metavar="CONFIG")
@click.argument("out_path", metavar="OUT")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads of this machine that merge tensors (all cores by default; 1: as mergekit-yaml), "
    "or processes with --ray.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Worker processes on a running Ray cluster (HOST:PORT, or auto), with OUT and inputs on "
    "storage that all nodes share; or on one that is started on this machine (local).",
)
@click.option("--gpus", is_flag=True, help="A GPU for each worker.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with what an earlier run left unfinished in OUT, if anything.",
)
@click.option(
    "--force", is_flag=True, help="Replace the model, or drop the unfinished merge, in OUT."
)
@click.option(
    "--intermediate-dir",
    "-I",
    metavar="DIR",
    help="Keep the models of stages in DIR/NAME, for CONFIG of several stages. Without it they are "
    "removed when all is merged.",
)
@click.option(
    "--seed-per-tensor",
    is_flag=True,
    help="For methods that draw random numbers: from --random-seed and the name "
    "of the tensor, so with any number of workers the same, but not mergekit-yaml's.",
)
@click.option(
    "--hash-inputs",
    is_flag=True,
    help="Know the models' files by their content, not by size and time of change: for --resume, "
    "and to notice files that were replaced meanwhile. Reads each file once more at both ends.",
)
@click.option(
    "--allow-incomplete",
    is_flag=True,
    help="Merge although mergekit passes by matrices of the models, which the merged model will "
    "not have. Without it such a merge is refused.",
)
@add_merge_options
def run(
    config_file: str,
    out_path: str,
    workers: int | None,
    address: str | None,
    gpus: bool,
    resume: bool,
    force: bool,
    intermediate_dir: str | None,
    seed_per_tensor: bool,
    hash_inputs: bool,
    allow_incomplete: bool,
    merge_options: MergeOptions,
) -> None:
    """Merge CONFIG into OUT as mergekit-yaml does, tensor for tensor the same, on all cores.

    Threads of this process merge a tensor each, or with --ray the processes of a cluster. A merge
    that was cut off goes on with --resume. The result is, bit for bit, that of mergekit-yaml with
    one thread (with --ray: with -j threads, 1 by default).

    One worker (--workers 1, or where workers cannot share: --device, -j) is mergekit-yaml in this
    process, but that OUT gets the model when it is complete, and keeps a finished one; to be
    resumed it needs --resume from the start.

    CONFIG may be of several stages, as for mergekit-multi: OUT gets the model of the one without a
    `name`. --resume goes on with the stage that was cut off.
    """
    with _errors(out_path, merge_options.verbosity > 0):
        source, documents = _read_documents(config_file)
        several = len(documents) != 1
        if intermediate_dir is not None and not several:
            raise ValueError("--intermediate-dir is for files of several stages (--- between them)")
        begun = WorkFolder(out_path).threads() if resume else None
        if workers is None and address is None and not gpus:
            workers = _default_workers(merge_options, seed_per_tensor, begun)
        in_process = workers == 1 and address is None and not (gpus or seed_per_tensor)
        options = merge_options
        if resume or not in_process:
            on_ray = address is not None
            options = _check_options(options, workers, on_ray, gpus, seed_per_tensor)
        job = _job(options, workers, address, gpus, seed_per_tensor, begun)
        job = replace(job, hash_inputs=hash_inputs, allow_incomplete=allow_incomplete)
        if several:
            job = replace(job, alone=in_process)
            recipe = stages.read(config_file, source, documents, Path(out_path), intermediate_dir)
            if resume and _finished(out_path, recipe.written):
                return
            records = _merge_stages(config_file, recipe, job, resume=resume, force=force)
        else:
            job = replace(job, alone=in_process and not resume)
            config = _validated(config_file, documents[0])
            if resume and _finished(out_path, source):
                return
            request = job.request(config, source, Path(out_path))
            records = _merge_single(config_file, request, job, resume=resume, force=force)
    if records and not merge_options.quiet:
        _print_summary(out_path, records, merge_options.verbosity > 0, workers or 1)


def _finished(out_path: str, source: str) -> bool:
    """Return whether there is nothing to resume, and say so."""
    if finished := is_finished(out_path, source):
        click.echo(f"{out_path}: the model is finished, nothing to do", err=True)
    return finished


def _default_workers(options: MergeOptions, seed_per_tensor: bool, begun: int | None) -> int | None:
    """Return 1 where threads of this process cannot share the work, else None: all cores.

    ``begun``: how many threads each worker had of the merge that is resumed.
    """
    alone = options.device != "cpu" or options.multi_gpu or (options.num_threads or 1) > 1
    return 1 if alone or seed_per_tensor or (begun or 1) > 1 else None


@dataclass(frozen=True)
class _Job:
    """How the user wants to merge, whatever it is.

    Attributes:
        alone: by mergekit itself, in this process; but for what has been begun otherwise.
        options, engine, threads, seed, hash_inputs: see :class:`Request`.
        allow_incomplete: merge although matrices will be missing.
    """

    options: MergeOptions
    engine: Callable[[], Engine]
    threads: int | None
    seed: int | None
    alone: bool = False
    hash_inputs: bool = False
    allow_incomplete: bool = False

    def request(
        self, config: MergeConfiguration, source: str, out: Path, part: Part | None = None
    ) -> Request:
        """Return the request for one merge."""
        return Request(
            config,
            source,
            out,
            self.options,
            self.threads,
            self.seed,
            self.hash_inputs,
            self.engine,
            part,
        )

    @contextmanager
    def explained(self, config: MergeConfiguration, in_process: bool) -> Iterator[Strict]:
        """Refuse incomplete merges, and say more of errors, while the block merges."""
        config = config.model_copy(deep=True)  # mergekit rewrites it
        with (
            names_compared(config),
            hub.explained(any_of(config)),
            strictly(allow_incomplete=self.allow_incomplete, in_process=in_process) as strict,
        ):
            yield strict

    def merge_stage(self, request: Request, work: WorkFolder) -> list[Done]:
        """Merge a stage into its folder, which is claimed."""
        prepare_models([r for r in request.config.referenced_models() if r.lora], self.options)
        alone = self.alone and not work.begun
        with self.explained(request.config, alone) as strict:
            if not alone:
                return merge_claimed(request, work, strict)
            merge_alone(replace(request, threads=self.options.num_threads), work)
            return []


def _job(
    options: MergeOptions,
    workers: int | None,
    address: str | None,
    gpus: bool,
    seed_per_tensor: bool,
    begun: int | None,
) -> _Job:
    """Return how to merge with these options of the command.

    Raises:
        ImportError: without Ray, if it is asked for.
    """
    options.model_copy(update={"num_threads": None}).apply_global_options()
    seed = (options.random_seed or 0) if seed_per_tensor else None
    if address is not None:
        import_ray()  # before anything is read
        threads = options.num_threads or 1
        return _Job(options, partial(OnRay, address, workers, threads, gpus), threads, seed)
    # A merge that several threads have begun has one thread for each tensor, also for one worker.
    by_threads = begun == 1 and options.num_threads is None and torch.get_num_threads() > 1
    if workers != 1 or by_threads:
        return _Job(options, partial(InThreads, workers or cores()), 1, seed)
    return _Job(options, InProcess, options.num_threads, seed)


def _merge_single(
    path: str, request: Request, job: _Job, *, resume: bool, force: bool
) -> list[Done]:
    models = request.config.referenced_models()
    check_places(str(request.out), models)
    prepare_models(models, job.options)
    with job.explained(request.config, job.alone) as strict:
        if not job.alone:
            return merge(request, resume=resume, force=force, strict=strict)
        with WorkFolder(request.out).claimed(resume=False, force=force) as work:
            merge_alone(request, work, partial(_mergekit_yaml, path))
            return []


def _mergekit_yaml(path: str, request: Request, out: str) -> None:
    """Merge by mergekit-yaml's own function."""
    callback: Any = run_yaml.main.callback
    callback(config_file=path, out_path=out, **request.options.model_dump())


def _merge_stages(
    path: str, recipe: stages.Recipe, job: _Job, *, resume: bool, force: bool
) -> list[Done]:
    """Merge a file of several stages."""
    recipe.check_names(path)
    models = {model for stage in recipe.stages for model in stage.foreign}
    for stage in recipe.stages:
        check_no_input(str(recipe.folder(stage)), models)
    check_places(str(recipe.out), models)
    prepare_models(models, job.options)
    if job.alone and job.options.num_threads is not None:
        torch.set_num_threads(job.options.num_threads)
    with started_once(job.engine) as engine:
        shared = replace(job, engine=engine)

        def request_of(stage: stages.Stage) -> Request:
            source = yaml.safe_dump(stage.document, sort_keys=False)
            return shared.request(stage.config, source, recipe.folder(stage), recipe.part(stage))

        quiet = job.options.quiet
        return stages.merge_all(
            recipe,
            request_of,
            shared.merge_stage,
            lambda text: None if quiet else click.echo(text, err=True),
            resume=resume,
            force=force,
        )


# -- what is read ----------------------------------------------------------------------------------


def _read_documents(path: str) -> tuple[str, list[Any]]:
    """Return the text of a configuration, and its documents.

    Raises:
        ValueError: it cannot be read, or is not YAML.
    """
    try:
        source = read_text(path, MOST_BYTES)
        return source, parse_documents(source, PlainLoader)
    except UnreadableError as error:
        raise ValueError(f"{path}: {error}") from error


def _validated(path: str, document: Any) -> MergeConfiguration:
    """Return the configuration in the only document of a file.

    Raises:
        ValueError: mergekit does not accept it.
    """
    try:
        return MergeConfiguration.model_validate(document)
    except ValidationError as error:
        lines = [f"{path}: {place}: {text}" for place, text in refusals(error).items()]
        raise ValueError("\n".join(lines)) from error


def _check_options(
    options: MergeOptions, workers: int | None, on_ray: bool, gpus: bool, seed_per_tensor: bool
) -> MergeOptions:
    """Return mergekit's options for the workers.

    Raises:
        ValueError: an option could only be ignored.
    """
    for name, info in MergeOptions.model_fields.items():
        if name not in SUPPORTED_OPTIONS and getattr(options, name) != info.default:
            raise ValueError(
                f"--{name.replace('_', '-')} is newer than this mergekit-monosoup, which would "
                "lose it: take mergekit-yaml"
            )
    if options.multi_gpu:
        raise ValueError(
            "--multi-gpu (and --gpu-rich) are a thread for each GPU in one process: take "
            "--ray local --workers N --gpus instead, with --read-to-gpu and --low-cpu-memory as "
            "you like"
        )
    if gpus:
        if not on_ray:
            raise ValueError(NEEDS_RAY)
        if options.device not in ("cpu", "cuda"):
            raise ValueError(
                "--gpus gives each worker one GPU, which it calls cuda: leave out --device "
                f"{options.device}"
            )
        return options.model_copy(update={"device": "cuda", "cuda": True})
    several = on_ray or workers != 1
    if several and options.device != "cpu":
        raise ValueError(
            f"several workers cannot share one device ({options.device}): add --ray local --gpus, "
            "which gives each its own"
        )
    if several and not on_ray:
        if (options.num_threads or 1) > 1:
            raise ValueError(
                f"each of several workers of one process computes with one thread: leave out -j "
                f"{options.num_threads}, or add --ray local, whose workers are processes"
            )
        if seed_per_tensor:
            raise ValueError(
                "--seed-per-tensor: threads of one process share its random numbers, so it takes "
                "one worker, or processes: leave out --workers, or add --ray local"
            )
    return options


# -- what is printed -------------------------------------------------------------------------------


@contextmanager
def _errors(out_path: str, verbose: bool) -> Iterator[None]:
    """Show failures as one line and what to do next; with -v the traceback too."""
    try:
        yield
    except KeyboardInterrupt:
        hint = _resume_hint(out_path) or NOTHING_KEPT
        click.echo(f"Interrupted. {hint}", err=True)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        if verbose:
            details = error.details if isinstance(error, MergeError) else traceback.format_exc()
            click.echo(details, err=True)
        # The text of these two means little without their name.
        named = isinstance(error, KeyError | SafetensorError)
        message = f"{type(error).__name__}: {error}" if named else str(error)
        full = any(words in message for words in FULL)
        hint = _resume_hint(out_path) if full or isinstance(error, RuntimeError) else ""
        if full and not hint:
            hint = f"Nothing of this merge is left in {out_path}; what was there before still is."
        raise click.ClickException(f"{message}\n{hint}".rstrip()) from error


def _resume_hint(out_path: str) -> str:
    """Return how to go on with the unfinished merge in OUT; empty if there is none."""
    work = WorkFolder(out_path)
    if not work.resumable:
        return ""
    kept = [f"{work.finished_stages} finished stage(s)"] if work.finished_stages else []
    records = [record for stage in (work, *work.stages()) for record in stage.records()]
    if records or not kept:
        size = size_in_words(sum(record.bytes for record in records))
        kept.append(f"{len(records)} finished batch(es), {size},")
    # The arguments of `mergekit-monosoup run`, which hands them on.
    arguments = click.get_current_context().obj or []
    return (
        f"{' and '.join(kept)} are kept in {out_path}. To go on:\n  {command_to_resume(arguments)}"
    )


def _print_summary(out_path: str, records: Sequence[Done], verbose: bool, workers: int) -> None:
    """Print size and files of the model, and with ``verbose`` what each worker did."""
    by_worker: dict[str, list[Done]] = defaultdict(list)
    for record in records:
        by_worker[record.worker].append(record)
    if verbose:
        for worker, batches in sorted(by_worker.items()):
            click.echo(
                f"{worker}: {len(batches)} batches, {sum(b.tensors for b in batches)} tensors, "
                f"{sum(b.seconds for b in batches):.1f} s, "
                f"peak {max(b.peak for b in batches) / 1e9:.2f} GB",
                err=True,
            )
    size = sum(record.bytes for record in records)
    shards = sum(len(record.shards) for record in records)
    click.echo(
        f"{out_path}: {size / 1e9:.2f} GB in {shards} file(s), by {len(by_worker)} worker(s)"
        f"{_fewer(len(by_worker), workers, len(records))}",
        err=True,
    )


def _fewer(used: int, workers: int, batches: int) -> str:
    """Return why fewer workers took part than were asked for; empty if all did."""
    if used >= workers:
        return ""
    if batches >= workers:
        return (
            f", of {workers}: the others had not started yet when all was done, or there was no "
            "memory for them"
        )
    return (
        f", of {workers}: the model was divided into {batches} part(s) only, of about "
        f"{SMALLEST_BATCH / 1e6:.0f} MB or less (--out-shard-size makes smaller ones)"
    )
