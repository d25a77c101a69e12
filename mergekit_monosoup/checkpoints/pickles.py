"""Files of torch (.bin, .pt, .pth, .ckpt), read without their data and without running code."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch

from mergekit_monosoup.checkpoints import foreign
from mergekit_monosoup.checkpoints.stored import ForeignError, LackingError, Stored, WrappedError

_LARGEST_PICKLE = 1_000_000_000  # bytes, without the tensors, which lie beside it in the archive
_DEEPEST = 2  # dictionaries inside of each other in which tensors are looked for


def read_pickle(file: str, *, unwrap: bool = False) -> Iterator[Stored]:
    """Yield the tensors of a file of torch, whose data is not read.

    Args:
        file: its path.
        unwrap: read them also from a dictionary inside, as `{'state_dict': …}`, which mergekit
            does not.

    Raises:
        ForeignError: it is something else.
        WrappedError: its tensors lie in a dictionary inside.
        LackingError: it is damaged, or would run code.
    """
    for name, value in named_tensors(file, "meta", unwrap=unwrap).items():
        yield Stored(file, name, tuple(value.shape), value.nbytes, str(value.dtype))


def named_tensors(file: str, device: str, *, unwrap: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of torch by name; see :func:`read_pickle`, and :func:`load`."""
    state = _mapping(file, load(file, device))
    if path := _inner(state):
        if not unwrap:
            raise WrappedError(_unwrapping(file, state, path))
        for key in path:
            state = state[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise LackingError(
                f"{file} names its tensors by {type(name).__name__} ({name!r:.40}): a state dict "
                "has strings; save `model.state_dict()`"
            )
        if tensor.layout is not torch.strided:
            raise LackingError(f"{file}: {name} is {tensor.layout}: save it as a dense tensor")
    return tensors


def other_entries(file: str) -> list[str]:
    """Return the names of what a file of torch holds beside tensors; raises what it does above."""
    state = _mapping(file, load(file, "meta"))
    return [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]


def load(file: str, device: str) -> Any:
    """Return what torch reads: on the device "meta" without data, on "cpu" mapped where it can be.

    Files of torch's zip format (since 1.6) can be mapped instead of read.

    Raises:
        ForeignError, LackingError: it cannot be read, in a line that names the file.
    """
    if reason := foreign.of_file(file):
        raise ForeignError(f"{file} {reason}")
    if foreign.starts_as_safetensors(file):
        raise ForeignError(f"{file} is a safetensors file: give it the suffix .safetensors")
    try:
        with warnings.catch_warnings():  # about damaged bytes; what matters is raised
            warnings.simplefilter("ignore")
            zipped = is_zipfile(file)
            if zipped:
                _check_archive(file)
            return torch.load(file, map_location=device, weights_only=True, mmap=zipped)
    except OSError as error:
        raise LackingError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of zip, pickle, and whatever a damaged pickle makes torch do
        raise LackingError(f"{file} {_fault(error)}") from None


def _check_archive(file: str) -> None:
    """Raise ValueError if an archive would be unpacked into more than a pickle of names takes."""
    with ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
                raise ValueError(f"{entry.filename} in it unpacks to {entry.file_size} bytes")


def _fault(error: Exception) -> str:
    """Return what torch's error means, in one line; torch recommends to run the file's code."""
    text = " ".join(str(error).split())
    if "TorchScript" in text:
        return "is a TorchScript program: save the `state_dict()` of `torch.jit.load(FILE)`"
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds {found[1]}, not only tensors, and is not opened, for that could run code: save "
            "`model.state_dict()` alone"
        )
    cause = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0]
    cause = "".join(c if c.isprintable() else "?" for c in cause[:100])
    return (
        f"is damaged, or no file of torch ({type(error).__name__}: {cause}): "
        "download or save it again"
    )


def _mapping(file: str, state: Any) -> Mapping[Any, Any]:
    if not isinstance(state, Mapping):
        raise LackingError(
            f"{file} holds a {type(state).__name__}, not a dictionary of tensors: save "
            "`model.state_dict()`"
        )
    return state


def _inner(state: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the keys that lead to the dictionary with the most tensors, () for the outermost."""
    counts = dict(_counts(state, ()))
    return max(counts, key=lambda path: counts[path])


def _counts(
    state: Mapping[Any, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (keys, number of tensors) of a dictionary and those inside, as deep as is usual."""
    yield path, sum(isinstance(value, torch.Tensor) for value in state.values())
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEEPEST:
            yield from _counts(value, (*path, key))


def _unwrapping(file: str, state: Mapping[Any, Any], path: tuple[str, ...]) -> str:
    """Return what to do with a trainer's file, whose tensors are beside other things."""
    key = "".join(f"[{part!r}]" for part in path)
    beside = [repr(name)[:40] for name in state if name != path[0]]
    more = f" (beside {', '.join(beside[:4])}{', …' if len(beside) > 4 else ''})" if beside else ""
    stem = os.path.splitext(file)[0]
    return (
        f"{file} holds its tensors under {key}{more}, where mergekit does not look: save them "
        f"alone, `torch.save(torch.load({file!r}, map_location='cpu'){key}, '{stem}-weights.pt')`"
    )
