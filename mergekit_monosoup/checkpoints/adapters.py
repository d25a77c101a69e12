"""LoRA adapters: whether one fits its base, and merging it into the base for mergekit to read.

mergekit names the merged model after both paths, in a cache, and takes any folder of that name for
finished: also the empty one that a failed merge leaves. Here it gets its name when it is complete.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping

from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex

from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.headers import Headers, Stored, read_header
from mergekit_monosoup.checkpoints.lora import PREFIX
from mergekit_monosoup.checkpoints.storage import Options

SECOND = {"A.weight": "B.weight", "embedding_A": "embedding_B"}  # the factors of an update
TOKENS = ("embed", "lm_head", "wte")  # parts of names of tensors with a row for each token


class AdapterError(ValueError):
    """An adapter cannot be merged into its base; the message says what to do."""


# -- whether it fits -------------------------------------------------------------------------------


def shapes(
    adapter: Mapping[str, Stored], base: Mapping[str, Stored]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return tensor → its shape by the adapter, and in the base's files.

    Tensors that the base's files call otherwise are left out.
    """
    found = {}
    for name, stored in adapter.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        weight = base.get(tensor := f"{module}.weight" if part else module)
        if weight is None:
            continue
        other = adapter.get(f"{PREFIX}{module}.lora_{SECOND.get(part, '')}")
        if not part:  # saved whole, as an embedding that was trained beside
            found[tensor] = stored.shape, weight.shape
        elif other is not None and len(stored.shape) > 1:
            shape = other.shape[0], stored.shape[1]
            # (tokens, dimension) is stored by embeddings, and (in, out) by GPT-2's linear layers.
            if part == "embedding_A" or weight.shape[:2] == shape[::-1]:
                shape = shape[::-1]
            found[tensor] = shape, weight.shape[:2]
    return found


def misfit(adapter: Mapping[str, Stored], base: Mapping[str, Stored]) -> str:
    """Return a line about the tensors whose shape by the adapter is not that in the base, or ""."""
    lines = [
        f"{name} is {ours} in the adapter and {theirs} in its base{_reason(name, ours, theirs)}"
        for name, (ours, theirs) in shapes(adapter, base).items()
        if ours != theirs
    ]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0] + more if lines else ""


def _reason(name: str, ours: tuple[int, ...], base: tuple[int, ...]) -> str:
    by_token = any(part in name for part in TOKENS) and ours[1:] == base[1:]
    if not by_token or ours[0] < base[0]:
        return ": it was trained on another model"
    return (
        ": the vocabulary was enlarged before training. Enlarge the base alike "
        f"(`model.resize_token_embeddings({ours[0]})`, `save_pretrained`), and name that folder as "
        "the base of the adapter"
    )


# -- merging ---------------------------------------------------------------------------------------


def merged(reference: ModelReference, options: Options) -> ModelReference:
    """Return the model with its adapter merged, as mergekit names it; itself without an adapter.

    What an earlier merge left in the cache is used if it is whole, and newer than both parts.

    Raises:
        AdapterError: there is no cache, or the adapter cannot be merged; nothing of the attempt
            is left in the cache then.
        HubError: a part cannot be had from the hub.
    """
    if reference.lora is None:
        return reference
    cache = options.lora_merge_cache
    if cache is None:
        raise AdapterError(
            "an adapter has to be merged into its base first: say where with --lora-merge-cache DIR"
        )
    folder = place(reference, cache)
    if not _usable(folder, reference):
        os.makedirs(cache, exist_ok=True)
        _check_fits(reference)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as unfinished:
            made = _merge(reference, unfinished, options)
            if _usable(folder, reference):
                return ModelReference.parse(folder)  # another process was faster
            if os.path.isdir(folder):
                # Aside first: a folder that is not empty cannot be replaced.
                os.rename(folder, os.path.join(unfinished, "old"))
            os.rename(made, folder)
    return ModelReference.parse(folder)


def place(reference: ModelReference, cache: str) -> str:
    """Return the folder in which mergekit looks for the merged model."""
    assert reference.lora is not None
    parts = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    return os.path.join(cache, parts)


def _merge(reference: ModelReference, unfinished: str, options: Options) -> str:
    """Let mergekit merge into a folder below ``unfinished``, and return it."""
    try:
        with hub.explained():
            made = reference.merged(
                unfinished, options.trust_remote_code, options.lora_merge_dtype
            ).model.path
    except hub.HubError:
        raise
    except Exception as error:  # of transformers and peft, each with errors of its own
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise AdapterError(f"the adapter cannot be merged into its base: {words}") from error
    return made


def _usable(folder: str, reference: ModelReference) -> bool:
    """Whether a folder of the cache holds the whole merge of what lies there now.

    mergekit-yaml leaves an empty folder where it failed, and half a model where it was killed.
    """
    try:
        index = ShardedTensorIndex.from_disk(folder)
        files = [os.path.join(folder, shard.filename) for shard in index.shards]
        for file in files:
            read_header(file)
        made = min(map(os.path.getmtime, files))
    except Exception:  # whatever is wrong with it, it is made anew
        return False
    return not any(made < changed for changed in _changes(reference))


def _changes(reference: ModelReference) -> Iterator[float]:
    """Yield when the files of base and adapter were written, as far as they lie here."""
    for part in (reference.model, reference.lora):
        if part is not None and os.path.isdir(part.path):
            for name in os.listdir(part.path):
                if name.endswith((".safetensors", ".bin", "adapter_config.json")):
                    yield os.path.getmtime(os.path.join(part.path, name))


def _check_fits(reference: ModelReference) -> None:
    """Refuse an adapter of another shape before gigabytes are loaded to find that out."""
    assert reference.lora is not None
    headers = Headers()
    try:
        ours = headers.of_adapter(reference.lora.path, reference.lora.revision)
        base = headers.of_model(reference.model.path, reference.model.revision)
    except (hub.UnreadHeadersError, hub.UnreachableError):
        return  # it may be in the cache, where transformers and peft look
    if found := misfit(ours, base):
        raise AdapterError(found)
