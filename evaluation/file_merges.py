"""Merges of single files of weights, of any architecture, as mergekit-pytorch makes them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoints.stored import MODEL_SUFFIXES
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import read_documents

OUTPUT = "model.safetensors"  # mergekit's name for weights in one file
UNPAIRED = "TEN511"  # what `check` finds of tensors that only some models have
CONFIGURATIONS = ("config.json", "preprocessor_config.json")  # copied from beside the base


class FileMergeError(ValueError):
    """Files cannot be merged; the message says why."""


def holds_weights(path: str) -> bool:
    """Whether this is a file of weights, by its name."""
    return path.lower().endswith(MODEL_SUFFIXES) and Path(path).is_file()


def of_files(config: Mapping[str, Any]) -> bool:
    """Whether the models of a configuration are files, as mergekit-pytorch wants them."""
    return any(map(holds_weights, names(config)))


def mergeable(place: Path) -> Path:
    """Return a model as configurations name it: of an image classifier's folder its only file.

    mergekit-yaml merges folders of language models, mergekit-pytorch files of anything.
    """
    if not place.is_dir() or not _is_classifier(place / "config.json"):
        return place
    found = [file for suffix in MODEL_SUFFIXES for file in sorted(place.glob(f"*{suffix}"))]
    return found[0] if found and found[0].stem in ("model", "pytorch_model") else place


def folders_for_files(path: Path) -> list[str]:
    """Return a line for each model of a configuration that mergekit-yaml cannot merge as a folder.

    It knows language models; of an image classifier it would miss most tensors, or stop.
    """
    try:
        documents = read_documents(path)
    except UnreadableError:
        return []  # which `check` reports
    named = [
        name for document in documents if isinstance(document, dict) for name in names(document)
    ]
    return [
        f"{name}: an image classifier, of which mergekit-pytorch merges the file: write {file}"
        for name in dict.fromkeys(named)
        if (file := mergeable(Path(name))) != Path(name)
    ]


def names(config: Mapping[str, Any]) -> list[str]:
    """Return the models that a configuration names, the base last."""
    models = config.get("models")
    listed = models if isinstance(models, list) else []
    named = [entry.get("model") for entry in listed if isinstance(entry, dict)]
    return [name for name in [*named, config.get("base_model")] if isinstance(name, str)]


def _is_classifier(config: Path) -> bool:
    """Whether a config.json is timm's, or of an image classifier of transformers."""
    try:
        content = json.loads(config.read_bytes())
        classes = [str(name) for name in content.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # who loads it says what is wrong with it
    return "architecture" in content or any(n.endswith("ForImageClassification") for n in classes)


def merge(data: Mapping[str, Any], folder: Path) -> None:
    """Merge the files of a configuration into `folder`, beside what says their architecture.

    Raises:
        FileMergeError: not all of them have the same tensors, or a tensor cannot be merged.
    """
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import (
        RawPyTorchMergeConfig,
        SimpleLoaderCache,
        plan_flat_merge,
    )

    from mergekit_monosoup.errors import NonFiniteError, SolverError

    config = RawPyTorchMergeConfig.model_validate(data)
    # Of the whole process, by path: it would hand out what an earlier merge read there.
    SimpleLoaderCache().loaders.clear()
    options = MergeOptions(quiet=True, out_shard_size=2**62)  # one file
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # two progress bars of a second
            tasks = plan_flat_merge(config, str(folder), False, False, options)
        for _ in Executor(tasks).run(quiet=True):
            pass
    except (NonFiniteError, SolverError, ValueError, RuntimeError) as error:
        raise FileMergeError(_reason(error)) from error
    finally:
        SimpleLoaderCache().loaders.clear()
    beside = Path(config.base_model or config.models[0].model).parent
    for name in CONFIGURATIONS:
        if (beside / name).is_file():
            shutil.copy(beside / name, folder / name)


def _reason(error: Exception) -> str:
    if str(error) == "Missing tensors":
        return "not all models have the same tensors; `mergekit-monosoup check` names them"
    return " ".join(str(error).split())
