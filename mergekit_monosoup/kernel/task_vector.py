"""The task vector ΔW = W1 − W0 of one matrix, formed block by block after promotion.

Nothing here is ever stored at full size: a 151936-row embedding is read in blocks, so no promoted
copy ever exceeds :func:`block_elements` entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_monosoup.errors import QUANTISED, NonFiniteError
from mergekit_monosoup.kernel.eigen import LOG, out_of_memory

# 4 MiB of float32: the bound on extra memory, long enough for GEMM to run at full speed, and small
# enough for the allocator to use the same pages again. Measured on 1024 x 3072, whole edits: 2^17
# 278 ms, 2^20 243 ms, 2^22 270 ms.
BLOCK_ELEMENTS = 2**20
# An accelerator wants few large kernels. Not measured.
ACCELERATOR_BLOCK_ELEMENTS = 2**24

# Reason in the record of a tensor of which one dimension is 0.
NO_ENTRIES = "no entries"


def block_elements(device: torch.device) -> int:
    """Return the bound on the entries of a block on ``device``."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def normalise(weights: Sequence[float]) -> list[float]:
    """Return averaging weights that sum to one.

    Raises:
        ValueError: a weight is negative or not finite, none is positive, or they are too large to
            be added.
    """
    if any(not (0 <= w < math.inf) for w in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(
            "weights of the fine-tuned models must be >= 0, at least one > 0, and their sum "
            f"finite, got {list(weights)}"
        )
    return [w / sum(weights) for w in weights]


class Norms(NamedTuple):
    """‖ΔW‖_F and ‖W0‖_F."""

    update: float
    pretrained: float

    @property
    def relative_update(self) -> float | None:
        """‖ΔW‖_F/‖W0‖_F; None where W0 is zero."""
        return self.update / self.pretrained if self.pretrained > 0 else None


@dataclass(frozen=True)
class Block:
    """Some rows of the tall view, promoted.

    Attributes:
        index: which rows; writes them back.
        base, delta: W0 and ΔW, (rows, width).
        deltas: the update of each fine-tuned input, (rows, width).
    """

    index: slice
    base: Tensor
    delta: Tensor
    deltas: Sequence[Tensor]


class TaskVector:
    """ΔW of one matrix, seen as the *tall* matrix: (long side, short side), transposed if needed.

    Attributes:
        name: of the matrix, for errors and records.
        pretrained, finetuned: W0 and the W1, as given or as moved to the CPU.
        rows, width: of the tall view.
        order: rows of the matrix that it stands for, which say what rounding leaves of singular
            values that are 0; ``rows``, unless it is the core of a larger one.
        device: where the arithmetic happens.
        dtype: of the arithmetic on blocks.
    """

    def __init__(
        self,
        pretrained: Tensor,
        finetuned: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        average: bool = True,
        name: str = "",
        order: int = 0,
    ):
        """Check and borrow the inputs.

        Args:
            pretrained: W0, any floating dtype; [out, rest...] is read as [out, rest], fewer than
                two dimensions as a column.
            finetuned: one or more W1 of the same shape, dtype and device; several are averaged
                (paper, appendix B: "avg. of FT 1&2").
            weights: their weights, normalised here; equal when not given.
            average: False takes the weights as they are: ΔW = Σ weight·(W1 − W0).
            name: of the matrix.
            order: see there; 0 for ``rows``.

        Raises:
            TypeError, ValueError: see :func:`check_weights`; or the averaging weights are wrong.
        """
        check_weights(pretrained, finetuned, name)
        weights = weights if weights is not None else [1.0] * len(finetuned)
        if len(weights) != len(finetuned):
            raise ValueError(
                f"there are {len(weights)} weights for {len(finetuned)} fine-tuned models: "
                f"{list(weights)}"
            )
        self.name = name
        self._weights = normalise(weights) if average else list(weights)
        self._origin, self._reason = pretrained.device, ""
        # The difference of two bf16 or fp16 numbers is exact in float32, but for entries 2^16
        # apart; of two close float32 numbers it is exact too (Sterbenz). A weighted sum of
        # differences is not, hence float64 for averages.
        exact = pretrained.dtype != torch.float64 and self._weights == [1.0]
        self.dtype = torch.float32 if exact else torch.float64
        if pretrained.device.type == "mps":
            self._move(pretrained, finetuned, f"no float64 on {pretrained.device}")
        else:
            self._hold(pretrained, finetuned)
        self.order = order or self.rows

    def _hold(self, pretrained: Tensor, finetuned: Sequence[Tensor]) -> None:
        self.pretrained, self.finetuned = pretrained, tuple(finetuned)
        self._base = self.tall(pretrained)
        self._tuned = [self.tall(w) for w in finetuned]
        self.rows, self.width = self._base.shape
        self.device = pretrained.device

    # -- the CPU in place of an accelerator ---------------------------------------------------

    def _move(self, pretrained: Tensor, finetuned: Sequence[Tensor], reason: str) -> None:
        self._reason = reason
        self._hold(pretrained.cpu(), [w.cpu() for w in finetuned])

    def continue_on_cpu(self, error: RuntimeError) -> None:
        """Move the inputs to the CPU after ``error``, once.

        Raises:
            RuntimeError: ``error`` itself, unless it says that the accelerator is out of memory.
        """
        if self._reason or not out_of_memory(error):
            raise error
        reason = f"out of memory on {self.device}"
        LOG.warning("%s: %s, continuing on the CPU", self.name or "a tensor", reason)
        self._move(self.pretrained, self.finetuned, reason)

    def sent_back(self, weight: Tensor) -> Tensor:
        """Return a result on the device that the inputs came from."""
        return weight.to(self._origin)

    def solver_note(self, solver: str | None) -> str | None:
        """Return what computed the spectrum, and why that happened on the CPU if it did."""
        return f"{solver or 'none'}; {self._reason}" if self._reason else solver

    # -- blocks -------------------------------------------------------------------------------

    @staticmethod
    def tall(weight: Tensor) -> Tensor:
        """Return the (long, short) view of a weight.

        It is no copy where strides allow a view; they do for contiguous weights.
        """
        if weight.ndim < 2:
            return weight.reshape(-1, 1)
        matrix = weight.flatten(1)  # unlike reshape(out, -1), also of an empty tensor
        return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T

    @property
    def empty(self) -> bool:
        """Whether there is no entry, as in (0, n), (n, 0) or (0,)."""
        return self.pretrained.numel() == 0

    @property
    def rounded(self) -> bool:
        """Whether ΔW is off by one rounding to float32 per entry; other inputs leave it exact."""
        return self.dtype == self.pretrained.dtype == torch.float32

    @property
    def transposed(self) -> bool:
        """Whether the tall view is ΔWᵀ, because out < rest."""
        return len(self.pretrained) < self.rows

    def blocks(self) -> Iterator[Block]:
        """Yield W0 and ΔW in row blocks, all in ``self.dtype``."""
        step = max(1, block_elements(self.device) // max(1, self.width))
        for start in range(0, self.rows, step):
            index = slice(start, min(start + step, self.rows))
            base = self._base[index].to(self.dtype)
            # Not in place: .to() of an input that has the dtype already is that input, which is
            # only borrowed. In the memory order of W0, whatever that of W1 is: sums over two
            # blocks run through both as they lie.
            deltas = [
                torch.sub(tuned[index].to(self.dtype), base, out=torch.empty_like(base))
                for tuned in self._tuned
            ]
            yield Block(index, base, self._combine(deltas), deltas)

    def deltas(self) -> Iterator[Tensor]:
        """Yield ΔW in row blocks (rows, width) of the tall view."""
        for block in self.blocks():
            yield block.delta

    def _combine(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return ΔW of a block; a single update of weight 1 as it is."""
        first, *others = deltas
        if self._weights == [1.0]:
            return first
        combined = first * self._weights[0]
        for weight, other in zip(self._weights[1:], others, strict=True):
            combined.add_(other, alpha=weight)
        return combined

    def norms(self) -> Norms:
        """Return ‖ΔW‖_F and ‖W0‖_F, summed over blocks in float64.

        Raises:
            NonFiniteError: an input has NaN or infinite entries (which would pass arithmetic in
                silence).
            OverflowError: the inputs are finite, their squares are not, not even in float64.
        """
        norms = self._norms(self.dtype)
        if not all(map(math.isfinite, norms)):
            counts = [int((~torch.isfinite(w)).sum()) for w in (self._base, *self._tuned)]
            if any(counts):
                raise NonFiniteError(counts, self.name)
            self.dtype = torch.float64  # W1 − W0 itself may leave the range of float32
        if not all(0 < norm < math.inf for norm in norms):
            # Squares may leave the range of float32; eight times slower.
            norms = self._norms(torch.float64)
        if not all(map(math.isfinite, norms)):
            prefix = f"{self.name}: " if self.name else ""
            raise OverflowError(
                f"{prefix}its entries are so large that their squares overflow float64 "
                f"(‖ΔW‖ {norms.update}, ‖W0‖ {norms.pretrained})"
            )
        return norms

    def _norms(self, dtype: torch.dtype) -> Norms:
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            norms = [
                torch.linalg.vector_norm(flat(x), dtype=dtype) for x in (block.delta, block.base)
            ]
            squares += torch.stack(norms).double().square()
        return Norms(*squares.sqrt().tolist())


def flat(block: Tensor) -> Tensor:
    """Return all entries of a block in the order of memory, without a copy.

    Blocks of wide matrices are column-major.
    """
    return (block.T if block.stride(0) == 1 else block).reshape(-1)


def check_weights(pretrained: Tensor, finetuned: Sequence[Tensor], name: str = "") -> None:
    """Check that weights can be subtracted from each other.

    Raises:
        TypeError: one is no tensor.
        ValueError: there is no fine-tuned weight; or one is not floating point of 16 bits or more;
            or they differ in shape, dtype or device.
    """
    where = f"{name}: " if name else ""
    if not finetuned:
        raise ValueError(f"{where}no fine-tuned weight was given")
    for w in (pretrained, *finetuned):
        if not isinstance(w, Tensor):
            raise TypeError(f"weights must be torch tensors, got {type(w).__name__}")
        if w.is_floating_point() and w.dtype.itemsize == 1:
            raise ValueError(f"{where}{w.dtype}: {QUANTISED}")
        alike = (w.shape, w.dtype, w.device) == (
            pretrained.shape,
            pretrained.dtype,
            pretrained.device,
        )
        if not w.is_floating_point() or not alike:
            raise ValueError(
                f"{where}weights must be floating point and agree in shape, dtype and device: the "
                f"pretrained one is {tuple(pretrained.shape)} {pretrained.dtype} on "
                f"{pretrained.device}, a fine-tuned one {tuple(w.shape)} {w.dtype} on {w.device}"
            )
