"""Which mode to try first: the last lines that `inspect` prints.

The numbers are quoted from docs/evidence.md and docs/evidence-worlds.md, where they are generated;
a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_monosoup.report.inspected import FLAT
from mergekit_monosoup.report.record import Record


@dataclass(frozen=True)
class Measured:
    """Change of accuracy from the fine-tuned model in points, mean over seeds [95 % interval]."""

    in_distribution: str
    out_of_distribution: str

    def __str__(self) -> str:
        return f"ID {self.in_distribution}, OOD {self.out_of_distribution}"


WORLD = "0.2 M parameters, 8 seeds"
EVIDENCE = {
    "freevariance": Measured("−0.2 [−0.4, 0.0]", "+4.9 [+4.0, +5.9]"),
    "R = 0.9": Measured("−1.5 [−3.0, 0.0]", "+15.9 [+11.2, +20.6]"),
    "R = 0.8": Measured("−5.0 [−8.7, −1.3]", "+20.4 [+13.7, +27.0]"),
    "Wise-FT 0.5": Measured("−4.9 [−8.5, −1.3]", "+20.3 [+13.9, +26.7]"),
}
OOD_BEYOND_CONTROL = {"freevariance": "+0.5 [0.0, +1.0]", "R = 0.8": "+0.9 [+0.3, +1.4]"}
"""What is left of OOD beyond shrinking each update by as much without looking at its spectrum."""
OOD_WHERE_IT_GAINED = {"freevariance": "−0.9 [−1.8, 0.0]", "R = 0.8": "−4.8 [−6.6, −3.0]"}
"""OOD of the edit where fine-tuning had gained it: MiniLM on tweets, the usual recipe."""


@dataclass(frozen=True)
class Share:
    """How much of what fine-tuning lost out of distribution a mode brings back, in three worlds.

    Attributes:
        lowest, highest: of the worlds' own shares.
        right: how often it foretold the sign of the gain in a world that it was not fitted on.
        error: root mean square of what it was off by there, in points.
    """

    lowest: str
    highest: str
    right: str
    error: str


FINE_TUNES = "71"
SHARES = {
    "freevariance": Share("0.06", "0.18", "94%", "1.8"),
    "R = 0.8": Share("0.23", "0.80", "94%", "6.5"),
}


def which_mode(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each wish, with the mode to try first and what it did where it was measured.

    `records` are those of `inspect`. Nothing is advised where no matrix was changed.
    """
    if all(record.lambda_high is None for record in records):
        yield (
            "which mode: none. Fine-tuning changed no matrix that could be edited; are these the "
            "right two models?"
        )
        return
    yield (
        "which mode first (ID: what was fine-tuned; OOD: what the model could do before; change "
        f"from the fine-tuned model in points [95 %] in a toy of {WORLD}, docs/evidence.md):"
    )
    yield f"- ID must stay: freevariance. {EVIDENCE['freevariance']}."
    yield f"- a little ID for more OOD: variance, R = 0.9. {EVIDENCE['R = 0.9']}."
    yield f"- more OOD still: variance, R = 0.8. {EVIDENCE['R = 0.8']}."
    yield (
        "- Wise-FT is enough if you can score models on questions of your own and choose its "
        f"number by that: at 0.5, {EVIDENCE['Wise-FT 0.5']}.{_flat(records)}"
    )
    yield (
        "- none, if nothing was forgotten or BASE is not the exact checkpoint that fine-tuning "
        "started from. Where fine-tuning had gained OOD, on real tweets, the edit took part of it: "
        f"freevariance {OOD_WHERE_IT_GAINED['freevariance']}, "
        f"R = 0.8 {OOD_WHERE_IT_GAINED['R = 0.8']}."
    )
    yield from _ask_first()


def _ask_first() -> Iterator[str]:
    """Yield what tells before a merge whether it will help, and how sure that is."""
    yield (
        "Ask BASE and TUNED your own OOD questions first (docs/evaluation.md): what is seen here "
        "did not tell whether the edit helps, the difference of their answers did. Of the OOD that "
        "fine-tuning lost, the edit brought back a share, and of what it had gained it took as "
        "much (docs/evidence-worlds.md):"
    )
    for mode, share in SHARES.items():
        yield (
            f"- {mode}: {share.lowest} to {share.highest} of it, by world. In a world that the "
            f"share was not fitted on, the sign was right in {share.right} of {FINE_TUNES} "
            f"fine-tunes, and the gain off by {share.error} points."
        )
    yield (
        "Trust the order, not the numbers: these are small models. Of the toy's OOD gain, "
        f"{OOD_BEYOND_CONTROL['freevariance']} (freevariance) and {OOD_BEYOND_CONTROL['R = 0.8']} "
        "(R = 0.8) are beyond what shrinking each update by as much gains."
    )


def _flat(records: Sequence[Record]) -> str:
    """Return that `variance` is nearly Wise-FT in these models, if it is in most matrices."""
    edited = [r for r in records if r.mode == "variance" and r.lambda_high is not None]
    factors = [(r.lambda_high or 0.0, r.lambda_low or 0.0) for r in edited]
    flat = [(high + low) / 2 for high, low in factors if abs(high - low) <= FLAT]
    if 2 * len(flat) <= len(factors):
        return ""
    return (
        f" Here variance, R = {edited[0].R:g}, scales {len(flat)} of {len(edited)} matrices by "
        f"nearly one factor each, on average {sum(flat) / len(flat):.2f}, as Wise-FT would."
    )
