"""What is said where mergekit's idea of an architecture does not fit the models, and the way out.

`check` finds it before a merge, `run` refuses it, mergekit-yaml gets a warning: in the same words.
The way out is mergekit-pytorch, which merges tensors of one name, whatever the model is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader

from mergekit_monosoup.checkpoints.coverage import Reads, is_matrix
from mergekit_monosoup.checkpoints.headers import Stored
from mergekit_monosoup.checkpoints.reader import NAMES_IN_MESSAGE

Loaders = Mapping[ModelReference, LazyTensorLoader]
SECTION = 'docs/check.md, "Where mergekit does not know a model"'


def is_refusal(error: Exception) -> bool:
    """Whether mergekit refuses a configuration or cannot read a file, and says why.

    Anything else is a fault of its own, or of its definition: of RuntimeError what is derived from
    it, as NotImplementedError, and what quotes a whole config.json for a key that is not in it.
    """
    if isinstance(error, RuntimeError):
        return type(error) is RuntimeError and "\n" not in str(error).strip()
    return isinstance(error, ValueError | OSError | ImportError)


def listed(names: Iterable[str]) -> str:
    """Return the first few names, sorted."""
    return ", ".join(sorted(names)[:NAMES_IN_MESSAGE])


def class_of(model: ModelReference, trust_remote_code: bool = False) -> str:
    """Return the class that a model's config.json names; `?` where that cannot be read."""
    try:
        names = model.config(trust_remote_code=trust_remote_code).architectures
    except Exception:  # of transformers, of the hub; it is only for a message
        return "?"
    return next(iter(names or ()), "?")


# -- what is wrong ---------------------------------------------------------------------------------


def lacking(model: str, names: Iterable[str]) -> str:
    """Return what is said of a model that lacks what others have, and the merge needs."""
    names = list(names)
    return (
        f"lacks {len(names)} tensor(s) that the merge needs, whole or in part: {listed(names)}; "
        "is the checkpoint complete?"
    )


def lacking_everywhere(names: Iterable[str], architecture: str) -> str:
    """Return what is said of tensors that mergekit's definition names and no model has."""
    names = list(names)
    return (
        f"mergekit's definition of {architecture} names {len(names)} tensor(s) that none of the "
        f"models has: {listed(names)}; not the checkpoints are at fault, the definition does not "
        "fit them"
    )


def unread(tensors: Mapping[str, Stored]) -> str:
    """Return what is said of tensors that mergekit passes by."""
    matrices = [name for name, tensor in tensors.items() if is_matrix(tensor)]
    count = f"{len(tensors)} tensor(s)"
    if matrices:
        others = len(tensors) - len(matrices)
        count = f"{len(matrices)} matrices" + (f" and {others} other tensor(s)" if others else "")
    return (
        f"{count} that mergekit does not read, so the merged model will not have them: "
        f"{listed(matrices or tensors)}"
    )


def uneven(reads: Reads) -> Iterator[tuple[str, str]]:
    """Yield (model, what is wrong) of models whose stacks of experts differ from the others'."""
    for models, names in _by_sizes(reads).items():
        shapes = reads.shapes[names[0]]
        largest = max(shapes[model][0] for model in models)
        poorer = [model for model in models if shapes[model][0] < largest]
        if poorer and len({shapes[model][1:] for model in models}) == 1:
            yield (
                ", ".join(poorer),
                f"has {min(shape[0] for shape in shapes.values())} experts where there are "
                f"{largest}, in {listed(names)}: is the checkpoint complete?",
            )
        else:
            stated = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
            yield models[-1], f"differs in the shape of {listed(names)}: {stated}"


def _by_sizes(reads: Reads) -> dict[tuple[str, ...], list[str]]:
    """Return models → stacks of different shapes; one entry for one cause."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, shapes in reads.shapes.items():
        groups.setdefault(tuple(shapes), []).append(name)
    return groups


def cannot_plan(error: Exception, model: ModelReference, architecture: str) -> str:
    """Return what is said of an error in mergekit's planner that tells its user nothing."""
    return (
        f"mergekit fails at planning a merge of {architecture} ({model}), by a fault of its own: "
        f"{type(error).__name__}: {_in_short(error)}"
    )


def _in_short(error: Exception) -> str:
    """Return the first and last line of an error's message: some quote a configuration between."""
    lines = str(error).strip().rstrip(".").splitlines() or ["no message"]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"


def depths(
    config: MergeConfiguration, architecture: ModelArchitecture, trust_remote_code: bool = False
) -> dict[ModelReference, int]:
    """Return the layers of each of the models, if they are merged whole and differ; else nothing.

    Of the first module in which they do. mergekit says only that they do.
    """
    if not config.models:
        return {}
    models = dict.fromkeys([*filter(None, [config.base_model]), *(m.model for m in config.models)])
    for module in architecture.modules.values():
        layers = {
            model: module.architecture.num_layers(model.config(trust_remote_code=trust_remote_code))
            for model in models
        }
        if len(set(layers.values())) > 1:
            return layers
    return {}


def uneven_depths(layers: Mapping[ModelReference, int]) -> str:
    """Return what is said of models of different depth."""
    stated = ", ".join(f"{model} has {number}" for model, number in layers.items())
    return (
        f"the models differ in their number of layers: {stated}; merge fine-tunes of one model, or "
        "say with `slices` which layers belong together"
    )


# -- the way out -----------------------------------------------------------------------------------


def way_out(config: MergeConfiguration, loaders: Loaders) -> str:
    """Return how to merge these models by mergekit-pytorch, in one line.

    ``config``: as it was read, before mergekit's planner has rewritten it. ``loaders``: of all its
    models; only the index is used.
    """
    written = config.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    files = {str(model): _file(loader) for model, loader in loaders.items()}
    if not written.get("models") or not files.keys() >= _names(written):
        return (
            "mergekit-pytorch merges files by the names of the tensors in them, but takes whole "
            f"`models` only: see {SECTION}"
        )
    text = yaml.safe_dump(
        _raw(written, files), default_flow_style=True, sort_keys=False, width=2**20
    )
    # mergekit-pytorch stops at a tensor that one of the models lacks.
    names = {frozenset(loader.index.tensor_paths) for loader in loaders.values()}
    union = " --tensor-union" if len(names) > 1 else ""
    sharded = any(len(loader.index.shards) > 1 for loader in loaders.values())
    join = ", join the shards of each model to that file" if sharded else ""
    return (
        f"mergekit-pytorch merges the files by the names of their tensors: write {text.strip()} "
        f"to raw.yml{join}, run `mergekit-pytorch raw.yml OUT{union}` and copy config.json and the "
        f"tokenizer to OUT ({SECTION})"
    )


def _names(written: Mapping[str, Any]) -> set[str]:
    models = [entry["model"] for entry in written["models"]]
    return {*map(_name, models), *map(_name, filter(None, [written.get("base_model")]))}


def _name(reference: Any) -> str:
    return str(ModelReference.model_validate(reference))


def _raw(written: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration with files in the place of models."""
    raw: dict[str, Any] = {"merge_method": written["merge_method"]}
    if "base_model" in written:
        raw["base_model"] = files[_name(written["base_model"])]
    raw["models"] = [
        {**entry, "model": files[_name(entry["model"])]} for entry in written["models"]
    ]
    same = ("parameters", "dtype", "out_dtype")
    return raw | {key: written[key] for key in same if key in written}


def _file(loader: LazyTensorLoader) -> str:
    """Return the file that holds a whole model, or is to."""
    index = loader.index
    single = index.shards[0].filename if len(index.shards) == 1 else "whole.safetensors"
    return os.path.join(index.base_path, single)
