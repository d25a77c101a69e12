"""Generated parts of docs/evidence-digits.md, and its figures, from the seeds' files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.evidence import page, panels
from evaluation.evidence.collect import Seed
from evaluation.evidence.digits import ALPHAS, ARCHITECTURES, SUITE
from evaluation.evidence.paper import claims
from evaluation.evidence.subjects import DIGITS

WISE = [f"wise_ft_{alpha:g}" for alpha in ALPHAS]

SHOWN = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "monosoup_free": "**MonoSoup**, freevariance",
    "scalar_free": "its control: norm-matched scalar per tensor",
    "same_norm_free": "its control: Wise-FT of the same norm",
    "monosoup_R0.8": "**MonoSoup**, variance R = 0.8",
    "scalar_R0.8": "its control: norm-matched scalar per tensor",
    "same_norm_R0.8": "its control: Wise-FT of the same norm",
    **{name: f"Wise-FT {alpha:g}" for name, alpha in zip(WISE, ALPHAS, strict=True)},
    "high_R0.5": "leading 50 % alone",
    "high_R0.9": "leading 90 % alone",
    "high_R0.95": "leading 95 % alone",
    "high_R0.99": "leading 99 % alone",
    "low_R0.8": "low-energy part alone, R = 0.8",
}


# -- blocks ----------------------------------------------------------------------------------------


def _setting(seeds: Sequence[Seed]) -> str:
    answers = seeds[0].content.suites["vit"]
    items = sum(len(task.clusters) for task in answers.tasks.values())
    versions = ", ".join(
        f"{name} {answers.versions[name]}" for name in ("timm", "torchvision", "torch", "mergekit")
    )
    return (
        f"{len(seeds)} seeds ({', '.join(str(seed.seed) for seed in seeds)}), "
        f"{len(seeds[0].models('vit'))} models of each architecture, {items} images per model of "
        f"the suite `{SUITE}`{page.limited(seeds)}; {versions}."
    )


def _sets(seeds: Sequence[Seed]) -> str:
    """Return the accuracy of a few models on each set of images."""
    models = ("pretrained", "finetuned", "monosoup_free", "monosoup_R0.8", "scalar_R0.8")
    tasks = seeds[0].content.suites["vit"].tasks
    rows = [
        [f"{title}, {SHOWN[model].replace('**', '').removeprefix('its control: ')}"]
        + [page.mean_score(seeds, suite, model, name) for name in tasks]
        for suite, title in ARCHITECTURES.items()
        for model in models
    ]
    return page.table(["accuracy, %", *(task.label or name for name, task in tasks.items())], rows)


# -- figures ---------------------------------------------------------------------------------------


def plane(seeds: Sequence[Seed]) -> Any:
    """Return ID against OOD, means over seeds, a panel for each architecture."""
    figure, axes = panels.grid(2, (10.5, 4.2))
    truncated = ["high_R0.5", "high_R0.9", "high_R0.95", "high_R0.99"]
    for panel, subject in zip(axes, DIGITS, strict=True):
        lines = panels.sweeps(subject) | {"truncated": truncated}
        panels.draw_plane(panel, seeds, subject.suite, lines)
        panel.set(title=f"{subject.title}, means over {len(seeds)} seeds")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


PAGE = page.Page(
    "evidence-digits.md",
    "digits",
    {
        "setting": _setting,
        "claims": lambda seeds: page.claims_table(claims(seeds, *DIGITS)),
        "vit": lambda seeds: page.scores(seeds, "vit", SHOWN, "finetuned"),
        "convnext": lambda seeds: page.scores(seeds, "convnext", SHOWN, "finetuned"),
        "sets": _sets,
        "energies": lambda seeds: page.energies(seeds, *DIGITS),
    },
    {
        "digits": plane,
        "digits-energy": lambda seeds: panels.energies(seeds, *DIGITS),
        "digits-cka": panels.similarities,
    },
)
