"""`mergekit-monosoup adapter`: options that belong together, and what is printed at the end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_monosoup import report as reports
from mergekit_monosoup.adapters import output
from mergekit_monosoup.adapters.comparing import Comparison
from mergekit_monosoup.adapters.editing import Merge, Method, Monosoup, Piece, Svc
from mergekit_monosoup.adapters.group import Group
from mergekit_monosoup.adapters.inspecting import Inspection
from mergekit_monosoup.checkpoints.lora import is_adapter
from mergekit_monosoup.checkpoints.storage import Storage
from mergekit_monosoup.kernel.monosoup import Settings
from mergekit_monosoup.parameters import (
    METHODS,
    SVC,
    unread_violations,
    weight_violations,
)
from mergekit_monosoup.waiting import announced

if TYPE_CHECKING:
    from mergekit_monosoup.soup import Decision

LISTED = 3  # tensors that a line names; the rest are counted


def method_of(name: str, adapters: int, weights: Sequence[float], values: dict[str, Any]) -> Method:
    """Return a method with its parameters.

    Args:
        name: of the method.
        adapters: how many there are.
        weights: one for each of them, or none.
        values: parameters of all methods by name; None where they were not given.

    Raises:
        ValueError: the method does not read a parameter that was given, or it may not have this
            value; or there are too few adapters, or too few weights.
    """
    method = METHODS[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if key not in method:
            readers = [other for other in METHODS if key in METHODS[other]]
            raise ValueError(f"--{key} is read by --method {readers[0]} only, and it is {name}")
        if fault := method[key].fault(value):
            raise ValueError(f"--{key} {fault}")
    if adapters < method.fewest:
        raise ValueError(f"--method {name} needs at least {method.fewest} adapters")
    shares = _weights(name, adapters, weights)
    if name == SVC.name:
        return Svc(shares, **given)
    for violation in unread_violations({key: [value] for key, value in given.items()}):
        raise ValueError(f"--{violation.parameter} {violation.message}")
    return Monosoup(shares, Settings(**given))


def _weights(method: str, adapters: int, weights: Sequence[float]) -> list[float]:
    if weights and len(weights) != adapters:
        raise ValueError(
            f"--weight is given {len(weights)} times for {adapters} adapters: once for each, in "
            "their order"
        )
    for weight in weights:
        if fault := METHODS[method]["weight"].fault(weight):
            raise ValueError(f"--weight {fault}")
    for violation in weight_violations(METHODS[method], weights):
        raise ValueError(f"--weight {violation.message}")
    return list(weights) or [1.0] * adapters


def prepare(
    adapters: Sequence[str],
    out: Path,
    method: Method,
    *,
    rank: int | None,
    base: str | None,
    force: bool,
    report: Path | None,
    storage: Storage,
) -> Merge:
    """Open everything, so that what cannot work fails before anything is written.

    Raises:
        ValueError: names what is wrong, and what to do.
    """
    output.check(out, force)
    if report is not None:
        reports.check_path(str(report))
        if Path(os.path.abspath(out)) in Path(os.path.abspath(report)).parents:
            raise ValueError(f"--report {report}: {out} is written as a whole; name a file beside")
    group = Group.open(adapters, one_base=base is not None)
    merge = Merge(group, method, rank, None if base is None else weights_of(base, storage))
    merge.check()
    return merge


def weights_of(base: str, storage: Storage) -> Callable[[str], Tensor | None]:
    """Return a function from the name of a weight of a model to the weight; None without one."""
    with announced("reading mergekit …"):
        from mergekit_monosoup.checkpoints.reader import Checkpoints

    checkpoints = Checkpoints([base], storage)
    names = set(checkpoints.names)
    return lambda name: checkpoints.load(name)[0] if name in names else None


def adapter_in(base: str, tuned: str | None) -> str | None:
    """Return the adapter that `inspect` was given: TUNED, or what stands alone; None for models.

    Raises:
        ValueError: one thing was given, and it is no adapter.
    """
    if tuned is not None:
        return tuned if is_adapter(tuned) else None
    if os.path.exists(base) and not is_adapter(base):
        raise ValueError(
            f"{base} is no LoRA adapter: name the fine-tune to compare it with, `inspect "
            f"{base} TUNED`"
        )
    return base


def inspection(
    adapter: str, others: Sequence[str], base: str | None, storage: Storage
) -> Inspection:
    """Open what `inspect` looks at; see :class:`Inspection`."""
    comparison = Comparison([adapter, *others], one_base=base is not None)
    return Inspection(comparison, None if base is None else weights_of(base, storage))


def all_adapters(models: Sequence[str]) -> bool:
    """Whether `soup` was given adapters.

    Raises:
        ValueError: some of them are, and some are models.
    """
    found = [is_adapter(model) for model in models]
    if any(found) and not all(found):
        adapter, model = models[found.index(True)], models[found.index(False)]
        raise ValueError(
            f"{adapter} is an adapter, but {model} is not: to compare both, write BASE+{adapter} "
            "and --lora-merge-cache DIR"
        )
    return all(found)


def on_base(base: str, decisions: Sequence[Decision]) -> list[Decision]:
    """Return decisions about adapters as mergekit names the models: BASE+ADAPTER."""
    return [replace(decision, model=f"{base}+{decision.model}") for decision in decisions]


def to_merge(decisions: Sequence[Decision], edit: bool) -> str:
    """Return how to average the chosen adapters as adapters.

    R = 1 leaves nothing below the cut, so that the average stays as it is.
    """
    chosen = [decision.model for decision in decisions if decision.taken]
    plain = "" if edit else " --mode variance --R 1"
    return f"as an adapter: `mergekit-monosoup adapter {' '.join(chosen)}{plain} --out DIR`"


def lines(merge: Merge, pieces: Sequence[Piece], out: Path, seconds: float) -> Iterator[str]:
    """Yield what is said about an adapter that was written."""
    records = [record for piece in pieces for record in piece.records]
    edited = [record for record in records if record.action == "edited"]
    ranks = sorted(set(merge.ranks().values()))
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    yield (
        f"{out}: an adapter of {size}, {len(edited)} of {len(records)} tensors edited "
        f"({merge.method.name}), in {seconds:.1f} s"
    )
    if not edited and any(record.k and record.k == record.rank for record in records):
        yield (
            "the spectra are so flat that nothing lies below the cut: --mode variance cuts at a "
            "share of the energy instead"
        )
    yield from _dropped(merge, pieces)
    yield from _left(records)
    yield from _realised(edited)


def _dropped(merge: Merge, pieces: Sequence[Piece]) -> Iterator[str]:
    dropped = [piece.dropped for piece in pieces if piece.dropped is not None]
    if merge.rank is None or not dropped:
        return
    mean = sum(dropped) / len(dropped)
    yield (
        f"compressed to rank {merge.rank}: dropped {mean:.2%} of the energy of the updates on "
        f"average, at most {max(dropped):.2%}"
    )


def _left(records: Sequence[reports.Record]) -> Iterator[str]:
    """Yield a line for each reason why tensors were not edited."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.action == "copied":
            reasons.setdefault(record.reason, []).append(record.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        yield f"not edited, {reason}: {', '.join(names[:LISTED])}{more}"


def _realised(edited: Sequence[reports.Record]) -> Iterator[str]:
    shares = [(r.dtype, r.realised) for r in edited if r.realised is not None]
    by_dtype = {dtype: [s for d, s in shares if d == dtype] for dtype in dict(shares)}
    for dtype, values in by_dtype.items():
        mean = math.fsum(values) / len(values)
        if mean < reports.REALISED_WARNING:
            yield (
                f"merged into the base in {dtype}, {max(mean, 0.0):.0%} of the edit would survive "
                "rounding: keep the adapter beside it, or merge in float32"
            )
