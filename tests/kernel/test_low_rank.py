"""Updates of low rank, edited in matrices of that rank, against the oracles on whole matrices.

Tolerance, relative to ‖ΔW‖: measured at most 6e-14 over the draws below; allowed 1e-9, for cuts
between singular values that are close.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import oracle, svc_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.kernel import low_rank, monosoup
from mergekit_monosoup.kernel.low_rank import Factors
from mergekit_monosoup.kernel.monosoup import Settings
from mergekit_monosoup.parameters import MONOSOUP

TOLERANCE = 1e-9
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def updates(draw, most: int = 3, least: int = 1) -> list[Factors]:
    """Some updates of one shape, whose ranks, scales, spectra and orientation vary.

    A rank may exceed both sides of the matrix.
    """
    out, rest = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    flipped, seed = draw(st.booleans()), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(draw(st.integers(least, most))):
        rank = draw(st.integers(1, 8))
        falls = torch.arange(1, rank + 1) ** -draw(st.floats(0, 2))
        B = torch.randn(out, rank, dtype=torch.float64, generator=generator) * falls
        A = torch.randn(rank, rest, dtype=torch.float64, generator=generator)
        tasks.append(Factors(B, A, draw(st.floats(0.05, 4)), flipped))
    return tasks


def dense(tasks: list[Factors]) -> list[np.ndarray]:
    """The updates as the model stores them, by NumPy."""
    products = [t.scale * (t.B.numpy() @ t.A.numpy()) for t in tasks]
    return [p.T if t.flipped else p for p, t in zip(products, tasks, strict=True)]


def close(got: Factors, expected: np.ndarray, size: float) -> bool:
    return bool(np.linalg.norm(got.dense().numpy() - expected) <= TOLERANCE * size)


@QUICK
@given(
    updates(),
    st.sampled_from(["freevariance", "variance"]),
    st.floats(0.3, 1),
    st.floats(0, 1),
    st.sampled_from(MONOSOUP["coefficients"].values.options),
    st.data(),
)
def test_edit_is_that_of_the_whole_matrix(tasks, mode, R, alpha, rule, data):
    weights = [data.draw(st.floats(0.1, 2)) for _ in tasks]
    update = sum(w * d for w, d in zip(weights, dense(tasks), strict=True)) / sum(weights)
    _, edited, numbers = oracle.monosoup(0 * update, update, mode, R, alpha, rule)
    chosen = Settings(mode, R, alpha, rule)
    done = low_rank.edit(tasks, chosen, weights=weights, name="q")
    size = np.linalg.norm(update)
    assert close(done.factors, edited, size) and close(done.before, update, size)
    record = done.record
    assert (record.k, record.rank) == (numbers["k"], numbers["rank"])
    for name in ("lambda_high", "lambda_low", "P_k", "rho", "effective_rank", "delta_norm"):
        assert getattr(record, name) == pytest.approx(numbers[name], rel=1e-7, abs=1e-9), name
    assert record.edit_norm == pytest.approx(np.linalg.norm(edited - update), abs=1e-9 * size)
    assert record.shape == update.shape
    assert record.realised is None and record.rel_update is None
    if len(tasks) == 1:
        task = tasks[0]
        kept = task.rank <= task.A.shape[1] or len(task.B) <= task.A.shape[1]
        assert (done.factors.A is task.A) or not kept
        assert done.factors.scale == task.scale
    else:
        assert done.factors.rank == sum(task.rank for task in tasks)


@QUICK
@given(updates(least=2), st.floats(0.05, 1.5), st.floats(0.2, 2), st.booleans(), st.data())
def test_calibration_is_that_of_whole_matrices(tasks, alpha, scaling, normalize, data):
    weights = [data.draw(st.floats(0.1, 2)) for _ in tasks]
    deltas, options = dense(tasks), {"weights": weights, "alpha": alpha}
    options |= {"scaling": scaling, "normalize": normalize}
    expected, merged, gamma = svc_oracle.svc(0 * deltas[0], deltas, **options)
    done = low_rank.calibrate(tasks, **options)
    size = max(np.linalg.norm(expected), np.linalg.norm(merged))
    assert close(done.factors, expected, size) and close(done.before, merged, size)
    assert done.record.rank == len(gamma)
    assert done.record.gamma_max == pytest.approx(gamma.max(), rel=1e-6)
    assert done.record.gamma_min == pytest.approx(gamma.min(), rel=1e-6)


@QUICK
@given(updates(), st.integers(1, 9))
def test_compressing_is_the_best_approximation_and_says_what_it_drops(tasks, rank):
    chosen = Settings("variance", R=0.6)
    exact = low_rank.edit(tasks, chosen).factors.dense().numpy()
    done = low_rank.edit(tasks, chosen, rank=rank)
    sigma = np.linalg.svd(exact, compute_uv=False)
    rest = (sigma[rank:] ** 2).sum() / (sigma**2).sum()
    error = np.linalg.norm(done.factors.dense().numpy() - exact) ** 2 / (sigma**2).sum()
    if rank < sum(task.rank for task in tasks):
        assert done.factors.rank == min(rank, *exact.shape)
        assert done.dropped == pytest.approx(rest, abs=1e-12)
        assert error == pytest.approx(rest, abs=1e-12)
        assert f"compressed to {done.factors.rank}" in done.record.reason
    else:
        assert done.dropped == 0 and error <= 1e-20


@QUICK
@given(updates(least=2))
def test_inner_products_are_those_of_whole_matrices(tasks):
    flat = np.stack([d.ravel() for d in dense(tasks)])
    np.testing.assert_allclose(low_rank.inner_products(tasks), flat @ flat.T, rtol=1e-9, atol=1e-9)


@pytest.fixture
def task() -> Factors:
    generator = torch.Generator().manual_seed(3)
    B = torch.randn(24, 6, generator=generator) * torch.logspace(0, -2, 6)
    return Factors(B, torch.randn(6, 40, generator=generator), 0.5)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_preview_is_that_of_the_merged_weight(task, flipped, dtype):
    task = replace(task, flipped=flipped)
    W0 = (30 * torch.randn(task.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    W1 = W0.float() + task.dense().float()
    sigma = torch.linalg.svdvals(task.dense())
    ours = low_rank.preview(task, pretrained=W0, points=9, name="q")
    for got, expected in zip(ours, monosoup.preview(W0.float(), W1, points=9), strict=True):
        assert (got.mode, got.R, got.k) == (expected.mode, expected.R, expected.k)
        assert got.rel_update == pytest.approx(expected.rel_update, rel=1e-5)
        assert got.realised == pytest.approx(expected.realised, abs=1e-3)
        assert got.realised > 0.5
        assert got.edit_norm == pytest.approx(expected.edit_norm, rel=1e-3)
        assert got.spectrum[::8] == pytest.approx([1, float(sigma[5] / sigma[0])], rel=1e-3)
    alone = low_rank.preview(task)
    assert [r.realised for r in alone] == [r.rel_update for r in alone] == [None, None]
    edited = low_rank.edit([task])
    assert alone[0].edit_norm == pytest.approx(edited.record.edit_norm, rel=1e-12)
    assert edited.record.edit_norm > 0


def test_an_adapter_that_was_never_trained_is_kept(task):
    zero = replace(task, B=torch.zeros(24, 6))
    done = low_rank.edit([zero])
    assert done.record.reason == "no update" and done.factors.B.eq(0).all()
    records = [low_rank.calibrate([zero, zero]).record, low_rank.preview(zero)[1]]
    assert [r.reason for r in records] == ["no update; merge of 2 models", "no update"]


def test_twice_the_same_adapter_is_that_adapter_of_the_same_rank(task):
    # The columns of [B, B] are dependent: phantoms of rounding would pass for directions.
    done, single = low_rank.edit([task, task]), low_rank.edit([task])
    assert done.record.rank == single.record.rank == 6 and done.record.k == single.record.k
    assert close(done.factors, single.factors.dense().numpy(), done.record.delta_norm)
    assert low_rank.calibrate([task, task], normalize=True).record.gamma_max == pytest.approx(1)


def test_an_update_smaller_than_asked_for_is_kept(task):
    done = low_rank.edit([task], Settings(min_rel_update=1e-3), pretrained_norm=1e6)
    assert done.record.action == "copied" and "min_rel_update" in done.record.reason
    assert done.record.rel_update == pytest.approx(done.record.delta_norm / 1e6)
    assert done.factors.B.equal(task.B.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_an_error(task, value):
    B = task.B.clone()
    B[2, 1] = value
    with pytest.raises(NonFiniteError):
        low_rank.edit([replace(task, B=B)])
