"""MonoSoup for one weight matrix, in the order of the paper's §4 (arXiv 2602.09689).

    ΔW = W1 − W0 = U Σ Vᵀ     split at k     ΔW_high = Σ_{i<=k} σ_i u_i v_iᵀ,  ΔW_low = ΔW − ΔW_high
    W  = W0 + alpha · (λ_high ΔW_high + λ_low ΔW_low)

With P the projector on the leading k right singular vectors,
λ_high ΔW_high + λ_low ΔW_low = λ_low ΔW + (λ_high − λ_low) ΔW P:
no left singular vector and no reconstruction from factors is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from mergekit_monosoup.kernel.assemble import Outcome, assemble, describe, predict
from mergekit_monosoup.kernel.eigen import EPS, Eigen
from mergekit_monosoup.kernel.spectrum import (
    Spectrum,
    effective_rank,
    leading_values,
    nonzero_rows,
    quantile_curve,
)
from mergekit_monosoup.kernel.task_vector import NO_ENTRIES, Norms, TaskVector
from mergekit_monosoup.parameters import MONOSOUP, Mode, Rule
from mergekit_monosoup.report.record import Record

# Exact ties happen: exp(H) of r equal singular values is r, and a staircase spectrum can meet R to
# the last digit. float64 misses both by 1e-13 either way, and the cut would be off by one by
# chance. Far above rounding, far below any meaning.
SLACK = 1e-9

# What is promised of the edited update: its error relative to ‖ΔW‖ (Frobenius).
PROMISED = 1e-5

NOT_UNIQUE = "cut between equal singular values: its entries are not unique, see `gap`"


@dataclass(frozen=True)
class Settings:
    """What decides the edit of a matrix, beside its weights.

    What each means stands in :mod:`mergekit_monosoup.parameters`.

    Raises:
        ValueError: one of them is out of its range.
    """

    mode: Mode = MONOSOUP["mode"].default
    R: float = MONOSOUP["R"].default
    alpha: float = MONOSOUP["alpha"].default
    coefficients: Rule = MONOSOUP["coefficients"].default
    min_rel_update: float = MONOSOUP["min_rel_update"].default

    def __post_init__(self) -> None:
        MONOSOUP.check(**vars(self))

    @property
    def threshold(self) -> float | None:
        """R where the mode reads it, for records."""
        return self.R if self.mode == "variance" else None


DEFAULTS = Settings()


# -- the split: paper, Eqs. 2-5 --------------------------------------------------------------------


def split_rank(sigma: Tensor, mode: Mode, R: float) -> int:
    """Return the rank k at which the spectrum is split, 1 <= k <= rank (paper, Eqs. 2-4).

    Args:
        sigma: (s,) float64, descending, numerical zeros exactly 0, ``sigma[0] > 0``.
        mode: ``freevariance``: ceil(effective rank). ``variance``: the smallest k with
            Σ_{i<=k}σ² >= R·Σσ².
        R: energy threshold in (0, 1]; ignored in ``freevariance``.
    """
    rank = int((sigma > 0).sum())
    if mode == "freevariance":
        k = math.ceil(effective_rank(sigma) * (1 - SLACK))
    else:
        # "tail <= (1 - R) of the energy" is the same test summed from the small end, where R = 1
        # is exact.
        energy = sigma.square()
        tail = energy.flip(0).cumsum(0).flip(0)[1:]
        k = 1 + int((tail > (1 - R) * (1 + SLACK) * energy.sum()).sum())
    return min(max(k, 1), rank)


# -- the coefficients: paper, Eqs. 6-8 -------------------------------------------------------------


class Coefficients(NamedTuple):
    """λ_high and λ_low, the factors of the two parts."""

    high: float
    low: float


@dataclass(frozen=True)
class Split:
    """What is read off the spectrum at k (paper, Eqs. 6-8).

    Attributes:
        energy_high: P_k, the share of the leading k singular values in ‖ΔW‖².
        energy_low: 1 − P_k, summed by itself.
        rho: (σ_{k+1}/σ_1)².
    """

    energy_high: float
    energy_low: float
    rho: float

    @classmethod
    def at(cls, sigma: Tensor, k: int) -> Split:
        """Read the split off ``sigma``, (s,) float64 and descending."""
        energy = sigma.square()
        # Summed from the small end: 1 − P_k loses its digits.
        low = float(energy[k:].flip(0).sum() / energy.sum())
        rho = float((sigma[k] / sigma[0]) ** 2) if k < len(sigma) else 0.0
        return cls(1 - low, low, rho)

    @property
    def cos_alpha(self) -> float:
        """cos α = √(1 − P_k)."""
        return math.sqrt(self.energy_low)

    def coefficients(self, rule: Rule) -> Coefficients:
        """Return λ_high and λ_low by a rule.

        ``monosoup`` is the paper's Eq. 8, the others are its ablations (Figure 6) and one control:
        ``scalar`` gives both parts ‖ΔW_mono‖/‖ΔW‖, the same shrinkage without the spectral split.
        """
        if rule == "scalar":
            both = self.norm_kept(self.coefficients("monosoup"))
            return Coefficients(both, both)
        low = {
            "monosoup": self.rho + (1 - self.rho) * self.cos_alpha,
            "rho": self.rho,
            "cos": self.cos_alpha,
            "uniform": 0.5,
            "high": 0.0,
            "low": 1.0,
        }[rule]
        return Coefficients(1 - low, low)

    def norm_kept(self, coefficients: Coefficients) -> float:
        """Return ‖λ_high ΔW_high + λ_low ΔW_low‖_F/‖ΔW‖_F; the two parts are orthogonal."""
        high, low = coefficients
        return math.sqrt(high**2 * self.energy_high + low**2 * self.energy_low)


@dataclass(frozen=True)
class Cut:
    """Where the spectrum of one matrix is split, and what becomes of the parts."""

    spectrum: Spectrum
    settings: Settings
    k: int
    split: Split
    coefficients: Coefficients

    @classmethod
    def of(cls, spectrum: Spectrum, settings: Settings) -> Cut:
        """Cut a spectrum that has a singular value above zero."""
        k = split_rank(spectrum.sigma, settings.mode, settings.R)
        split = Split.at(spectrum.sigma, k)
        return cls(spectrum, settings, k, split, split.coefficients(settings.coefficients))

    @property
    def has_tail(self) -> bool:
        """Whether a singular value lies below the cut; without one λ_low multiplies zero."""
        return self.k < self.spectrum.rank

    @property
    def gap(self) -> float | None:
        """(σ_k − σ_{k+1})/σ_k; None where nothing lies below the cut."""
        if not self.has_tail:
            return None
        kept, dropped = self.spectrum.sigma[self.k - 1 : self.k + 1].tolist()
        return (kept - dropped) / kept

    def error(self, noise: float) -> float:
        """Return what errors of ΔW do to the edited update, relative to ‖ΔW‖.

        An error turns the vectors next to the cut into each other by its size over the gap
        (Wedin's theorem), by a right angle at most, and what is turned gets the other λ.
        docs/methods.md derives it.

        Args:
            noise: size of the error between these two vectors, u_kᵀ E v_{k+1}, relative to ‖ΔW‖.
        """
        if self.gap is None:
            return 0.0
        high, low = self.coefficients
        turned = float(self.spectrum.sigma[self.k - 1] / self.spectrum.sigma.norm())
        return abs(high - low) * (min(turned, noise / self.gap) if self.gap > 0 else turned)

    @property
    def remark(self) -> str:
        """What limits the edit, for records; empty if nothing does."""
        if not self.has_tail:
            return "k = rank, no low-energy part"
        # The Gram matrix is off by eps·σ_1², which is 2·σ_k times the error of ΔW.
        sigma = self.spectrum.sigma
        noise = EPS * float(sigma[0] / sigma[self.k - 1] * sigma[0] / sigma.norm())
        return NOT_UNIQUE if self.error(noise) > PROMISED else ""

    def record(self, record: Record) -> Record:
        """Return ``record`` with the numbers of this cut."""
        return replace(
            record,
            mode=self.settings.mode,
            R=self.settings.threshold,
            k=self.k,
            rank=self.spectrum.rank,
            effective_rank=effective_rank(self.spectrum.sigma),
            gap=self.gap,
            P_k=self.split.energy_high,
            rho=self.split.rho,
            cos_alpha=self.split.cos_alpha,
            lambda_high=self.coefficients.high,
            lambda_low=self.coefficients.low,
        )


# -- the edit --------------------------------------------------------------------------------------


@torch.no_grad()  # a module's own parameters are the most natural input; NumPy refuses their grad
def edit(
    pretrained: Tensor,
    finetuned: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    mode: Mode = DEFAULTS.mode,
    R: float = DEFAULTS.R,
    alpha: float = DEFAULTS.alpha,
    coefficients: Rule = DEFAULTS.coefficients,
    min_rel_update: float = DEFAULTS.min_rel_update,
    name: str = "",
    eigen: Callable[[], Eigen] | None = None,
) -> tuple[Tensor, Record]:
    """Edit one weight by MonoSoup, and say what happened to it.

    Args:
        pretrained: W0, [out, rest...], any floating dtype and device; read as the matrix
            [out, rest].
        finetuned: W1, or several to average first; same shape, dtype and device as W0.
        weights: averaging weights (normalised); equal when not given.
        mode: how the split rank is chosen, see :func:`split_rank`.
        R: energy threshold of the mode ``variance``.
        alpha: Wise-FT interpolation towards W0 (0: W0, 1: the full edit).
        coefficients: rule for (λ_high, λ_low), see :meth:`Split.coefficients`.
        min_rel_update: with ‖ΔW‖_F/‖W0‖_F below it the weight stays as fine-tuned; ``inf``
            switches the edit off.
        name: for the record.
        eigen: decomposes the Gram matrix of ΔW where a caller has it already (a stack on an
            accelerator).

    Returns:
        The edited weight in the input dtype, a new tensor unless it is unchanged (then W1 itself),
        and its :class:`Record`.

    Precision: ΔW in float32 for inputs of 32 bits and less (exact, or off by one rounding per
    entry), in float64 for float64 inputs and averages; the spectrum in float64; the projector is
    applied in the precision of ΔW, in float64 where cancellation would show; one rounding to the
    input dtype at the end. The edited delta is within 1e-5 (relative, Frobenius) of a float64 SVD.
    Memory beside inputs and output: five (s, s) float64 buffers, s the shorter side, and about six
    blocks of at most ``task_vector.block_elements`` entries.

    Raises:
        TypeError: an input is no tensor.
        ValueError: a parameter out of range, shapes or dtypes that differ.
        NonFiniteError: NaN or infinite entries in an input.
        OverflowError: entries of the result leave the range of the input dtype, or squares that of
            float64.
        SolverError: no eigensolver succeeded, and a float64 SVD did not either.
    """
    tuned = [finetuned] if isinstance(finetuned, Tensor) else list(finetuned)
    update = TaskVector(pretrained, tuned, weights, name=name)
    settings = Settings(mode, R, alpha, coefficients, min_rel_update)
    while True:
        try:
            return _edit(update, settings, eigen)
        except RuntimeError as error:
            update.continue_on_cpu(error)  # raises anything but a lack of memory
            eigen = None  # it lies on the accelerator


def _edit(
    update: TaskVector, settings: Settings, eigen: Callable[[], Eigen] | None
) -> tuple[Tensor, Record]:
    started = time.perf_counter()
    norms = update.norms()
    if reason := reason_to_skip(update, norms, settings.min_rel_update):
        weight, outcome = _apply(update, settings.alpha, KEEP, reason)
        record = describe(update, norms, outcome)
    else:
        spectrum = Spectrum(update.deltas, update.rows, update.width, update.device, eigen)
        cut = Cut.of(spectrum, settings)
        if too_close(cut, update):
            del spectrum, cut  # its buffers are as large as those to come
            cut = Cut.of(_exact_spectrum(update), settings)
        recombine = Recombination.of(cut, update.dtype, update.device)
        weight, outcome = _apply(update, settings.alpha, recombine, cut.remark)
        record = cut.record(describe(update, norms, outcome, cut.spectrum.solver))
    return update.sent_back(weight), replace(record, seconds=time.perf_counter() - started)


def too_close(cut: Cut, update: TaskVector) -> bool:
    """Return whether the cut needs ΔW in float64, for a float32 difference is rounded.

    That rounding changed the edit by 3.5e-4 at a gap of 1.6e-6, in a matrix of 64 columns. Random
    matrices have gaps that are too small once in some ten thousand.
    """
    # eps/√(entries) where all entries move alike; few rows that move have fewer entries, but never
    # less than rank².
    noise = torch.finfo(torch.float32).eps / cut.spectrum.rank
    return update.rounded and cut.error(noise) > PROMISED


def _exact_spectrum(update: TaskVector) -> Spectrum:
    """Return the spectrum of ΔW in float64, in which all that follows is done, too."""
    update.dtype = torch.float64
    return Spectrum(update.deltas, update.rows, update.width, update.device)


def _apply(
    update: TaskVector, alpha: float, recombine: Recombination, reason: str
) -> tuple[Tensor, Outcome]:
    """Assemble the weight; one that stays as fine-tuned is handed back itself."""
    if update.empty:  # nothing to average or to interpolate either
        return update.finetuned[0], Outcome("copied", reason, 0.0)
    models = len(update.finetuned)
    action, reason = action_of(recombine, alpha, models, reason)
    if action == "copied" and models == 1:
        return update.finetuned[0], Outcome(action, reason, 0.0)
    weight, rounding = assemble(update, recombine, alpha)
    realised = rounding.realised if action == "edited" else None
    return weight, Outcome(action, reason, rounding.edit_norm, realised)


def action_of(recombine: Recombination, alpha: float, models: int, reason: str) -> tuple[str, str]:
    """Return action and reason of the record of a matrix.

    Args:
        recombine: what becomes of its update.
        alpha: of Wise-FT.
        models: how many were averaged.
        reason: why it is left as fine-tuned, or what limits the edit.
    """
    if not recombine.keeps:
        return "edited", reason
    if alpha != 1:
        towards = f"interpolated towards the pretrained weight with alpha = {alpha:g}"
        return "edited", f"{reason}; {towards}"
    return "copied", reason if models == 1 else f"{reason}; average of {models} models"


def reason_to_skip(update: TaskVector, norms: Norms, min_rel_update: float) -> str:
    """Return why the spectrum of a matrix is left alone; empty when it is not."""
    if update.empty:
        return NO_ENTRIES
    if update.pretrained.ndim < 2:
        return "fewer than two dimensions"
    if norms.update == 0:
        return "no update"
    if min_rel_update == math.inf:
        return "switched off by min_rel_update"
    # A zero W0 has no relative update; its update is all there is, so it is edited (as in the
    # reference).
    if norms.relative_update is not None and norms.relative_update < min_rel_update:
        return f"relative update below min_rel_update = {min_rel_update:g}"
    return ""


@dataclass(frozen=True)
class Recombination:
    """ΔW -> λ_high ΔW P + λ_low ΔW (I − P), for row blocks of the tall view.

    Attributes:
        coefficients: λ_high and λ_low.
        basis: (s, j), spans one side of the cut; None when one factor, λ_high, says it all.
        leading: whether that side is the leading one.
    """

    coefficients: Coefficients
    basis: Tensor | None = None
    leading: bool = True

    @classmethod
    def of(cls, cut: Cut, dtype: torch.dtype, device: torch.device) -> Recombination:
        """Compute the vectors of the smaller side of the cut, if they matter.

        ``dtype``, ``device``: of the arithmetic on ΔW.
        """
        high, low = cut.coefficients
        if not cut.has_tail or high == low:
            return cls(Coefficients(high, high))
        # float32 errs by about 1e-7·‖ΔW‖. Where little of ΔW survives (`low` on a spiked spectrum)
        # that shows; float64 then. A user who allowed TF32 (or bf16 on the CPU) for training did
        # not allow errors of 1e-3 here.
        kept = cut.split.norm_kept(cut.coefficients)
        enough = kept > 2**-4 and _full_precision(device)
        return cls(
            cut.coefficients, *cut.spectrum.projection(cut.k, dtype if enough else torch.float64)
        )

    @property
    def keeps(self) -> bool:
        """Whether it leaves ΔW as it is."""
        return self.basis is None and self.coefficients.high == 1

    def __call__(self, delta: Tensor) -> Tensor:
        if self.basis is None:
            return delta * self.coefficients.high
        rows = nonzero_rows(delta)
        if rows is None:
            return self._mix(delta, self.basis)
        # A row of zeros stays one, whatever the factors.
        result = torch.zeros_like(delta, dtype=self.basis.dtype)
        result[rows] = self._mix(delta[rows], self.basis)
        return result

    def _mix(self, delta: Tensor, basis: Tensor) -> Tensor:
        high, low = self.coefficients
        inside, outside = (high, low) if self.leading else (low, high)
        x, q = delta.to(basis.dtype), basis
        # Blocks of wide matrices are column-major; a row-major result would slow all that follows.
        if x.stride(0) == 1:
            return torch.addmm(x.T, q, q.T @ x.T, beta=outside, alpha=inside - outside).T
        return torch.addmm(x, x @ q, q.T, beta=outside, alpha=inside - outside)


KEEP = Recombination(Coefficients(1.0, 1.0))


def _full_precision(device: torch.device) -> bool:
    """Whether products of float32 matrices are those of float32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is not None:  # torch >= 2.9, where the older question raises once this has been set
        return setting in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


# -- the same without the edit ---------------------------------------------------------------------


@torch.no_grad()
def preview(
    pretrained: Tensor,
    finetuned: Tensor,
    *,
    R: float = DEFAULTS.R,
    min_rel_update: float = DEFAULTS.min_rel_update,
    dtype: torch.dtype = torch.bfloat16,
    points: int = 0,
    name: str = "",
) -> list[Record]:
    """Predict what :func:`edit` would do to one weight in each mode, from one spectrum.

    Args:
        pretrained, finetuned, R, min_rel_update, name: as in :func:`edit`.
        dtype: of the output for which ``edit_norm`` and ``realised`` are predicted, see
            :func:`assemble.predict`.
        points: length of the quantile curve stored as ``spectrum``; one less is the number of the
            first singular values stored as ``leading``; 0 stores neither.

    Returns:
        A record for each :data:`Mode`, ``action`` "inspected".
    """
    update = TaskVector(pretrained, [finetuned], name=name)
    settings = Settings(R=R, min_rel_update=min_rel_update)
    started = time.perf_counter()
    norms = update.norms()
    reason = reason_to_skip(update, norms, min_rel_update)
    if reason:
        record = describe(update, norms, Outcome("inspected", reason, 0.0))
        return of_each_mode(partial(unseen, record), settings, started)

    spectrum = Spectrum(update.deltas, update.rows, update.width, update.device)
    shape = drawn(spectrum, points)

    def inspected(of_mode: Settings) -> Record:
        nonlocal spectrum
        cut = Cut.of(spectrum, of_mode)
        if too_close(cut, update):
            spectrum = _exact_spectrum(update)
            cut = Cut.of(spectrum, of_mode)
        return replace(_predict(update, cut, norms, dtype), **shape)

    return of_each_mode(inspected, settings, started)


def drawn(spectrum: Spectrum, points: int) -> dict[str, Any]:
    """Return the fields of a record that a drawing of the spectrum needs; none for 0 points."""
    sigma = spectrum.sigma[: spectrum.rank]
    if not points:
        return {}
    return {"spectrum": quantile_curve(sigma, points), "leading": leading_values(sigma, points - 1)}


def unseen(record: Record, settings: Settings) -> Record:
    """Return the record of a matrix that has no spectrum, for one mode."""
    return replace(record, mode=settings.mode, R=settings.threshold)


def of_each_mode(
    inspected: Callable[[Settings], Record], settings: Settings, started: float
) -> list[Record]:
    """Return the record of each mode with its time; the spectrum is on the first one's account."""
    records = []
    for mode in get_args(Mode):
        record = inspected(replace(settings, mode=mode))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        records.append(replace(record, seconds=seconds))
    return records


def _predict(update: TaskVector, cut: Cut, norms: Norms, dtype: torch.dtype) -> Record:
    outcome = Outcome("inspected", cut.remark, 0.0)
    recombine = Recombination.of(cut, update.dtype, update.device)
    if not recombine.keeps:
        try:
            rounding = predict(update, recombine, dtype)
            outcome = replace(outcome, edit_norm=rounding.edit_norm, realised=rounding.realised)
        except OverflowError:  # the merge would say so; the rest of the inspection holds
            outcome = replace(outcome, edit_norm=None)
    return cut.record(describe(update, norms, outcome, cut.spectrum.solver))
