"""Eigenvalues of a symmetric matrix, then eigenvectors of one end of its spectrum.

Several solvers, and the ladder of them: what one fails at, the next one tries.

On the CPU one tridiagonalisation (dsytrd) gives all eigenvalues (dsterf) without any eigenvector;
the cut is known then, and only the vectors of its smaller side are transformed back (dormtr). On
an accelerator: ``torch.linalg.eigh`` there. What fails, in either, goes one rung down, and the
last rung is a plain decomposition on the CPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel.lapack import call, integers, one_thread_each, solve

LOG = logging.getLogger("mergekit_monosoup")
EPS = float(np.finfo(np.float64).eps)

# Backward errors of LAPACK's symmetric solvers are a few eps·‖A‖ (measured here: residuals of at
# most 4e-15·‖A‖_F over the test matrices and at order 2048). A solver that is off by hundreds of
# times that has failed without saying so.
RESIDUAL = 1e-12

# Columns per step of a norm: its masked copy must fit the cache.
PANEL = 256

# Vectors per call of dstein. Measured for 409 of order 2048: groups of 4 70 ms, 32 81 ms, 128
# 123 ms, all at once 260 ms; the inner products that are left grow from 4e-13 (32) to 2e-12 (4).
GROUP = 32

# Matrices of this order and larger ones take the threads that the user gives BLAS. Two threads
# against one on two quiet cores, ratios of wall and of processor time: dsytrd with dsterf at order
# 1024 0.78 and 1.50, at 1536 0.76 and 1.50, at 2048 0.53 and 1.08, at 4096 0.58 and 1.13. Where the
# cores have other work, too, the thousands of small products that dsytrd is made of wait for each
# other: 10 to 37 times the processor time at order 1024.
THREADED_ORDER = 2048


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device has too little memory.

    Libraries that allocate beside torch say so in words of their own
    ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate").
    """
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


