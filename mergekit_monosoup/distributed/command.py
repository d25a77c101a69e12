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
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit.scripts import run_yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from mergekit_monosoup.check.keys import refusals
from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text
from mergekit_monosoup.checkpoints.yaml import MOST_BYTES, PlainLoader, parse_documents
from mergekit_monosoup.distributed.dependencies import (
    asked,
    local_input_files,
    states,
)
from mergekit_monosoup.distributed.driver import MergeError, Request, check_inputs, merge
from mergekit_monosoup.distributed.engines import (
    Engine,
    InProcess,
    OnRay,
    cores,
    import_ray,
)
from mergekit_monosoup.distributed.folder import Done, WorkFolder
from mergekit_monosoup.distributed.plan import SMALLEST_BATCH
from mergekit_monosoup.distributed.preconditions import (
    any_of,
    check_places,
    names_compared,
    prepare_models,
)
from mergekit_monosoup.distributed.threads import InThreads
from mergekit_monosoup.planner import strictly

# Of disks, quotas and limits that are reached; libraries in Rust use the same words.
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
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
    """
    if workers is None and address is None and not gpus:
        workers = _default_workers(merge_options, seed_per_tensor)
    if workers == 1 and address is None and not (gpus or resume or seed_per_tensor):
        with strictly(allow_incomplete=allow_incomplete, in_process=True):
            _run_mergekit_yaml(
                config_file, out_path, merge_options, force=force, hash_inputs=hash_inputs
            )
        return
    with _errors(out_path, merge_options.verbosity > 0):
        on_ray = address is not None
        options = _check_options(merge_options, workers, on_ray, gpus, seed_per_tensor)
        options.model_copy(update={"num_threads": None}).apply_global_options()
        engine: Callable[[], Engine] = InProcess
        threads = options.num_threads
        if address is not None:
            import_ray()  # before anything is read
            threads = threads or 1
            engine = partial(OnRay, address, workers, threads, gpus)
        elif workers != 1:
            threads = 1
            engine = partial(InThreads, workers or cores())
        config, source = _read_configuration(config_file)
        check_places(out_path, config)
        prepare_models(config, options)
        seed = (options.random_seed or 0) if seed_per_tensor else None
        out = Path(out_path)
        request = Request(config, source, out, options, threads, seed, hash_inputs, engine)
        original = request.config.model_copy(deep=True)
        with (
            names_compared(original),
            hub.explained(any_of(original)),
            strictly(allow_incomplete=allow_incomplete, in_process=False) as strict,
        ):
            records = merge(request, resume=resume, force=force, strict=strict)
    if not options.quiet:
        _print_summary(out_path, records, options.verbosity > 0, workers or 1)


def _default_workers(options: MergeOptions, seed_per_tensor: bool) -> int | None:
    """Return 1 where threads of this process cannot share the work, else None: all cores."""
    alone = options.device != "cpu" or options.multi_gpu or (options.num_threads or 1) > 1
    return 1 if alone or seed_per_tensor else None


def _run_mergekit_yaml(
    config_file: str,
    out_path: str,
    options: MergeOptions,
    *,
    force: bool,
    hash_inputs: bool,
) -> None:
    """Merge by mergekit-yaml's own function, and put the model into OUT when it is complete."""
    work = WorkFolder(out_path)
    callback: Any = run_yaml.main.callback
    mergekit_yaml = partial(callback, config_file=config_file, **options.model_dump())
    with _errors(out_path, options.verbosity > 0):
        config, source = _read_configuration(config_file)
        check_places(out_path, config)
        prepare_models(config, options)
        with (
            names_compared(config),
            hub.explained(any_of(config)),
            work.claimed(resume=False, force=force),
        ):
            inputs = states(local_input_files(config), hashed=hash_inputs)
            threads = options.num_threads or torch.get_num_threads()
            needs = asked(source, options, threads=threads, seed=None, hash_inputs=hash_inputs)
            # Only for the case that it is killed while it renames, and resumed.
            work.record({**needs, "inputs": inputs})
            mergekit_yaml(out_path=str(work.files))
            check_inputs(work.out, inputs, hashed=hash_inputs)
            work.prepare({})
            work.publish()
            work.remove()


# -- what is read ----------------------------------------------------------------------------------


def _read_configuration(path: str) -> tuple[MergeConfiguration, str]:
    """Return the configuration, and its text.

    Raises:
        ValueError: it cannot be read, is not YAML, holds several stages, or mergekit does not
            accept it.
    """
    try:
        source = read_text(path, MOST_BYTES)
        return MergeConfiguration.model_validate(_parse_stage(path, source)), source
    except UnreadableError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValidationError as error:
        lines = [f"{path}: {place}: {text}" for place, text in refusals(error).items()]
        raise ValueError("\n".join(lines)) from error


def _parse_stage(path: str, source: str) -> Any:
    """Return the only document of a YAML file.

    Raises:
        UnreadableError: it is not YAML.
        ValueError: it holds several stages.
    """
    documents = parse_documents(source, PlainLoader)
    if len(documents) != 1:
        raise ValueError(
            f"{path}: holds {len(documents)} stages; mergekit-multi merges those one after the "
            "other, `run` takes one of them"
        )
    return documents[0]


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
        hint = _resume_hint(out_path) or "No batch was finished."
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
    if not work.begun:
        return ""
    count = len(list(work.done.glob("*.json")))
    return (
        f"{count} finished batch(es) kept in {out_path}: the same command with --resume (and "
        "without --force) goes on."
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
        f", of {workers}: the model was divided into {batches} part(s) only, for one is at least "
        f"{SMALLEST_BATCH / 1e6:.0f} MB (--out-shard-size makes smaller ones)"
    )
