"""What a tensor's name means: the matrices that it holds, its layer, its type.

Mixture-of-experts checkpoints stack E experts in one tensor, and the fused gate_up projection is
two matrices glued together; a convolution of the same number of dimensions is one matrix. Only the
name tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Index = tuple[int | slice, ...]

# Granite's MoE has no ".experts." in its names but the same layout as Qwen3-MoE.
EXPERTS = re.compile(r"\.experts\.(?!\d)|\.block_sparse_moe\.(input|output)_linear\b")
GATE_UP = re.compile(r"\.gate_up_proj\b|\.block_sparse_moe\.input_linear\b")
# Llama 4 stores experts as [E, in, 2·out]; everything else that mergekit knows as [E, 2·out, in].
TRANSPOSED = re.compile(r"\.feed_forward\.experts\.")


def matrices(name: str, shape: Sequence[int]) -> list[tuple[str, Index]]:
    """Return (suffix for the record's name, index into the tensor) of each matrix of a tensor.

    A plain weight, a convolution [out, in, k...] and fused attention are one matrix with an empty
    suffix; a stack of experts [E, a, b] is E, or 2E for the fused gate_up projection. Vectors and
    stacks of expert biases [E, a] hold none.
    """
    if len(shape) < 2:
        return []
    if not EXPERTS.search(name):
        return [("", ())]
    if len(shape) == 2 and name.endswith("bias"):
        return []
    if len(shape) != 3:
        return [("", ())]
    experts = range(shape[0])
    axis = 2 if TRANSPOSED.search(name) else 1
    if not GATE_UP.search(name) or shape[axis] % 2:
        return [(f"[{e}]", (e,)) for e in experts]
    half = shape[axis] // 2
    halves = (("gate", slice(0, half)), ("up", slice(half, 2 * half)))
    return [
        (f"[{e}].{part}", (e, *[slice(None)] * (axis - 1), rows))
        for e in experts
        for part, rows in halves
    ]


# `layers.12`, `stages.2.blocks.5`, `layer1.0`, `features.1.0`: words with the numbers of a layer.
_GLUED = re.compile(r"(.*?(?:layer|block|stage|unit)s?)_?([0-9]{1,9})", re.IGNORECASE)
MOST_NUMBERS = 3  # of a layer; no network is nested deeper
# More than nine digits count no layers: they are a hash, and Python may refuse to read them.
_NUMBER = re.compile(r"[0-9]{1,9}")


class Parts(NamedTuple):
    """A name in three: what leads to the layers, the layer's numbers, what is within the layer."""

    stack: tuple[str, ...]
    layer: tuple[int, ...]
    rest: tuple[str, ...]


@lru_cache(maxsize=1 << 16)
def split(name: str) -> Parts:
    """Return the three parts of a name, of which `rest` alone is there outside of layers."""
    parts = tuple(name.split("."))
    for start in range(len(parts)):
        end, numbers = _numbered(parts, start)
        if numbers:
            glued = _GLUED.fullmatch(parts[start])
            word = glued[1] if glued else parts[start]
            return Parts((*parts[:start], word), numbers, parts[end:])
    return Parts((), (), parts)


def _numbered(parts: Sequence[str], start: int) -> tuple[int, tuple[int, ...]]:
    """Return where the words with numbers that begin at ``start`` end, and the numbers."""
    at = start
    numbers: tuple[int, ...] = ()
    while len(numbers) < MOST_NUMBERS and (step := _word_with_numbers(parts, at)) is not None:
        end, more = step
        # `stages.0.layers.1` is a layer, `layer.0` in it one of its matrices.
        if len(numbers) + len(more) > 2 and not (numbers and parts[at].endswith("s")):
            break
        at, numbers = end, (*numbers, *more)
    return at, numbers


def _word_with_numbers(parts: Sequence[str], at: int) -> tuple[int, tuple[int, ...]] | None:
    """Return the end and the numbers of ``blocks.5`` or ``layer1.0`` at ``at``; None if neither.

    An expert is a matrix of its layer, not a layer, and so is ``downsample.1.weight``.
    """
    if at >= len(parts) or parts[at] == "experts" or _NUMBER.fullmatch(parts[at]):
        return None
    glued = _GLUED.fullmatch(parts[at])
    numbers = [int(glued[2])] if glued else []
    end = at + 1
    while len(numbers) < 2 and end < len(parts) and _NUMBER.fullmatch(parts[end]):
        if parts[end + 1 :] in ((), ("weight",), ("bias",)):
            break
        numbers.append(int(parts[end]))
        end += 1
    if not numbers or parts[end:] in ((), ("weight",), ("bias",)):
        return None
    return end, tuple(numbers)


def layer(name: str) -> tuple[int, ...]:
    """Return the numbers of the layer that a tensor belongs to, (12,) or (2, 5).

    Embeddings and heads belong to none: ().
    """
    return split(name).layer


def block(name: str) -> str:
    """Return what the names of one layer's tensors have in common; empty outside of layers."""
    parts = split(name)
    return ".".join((*parts.stack, *map(str, parts.layer))) if parts.layer else ""


def projection(name: str) -> str:
    """Return what a matrix does within its layer, ``mlp.up_proj``.

    For tensors outside of layers it is their name without `model.`.
    """
    return re.sub(r"\b[0-9]+\b", "*", type_of(".".join(split(name).rest).removeprefix("model.")))


def type_of(rest: str) -> str:
    """Return one type for all experts of a layer, and for all hashes; fc1 and fc2 stay two."""
    starred = re.sub(r"\bexperts\.[0-9]+\b", "experts.*", re.sub(r"[._]weight$", "", rest))
    return re.sub(r"\[[0-9]+\]", "[*]", re.sub(r"\b[0-9]{10,}\b", "*", starred)) or "(unnamed)"


def natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """Return a sort key by which layer 10 comes after layer 9."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for place in range(1, len(parts), 2):
        # By length, then by digits: numbers may have thousands of them, which int() refuses.
        digits = str(parts[place]).lstrip("0")
        parts[place] = len(digits), digits
    return tuple(parts)
