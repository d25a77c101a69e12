"""MonoSoup from the paper's equations: plain NumPy, a float64 SVD, full matrices.

Shares no code with the package.
"""

from __future__ import annotations

import numpy as np


def monosoup(W0, W1, mode="freevariance", R=0.8, alpha=1.0, rule="monosoup"):
    """(edited delta before alpha, weight, numbers) of float64 matrices W0, W1 (out, rest)."""
    W0, W1 = np.asarray(W0, np.float64), np.asarray(W1, np.float64)
    delta = W1 - W0
    U, s, Vt = np.linalg.svd(delta, full_matrices=False)
    s = np.where(s <= max(delta.shape) * np.finfo(float).eps * s[0], 0.0, s)
    rank = int((s > 0).sum())
    p = s[s > 0] / s.sum()
    effective_rank = float(np.exp(-(p * np.log(p)).sum()))
    energy = s**2 / (s**2).sum()
    if mode == "freevariance":
        k = int(np.ceil(effective_rank * (1 - 1e-9)))
    else:
        k = next(i for i in range(1, len(s) + 1) if energy[i:].sum() <= (1 - R) * (1 + 1e-9))
    k = min(max(k, 1), rank)
    tail = energy[k:].sum()
    rho = (s[k] / s[0]) ** 2 if k < len(s) else 0.0
    cos = np.sqrt(tail)
    low = {"rho": rho, "cos": cos, "uniform": 0.5, "high": 0.0, "low": 1.0}.get(
        rule, rho + (1 - rho) * cos
    )
    high = 1.0 - low
    delta_high = (U[:, :k] * s[:k]) @ Vt[:k]
    delta_low = (U[:, k:] * s[k:]) @ Vt[k:]
    mono = high * delta_high + low * delta_low
    if rule == "scalar":
        high = low = np.linalg.norm(mono) / np.linalg.norm(delta)
        mono = high * delta
    numbers = dict(
        k=k,
        rank=rank,
        effective_rank=effective_rank,
        P_k=1 - tail,
        rho=rho,
        cos_alpha=cos,
        lambda_high=high,
        lambda_low=low,
        delta_norm=np.linalg.norm(delta),
    )
    return mono, W0 + alpha * mono, numbers
