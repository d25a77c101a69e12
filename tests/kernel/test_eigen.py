"""Every rung of the solver ladder, reached by injected faults.

The result stays right, and the record says what happened.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import oracle, zoo
from mergekit.merge_methods import merge_tensors

from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel import eigen, monosoup
from mergekit_monosoup.kernel.batch import Job, edit_batched
from mergekit_monosoup.kernel.eigen import Eigen
from mergekit_monosoup.kernel.monosoup import edit, preview

SHAPE = (96, 144)


def pair(kind: str = "low rank + noise"):
    return torch.zeros(SHAPE), torch.tensor(zoo.deltas(*SHAPE)[kind]).float()


def off_by(weight, mode="freevariance", kind="low rank + noise"):
    expected, _, _ = oracle.monosoup(*pair(kind), mode=mode)
    return float(np.linalg.norm(weight.double().numpy() - expected) / np.linalg.norm(expected))


def fails(*args, **kwargs):
    raise SolverError("injected")


@pytest.mark.parametrize("order", [1, 2, 3, 50, 129])
@pytest.mark.parametrize("few", [True, False])
def test_lapack_against_numpy(order, few):
    rng = np.random.default_rng(order)
    X = rng.standard_normal((order + 5, order))
    solver = eigen.Lapack(torch.tensor(np.tril(X.T @ X)))
    values, vectors = np.linalg.eigh(X.T @ X)
    assert np.allclose(solver.values, values, atol=1e-11 * values[-1])
    stop = max(1, order // 10) if few else order
    found = solver.vectors(0, stop).numpy()
    assert np.allclose(found @ found.T, vectors[:, :stop] @ vectors[:, :stop].T, atol=1e-9)


@pytest.mark.parametrize(
    "kind", ["random", "low rank", "low rank + noise", "power law 2", "spiked", "repeated"]
)
@pytest.mark.parametrize("how", ["inverse iteration", "divide and conquer"])
def test_vectors_either_way(monkeypatch, kind, how):
    """Groups of dstein alone are orthogonal to 2e-9 (power law 2).

    Equal eigenvalues it cannot tell apart at all.
    """
    if how == "divide and conquer":
        monkeypatch.setattr(eigen, "_inverse_iteration", lambda *args: None)
    X = torch.tensor(zoo.deltas(320, 256)[kind])
    solver = eigen.Lapack(X.T @ X)
    largest = float(solver.values[-1])
    for start, stop in [(0, 100), (156, 256)]:
        found = solver.vectors(start, stop)
        assert torch.allclose(found.T @ found, torch.eye(100, dtype=torch.float64), atol=1e-13)
        residual = (X.T @ X) @ found - found * solver.values[start:stop]
        assert float(residual.norm()) < 1e-13 * largest


def test_equal_eigenvalues_are_left_to_divide_and_conquer():
    """The second difference matrix of a ring cut open twice.

    Two equal halves, coupled by almost nothing.
    """
    d, e = np.full(128, 2.0), np.full(127, -1.0)
    e[63] = 1e-14
    values = np.linalg.eigvalsh(np.diag(d) + np.diag(e, 1) + np.diag(e, -1))
    assert (
        eigen._inverse_iteration(d, e, values[:64]) is not None
    )  # each pair in one call of dstein
    assert eigen._inverse_iteration(d, e, values[1:64]) is None  # a pair in two


def test_a_matrix_that_falls_apart():
    """Zero off-diagonal entries: inverse iteration would need to know the blocks."""
    solver = eigen.Lapack(torch.diag(torch.arange(1.0, 65.0, dtype=torch.float64)))
    found = solver.vectors(0, 3)
    assert torch.allclose(found.abs(), torch.eye(64, 3, dtype=torch.float64), atol=1e-12)


def test_first_rung_is_lapack():
    weight, record = edit(*pair())
    assert record.solver == "lapack" and off_by(weight) < 1e-5


@pytest.mark.parametrize("stage", ["__init__", "vectors"])
def test_lapack_fails(monkeypatch, stage):
    monkeypatch.setattr(eigen.Lapack, stage, fails)
    weight, record = edit(*pair())
    assert record.solver == "eigh; lapack failed: injected" and off_by(weight) < 1e-5


def test_wrong_values_are_noticed(monkeypatch):
    original = eigen.Lapack.__init__

    def wrong(self, lower):
        original(self, lower)
        self.values = self.values * (1 + 1e-6)

    monkeypatch.setattr(eigen.Lapack, "__init__", wrong)
    weight, record = edit(*pair())
    assert "eigenvalues miss the trace" in record.solver and off_by(weight) < 1e-5


@pytest.mark.parametrize("fault", ["rotated", "not orthogonal", "nan"])
def test_wrong_vectors_are_noticed(monkeypatch, fault):
    original = eigen.Lapack.vectors

    def wrong(self, start, stop):
        vectors = original(self, start, stop)
        if fault == "rotated":
            return vectors.roll(1, 0)
        return vectors * (1 + 1e-6 if fault == "not orthogonal" else float("nan"))

    monkeypatch.setattr(eigen.Lapack, "vectors", wrong)
    weight, record = edit(*pair())
    assert "eigenvectors leave a residual" in record.solver and off_by(weight) < 1e-5


@pytest.mark.parametrize("mode", ["freevariance", "variance"])
@pytest.mark.parametrize("stage", ["__init__", "vectors"])
@pytest.mark.parametrize("kind", ["low rank + noise", "low rank", "random"])
def test_last_rung_is_a_float64_svd(monkeypatch, caplog, stage, mode, kind):
    monkeypatch.setattr(eigen.Lapack, stage, fails)
    monkeypatch.setattr(eigen.Eigh, stage, fails)
    weight, record = edit(*pair(kind), mode=mode)
    _, _, numbers = oracle.monosoup(*pair(kind), mode=mode)
    assert record.solver.startswith("svd; lapack failed: injected; eigh failed: injected")
    assert record.k == numbers["k"] and off_by(weight, mode, kind) < 1e-5
    assert "falling back to a float64 SVD" in caplog.text


def test_nothing_works_names_the_tensor(monkeypatch):
    monkeypatch.setattr(eigen.Lapack, "__init__", fails)
    monkeypatch.setattr(eigen.Eigh, "__init__", fails)

    def svd(*args, **kwargs):
        raise torch.linalg.LinAlgError("injected too")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    with pytest.raises(
        RuntimeError,
        match=r"layers\.3\.w \(96, 144\): its spectrum could not be computed.*injected too",
    ):
        merge_tensors(list(pair()), "monosoup", base_index=0, name="layers.3.w")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_continues_on_the_cpu(monkeypatch, caplog, error):
    original, calls = monosoup._edit, []

    def once(*args):
        calls.append(args[0].device.type)
        if len(calls) == 1:
            raise error
        return original(*args)

    monkeypatch.setattr(monosoup, "_edit", once)
    weight, record = edit(*pair(), name="w")
    assert len(calls) == 2 and off_by(weight) < 1e-5
    assert "out of memory on cpu" in record.solver and "w: out of memory" in caplog.text


@pytest.mark.parametrize(
    "message",
    [
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd(...)`",
        "lazy wrapper should be called at most once",
    ],
)
def test_what_a_vendor_library_says_is_a_failed_rung(monkeypatch, message):
    """As plain RuntimeErrors, on lines of their own."""

    def eigh(*args, **kwargs):
        raise RuntimeError(message + "\nlines about environment variables")

    monkeypatch.setattr(eigen.Lapack, "__init__", fails)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    weight, record = edit(*pair())
    assert (
        record.solver == f"svd; lapack failed: injected; eigh failed: {message}"
        and off_by(weight) < 1e-5
    )


def test_libraries_of_an_accelerator_are_loaded_by_one_thread(monkeypatch):
    """Two first calls at once fail in torch (issue 90613).

    `--multi-gpu` has a thread for each GPU.
    """
    inside, calls, start = threading.Lock(), [], threading.Barrier(4)

    def torch_eigh(matrix, UPLO="L"):
        calls.append(len(matrix))
        if len(calls) <= 1:
            assert inside.acquire(blocking=False), "lazy wrapper should be called at most once"
            time.sleep(0.2)
            inside.release()
        else:
            assert not inside.locked(), "lazy wrapper should be called at most once"
        return torch.zeros(0), matrix

    monkeypatch.setattr(torch.linalg, "eigh", torch_eigh)
    monkeypatch.setattr(eigen, "_LOADED", set())

    def first_call(_):
        start.wait(timeout=30)
        return eigen.eigh(torch.empty(5, 5, device="meta"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first_call, range(4)))
    assert calls == [1, 5, 5, 5, 5]


@pytest.mark.parametrize("kind", ["random", "low rank", "low rank + noise"])
@pytest.mark.parametrize("rungs", [0, 1, 2])
def test_inputs_say_where_to_work_not_the_default_device(monkeypatch, kind, rungs):
    """A thread of `--multi-gpu` has its GPU as default device.

    A tensor made without naming one would end up there.
    """
    for solver in (eigen.Lapack, eigen.Eigh)[:rungs]:
        monkeypatch.setattr(solver, "__init__", fails)
    W0, W1 = pair(kind)
    other = W1 + 0.01 * torch.randn(SHAPE)
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        weight, _ = edit(W0, W1)
        calibrated = merge_tensors([W0, W1, other], "svc", base_index=0, name="w")
        stacks = [torch.stack([w, w]) for w in (W0, W1)]
        experts = merge_tensors(
            stacks, "monosoup", base_index=0, name="model.layers.0.mlp.experts.down_proj"
        )
        batch = [w for w, _ in edit_batched([Job(W0, [W1], "a"), Job(W0, [other], "b")])]
        assert [record.mode for record in preview(W0, W1, points=8)] == ["freevariance", "variance"]
    assert off_by(weight, kind=kind) < 1e-5
    assert all(w.device.type == "cpu" and w.isfinite().all() for w in (calibrated, experts, *batch))


def test_only_the_lower_triangle_is_read():
    lower = torch.tensor([[2.0, float("nan")], [1.0, 2.0]], dtype=torch.float64)
    assert torch.allclose(Eigen(lower).values, torch.tensor([1.0, 3.0], dtype=torch.float64))
