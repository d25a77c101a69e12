"""What lies where a model's weights should: other formats, pointers, pages, unfinished downloads.

mergekit reads model.safetensors or pytorch_model.bin, whole or in shards with an index, and as
single files whatever safetensors or torch can read. For anything else the functions here say what
it is, by its first bytes or its name, and how to get to weights from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

AGAIN = "download it again"
_ORIGINAL = "take the PyTorch checkpoint that it was made from"
_GGUF = (
    "GGUF, which mergekit does not read: take the checkpoint that it was made from, or convert it "
    "with transformers (`AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)"
    ".save_pretrained(DIR)`, which dequantises it)"
)
_KERAS = (
    "TensorFlow weights, which mergekit does not read: convert them with transformers 4 "
    "(`AutoModel.from_pretrained(FOLDER, from_tf=True).save_pretrained(DIR)`)"
)
_FLAX = (
    "Flax weights, which mergekit does not read: convert them with transformers 4 "
    "(`AutoModel.from_pretrained(FOLDER, from_flax=True).save_pretrained(DIR)`)"
)
_NUMPY = "arrays of NumPy or MLX, which mergekit does not read: save them with safetensors"
_LFS = (
    "a Git LFS pointer, not the file that it stands for: run `git lfs pull` in its folder, or "
    "fetch the model with `hf download`"
)
_PAGE = f"a web page, probably an error message or a login: {AGAIN}"
_ARCHIVE = "a compressed archive: unpack it"

# First bytes of a file → what it is, and what to do. Checked in this order, after white space.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"version https://hawser", _LFS),
    (b"<!", _PAGE),
    (b"<html", _PAGE),
    (b"<HTML", _PAGE),
    (b"<?xml", _PAGE),
    (b"GGUF", _GGUF),
    (b"\x89HDF\r\n", _KERAS),
    (b"\x93NUMPY", _NUMPY),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf", _ARCHIVE),
    (b"\xfd7zXZ", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"BZh", _ARCHIVE),
)

# Suffix → the same, for files that their first bytes do not give away. In a folder the first of
# these that is there is named.
_SUFFIXES: dict[str, str] = {
    ".gguf": _GGUF,
    ".ggml": _GGUF,
    ".h5": _KERAS,
    ".keras": _KERAS,
    ".msgpack": _FLAX,
    ".npz": _NUMPY,
    ".npy": _NUMPY,
    ".distcp": "a sharded checkpoint of FSDP, which mergekit does not read: join it with "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`",
    ".onnx": f"an ONNX export, which mergekit does not read: {_ORIGINAL}",
    ".ort": f"an ONNX export, which mergekit does not read: {_ORIGINAL}",
    ".ot": f"weights for Rust, which mergekit does not read: {_ORIGINAL}",
    ".tflite": f"a TensorFlow Lite export, which mergekit does not read: {_ORIGINAL}",
    ".pb": f"a TensorFlow graph, which mergekit does not read: {_ORIGINAL}",
    ".mlmodel": f"a Core ML export, which mergekit does not read: {_ORIGINAL}",
    ".mlpackage": f"a Core ML export, which mergekit does not read: {_ORIGINAL}",
    ".engine": f"a TensorRT engine, which mergekit does not read: {_ORIGINAL}",
    ".nemo": "an archive of NeMo, which mergekit does not read: export it to Hugging Face's layout",
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".gz": _ARCHIVE,
    ".tgz": _ARCHIVE,
}

# What downloaders call a file that they have not finished.
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+(\.safetensors|\.bin)")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_LISTED = 200  # of a folder's names and sub-folders: some hold a million files


def of_file(file: str) -> str:
    """Return why a file holds no weights, to be read after its name; empty if nothing says so."""
    if os.path.isdir(file):
        return "is a folder, where a file belongs"
    if not os.path.isfile(file):
        return "is no regular file" if os.path.exists(file) else "is not there"
    if starts_as_safetensors(file):
        return ""  # whose length may begin as another format does
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        return f"is empty (0 bytes): {AGAIN}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, kind in _STARTS:
        if text.startswith(beginning):
            return f"is {kind}"
    if not any(start):
        return f"begins with zeros, as a download that was cut off: {AGAIN}"
    return _text(text) or _by_suffix(file)


def starts_as_safetensors(file: str) -> bool:
    """Whether a file begins as one of safetensors: a length that fits, then a JSON mapping."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= os.path.getsize(file) - 8


