"""What happened to one matrix: the record of it, which is one JSON line of a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mergekit_monosoup.checkpoints.places import arrange, depth
from mergekit_monosoup.checkpoints.texts import UnreadableError, check_file

# Below this share of the edit surviving the rounding to the output dtype, the merge mostly did
# nothing.
REALISED_WARNING = 0.5

# Characters of a record: the cosines of dozens of models with long names take 70 thousand. A file
# whose first line is longer is none of ours, and might not fit into memory.
LONGEST_LINE = 2**24

# A number of entries. What reads a report must be able to add and divide whatever stands in it.
Size = Annotated[int, Field(ge=0, lt=2**63)]
# The action of a tensor that mergekit does not read.
LEFT_OUT = "left out"

# Marks fields that a line has only when they were asked for.
ON_REQUEST = {"on_request": True}


@dataclass(frozen=True)
class Record:
    """What happened to one matrix.

    Fields that were not computed are None (a copied tensor has no spectrum).

    Attributes:
        name: tensor name; matrices of an expert stack have their index appended,
            ``…down_proj[3]``.
        shape: of the matrix as stored in the checkpoint.
        dtype: as stored, which is the one that the edit was rounded to.
        action: ``edited`` or ``copied`` (stays as fine-tuned, or as averaged); ``left out``: not
            merged, for mergekit does not read it; ``inspected``: no merge, a prediction.
        reason: why it was copied, or what limits an edit; empty for a plain edit.
        mode: how k was chosen.
        R: energy threshold of ``variance``; None in other modes.
        k: cut, the number of singular values in the head.
        rank: number of non-zero singular values of ΔW.
        effective_rank: exp(entropy of σ/Σσ) (paper, Eq. 3).
        gap: (σ_k − σ_{k+1})/σ_k, how far the cut is from going through equal singular values;
            None in reports of versions that did not write it.
        P_k: share of the head in ‖ΔW‖² (paper, Eq. 7).
        rho: (σ_{k+1}/σ_1)² (paper, Eq. 6).
        cos_alpha: √(1 − P_k) (paper, Eq. 7).
        lambda_high: factor of the head (paper, Eq. 8).
        lambda_low: factor of the tail (paper, Eq. 8).
        gamma_min: `svc` only: the smallest γ_r of a non-zero singular value.
        gamma_median: `svc` only: the median of these γ_r.
        gamma_max: `svc` only: the largest of these γ_r.
        amplified: `svc` only: the share of them with γ_r > 1.
        delta_norm: ‖ΔW‖_F; in `svc` ΔW is the merged update.
        rel_update: ‖ΔW‖_F/‖W0‖_F; None when W0 is zero.
        edit_norm: ‖W − W1‖_F of the weight as stored; in `svc` W1 is the merge without calibration.
        realised: share of the intended edit that survives rounding to dtype; 1 is all of it.
        solver: what computed the spectrum, and which solvers failed before it.
        seconds: wall time spent on the matrix.
        spectrum: σ/σ₁ at equally spaced places from the first to the last non-zero singular value,
            of `inspect --spectra`.
        leading: σ/σ₁ of the first singular values, one by one; beside `spectrum`, whose places are
            too far apart for the few strong directions of most updates.
        cosine: cosine of the task vectors of each two fine-tunes, of `inspect --cosine`; None
            where one of them is zero.

    An inspected matrix has a record for each mode; its edit_norm and realised are those of an
    output in bfloat16.
    """

    name: str
    shape: Annotated[tuple[Size, ...], Field(max_length=64)]
    dtype: str
    action: str = ""
    reason: str = ""
    mode: Annotated[str, Field(pattern=r"^[\w-]{1,32}$")] | None = None
    R: float | None = None
    k: Size | None = None
    rank: Size | None = None
    effective_rank: float | None = None
    gap: float | None = None
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
    leading: list[float] | None = field(default=None, metadata=ON_REQUEST)
    cosine: dict[str, float | None] | None = field(default=None, metadata=ON_REQUEST)

    def to_json(self) -> str:
        """Return the record as one line of JSON, without fields that nobody asked for."""
        unasked = [
            f.name
            for f in fields(self)
            if f.metadata == ON_REQUEST and getattr(self, f.name) is None
        ]
        return json.dumps(
            {k: v for k, v in asdict(self).items() if k not in unasked}, allow_nan=False
        )

    @staticmethod
    def from_json(line: str) -> Record:
        """Return the record that a line of JSON holds.

        Raises:
            ValidationError: (a ValueError) it holds none.
        """
        return _adapter().validate_json(line)


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


# Not in the class, where it would look like a field of a report.
Record.__pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[attr-defined]


def read(path: str | Path) -> list[Record]:
    """Read the records of a report file.

    Raises:
        ValueError: names file, line and cause; a report that a killed merge cut off says so.
    """
    parse = _adapter().validate_json
    records = []
    try:
        for line in _lines(path):
            records.append(parse(line))  # one by one: the error counts them
    except UnreadableError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text, so not a report") from error
    except ValidationError as error:
        first = error.errors()[0]
        cause = ": ".join([*(f"`{key}`" for key in first["loc"][:1]), first["msg"]])
        raise ValueError(
            f"{path}, line {len(records) + 1}: not a monosoup record ({cause}); was the merge "
            "interrupted, or is this another file? Reports are written with `report: FILE` "
            "under `parameters`"
        ) from error
    if not records:
        raise ValueError(
            f"{path}: no records; the merge that should have written it edited nothing or has "
            "not started"
        )
    return records


def _lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a report; of one that is too long to be a record the beginning."""
    check_file(path)
    with open(path, encoding="utf-8") as file:
        while line := file.readline(LONGEST_LINE):
            yield line


def by_depth(records: Iterable[Record]) -> list[Record]:
    """Return records in the order of the network, as far as names tell.

    What stands outside of layers comes first, but for heads.
    """
    records = list(records)
    places = arrange(record.name for record in records)
    return sorted(records, key=lambda record: depth(record.name, places[record.name]))


def rank_share(record: Record) -> float | None:
    """Return effective rank / rank; None where there is no spectrum."""
    return record.effective_rank / record.rank if record.effective_rank and record.rank else None


def rel_edit(record: Record) -> float | None:
    """Return ‖W − W1‖/‖ΔW‖, the size of the edit by that of the update; None without either."""
    if record.edit_norm is None or not record.delta_norm:
        return None
    return record.edit_norm / record.delta_norm
