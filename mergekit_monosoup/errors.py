"""Errors that the kernels raise.

This file imports no torch: whoever only names an error must not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

QUANTISED = (
    "8-bit numbers are codes, which mean a weight only with their scales; convert the checkpoint "
    "to bfloat16 first"
)


class SolverError(RuntimeError):
    """A solver did not converge, or its result does not satisfy A·Q = Q·Λ."""


class NonFiniteError(ValueError):
    """Some input has NaN or infinite entries.

    Attributes:
        counts: non-finite entries of each input; ``counts[0]`` belongs to W0, ``counts[1:]`` to
            the fine-tuned inputs.
        name: the matrix, where it is one of several in a stack of experts; empty otherwise.
    """

    def __init__(self, counts: Sequence[int], name: str = ""):
        self.counts, self.name = tuple(counts), name
        super().__init__(
            f"{name}{': ' * bool(name)}non-finite entries: {counts[0]} in the pretrained, "
            f"{list(counts[1:])} in the fine-tuned inputs"
        )
