"""How alike the updates of several adapters are: what `soup` and `inspect --cosine` ask.

Inner products come from products of factors; no update is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_monosoup.adapters.group import check_base, factors, named_errors
from mergekit_monosoup.checkpoints.lora import open_adapter
from mergekit_monosoup.checkpoints.lora_config import LoraError
from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.kernel.low_rank import inner_products
from mergekit_monosoup.kernel.threads import in_order


class Comparison:
    """Adapters of one base, whose target modules may differ.

    Attributes:
        adapters: in the order given.
        names: of the modules that any of them changes.
        remarks: lines about what is not compared.
    """

    def __init__(self, names: Sequence[str], *, one_base: bool = False):
        """Open adapters by their names; ``one_base``: whatever they call their base.

        Raises:
            LoraError: one cannot be read as a LoRA, or they were trained on different models.
        """
        self.adapters = tuple(map(open_adapter, names))
        for other in self.adapters[1:]:
            if not one_base:
                check_base(self.adapters[0], other)
        self.names = list(dict.fromkeys(name for a in self.adapters for name in a.modules))
        self.remarks = [
            f"not compared, for {a.name} holds it whole: {', '.join(a.whole[:3])}"
            + (f" and {len(a.whole) - 3} more" if len(a.whole) > 3 else "")
            for a in self.adapters
            if a.whole
        ]
        if any(len(a.modules) < len(self.names) for a in self.adapters):
            self.remarks.append(
                "their target modules differ, and `adapter` merges those with the same ones only"
            )

    def grams(self) -> Iterator[Tensor]:
        """Yield :meth:`gram` of each module."""
        return in_order(self.gram, self.names, torch.get_num_threads())

    def gram(self, name: str) -> Tensor:
        """Return the inner products (m, m) float64 of the updates of a module.

        They are 0 for an adapter that does not change it.

        Raises:
            LoraError: shapes differ, or entries are not finite.
        """
        having = [i for i, adapter in enumerate(self.adapters) if name in adapter.modules]
        modules = [self.adapters[i].modules[name] for i in having]
        if len({module.shape for module in modules}) > 1:
            first, other = (
                having[0],
                next(
                    i for i, m in zip(having, modules, strict=True) if m.shape != modules[0].shape
                ),
            )
            raise LoraError(
                f"{name} is {modules[0].shape} in {self.adapters[first].name}, but another shape "
                f"in {self.adapters[other].name}: they were trained on different models"
            )
        tasks = [factors(self.adapters[i], m) for i, m in zip(having, modules, strict=True)]
        total = torch.zeros(len(self.adapters), len(self.adapters), dtype=torch.float64)
        with named_errors(name, self.adapters):
            products = inner_products(tasks)
            if not torch.isfinite(products).all():
                raise NonFiniteError([0] * (1 + len(tasks)))
        place = torch.tensor(having)
        total[place[:, None], place] = products
        return total


def products(comparison: Comparison, grams: Iterator[Tensor]) -> Tensor:
    """Return the inner products (n, m, m) of the n modules; see :func:`soup.products`.

    Raises:
        LoraError: an adapter changes nothing.
    """
    stacked = torch.stack(list(grams))
    for adapter, square in zip(
        comparison.adapters, stacked.sum(0).diagonal().tolist(), strict=True
    ):
        if square == 0:
            raise LoraError(f"{adapter.name} changes nothing: it has no direction to compare")
    return stacked
