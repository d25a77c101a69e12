"""Singular Value Calibration from its formulas: plain NumPy, a full float64 SVD, one loop.

Shares no code with the package.
"""

from __future__ import annotations

import numpy as np


def svc(W0, tasks, merged=None, weights=None, alpha=0.1, scaling=1.0, normalize=False):
    """(calibrated update, merged update, γ) of float64 matrices (out, rest)."""
    W0 = np.asarray(W0, np.float64)
    deltas = [np.asarray(W, np.float64) - W0 for W in tasks]
    if merged is None:
        weights = np.ones(len(deltas)) if weights is None else np.asarray(weights, float)
        update = scaling * sum(w * d for w, d in zip(weights, deltas, strict=True))
        if normalize:
            update = update / weights.sum()
    else:
        update = np.asarray(merged, np.float64) - W0
    U, sigma, Vt = np.linalg.svd(update, full_matrices=False)
    calibrated, gammas = np.zeros_like(update), []
    for u, value, v in zip(U.T, sigma, Vt, strict=True):
        if value <= max(update.shape) * np.finfo(float).eps * sigma[0]:
            break
        total = 0.0
        for delta in deltas:
            response = u @ delta
            silent = np.linalg.norm(response) <= 1e-9 * np.linalg.norm(delta)
            total += alpha if silent else max(alpha, value * (v @ response) / (response @ response))
        gammas.append(len(deltas) / total)
        calibrated += gammas[-1] * value * np.outer(u, v)
    return calibrated, update, np.array(gammas)
