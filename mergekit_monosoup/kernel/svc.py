"""Singular Value Calibration for one weight matrix (arXiv 2602.05536), in the order of the paper.

    ΔW_i = W_i − W0, i = 1..K      ΔW = W_merge − W0 = Σ_r σ_r u_r v_rᵀ
    a_r^i = u_rᵀ ΔW_i              s_r^i = ⟨σ_r v_r, a_r^i⟩ / ‖a_r^i‖²
    γ_r = K / Σ_i max(α, s_r^i)    W = W0 + Σ_r γ_r σ_r u_r v_rᵀ

s_r^i tells how much of its own response task i gets. Only the singular vectors of the short side
of ΔW are computed; those of the long side enter through inner products.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.kernel.assemble import Outcome, assemble, describe
from mergekit_monosoup.kernel.spectrum import Spectrum, effective_rank
from mergekit_monosoup.kernel.task_vector import NO_ENTRIES, Norms, TaskVector, normalise
from mergekit_monosoup.parameters import SVC
from mergekit_monosoup.report.record import Record

# A response under this share of ‖ΔW_i‖_F is zero. s divides by its square, so the rounding error
# left by a task that does not respond at all would pass for a response with an s of order one.
# Measured over orthogonal tasks of five spectra: rounding leaves up to 6e-14 where σ_r is
# 2e-3·σ_1, and 2e-11 where it is 6e-6·σ_1.
NO_RESPONSE = 1e-9

# γ of exactly 1 (identical tasks, averaged) is off by 1e-12 either way; it must not count as
# amplified.
SLACK = 1e-9


# -- the merge -------------------------------------------------------------------------------------


def merge_weights(
    weights: Sequence[float],
    scaling: float = SVC["scaling"].default,
    normalize: bool = SVC["normalize"].default,
) -> list[float]:
    """Return the coefficients c_i of ΔW = Σ c_i ΔW_i.

    Those of task arithmetic, or with ``normalize`` of the average; both times ``scaling``.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    shares = normalise(weights)  # for its checks in either case
    return [scaling * w for w in (shares if normalize else weights)]


# -- the calibration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Directions:
    """The singular values of X that are not 0, and their right singular vectors.

    X is the tall view of ΔW.

    Attributes:
        sigma: (r,) float64, descending.
        basis: (s, r) float64: the v_r, or the u_r where X is ΔWᵀ.
    """

    sigma: Tensor
    basis: Tensor


def projections(updates: TaskVector, tasks: int, directions: Directions) -> Tensor:
    """Return s_r^i as (tasks, r) float64.

    It is 0 where task i has no response, so that α takes its place.

    Args:
        updates: X = Σ c_j X_j in the tall view; its first ``tasks`` parts are the X_i.
        tasks: K.
        directions: of X.
    """
    sigma, basis = directions.sigma, directions.basis
    s = torch.zeros(tasks, len(sigma), dtype=torch.float64, device=basis.device)
    inner, squares, sizes = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s[:, :1])
    if updates.transposed:  # a_r^i = X_i u_r and σ_r v_r = X u_r: both of one block at a time
        for block in updates.blocks():
            merged = block.delta.double() @ basis
            for i, delta in enumerate(block.deltas[:tasks]):
                response = delta.double() @ basis
                inner[i] += (merged * response).sum(0)
                squares[i] += response.square().sum(0)
                sizes[i] += delta.double().square().sum()
    else:  # u_r = X v_r/σ_r, so a_r^i = X_iᵀX v_r/σ_r; one (s, s) product at a time, not K
        for i in range(tasks):
            product = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
            for block in updates.blocks():
                product.addmm_(block.deltas[i].double().T, block.delta.double())
                sizes[i] += block.deltas[i].double().square().sum()
            response = product @ basis
            inner[i] = (basis * response).sum(0)
            squares[i] = (response / sigma).square().sum(0)
    responds = squares > NO_RESPONSE**2 * sizes
    s[responds] = inner[responds] / squares[responds]
    return s


def calibration(s: Tensor, alpha: float) -> Tensor:
    """Return γ_r = K / Σ_i max(α, s_r^i), in (0, 1/α]; ``s``: (K, r)."""
    return len(s) / s.clamp(min=alpha).sum(0)


@dataclass(frozen=True)
class Calibration:
    """X -> X·Q·diag(γ)·Qᵀ for row blocks of the tall view, in their memory order.

    X·v_r = σ_r u_r, so neither σ nor u is needed.

    Attributes:
        basis: Q, (s, r) float64.
        gamma: γ, (r,) float64.
    """

    basis: Tensor
    gamma: Tensor

    def __call__(self, delta: Tensor) -> Tensor:
        if delta.stride(0) == 1:  # blocks of wide matrices are column-major
            scaled = self.gamma[:, None] * (self.basis.T @ delta.double().T)
            return (self.basis @ scaled).T
        return ((delta.double() @ self.basis) * self.gamma) @ self.basis.T

    def record(self, record: Record) -> Record:
        """Return ``record`` with the numbers of this calibration."""
        quantiles = self.gamma.quantile(self.gamma.new_tensor([0.0, 0.5, 1.0])).tolist()
        return replace(
            record,
            gamma_min=quantiles[0],
            gamma_median=quantiles[1],
            gamma_max=quantiles[2],
            amplified=float((self.gamma > 1 + SLACK).double().mean()),
        )


