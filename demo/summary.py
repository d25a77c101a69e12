"""The table and the sentences that the demo ends with: each statement follows from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from demo.merge import CONTROL, FREE, SOUPS, VARIED, WISE
from demo.score import Items, mean_over_skills
from evaluation.formatting import with_error, with_interval
from evaluation.statistics import Estimate, Values, paired
from evaluation.worlds.sums import OTHER_SKILLS, SKILLS, TUNED_SKILL, World

PRETRAINED, FINETUNED = "pretrained", "fine-tuned"
UNCHANGED = "unchanged"
GROUPS = {"ID": (TUNED_SKILL,), "OOD": OTHER_SKILLS}

NOTES = (
    "ID: sums asked in English, which fine-tuning taught. OOD: mean of the six other skills.",
    "±: one standard error, binomial, items about the same numbers or name counted together; "
    "0 if all are right.",
    "[ ]: 95 % normal interval of the mean per-item difference from the fine-tuned model on the "
    "same items. It covers the choice of test items, not that of the seed: another seed trains "
    "other models.",
)


@dataclass(frozen=True)
class Scores:
    """The same quantity in and out of distribution."""

    id: Estimate
    ood: Estimate


def scores(values: Values, items: Items) -> Scores:
    """Return the means of a model's numbers in both groups."""
    return Scores(*(mean_over_skills(values, items, skills) for skills in GROUPS.values()))


def skills(world: World) -> Table:
    """Return one row per skill: a question, its answer, how many are trained and tested, when."""
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


def table(grades: Mapping[str, Values], items: Items) -> Table:
    """Return one row per model, in per cent; differences in percentage points."""
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
        accuracy = scores(values, items)
        row = [with_error(accuracy.id), with_error(accuracy.ood)]
        if name != FINETUNED:
            row += [_gain(values, grades[FINETUNED], items, group)[1] for group in GROUPS]
        # A name with its soup's in front would not fit beside four columns of numbers.
        out.add_row(f"  {CONTROL}" if name.endswith(CONTROL) else name, *row)
    return out


def sentences(grades: Mapping[str, Values], items: Items) -> list[str]:
    """Return what the table says of each soup, and MonoSoup against Wise-FT on the same items."""
    before, after = scores(grades[PRETRAINED], items), scores(grades[FINETUNED], items)

    def against(title: str, reference: str) -> str:
        return f"{title}: {_compare(grades[title], grades[reference], items)}"

    monosoups = [soup.title for soup in (FREE, VARIED)]
    tuned = [against(soup.title, FINETUNED) for soup in SOUPS if CONTROL not in soup.title]
    wise = [against(title, WISE.title) for title in monosoups]
    split = [against(title, f"{title}, {CONTROL}") for title in monosoups]
    return [
        f"Fine-tuning took ID from {100 * before.id.mean:.1f} to {100 * after.id.mean:.1f} % "
        f"and OOD from {100 * before.ood.mean:.1f} to {100 * after.ood.mean:.1f} %.",
        *(f"Against {FINETUNED}, {line}." for line in tuned),
        *(f"Against {WISE.title}, {line}." for line in wise),
        *(
            f"Against the {CONTROL} (each tensor's update shrunk to the same norm, "
            f"no spectral split), {line}."
            for line in split
        ),
        "The 0.5 of Wise-FT and the 0.8 of variance are numbers that somebody chose; "
        "freevariance needs none.",
    ]


def _compare(values: Values, reference: Values, items: Items) -> str:
    phrases = []
    for group in GROUPS:
        gain, shown = _gain(values, reference, items, group)
        low, high = gain.interval()
        if shown == UNCHANGED:
            phrases.append(f"{group} {UNCHANGED} on every item")
        elif low <= 0 <= high:
            phrases.append(f"{group} {shown}, which covers zero")
        else:
            phrases.append(f"{group} {shown}, {'higher' if gain.mean > 0 else 'lower'}")
    return "; ".join(phrases)


def _gain(values: Values, reference: Values, items: Items, group: str) -> tuple[Estimate, str]:
    """Return the paired difference, and it as text: in percentage points, with its interval."""
    skills = GROUPS[group]
    differences = paired(values, reference)
    gain = mean_over_skills(differences, items, skills)
    if not any(differences[skill].any() for skill in skills):
        return gain, UNCHANGED  # its interval is [0, 0], a certainty that no finite test gives
    return gain, with_interval(gain.mean, *gain.interval())
