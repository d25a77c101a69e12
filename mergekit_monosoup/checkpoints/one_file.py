"""The header of one file, safetensors or pickle; without mergekit, whose import takes a second."""

from __future__ import annotations

from mergekit_monosoup.checkpoints.pickles import read_pickle
from mergekit_monosoup.checkpoints.safetensors import read_safetensors
from mergekit_monosoup.checkpoints.stored import LackingError, Stored


def read_header(file: str, *, unwrap: bool = False) -> dict[str, Stored]:
    """Return the tensors of a file by name, in the file's order.

    ``unwrap``: of a pickle also those in a dictionary inside, where mergekit does not look.

    Raises:
        ForeignError: it is no file of tensors, but something else that the error names.
        WrappedError: its tensors lie in a dictionary inside of it.
        LackingError: it is cut off, damaged, would run code, or cannot be opened.
    """
    try:
        if file.lower().endswith(".safetensors"):
            return {tensor.name: tensor for tensor in read_safetensors(file)}
        return {tensor.name: tensor for tensor in read_pickle(file, unwrap=unwrap)}
    except OSError as error:
        raise LackingError(f"{file} cannot be read: {error.strerror or error}") from error
