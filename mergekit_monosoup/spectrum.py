"""Singular values of a tall matrix X, and orthonormal bases of its singular subspaces. Knows nothing about merging.

Everything comes from the float64 Gram matrix G = XᵀX of the *short* side: σ² are its eigenvalues, and only as many
eigenvectors are used as the smaller of the two sides of a cut has. Left singular vectors are never formed.

Accuracy: eigenvalues of G carry an absolute error of a few eps·σ₁², so singular values under about 1e-7·σ₁ drown. They
are found again by one more step in the subspace that G leaves unresolved (:func:`_resolve_tail`), after which the floor
is that of a float64 SVD, eps·σ₁. Exactly low-rank updates (a merged LoRA) need this: hundreds of phantom singular values
of 1e-8·σ₁ would move the effective rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps

# Eigenvalues of G under this fraction of the largest are looked at again. Their error is at most a few eps (measured:
# 1e-16..6e-16 of the largest over the test matrices), so the ones above are right to 1e-3 and better.
UNRESOLVED = 2e3 * EPS


def gram(blocks: Iterable[Tensor], width: int, device: torch.device) -> Tensor:
    """XᵀX, (width, width) float64, summed over row blocks (rows, width) float64 of X."""
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    for block in blocks:
        total.addmm_(block.T, block)
    return total


def effective_rank(sigma: Tensor) -> float:
    """exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007; paper, Eq. 3). 0·ln 0 is 0. ``sigma``: (s,), at least one > 0."""
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())


@dataclass(frozen=True)
class Spectrum:
    """Singular values and right singular vectors of a tall X (rows, s).

    Attributes:
        sigma: (s,) float64 on the CPU, descending; values under max(rows, s)·eps·σ₁ are exactly 0, as in
            ``numpy.linalg.matrix_rank``.
        rank: how many are not 0.
        vectors: (s, s) float64 on X's device, column i belongs to ``sigma[i]``.
    """

    sigma: Tensor
    rank: int
    vectors: Tensor

    def projection(self, k: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Basis Q of the smaller side of the cut at k, and whether that side is the leading one.

        P_k = QQᵀ when it is, I − QQᵀ when it is not; both carry the same information, one costs less.
        """
        leading = 2 * k <= self.vectors.shape[1]
        basis = self.vectors[:, :k] if leading else self.vectors[:, k:]
        return basis.to(dtype), leading


def spectrum(blocks: Callable[[], Iterable[Tensor]], rows: int, width: int, device: torch.device) -> Spectrum:
    """Spectrum of the tall X whose row blocks ``blocks()`` yields (it is read once, or twice if G leaves a tail open).

    Memory: three (width, width) float64 buffers beside the block at hand.
    """
    values, vectors = torch.linalg.eigh(gram(blocks(), width, device))
    values, vectors = values.flip(0), vectors.flip(1)
    sigma = values.clamp_(min=0).sqrt().cpu()
    open_from = int((sigma > UNRESOLVED**0.5 * sigma[0]).sum())
    if open_from < width:
        sigma[open_from:] = _resolve_tail(blocks(), vectors[:, open_from:])
    sigma[sigma <= max(rows, width) * EPS * sigma[0]] = 0
    return Spectrum(sigma, int((sigma > 0).sum()), vectors)


def _resolve_tail(blocks: Iterable[Tensor], tail: Tensor) -> Tensor:
    """Singular values of X·tail, descending; rotates ``tail`` (width, q) in place to the matching singular vectors.

    X·tail no longer contains the large singular values, so its own Gram matrix resolves the small ones.
    """
    small = gram((block @ tail for block in blocks), tail.shape[1], tail.device)
    values, rotation = torch.linalg.eigh(small)
    tail.copy_(tail @ rotation.flip(1))
    return values.flip(0).clamp_(min=0).sqrt().cpu()
