"""What happened to each matrix: one record per matrix, one JSON line per record, and the table that people read."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from mergekit_monosoup.checkpoints.names import layer, natural

if TYPE_CHECKING:
    from rich.table import Table

LOG = logging.getLogger("mergekit_monosoup")

# Below this share of the edit surviving the rounding to the output dtype, the merge mostly did nothing.
REALISED_WARNING = 0.5

# Marks fields that a line has only when they were asked for.
ON_REQUEST = {"on_request": True}


@dataclass
class Record:
    """One matrix. Fields that were not computed are None (a copied tensor has no spectrum).

    Attributes:
        name: tensor name; matrices of an expert stack have their index appended, ``…down_proj[3]``.
        shape, dtype: of the matrix as stored in the checkpoint; dtype is the one that the edit was rounded to.
        action: ``edited`` or ``copied`` (stays as fine-tuned, or as averaged); ``inspected``: no merge, a prediction.
        reason: why it was copied, or what limits an edit; empty for a plain edit.
        mode, R: how k was chosen (R only in ``variance``).
        k, rank, effective_rank: cut, number of non-zero singular values of ΔW, exp(entropy of σ/Σσ).
        P_k, rho, cos_alpha, lambda_high, lambda_low: paper, Eqs. 6-8.
        gamma_min, gamma_median, gamma_max, amplified: `svc` only: γ_r over the non-zero singular values, and the share of
            them with γ_r > 1.
        delta_norm: ‖ΔW‖_F; in `svc` ΔW is the merged update.
        rel_update: ‖ΔW‖_F/‖W0‖_F; None when W0 is zero.
        edit_norm: ‖W − W1‖_F of the weight as stored; in `svc` W1 is the merge without calibration.
        realised: share of the intended edit that survives rounding to dtype; 1 is all of it.
        solver: what computed the spectrum, and which solvers failed before it.
        seconds: wall time spent on the matrix.
        spectrum: σ/σ₁ at equally spaced places from the first to the last non-zero singular value, of `inspect --spectra`.
        cosine: cosine of the task vectors of each two fine-tunes, of `inspect --cosine`; None where one of them is zero.

    An inspected matrix has a record for each mode; its edit_norm and realised are those of an output in bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str = ""
    reason: str = ""
    mode: str | None = None
    R: float | None = None
    k: int | None = None
    rank: int | None = None
    effective_rank: float | None = None
    P_k: float | None = None
    rho: float | None = None
    cos_alpha: float | None = None
    lambda_high: float | None = None
    lambda_low: float | None = None
    gamma_min: float | None = None
    gamma_median: float | None = None
    gamma_max: float | None = None
    amplified: float | None = None
    delta_norm: float | None = None
    rel_update: float | None = None
    edit_norm: float | None = None
    realised: float | None = None
    solver: str | None = None
    seconds: float = 0.0
    spectrum: list[float] | None = field(default=None, metadata=ON_REQUEST)
    cosine: dict[str, float | None] | None = field(default=None, metadata=ON_REQUEST)

    def to_json(self) -> str:
        unasked = [
            f.name
            for f in fields(self)
            if f.metadata == ON_REQUEST and getattr(self, f.name) is None
        ]
        return json.dumps(
            {k: v for k, v in asdict(self).items() if k not in unasked}, allow_nan=False
        )


# Set while somebody plans a merge that will not be run.
REHEARSAL: ContextVar[bool] = ContextVar("rehearsal", default=False)

OLD = ".old"  # what the report of an earlier merge is called


def check_path(path: str) -> str:
    """The absolute path of a report that may be written: a new file, or one that holds a report already.

    Raises:
        ValueError: it is anything else, which replacing would lose; the message says what and what to do.
    """
    place = os.path.abspath(os.path.expanduser(path))
    if not path.strip():
        raise ValueError("is empty; leave the line out for no report")
    if "\0" in path:
        raise ValueError(f"{path!r} is no file name: it holds a null byte")
    if os.path.isdir(place):
        raise ValueError(
            f"{path} is a folder; name a file in it, {os.path.join(path, 'report.jsonl')}"
        )
    above = os.path.dirname(place)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise ValueError(f"{path} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {above}")
    for suffix in ("", OLD) if os.path.exists(place) else ("",):
        if not _replaceable(place + suffix):
            spelled = path + suffix
            raise ValueError(
                f"{spelled} exists and is not a report; it would be replaced: name another file, or move that one"
            )
    return place


def _replaceable(place: str) -> bool:
    """Nothing is there, or a report (an empty one has no lines)."""
    if not os.path.exists(place):
        return True
    if not os.path.isfile(place):
        return False  # a pipe or a device: opening it may wait for ever, and renaming it would be worse
    if not os.path.getsize(place):
        return True
    try:
        with open(place, encoding="utf-8") as file:
            return {"name", "action", "shape"} <= set(json.loads(file.readline(2**16)))
    except (OSError, ValueError, TypeError):
        return False


