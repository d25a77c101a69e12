"""MonoSoup and SVC for updates of low rank, as LoRA stores them, in matrices of that rank.

    ΔW = Σ_i c_i s_i B_i A_i = B D A      B = [B_1 … B_K] (out, r),  A (r, in),  D diagonal
    B = Q_b R_b,  Aᵀ = Q_a R_a            thin QR, float64: :class:`ThinQR`
    ΔW = Q_b C Q_aᵀ,  C = R_b D R_aᵀ      the core, r x r

Q_b and Q_a have orthonormal columns, so singular values, norms and inner products of cores are
those of the updates. The formulas are those of monosoup.py and svc.py, given cores in the place of
matrices; what they make of the core is brought back into B, or into A. That takes O((out + in)·r²)
operations instead of the O(min(out, in)²·max(out, in)) of the whole matrix.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.kernel import monosoup, svc
from mergekit_monosoup.kernel.assemble import Outcome, Products, Recombine, Rounding, describe
from mergekit_monosoup.kernel.monosoup import KEEP, Cut, Recombination, Settings, action_of
from mergekit_monosoup.kernel.spectrum import Spectrum
from mergekit_monosoup.kernel.task_vector import (
    Norms,
    TaskVector,
    block_elements,
    normalise,
)
from mergekit_monosoup.parameters import SVC
from mergekit_monosoup.report.record import Record

# σ_1/σ_r of a factor up to which XᵀX is decomposed instead of X: that errs by the square of it
# times eps, 2e-10 of the update.
WELL_CONDITIONED = 1e3


@dataclass(frozen=True)
class Factors:
    """ΔW = scale·B·A of one matrix.

    Attributes:
        B, A: (out, r) and (r, in), any floating dtype.
        scale: the adapter's scaling, lora_alpha/r for one.
        flipped: whether the model stores Wᵀ, as embeddings and GPT-2's linear layers do. Only
            `svc` tells the two sides apart.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0
    flipped: bool = False

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, as the model stores it."""
        out, rest = len(self.B), self.A.shape[1]
        return (rest, out) if self.flipped else (out, rest)

    def dense(self) -> Tensor:
        """Return ΔW as the model stores it, float64."""
        update = self.scale * (self.B.double() @ self.A.double())
        return update.T if self.flipped else update


class ThinQR:
    """X = Q·R of a tall X, (rows, r) float64, with Q only as a factor.

    R is the Cholesky factor of XᵀX where that is accurate, and Householder's otherwise: at
    12288 x 64 the edit of an adapter takes half the time.

    Attributes:
        R: (min(rows, r), r), upper triangular.
    """

    def __init__(self, X: Tensor):
        self._X = X
        self._Q: Tensor | None = None
        self.R, info = torch.linalg.cholesky_ex(X.T @ X, upper=True)
        accurate = int(info) == 0
        if accurate:
            sigma = torch.linalg.svdvals(self.R)
            accurate = bool(sigma[0] < WELL_CONDITIONED * sigma[-1])
        if not accurate:  # columns that depend on each other, as those of an adapter given twice
            self._Q, self.R = torch.linalg.qr(X)

    def times(self, M: Tensor) -> Tensor:
        """Return Q·M."""
        if self._Q is None:
            return self._X @ torch.linalg.solve_triangular(self.R, M, upper=True)
        return self._Q @ M


class Sum:
    """ΔW = Σ c_i ΔW_i of several low-rank updates of one matrix, factored into its core.

    Attributes:
        tasks: the ΔW_i.
        order: the longer side of ΔW.
        core: C, (min(r, out), min(r, in)) float64.
    """

    def __init__(self, tasks: Sequence[Factors], coefficients: Sequence[float], name: str = ""):
        """Factor the updates.

        Args:
            tasks: of one shape, on one device.
            coefficients: the c_i.
            name: of the matrix.
        """
        self.tasks, self._name = tuple(tasks), name
        self.order = max(tasks[0].shape)
        self._B = _side_by_side([task.B.double() for task in tasks], 1)
        self._A = _side_by_side([task.A.double() for task in tasks], 0)
        self._left, self._right = ThinQR(self._B), ThinQR(self._A.T)
        self._lower, self._upper = self._left.R, self._right.R
        self._diagonal = torch.cat(
            [
                self._A.new_full((task.rank,), c * task.scale)
                for c, task in zip(coefficients, tasks, strict=True)
            ]
        )
        self.core = self._between(self._lower, self._upper)

    def _between(self, lower: Tensor, upper: Tensor) -> Tensor:
        return (lower * self._diagonal) @ upper.T

    def task_cores(self) -> list[Tensor]:
        """Return the core of each ΔW_i, without its coefficient."""
        cores, start = [], 0
        for task in self.tasks:
            columns = slice(start, start := start + task.rank)
            cores.append(task.scale * (self._lower[:, columns] @ self._upper[:, columns].T))
        return cores

    def as_task_vector(self, cores: Sequence[Tensor], coefficients: Sequence[float]) -> TaskVector:
        """Return Σ c_i C_i as the formulas of a method take it, beside a W0 of zero."""
        origin = torch.zeros_like(cores[0])
        return TaskVector(
            origin, cores, coefficients, average=False, name=self._name, order=self.order
        )

    def norms(self, update: TaskVector, pretrained: float | None) -> Norms:
        """Return ‖ΔW‖_F, and ‖W0‖_F if it is known."""
        return Norms(update.norms().update, pretrained or 0.0)

    @property
    def edits_left(self) -> bool:
        """Whether MonoSoup edits B: always, but where A has fewer columns than rows."""
        return self.core.shape[0] <= self.core.shape[1]

    def spectrum(self) -> Spectrum:
        """Return the spectrum of ΔW, with the singular vectors of the side that is edited."""
        tall = self.core.T if self.edits_left else self.core
        return Spectrum(lambda: [tall], self.order, tall.shape[1], tall.device)

    def noted(self, record: Record) -> Record:
        """Return the record of a core as that of the matrix."""
        first = self.tasks[0]
        return replace(record, shape=first.shape, dtype=str(first.B.dtype).removeprefix("torch."))

    def recombined(self, recombine: Recombine | None, alpha: float, *, on_left: bool) -> Result:
        """Return alpha times the sum with one of its sides recombined, the other as it is.

        Args:
            recombine: takes R_bᵀ or R_aᵀ and returns a new one; None leaves both as they are.
            alpha: a factor.
            on_left: it is R_bᵀ.
        """
        left = recombine if on_left else None
        right = None if on_left else recombine
        lower = self._lower if left is None else left(self._lower.T).T
        upper = self._upper if right is None else right(self._upper.T).T
        core = alpha * self._between(lower, upper)
        several = len(self.tasks) > 1
        factor = alpha * self._diagonal if several else alpha
        B = self._B * factor if left is None else self._left.times(lower * factor)
        A = self._A if right is None else self._right.times(upper).T
        first = self.tasks[0]
        if several:
            return Result(self, replace(first, B=B, A=A, scale=1.0), core)
        return Result(self, replace(first, B=B, A=first.A if right is None else A), core)

    def plain(self) -> Factors:
        """Return the sum itself; a single update as it was given."""
        first, *others = self.tasks
        return self.recombined(None, 1.0, on_left=True).factors if others else first

    def compressed(self, core: Tensor, rank: int) -> tuple[Factors, float]:
        """Return the best approximation of Q_b·core·Q_aᵀ of a rank, and the energy that it drops.

        The energy is a share of the squared singular values. B and A get a root of them each.
        """
        U, sigma, Vt = torch.linalg.svd(core, full_matrices=False)
        kept = slice(0, min(rank, len(sigma)))
        root = sigma[kept].sqrt()
        B, A = self._left.times(U[:, kept] * root), self._right.times(Vt[kept].T * root).T
        energy = sigma.square()
        total = float(energy.sum())
        dropped = float(energy[kept.stop :].sum()) / total if total else 0.0
        return replace(self.tasks[0], B=B, A=A, scale=1.0), dropped


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


@dataclass(frozen=True)
class Result:
    """What became of a sum.

    Attributes:
        sum: it.
        factors: the new ones. A single update keeps its scale, and the factor that was not
            recombined.
        core: of the new update.
    """

    sum: Sum
    factors: Factors
    core: Tensor

    @property
    def edit_norm(self) -> float:
        """‖new ΔW − ΔW‖_F, of factors that are not rounded to the dtype of an adapter yet."""
        return float(torch.linalg.matrix_norm(self.core - self.sum.core))

    def finished(self, record: Record, rank: int | None, started: float) -> Edited:
        """Compress to a rank, if one is given and less than there is, and complete the record."""
        factors, dropped = self.factors, 0.0
        if rank is not None and rank < factors.rank:
            before = factors.rank
            factors, dropped = self.sum.compressed(self.core, rank)
            note = f"rank {before} compressed to {factors.rank}, dropping {dropped:.1e} of ‖ΔW‖²"
            record = replace(record, reason="; ".join(filter(None, [record.reason, note])))
        seconds = time.perf_counter() - started
        record = replace(self.sum.noted(record), edit_norm=self.edit_norm, seconds=seconds)
        return Edited(factors, self.sum.plain(), record, dropped)


@dataclass(frozen=True)
class Edited:
    """An edited update.

    Attributes:
        factors: B and A in float64, but for those that are the ones that were given.
        before: the update without the edit, as one.
        record: what happened. ``realised`` is None, for it depends on the base that the update is
            added to; ``edit_norm`` is that of the update before it was compressed.
        dropped: share of ‖ΔW‖² that compressing it dropped.
    """

    factors: Factors
    before: Factors
    record: Record
    dropped: float = 0.0


# -- the methods -----------------------------------------------------------------------------------


@torch.no_grad()
def edit(
    tasks: Sequence[Factors],
    settings: Settings = monosoup.DEFAULTS,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    pretrained_norm: float | None = None,
    name: str = "",
) -> Edited:
    """Edit the average of some low-rank updates by MonoSoup; see :func:`monosoup.edit`.

    Args:
        tasks: the updates, one or several, of one shape.
        settings: as of MonoSoup.
        weights: averaging weights (normalised); equal when not given.
        rank: compress the result to it.
        pretrained_norm: ‖W0‖_F, for the relative update and ``min_rel_update``.
        name: for the record.

    Returns:
        One update: B edited, A and scale as given (A edited, not B, if r > in < out); B itself if
        nothing was to be edited. Several: their B's and A's side by side, of the sum of their
        ranks, and scale 1.

    Raises:
        ValueError: the weights are wrong.
        NonFiniteError: NaN or infinite entries.
        SolverError: the core could not be decomposed.
    """
    started = time.perf_counter()
    shares = normalise(weights if weights is not None else [1.0] * len(tasks))
    total = Sum(tasks, shares, name)
    update = total.as_task_vector([total.core], [1.0])
    norms = total.norms(update, pretrained_norm)
    recombine, limit = KEEP, monosoup.reason_to_skip(update, norms, settings.min_rel_update)
    cut = None
    if not limit:
        cut = Cut.of(total.spectrum(), settings)
        recombine, limit = Recombination.of(cut, torch.float64, total.core.device), cut.remark
    action, reason = action_of(recombine, settings.alpha, len(tasks), limit)
    solver = cut.spectrum.solver if cut else None
    record = describe(update, norms, Outcome(action, reason, None), solver)
    record = cut.record(record) if cut else record
    change = None if recombine.keeps else recombine
    result = total.recombined(change, settings.alpha, on_left=total.edits_left)
    return result.finished(record, rank, started)


@torch.no_grad()
def calibrate(
    tasks: Sequence[Factors],
    *,
    weights: Sequence[float] | None = None,
    alpha: float = SVC["alpha"].default,
    scaling: float = SVC["scaling"].default,
    normalize: bool = SVC["normalize"].default,
    rank: int | None = None,
    pretrained_norm: float | None = None,
    name: str = "",
) -> Edited:
    """Merge low-rank updates of several tasks and calibrate the sum; see :func:`svc.calibrate`.

    Args:
        tasks: the updates of one shape, at least two.
        weights, alpha, scaling, normalize: as there.
        rank, pretrained_norm, name: as in :func:`edit`.

    Returns:
        As :func:`edit` for several; calibrated is the side that is shorter in the core.

    Raises:
        As :func:`edit`.
    """
    started = time.perf_counter()
    SVC.check(alpha=alpha, scaling=scaling, normalize=normalize)
    weights = weights if weights is not None else [1.0] * len(tasks)
    shares = svc.merge_weights(weights, scaling, normalize)
    total = Sum(tasks, shares, name)
    flipped = tasks[0].flipped
    cores = [core.T if flipped else core for core in total.task_cores()]
    updates = total.as_task_vector(cores, shares)
    norms = total.norms(updates, pretrained_norm)
    if reason := svc.reason_to_skip(updates, norms, len(tasks)):
        outcome = Outcome("copied", f"{reason}; merge of {len(tasks)} models", None)
        result = total.recombined(None, 1.0, on_left=True)
        return result.finished(describe(updates, norms, outcome), rank, started)
    record, calibrated = svc.prepare(updates, norms, len(tasks), alpha)
    result = total.recombined(calibrated, 1.0, on_left=updates.transposed != flipped)
    return result.finished(record, rank, started)


# -- the same without the edit ---------------------------------------------------------------------


@torch.no_grad()
def preview(
    task: Factors,
    *,
    pretrained: Tensor | None = None,
    R: float = monosoup.DEFAULTS.R,
    min_rel_update: float = monosoup.DEFAULTS.min_rel_update,
    dtype: torch.dtype = torch.bfloat16,
    points: int = 0,
    name: str = "",
) -> list[Record]:
    """Predict what :func:`edit` would do in each mode; see :func:`monosoup.preview`.

    Args:
        task: the update.
        pretrained: W0, for the relative update, and for ``realised``: what would survive if the
            edited update was added to W0 and the sum rounded to ``dtype``.
        R, min_rel_update, dtype, points, name: as there.
    """
    started = time.perf_counter()
    total = Sum([task], [1.0], name)
    update = total.as_task_vector([total.core], [1.0])
    settings = Settings(R=R, min_rel_update=min_rel_update)
    size = None if pretrained is None else float(torch.linalg.vector_norm(pretrained.double()))
    norms = total.norms(update, size)
    if reason := monosoup.reason_to_skip(update, norms, min_rel_update):
        record = total.noted(describe(update, norms, Outcome("inspected", reason, 0.0)))
        return monosoup.of_each_mode(
            lambda of_mode: monosoup.unseen(record, of_mode), settings, started
        )
    spectrum = total.spectrum()
    shape = monosoup.drawn(spectrum, points)

    def inspected(of_mode: Settings) -> Record:
        cut = Cut.of(spectrum, of_mode)
        recombine = Recombination.of(cut, torch.float64, total.core.device)
        change = None if recombine.keeps else recombine
        result = total.recombined(change, 1.0, on_left=total.edits_left)
        outcome = Outcome("inspected", cut.remark, result.edit_norm)
        if pretrained is not None and not recombine.keeps:
            try:
                rounding = survival(pretrained, task, result.factors, dtype)
                outcome = replace(outcome, edit_norm=rounding.edit_norm, realised=rounding.realised)
            except OverflowError:  # merging would say so; the rest of the inspection holds
                outcome = replace(outcome, edit_norm=None)
        record = cut.record(describe(update, norms, outcome, spectrum.solver))
        return replace(total.noted(record), **shape)

    return monosoup.of_each_mode(inspected, settings, started)


def survival(pretrained: Tensor, before: Factors, after: Factors, dtype: torch.dtype) -> Rounding:
    """Return what is left of an edit when the update is added to W0, and the sum rounded.

    Both sums are rounded, that with the update as it was and that with the edited one; see
    :func:`assemble.predict`.

    Args:
        pretrained: W0, [out, rest...].
        before, after: the update and the edited one, as the model stores them.
        dtype: of the merged weight.

    Raises:
        OverflowError: W has entries that the dtype cannot hold.
    """
    W0 = pretrained.flatten(1)
    work = torch.promote_types(torch.float32, W0.dtype)
    sides = [_sides(factors, work) for factors in (before, after)]
    step = max(1, block_elements(W0.device) // max(1, W0.shape[1]))
    sums = torch.zeros(4, dtype=torch.float64, device=W0.device)
    for start in range(0, len(W0), step):
        base = W0[start : start + step].to(work)
        old, new = (left[start : start + step] @ right for left, right in sides)
        stored = (base + new).to(dtype).double() - (base + old).to(dtype).double()
        intended = (new - old).double()
        pairs = ((stored, intended), (intended, intended), (stored, stored), (old, old))
        sums += torch.stack([(x * y).sum().double() for x, y in pairs])
    return Products(*sums.tolist()).rounding(work, dtype)


def _sides(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is ΔW as the model stores it."""
    B, A = (factors.scale * factors.B.double()).to(dtype), factors.A.to(dtype)
    return (A.T, B.T) if factors.flipped else (B, A)


# -- several updates -------------------------------------------------------------------------------


@torch.no_grad()
def inner_products(tasks: Sequence[Factors]) -> Tensor:
    """Return G (m, m) float64, G_ij = ⟨ΔW_i, ΔW_j⟩_F = s_i s_j ⟨B_iᵀB_j, A_i A_jᵀ⟩.

    Unlike cores, whose order is the sum of all ranks, this stays cheap for dozens of updates.
    """
    B = torch.cat([task.B.double() for task in tasks], dim=1)
    A = torch.cat([task.scale * task.A.double() for task in tasks])
    ranks = [task.rank for task in tasks]
    rows = ((B.T @ B) * (A @ A.T)).split(ranks)
    return torch.stack(
        [torch.stack([block.sum() for block in row.split(ranks, 1)]) for row in rows]
    )
