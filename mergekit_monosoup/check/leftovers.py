"""Files of a model's folder that mergekit neither reads nor copies, and that a model may need.

Not counted are copies of the same weights in other formats, and what a training run leaves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from mergekit_monosoup.check.output import Output
from mergekit_monosoup.checkpoints.beside import Beside

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|pkl|npz)", re.IGNORECASE)
# The model itself, its shards, variants and copies, which transformers knows or passes by.
_SAME_WEIGHTS = re.compile(
    r"(model|pytorch_model|consolidated)([.-]\d+(-of-\d+)?)?"
    r"(\.(fp16|bf16|fp32|fp8|int8|non_ema))?\.\w+|ggml.*"
)
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer|"
    r"\w*_states|zero_).*|events\..*"
)
_OTHER_FORMATS = re.compile(
    r"(\..*|original|onnx|openvino|coreml|tflite|gguf|metal|checkpoint-.*|global_step.*|runs|logs|"
    r"eval.*|__pycache__)",
    re.IGNORECASE,
)
# What loads a folder as more than a language model: sentence-transformers, SetFit, processors.
_MODULES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "config_setfit.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
)


def is_weights(name: str) -> bool:
    """Whether a path is that of a file of weights."""
    return bool(_WEIGHTS.fullmatch(os.path.basename(name)))


def of_models(output: Output) -> dict[str, list[str]]:
    """Return model → what of its folder the merged one will lack, by paths in that folder."""
    architectures = output.document.planning.architectures
    copied = {f for a in architectures.values() for f in a.tagalong_files or []}
    found = {}
    for name in output.document.models:
        beside = output.beside(name)
        if beside is not None and name not in output.document.origins:
            found[name] = [file for file in _candidates(output, name, beside) if file not in copied]
    return {name: files for name, files in found.items() if files}


def _candidates(output: Output, name: str, beside: Beside) -> Iterator[str]:
    """Yield paths in the folder; of a folder of weights the files, of any other its name."""
    stored = {tensor.file for tensor in output.document.tensors.get(name, {}).values()}
    read = {os.path.abspath(file) for file in stored}
    modules = _module_folders(beside)
    yield from (file for file in _MODULES if beside.has(file))
    for entry in sorted(os.scandir(beside.folder), key=lambda entry: entry.name):
        # os.path: a link to itself is no folder, where the entry raises.
        if not os.path.isdir(entry.path) or _OTHER_FORMATS.fullmatch(entry.name):
            continue
        if weights := _weights(entry.path, read):
            yield from (f"{entry.name}/{file}" for file in weights)
        elif entry.name in modules:
            yield entry.name
    yield from _weights(beside.folder, read)


def _weights(folder: str, read: set[str]) -> list[str]:
    """Return the files of weights in a folder that are not ``read``, by absolute paths."""
    place = os.path.abspath(folder)
    model_is_here = any(os.path.dirname(file) == place for file in read)
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [
        name
        for name in names
        if is_weights(name)
        and not _TRAINING.fullmatch(name)
        and not (model_is_here and _SAME_WEIGHTS.fullmatch(name))
        and os.path.join(place, name) not in read
    ]


def _module_folders(beside: Beside) -> set[str]:
    """Return the folders that sentence-transformers' modules.json names."""
    modules = beside.list("modules.json")
    paths = (module.get("path") for module in modules if isinstance(module, dict))
    return {path for path in paths if isinstance(path, str) and path}
