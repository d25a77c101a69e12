"""The spectrum of a fine-tune before anything is merged: `mergekit-monosoup inspect`.

One spectrum per matrix, read in both modes (:func:`monosoup.preview`), one tensor name in memory at a time; then a table
and a few sentences, both from records alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mergekit_monosoup.checkpoints.names import layer, matrices, projection
from mergekit_monosoup.checkpoints.reader import Checkpoints, named_errors, stored_dtype
from mergekit_monosoup.kernel.monosoup import preview
from mergekit_monosoup.kernel.similarity import cosine, inner_products
from mergekit_monosoup.report import REALISED_WARNING, Record, by_depth, rank_share

if TYPE_CHECKING:
    from rich.table import Table

# Places at which a spectrum is stored on request: enough for a smooth curve, 0.3 kB a matrix.
POINTS = 33

# λ_high and λ_low this close are one factor for most purposes: the parts are orthogonal, so the result is within
# 0.05·‖ΔW‖ of ΔW scaled by their mean.
FLAT = 0.1
# With λ_low this small the tail is gone and the head stays: what the paper calls preserving the principal subspace.
DROPPED = 0.1


def inspect_tensor(
    checkpoints: Checkpoints,
    name: str,
    *,
    R: float = 0.8,
    spectra: bool = False,
    min_rel_update: float = 1e-6,
) -> list[Record]:
    """Records of one tensor: for each of its matrices one per mode, none if it holds none.

    ``checkpoints``: base, fine-tune, and others whose task vectors are compared with that of the fine-tune.

    Raises:
        ValueError: shapes that differ, or entries that are not finite; names tensor and model.
    """
    tensors = checkpoints.load(name)
    if not all(tensor.is_floating_point() for tensor in tensors):
        return []
    dtype, records = stored_dtype(tensors[:2]), []
    for suffix, index in matrices(name, tensors[0].shape):
        base, tuned, *others = (tensor[index] for tensor in tensors)
        with named_errors(name + suffix, checkpoints.models):
            found = preview(
                base.to(dtype),
                tuned.to(dtype),
                R=R,
                min_rel_update=min_rel_update,
                points=POINTS if spectra else 0,
                name=name + suffix,
            )
            if others:
                found[0].cosine = _cosines(
                    checkpoints.models[1:], inner_products(base, [tuned, *others]).tolist()
                )
        for record in found:
            record.cosine = found[0].cosine
        records += found
    return records


def cosines(records: Sequence[Record]) -> Iterator[str]:
    """A line for each two fine-tunes that were compared: mean and range of the cosine over matrices."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        for pair, value in (record.cosine or {}).items():
            if value is not None:
                found.setdefault(pair, {})[record.name] = value  # both modes carry the same
    for pair, by_name in found.items():
        values = list(by_name.values())
        yield (
            f"cosine of the updates, {pair}: mean {sum(values) / len(values):.3f} over {len(values)} matrices, "
            f"from {min(values):.3f} to {max(values):.3f}"
        )


def _cosines(models: Sequence[str], gram: Sequence[Sequence[float]]) -> dict[str, float | None]:
    return {
        f"{models[i]} ~ {models[j]}": cosine(gram[i][j], gram[i][i], gram[j][j])
        for i in range(len(models))
        for j in range(i + 1, len(models))
    }


# -- table -----------------------------------------------------------------------------------------------------------------


def flags(record: Record) -> str:
    """One word on a matrix that MonoSoup would not change, or that would not change in bfloat16; empty for others."""
    if record.lambda_high is None:
        return "no update" if record.delta_norm == 0 else "tiny update"
    if record.k == record.rank:
        return "k = rank"
    return (
        "rounds away" if record.realised is not None and record.realised < REALISED_WARNING else ""
    )


def _mean(records: Iterable[Record], value: Callable[[Record], float | None]) -> float | None:
    present = [found for record in records if (found := value(record)) is not None]
    return sum(present) / len(present) if present else None


