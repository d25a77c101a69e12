"""Updates with prescribed spectra.

ΔW = U diag(σ) Vᵀ, so that k, P_k, ρ and λ can be checked against known numbers.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def with_spectrum(sigma: Array, out: int, rest: int, seed: int = 0) -> Array:
    """(out, rest) float64 with singular values ``sigma`` and Haar-random singular vectors."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((out, len(sigma))))
    V, _ = np.linalg.qr(rng.standard_normal((rest, len(sigma))))
    return (U * sigma) @ V.T


def pretrained(out: int, rest: int, seed: int = 1) -> Array:
    """A weight of ordinary size: entries of standard deviation 0.02, as Qwen3 is initialised."""
    return 0.02 * np.random.default_rng(seed).standard_normal((out, rest))


def deltas(out: int = 192, rest: int = 320, seed: int = 0) -> dict[str, Array]:
    """The zoo, each scaled to 1 % of the pretrained weight's norm."""
    rng = np.random.default_rng(seed)
    s = min(out, rest)
    i = np.arange(1, s + 1)
    lora = with_spectrum(rng.uniform(0.5, 1.5, 16), out, rest, seed)
    noise = rng.standard_normal((out, rest))
    random = rng.standard_normal((out, rest))
    spike = random + with_spectrum(np.array([1000.0 * np.sqrt(s)]), out, rest, seed)
    zoo = {
        "random": random,
        "power law 0.5": with_spectrum(i**-0.5, out, rest, seed),
        "power law 1": with_spectrum(1.0 / i, out, rest, seed),
        "power law 2": with_spectrum(i**-2.0, out, rest, seed),
        "low rank": lora,
        "low rank + noise": lora + 2e-3 * noise * np.linalg.norm(lora) / np.linalg.norm(noise) * 10,
        "exponential": with_spectrum(np.exp(-np.log(1e8) * (i - 1) / (s - 1)), out, rest, seed),
        "spiked": spike,
        "repeated": with_spectrum(np.repeat([4.0, 2.0, 1.0], [8, 56, s - 64]), out, rest, seed),
        "orthogonal": with_spectrum(np.ones(s), out, rest, seed),
        "rank one": with_spectrum(np.array([3.0]), out, rest, seed),
        "tiny tail": with_spectrum(
            np.concatenate([np.ones(32), np.full(s - 32, 1e-10)]), out, rest, seed
        ),
    }
    size = 0.01 * np.linalg.norm(pretrained(out, rest))
    return {name: delta * size / np.linalg.norm(delta) for name, delta in zoo.items()}


KINDS = tuple(deltas(64, 64))
