"""Linear CKA by its definition, in NumPy."""

from __future__ import annotations

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)) of linear kernels K and L, items × items.

    H is the centring matrix.
    """
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l))
