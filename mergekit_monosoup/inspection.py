"""The spectrum of a fine-tune before anything is merged: `mergekit-monosoup inspect`.

Each matrix is decomposed once and its spectrum read in both modes (:func:`monosoup.preview`). A
tensor for each thread is in memory at a time. What people read is made from the records alone:
:mod:`mergekit_monosoup.report.inspected`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.checkpoints.names import matrices
from mergekit_monosoup.checkpoints.reader import Checkpoints, named_errors, stored_dtype
from mergekit_monosoup.checkpoints.stored import Stored
from mergekit_monosoup.kernel.batch import buffers_of
from mergekit_monosoup.kernel.monosoup import DEFAULTS, preview
from mergekit_monosoup.kernel.similarity import cosine, inner_products
from mergekit_monosoup.kernel.spectrum import POINTS
from mergekit_monosoup.kernel.threads import in_order
from mergekit_monosoup.memory import Budget, available_memory
from mergekit_monosoup.report import Record


def inspect_each(
    checkpoints: Checkpoints, names: Iterable[str], **options: Any
) -> Iterator[list[Record]]:
    """Yield what :func:`inspect_tensor` returns for every name, in their order.

    As many tensors at a time as torch has threads, and memory allows.
    """
    budget = Budget(available_memory())
    function = partial(inspect_tensor, checkpoints, budget=budget, **options)
    return in_order(function, names, torch.get_num_threads())


def inspect_tensor(
    checkpoints: Checkpoints,
    name: str,
    *,
    R: float = DEFAULTS.R,
    spectra: bool = False,
    min_rel_update: float = DEFAULTS.min_rel_update,
    budget: Budget | None = None,
) -> list[Record]:
    """Return the records of one tensor: for each of its matrices one per mode.

    A tensor that holds no matrix of floating point has none.

    Args:
        checkpoints: base, fine-tune, and others whose task vectors are compared with the
            fine-tune's.
        name: the tensor, one of ``checkpoints.names``.
        R: energy threshold of the mode `variance` (paper, §4).
        spectra: store each spectrum at :data:`POINTS` places.
        min_rel_update: ‖ΔW‖_F/‖W0‖_F below which a matrix counts as unchanged.
        budget: memory that is shared with other threads that do the same.

    Raises:
        ValueError: shapes that differ, or entries that are not finite; names tensor and model.
    """
    # All at once: threads that hold their inputs and wait for buffers could wait for each other.
    with (budget or Budget(0)).taken(_need(checkpoints.stored(name))):
        return _records(checkpoints, name, R=R, spectra=spectra, min_rel_update=min_rel_update)


def _need(stored: Sequence[Stored]) -> int:
    """Return the bytes that inspecting a tensor of several models takes, from its headers."""
    first, *others = stored
    parts = matrices(first.name, first.shape)
    if not parts:
        return 0
    matrix = torch.empty(first.shape, device="meta")[parts[0][1]]
    # Base and fine-tune are cast where their dtypes differ.
    cast = 2 * matrix.numel() * max(part.itemsize for part in stored)
    inputs = sum(part.size for part in stored)
    return inputs + cast + buffers_of(matrix, len(others), torch.device("cpu"))


def _records(
    checkpoints: Checkpoints, name: str, *, R: float, spectra: bool, min_rel_update: float
) -> list[Record]:
    tensors = checkpoints.load(name)
    if not all(tensor.is_floating_point() for tensor in tensors):
        return []
    dtype, records = stored_dtype(tensors[:2]), []
    for suffix, index in matrices(name, tensors[0].shape):
        base, tuned, *others = (tensor[index] for tensor in tensors)
        with named_errors(name + suffix, checkpoints.models):
            of_matrix = preview(
                base.to(dtype),
                tuned.to(dtype),
                R=R,
                min_rel_update=min_rel_update,
                points=POINTS if spectra else 0,
                name=name + suffix,
            )
            if others:
                cosines = _cosines(checkpoints.models[1:], base, [tuned, *others])
                of_matrix = [replace(record, cosine=cosines) for record in of_matrix]
        records += of_matrix
    return records


def _cosines(models: Sequence[str], base: Tensor, tuned: list[Tensor]) -> dict[str, float | None]:
    """Return the cosine between the task vectors of each two models, keyed ``"a ~ b"``."""
    gram = inner_products(base, tuned).tolist()
    return {
        f"{models[i]} ~ {models[j]}": cosine(gram[i][j], gram[i][i], gram[j][j])
        for i, j in itertools.combinations(range(len(models)), 2)
    }
