"""What a tensor's name means: the matrices that it holds, its layer, its type.

Mixture-of-experts checkpoints stack E experts in one tensor, and the fused gate_up projection is
two matrices glued together; a convolution of the same number of dimensions is one matrix. Only the
name tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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


# `layers.12`, `stages.2.blocks.5`; an expert is a matrix of its layer, not a layer, and
# `downsample.1.weight` is a matrix.
# More than nine digits count no layers: they are a hash, and Python may refuse to read them.
_NUMBER = r"\.[0-9]{1,9}"
_LAYER = re.compile(
    rf"(?:^|\.)(?!experts\.)\w+{_NUMBER}(?:\.(?!experts\.)\w+{_NUMBER})*(?=\.(?!weight$|bias$))"
)


def layer(name: str) -> tuple[int, ...]:
    """Return the numbers of the layer that a tensor belongs to, (12,) or (2, 5).

    Embeddings and heads belong to none: ().
    """
    match = _LAYER.search(name)
    return (
        tuple(int(number) for number in re.findall(r"\.([0-9]+)(?![^.])", match[0]))
        if match
        else ()
    )


def projection(name: str) -> str:
    """Return what a matrix does within its layer, ``mlp.up_proj``.

    For tensors outside of layers it is their name without `model.`.
    """
    match = _LAYER.search(name)
    rest = name[match.end() + 1 :] if match else name
    # One type for all experts of a layer, but fc1 and fc2 stay two.
    kind = re.sub(r"\b\d+\b", "*", rest.removeprefix("model.").removesuffix(".weight"))
    return kind or "(unnamed)"


def natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """Return a sort key by which layer 10 comes after layer 9."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for place in range(1, len(parts), 2):
        # By length, then by digits: numbers may have thousands of them, which int() refuses.
        digits = str(parts[place]).lstrip("0")
        parts[place] = len(digits), digits
    return tuple(parts)
