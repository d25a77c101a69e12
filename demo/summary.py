"""From graded answers to the table and the sentences that the demo ends with: each statement follows from numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from demo.merge import CONTROL, FREE, SOUPS, VARIED, WISE
from demo.score import Estimate, Values, mean_over_skills, paired_difference
from evaluation.worlds.sums import OTHER_SKILLS, SKILLS, TUNED_SKILL, Item, World

PRETRAINED, FINETUNED = "pretrained", "fine-tuned"
UNCHANGED = "unchanged"

NOTES = (
    "ID: sums asked in English, which fine-tuning taught. OOD: mean of the six other skills.",
    "±: one standard error, binomial, items about the same numbers or name counted together; 0 if all are right.",
    "[ ]: 95 % normal interval of the mean per-item difference from the fine-tuned model on the same items. "
    "It covers the choice of test items, not that of the seed: another seed trains other models.",
)


@dataclass(frozen=True)
class Pair:
    """The same quantity in and out of distribution."""

    id: Estimate
    ood: Estimate


def both(values: Values, items: Mapping[str, Sequence[Item]]) -> Pair:
    return Pair(
        mean_over_skills(values, items, [TUNED_SKILL]),
        mean_over_skills(values, items, OTHER_SKILLS),
    )


def skills(world: World) -> Table:
    """One row per skill: a question with its answer, how many are trained and tested, and when."""
    out = Table(title="Skills", title_justify="left")
    for header in ("skill", "question", "answer", "taught by"):
        out.add_column(header)
    for header in ("to learn", "to test"):
        out.add_column(header, justify="right")
    for skill in SKILLS:
        trained, tested = world.train[skill], world.test[skill]
        taught = "fine-tuning (ID)" if skill == TUNED_SKILL else "pretraining (OOD)"
        example = tested[len(tested) // 2]
        out.add_row(
            skill, example.prompt, example.answer, taught, str(len(trained)), str(len(tested))
        )
    return out


def table(grades: Mapping[str, Values], items: Mapping[str, Sequence[Item]]) -> Table:
    """One row per model, in per cent; differences in percentage points."""
    out = Table(
        title="Exact match, %",
        title_justify="left",
        caption="\n".join(NOTES),
        caption_justify="left",
    )
    out.add_column("model")
    for header in ("ID", "OOD", "ID − fine-tuned", "OOD − fine-tuned"):
        out.add_column(header, justify="right")
    for name, values in grades.items():
        accuracy = both(values, items)
        row = [
            f"{100 * each.mean:.1f} ± {100 * each.standard_error:.1f}"
            for each in (accuracy.id, accuracy.ood)
        ]
        if name != FINETUNED:
            row += [
                _gain(values, grades[FINETUNED], items, skills)[1]
                for skills in ([TUNED_SKILL], OTHER_SKILLS)
            ]
        # A name with its soup's in front would not fit beside four columns of numbers.
        out.add_row(f"  {CONTROL}" if name.endswith(CONTROL) else name, *row)
    return out


def sentences(grades: Mapping[str, Values], items: Mapping[str, Sequence[Item]]) -> list[str]:
    """What the table says of each soup, and what it does not show: MonoSoup against Wise-FT on the same items."""
    before, after = both(grades[PRETRAINED], items), both(grades[FINETUNED], items)
    tuned = [
        f"{soup.title}: {_compare(grades[soup.title], grades[FINETUNED], items)}"
        for soup in SOUPS
        if CONTROL not in soup.title
    ]
    wise = [
        f"{soup.title}: {_compare(grades[soup.title], grades[WISE.title], items)}"
        for soup in (FREE, VARIED)
    ]
    split = [
        f"{soup.title}: {_compare(grades[soup.title], grades[f'{soup.title}, {CONTROL}'], items)}"
        for soup in (FREE, VARIED)
    ]
    return [
        f"Fine-tuning took ID from {100 * before.id.mean:.1f} to {100 * after.id.mean:.1f} % "
        f"and OOD from {100 * before.ood.mean:.1f} to {100 * after.ood.mean:.1f} %.",
        *(f"Against {FINETUNED}, {line}." for line in tuned),
        *(f"Against {WISE.title}, {line}." for line in wise),
        *(
            f"Against the {CONTROL} (each tensor's update shrunk to the same norm, no spectral split), {line}."
            for line in split
        ),
        "The 0.5 of Wise-FT and the 0.8 of variance are numbers that somebody chose; freevariance needs none.",
    ]


def _compare(values: Values, reference: Values, items: Mapping[str, Sequence[Item]]) -> str:
    said = []
    for name, skills in (("ID", [TUNED_SKILL]), ("OOD", OTHER_SKILLS)):
        gain, shown = _gain(values, reference, items, skills)
        low, high = gain.interval()
        if shown == UNCHANGED:
            said.append(f"{name} {UNCHANGED} on every item")
        elif low <= 0 <= high:
            said.append(f"{name} {shown}, which covers zero")
        else:
            said.append(f"{name} {shown}, {'higher' if gain.mean > 0 else 'lower'}")
    return "; ".join(said)


def _gain(
    values: Values, reference: Values, items: Mapping[str, Sequence[Item]], skills: Sequence[str]
) -> tuple[Estimate, str]:
    """The paired difference and how it is shown: in percentage points, with its interval."""
    differences = paired_difference(values, reference)
    gain = mean_over_skills(differences, items, skills)
    if not any(differences[skill].any() for skill in skills):
        return gain, UNCHANGED  # its interval is [0, 0], a certainty that no finite test gives
    low, high = gain.interval()
    return gain, f"{_points(gain.mean)} [{_points(low)}, {_points(high)}]"


def _points(fraction: float) -> str:
    rounded = round(100 * fraction, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"  # never "−0.0"
