"""Where a model may be: a folder, a file, or the name of a repository on the hub."""

from __future__ import annotations

import os

# Of a model that is a single file.
MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class NotThereError(ValueError):
    """A path that cannot be a model."""


def check_model_path(path: str) -> None:
    """Check that a model may be at ``path``: it exists, or may be the name of a hub repository.

    Raises:
        NotThereError: otherwise. Without it the hub client reports a misspelt folder as a
            repository that needs a login.
    """
    local = (
        path.startswith((".", "/", "~"))
        or path.count("/") != 1
        or path.lower().endswith(MODEL_SUFFIXES)
    )
    if local and not os.path.exists(path):
        raise NotThereError(
            "no such file or folder (and not the name of a hub repository, ORGANISATION/MODEL)"
        )


def is_single_file(path: str) -> bool:
    """Whether a model is, or is meant to be, one file: what mergekit-pytorch merges."""
    named = path.lower().endswith(MODEL_SUFFIXES) and not os.path.isdir(path)
    return named or os.path.isfile(path)
