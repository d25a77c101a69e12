"""What a whole merge did, in one sentence: counted from its records as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mergekit_monosoup.report.record import LEFT_OUT, Record
from mergekit_monosoup.report.table import realised_share
from mergekit_monosoup.terminal import plain

MOST_REASONS = 3  # that a sentence names
NO_REPORT = "`report: FILE` under `parameters` lists them all"


@dataclass
class Tally:
    """The matrices of one merge, counted.

    Tensors of fewer than two dimensions (norms, biases) are no matrices and not counted, nor is
    what mergekit leaves out, which is warned of where the merge is planned.

    Attributes:
        method: the merge method.
        reports: paths of the reports, as the configuration names them.
        matrices, edited: how many there were, and how many of them were edited.
        reasons: why the others were not, and how many each.
        dtypes: what the edits were rounded to.
        high, gamma: λ_high of each edited matrix, and the median γ of each calibrated one.
        edits: (‖W − W1‖, realised) of each edited matrix.
    """

    method: str = ""
    reports: list[str] = field(default_factory=list)
    matrices: int = 0
    edited: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dtypes: set[str] = field(default_factory=set)
    high: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)
    edits: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, entries: Iterable[tuple[str | None, str, Record]]) -> Tally:
        """Return the tally of (report, method, record) of each matrix."""
        tally = cls()
        for path, method, record in entries:
            tally.add([record], path, method)
        return tally

    def add(self, records: Iterable[Record], path: str | None, method: str) -> None:
        """Count the records of a tensor, which go to a report or to none."""
        if path and path not in self.reports:
            self.reports.append(path)
        for record in records:
            self.method = method
            if len(record.shape) >= 2 and record.action != LEFT_OUT:
                self._count(record)

    def _count(self, record: Record) -> None:
        self.matrices += 1
        if record.action != "edited":
            self.reasons[record.reason] += 1
            return
        self.edited += 1
        self.dtypes.add(record.dtype)
        if record.lambda_high is not None:
            self.high.append(record.lambda_high)
        if record.gamma_median is not None:
            self.gamma.append(record.gamma_median)
        if record.edit_norm is not None and record.realised is not None:
            self.edits.append((record.edit_norm, record.realised))

    def join(self, other: Tally) -> None:
        """Count what another one has counted of the same merge."""
        self.method = self.method or other.method
        self.reports += [path for path in other.reports if path not in self.reports]
        self.matrices += other.matrices
        self.edited += other.edited
        self.reasons += other.reasons
        self.dtypes |= other.dtypes
        self.high += other.high
        self.gamma += other.gamma
        self.edits += other.edits

    def sentence(self) -> str:
        """Return what the merge did, as ``monosoup edited 23 of 36 matrices, …``."""
        verb = "calibrated" if self.gamma else "edited"
        parts = [f"{self.method} {verb} {self.edited} of {self.matrices} matrices"]
        if self.high:
            parts.append(f"mean λ_high {sum(self.high) / len(self.high):.2f}")
        if self.gamma:
            parts.append(f"mean of the median γ {sum(self.gamma) / len(self.gamma):.2f}")
        kept = realised_share(self.edits)
        if kept is not None:
            dtypes = " and ".join(sorted(self.dtypes))
            parts.append(f"rounding to {dtypes} kept {max(kept, 0.0):.2f} of the edit")
        place = f"report: {', '.join(map(plain, self.reports))}" if self.reports else NO_REPORT
        return f"{', '.join(parts)}; {place}"

    def warnings(self) -> Iterator[str]:
        """Yield what nobody wanted who merged by this method; nothing of other methods."""
        if self.edited or not self.method:
            return
        if not self.matrices:
            yield f"{self.method}: nothing was edited, for there was no matrix to edit"
            return
        reasons = self.reasons.most_common(MOST_REASONS)
        said = "; ".join(f"{plain(reason) or 'no reason'} ({count})" for reason, count in reasons)
        hint = ""
        if reasons[0][0].startswith("no update"):
            hint = ". Is base_model the model that the fine-tuning started from, or the same again?"
        elif "min_rel_update" in reasons[0][0]:
            hint = ". Look at `min_rel_update` and its filters"
        yield f"{self.method}: none of {self.matrices} matrices was edited: {said}{hint}"
