"""Checkpoints that say what they were made with, so that a finished one is not trained again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.json"


def write(checkpoint: Path, save: Callable[[Path], object], recipe: Any, mark: str) -> None:
    """Let `save` write a checkpoint under another name, add its recipe, and rename it last.

    An interrupted run must not leave something that looks finished.
    """
    unfinished = checkpoint.with_name(f"{checkpoint.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save(unfinished)
    written = {"fingerprint": mark, "recipe": recipe}
    (unfinished / RECIPE_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    unfinished.rename(checkpoint)


def is_finished(checkpoint: Path, mark: str) -> bool:
    """Return whether the checkpoint was made with what the mark stands for."""
    try:
        written = json.loads((checkpoint / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.get("fingerprint") == mark
