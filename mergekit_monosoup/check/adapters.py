"""Whether a LoRA adapter fits the model that it is to be merged into, from both headers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.checkpoints.beside import Beside
from mergekit_monosoup.checkpoints.headers import Stored

FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(\.weight)?$")
# Which dimension of a factor is one of the weight: A is (rank, in), B (out, rank).
_OF_WEIGHT = {"A": 1, "B": 0, "embedding_A": 1, "embedding_B": 0}


def tensors(document: Document, beside: Beside) -> dict[str, Stored]:
    """Return the tensors of an adapter by name; {} where it cannot be read."""
    for file in FILES:
        if beside.has(file):
            try:
                return document.headers.of_file(os.path.join(beside.folder, file))
            except Exception:  # of safetensors, zip, pickle: the merge names the file
                return {}
    return {}


def misfits(document: Document, name: str, beside: Beside) -> Iterator[str]:
    """Yield a text about what does not fit, the vocabulary's size first; at most one."""
    model = document.tensors.get(name, {})
    found = [
        text for stored in tensors(document, beside).values() if (text := _fits(stored, model))
    ]
    if found:
        more = len(found) - 1
        yield found[0] + (f" (and {more} more tensor(s))" if more else "")


def _fits(stored: Stored, model: dict[str, Stored]) -> str:
    """Return what is wrong with one tensor of an adapter; empty if nothing is known to be."""
    name = re.sub(r"\.(modules_to_save|original_module)(\.default)?\b", "", stored.name)
    name = name.removeprefix("base_model.model.")
    factor = _FACTOR.fullmatch(name)
    weight = model.get(f"{factor['module']}.weight" if factor else name)
    if weight is None or len(stored.shape) != 2 or len(weight.shape) != 2:
        return ""
    if factor:
        size = stored.shape[_OF_WEIGHT[factor["kind"]]]
        return "" if size in weight.shape else _text(stored, weight, "")
    if stored.shape == weight.shape:
        return ""
    resized = stored.shape[1:] == weight.shape[1:] and stored.shape[0] != weight.shape[0]
    way_out = (
        f"; it was trained after its vocabulary was resized: resize the model to "
        f"{stored.shape[0]} rows (transformers: `resize_token_embeddings`), save it, and name that "
        "folder before the +"
        if resized
        else ""
    )
    return _text(stored, weight, way_out)


def _text(stored: Stored, weight: Stored, way_out: str) -> str:
    return (
        f"the adapter does not fit: {weight.name} is {weight.shape} in the model, and the "
        f"adapter's {stored.name} is {stored.shape}{way_out}"
    )
