"""The edited weight, rounded once to the dtype of the output, and what is left of the edit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_monosoup.kernel.task_vector import Block, Norms, TaskVector, flat
from mergekit_monosoup.report.record import Record

# ‖W_exact − W1‖ in units of eps·‖ΔW‖ under which nothing was intended.
NO_EDIT = 32

# ‖ΔW‖² whose products float32 holds, down to those of an edit that is nearly none:
# (NO_EDIT·eps)² = 1.5e-11 of it.
SMALLEST = 1e-24

# Takes row blocks of ΔW in the tall view, returns new tensors of the same shape and memory order.
Recombine = Callable[[Tensor], Tensor]


class Rounding(NamedTuple):
    """What rounding made of an edit.

    Attributes:
        edit_norm: ‖W − W1‖_F of the rounded weight, W1 = W0 + ΔW.
        realised: the share of the intended edit that survived the rounding,
            ⟨W − W1, W_exact − W1⟩/‖W_exact − W1‖²; None when no edit was intended, see
            :data:`NO_EDIT`.
    """

    edit_norm: float
    realised: float | None


def assemble(
    update: TaskVector, recombine: Recombine, alpha: float = 1.0
) -> tuple[Tensor, Rounding]:
    """Make W0 + alpha·recombine(ΔW), rounded once to the dtype of W0.

    Args:
        update: W0 and ΔW.
        recombine: see :data:`Recombine`.
        alpha: factor of the recombined update.

    Returns:
        The weight, a new tensor in the shape of W0, and its numbers.

    Raises:
        OverflowError: W has entries that the dtype cannot hold.
    """
    W0 = update.pretrained
    weight = torch.empty(W0.shape, dtype=W0.dtype, device=W0.device)
    products = _round_blocks(update, recombine, alpha, W0.dtype, weight)
    return weight, products.rounding(update.dtype, W0.dtype)


def predict(update: TaskVector, recombine: Recombine, dtype: torch.dtype) -> Rounding:
    """Return the numbers of :func:`assemble` for an output in ``dtype``, without the output.

    Inputs stored in ``dtype``: exactly those of the merge. Others: W is compared with W1 rounded
    to ``dtype``, which is what would be stored without the edit: ‖W − W1‖_F of the two as stored,
    and ⟨W − W1, W_exact − W1_exact⟩/‖W_exact − W1_exact‖². The entries of such a W1 lie anywhere
    between two numbers of ``dtype``, so a small edit moves few of them but by a whole step, and
    the share stays near 1 on average: nothing is eaten, but noise of that spacing is added.
    """
    return _round_blocks(update, recombine, 1.0, dtype).rounding(update.dtype, dtype)


@dataclass(frozen=True)
class Outcome:
    """What was decided about a matrix and what came of it, as :class:`Record` has it."""

    action: str
    reason: str
    edit_norm: float | None
    realised: float | None = None


def describe(
    update: TaskVector, norms: Norms, outcome: Outcome, solver: str | None = None
) -> Record:
    """Return the record of a matrix, with the fields that all methods share."""
    return Record(
        name=update.name,
        shape=tuple(update.pretrained.shape),
        dtype=str(update.pretrained.dtype).removeprefix("torch."),
        action=outcome.action,
        reason=outcome.reason,
        delta_norm=norms.update,
        rel_update=norms.relative_update,
        edit_norm=outcome.edit_norm,
        realised=outcome.realised,
        solver=update.solver_note(solver),
    )


# -- rounding --------------------------------------------------------------------------------------


class Products(NamedTuple):
    """Inner products over all entries, of the actual edit W − W1, the intended one, and ΔW."""

    survived: float  # ⟨actual, intended⟩
    intended: float  # ‖intended‖²
    actual: float  # ‖actual‖²
    update: float  # ‖ΔW‖²

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self))

    def rounding(self, arithmetic: torch.dtype, dtype: torch.dtype) -> Rounding:
        """Return what they mean for an output in ``dtype`` that was computed in ``arithmetic``.

        Raises:
            OverflowError: they are not finite.
        """
        if not self.finite:
            name = str(dtype).removeprefix("torch.")
            raise OverflowError(f"its edited entries leave the range of {name}")
        # Rounding of the recombination itself is no edit: `svc` with alpha = 1 multiplies by 1 in
        # a roundabout way.
        nothing = (NO_EDIT * torch.finfo(arithmetic).eps) ** 2 * self.update
        realised = self.survived / self.intended if self.intended > nothing else None
        return Rounding(math.sqrt(self.actual), realised)


def _round_blocks(
    update: TaskVector,
    recombine: Recombine,
    alpha: float,
    dtype: torch.dtype,
    weight: Tensor | None = None,
) -> Products:
    """Round W block by block, into ``weight`` if there is one.

    The products are summed in float64 where float32 cannot hold them.
    """
    out = None if weight is None else TaskVector.tall(weight)
    for accurate in (update.dtype, torch.float64):
        sums = torch.zeros(4, dtype=torch.float64, device=update.device)
        for block in update.blocks():
            change = recombine(block.delta).mul_(alpha)
            rounded = (block.base + change).to(dtype)
            if out is not None:
                out[block.index] = rounded
            # In this order both differences of close numbers are exact.
            actual = (rounded.to(block.base.dtype) - block.base).sub_(block.delta)
            if update.pretrained.dtype != dtype:
                actual.sub_(_rounding_error(block, dtype))
            intended = change.sub_(block.delta).to(actual.dtype)
            a, i = flat(actual).to(accurate), flat(intended).to(accurate)
            d = flat(block.delta).to(accurate)
            dots = [torch.dot(x, y) for x, y in ((a, i), (i, i), (a, a), (d, d))]
            sums += torch.stack(dots).double()
        products = Products(*sums.tolist())
        if accurate == torch.float64 or (products.update > SMALLEST and products.finite):
            break
    return products


def _rounding_error(block: Block, dtype: torch.dtype) -> Tensor:
    """Return W1 rounded to ``dtype``, minus W1."""
    tuned = block.base + block.delta
    return tuned.to(dtype).to(tuned.dtype).sub_(tuned)
