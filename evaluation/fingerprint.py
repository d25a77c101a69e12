"""Digests of what a result depends on: model files, this repository, library versions."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # the first kind that a folder has is what gets loaded
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
# fmt: off
PACKAGES = (
    "lm-eval", "transformers", "torch", "tokenizers", "datasets", "numpy", "mergekit",
    "mergekit-monosoup",
)
# fmt: on
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class ModelDigests:
    """What identifies a checkpoint: digests of its weights, its configuration and its tokenizer."""

    weights: str
    config: str
    tokenizer: str


def digest(value: Any) -> str:
    """Return the digest of anything that JSON can hold."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def of_file(path: Path) -> str:
    """Return the digest of a file's content."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _chunked(file)
        )


def _chunked(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    state = hashlib.sha256()
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()


def of_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return a digest of the names and contents of the files in `folder` that match.

    Contents are read in full: equal headers and sizes are what two merges have in common.
    """
    names = sorted(
        {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    )
    return digest({name: of_file(folder / name) for name in names})


def of_tree(folder: Path, pattern: str) -> str:
    """Return a digest of the files that match at any depth: their relative paths and contents."""
    return digest(
        {path.relative_to(folder).as_posix(): of_file(path) for path in folder.rglob(pattern)}
    )


def of_model(folder: Path) -> ModelDigests:
    """Return the digests of a checkpoint: a folder, or a file of weights and what lies beside it.

    generation_config.json is left out on purpose: no run uses it, see `engines.language.Model`.

    Raises:
        FileNotFoundError: the folder has no config.json or no weights.
    """
    if folder.is_file():
        beside = of_files(folder.parent, ("config.json",))
        return ModelDigests(weights=of_weights(folder), config=beside, tokenizer="")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    return ModelDigests(
        weights=of_weights(folder),
        config=of_files(folder, _configuration(folder)),
        tokenizer=of_files(folder, TOKENIZER),
    )


def _configuration(folder: Path) -> tuple[str, ...]:
    """Return the files that decide how a model works: of images also how they are prepared."""
    try:
        classes = json.loads((folder / "config.json").read_bytes()).get("architectures") or ()
    except (ValueError, AttributeError, RecursionError):
        classes = ()  # who loads it says what is wrong with it
    images = any(str(name).endswith("ForImageClassification") for name in classes)
    return ("config.json", *["preprocessor_config.json"] * images)


def of_weights(folder: Path) -> str:
    """Return the digest of the weights, in the first format that the folder has, or of a file.

    That is how transformers and mergekit look for them: a trainer leaves its own .bin beside.
    """
    if folder.is_file():
        return of_files(folder.parent, (glob.escape(folder.name),))
    for pattern in WEIGHTS:
        if any(folder.glob(pattern)):
            return of_files(folder, (pattern,))
    raise FileNotFoundError(f"{folder} is not a checkpoint: it has none of {', '.join(WEIGHTS)}")


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of the packages that answers may depend on."""
    installed = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *more)):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def deciding(installed: Mapping[str, str], packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages that decide what a model is asked and answers.

    A result of other ones is not reused.
    """
    return {package: installed.get(package, "not recorded") for package in packages}


def git_hash() -> str | None:
    """Return the commit of this repository, with `-dirty` if files differ; None outside of git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head
