"""Adapters → one record for each matrix, and an edited adapter.

One module for each thread is in memory at a time, and is written as soon as it is done.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from mergekit_monosoup.adapters import output
from mergekit_monosoup.adapters.group import Group, base_weight, named_errors
from mergekit_monosoup.checkpoints.lora import PREFIX, Module
from mergekit_monosoup.checkpoints.lora_config import CONFIG, LoraError
from mergekit_monosoup.checkpoints.names import matrices
from mergekit_monosoup.checkpoints.stored import Stored
from mergekit_monosoup.checkpoints.tensor_file import Entry, TensorFile, dtype_of
from mergekit_monosoup.distributed.publication import SIDE_FILES
from mergekit_monosoup.files import write_bytes
from mergekit_monosoup.kernel import low_rank, monosoup, svc
from mergekit_monosoup.kernel.low_rank import Edited, Factors, survival
from mergekit_monosoup.kernel.task_vector import normalise
from mergekit_monosoup.kernel.threads import in_order
from mergekit_monosoup.parameters import SVC
from mergekit_monosoup.report import Journal, Record

NEEDS_BASE = "stored whole, not as factors: an edit needs the base (--base)"
UNTRAINED = "the base's own weight, saved beside its update"
NOT_IN_BASE = "not in the base model"


# -- the methods -----------------------------------------------------------------------------------


class Method(Protocol):
    """A merge method, for updates of low rank and for whole weights.

    Attributes:
        name: in messages.
        weights: of the adapters.
        shares: the coefficients of the updates in their sum, before the edit.
    """

    name: ClassVar[str]

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def shares(self) -> list[float]: ...

    def of_factors(
        self, tasks: Sequence[Factors], *, rank: int | None, norm: float | None, name: str
    ) -> Edited:
        """Merge and edit the updates of one module."""
        ...

    def of_weights(self, base: Tensor, tuned: Sequence[Tensor], name: str) -> tuple[Tensor, Record]:
        """Merge and edit one weight that was trained as a whole."""
        ...


@dataclass(frozen=True)
class Monosoup:
    """The average of the adapters, edited by MonoSoup."""

    weights: Sequence[float]
    settings: monosoup.Settings = monosoup.DEFAULTS
    name: ClassVar = "monosoup"

    @property
    def shares(self) -> list[float]:
        return [self.settings.alpha * share for share in normalise(self.weights)]

    def of_factors(
        self, tasks: Sequence[Factors], *, rank: int | None, norm: float | None, name: str
    ) -> Edited:
        return low_rank.edit(
            tasks, self.settings, weights=self.weights, rank=rank, pretrained_norm=norm, name=name
        )

    def of_weights(self, base: Tensor, tuned: Sequence[Tensor], name: str) -> tuple[Tensor, Record]:
        return monosoup.edit(base, tuned, weights=self.weights, name=name, **asdict(self.settings))


@dataclass(frozen=True)
class Svc:
    """The sum of the adapters, calibrated by SVC."""

    weights: Sequence[float]
    alpha: float = SVC["alpha"].default
    scaling: float = SVC["scaling"].default
    normalize: bool = SVC["normalize"].default
    name: ClassVar = "svc"

    @property
    def shares(self) -> list[float]:
        return svc.merge_weights(self.weights, self.scaling, self.normalize)

    def of_factors(
        self, tasks: Sequence[Factors], *, rank: int | None, norm: float | None, name: str
    ) -> Edited:
        return low_rank.calibrate(tasks, rank=rank, pretrained_norm=norm, name=name, **vars(self))

    def of_weights(self, base: Tensor, tuned: Sequence[Tensor], name: str) -> tuple[Tensor, Record]:
        return svc.calibrate(base, tuned, name=name, **vars(self))


# -- the merge -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What came of a module, or of a tensor that was stored whole.

    Attributes:
        tensors: name in the new adapter → tensor.
        records: one for each matrix.
        dropped: share of the energy of the update that compressing it dropped.
    """

    tensors: dict[str, Tensor]
    records: list[Record]
    dropped: float | None = None


