"""A merge by mergekit itself, in this process, whose model is put into OUT when it is whole."""

from __future__ import annotations

from collections.abc import Callable

import mergekit.merge

from mergekit_monosoup.distributed.dependencies import local_input_files, states, versions
from mergekit_monosoup.distributed.driver import Request, check_inputs
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.ending import held


def run_merge(request: Request, out: str) -> None:
    """Merge as mergekit-multi does a stage."""
    mergekit.merge.run_merge(request.config, out, request.options, config_source=request.card)


def merge_alone(
    request: Request, work: WorkFolder, write: Callable[[Request, str], None] = run_merge
) -> None:
    """Have mergekit merge into the work folder, which is claimed, and put the model into OUT.

    ``write`` merges into the folder that it is given.

    Raises:
        FolderError: inputs were changed meanwhile.
        ValueError, RuntimeError, ...: what mergekit raises for this configuration.
    """
    inputs = states(local_input_files(request.config), hashed=request.hash_inputs)
    # For the case that it is killed while it renames, and resumed; and for finished stages.
    work.record({**request.asked(), "inputs": inputs, "versions": versions()})
    with held(str(request.out)):  # what was merged, until it is where it belongs
        write(request, str(work.files))
        check_inputs(work.out, inputs, hashed=request.hash_inputs)
        if request.part:
            request.part.finish(work, {}, hashed=request.hash_inputs)
        work.prepare({})
        work.publish()
        work.remove()
