"""The folder of an adapter: written aside, and renamed when it is whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_monosoup.checkpoints.lora_config import CONFIG
from mergekit_monosoup.files import LONGEST_STEM, missing, remove_empty, sync_folder


def check(out: Path, force: bool) -> None:
    """Check that an adapter may be written to a folder.

    Raises:
        ValueError: something is there, and ``force`` is not given, or it is no adapter.
    """
    if not os.path.lexists(out) or (out.is_dir() and not os.listdir(out)):
        return
    if not (out.is_dir() and (out / CONFIG).is_file()) or out.is_symlink():
        raise ValueError(f"{out} exists and is no adapter: it is not replaced; name another folder")
    if not force:
        raise ValueError(f"{out} exists; --force replaces it")


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield a folder beside ``out`` to be filled, which takes its name at the end.

    A failure leaves no trace, and what was there before as it was.

    Raises:
        ValueError: see :func:`check`.
        OSError: the folder cannot be written.
    """
    check(out, force)
    out = out.absolute()
    made = missing(out.parent)
    stem = f".{out.name[:LONGEST_STEM]}.{uuid.uuid4().hex[:8]}"
    aside, old = out.with_name(stem), out.with_name(f"{stem}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
        yield aside
        check(out, force)  # somebody else may have been faster
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(aside, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        remove_empty(made)
        raise
    shutil.rmtree(old, ignore_errors=True)
