"""Headers of the safetensors format: the length in 8 bytes, then JSON, then the tensors' bytes.

Read here and not with the library alone, whose errors name neither the file nor the tensor; it has
the last word, for what it refuses the merge would refuse.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from mergekit_monosoup.checkpoints import foreign
from mergekit_monosoup.checkpoints.foreign import AGAIN
from mergekit_monosoup.checkpoints.stored import ForeignError, LackingError, Stored

# What the library allows. A lying length must not make us read gigabytes.
LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 64


def read_safetensors(file: str) -> Iterator[Stored]:
    """Yield the tensors of a safetensors file, in the file's order.

    Raises:
        ForeignError: it is something else.
        LackingError: it is cut off, or damaged; names the tensor where there is one to name.
        OSError: it cannot be opened.
    """
    if not os.path.isfile(file):
        raise ForeignError(f"{file} {foreign.of_file(file)}")
    present = os.path.getsize(file)
    length, entries = _entries(file, present)
    entries.pop("__metadata__", None)
    tensors = [_stored(file, name, entry) for name, entry in entries.items()]
    offsets = [entry["data_offsets"] for entry in entries.values()]
    _check_size(file, present, 8 + length + max((end for _, end in offsets), default=0))
    _check_places(file, tensors, offsets)
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise LackingError(f"{file} is damaged ({error}): {AGAIN}") from None
    yield from tensors


def _entries(file: str, present: int) -> tuple[int, dict[str, Any]]:
    """Return the header's length, and what it holds by name."""
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else present
        if length > present - 8 or length > LONGEST_HEADER:
            _refuse(file)
        text = opened.read(length)
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        _refuse(file, str(error) if isinstance(error, _RepeatedError) else "")
    if not isinstance(entries, dict):
        _refuse(file)
    return length, entries


class _RepeatedError(ValueError):
    """A name that a header has twice."""


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _RepeatedError(f"has {name[:100]!r} twice in its header")
    return names


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _refuse(file: str, reason: str = "") -> NoReturn:
    """Raise what is wrong with a file whose header cannot be read."""
    if found := foreign.of_file(file):
        raise ForeignError(f"{file} {found}")
    with open(file, "rb") as opened:
        start = opened.read(2)
    if is_zipfile(file) or start == b"\x80\x02":
        raise ForeignError(f"{file} is a file of torch, not of safetensors: rename it to .bin")
    reason = reason or "is no safetensors file, or cut off in its header"
    raise LackingError(f"{file} {reason}: {AGAIN}")


def _stored(file: str, name: str, entry: Any) -> Stored:
    """Return a header's entry, once it is what the format allows."""
    fault = _fault(name, entry)
    if fault:
        raise LackingError(f"{file} is damaged: {fault}; {AGAIN}")
    begin, end = entry["data_offsets"]
    return Stored(file, name, tuple(entry["shape"]), end - begin, entry["dtype"])


def _fault(name: str, entry: Any) -> str:
    """Return what is wrong with an entry of a header; empty if nothing is."""
    what = f"its header's entry {name[:100]!r}"
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"{what} lacks `dtype`, `shape` or `data_offsets`"
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        return f"{what} has the shape {_shown(shape)}"
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"{what} has the offsets {_shown(offsets)}"
    if not isinstance(dtype, str):
        return f"{what} has the dtype {_shown(dtype)}"
    return ""


def _sizes(value: Any) -> bool:
    """Whether a value is a list of whole numbers from 0 to what 64 bits hold."""
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # numbers too long, or lists too deep to be printed
        return f"of type {type(value).__name__}"


def _check_size(file: str, present: int, whole: int) -> None:
    """Raise LackingError unless the file is as long as its header says."""
    if present < whole:
        raise LackingError(f"{file} is cut off: {present} of {whole} bytes are there; {AGAIN}")
    if present > whole:
        raise LackingError(
            f"{file} is damaged: it has {present - whole} bytes more than its header says; {AGAIN}"
        )


def _check_places(file: str, tensors: Sequence[Stored], offsets: Sequence[tuple[int, int]]) -> None:
    """Raise LackingError unless tensors lie one after another, each as large as its shape says."""
    place = 0
    for tensor, (begin, end) in sorted(zip(tensors, offsets, strict=True), key=lambda x: x[1]):
        if begin != place:
            fault = "overlaps another" if begin < place else "comes after a gap"
            raise LackingError(f"{file} is damaged: {tensor.name[:100]!r} {fault}; {AGAIN}")
        place = end
        if not _fits(tensor):
            raise LackingError(
                f"{file} is damaged: {tensor.name[:100]!r} has {tensor.size} bytes, which its "
                f"dtype {_shown(tensor.dtype)} and shape {_shown(list(tensor.shape))} do not make; "
                f"{AGAIN}"
            )


def _fits(tensor: Stored) -> bool:
    """Whether a tensor is as large as its shape says, without the product of absurd numbers."""
    bits = 0 if 0 in tensor.shape else tensor.bits
    for size in tensor.shape:
        bits *= size
        if bits > 8 * tensor.size:
            return False
    return bits == 8 * tensor.size
