"""The reference implementation for one matrix: float32 SVD, then rebuild the two parts.

The yardstick of the benchmarks. Written from the published equations and the description of its
scripts, not from its code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def edit(W0: Tensor, W1: Tensor, mode: str = "freevariance", R: float = 0.8) -> tuple[Tensor, int]:
    """Return (edited weight in the input dtype, k) of matrices (out, rest).

    Full SVD and reconstruction are in float32.
    """
    delta = (W1 - W0).reshape(W0.shape[0], -1).float()
    U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    energy = sigma**2 / (sigma**2).sum()
    if mode == "freevariance":
        p = sigma / sigma.sum()
        k = math.ceil(float(torch.exp(-(p * torch.log(p + 1e-12)).sum())))
    else:
        k = int((energy.cumsum(0) < R).sum()) + 1
    k = min(max(k, 1), len(sigma))
    rho = float((sigma[k] / (sigma[0] + 1e-12)) ** 2) if k < len(sigma) else 0.0
    low = min(max(rho + (1 - rho) * math.sqrt(max(1 - float(energy[:k].sum()), 0.0)), 0.0), 1.0)
    high_part = (U[:, :k] * sigma[:k]) @ Vt[:k]
    mono = (1 - low) * high_part + low * (delta - high_part)
    return (W0.float() + mono.reshape(W0.shape)).to(W1.dtype), k