class Solver(Protocol):
    """One solver's eigenvalues of a symmetric (s, s) float64 matrix; eigenvectors on demand.

    It is given the *lower* triangle of the matrix.
    """

    name: str
    values: Tensor  #: (s,) float64 on the CPU, ascending

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return orthonormal eigenvectors of ``values[start:stop]``.

        (s, stop − start) float64, on the device of the matrix.
        """
        ...


Rung = tuple[str, Callable[[], Solver]]


class Lapack:
    """LAPACK on the CPU: tridiagonalise once, then values, then the vectors that are asked for.

    The equal of ``scipy.linalg.eigh(a, subset_by_index=…)`` without starting over for the vectors.
    """

    name = "lapack"

    def __init__(self, lower: Tensor):
        order = self._order = len(lower)
        # A copy: the reflectors take the place of the matrix, which is still needed to verify the
        # result.
        self._reflectors = np.array(lower.numpy(), order="F")
        self._diagonal, self._off, self._tau = np.empty(order), np.empty(order), np.empty(order)
        work = np.empty(32 * order)  # the block size that LAPACK asks for; 64 is no faster
        info = solve(
            "dsytrd",
            b"L",
            order,
            self._reflectors,
            order,
            self._diagonal,
            self._off,
            self._tau,
            work,
            len(work),
        )
        values, off = self._diagonal.copy(), self._off.copy()
        info = info or solve("dsterf", order, values, off)
        if info != 0:
            raise SolverError(f"dsterf did not converge ({info} eigenvalues missing)")
        self.values = torch.from_numpy(values)

    def vectors(self, start: int, stop: int) -> Tensor:
        order, vectors = self._order, self._tridiagonal_vectors(start, stop)
        count = vectors.shape[1]
        work = np.empty(64 * max(1, count))
        info = solve(
            "dormtr",
            b"L",
            b"L",
            b"N",
            order,
            count,
            self._reflectors,
            order,
            self._tau,
            vectors,
            order,
            work,
            len(work),
        )
        if info != 0:
            raise SolverError(f"dormtr failed (info {info})")
        return torch.from_numpy(vectors)

    def _tridiagonal_vectors(self, start: int, stop: int) -> np.ndarray:
        """Return vectors of the tridiagonal matrix, (s, stop − start), column-major.

        Up to half of them by inverse iteration, more by divide and conquer, which gives all.
        Measured, 1 thread: order 1024, a fifth 0.026 s, half 0.071 s, dstevd 0.080 s; order 2048
        0.12, 0.38 and 0.45 s; order 4096 0.54, 2.3 and 3.2 s.
        """
        order = self._order
        d, e = self._diagonal, self._off[: order - 1]
        # dstein must be told where a matrix falls apart; where one does, dstevd needs no telling.
        splits = np.abs(e) <= EPS * (np.abs(d[:-1]) + np.abs(d[1:]))
        if 2 * (stop - start) <= order and not splits.any():
            vectors = _inverse_iteration(d, e, self.values[start:stop].numpy())
            if vectors is not None:
                return vectors
        vectors, work = np.empty((order, order), order="F"), np.empty(1 + 4 * order + order**2)
        more = integers(3 + 5 * order)
        info = solve(
            "dstevd",
            b"V",
            order,
            d.copy(),
            e.copy(),
            vectors,
            order,
            work,
            len(work),
            more,
            len(more),
        )
        if info != 0:
            raise SolverError(f"dstevd did not converge (info {info})")
        return np.array(vectors[:, start:stop], order="F")


def _inverse_iteration(d: np.ndarray, e: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """Return orthonormal eigenvectors (s, j) of an unreduced tridiagonal matrix.

    None where they cannot be told apart. One call of dstein would orthogonalise each vector
    against all before it with dot products: 0.26 s for 409 vectors of order 2048. Groups of
    :data:`GROUP` and one Cholesky factor of what is left of their inner products take 0.10 s.
    """
    order, count = len(d), len(values)
    block, ends = integers(order, 1), integers(order, order)
    work, more, failed = np.empty(5 * order), integers(order), integers(GROUP)
    vectors = np.empty((order, count), order="F")
    for start in range(0, count, GROUP):
        group = np.array(values[start : start + GROUP])
        part = vectors[:, start : start + GROUP]
        if (
            solve(
                "dstein",
                order,
                d,
                e,
                len(group),
                group,
                block,
                ends,
                part,
                order,
                work,
                more,
                failed,
            )
            != 0
        ):
            return None
    # Neighbours in different groups have inner products of eps·‖A‖/gap: at most 2e-9 over the test
    # matrices. Equal eigenvalues give parallel vectors; then the factor is (almost) singular.
    factor = np.empty((count, count), order="F")
    call("dsyrk", b"L", b"T", count, order, 1.0, vectors, order, 0.0, factor, count)
    if solve("dpotrf", b"L", count, factor, count) != 0 or factor.diagonal().min(initial=1) < 0.9:
        return None
    call("dtrsm", b"R", b"L", b"T", b"N", order, count, 1.0, factor, count, vectors, order)
    return vectors


_LOADING = threading.Lock()
_LOADED: set[str] = set()


def eigh(lower: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``torch.linalg.eigh`` of one matrix or a batch, on its device.

    Vendor libraries report failures in plain RuntimeErrors ("cusolver error: …"). The first call
    of a process loads them, and two threads that do so at once, one for each GPU, fail (pytorch
    issue 90613): so there is one first call.

    Raises:
        OutOfMemoryError: the device has too little memory.
        SolverError: it failed for another reason.
    """
    kind = lower.device.type
    try:
        with _LOADING:
            if kind != "cpu" and kind not in _LOADED:
                torch.linalg.eigh(torch.eye(1, dtype=lower.dtype, device=lower.device))
                _LOADED.add(kind)
        return torch.linalg.eigh(lower, UPLO="L")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise SolverError(str(error).partition("\n")[0]) from error


class Eigh:
    """torch's solver, :func:`eigh`: values and all vectors at once."""

    name = "eigh"

    def __init__(self, lower: Tensor):
        values, self._vectors = eigh(lower)
        self.values = values.cpu()

    def vectors(self, start: int, stop: int) -> Tensor:
        return self._vectors[:, start:stop]


class SolvedElsewhere:
    """A solution that a caller has already: one of a batch that was solved in one call.

    ``values``: (s,) on the CPU, ascending; ``vectors``: all, (s, s).
    """

    def __init__(self, name: str, values: Tensor, vectors: Tensor):
        self.name, self.values, self._vectors = name, values, vectors

    def vectors(self, start: int, stop: int) -> Tensor:
        return self._vectors[:, start:stop]