def start(path: str) -> str:
    """Clears the way for a new report and returns its absolute path. That of an earlier merge is kept once, as ``….old``.

    Raises:
        ValueError: the report cannot be written there, see :func:`check_path`.
        OSError: likewise, says the file system.
    """
    place = check_path(path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.exists(place):
        os.replace(place, place + OLD)
    return place


class Journal:
    """Writes records as they come and warns once per merge.

    mergekit tells a method neither when a merge starts nor when it ends. It does ask methods about whole slices while it
    plans (:meth:`begin`), and elsewhere a tensor seen for the second time can only belong to a new merge.
    Thread-safe: mergekit's multi-GPU executor calls methods from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str | None, set[str]] = defaultdict(set)
        self._started: set[str | None] = set()
        self._warned: set[str | None] = set()
        self._diversion: list[tuple[str | None, str, Record]] | None = None

    @contextmanager
    def diverted(self) -> Iterator[list[tuple[str | None, str, Record]]]:
        """Collects (path, method, record) in the list that it yields: nothing is written, nothing warned.

        For the workers of a distributed merge: each would take its first tensor for the start of a merge, and put the
        report of the others away as an old one. Holds for all threads of the process.
        """
        collected: list[tuple[str | None, str, Record]] = []
        with self._lock:
            self._diversion = collected
        try:
            yield collected
        finally:
            with self._lock:
                self._diversion = None

    def begin(self) -> None:
        """A merge is being planned: what comes next belongs to it, whatever its tensors are called."""
        if REHEARSAL.get():
            return
        with self._lock:
            self._started.clear()

    def add(
        self, records: Sequence[Record], path: str | None = None, method: str = "monosoup"
    ) -> None:
        """Append ``records`` (all of one tensor) to ``path``; the first of a merge starts the file anew.

        A report of an earlier merge is kept once, as ``path + ".old"``.

        Raises:
            ValueError: the report cannot be written there, see :func:`check_path`.
        """
        key = os.path.abspath(os.path.expanduser(path)) if path else None
        with self._lock:
            if self._diversion is not None:
                self._diversion += [(path, method, record) for record in records]
                return
            seen = self._seen[key]
            # Unnamed tensors (merge_tensors without a name) cannot be told apart, so they never start a new one.
            starts = key not in self._started or any(
                record.name and record.name in seen for record in records
            )
            if starts:
                self._started.add(key)
                seen.clear()
                self._warned.discard(key)
            seen.update(record.name for record in records)
            if key:
                self._write(key, records, starts)
            self._warn(key, records, method)

    @staticmethod
    def _write(path: str, records: Sequence[Record], starts: bool) -> None:
        try:
            if starts:
                start(path)
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(record.to_json() + "\n" for record in records))
        except (OSError, ValueError) as error:
            raise ValueError(f"the report cannot be written: {error}") from error

    def _warn(self, key: str | None, records: Sequence[Record], method: str) -> None:
        lost = [
            r
            for r in records
            if r.action == "edited" and r.realised is not None and r.realised < REALISED_WARNING
        ]
        if lost and key not in self._warned:
            self._warned.add(key)
            LOG.warning(
                "%s: rounding to %s keeps only %.0f %% of the intended edit of %s, and may of other tensors (said once "
                "per merge; a `report` lists `realised` for all). The update is small against the spacing of %s numbers: "
                "set `dtype: float32` and `out_dtype: float32` to keep the edit.",
                method,
                lost[0].dtype,
                100 * max(lost[0].realised or 0.0, 0.0),
                lost[0].name or "a tensor",
                lost[0].dtype,
            )


def read(path: str | Path) -> list[Record]:
    """Records of a report file.

    Raises:
        ValueError: names file, line and cause; a report that a killed merge cut off says so.
    """
    parse = TypeAdapter(Record).validate_json
    records = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text, so not a report") from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse(line))
        except ValidationError as error:
            first = error.errors()[0]
            cause = ": ".join([*(f"`{key}`" for key in first["loc"][:1]), first["msg"]])
            raise ValueError(
                f"{path}, line {number}: not a monosoup record ({cause}); was the merge interrupted, or is this "
                "another file? Reports are written with `report: FILE` under `parameters`"
            ) from error
    if not records:
        raise ValueError(
            f"{path}: no records; the merge that should have written it edited nothing or has not started"
        )
    return records


def by_depth(records: Iterable[Record]) -> list[Record]:
    """In the order of the network, as far as names tell: what stands outside of layers first, but for heads."""

    def key(record: Record) -> tuple[object, ...]:
        numbers = layer(record.name)
        place = 1 if numbers else 0 if "embed" in record.name or "stem" in record.name else 2
        return place, numbers, natural(record.name)

    return sorted(records, key=key)


def rank_share(record: Record) -> float | None:
    return record.effective_rank / record.rank if record.effective_rank and record.rank else None


def layer_group(name: str) -> str:
    """Tensors that differ only in their numbers, e.g. ``model.layers.*.mlp.up_proj.weight``."""
    return re.sub(r"\d+", "*", name) or "(unnamed)"


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the edited matrices of a layer group, None where there are none.

    ``gamma_min`` and ``gamma_max`` are the extremes of the group, not means.
    """

    group: str
    edited: int
    copied: int
    parameters: int
    rank_share: float | None
    P_k: float | None
    lambda_high: float | None
    lambda_low: float | None
    gamma_min: float | None
    gamma_median: float | None
    gamma_max: float | None
    amplified: float | None
    rel_update: float | None
    realised: float | None
    seconds: float
    reasons: tuple[str, ...]


def summarise(records: Iterable[Record]) -> list[Row]:
    """A row per layer group in the order of appearance, then one of totals."""
    records = list(records)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[layer_group(record.name)].append(record)
    return [*(_row(group, members) for group, members in groups.items()), _row("total", records)]


def _row(group: str, records: Sequence[Record]) -> Row:
    def mean(values: Iterable[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    edited = [r for r in records if r.action == "edited"]
    # Weighted by the size of the edits: one tiny tensor that rounds away must not hide, or stand for, the model.
    wanted = [
        (r.edit_norm**2, r.realised)
        for r in edited
        if r.realised is not None and r.edit_norm is not None
    ]
    total = sum(weight for weight, _ in wanted)
    return Row(
        group=group,
        edited=len(edited),
        copied=len(records) - len(edited),
        parameters=sum(math.prod(r.shape) for r in records),
        rank_share=mean(r.k / r.rank if r.k and r.rank else None for r in edited),
        P_k=mean(r.P_k for r in edited),
        lambda_high=mean(r.lambda_high for r in edited),
        lambda_low=mean(r.lambda_low for r in edited),
        gamma_min=min((r.gamma_min for r in edited if r.gamma_min is not None), default=None),
        gamma_median=mean(r.gamma_median for r in edited),
        gamma_max=max((r.gamma_max for r in edited if r.gamma_max is not None), default=None),
        amplified=mean(r.amplified for r in edited),
        rel_update=mean(r.rel_update for r in records),
        realised=sum(weight * share for weight, share in wanted) / total
        if total
        else mean(s for _, s in wanted),
        seconds=sum(r.seconds for r in records),
        reasons=tuple(dict.fromkeys(r.reason for r in records if r.reason)),
    )


# (header, value of a row, shown in a terminal of 80 columns too). λ_high is 1 − λ_low but for the rule `scalar`.
Columns = list[tuple[str, Callable[["Row"], str], bool]]
_FIRST: Columns = [
    ("edited", lambda row: f"{row.edited}/{row.edited + row.copied}", True),
    ("params", lambda row: f"{row.parameters:,}", False),
]
_SPLIT: Columns = [
    ("k/rank", lambda row: _number(row.rank_share), True),
    ("P_k", lambda row: _number(row.P_k), False),
    ("λ_high", lambda row: _number(row.lambda_high), False),
    ("λ_low", lambda row: _number(row.lambda_low), True),
]
_CALIBRATION: Columns = [
    ("γ min", lambda row: _number(row.gamma_min), False),
    ("γ median", lambda row: _number(row.gamma_median), True),
    ("γ max", lambda row: _number(row.gamma_max), False),
    ("γ > 1", lambda row: _number(row.amplified, ".2f"), True),
]
_LAST: Columns = [
    ("‖ΔW‖/‖W0‖", lambda row: _number(row.rel_update, ".1e"), True),
    ("realised", lambda row: _number(row.realised, ".2f"), True),
    ("seconds", lambda row: f"{row.seconds:.1f}", False),
]


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def table(records: Iterable[Record], width: int = 160) -> Table:
    """The summary as a rich table for a terminal of ``width`` columns."""
    from rich import box
    from rich.table import Table

    rows = summarise(records)
    calibrated = rows[-1].gamma_max is not None
    chosen = [*_FIRST, *(_CALIBRATION if calibrated else _SPLIT), *_LAST]
    columns = [(header, value) for header, value, narrow in chosen if narrow or width >= 110]
    title = f"{'SVC' if calibrated else 'MonoSoup'} by layer group: means over edited matrices"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    out.padding, out.pad_edge = (0, 1, 0, 0), False
    out.add_column("layer group", overflow="fold", min_width=30)
    for header, _ in columns:
        out.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        if row is rows[-1]:
            out.add_section()
        out.add_row(_short(row.group), *(value(row) for _, value in columns))
    remarks: dict[str, list[str]] = defaultdict(list)
    for row in rows[:-1]:
        for reason in row.reasons:
            remarks[reason].append(_short(row.group))
    out.caption = (
        "\n".join(f"{reason}: {', '.join(groups)}" for reason, groups in remarks.items()) or None
    )
    out.caption_justify = "left"
    return out


def _short(group: str) -> str:
    """What tells layer groups apart; `model.` and `.weight` are in nearly every name."""
    return group.removeprefix("model.").removesuffix(".weight")
