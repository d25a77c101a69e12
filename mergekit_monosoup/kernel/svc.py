"""Singular Value Calibration for one weight matrix (arXiv 2602.05536), in the order of the paper.

    ΔW_i = W_i − W0, i = 1..K      ΔW = W_merge − W0 = Σ_r σ_r u_r v_rᵀ
    a_r^i = u_rᵀ ΔW_i              s_r^i = ⟨σ_r v_r, a_r^i⟩ / ‖a_r^i‖²       how much of its own response task i gets
    γ_r = K / Σ_i max(α, s_r^i)    W = W0 + Σ_r γ_r σ_r u_r v_rᵀ

Only the singular vectors of the short side of ΔW are computed; those of the long side enter through inner products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_monosoup.kernel.assemble import (
    assemble,
    check_inputs,
    check_number,
    new_record,
    or_on_cpu,
    spectrum_of,
)
from mergekit_monosoup.kernel.spectrum import effective_rank
from mergekit_monosoup.kernel.task_vector import TaskVector, normalise
from mergekit_monosoup.report import Record

# The range of every numeric parameter, in words and as a test; nan fails each.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": (">= 0 and finite", lambda v: 0 <= v < math.inf),
    "alpha": ("> 0 and finite", lambda v: 0 < v < math.inf),
    "scaling": (">= 0 and finite", lambda v: 0 <= v < math.inf),
}

# A response under this share of ‖ΔW_i‖_F is zero. s divides by its square, so the rounding error left by a task that does
# not respond at all would pass for a response with an s of order one. Measured over orthogonal tasks of five spectra:
# rounding leaves up to 6e-14 where σ_r is 2e-3·σ_1, and 2e-11 where it is 6e-6·σ_1.
NO_RESPONSE = 1e-9

# γ of exactly 1 (identical tasks, averaged) is off by 1e-12 either way; it must not count as amplified.
SLACK = 1e-9


def merge_weights(
    weights: Sequence[float], scaling: float = 1.0, normalize: bool = False
) -> list[float]:
    """Coefficients of ΔW = Σ c_i ΔW_i: task arithmetic, or with ``normalize`` the average; both times ``scaling``.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    shares = normalise(weights)  # for its checks in either case
    return [scaling * w for w in (shares if normalize else weights)]


def projections(
    updates: TaskVector, tasks: int, sigma: Tensor, basis: Tensor, wide: bool
) -> Tensor:
    """s_r^i as (tasks, r) float64; 0 where task i has no response, so that α takes its place.

    Args:
        updates: X = Σ c_j X_j in the tall view; its first ``tasks`` parts are the X_i.
        sigma, basis: (r,) and (s, r), the singular values of X that are not 0 and their right singular vectors.
        wide: X is ΔWᵀ (out < rest), so ``basis`` holds the u_r; else X is ΔW and it holds the v_r.
    """
    s = torch.zeros(tasks, len(sigma), dtype=torch.float64, device=basis.device)
    inner, squares, sizes = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s[:, :1])
    if wide:  # a_r^i = X_i u_r and σ_r v_r = X u_r: both of one block of rows at a time
        for _, _, deltas in updates.parts():
            merged = updates.combine(deltas).double() @ basis
            for i, delta in enumerate(deltas[:tasks]):
                response = delta.double() @ basis
                inner[i] += (merged * response).sum(0)
                squares[i] += response.square().sum(0)
                sizes[i] += delta.double().square().sum()
    else:  # u_r = X v_r/σ_r, so a_r^i = X_iᵀX v_r/σ_r; one task at a time, to hold one (s, s) product and not K
        for i in range(tasks):
            product = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
            for _, _, deltas in updates.parts():
                product.addmm_(deltas[i].double().T, updates.combine(deltas).double())
                sizes[i] += deltas[i].double().square().sum()
            response = product @ basis
            inner[i] = (basis * response).sum(0)
            squares[i] = (response / sigma).square().sum(0)
    responds = squares > NO_RESPONSE**2 * sizes
    s[responds] = inner[responds] / squares[responds]
    return s


def calibration(s: Tensor, alpha: float) -> Tensor:
    """γ_r = K / Σ_i max(α, s_r^i), in (0, 1/α]; ``s``: (K, r)."""
    return len(s) / s.clamp(min=alpha).sum(0)