class Eigen:
    """The ladder: eigenvalues and eigenvectors from the first solver whose results are verified.

    Attributes:
        values: (s,) float64 on the CPU, ascending.
        solver: name of the solver in use, with the failures that led to it.
    """

    def __init__(self, lower: Tensor, before: Iterable[Rung] = ()):
        """Compute the eigenvalues.

        Args:
            lower: (s, s) float64, any device; only its lower triangle is read.
            before: rungs to try first.

        Raises:
            SolverError: no solver succeeded; the message lists what each of them said.
        """
        self._lower = lower
        self._rungs = chain(before, _rungs(lower))
        self._failures: list[str] = []
        with self._threads():
            self._climb()
        self.values = self._solver.values

    @property
    def solver(self) -> str:
        return self._solver.name + "".join(f"; {failure}" for failure in self._failures)

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return orthonormal eigenvectors of ``values[start:stop]``.

        (s, stop − start) float64, on the device of the matrix.
        """
        with self._threads():
            while True:
                try:
                    vectors = self._solver.vectors(start, stop).to(self._lower.device)
                    _verify_vectors(self._lower, self.values[start:stop], vectors)
                except FAILURES as error:
                    self._note(error)
                    self._climb()
                else:
                    return vectors

    def _threads(self) -> AbstractContextManager[Any]:
        """Let BLAS use one thread where more of them do not pay."""
        return nullcontext() if len(self._lower) >= THREADED_ORDER else one_thread_each()

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
FAILURES = (SolverError, torch.OutOfMemoryError, MemoryError)


def _rungs(lower: Tensor) -> Iterator[Rung]:
    if lower.device.type != "cpu":
        yield f"eigh on {lower.device}", partial(Eigh, lower)
    yield "lapack", partial(_on_cpu, Lapack, lower)
    yield "eigh", partial(_on_cpu, Eigh, lower)


def _on_cpu(solver: type[Lapack | Eigh], lower: Tensor) -> Solver:
    return solver(lower.cpu())


def _verify_values(lower: Tensor, values: Tensor) -> None:
    """Check that trace and Frobenius norm are those of the matrix."""
    trace, square = torch.stack([lower.diagonal().sum(), _square(lower)]).tolist()
    trace_error = abs(trace - float(values.sum()))
    square_error = abs(square - float(values.square().sum()))
    bound = RESIDUAL * len(values)
    # Written so that NaN fails.
    if not (trace_error <= bound * square**0.5 and square_error <= bound * square):
        raise SolverError(
            f"eigenvalues miss the trace by {trace_error:.1e} and the norm² by {square_error:.1e}"
        )


def _verify_vectors(lower: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Check that A·Q·w = Q·Λ·w and QᵀQ·w = w for one w with no zero entries.

    Costs two passes over A and Q.
    """
    probe = torch.arange(1, vectors.shape[1] + 1, dtype=torch.float64, device=vectors.device).cos()
    direction = vectors @ probe
    image = _times(lower, direction)
    residual, skew, size, diagonal = torch.stack(
        [
            (image - vectors @ (values.to(vectors.device) * probe)).norm(),
            (vectors.T @ direction - probe).norm(),
            probe.norm(),
            lower.diagonal().abs().max(),
        ]
    ).tolist()
    scale = diagonal * len(lower) ** 0.5 * size
    if not (residual <= RESIDUAL * scale and skew <= RESIDUAL * len(lower) * size):
        raise SolverError(
            f"eigenvectors leave a residual of {residual:.1e} (matrix {scale:.1e}), "
            f"skewness {skew:.1e}"
        )


# Masks of whole triangles and their copies took 60 and 39 ms at order 2048 where these two
# functions take 6 and 1 ms.


def _square(lower: Tensor) -> Tensor:
    """Return ‖A‖_F² of the symmetric matrix, panel by panel."""
    total = -lower.diagonal().square().sum()
    for start in range(0, len(lower), PANEL):
        panel = lower[start:, start : start + PANEL]
        for part in (panel[:PANEL].tril(), panel[PANEL:]):
            total += 2 * torch.linalg.vector_norm(part).square()
    return total


def _times(lower: Tensor, x: Tensor) -> Tensor:
    """Return A·x of the symmetric matrix."""
    if lower.device.type == "cpu":
        image = torch.empty_like(x)
        order = len(lower)
        call(
            "dsymv",
            b"L",
            order,
            1.0,
            np.asfortranarray(lower.numpy()),
            order,
            x.numpy(),
            1,
            0.0,
            image.numpy(),
            1,
        )
        return image
    triangle = lower.tril()
    return triangle @ x + triangle.T @ x - lower.diagonal() * x
