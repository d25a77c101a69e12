"""One weight in, one weight and its record out: what the kernels of all methods share around their mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_monosoup.kernel.eigen import LOG, Eigen, out_of_memory
from mergekit_monosoup.kernel.spectrum import Spectrum
from mergekit_monosoup.kernel.task_vector import NonFiniteError, TaskVector, flat
from mergekit_monosoup.report import Record

# ‖W_exact − W1‖ in units of eps·‖ΔW‖ under which nothing was intended.
NO_EDIT = 32

# ‖ΔW‖² whose products float32 holds, down to those of an edit that is nearly none: (NO_EDIT·eps)² = 1.5e-11 of it.
SMALLEST = 1e-24

QUANTISED = "8-bit numbers are codes, which mean a weight only with their scales; convert the checkpoint to bfloat16 first"


def check_inputs(pretrained: Tensor, tuned: Sequence[Tensor], name: str) -> None:
    """Raises ValueError unless all are floating point of 16 bits or more and agree in shape, dtype and device."""
    where = f"{name}: " if name else ""
    if not tuned:
        raise ValueError(f"{where}no fine-tuned weight was given")
    for w in (pretrained, *tuned):
        if not isinstance(w, Tensor):
            raise TypeError(f"weights must be torch tensors, got {type(w).__name__}")
        if w.is_floating_point() and w.dtype.itemsize == 1:
            raise ValueError(f"{where}{w.dtype}: {QUANTISED}")
        if not w.is_floating_point() or (w.shape, w.dtype, w.device) != (
            pretrained.shape,
            pretrained.dtype,
            pretrained.device,
        ):
            raise ValueError(
                f"{where}weights must be floating point and agree in shape, dtype and device: the pretrained one is "
                f"{tuple(pretrained.shape)} {pretrained.dtype} on {pretrained.device}, "
                f"a fine-tuned one {tuple(w.shape)} {w.dtype} on {w.device}"
            )


def check_number(
    key: str, number: object, ranges: Mapping[str, tuple[str, Callable[[float], bool]]]
) -> None:
    """Raises ValueError: not a number, or out of its range."""
    words, holds = ranges[key]
    try:
        fits = not isinstance(number, bool | str) and holds(float(number))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{key} must be a number {words}, got {number!r}")


@torch.no_grad()  # a module's own parameters are the most natural input, and NumPy refuses tensors that require grad
def or_on_cpu(
    work: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Record]],
    pretrained: Tensor,
    tuned: Sequence[Tensor],
    name: str,
) -> tuple[Tensor, Record]:
    """``work(pretrained, tuned)``, on the CPU when the accelerator has too little memory for it, or no float64 (MPS)."""
    reason = f"no float64 on {pretrained.device}"
    if pretrained.device.type != "mps":
        try:
            return work(pretrained, tuned)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = f"out of memory on {pretrained.device}"
            LOG.warning("%s: %s, continuing on the CPU", name or "a tensor", reason)
    weight, record = work(pretrained.cpu(), [w.cpu() for w in tuned])
    record.solver = f"{record.solver or 'none'}; {reason}"
    return weight.to(pretrained.device), record


def new_record(name: str, pretrained: Tensor, task_vector: TaskVector) -> Record:
    """A record with what is known before any spectrum.

    Raises:
        NonFiniteError: an input has NaN or infinite entries.
        OverflowError: their squares are not finite.
    """
    try:
        delta_norm, base_norm = task_vector.norms()
    except NonFiniteError as error:
        raise NonFiniteError(error.counts, name) from None
    except OverflowError as error:
        raise OverflowError(f"{name}: {error}" if name else str(error)) from None
    return Record(
        name=name,
        shape=tuple(pretrained.shape),
        dtype=str(pretrained.dtype).removeprefix("torch."),
        delta_norm=delta_norm,
        rel_update=delta_norm / base_norm if base_norm > 0 else None,
    )


def spectrum_of(task_vector: TaskVector, eigen: Callable[[], Eigen] | None = None) -> Spectrum:
    """Singular values of ΔW, as the tall view has it; ``eigen``: see :class:`Spectrum`."""
    return Spectrum(
        lambda: (block.delta for block in task_vector.blocks()),
        task_vector.rows,
        task_vector.width,
        task_vector.device,
        eigen,
    )


def assemble(
    pretrained: Tensor,
    task_vector: TaskVector,
    recombine: Callable[[Tensor], Tensor],
    alpha: float = 1.0,
) -> tuple[Tensor, float, float | None]:
    """W0 + alpha·recombined ΔW, rounded once to the input dtype.

    ``recombine`` takes row blocks of ΔW in the tall view and returns new tensors of the same shape *and memory order*.

    Returns:
        The weight; ‖W − W1‖_F of the rounded weight, W1 = W0 + ΔW; and the share of the intended edit that survived the
        rounding, ⟨W − W1, W_exact − W1⟩/‖W_exact − W1‖² (None when no edit was intended, see :data:`NO_EDIT`).

    Raises:
        OverflowError: W has entries that the input dtype cannot hold.
    """
    weight = torch.empty(pretrained.shape, dtype=pretrained.dtype, device=pretrained.device)
    return weight, *_rounded(
        task_vector, recombine, alpha, pretrained.dtype, out=TaskVector.tall(weight)
    )


def predict(
    pretrained: Tensor,
    task_vector: TaskVector,
    recombine: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> tuple[float, float | None]:
    """The numbers of :func:`assemble` for an output in ``dtype``, without the output.

    Inputs stored in ``dtype``: exactly those of the merge. Others: W is compared with W1 rounded to ``dtype``, which is what
    would be stored without the edit: ‖W − W1‖_F of the two as stored, and ⟨W − W1, W_exact − W1_exact⟩/‖W_exact − W1_exact‖².
    The entries of such a W1 lie anywhere between two numbers of ``dtype``, so a small edit moves few of them but by a
    whole step, and the share stays near 1 on average: nothing is eaten, but noise of that spacing is added.
    """
    return _rounded(task_vector, recombine, 1.0, dtype, also_tuned=pretrained.dtype != dtype)


def _rounded(
    task_vector: TaskVector,
    recombine: Callable[[Tensor], Tensor],
    alpha: float,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    also_tuned: bool = False,
) -> tuple[float, float | None]:
    """‖W − W1‖_F and the share that survived, of W in ``dtype``, which is written to the tall view ``out`` if there is one.

    ``also_tuned`` rounds W1 too.
    """
    sums = _sums(task_vector, recombine, alpha, dtype, out, also_tuned)
    if task_vector.dtype == torch.float32 and not (
        sums[3] > SMALLEST and all(map(math.isfinite, sums))
    ):
        sums = _sums(task_vector, recombine, alpha, dtype, out, also_tuned, torch.float64)
    if not all(map(math.isfinite, sums)):
        raise OverflowError(
            f"its edited entries leave the range of {str(dtype).removeprefix('torch.')}"
        )
    survived, squared_intended, squared_actual, squared_update = sums
    # Rounding of the recombination itself is no edit: `svc` with alpha = 1 multiplies by 1 in a roundabout way.
    some = squared_intended > (NO_EDIT * torch.finfo(task_vector.dtype).eps) ** 2 * squared_update
    return math.sqrt(squared_actual), survived / squared_intended if some else None


def _sums(
    task_vector: TaskVector,
    recombine: Callable[[Tensor], Tensor],
    alpha: float,
    dtype: torch.dtype,
    out: Tensor | None,
    also_tuned: bool,
    accurate: torch.dtype | None = None,
) -> list[float]:
    """⟨W − W1, I⟩, ‖I‖², ‖W − W1‖², ‖ΔW‖² with the intended edit I, for :func:`_rounded`; products in ``accurate``."""
    sums = torch.zeros(4, dtype=torch.float64, device=task_vector.device)
    for block in task_vector.blocks():
        change = recombine(block.delta).mul_(alpha)
        rounded = (block.base + change).to(dtype)
        if out is not None:
            out[block.index] = rounded
        # In this order both differences of close numbers are exact.
        actual = (rounded.to(block.base.dtype) - block.base).sub_(block.delta)
        if also_tuned:
            tuned = block.base + block.delta
            actual.sub_(tuned.to(dtype).to(tuned.dtype).sub_(tuned))
        intended = change.sub_(block.delta).to(actual.dtype)
        actual, intended = flat(actual), flat(intended)
        update = flat(block.delta)
        if accurate is not None:
            actual, intended, update = (x.to(accurate) for x in (actual, intended, update))
        products = [
            torch.dot(a, b)
            for a, b in (
                (actual, intended),
                (intended, intended),
                (actual, actual),
                (update, update),
            )
        ]
        sums += torch.stack(products).double()
    found: list[float] = sums.tolist()
    return found