def calibrate(
    pretrained: Tensor,
    tasks: Sequence[Tensor],
    *,
    merged: Tensor | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 0.1,
    scaling: float = 1.0,
    normalize: bool = False,
    name: str = "",
) -> tuple[Tensor, Record]:
    """Merge one weight of several task models and calibrate the singular values of the merged update.

    Args:
        pretrained: W0, [out, rest...], any floating dtype and device; read as the matrix [out, rest].
        tasks: the K fine-tuned weights; same shape, dtype and device as W0. A single one is merged but not calibrated:
            s would be 1 or the shrinkage of ``scaling``, which γ = 1/s takes back.
        merged: the result of some other merge of them, to be calibrated in the place of the one made here; ``weights``,
            ``scaling`` and ``normalize`` have nothing to say then.
        weights: of the task vectors in the merge; 1 each when not given. A weight of 0 keeps a task out of the merge, not
            out of the K that the merge is compared with.
        alpha: lower bound of s_r^i. γ <= 1/alpha: below 1 it permits amplification, from 1 on there is none.
        scaling: factor of the merged update.
        normalize: divide by the sum of the weights (average instead of task arithmetic).
        name: for the record.

    Returns:
        The weight in the input dtype and its :class:`Record`. ``delta_norm`` and ``rel_update`` are those of the merged
        update, ``edit_norm`` and ``realised`` relate to the merge without calibration. Tensors of fewer than two
        dimensions stay as merged.

    Precision: all in float64, one rounding at the end. Memory beside inputs and output: about five (s, s) float64 buffers, s
    the shorter side, and 2·K + 5 float64 blocks of ``task_vector.BLOCK_ELEMENTS`` entries.

    Raises:
        ValueError: a parameter out of range, shapes or dtypes that differ.
        NonFiniteError: NaN or infinite entries in an input.
        OverflowError: entries of the result leave the range of the input dtype, or squares that of float64.
        SolverError: no eigensolver succeeded, and a float64 SVD did not either.
    """
    if not tasks:
        raise ValueError("no task model was given")
    check_inputs(pretrained, [*tasks, *([] if merged is None else [merged])], name)
    for key, value in (("alpha", alpha), ("scaling", scaling)):
        check_number(key, value, RANGES)
    if merged is None:
        tuned, shares = (
            list(tasks),
            merge_weights(
                weights if weights is not None else [1.0] * len(tasks), scaling, normalize
            ),
        )
    else:
        tuned, shares = [*tasks, merged], [0.0] * len(tasks) + [1.0]
    return or_on_cpu(
        lambda base, others: _calibrate(base, others, shares, len(tasks), alpha, name),
        pretrained,
        tuned,
        name,
    )


def _calibrate(
    pretrained: Tensor,
    tuned: Sequence[Tensor],
    shares: Sequence[float],
    tasks: int,
    alpha: float,
    name: str,
) -> tuple[Tensor, Record]:
    started = time.perf_counter()
    updates = TaskVector(pretrained, tuned, shares, average=False)
    record = new_record(name, pretrained, updates)
    record.reason = _reason_to_skip(pretrained, record, tasks)
    if record.reason:
        record.action = "copied"
        if len(tuned) > tasks:
            weight, record.edit_norm = tuned[-1], 0.0
        else:
            weight, record.edit_norm, _ = assemble(pretrained, updates, torch.clone)
            record.reason += f"; merge of {tasks} models"
    else:
        record.action = "edited"
        weight, record.edit_norm, record.realised = assemble(
            pretrained, updates, _plan(pretrained, updates, tasks, alpha, record)
        )
    record.seconds = time.perf_counter() - started
    return weight, record


def _reason_to_skip(pretrained: Tensor, record: Record, tasks: int) -> str:
    """Why the merge is not calibrated; empty when it is."""
    if pretrained.ndim < 2:
        return "fewer than two dimensions"
    if tasks < 2:
        return "only one task model has it"
    return "no update" if record.delta_norm == 0 else ""


def _plan(
    pretrained: Tensor, updates: TaskVector, tasks: int, alpha: float, record: Record
) -> Callable[[Tensor], Tensor]:
    """γ of one matrix, written into ``record``, and how to apply it to row blocks of the tall view."""
    found = spectrum_of(updates)
    record.rank, record.effective_rank = found.rank, effective_rank(found.sigma)
    basis = found.vectors()
    sigma = found.sigma[: found.rank].to(basis.device)
    record.solver = found.solver  # the vectors may have needed another one
    del found  # its buffers are as large as those to come
    gamma = calibration(
        projections(updates, tasks, sigma, basis, len(pretrained) < updates.rows), alpha
    )
    record.gamma_min, record.gamma_median, record.gamma_max = gamma.quantile(
        gamma.new_tensor([0.0, 0.5, 1.0])
    ).tolist()
    record.amplified = float((gamma > 1 + SLACK).double().mean())
    return lambda delta: _calibrated(delta, basis, gamma)


def _calibrated(delta: Tensor, basis: Tensor, gamma: Tensor) -> Tensor:
    """X·Q·diag(γ)·Qᵀ of row blocks X, in their memory order: X·v_r = σ_r u_r, so neither σ nor u is needed."""
    if delta.stride(0) == 1:  # blocks of wide matrices are column-major
        return (basis @ (gamma[:, None] * (basis.T @ delta.double().T))).T
    return ((delta.double() @ basis) * gamma) @ basis.T
