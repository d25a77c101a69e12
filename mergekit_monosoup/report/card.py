"""What a merge did, in sentences: for a model card (`report --card`), and for the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from mergekit_monosoup.report.record import LEFT_OUT, Record
from mergekit_monosoup.report.table import Row, summarise
from mergekit_monosoup.terminal import plain, shortened

MONOSOUP_PAPER, SVC_PAPER = "https://arxiv.org/abs/2602.09689", "https://arxiv.org/abs/2602.05536"
MERGEKIT = "https://github.com/arcee-ai/mergekit"
MOST_REASONS, REASON_LIMIT = 4, 120  # of a sentence: reasons that it gives, characters of each


def card(records: Sequence[Record]) -> str:
    """Return a paragraph of Markdown for the model card of a merge.

    Raises:
        ValueError: the records are those of an inspection, which merged nothing.
    """
    if all(record.action == "inspected" for record in records):
        raise ValueError("holds an inspection, not a merge: there is no model to describe")
    merged = (
        f"This model was made with [mergekit]({MERGEKIT}) and {_method(summarise(records)[-1])} "
        f"of `mergekit-monosoup`{_settings(records, code)}."
    )
    return " ".join([merged, *sentences(records, code)])


def code(text: str) -> str:
    """Return a text as code in Markdown, whatever it contains."""
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def sentences(records: Sequence[Record], quote: Callable[[str], str] = str) -> list[str]:
    """Return what a merge did, from means over its edited matrices.

    Args:
        records: of a merge.
        quote: marks what comes from a file, as Markdown's code for example.
    """
    total = summarise(records)[-1]
    return [
        *_counts(records, total, quote),
        *(_calibration(total) if total.gamma_max is not None else _split(total)),
        *_realised(records, total, quote),
    ]


def _method(total: Row) -> str:
    """Return the method with a link to its paper; where nothing was edited nobody can tell it."""
    if total.gamma_max is not None:
        return f"the method [SVC]({SVC_PAPER})"
    return (
        f"the method [MonoSoup]({MONOSOUP_PAPER})" if total.lambda_low is not None else "a method"
    )


def _settings(records: Iterable[Record], quote: Callable[[str], str]) -> str:
    """Return `` (mode `variance`, R = 0.8)``; nothing where no matrix was split."""
    split = [record for record in records if record.mode is not None]
    parts = [f"mode {quote(mode)}" for mode in dict.fromkeys(str(record.mode) for record in split)]
    thresholds = sorted({record.R for record in split if record.R is not None})
    if thresholds:
        first, last = f"{thresholds[0]:g}", f"{thresholds[-1]:g}"
        parts.append(f"R = {first}" if first == last else f"R from {first} to {last}")
    return f" ({', '.join(parts)})" if parts else ""


def _counts(records: Sequence[Record], total: Row, quote: Callable[[str], str]) -> list[str]:
    count = total.edited + total.copied
    lines = [f"It edited {total.edited} of {count} tensors."]
    copied = Counter(record.reason for record in records if record.action == "copied")
    if copied:
        reasons = [
            f"{quote(plain(shortened(reason or 'no reason given', REASON_LIMIT)))} ({number})"
            for reason, number in copied.most_common(MOST_REASONS)
        ]
        more = len(copied) - len(reasons)
        rest = f", and {more} more reasons" if more else ""
        lines.append(f"The others were left as they were: {', '.join(reasons)}{rest}.")
    if missing := sum(record.action == LEFT_OUT for record in records):
        lines.append(f"The merged model lacks {missing} tensors that mergekit did not read.")
    return lines


def _split(total: Row) -> list[str]:
    if total.lambda_high is None or total.lambda_low is None:
        return []
    line = (
        f"On average it kept {total.lambda_high:.2f} of the strong directions of an update (λ_high)"
        f" and {total.lambda_low:.2f} of the weak ones (λ_low)"
    )
    if total.rel_edit is not None:
        line += f", which changed the update by {total.rel_edit:.0%} of its norm"
    return [f"{line}."]


def _calibration(total: Row) -> list[str]:
    if total.gamma_min is None or total.gamma_max is None:
        return []
    line = f"Its directions were scaled by γ from {total.gamma_min:.2f} to {total.gamma_max:.2f}"
    if total.gamma_median is not None:
        line += f", {total.gamma_median:.2f} at the median"
    if total.amplified is not None:
        line += f"; {total.amplified:.0%} of them were amplified"
    return [f"{line}."]


def _realised(records: Iterable[Record], total: Row, quote: Callable[[str], str]) -> list[str]:
    """Return how much of the edit is left in the dtype that it was rounded to."""
    if total.realised is None:
        return []
    dtypes = dict.fromkeys(r.dtype for r in records if r.realised is not None)
    names = ", ".join(quote(plain(shortened(name, REASON_LIMIT))) for name in dtypes)
    return [f"Of the intended edit {total.realised:.0%} survived rounding to {names}."]
