"""Ways to the edited update that the package does not take, beside the one it takes; any device.

    python benchmarks/experiments.py [--device cpu] [--threads 1] [--repeat 2]
        [--shapes 1024x3072 1024x1024 2048x2048]

* `float32`: Gram matrix, eigenvalues and eigenvectors in float32, with the error that a certificate
  predicts (`predicted`). What rounding did is measured on random vectors as ‖E‖_F; to first order
  ‖X(P̂ − P)‖_F² = Σ_{i<=k<j} E_ij²·(λ_i + λ_j)/(λ_i − λ_j)², with ‖E‖_F/s for every E_ij, for
  rounding has no preferred direction.
* `sign`: float64 eigenvalues, no eigenvectors; the projector is (1 + sign(G − μ))/2 by a scaled
  Newton-Schulz iteration in float32 (Chen & Chow 2014), with Rayleigh-Ritz in float64 for the
  eigenvalues that it leaves between −1 and 1.
* `entropy`: no eigenvalues either, only the effective rank: Σσ ln σ is the derivative at 1/2 of
  Σλ^α = (α sin πα/π)·∫ ln det(1 + G/t)·t^(α−1) dt, by the trapezoid rule in ln t, a Cholesky factor
  at every node.

The first two clip outlying eigenvalues, beside which float32 would lose the others. Times are from
X (rows, s) on the device to effective rank and edited update; `ratio` is the package's time over
this one's. Errors are those of the edited update, relative to a float64 SVD, and of the effective
rank. The programs take turns and the fastest run counts. Threads are set before anything is loaded,
by starting again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import kernel  # noqa: E402

from mergekit_monosoup import terminal  # noqa: E402
from mergekit_monosoup.kernel.monosoup import Split, split_rank  # noqa: E402
from mergekit_monosoup.kernel.spectrum import Spectrum, effective_rank  # noqa: E402

ROWS = 1024  # summed in float32 before they join the float64 sum
OUTLIER = 8.0  # times the mean of the eigenvalues below
PROBES = 8
STEP = 1.3  # of the integral in ln t, from 1e-9 of the mean eigenvalue to 1000 times their sum
OPEN = 2e-3  # eigenvalues of G − μ under this, relative to the largest, are left to Rayleigh-Ritz

Result = tuple[float, Tensor | None, float | None]  # effective rank, edited update, predicted error


@terminal.output()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["1024x3072", "1024x1024", "2048x2048"])
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads)
    )
    if not limits.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)
    print(
        f"{'shape':>12} {'kind':>7} {'way':>8} {'seconds':>8} {'ratio':>6} {'rank off by':>12} "
        f"{'error':>8} {'predicted':>9}"
    )
    rows = []
    for shape in options.shapes:
        for kind in ("random", "lora"):
            rows += compare(shape, kind, options)
    print(json.dumps({"device": options.device, "threads": options.threads, "rows": rows}))


def compare(shape: str, kind: str, options: argparse.Namespace) -> list[dict]:
    W0, W1 = kernel.pair(*map(int, shape.split("x")), kind)
    delta = W1.float() - W0.float()
    x = (delta if delta.shape[0] >= delta.shape[1] else delta.T).contiguous().to(options.device)
    exact_rank, exact = oracle(x)
    best: dict[str, tuple[float, Result]] = {}
    for _ in range(options.repeat):
        for name, way in WAYS.items():
            started = time.perf_counter()
            result = way(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            best[name] = min(
                best.get(name, (math.inf, result)), (seconds, result), key=lambda pair: pair[0]
            )
    rows = []
    for name, (seconds, (rank, update, predicted)) in best.items():
        error = None if update is None else float((update.double() - exact).norm() / exact.norm())
        row = {
            "shape": shape,
            "kind": kind,
            "way": name,
            "seconds": round(seconds, 4),
            "ratio": round(best["package"][0] / seconds, 2),
            "rank_error": rank - exact_rank,
            "error": error,
            "predicted": predicted,
        }
        words = [f"{value:.1e}" if value is not None else "-" for value in (error, predicted)]
        print(
            f"{shape:>12} {kind:>7} {name:>8} {seconds:>8.3f} {row['ratio']:>6.2f} "
            f"{row['rank_error']:>12.1e} "
            f"{words[0]:>8} {words[1]:>9}",
            flush=True,
        )
        rows.append(row)
    return rows


def oracle(x: Tensor) -> tuple[float, Tensor]:
    U, sigma, Vt = torch.linalg.svd(x.double(), full_matrices=False)
    rank = effective_rank(sigma)
    k, (high, low) = cut(sigma)
    scale = torch.full_like(sigma, low)
    scale[:k] = high
    return rank, (U * (sigma * scale)) @ Vt


def cut(sigma: Tensor) -> tuple[int, tuple[float, float]]:
    k = split_rank(sigma, "freevariance", 0.8)
    return k, Split.at(sigma, k).coefficients("monosoup")


def package(x: Tensor) -> Result:
    spectrum = Spectrum(lambda: x.split(ROWS), *x.shape, x.device)
    k, (high, low) = cut(spectrum.sigma)
    basis, leading = spectrum.projection(k, x.dtype)
    inside, outside = (high, low) if leading else (low, high)
    return (
        effective_rank(spectrum.sigma),
        torch.addmm(x, x @ basis, basis.T, beta=outside, alpha=inside - outside),
        None,
    )


def single(x: Tensor) -> Result:
    clipped = Clipped(sum_of_products(x))
    values, vectors = torch.linalg.eigh(clipped.matrix.float())
    ascending = clipped.restored(values.double())
    sigma = ascending.flip(0).clamp(min=0).sqrt().cpu()
    k, (high, low) = cut(sigma)
    count = len(clipped.values)
    vectors[:, len(values) - count :] = clipped.basis.flip(1).float()
    basis = vectors[:, len(values) - k :] if 2 * k <= len(values) else vectors[:, : len(values) - k]
    inside, outside = (high, low) if 2 * k <= len(values) else (low, high)
    update = torch.addmm(x, x @ basis, basis.T, beta=outside, alpha=inside - outside)
    # What the rounding did: the decomposition against XᵀX on vectors that it has not seen.
    probes = torch.randn(x.shape[1], PROBES, dtype=torch.float64, device=x.device)
    wide = vectors.double()
    image = wide @ (ascending[:, None] * (wide.T @ probes))
    for block in x.split(ROWS):
        image -= block.double().T @ (block.double() @ probes)
    rounding = float(image.norm()) / math.sqrt(PROBES)
    energy, apart = ascending.flip(0), values.double().flip(0)
    pairs = (energy[:k, None] + energy[k:]) / (apart[:k, None] - apart[k:]).square()
    moved = rounding / len(values) * math.sqrt(float(pairs.sum() / energy.sum()))
    kept = float(update.norm() / x.norm())
    return effective_rank(sigma), update, moved * abs(high - low) / kept


def sign(x: Tensor) -> Result:
    gram = sum_of_products(x, torch.float64)
    clipped = Clipped(gram)
    values = torch.linalg.eigvalsh(clipped.matrix)
    sigma = clipped.restored(values).flip(0).clamp(min=0).sqrt().cpu()
    k, (high, low) = cut(sigma)
    order = len(values)
    middle = float(values[order - k - 1] + values[order - k]) / 2 if k < order else 0.0
    shifted = clipped.matrix.clone()
    shifted.diagonal().sub_(middle)
    size = float((values - middle).abs().max())
    scales = scaling(OPEN)
    iterate = (shifted / size).float()
    for scale in scales:
        iterate = torch.addmm(
            iterate, iterate, iterate @ iterate, beta=1.5 * scale, alpha=-0.5 * scale**3
        )
    projector = (iterate + iterate.T) / 4
    projector.diagonal().add_(0.5)

    def unfinished(eigenvalues: Tensor) -> Tensor:
        """1 − S² where the iteration left it."""
        mapped = (eigenvalues - middle) / size
        for scale in scales:
            mapped = 0.5 * scale * mapped * (3 - (scale * mapped) ** 2)
        return 1 - mapped.square()

    basis = torch.randn(
        order, min(order, int((unfinished(values) > 1e-4).sum()) + 8), device=x.device
    )
    for _ in range(2):
        basis = torch.linalg.qr(basis - iterate @ (iterate @ basis)).Q
    basis = torch.linalg.qr(basis.double()).Q
    inner, turn = torch.linalg.eigh(basis.T @ (clipped.matrix @ basis))
    left = unfinished(inner) > 1e-3
    part, above = (basis @ turn)[:, left].float(), (inner[left] > middle).float()
    # What the iteration made of these directions is taken out, on both sides, and replaced.
    outside = projector - part @ (part.T @ projector)
    projector = outside - (outside @ part) @ part.T + (part * above) @ part.T
    return effective_rank(sigma), torch.addmm(x, x, projector, beta=low, alpha=high - low), None


def scaling(smallest: float) -> list[float]:
    """Factors of x <- αx(3 − (αx)²)/2, until [smallest, 1] is mapped to 1."""
    scales = []
    while smallest < 1 - 1e-7:
        scales.append(math.sqrt(3 / (1 + smallest + smallest**2)))
        smallest = min(1.0, 0.5 * scales[-1] * smallest * (3 - (scales[-1] * smallest) ** 2))
    return scales


def entropy(x: Tensor) -> Result:
    """Σσ = f(1/2) and Σσ ln σ = f'(1/2)/2 of f(α) = Σλ^α, λ = σ²."""
    gram = sum_of_products(x, torch.float64)
    trace, order = float(gram.trace()), len(gram)
    square, mean = float(gram.square().sum()), trace / order
    alpha, total, slope = 0.5, 0.0, 0.0
    factor = alpha * math.sin(math.pi * alpha) / math.pi
    derivative = math.sin(math.pi * alpha) / math.pi + alpha * math.cos(math.pi * alpha)
    lowest = logdet = 0.0
    for node in range(50, -50, -1):
        t = mean * math.exp(STEP * node)
        if t > 1e3 * trace:  # ln det(1 + G/t) is its series,
            logdet = trace / t - square / (2 * t**2)
        elif t > 1e-9 * mean:
            shifted = gram / t
            shifted.diagonal().add_(1)
            logdet, lowest = 2 * float(torch.linalg.cholesky(shifted).diagonal().log().sum()), t
        else:  # or ln det G − s·ln t
            logdet += order * math.log(lowest / t)
            lowest = t
        weight = logdet * t**alpha * STEP
        total += factor * weight
        slope += derivative * weight + factor * weight * math.log(t)
    return math.exp(math.log(total) - slope / 2 / total), None, None


