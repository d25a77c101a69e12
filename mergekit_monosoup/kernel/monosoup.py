"""MonoSoup for one weight matrix, in the order of the paper's §4 (arXiv 2602.09689).

    ΔW = W1 − W0 = U Σ Vᵀ          split at k          ΔW_high = Σ_{i<=k} σ_i u_i v_iᵀ,  ΔW_low = ΔW − ΔW_high
    W  = W0 + alpha · (λ_high ΔW_high + λ_low ΔW_low)

With P the projector on the leading k right singular vectors, λ_high ΔW_high + λ_low ΔW_low = λ_low ΔW + (λ_high − λ_low) ΔW P:
no left singular vector and no reconstruction from factors is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_monosoup.kernel.assemble import (
    assemble,
    check_inputs,
    check_number,
    new_record,
    or_on_cpu,
    predict,
    spectrum_of,
)
from mergekit_monosoup.kernel.eigen import Eigen
from mergekit_monosoup.kernel.spectrum import Spectrum, effective_rank, nonzero_rows, quantile_curve
from mergekit_monosoup.kernel.task_vector import TaskVector
from mergekit_monosoup.report import Record

Mode = Literal["freevariance", "variance"]
Rule = Literal["monosoup", "rho", "cos", "uniform", "high", "low", "scalar"]

# The range of every numeric parameter, in words and as a test; nan fails each.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "R": ("in (0, 1]", lambda v: 0 < v <= 1),
    "alpha": ("in [0, 1]", lambda v: 0 <= v <= 1),
    "min_rel_update": (">= 0", lambda v: v >= 0),
    "weight": (">= 0 and finite", lambda v: 0 <= v < math.inf),
}

# Exact ties happen: exp(H) of r equal singular values is r, and a staircase spectrum can meet R to the last digit. float64
# misses both by 1e-13 either way, and the cut would be off by one by chance. Far above rounding, far below any meaning.
SLACK = 1e-9


def split_rank(sigma: Tensor, mode: Mode, R: float) -> int:
    """k, with 1 <= k <= rank (paper, Eqs. 2-4).

    Args:
        sigma: (s,) float64, descending, numerical zeros exactly 0, ``sigma[0] > 0``.
        mode: ``freevariance``: ceil(effective rank). ``variance``: smallest k with Σ_{i<=k}σ² >= R·Σσ².
        R: energy threshold in (0, 1]; ignored in ``freevariance``.
    """
    rank = int((sigma > 0).sum())
    if mode == "freevariance":
        k = math.ceil(effective_rank(sigma) * (1 - SLACK))
    else:
        # "tail <= (1 - R) of the energy" is the same test summed from the small end, where R = 1 is exact.
        energy = sigma.square()
        tail = energy.flip(0).cumsum(0).flip(0)[1:]
        k = 1 + int((tail > (1 - R) * (1 + SLACK) * energy.sum()).sum())
    return min(max(k, 1), rank)


@dataclass(frozen=True)
class Split:
    """What is read off the spectrum at k (paper, Eqs. 6-8): P_k and its complement, ρ, cos α = √(1 − P_k)."""

    energy_high: float
    energy_low: float
    rho: float

    @classmethod
    def at(cls, sigma: Tensor, k: int) -> Split:
        energy = sigma.square()
        low = float(
            energy[k:].flip(0).sum() / energy.sum()
        )  # summed from the small end: 1 − P_k loses its digits
        rho = float((sigma[k] / sigma[0]) ** 2) if k < len(sigma) else 0.0
        return cls(1 - low, low, rho)

    @property
    def cos_alpha(self) -> float:
        return math.sqrt(self.energy_low)

    def coefficients(self, rule: Rule) -> tuple[float, float]:
        """(λ_high, λ_low). ``monosoup`` is the paper's Eq. 8, the others its ablations (Figure 6) and one control.

        ``scalar`` gives both parts ‖ΔW_mono‖/‖ΔW‖: the same shrinkage without the spectral split.
        """
        if rule == "scalar":
            high, low = self.coefficients("monosoup")
            both = math.sqrt(high**2 * self.energy_high + low**2 * self.energy_low)
            return both, both
        low = {
            "monosoup": self.rho + (1 - self.rho) * self.cos_alpha,
            "rho": self.rho,
            "cos": self.cos_alpha,
            "uniform": 0.5,
            "high": 0.0,
            "low": 1.0,
        }[rule]
        return 1 - low, low


def edit(
    pretrained: Tensor,
    finetuned: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    mode: Mode = "freevariance",
    R: float = 0.8,
    alpha: float = 1.0,
    coefficients: Rule = "monosoup",
    min_rel_update: float = 1e-6,
    name: str = "",
    eigen: Callable[[], Eigen] | None = None,
) -> tuple[Tensor, Record]:
    """MonoSoup of one weight: the edited weight in the input dtype and what happened to it.

    Args:
        pretrained: W0, [out, rest...], any floating dtype and device; read as the matrix [out, rest].
        finetuned: W1, or several to average first; same shape, dtype and device as W0.
        weights: averaging weights (normalised); equal when not given.
        mode, R: the split rank, see :func:`split_rank`.
        alpha: Wise-FT interpolation towards W0 (0: W0, 1: the full edit).
        coefficients: rule for (λ_high, λ_low), see :meth:`Split.coefficients`.
        min_rel_update: with ‖ΔW‖_F/‖W0‖_F below it the weight stays as fine-tuned; ``inf`` switches the edit off.
        name: for the record.
        eigen: decomposes the Gram matrix of ΔW where a caller has it already (a stack on an accelerator).

    Returns:
        The weight, a new tensor unless it is unchanged (then W1 itself), and its :class:`Record`.

    Precision: ΔW in float32 for inputs of 32 bits and less (exact, or off by one rounding per entry), in float64 for float64
    inputs and averages; the spectrum in float64; the projector is applied in the precision of ΔW, in float64 where
    cancellation would show; one rounding to the input dtype at the end. The edited delta is within 1e-5 (relative,
    Frobenius) of a float64 SVD. Memory beside inputs and output: five (s, s) float64 buffers, s the shorter side, and about
    six blocks of ``task_vector.BLOCK_ELEMENTS`` entries.

    Raises:
        ValueError: a parameter out of range, shapes or dtypes that differ.
        NonFiniteError: NaN or infinite entries in an input.
        OverflowError: entries of the result leave the range of the input dtype, or squares that of float64.
        SolverError: no eigensolver succeeded, and a float64 SVD did not either.
    """
    tuned = [finetuned] if isinstance(finetuned, Tensor) else list(finetuned)
    check_inputs(pretrained, tuned, name)
    _check_parameters(mode, coefficients, R=R, alpha=alpha, min_rel_update=min_rel_update)
    return or_on_cpu(
        lambda base, others: _edit(
            base,
            others,
            weights,
            mode,
            R,
            alpha,
            coefficients,
            min_rel_update,
            name,
            eigen if base.device == pretrained.device else None,
        ),
        pretrained,
        tuned,
        name,
    )


def _edit(
    pretrained: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float] | None,
    mode: Mode,
    R: float,
    alpha: float,
    coefficients: Rule,
    min_rel_update: float,
    name: str,
    eigen: Callable[[], Eigen] | None,
) -> tuple[Tensor, Record]:
    started = time.perf_counter()
    task_vector = TaskVector(pretrained, tuned, weights)
    record = new_record(name, pretrained, task_vector)
    record.reason = _reason_to_skip(pretrained, record, min_rel_update)
    untouched = _Recombination(1.0, 1.0)
    recombine = untouched
    if not record.reason:
        recombine = _plan(
            spectrum_of(task_vector, eigen), task_vector, mode, R, coefficients, record
        )

    if recombine.keeps and alpha == 1:
        record.action = "copied"
        if len(tuned) == 1:
            weight, record.edit_norm = tuned[0], 0.0
        else:
            weight, record.edit_norm, _ = assemble(pretrained, task_vector, recombine, alpha)
            record.reason += f"; average of {len(tuned)} models"
    else:
        record.action = "edited"
        if recombine.keeps:
            record.reason += f"; interpolated towards the pretrained weight with alpha = {alpha:g}"
        weight, record.edit_norm, record.realised = assemble(
            pretrained, task_vector, recombine, alpha
        )
    record.seconds = time.perf_counter() - started
    return weight, record


@torch.no_grad()
def preview(
    pretrained: Tensor,
    finetuned: Tensor,
    *,
    R: float = 0.8,
    min_rel_update: float = 1e-6,
    dtype: torch.dtype = torch.bfloat16,
    points: int = 0,
    name: str = "",
) -> list[Record]:
    """What :func:`edit` would do to one weight in each mode, read off one spectrum; nothing is edited.

    Args:
        pretrained, finetuned, R, min_rel_update, name: as in :func:`edit`.
        dtype: of the output for which ``edit_norm`` and ``realised`` are predicted, see :func:`weight.predict`.
        points: length of the quantile curve stored as ``spectrum``; 0 stores none.

    Returns:
        A record for each :data:`Mode`, ``action`` "inspected".
    """
    check_inputs(pretrained, [finetuned], name)
    _check_parameters("freevariance", "monosoup", R=R, min_rel_update=min_rel_update)
    started = time.perf_counter()
    task_vector = TaskVector(pretrained, [finetuned])
    common = new_record(name, pretrained, task_vector)
    common.action, common.reason = "inspected", _reason_to_skip(pretrained, common, min_rel_update)
    found = None if common.reason else spectrum_of(task_vector)
    if found is not None and points:
        common.spectrum = quantile_curve(found.sigma[: found.rank], points)
    records = []
    modes: tuple[Mode, ...] = get_args(Mode)
    for mode in modes:
        record = replace(common, mode=mode, R=R if mode == "variance" else None, edit_norm=0.0)
        if found is not None:
            recombine = _plan(found, task_vector, mode, R, "monosoup", record)
            if not recombine.keeps:
                try:
                    record.edit_norm, record.realised = predict(
                        pretrained, task_vector, recombine, dtype
                    )
                except OverflowError:  # the merge would say so; the rest of the inspection holds
                    record.edit_norm = record.realised = None
        # The spectrum is on the first one's account.
        record.seconds, started = time.perf_counter() - started, time.perf_counter()
        records.append(record)
    return records


def _check_parameters(mode: str, coefficients: str, **numbers: float) -> None:
    for key, value, choices in (
        ("mode", mode, get_args(Mode)),
        ("coefficients", coefficients, get_args(Rule)),
    ):
        if value not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    for key, number in numbers.items():
        check_number(key, number, RANGES)


def _reason_to_skip(pretrained: Tensor, record: Record, min_rel_update: float) -> str:
    """Why the spectrum is left alone; empty when it is not."""
    if pretrained.ndim < 2:
        return "fewer than two dimensions"
    if record.delta_norm == 0:
        return "no update"
    if min_rel_update == math.inf:
        return "switched off by min_rel_update"
    # A zero W0 has no relative update; its update is all there is, so it is edited (as in the reference).
    if record.rel_update is not None and record.rel_update < min_rel_update:
        return f"relative update below min_rel_update = {min_rel_update:g}"
    return ""


@dataclass(frozen=True)
class _Recombination:
    """ΔW -> λ_high ΔW P + λ_low ΔW (I − P), for row blocks of the tall view.

    ``basis`` (s, j) spans the leading side of the cut, or the trailing one; None when one factor, ``high``, says it all.
    """

    high: float
    low: float
    basis: Tensor | None = None
    leading: bool = True

    @property
    def keeps(self) -> bool:
        return self.basis is None and self.high == 1

    def __call__(self, delta: Tensor) -> Tensor:
        if self.basis is None:
            return delta * self.high
        inside, outside = (self.high, self.low) if self.leading else (self.low, self.high)
        rows = nonzero_rows(delta)
        if rows is not None:  # a row of zeros stays one, whatever the factors
            result = torch.zeros_like(delta, dtype=self.basis.dtype)
            result[rows] = self._mixed(delta[rows], inside, outside)
            return result
        return self._mixed(delta, inside, outside)

    def _mixed(self, delta: Tensor, inside: float, outside: float) -> Tensor:
        assert self.basis is not None
        x, q = delta.to(self.basis.dtype), self.basis
        if (
            x.stride(0) == 1
        ):  # blocks of wide matrices are column-major; a row-major result would slow all that follows
            return torch.addmm(x.T, q, q.T @ x.T, beta=outside, alpha=inside - outside).T
        return torch.addmm(x, x @ q, q.T, beta=outside, alpha=inside - outside)


def _plan(
    found: Spectrum, delta: TaskVector, mode: Mode, R: float, rule: Rule, record: Record
) -> _Recombination:
    """k and coefficients of one matrix, written into ``record``, and how to recombine its parts."""
    k = split_rank(found.sigma, mode, R)
    split = Split.at(found.sigma, k)
    high, low = split.coefficients(rule)
    record.mode, record.R = mode, R if mode == "variance" else None
    record.k, record.rank, record.effective_rank = k, found.rank, effective_rank(found.sigma)
    record.P_k, record.rho, record.cos_alpha = split.energy_high, split.rho, split.cos_alpha
    record.lambda_high, record.lambda_low = high, low
    record.solver = found.solver
    if k == found.rank:  # nothing below the cut: λ_low multiplies zero
        record.reason = "k = rank, no low-energy part"
        return _Recombination(high, high)
    if high == low:
        return _Recombination(high, high)
    # float32 errs by about 1e-7·‖ΔW‖. Where little of ΔW survives (`low` on a spiked spectrum) that shows; float64 then.
    kept = math.sqrt(high**2 * split.energy_high + low**2 * split.energy_low)
    # A user who allowed TF32 (or bf16 on the CPU) for training did not allow errors of 1e-3 here.
    enough = kept > 2**-4 and _full_precision(delta.device)
    recombine = _Recombination(
        high, low, *found.projection(k, delta.dtype if enough else torch.float64)
    )
    record.solver = found.solver  # the vectors may have needed another one
    return recombine


def _full_precision(device: torch.device) -> bool:
    """Products of float32 matrices are those of float32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is not None:  # torch >= 2.9, where the older question raises once this has been set
        return setting in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"
