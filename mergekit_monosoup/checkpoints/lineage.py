"""What a model's files say it was made of, and whether base and fine-tune look swapped.

No number tells: the difference of two models has the same spectrum in both directions, and its
length against theirs depends on weight decay (dev/log.md). The files beside the weights may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from mergekit_monosoup.checkpoints.beside import Beside, printable
from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text
from mergekit_monosoup.checkpoints.yaml import PlainLoader, parse_documents

_LARGEST_CARD = 2**20  # bytes; cards of the largest models have 60 kB
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)

Model = tuple[str, str]  # name, as the configuration has it, and folder


def parent(folder: str) -> tuple[str, str]:
    """Return what a model was made of, by its own files, and which file says so; empty if none.

    Of a model card the entry `base_model`, if it is one name; of config.json the folder or hub name
    that it was loaded from before training.
    """
    made_of = _front_matter(folder).get("base_model")
    if isinstance(made_of, list) and len(made_of) == 1:
        (made_of,) = made_of
    if isinstance(made_of, str):
        return made_of.strip(), "README.md"
    loaded = Beside(folder).config.get("_name_or_path")
    return (loaded, "config.json") if isinstance(loaded, str) else ("", "")


def _front_matter(folder: str) -> dict[str, Any]:
    """Return what a model card says to programs; {} where there is no card, or a damaged one."""
    with suppress(UnreadableError):
        front = _FRONT.match(read_text(Path(folder) / "README.md", _LARGEST_CARD))
        if front is not None:
            (content,) = parse_documents(front[1], PlainLoader) or [None]
            if isinstance(content, dict):
                return content
    return {}


def looks_swapped(base: Model, tuned: Model) -> Iterator[str]:
    """Yield a warning if the base model's files say that it was made of the fine-tune."""
    made_of, file = parent(base[1])
    if not made_of or not _same(made_of, tuned[0]) or _last(made_of) == _last(base[0]):
        return  # the last: a copy, or a mirror, of what it was made of
    if _same(parent(tuned[1])[0], base[0]):
        return  # each says that it was made of the other
    yield (
        f"base_model {printable(base[0])} and {printable(tuned[0])} look swapped: {file} of the "
        f"first says that it was made of {printable(made_of)}. base_model must be what the "
        "fine-tuning started from"
    )


def _same(name: str, other: str) -> bool:
    """Whether two names may be of one model: equal, or alike in their last part if one is a path.

    `Qwen/Qwen3-0.6B` may lie in a folder `models/Qwen3-0.6B`.
    """
    if name.rstrip("/") == other.rstrip("/"):
        return True
    both_of_hub = all(re.fullmatch(r"[\w-]+/[\w.-]+", each) for each in (name, other))
    return not both_of_hub and _last(name) == _last(other) != ""


def _last(name: str) -> str:
    return PurePath(name).name.lower()