@torch.no_grad()  # a module's own parameters are the most natural input; NumPy refuses their grad
def calibrate(
    pretrained: Tensor,
    tasks: Sequence[Tensor],
    *,
    merged: Tensor | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = SVC["alpha"].default,
    scaling: float = SVC["scaling"].default,
    normalize: bool = SVC["normalize"].default,
    name: str = "",
) -> tuple[Tensor, Record]:
    """Merge one weight of several task models and calibrate the merged update.

    Args:
        pretrained: W0, [out, rest...], any floating dtype and device; read as the matrix
            [out, rest].
        tasks: the K fine-tuned weights; same shape, dtype and device as W0. A single one is merged
            but not calibrated: s would be 1 or the shrinkage of ``scaling``, which γ = 1/s takes
            back.
        merged: the result of some other merge of them, to be calibrated in the place of the one
            made here; ``weights``, ``scaling`` and ``normalize`` have no effect then.
        weights: of the task vectors in the merge; 1 each when not given. A weight of 0 keeps a
            task out of the merge, not out of the K that the merge is compared with.
        alpha: lower bound of s_r^i. γ <= 1/alpha: below 1 it permits amplification, from 1 on
            there is none.
        scaling: factor of the merged update.
        normalize: divide by the sum of the weights (average instead of task arithmetic).
        name: for the record.

    Returns:
        The weight in the input dtype and its :class:`Record`. ``delta_norm`` and ``rel_update``
        are those of the merged update, ``edit_norm`` and ``realised`` relate to the merge without
        calibration. Tensors of fewer than two dimensions stay as merged.

    Precision: all in float64 (a single task that is only merged in float32), one rounding at the
    end. Memory beside inputs and output: about five
    (s, s) float64 buffers, s the shorter side, and 2·K + 5 float64 blocks of at most
    ``task_vector.block_elements`` entries.

    Raises:
        TypeError: an input is no tensor.
        ValueError: a parameter out of range, shapes or dtypes that differ.
        NonFiniteError: NaN or infinite entries in an input.
        OverflowError: entries of the result leave the range of the input dtype, or squares that of
            float64.
        SolverError: no eigensolver succeeded, and a float64 SVD did not either.
    """
    if not tasks:
        raise ValueError("no task model was given")
    SVC.check(alpha=alpha, scaling=scaling, normalize=normalize)
    if merged is None:
        weights = weights if weights is not None else [1.0] * len(tasks)
        tuned, shares = list(tasks), merge_weights(weights, scaling, normalize)
    else:
        tuned, shares = [*tasks, merged], [0.0] * len(tasks) + [1.0]
    updates = TaskVector(pretrained, tuned, shares, average=False, name=name)
    while True:
        try:
            return _calibrate(updates, len(tasks), alpha)
        except RuntimeError as error:
            updates.continue_on_cpu(error)  # raises anything but a lack of memory


def _calibrate(updates: TaskVector, tasks: int, alpha: float) -> tuple[Tensor, Record]:
    started = time.perf_counter()
    norms = updates.norms()
    if reason := reason_to_skip(updates, norms, tasks):
        weight, outcome = _merge(updates, tasks, reason)
        record = describe(updates, norms, outcome)
    else:
        # The spectrum's buffers are as large as those to come: it must be gone by then.
        record, calibrated = prepare(updates, norms, tasks, alpha)
        weight, rounding = assemble(updates, calibrated)
        record = replace(record, edit_norm=rounding.edit_norm, realised=rounding.realised)
    return updates.sent_back(weight), replace(record, seconds=time.perf_counter() - started)


def reason_to_skip(updates: TaskVector, norms: Norms, tasks: int) -> str:
    """Return why the merge is not calibrated; empty when it is."""
    if updates.empty:
        return NO_ENTRIES
    if updates.pretrained.ndim < 2:
        return "fewer than two dimensions"
    if tasks < 2:
        return "only one task model has it"
    return "no update" if norms.update == 0 else ""


def _merge(updates: TaskVector, tasks: int, reason: str) -> tuple[Tensor, Outcome]:
    """Return the merge without calibration; one that was given is handed back itself."""
    if len(updates.finetuned) > tasks or updates.empty:
        return updates.finetuned[-1], Outcome("copied", reason, 0.0)
    weight, rounding = assemble(updates, torch.clone)
    return weight, Outcome("copied", f"{reason}; merge of {tasks} models", rounding.edit_norm)


def prepare(
    updates: TaskVector, norms: Norms, tasks: int, alpha: float
) -> tuple[Record, Calibration]:
    """Return γ of one matrix, ready to be applied, and the record but for what rounding makes."""
    spectrum = Spectrum(updates.deltas, updates.order, updates.width, updates.device)
    rank, effective = spectrum.rank, effective_rank(spectrum.sigma)
    basis = spectrum.vectors()
    directions = Directions(spectrum.sigma[:rank].to(basis.device), basis)
    solver = spectrum.solver  # the vectors may have needed another one
    del spectrum
    gamma = calibration(projections(updates, tasks, directions), alpha)
    calibrated = Calibration(basis, gamma)
    record = describe(updates, norms, Outcome("edited", "", None), solver)
    return replace(calibrated.record(record), rank=rank, effective_rank=effective), calibrated
