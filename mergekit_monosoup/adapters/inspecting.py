"""The spectra of an adapter: `inspect ADAPTER`, and `inspect BASE ADAPTER`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.adapters.comparing import Comparison
from mergekit_monosoup.adapters.group import base_weight, factors, named_errors
from mergekit_monosoup.kernel.low_rank import preview
from mergekit_monosoup.kernel.similarity import cosine
from mergekit_monosoup.kernel.spectrum import POINTS
from mergekit_monosoup.kernel.threads import in_order
from mergekit_monosoup.report import Record


@dataclass(frozen=True)
class Inspection:
    """An adapter to look at, and others to compare it with.

    Attributes:
        comparison: all of them, the one that is inspected first.
        base: returns a weight of the base by its name in the files; None without a base.
    """

    comparison: Comparison
    base: Callable[[str], Tensor | None] | None = None

    @property
    def names(self) -> list[str]:
        """The modules that are inspected."""
        return list(self.comparison.adapters[0].modules)

    def records(self, *, R: float, spectra: bool) -> Iterator[list[Record]]:
        """Yield the records of each module, one per mode; see :func:`low_rank.preview`."""

        def of_module(name: str) -> list[Record]:
            return self._of_module(name, R, POINTS if spectra else 0)

        return in_order(of_module, self.names, torch.get_num_threads())

    def _of_module(self, name: str, R: float, points: int) -> list[Record]:
        adapter = self.comparison.adapters[0]
        module = adapter.modules[name]
        W0 = None if self.base is None else base_weight(self.base, module, adapter)
        with named_errors(name, [adapter]):
            records = preview(
                factors(adapter, module), pretrained=W0, R=R, points=points, name=module.weight
            )
        cosines = self._cosines(name) if len(self.comparison.adapters) > 1 else None
        return [replace(record, shape=module.shape, cosine=cosines) for record in records]

    def _cosines(self, name: str) -> dict[str, float | None]:
        """Return the cosine between the updates of each two adapters, keyed ``"a ~ b"``."""
        gram = self.comparison.gram(name).tolist()
        names = [adapter.name for adapter in self.comparison.adapters]
        return {
            f"{names[i]} ~ {names[j]}": cosine(gram[i][j], gram[i][i], gram[j][j])
            for i, j in itertools.combinations(range(len(names)), 2)
        }
