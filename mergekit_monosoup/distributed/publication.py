"""How a complete merge becomes a model: which file goes where, written down, and then renamed.

The list is read back after a crash, from a folder that anybody may have written to. So every name
is looked at twice: when it is written down and before it is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from pydantic import TypeAdapter, ValidationError

from mergekit_monosoup.files import sync_folder

# As mergekit and transformers name them; model-1.safetensors is what mergekit-yaml leaves when it
# is interrupted.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?$")
# Beside the model of a stage of a merge: what it was made from.
RECORD = "mergekit-monosoup.json"
# What else belongs to a model: left beside another one, it would be loaded with that.
SIDE_FILES = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|generation_config"
    r"|(pre)?processor_config|chat_template)\.json$"
    r"|mergekit-monosoup\.json$|mergekit_config\.yml$|(merges|vocab)\.txt$"
    r"|(tokenizer|spiece|sentencepiece.*)\.model$|chat_template\.jinja$"
)


class FolderError(ValueError):
    """The output folder cannot be used for this merge; the message says why and what to do."""


@dataclass(frozen=True)
class Publication:
    """What publishing does, in this order.

    Attributes:
        remove: names of files of an old model in OUT.
        move: name in OUT → file in the work folder; config.json is the last.
    """

    remove: list[str]
    move: dict[str, str]


def compose(out: Path, shards: dict[str, str], files: dict[str, str]) -> Publication:
    """Return what publishing has to do.

    ``shards``, ``files``: name in OUT → file in the work folder; ``files`` has the config.json.
    """
    move = shards | files
    move["config.json"] = move.pop("config.json")  # last: without it no program sees a model
    entries = os.listdir(out)
    # A tokenizer without a model is no old model's: somebody put it there.
    model = any(name == "config.json" or WEIGHTS.match(name) for name in entries)
    remove = [
        name
        for name in entries
        if name not in move and (WEIGHTS.match(name) or (model and SIDE_FILES.match(name)))
    ]
    return Publication(remove, move)


def read(path: Path) -> Publication:
    """Return what was written down.

    Raises:
        FolderError: it was not, or not by this program.
    """
    try:
        publication = TypeAdapter(Publication).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise FolderError(f"{path}: damaged; start over with --force") from error
    if "config.json" not in publication.move:
        raise FolderError(f"{path}: damaged, for it names no config.json; start over with --force")
    return publication


def check(publication: Publication, out: Path, work: Path) -> None:
    """Check that nothing outside of ``out`` and ``work`` would be touched, by any name or link.

    Raises:
        FolderError: something would.
    """
    for name in publication.remove:
        if "/" in name or not (WEIGHTS.match(name) or SIDE_FILES.match(name)):
            raise _foreign(work, name)
    for name, source in publication.move.items():
        if PurePosixPath(name).parts[:1] == (work.name,):
            raise _foreign(work, name)
        if PurePosixPath(source).parts[:1] not in (("done",), ("files",)):
            raise _foreign(work, source)
        for folder, relative in ((out, name), (work, source)):
            if not _leads_inside(folder, relative):
                raise _foreign(work, relative)
        if (work / source).exists() and not stat.S_ISREG(os.lstat(work / source).st_mode):
            raise _foreign(work, source)


def _foreign(work: Path, name: str) -> FolderError:
    return FolderError(
        f"{work} would touch {name!r}, which is no file of this merge: somebody else has written "
        "to that folder. Remove it and merge again"
    )


def _leads_inside(folder: Path, name: str) -> bool:
    """Return whether a relative name stays in a folder, also through symbolic links."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "\\" in name or "\0" in name or PureWindowsPath(name).anchor:
        return False
    above = os.path.realpath((folder / name).parent)
    return os.path.commonpath([above, os.path.realpath(folder)]) == os.path.realpath(folder)


def execute(publication: Publication, out: Path, work: Path) -> None:
    """Rename everything into place; may be repeated after a crash in the middle.

    Raises:
        FolderError: a name leads elsewhere, or a file that should be renamed is gone.
    """
    check(publication, out, work)
    # An old model in the folder stops being one before the first new file comes.
    old = ["config.json"] if (work / publication.move["config.json"]).exists() else []
    for name in [*old, *publication.remove]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(out / name)
    for name, source in publication.move.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (work / source).exists():
            os.replace(work / source, target)
        elif not target.exists():
            raise FolderError(f"{target} is gone, and {work / source} too; start over with --force")
    sync_folder(out)
