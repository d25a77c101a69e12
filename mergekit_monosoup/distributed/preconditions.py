"""What is looked at before a merge: its models and where it writes, while nothing is lost yet."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoints import adapters, foreign, hub, quantisation
from mergekit_monosoup.checkpoints.beside import Beside
from mergekit_monosoup.checkpoints.headers import Headers, LackingError
from mergekit_monosoup.checkpoints.paths import check_model_path, is_single_file
from mergekit_monosoup.checkpoints.renaming import renaming
from mergekit_monosoup.checkpoints.storage import Options
from mergekit_monosoup.checkpoints.texts import check_new_folder
from mergekit_monosoup.distributed.progress import size_in_words
from mergekit_monosoup.planner import PlanningError

LOG = logging.getLogger("mergekit_monosoup")


def check_places(out_path: str, references: Collection[ModelReference]) -> None:
    """Check the folders of the models that are merged.

    Raises:
        ValueError: OUT is one of them, which the merge would replace; or one is a single file, no
            model, damaged or quantised.
    """
    check_new_folder(out_path)
    for reference in references:
        for part in (reference.model, reference.lora):
            if part is not None and is_single_file(part.path):
                way_out = (
                    "is a single file, and `run` merges folders of models: merge files with "
                    "`mergekit-pytorch CONFIG OUT`"
                )
                raise ValueError(f"{part.path} {foreign.of_file(part.path) or way_out}")
    check_no_input(out_path, references)
    headers = Headers()
    for reference in references:
        if os.path.isdir(reference.model.path):
            tensors = headers.of_model(reference.model.path)
            method = quantisation.method(Beside(reference.model.path))
            if fault := quantisation.fault(tensors, method):
                raise ValueError(f"{reference.model.path} {fault}")
        if lora := reference.lora:
            file = os.path.join(lora.path, hub.ADAPTER[0])
            if os.path.isfile(file):
                headers.of_file(file)


def check_no_input(out_path: str, references: Iterable[ModelReference]) -> None:
    """Raise ValueError if the output folder is one of the models, which would be replaced."""
    for reference in references:
        for part in (reference.model, reference.lora):
            if part is not None and os.path.realpath(part.path) == os.path.realpath(out_path):
                raise ValueError(
                    f"{out_path} is an input of this merge, which would replace it: name another "
                    "folder"
                )


def warn_of_little_room(out: Path, needed: int) -> None:
    """Warn if ``needed`` bytes are more than the disk has free.

    Not an error: quotas and file systems that compress count in other ways, and room can be made
    while the merge runs.
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        LOG.warning(
            "%s: weights of %s are still to be written, and the disk has %s free. A merge that "
            "fills it stops and keeps what is finished; --resume goes on when there is room",
            out,
            size_in_words(needed),
            size_in_words(free),
        )


def any_of(config: MergeConfiguration) -> str:
    """Return the subject of an error that may be any model's."""
    return f"one of {', '.join(sorted(map(str, config.referenced_models())))}"


@contextmanager
def names_compared(config: MergeConfiguration) -> Iterator[None]:
    """Say that a wrapper changed the names of a model, where tensors are said to be missing.

    Not looked for before a merge: mergekit knows both names of some tensors, as GPT-2's.

    Raises:
        ValueError: in place of the error that a tensor is missing.
    """
    try:
        yield
    except (LackingError, PlanningError, RuntimeError) as error:
        missing = isinstance(error, LackingError | PlanningError) or (
            "required but not present" in str(error)
        )
        if missing and (found := _renamed(config)):
            raise ValueError(found) from error
        raise


def _renamed(config: MergeConfiguration) -> str:
    """Return which model has the names of another with a prefix, or without; empty if none has."""
    base_first = sorted(config.referenced_models(), key=lambda r: (r != config.base_model, str(r)))
    names = {
        str(reference): Headers().of_model(reference.model.path)
        for reference in base_first
        if os.path.isdir(reference.model.path)
    }
    first, *others = names.items() or [("", {})]
    for name, tensors in others:
        if how := renaming(first[1], tensors):
            return f"{name}: {how.described(first[0])}"
    return ""


def prepare_models(references: Iterable[ModelReference], options: MergeOptions) -> None:
    """Ask for models of the hub, and merge adapters into the cache, where mergekit finds them.

    Raises:
        ValueError: one of them cannot be had.
    """
    storage = Options(options.lora_merge_cache, options.trust_remote_code, options.lora_merge_dtype)
    for reference in sorted(references, key=str):
        try:
            if reference.lora:
                adapters.merged(reference, storage)
            elif not os.path.exists(path := reference.model.path):
                check_model_path(path)
                hub.check_mergeable(path, reference.model.revision, options.transformers_cache)
        except (ValueError, OSError) as error:
            raise ValueError(f"{reference}: {error}") from error
