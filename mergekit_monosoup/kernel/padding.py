"""The rows that `pad_to_multiple_of` adds to an embedding, which belong to no token.

mergekit fills them with the mean of all rows before them, in every model. So they have an update,
the mean of ΔW: as many times as there are rows, it makes one direction stronger and moves the
whole spectrum. Without them the spectrum is that of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.report.record import Record


@dataclass(frozen=True)
class Padding:
    """How many of the last rows are padding; 0 leaves everything as it is.

    Attributes:
        rows: their number.
        axis: the dimension that counts tokens.
    """

    rows: int = 0
    axis: int = 0

    @classmethod
    def of(cls, weights: Sequence[Tensor], axis: int | None) -> Padding:
        """Find the padding that all of these weights have.

        It must be the mean bit for bit: a real token may start close to it (transformers'
        `mean_resizing`), and its update counts.

        Args:
            weights: base and fine-tuned, of one shape.
            axis: the dimension that counts tokens; None: there is none, and no padding.
        """
        if axis is None or weights[0].ndim < 2 or weights[0].numel() == 0:
            return cls()
        views = [w.movedim(axis, 0) for w in weights]
        rows, most = 1, len(views[0]) - 1
        if most < 1 or not any(view[-1].any() for view in views):  # zeros add nothing
            return cls()
        while rows < most and all(torch.equal(view[-1 - rows], view[-1]) for view in views):
            rows += 1
        found = all(torch.equal(view[:-rows].mean(0), view[-1]) for view in views)
        return cls(rows, axis) if found else cls()

    def without(self, weight: Tensor) -> Tensor:
        """Return the view of the rows that belong to tokens."""
        size = weight.shape[self.axis] - self.rows
        return weight.narrow(self.axis, 0, size) if self.rows else weight

    def restored(self, weight: Tensor) -> Tensor:
        """Return a weight with padding again, made as mergekit makes it."""
        if not self.rows:
            return weight
        mean = weight.movedim(self.axis, 0).mean(0).unsqueeze(self.axis)
        rows = [self.rows if axis == self.axis else -1 for axis in range(weight.ndim)]
        return torch.cat([weight, mean.expand(rows)], self.axis)

    def noted(self, record: Record) -> Record:
        """Return the record of the tokens' rows as that of the tensor."""
        if not self.rows:
            return record
        shape = list(record.shape)
        shape[self.axis] += self.rows
        note = "padding rows left out of the spectrum"
        reason = f"{record.reason}; {note}" if record.reason else note
        return replace(record, shape=tuple(shape), reason=reason)
