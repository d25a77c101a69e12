"""LoRA adapters of one base, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.checkpoints.lora import Adapter, Module, open_adapter
from mergekit_monosoup.checkpoints.lora_config import WAY_OUT, LoraError
from mergekit_monosoup.checkpoints.stored import Stored
from mergekit_monosoup.errors import NonFiniteError, SolverError
from mergekit_monosoup.kernel.low_rank import Factors


@dataclass(frozen=True)
class Group:
    """Several adapters, or one, that change the same weights of one base.

    Attributes:
        adapters: in the order given.
        modules: the updates of each module, in the order of the adapters.
    """

    adapters: tuple[Adapter, ...]
    modules: dict[str, tuple[Module, ...]]

    @classmethod
    def open(cls, names: Sequence[str], *, one_base: bool = False) -> Group:
        """Open adapters by their names.

        Args:
            names: folders, or names on the hub.
            one_base: their base is one, whatever their configurations call it.

        Raises:
            LoraError: one cannot be edited as an adapter, or they do not belong together.
        """
        adapters = tuple(map(open_adapter, names))
        first, *others = adapters
        for other in others:
            if not one_base:
                check_base(first, other)
            _check_modules(first, other)
        modules = {name: tuple(a.modules[name] for a in adapters) for name in first.modules}
        return cls(adapters, modules)

    @property
    def first(self) -> Adapter:
        return self.adapters[0]

    def factors(self, name: str) -> list[Factors]:
        """Return the updates of a module, as matrices in the dtype of their files."""
        return [
            factors(adapter, module)
            for adapter, module in zip(self.adapters, self.modules[name], strict=True)
        ]

    def whole(self, name: str) -> list[tuple[Adapter, Tensor]]:
        """Return a tensor that is no update, of each adapter that has it."""
        return [(a, a.load(a.tensors[name])) for a in self.adapters if name in a.tensors]


def factors(adapter: Adapter, module: Module) -> Factors:
    """Return the update of a module, as matrices in the dtype of its file."""
    B, A = (adapter.load(part).flatten(1) for part in (module.B, module.A))
    return Factors(B, A, module.scale, module.flipped)


def base_weight(base: Callable[[str], Tensor | None], module: Module, adapter: Adapter) -> Tensor:
    """Return the weight of the base that a module changes.

    Raises:
        LoraError: the base has none of this name and shape.
    """
    weight = base(module.weight)
    if weight is None:
        raise LoraError(
            f"the base has no {module.weight}, which {adapter.name} changes: it is another model, "
            "or its files name tensors otherwise; leave the base out"
        )
    if tuple(weight.shape) != module.shape:
        raise LoraError(
            f"{module.weight} is {tuple(weight.shape)} in the base, but {module.shape} in "
            f"{adapter.name}: it was trained on another model"
        )
    return weight


@contextmanager
def named_errors(name: str, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Turn errors of the kernel about a module into one that names adapter and tensor."""
    try:
        yield
    except NonFiniteError as error:
        counted = [
            f"{count} entries of {part.name} in {adapter.name}"
            for adapter in adapters
            if (module := adapter.modules.get(name)) is not None
            for part in (module.A, module.B)
            if (count := _non_finite(adapter, part))
        ]
        raise LoraError(
            f"{name} is not finite: {'; '.join(counted) or error}. Check that adapter: a diverged "
            "run or a damaged download is the usual cause"
        ) from error
    except SolverError as error:
        raise LoraError(f"{name}: its spectrum could not be computed ({error})") from error
    except OverflowError as error:
        raise LoraError(f"{name}: {error}") from error


def _non_finite(adapter: Adapter, part: Stored) -> int:
    return int((~torch.isfinite(adapter.load(part))).sum())


def check_base(first: Adapter, other: Adapter) -> None:
    """Raise LoraError if two configurations name different bases."""
    ours, theirs = (adapter.config.base.rstrip("/") for adapter in (first, other))
    if ours and theirs and ours != theirs:
        raise LoraError(
            f"{first.name} was trained on {ours}, but {other.name} on {theirs}: updates of "
            "different models cannot be averaged. If these are names of one model, say so with "
            "--base MODEL"
        )


def _check_modules(first: Adapter, other: Adapter) -> None:
    """Raise LoraError unless two adapters change the same weights, of the same shapes."""
    for here, there in ((first, other), (other, first)):
        if lacking := [name for name in here.modules if name not in there.modules]:
            more = f" and {len(lacking) - 1} more modules" if len(lacking) > 1 else ""
            raise LoraError(
                f"{here.name} changes {lacking[0]}{more}, which {there.name} does not: adapters "
                f"must have the same target modules; or {WAY_OUT}"
            )
    for name, module in first.modules.items():
        if (module.bias is None) != (other.modules[name].bias is None):
            raise LoraError(
                f"B of {name} has a bias in only one of {first.name} and {other.name} "
                f"(`lora_bias`): {WAY_OUT}"
            )
        if module.shape != other.modules[name].shape:
            raise LoraError(
                f"{name} is {module.shape} in {first.name}, but {other.modules[name].shape} in "
                f"{other.name}: they were trained on different models"
            )