def _by_suffix(file: str) -> str:
    kind = _SUFFIXES.get(Path(file).suffix.lower())
    return f"is {kind}" if kind else ""


def _text(start: bytes) -> str:
    """Return what a file of text says: a server's error, or notes."""
    try:
        words = start.decode("ascii")
    except UnicodeDecodeError:
        return ""
    if len(words) < 8 or not all(c.isprintable() or c in "\r\n\t" for c in words):
        return ""
    return f"is text (`{' '.join(words.split())[:60]}`), not weights: {AGAIN}"


def of_folder(folder: str) -> str:
    """Return what a folder without a model holds instead, to be read after its name."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry, _ in zip(entries, range(_LISTED), strict=False))
    for look in (_broken, _unfinished, _shards, _adapter, _other_names, _formats, _below):
        if found := look(folder, names):
            return found
    if any(name in _TOKENIZER for name in names):
        return "holds a tokenizer and no weights: name the folder or repository of the model"
    return "holds no model" if names else "is an empty folder"


def _broken(folder: str, names: list[str]) -> str:
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(_WEIGHTS) and os.path.islink(path) and not os.path.exists(path):
            return f"has {name} as a link to {os.readlink(path)}, which is not there: {AGAIN}"
    return ""


def _unfinished(folder: str, names: list[str]) -> str:
    del folder
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        if suffix in _UNFINISHED and any(weights in stem for weights in _WEIGHTS):
            return f"has {name}, a download that was not finished: {AGAIN}"
    return ""


def _shards(folder: str, names: list[str]) -> str:
    del folder
    for name in names:
        if match := _SHARD.fullmatch(name):
            index = f"{match[1]}{match[2]}.index.json"
            return f"has {name} but not {index}, which says what is in it: download that too"
    return ""


def _adapter(folder: str, names: list[str]) -> str:
    if any(name in ("adapter_config.json", "adapter_model.safetensors") for name in names):
        return f"is an adapter, not a model: write BASE+{folder}"
    return ""


def _other_names(folder: str, names: list[str]) -> str:
    """Files that could be read, under names that mergekit does not look for."""
    for name in names:
        path = os.path.join(folder, name)
        if name.lower().endswith(_WEIGHTS) and os.path.isfile(path) and not of_file(path):
            return (
                f"has {name}, but in a folder mergekit reads model.safetensors or "
                f"pytorch_model.bin: rename it, or merge {path} with mergekit-pytorch"
            )
    return ""


def of_names(names: Collection[str]) -> str:
    """Return which other format there is by the names of files; empty if none is known."""
    for suffix, kind in _SUFFIXES.items():
        for name in names:
            if name.lower().endswith(suffix):
                return f"has {name}: {kind}"
    return ""


def _formats(folder: str, names: list[str]) -> str:
    if found := of_names(names):
        return found
    for name in names:
        path = os.path.join(folder, name)
        if name.lower().endswith(_WEIGHTS) and os.path.exists(path) and (why := of_file(path)):
            return f"has {name}, which {why}"
    return ""


def _below(folder: str, names: list[str]) -> str:
    """Weights in folders below: checkpoints of a training run, parts of a pipeline."""
    for name in names:
        below = os.path.join(folder, name)
        if os.path.isdir(below) and not os.path.islink(below):
            for file in ("model.safetensors", "pytorch_model.bin"):
                if any(os.path.exists(os.path.join(below, file + end)) for end in ("", _INDEX)):
                    return f"holds no model itself, but {name} in it does: name {below}"
    if "latest" in names or "zero_to_fp32.py" in names:
        return (
            "is a checkpoint of DeepSpeed: join it with `python zero_to_fp32.py . DIR` in that "
            "folder"
        )
    return ""


_INDEX = ".index.json"
