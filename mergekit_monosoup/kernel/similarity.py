"""Inner products and cosines of task vectors, for `inspect --cosine` and `soup`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.kernel import task_vector

# Bytes that :func:`inner_products` needs: four float64 arrays of a block's size.
BUFFERS = 4 * 8 * task_vector.BLOCK_ELEMENTS


def inner_products(pretrained: Tensor, finetuned: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the task vectors of several fine-tuned weights.

    Summed over blocks in float64.

    Args:
        pretrained: W0, any shape and floating dtype.
        finetuned: the m weights W_i, of the same shape.

    Returns:
        G (m, m) float64 on the CPU, G_ij = ⟨W_i − W0, W_j − W0⟩_F.

    Raises:
        NonFiniteError: an input has NaN or infinite entries.
    """
    # Seventy models must not need seventy blocks.
    step = max(1, task_vector.BLOCK_ELEMENTS // len(finetuned))
    base, tuned = pretrained.reshape(-1), [w.reshape(-1) for w in finetuned]
    total = torch.zeros(len(tuned), len(tuned), dtype=torch.float64, device=base.device)
    for start in range(0, len(base), step):
        block = slice(start, start + step)
        updates = torch.stack([w[block].double() for w in tuned]) - base[block].double()
        total += updates @ updates.T
    if not torch.isfinite(total).all():
        raise NonFiniteError([int((~torch.isfinite(w)).sum()) for w in (base, *tuned)])
    return total.cpu()


def cosine(inner: float, left: float, right: float) -> float | None:
    """Return the cosine of two vectors from their inner product and their *squared* norms.

    None where a norm is zero, for a zero vector has no direction.
    """
    if left <= 0 or right <= 0:
        return None
    return max(-1.0, min(1.0, inner / math.sqrt(left) / math.sqrt(right)))
