"""Generated parts of docs/evidence-real.md, and its figures, from the seeds' files alone."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation import statistics
from evaluation.evidence import page, panels
from evaluation.evidence.collect import GROUPS, Seed, effect
from evaluation.evidence.paper import claims
from evaluation.evidence.subjects import TWEETS, TWEETS_OTHERS, TWEETS_WIDE
from evaluation.evidence.tweets import ALPHAS, PARTS, RECIPES, SUITE
from evaluation.formatting import with_error, with_interval

SHOWN = {
    **{name: page.SHOWN[name] for name in (
        "pretrained", "finetuned", "monosoup_free", "scalar_free", "same_norm_free",
        "monosoup_R0.8", "scalar_R0.8", "same_norm_R0.8",
    )},
    **{f"wise_ft_{alpha:g}": f"Wise-FT {alpha:g}" for alpha in reversed(ALPHAS)},
    "lines_0.5": "LiNeS, from 0.5 to 1",
    "average": "average with the gentle fine-tune",
    "model_stock": "ModelStock of both",
    "average_monosoup_free": "MonoSoup of the average, freevariance",
    "average_monosoup_R0.8": "MonoSoup of the average, variance",
}  # fmt: skip
ABLATED = {name: title for name, title in page.ABLATED.items() if name != "high_R0.5"}
ASKED = {
    "pretrained": "pretrained",
    "finetuned": "usual",
    "monosoup_free": "… MonoSoup, freevariance",
    "monosoup_R0.8": "… MonoSoup, variance",
    "scalar_R0.8": "… its scalar, variance",
    "harsh": "harsh",
    "wide_pretrained": "wide base, pretrained",
    "wide": "wide base, fine-tuned",
    "wide_monosoup_free": "… MonoSoup, freevariance",
    "wide_monosoup_R0.8": "… MonoSoup, variance",
}
"""Whose accuracy is shown topic by topic."""

FINE_TUNES = (TWEETS, *TWEETS_OTHERS)


def _setting(seeds: Sequence[Seed]) -> str:
    answers = seeds[0].content.suites[SUITE]
    items = sum(len(task.clusters) for task in answers.tasks.values())
    packages = ("mergekit", "torch", "transformers", "python")
    versions = ", ".join(f"{name} {answers.versions[name]}" for name in packages)
    recipes = "; ".join(
        f"{subject.title}: rate {recipe.learning_rate:g}, "
        f"{recipe.epochs} epochs" + (f", rank {recipe.rank}" if recipe.rank else "")
        for subject in FINE_TUNES
        for recipe in [RECIPES[subject.tuned]]
    )
    return (
        f"{len(seeds)} seeds ({', '.join(str(seed.seed) for seed in seeds)}), "
        f"{len(seeds[0].models(SUITE))} models each, {items} items per model of the suite "
        f"`{SUITE}`{page.limited(seeds)}; {recipes}; {versions}."
    )


def _recipes(seeds: Sequence[Seed]) -> str:
    """Return the scores of each fine-tune, and what the edit changes."""
    rows = []
    for s in FINE_TUNES:
        for name, title in (
            (s.base, "pretrained"),
            (s.tuned, "fine-tuned"),
            *((s.named(f"{kind}_{x}"), f"{shown}, {mode}")
              for x, mode in (("free", "freevariance"), ("R0.8", "variance"))
              for kind, shown in (("monosoup", "MonoSoup"), ("scalar", "its scalar"))),
        ):  # fmt: skip
            row = [s.title, title]
            for group in GROUPS:
                values = [seed.score(SUITE, name, group) for seed in seeds]
                row.append(with_error(statistics.over_runs(values, 0.0)[0]))
            for group in GROUPS:
                change = effect(seeds, SUITE, name, s.tuned, group)
                own = name == s.tuned
                row.append("" if own else with_interval(change.mean, change.low, change.high))
            rows.append(row)
    header = ["recipe", "model", "ID, %", "OOD, %", "ID − fine-tuned", "OOD − fine-tuned"]
    return page.table(header, rows)


def _topics(seeds: Sequence[Seed]) -> str:
    """Return the accuracy of a few models on each topic."""
    tasks = seeds[0].content.suites[SUITE].tasks
    rows = [
        [title] + [page.mean_score(seeds, SUITE, name, task) for task in tasks]
        for name, title in ASKED.items()
    ]
    return page.table(["accuracy, %", *(t.label or name for name, t in tasks.items())], rows)


def _parts(seeds: Sequence[Seed]) -> str:
    """Return what the split changes against the scalar, by the tensors that get it."""
    models = {f"split_{part}": part for part in PARTS} | {"monosoup_R0.8": "all"}
    rows = []
    for model, part in models.items():
        changes = [effect(seeds, SUITE, model, "scalar_R0.8", group) for group in GROUPS]
        rows.append([part, *(with_interval(c.mean, c.low, c.high) for c in changes)])
    return page.table(["split in", "ID − scalar everywhere", "OOD − scalar everywhere"], rows)


PAGE = page.Page(
    "evidence-real.md",
    "tweets",
    {
        "setting": _setting,
        "claims": lambda seeds: page.claims_table(claims(seeds, TWEETS)),
        "wide": lambda seeds: page.claims_table(claims(seeds, TWEETS_WIDE)),
        "recipes": _recipes,
        "scores": lambda seeds: page.scores(seeds, SUITE, SHOWN, "finetuned"),
        "topics": _topics,
        "energies": lambda seeds: page.energies(seeds, TWEETS),
        "parts": _parts,
        "ablations": lambda seeds: page.scores(seeds, SUITE, ABLATED, "finetuned"),
    },
    {
        "tweets": lambda seeds: panels.plane(seeds, TWEETS),
        "tweets-energy": lambda seeds: panels.energies(seeds, TWEETS),
        "tweets-cka": panels.similarities,
    },
)
