"""Eigenvalues of a symmetric matrix first, eigenvectors of one end of the spectrum after: solvers and the ladder of them.

On the CPU: one tridiagonalisation (dsytrd) gives all eigenvalues (dsterf) without any eigenvector;
the cut is known then, and only the vectors of its smaller side are transformed back (dormqr). On an accelerator:
``torch.linalg.eigh`` there. What fails, in either, goes one rung down, and the last rung is a plain decomposition on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import scipy.linalg.lapack as lapack
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

LOG = logging.getLogger("mergekit_monosoup")
EPS = float(np.finfo(np.float64).eps)

# Backward errors of LAPACK's symmetric solvers are a few eps·‖A‖ (measured here: residuals of at most 4e-15·‖A‖_F over the
# test matrices and at order 2048). A solver that is off by hundreds of times that has failed without saying so.
RESIDUAL = 1e-12


class SolverError(RuntimeError):
    """A solver did not converge, or its result does not satisfy A·Q = Q·Λ."""


class Solver(Protocol):
    """Eigenvalues of the symmetric (s, s) float64 matrix whose *lower* triangle is given."""

    name: str
    values: Tensor  #: (s,) float64 on the CPU, ascending

    def vectors(self, start: int, stop: int) -> Tensor:
        """Orthonormal eigenvectors (s, stop − start) of ``values[start:stop]``, float64, on the device of the matrix."""
        ...


class Lapack:
    """Tridiagonalise once; the equal of ``scipy.linalg.eigh(a, subset_by_index=…)`` without starting over for the vectors."""

    name = "lapack"

    def __init__(self, lower: Tensor):
        a = np.asfortranarray(lower.numpy())
        order = a.shape[0]
        work, info = lapack.dsytrd_lwork(order, lower=1)
        self._reflectors, self._diagonal, self._off, self._tau, info = lapack.dsytrd(a, lower=1, lwork=int(work))
        values, info = (self._diagonal, 0) if order == 1 else lapack.dsterf(self._diagonal, self._off)
        if info != 0:
            raise SolverError(f"dsterf did not converge ({info} eigenvalues missing)")
        self.values = torch.from_numpy(np.array(values))

    def vectors(self, start: int, stop: int) -> Tensor:
        if len(self.values) == 1:
            return torch.ones(1, stop - start, dtype=torch.float64)
        wanted = self._tridiagonal_vectors(start, stop)
        tail = np.asfortranarray(wanted[1:])
        reflectors = np.asfortranarray(self._reflectors[1:, :-1])
        _, work, _ = lapack.dormqr(b"L", b"N", reflectors, self._tau, tail, -1)
        wanted[1:], _, info = lapack.dormqr(b"L", b"N", reflectors, self._tau, tail, int(work[0]), overwrite_c=1)
        if info != 0:
            raise SolverError(f"dormqr failed (info {info})")
        return torch.from_numpy(wanted)

    def _tridiagonal_vectors(self, start: int, stop: int) -> np.ndarray:
        """(s, stop − start), column-major. Few by inverse iteration, many by divide and conquer, which gives all of them.

        dstein orthogonalises within clusters, so its time grows with the square of the count, dstevd's with the cube of the
        order. Measured: order 1024, dstevd 0.09 s, dstein 0.02-0.04 s for 20 % and 0.05-0.08 s for 50 %; order 2048, dstevd
        0.54 s, dstein 0.09 s for 10 %, 0.13-0.36 s for 20 %, 0.4-3.6 s for 50 %.
        """
        order, count = len(self.values), stop - start
        d, e = self._diagonal, self._off
        # dstein must be told where a matrix falls apart; where one does, dstevd needs no telling.
        splits = np.abs(e) <= EPS * (np.abs(d[:-1]) + np.abs(d[1:]))
        if count**2 <= 128 * order and not splits.any():
            block, ends = np.ones(order, np.int32), np.full(order, order, np.int32)
            vectors, info = lapack.dstein(d, e, self.values[start:stop].numpy(), block, ends)
            if info == 0:
                return np.asfortranarray(vectors[:, :count])
        if not hasattr(lapack, "dstevd"):  # SciPy < 1.16; 1.15 is the newest for Python 3.10. Twice the time.
            return np.asfortranarray(eigh_tridiagonal(d, e, lapack_driver="stemr")[1][:, start:stop])
        _, vectors, info = lapack.dstevd(d, e)
        if info != 0:
            raise SolverError(f"dstevd did not converge (info {info})")
        return np.asfortranarray(vectors[:, start:stop])


class Eigh:
    """``torch.linalg.eigh`` on the device of the matrix: values and all vectors at once."""

    name = "eigh"

    def __init__(self, lower: Tensor):
        values, self._vectors = torch.linalg.eigh(lower, UPLO="L")
        self.values = values.cpu()

    def vectors(self, start: int, stop: int) -> Tensor:
        return self._vectors[:, start:stop]


class Eigen:
    """The ladder: eigenvalues and eigenvectors from the first solver whose results verify.

    Attributes:
        values: (s,) float64 on the CPU, ascending.
        solver: name of the solver in use, with the failures that led to it.
    """

    def __init__(self, lower: Tensor):
        """``lower``: (s, s) float64, any device; only its lower triangle is read.

        Raises:
            SolverError: no solver succeeded; the message lists what each of them said.
        """
        self._lower = lower
        self._rungs = _rungs(lower)
        self._failures: list[str] = []
        self._climb()
        self.values = self._solver.values

    @property
    def solver(self) -> str:
        return self._solver.name + "".join(f"; {failure}" for failure in self._failures)

    def vectors(self, start: int, stop: int) -> Tensor:
        """Orthonormal eigenvectors (s, stop − start) of ``values[start:stop]``, float64, on the device of the matrix."""
        while True:
            try:
                vectors = self._solver.vectors(start, stop).to(self._lower.device)
                _verify_vectors(self._lower, self.values[start:stop], vectors)
            except FAILURES as error:
                self._note(error)
                self._climb()
            else:
                return vectors

    def _climb(self) -> None:
        for name, attempt in self._rungs:
            self._name = name
            try:
                self._solver = attempt()
                _verify_values(self._lower, self._solver.values)
            except FAILURES as error:
                self._note(error)
            else:
                return
        raise SolverError("; ".join(self._failures))

    def _note(self, error: Exception) -> None:
        self._failures.append(f"{self._name} failed: {error}")
        LOG.info("eigensolver %s failed (%s)", self._name, error)


# What a solver may raise; anything else is a bug and must be seen.
FAILURES = (SolverError, np.linalg.LinAlgError, torch.linalg.LinAlgError, torch.OutOfMemoryError, MemoryError)  # type: ignore[attr-defined]


def _rungs(lower: Tensor) -> Iterator[tuple[str, Callable[[], Solver]]]:
    if lower.device.type != "cpu":
        yield f"eigh on {lower.device}", lambda: Eigh(lower)
    yield "lapack", lambda: Lapack(lower.cpu())
    yield "eigh", lambda: Eigh(lower.cpu())


def _verify_values(lower: Tensor, values: Tensor) -> None:
    """Trace and Frobenius norm are those of the matrix."""
    diagonal = lower.diagonal()
    square = float(2 * lower.tril(-1).square().sum() + diagonal.square().sum())
    trace_error = abs(float(diagonal.sum()) - float(values.sum()))
    square_error = abs(square - float(values.square().sum()))
    # Written so that NaN fails.
    if not (trace_error <= RESIDUAL * len(values) * square**0.5 and square_error <= RESIDUAL * len(values) * square):
        raise SolverError(f"eigenvalues miss the trace by {trace_error:.1e} and the norm² by {square_error:.1e}")


def _verify_vectors(lower: Tensor, values: Tensor, vectors: Tensor) -> None:
    """A·Q·w = Q·Λ·w and QᵀQ·w = w for one w with no zero entries; costs two passes over A and Q."""
    probe = torch.arange(1, vectors.shape[1] + 1, dtype=torch.float64, device=vectors.device).cos()
    direction = vectors @ probe
    triangle = lower.tril()
    image = triangle @ direction + triangle.T @ direction - lower.diagonal() * direction
    scale = float(lower.diagonal().abs().max()) * len(lower) ** 0.5 * float(probe.norm())
    residual = float((image - vectors @ (values.to(vectors.device) * probe)).norm())
    skew = float((vectors.T @ direction - probe).norm())
    if not (residual <= RESIDUAL * scale and skew <= RESIDUAL * len(lower) * float(probe.norm())):
        raise SolverError(f"eigenvectors leave a residual of {residual:.1e} (matrix {scale:.1e}), skewness {skew:.1e}")
