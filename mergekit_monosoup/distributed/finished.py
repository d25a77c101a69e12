"""Whether `--resume` finds nothing to do, and the command that goes on after an interruption."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text
from mergekit_monosoup.checkpoints.yaml import MOST_BYTES
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.publication import FolderError

WRITTEN = "mergekit_config.yml"  # mergekit writes the configuration of a merge there


def is_finished(out: str | Path, source: str) -> bool:
    """Return whether OUT holds the whole model of a configuration, and nothing of another merge.

    ``source``: the text of the configuration. A model without a copy of its configuration, as
    mergekit writes it with `--no-write-model-card`, is taken for the one that is meant.

    Raises:
        FolderError: it is the model of another configuration.
    """
    work = WorkFolder(out)
    if work.resumable or not (work.out / "config.json").exists():
        return False
    try:
        written = read_text(work.out / WRITTEN, MOST_BYTES)
    except UnreadableError:
        return True
    if written.strip() != source.replace("\r\n", "\n").strip():
        raise FolderError(
            f"{out} holds a finished model of another configuration ({WRITTEN} in it), so there is "
            "nothing to resume; --force replaces it"
        )
    return True


def command_to_resume(arguments: Sequence[str]) -> str:
    """Return the command that goes on with a merge that was begun with these arguments of `run`."""
    rest = [word for word in arguments if word not in ("--force", "--resume")]
    return shlex.join(["mergekit-monosoup", "run", *rest, "--resume"])
