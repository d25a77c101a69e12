"""A tensor as a file's header describes it, and the errors of files that cannot be used."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Of a model that is a single file.
MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class LackingError(ValueError):
    """A model does not have a tensor that the merge needs, or a file is not whole."""


class ForeignError(LackingError):
    """What lies there is no model that mergekit reads, but something else."""


class WrappedError(LackingError):
    """The tensors of a pickle lie in a dictionary inside of it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the path, or on the hub REPOSITORY/FILE.
        name: its name in the file.
        shape: its dimensions.
        size: bytes.
        dtype: as the file has it: BF16, F8_E4M3 (safetensors), torch.bfloat16 (pickles).
    """

    file: str
    name: str
    shape: tuple[int, ...]
    size: int
    dtype: str = ""

    @property
    def itemsize(self) -> int:
        return self.size // (math.prod(self.shape) or 1)

    @property
    def bits(self) -> int:
        """Bits of one entry, as its dtype's name says; 8 for names without a number (BOOL)."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8

    @property
    def floating(self) -> bool:
        """Whether its entries are floating point, of any width."""
        return self.dtype.startswith(("F", "BF", "torch.float", "torch.bfloat"))