def sum_of_products(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """XᵀX in float64, of products in ``dtype``."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for block in x.split(ROWS):
        block = block.to(dtype)
        total += block.T @ block
    return total


class Clipped:
    """Return G with its outlying eigenvalues lowered to a ceiling, by subspace iteration."""

    def __init__(self, gram: Tensor, block: int = 32, sweeps: int = 12):
        order = len(gram)
        basis, count = torch.randn(order, block, dtype=gram.dtype, device=gram.device), 0
        for sweep in range(sweeps):
            basis = torch.linalg.qr(basis).Q
            image = gram @ basis
            values, turn = torch.linalg.eigh(basis.T @ image)
            values, basis, image = values.flip(0), basis @ turn.flip(1), image @ turn.flip(1)
            below = (gram.trace() - values.cumsum(0)) / (
                order - torch.arange(1, block + 1, device=gram.device)
            )
            standing = int((values > OUTLIER * below).long().cumprod(0).sum())
            exact = int(
                ((image - basis * values).norm(dim=0) < 1e-7 * values[-1]).long().cumprod(0).sum()
            )
            count = min(standing, exact, block - 1)
            if sweep and count == standing:
                break
            basis = image
        self.values, self.basis = values[:count], basis[:, :count]
        ceiling = torch.minimum(2 * values[count], values[max(count - 1, 0)])
        self.matrix = gram - (self.basis * (self.values - ceiling)) @ self.basis.T

    def restored(self, ascending: Tensor) -> Tensor:
        """Eigenvalues of G from those of the clipped matrix."""
        return torch.cat([ascending[: len(ascending) - len(self.values)], self.values.flip(0)])


WAYS: dict[str, Callable[[Tensor], Result]] = {
    "package": package,
    "float32": single,
    "sign": sign,
    "entropy": entropy,
}


if __name__ == "__main__":
    main()