@dataclass
class Merge:
    """The edit of a group of adapters.

    Attributes:
        group: the adapters.
        method: what is done with them.
        rank: compress to it; None keeps the sum of the ranks.
        base: returns a weight of the base by its name in the files, None where it has none;
            None without a base.
    """

    group: Group
    method: Method
    rank: int | None = None
    base: Callable[[str], Tensor | None] | None = None

    @property
    def keeps_configuration(self) -> bool:
        """Whether the new adapter has the ranks and scales of the one that was given."""
        return len(self.group.adapters) == 1 and self.rank is None

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """The names of modules (True), then of tensors that are stored whole (False)."""
        first = self.group.first
        return [
            *((name, True) for name in self.group.modules),
            *((name, False) for name in (*first.whole, *first.untrained)),
        ]

    def check(self) -> None:
        """Check what can be checked before anything is computed.

        Raises:
            LoraError: a tensor is in one adapter only, or a sum of them needs the base.
        """
        first, *others = self.group.adapters
        for other in others:
            if odd := sorted(set(first.whole) ^ set(other.whole)):
                raise LoraError(
                    f"{odd[0]} is only in one of {first.name} and {other.name}: it was trained "
                    "whole there, and an average needs it in both"
                )
            for name in first.whole:
                if first.tensors[name].shape != other.tensors[name].shape:
                    raise LoraError(
                        f"{name} is {first.tensors[name].shape} in {first.name}, but "
                        f"{other.tensors[name].shape} in {other.name}: it cannot be averaged"
                    )
        matrix = next((n for n in first.whole if len(first.tensors[n].shape) > 1), None)
        if matrix and self.method.name == SVC.name and self.base is None:
            raise LoraError(f"{first.name} holds {matrix} whole: svc of it needs --base BASE")

    def ranks(self) -> dict[str, int]:
        """Return the rank of each module in the new adapter."""
        return {name: self._rank(modules) for name, modules in self.group.modules.items()}

    def _rank(self, modules: Sequence[Module]) -> int:
        total = sum(module.rank for module in modules)
        if self.rank is None or self.rank >= total:
            return total
        first = modules[0]
        return min(self.rank, first.B.shape[0], math.prod(first.A.shape[1:]))

    def layout(self) -> dict[str, Entry]:
        """Return dtype and shape of each tensor of the new adapter."""
        entries = {}
        for name, rank in self.ranks().items():
            module = self.group.modules[name][0]
            A, B, bias = module.A, module.B, module.bias
            entries[A.name] = Entry(self._dtype(A), (rank, *A.shape[1:]))
            entries[B.name] = Entry(self._dtype(B), (B.shape[0], rank, *B.shape[2:]))
            if bias is not None:
                entries[bias.name] = Entry(self._dtype(bias), bias.shape)
        for name in (*self.group.first.whole, *self.group.first.untrained):
            stored = self.group.first.tensors[name]
            entries[name] = Entry(self._dtype(stored), stored.shape)
        return entries

    def _dtype(self, stored: Stored) -> torch.dtype:
        """Return the smallest dtype that holds a tensor of all adapters exactly."""
        if stored.name in self.group.first.untrained:
            return dtype_of(stored)
        held = [a.tensors[stored.name] for a in self.group.adapters if stored.name in a.tensors]
        return reduce(torch.promote_types, map(dtype_of, held))

    def pieces(self) -> Iterator[Piece]:
        """Yield what comes of each of :attr:`parts`, in their order."""
        return in_order(
            lambda part: (self._module if part[1] else self._whole)(part[0]),
            self.parts,
            torch.get_num_threads(),
        )

    # -- a module ------------------------------------------------------------------------------

    def _module(self, name: str) -> Piece:
        module = self.group.modules[name][0]
        tasks = self.group.factors(name)
        W0 = None if self.base is None else base_weight(self.base, module, self.group.first)
        norm = None if W0 is None else float(torch.linalg.vector_norm(W0.double()))
        with named_errors(name, self.group.adapters):
            edited = self.method.of_factors(tasks, rank=self.rank, norm=norm, name=module.weight)
            factors = edited.factors
            if not self.keeps_configuration:
                factors = replace(factors, B=factors.B * factors.scale, scale=1.0)
            A = _rounded(factors.A, self._dtype(module.A))
            B = _rounded(factors.B, self._dtype(module.B))
            record = replace(edited.record, shape=module.shape)
            if W0 is not None and record.action == "edited":
                record = _on_base(record, W0, edited.before, replace(factors, A=A, B=B))
        tensors = {
            module.A.name: A.reshape(len(A), *module.A.shape[1:]),
            module.B.name: B.reshape(*B.shape, *module.B.shape[2:]),
        }
        records = [record]
        if module.bias is not None:
            tensors[module.bias.name], of_bias = self._bias(name)
            records.append(of_bias)
        return Piece(tensors, records, edited.dropped)

    def _bias(self, name: str) -> tuple[Tensor, Record]:
        """Return the bias of a B (`lora_bias`): an update, but no matrix."""
        modules = self.group.modules[name]
        parts = zip(self.method.shares, modules, self.group.adapters, strict=True)
        weighted = [
            share * m.scale * adapter.load(m.bias).double()
            for share, m, adapter in parts
            if m.bias is not None
        ]
        total = torch.stack(weighted).sum(0)
        assert modules[0].bias is not None
        scale = modules[0].scale if self.keeps_configuration else 1.0
        bias = _rounded(total / scale, self._dtype(modules[0].bias))
        return bias, _copied(f"{modules[0].name}.bias", bias, "fewer than two dimensions")

    # -- a tensor that is stored whole ---------------------------------------------------------

    def _whole(self, name: str) -> Piece:
        tensors = [tensor for _, tensor in self.group.whole(name)]
        target = name.removeprefix(PREFIX)
        if name in self.group.first.untrained:
            return Piece({name: tensors[0]}, [_copied(target, tensors[0], UNTRAINED)])
        base = None if self.base is None else self.base(target)
        reason = NEEDS_BASE if self.base is None else NOT_IN_BASE
        if base is not None and base.shape != tensors[0].shape:
            reason, base = f"{tuple(base.shape)} in the base: no update without its rows", None
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        if not dtype.is_floating_point:
            base, reason = None, "not floating point"
        if base is None or not base.is_floating_point():
            merged, records = self._average(target, tensors, reason)
        else:
            with named_errors(target, ()):
                merged, records = self._edited(target, base, tensors)
                merged = _rounded(merged, dtype)
        return Piece({name: merged.to(dtype)}, records)

    def _average(
        self, name: str, tensors: Sequence[Tensor], reason: str
    ) -> tuple[Tensor, list[Record]]:
        """Return a tensor as trained, or the average of several."""
        merged = tensors[0]
        if len(tensors) > 1 and merged.is_floating_point():
            shares = normalise(self.method.weights)
            weighted = [s * t.double() for s, t in zip(shares, tensors, strict=True)]
            merged = torch.stack(weighted).sum(0)
            reason += f"; average of {len(tensors)} models"
        return merged, [_copied(name, merged.to(tensors[0].dtype), reason)]

    def _edited(
        self, name: str, base: Tensor, tuned: Sequence[Tensor]
    ) -> tuple[Tensor, list[Record]]:
        """Edit a weight as the merge method does, matrix by matrix."""
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in (base, *tuned)))
        base, tuned = base.to(dtype), [tensor.to(dtype) for tensor in tuned]
        merged, records = torch.empty_like(base), []
        for suffix, index in matrices(name, base.shape) or [("", ())]:
            merged[index], record = self.method.of_weights(
                base[index], [tensor[index] for tensor in tuned], name + suffix
            )
            records.append(record)
        return merged, records


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype of the adapter.

    Raises:
        OverflowError: it has entries that the dtype cannot hold.
    """
    if tensor.dtype == dtype:  # a factor as it was given
        return tensor
    rounded = tensor.to(dtype)
    if dtype.is_floating_point and not torch.isfinite(rounded).all():
        name = str(dtype).removeprefix("torch.")
        raise OverflowError(f"its edited entries leave the range of {name}")
    return rounded


def _on_base(record: Record, W0: Tensor, before: Factors, after: Factors) -> Record:
    """Return a record with what would be left of an edit in the base's dtype."""
    rounding = survival(W0, before, after, W0.dtype)
    dtype = str(W0.dtype).removeprefix("torch.")
    return replace(record, dtype=dtype, edit_norm=rounding.edit_norm, realised=rounding.realised)


