"""The task vector ΔW = W1 − W0 of one matrix, formed block by block after promotion.

Nothing here is ever stored at full size: a 151936-row embedding is read in blocks, so no promoted copy ever exceeds
:data:`BLOCK_ELEMENTS` entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 4 MiB of float32: the bound on extra memory, long enough for GEMM to run at full speed, and small enough for the allocator
# to use the same pages again. Measured on 1024 x 3072, whole edits: 2^17 278 ms, 2^20 243 ms, 2^22 270 ms.
BLOCK_ELEMENTS = 2**20
# An accelerator wants few large kernels. Not measured.
ACCELERATOR_BLOCK_ELEMENTS = 2**24


def block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


class NonFiniteError(ValueError):
    """Some input has NaN or infinite entries; ``counts[0]`` belongs to W0, ``counts[1:]`` to the fine-tuned inputs.

    ``name`` is that of the matrix, one of several in a stack of experts.
    """

    def __init__(self, counts: Sequence[int], name: str = ""):
        self.counts, self.name = tuple(counts), name
        super().__init__(
            f"{name}{': ' * bool(name)}non-finite entries: {counts[0]} in the pretrained, {list(counts[1:])} in the "
            "fine-tuned inputs"
        )


def normalise(weights: Sequence[float]) -> list[float]:
    """Averaging weights that sum to one.

    Raises:
        ValueError: a weight is negative or not finite, none is positive, or they are too large to be added.
    """
    if any(not (0 <= w < math.inf) for w in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"weights of the fine-tuned models must be >= 0, at least one > 0, and their sum finite, got {list(weights)}"
        )
    return [w / sum(weights) for w in weights]


@dataclass(frozen=True)
class Block:
    """Rows of the tall view: ``index`` writes them back, ``base`` and ``delta`` are (rows, width) promoted."""

    index: slice
    base: Tensor
    delta: Tensor


class TaskVector:
    """ΔW of one matrix, seen as the *tall* matrix: (long side, short side), transposed when out < rest.

    Args:
        pretrained: W0, any floating dtype; [out, rest...] is read as [out, rest], fewer than two dimensions as a column.
        finetuned: one or more W1 of the same shape; several are averaged (paper, appendix B: "avg. of FT 1&2").
        weights: their weights, normalised here; equal when not given.
        average: False takes the weights as they are: ΔW = Σ weight·(W1 − W0).
    """

    def __init__(
        self,
        pretrained: Tensor,
        finetuned: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        average: bool = True,
    ):
        weights = weights if weights is not None else [1.0] * len(finetuned)
        if len(weights) != len(finetuned):
            raise ValueError(
                f"there are {len(weights)} weights for {len(finetuned)} fine-tuned models: {list(weights)}"
            )
        self._weights = normalise(weights) if average else list(weights)
        self._base = self.tall(pretrained)
        self._tuned = [self.tall(w) for w in finetuned]
        self.rows, self.width = self._base.shape
        self.device = pretrained.device
        # The difference of two bf16 or fp16 numbers is exact in float32, but for entries 2^16 apart; of two close float32
        # numbers it is exact too (Sterbenz). A weighted sum of differences is not, hence float64 for averages.
        exact = pretrained.dtype != torch.float64 and self._weights == [1.0]
        self.dtype = torch.float32 if exact else torch.float64

    @staticmethod
    def tall(weight: Tensor) -> Tensor:
        """The (long, short) view of a weight; no copy where its strides allow one (they do for contiguous weights)."""
        if weight.ndim < 2:
            return weight.reshape(-1, 1)
        matrix = weight.flatten(1)  # unlike reshape(out, -1), also of an empty tensor
        return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T

    def parts(self) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
        """(rows, W0, the update of each fine-tuned input) in row blocks, all in ``self.dtype``."""
        step = max(1, block_elements(self.device) // max(1, self.width))
        for start in range(0, self.rows, step):
            index = slice(start, min(start + step, self.rows))
            base = self._base[index].to(self.dtype)
            # Not in place: .to() of an input that has the dtype already is that input, which is only borrowed. In the memory
            # order of W0, whatever that of W1 is: sums over two blocks run through both as they lie.
            yield (
                index,
                base,
                [
                    torch.sub(tuned[index].to(self.dtype), base, out=torch.empty_like(base))
                    for tuned in self._tuned
                ],
            )

    def combine(self, deltas: Sequence[Tensor]) -> Tensor:
        """ΔW of a block from the update of each input; a single one of weight 1 is returned as it is."""
        first, *others = deltas
        if self._weights == [1.0]:
            return first
        combined = first * self._weights[0]
        for weight, other in zip(self._weights[1:], others, strict=True):
            combined.add_(other, alpha=weight)
        return combined

    def blocks(self) -> Iterator[Block]:
        """ΔW and W0 in row blocks, both in ``self.dtype``."""
        for index, base, deltas in self.parts():
            yield Block(index, base, self.combine(deltas))

    def norms(self) -> tuple[float, float]:
        """(‖ΔW‖_F, ‖W0‖_F), summed over blocks in float64.

        Raises:
            NonFiniteError: an input has NaN or infinite entries (they would pass arithmetic in silence).
            OverflowError: the inputs are finite, their squares are not, not even in float64.
        """
        delta, base = self._norms(self.dtype)
        if not (math.isfinite(delta) and math.isfinite(base)):
            counts = [int((~torch.isfinite(w)).sum()) for w in (self._base, *self._tuned)]
            if any(counts):
                raise NonFiniteError(counts)
            self.dtype = torch.float64  # W1 − W0 itself may leave the range of float32
        if not all(0 < norm < math.inf for norm in (delta, base)):
            delta, base = self._norms(
                torch.float64
            )  # squares may leave the range of float32; eight times slower
        if not (math.isfinite(delta) and math.isfinite(base)):
            raise OverflowError(
                f"its entries are so large that their squares overflow float64 (‖ΔW‖ {delta}, ‖W0‖ {base})"
            )
        return delta, base

    def _norms(self, dtype: torch.dtype) -> tuple[float, float]:
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            norms = [
                torch.linalg.vector_norm(flat(x), dtype=dtype) for x in (block.delta, block.base)
            ]
            squares += torch.stack(norms).double().square()
        delta, base = squares.sqrt().tolist()
        return delta, base


def flat(block: Tensor) -> Tensor:
    """All entries of a block in the order of memory, where blocks of wide matrices are column-major: no copy."""
    return (block.T if block.stride(0) == 1 else block).reshape(-1)


def inner_products(pretrained: Tensor, finetuned: Sequence[Tensor]) -> Tensor:
    """G (m, m) float64 on the CPU, G_ij = ⟨ΔW_i, ΔW_j⟩_F of m fine-tuned weights; summed over blocks in float64.

    Raises:
        NonFiniteError: an input has NaN or infinite entries.
    """
    step = max(1, BLOCK_ELEMENTS // len(finetuned))  # seventy models must not need seventy blocks
    base, tuned = pretrained.reshape(-1), [w.reshape(-1) for w in finetuned]
    total = torch.zeros(len(tuned), len(tuned), dtype=torch.float64, device=base.device)
    for start in range(0, len(base), step):
        rows = (
            torch.stack([w[start : start + step].double() for w in tuned])
            - base[start : start + step].double()
        )
        total += rows @ rows.T
    if not torch.isfinite(total).all():
        raise NonFiniteError([int((~torch.isfinite(w)).sum()) for w in (base, *tuned)])
    return total.cpu()


def cosine(inner: float, left: float, right: float) -> float | None:
    """inner/√(left·right) of squared norms ``left`` and ``right``; None where one is zero, for zero has no direction."""
    return (
        max(-1.0, min(1.0, inner / math.sqrt(left) / math.sqrt(right)))
        if left > 0 and right > 0
        else None
    )
