"""Singular values of a tall matrix X, and orthonormal bases of its singular subspaces.

Knows nothing about merging. Everything comes from the float64 Gram matrix G = XᵀX of the *short*
side: σ² are its eigenvalues, and eigenvectors are computed only for the smaller of the two sides
of a cut. Left singular vectors are never formed.

Accuracy: eigenvalues of G carry an absolute error of up to some 30 eps·σ₁², so singular values
under about 1e-7·σ₁ drown. They are computed again from one more Gram matrix, in the subspace that
G leaves open (:func:`_resolve`), after which the floor is that of a float64 SVD, eps·σ₁. Exactly
low-rank updates (a merged LoRA) need this: hundreds of phantom singular values of 1e-8·σ₁ would
move the effective rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel.eigen import EPS, LOG, THREADED_ORDER, Eigen
from mergekit_monosoup.kernel.lapack import call, one_thread_each
from mergekit_monosoup.kernel.threads import one_torch_thread

# Eigenvalues of G under this fraction of the largest are computed again. Measured over the test
# matrices (192 to 512 columns), the largest error is 7e-15 of the largest eigenvalue, so σ just
# above the line is right to 1 % and the rest better.
UNRESOLVED = 2e3 * EPS

# Gram matrices of fewer products than this take one thread of BLAS. Two threads against one on two
# quiet cores: 1024 x 3072 (2^32 products) 14 ms less of 85, 1536 x 4096 (2^33) 90 of 280, 37984 x
# 1024 (2^35) 490 of 1150; but OpenBLAS's second thread waits for more work by spinning, for 100 ms
# and more of processor time, in the way of whatever comes next.
THREADED_PRODUCTS = 2**34

# Places at which a spectrum is stored on request: enough for a smooth curve, 0.3 kB a matrix.
POINTS = 33

Blocks = Callable[[], Iterable[Tensor]]


def gram(blocks: Iterable[Tensor], width: int, device: torch.device) -> Tensor:
    """Return XᵀX, (width, width) float64, summed over row blocks (rows, width) of X.

    Only its lower triangle is defined. On the CPU it is computed by BLAS's dsyrk, which computes
    one triangle: measured 0.5 of the time of a float64 GEMM.
    """
    # Column-major, as LAPACK wants it.
    total = torch.zeros(width, width, dtype=torch.float64, device=device).T
    for block in blocks:
        block = block.double()
        if device.type == "cpu":
            _add_gram(total, block)
        else:
            total.addmm_(block.T, block)
    return total


def _add_gram(total: Tensor, block: Tensor) -> None:
    """Add XᵀX of one float64 block to the lower triangle of ``total``."""
    # BLAS reads column-major memory: a row-major block is its own transpose there. Neither case
    # copies.
    width, rows = len(total), len(block)
    across = block.stride(0) == 1 and block.stride(1) == rows
    x = (block if across else block.contiguous()).numpy()
    turn, leading = (b"T", rows) if across else (b"N", width)
    call("dsyrk", b"L", turn, width, rows, 1.0, x, leading, 1.0, total.numpy(), width)


@contextmanager
def _gram_threads(rows: int, width: int) -> Iterator[None]:
    """Let the Gram matrix of a (rows, width) matrix take as many threads as pay."""
    large = width >= THREADED_ORDER or rows * width**2 >= THREADED_PRODUCTS
    with one_torch_thread(), nullcontext() if large else one_thread_each():
        yield


def nonzero_rows(block: Tensor) -> Tensor | None:
    """Return the indices (n,) of the rows of a row-major block (rows, s) that are not zero.

    None where dropping the others is no gain. Most rows of an embedding belong to tokens that
    fine-tuning never saw. Only on the CPU: a number of rows that depends on the data would stall
    an accelerator. A look at 16 columns costs nothing and tells where no row is zero; one column
    would not tell, for half of the entries of a small bfloat16 update are zero.
    """
    if (
        block.device.type != "cpu"
        or block.stride(-1) != 1
        or int(block[:, :16].any(1).sum()) > 0.9 * len(block)
    ):
        return None
    rows = block.any(1).nonzero()[:, 0]
    return rows if len(rows) <= 0.9 * len(block) else None


def _without_zero_rows(block: Tensor) -> Tensor:
    """Drop the rows that are zero: neither a Gram matrix nor a triangular factor needs them."""
    rows = nonzero_rows(block)
    return block if rows is None else block[rows]


def effective_rank(sigma: Tensor) -> float:
    """Return exp(−Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007; paper, Eq. 3); 0·ln 0 is 0.

    ``sigma``: (s,), at least one of them above zero.
    """
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())


def quantile_curve(sigma: Tensor, points: int) -> list[float]:
    """Return σ/σ₁ at equally spaced places of the spectrum, interpolated.

    That is the shape of a spectrum, whatever its length. ``sigma``: (s,), descending.
    """
    where = torch.linspace(0, len(sigma) - 1, points, dtype=torch.float64, device=sigma.device)
    below = where.long()
    above = (below + 1).clamp(max=len(sigma) - 1)
    return _relative(torch.lerp(sigma[below], sigma[above], where - below), sigma[0])


def leading_values(sigma: Tensor, count: int) -> list[float]:
    """Return σ/σ₁ of the first ``count`` singular values. ``sigma``: (s,), descending."""
    return _relative(sigma[:count], sigma[0])


def _relative(sigma: Tensor, first: Tensor) -> list[float]:
    """Return σ/σ₁ with four digits: a drawing needs no more, and they are a third of the bytes."""
    return [float(f"{value:.4g}") for value in (sigma / first).tolist()]


class Spectrum:
    """Singular values, and on demand right singular vectors, of a tall X (rows, s).

    Attributes:
        sigma: (s,) float64 on the CPU, descending; values under max(rows, s)·eps·σ₁ are exactly
            0, as in ``numpy.linalg.matrix_rank``.
        rank: how many are not 0.
    """

    def __init__(
        self,
        blocks: Blocks,
        rows: int,
        width: int,
        device: torch.device,
        eigen: Callable[[], Eigen] | None = None,
    ):
        """Compute the singular values.

        Memory: five (width, width) float64 buffers beside the block at hand.

        Args:
            blocks: yields row blocks (rows_i, width) of X; it is called once unless G is known
                already, once more if G leaves a tail open, and once more for the last rung.
            rows, width, device: of X.
            eigen: decomposes a G that is known already.

        Raises:
            SolverError: no rung of the ladder, down to a float64 SVD, gave a result that verifies.
        """
        self._all_blocks, self._width = blocks, width
        self._tail: Tensor | None = None
        self._eigen: Eigen | None = None
        try:
            if eigen is None:
                with _gram_threads(rows, width):
                    eigen = partial(Eigen, gram(self._blocks(), width, device))
            self._eigen = eigen()
            del eigen  # it holds the Gram matrix, which the last rung does without
            self.sigma = self._eigen.values.flip(0).clamp(min=0).sqrt()
            self._open_from = int((self.sigma > UNRESOLVED**0.5 * self.sigma[0]).sum())
            if self._open_from < width:
                open_subspace = self._eigen.vectors(0, width - self._open_from)
                self.sigma[self._open_from :], self._tail = _resolve(self._blocks(), open_subspace)
        except SolverError as error:
            self._decompose(str(error))
        self.sigma[self.sigma <= max(rows, width) * EPS * self.sigma[0]] = 0
        self.rank = int((self.sigma > 0).sum())

    def _blocks(self) -> Iterable[Tensor]:
        return map(_without_zero_rows, self._all_blocks())

    @property
    def solver(self) -> str:
        """What computed the singular values or the last vectors, with the failures before it."""
        return self._eigen.solver if self._eigen is not None else self._last_rung

    def projection(self, k: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Return a basis of the smaller side of the cut at k, and whether that is the leading side.

        The basis Q is (s, j). P_k = QQᵀ when the side is the leading one, I − QQᵀ when it is not;
        both carry the same information, one costs less.
        """
        leading = 2 * k <= self._width
        start, stop = (0, k) if leading else (k, self._width)
        return self._verified_vectors(start, stop).to(dtype), leading

    def vectors(self) -> Tensor:
        """Return the right singular vectors of the singular values that are not 0.

        (s, rank) float64, in their order.
        """
        vectors = self._verified_vectors(0, self.rank)
        if self._eigen is not None:  # eigenvectors come in ascending order
            resolved = min(self.rank, self._open_from)
            vectors[:, :resolved] = vectors[:, :resolved].flip(1)
        return vectors

    def _verified_vectors(self, start: int, stop: int) -> Tensor:
        """Return :meth:`_vectors`, from the last rung of the ladder where the others fail."""
        try:
            return self._vectors(start, stop)
        except SolverError as error:
            self._decompose(str(error))
            return self._vectors(start, stop)

    def _vectors(self, start: int, stop: int) -> Tensor:
        """Return the right singular vectors of ``sigma[start:stop]``, a new tensor.

        Those that G resolves come in ascending order.
        """
        parts = []
        if self._eigen is not None and start < (end := min(stop, self._open_from)):
            parts.append(self._eigen.vectors(self._width - end, self._width - start))
        if self._tail is not None and stop > self._open_from:
            parts.append(self._tail[:, max(start - self._open_from, 0) : stop - self._open_from])
        return torch.cat(parts, dim=1)

    def _decompose(self, reason: str) -> None:
        """Take the last rung: a float64 SVD on the CPU.

        It decomposes the triangular factor of X, so that X still streams.
        """
        LOG.warning("falling back to a float64 SVD on the CPU: %s", reason)
        # Named for the tensor below: in a thread of --multi-gpu new tensors are made on its GPU.
        device = torch.device("cpu")
        triangle = torch.empty(0, self._width, dtype=torch.float64, device=device)
        try:
            for block in self._blocks():
                device = block.device
                triangle = torch.linalg.qr(torch.cat([triangle, block.double().cpu()]), mode="r").R
            _, sigma, vectors = torch.linalg.svd(triangle, full_matrices=False)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SolverError(f"{reason}; float64 SVD failed: {error}") from error
        self.sigma, self._tail, self._open_from = sigma, vectors.T.to(device), 0
        self._eigen, self._last_rung = None, f"svd; {reason}"


def _resolve(blocks: Iterable[Tensor], subspace: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values (q,) of X·subspace, descending, and their vectors (s, q).

    X·subspace no longer contains the large singular values, so its own Gram matrix resolves the
    small ones. The vectors are those of X.
    """
    width = subspace.shape[1]
    small = Eigen(gram((block.double() @ subspace for block in blocks), width, subspace.device))
    return small.values.flip(0).clamp(min=0).sqrt(), subspace @ small.vectors(0, width).flip(1)