def _show(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _short(value: float | None) -> str:
    """.95: a column of shares is narrower without its zeros."""
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


def table(records: Sequence[Record], width: int = 100, *, every_layer: bool = False) -> Table:
    """By projection type, means over layers; or a row for each matrix in the order of depth.

    80 columns hold all but P_k; a wider terminal shows it too.
    """
    from rich import box
    from rich.table import Table

    records = by_depth(records)
    modes = list(dict.fromkeys(record.mode for record in records))
    rows: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        where = ".".join(map(str, layer(record.name)))
        rows[
            (where if every_layer else "", record.name if every_layer else projection(record.name))
        ].append(record)

    out = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    out.title = "Spectrum of the update and what MonoSoup makes of it" + (
        "" if every_layer else ": means over layers"
    )
    out.padding, out.pad_edge = (0, 1, 0, 0), False
    out.add_column("layer" if every_layer else "n", justify="right", no_wrap=True)
    out.add_column("type", overflow="fold", min_width=12)
    out.add_column("‖ΔW‖\n/‖W0‖", justify="right", no_wrap=True)
    out.add_column("e.rank\n/rank", justify="right", no_wrap=True)
    for mode in modes:
        label = {"freevariance": "free", "variance": "var"}.get(str(mode), str(mode))
        if width >= 100:
            out.add_column(f"P_k\n{label}", justify="right", no_wrap=True)
        out.add_column(f"λ {label}\nhigh/low", justify="right", no_wrap=True)
    labels = "/".join("free" if mode == "freevariance" else "var" for mode in modes)
    out.add_column(f"in bf16\n{labels}", justify="right", no_wrap=True)
    out.add_column("flags", overflow="fold")
    for (where, kind), members in rows.items():
        first = [record for record in members if record.mode == modes[0]]
        cells = [
            where if every_layer else str(len(first)),
            projection(kind) if every_layer else kind,
            _show(_mean(first, lambda r: r.rel_update), ".1e"),
            _show(_mean(first, rank_share)),
        ]
        for mode in modes:
            of_mode = [record for record in members if record.mode == mode]
            high, low = (
                _mean(of_mode, lambda r: r.lambda_high),
                _mean(of_mode, lambda r: r.lambda_low),
            )
            if width >= 100:
                cells.append(_show(_mean(of_mode, lambda r: r.P_k), ".3f"))
            cells.append("" if high is None else f"{_short(high)}/{_short(low)}")
        shares = [
            _mean([r for r in members if r.mode == mode], lambda r: r.realised) for mode in modes
        ]
        cells.append(
            "/".join(map(_short, shares)) if any(share is not None for share in shares) else ""
        )
        out.add_row(*cells, _flags(members, modes))
    R = next(
        (f"; var: variance, R = {record.R:g}" for record in records if record.R is not None), ""
    )
    counted = "" if every_layer else "; n: matrices"
    out.caption = (
        f"e.rank: effective rank; free: freevariance{R}{counted}\n"
        "in bf16: predicted share of the edit that survives rounding to bfloat16"
    )
    return out


def _flags(records: Sequence[Record], modes: Sequence[str | None]) -> str:
    """``rounds away (free 3)``: the mode where only one has it, the count where not all matrices do."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if word := flags(record):
            found[word].append(record)
    texts = []
    for word, members in found.items():
        where = {record.mode for record in members}
        notes = [] if len(where) == len(modes) else ["free" if "freevariance" in where else "var"]
        names = {record.name for record in members}
        if len(names) < len({record.name for record in records}):
            notes.append(str(len(names)))
        texts.append(f"{word} ({' '.join(notes)})" if notes else word)
    return ", ".join(texts)


# -- reading ---------------------------------------------------------------------------------------------------------------


def reading(records: Sequence[Record]) -> list[str]:
    """A few sentences per mode, from means over the matrices of a projection type."""
    sentences = []
    for mode in dict.fromkeys(record.mode for record in records):
        of_mode = by_depth(record for record in records if record.mode == mode)
        R = of_mode[0].R
        label = str(mode) + (f", R = {R:g}" if R is not None else "")
        verdicts: dict[str, list[tuple[str, list[Record]]]] = defaultdict(list)
        types: dict[str, list[Record]] = defaultdict(list)
        for record in of_mode:
            types[projection(record.name)].append(record)
        for kind, members in types.items():
            verdicts[_verdict(members)].append((kind, members))
            if (
                share := _mean(members, lambda r: r.realised)
            ) is not None and share < REALISED_WARNING:
                verdicts["rounds away"].append((kind, members))
        for verdict, found in verdicts.items():
            where = _together([kind for kind, _ in found], list(types))
            sentences.append(
                f"{label}: {_sentence(verdict, where, [r for _, members in found for r in members])}"
            )
    return sentences


def _verdict(records: Sequence[Record]) -> str:
    high, low = _mean(records, lambda r: r.lambda_high), _mean(records, lambda r: r.lambda_low)
    if high is None or low is None:
        return "no update"
    if all(record.k == record.rank for record in records if record.rank is not None):
        return "nothing below the cut"
    if abs(high - low) <= FLAT:
        return "flat"
    if low > high:
        return "tail first"
    return "head only" if low <= DROPPED else "split"


def _sentence(verdict: str, where: str, records: Sequence[Record]) -> str:
    high, low = (
        _mean(records, f) or 0.0 for f in (lambda r: r.lambda_high, lambda r: r.lambda_low)
    )
    change = _mean(
        records,
        lambda r: r.edit_norm / r.delta_norm if r.edit_norm is not None and r.delta_norm else None,
    )
    return {
        "no update": f"no update in {where}: nothing to edit there.",
        "nothing below the cut": f"the cut is at the rank in {where}: MonoSoup leaves it as fine-tuned.",
        "flat": f"the update is nearly flat in {where}, MonoSoup ≈ uniform scaling by {(high + low) / 2:.2f} there.",
        "tail first": f"in {where} the tail weighs more than the head (λ_low {low:.2f} > λ_high {high:.2f}): a flat "
        "spectrum with a low cut; look at R.",
        "head only": f"in {where} MonoSoup keeps the head ({high:.2f}) and drops the tail ({low:.2f}), an edit of "
        f"{change or 0.0:.0%} of the update in bfloat16.",
        "split": f"in {where} MonoSoup scales the head by {high:.2f} and the tail by {low:.2f}.",
        "rounds away": f"rounding to bfloat16 eats the edit in {where}, {_mean(records, lambda r: r.realised) or 0.0:.0%} "
        "survives: merge with `dtype: float32` and `out_dtype: float32`.",
    }[verdict]


def _together(kinds: Sequence[str], everything: Sequence[str]) -> str:
    """``mlp.*`` for all of the types that begin so, ``all matrices`` for all there are."""
    if len(kinds) == len(everything) > 1:
        return "all matrices"
    said = []
    for kind in kinds:
        family = kind.split(".")[0] + "."
        relatives = [other for other in everything if other.startswith(family)]
        said.append(f"{family}*" if len(relatives) > 1 and set(relatives) <= set(kinds) else kind)
    return ", ".join(dict.fromkeys(said))