def _copied(name: str, tensor: Tensor, reason: str) -> Record:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Record(name, tuple(tensor.shape), dtype, "copied", reason)


# -- the new adapter -------------------------------------------------------------------------------


def write(
    merge: Merge,
    out: Path,
    *,
    force: bool = False,
    report: str | None = None,
    progress: Callable[[Iterator[Piece], int], Iterator[Piece]] = lambda pieces, _: pieces,
) -> list[Piece]:
    """Edit adapters and write the result to a folder; return what came of each part.

    Args:
        merge: what is to be done.
        out: the folder, which is there when it is complete.
        force: replace an adapter that is there.
        report: a file for the records.
        progress: shows how far it is.

    Raises:
        ValueError: the folder cannot be used, or an adapter cannot be edited; nothing is left of
            the attempt then, but for the report.
    """
    merge.check()
    journal = Journal(warns=False)  # whether the edit survives is not known before a merge
    done = []
    with output.new_folder(out, force) as folder:
        with TensorFile(folder / "adapter_model.safetensors", merge.layout()) as file:
            for piece in progress(merge.pieces(), len(merge.parts)):
                for name, tensor in piece.tensors.items():
                    file.write(name, tensor)
                journal.add(piece.records, report, merge.method.name)
                done.append(replace(piece, tensors={}))
        for name in sorted(path.name for path in merge.group.first.folder.iterdir()):
            if SIDE_FILES.match(name):
                shutil.copyfile(merge.group.first.folder / name, folder / name)
        write_bytes(folder / CONFIG, _configuration(merge))
    return done


def _configuration(merge: Merge) -> bytes:
    first = merge.group.first
    if merge.keeps_configuration:
        return (first.folder / CONFIG).read_bytes()
    settings = first.config.of_scale_one(merge.ranks())
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
