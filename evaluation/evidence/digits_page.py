"""Generated parts of docs/evidence-digits.md, and its figures, from the seeds' files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.evidence import page, panels
from evaluation.evidence.claims import (
    Claim,
    Judge,
    Quantity,
    both,
    closer,
    dominant,
    gain,
    kept,
    less,
    more,
    number,
    over_best,
)
from evaluation.evidence.collect import GROUPS, Seed, effect
from evaluation.evidence.digits import ALPHAS, ARCHITECTURES, ENERGIES, SUITE
from evaluation.formatting import with_interval

PAGE = "evidence-digits.md"
STEM = "digits"  # of the seeds' files

MODES = {"freevariance": "free", "variance": "R0.8"}
CONTROLS = {"scalar": "its norm-matched scalar", "same_norm": "Wise-FT of its norm"}
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


def write(docs: Path) -> None:
    """Fill the blocks of docs/evidence-digits.md and draw docs/evidence/digits*.png.

    Raises:
        SourceError: fewer than two seeds, a page without blocks.
    """
    seeds = page.read(docs / "evidence", STEM)
    page.fill(docs / PAGE, seeds, BLOCKS)
    figures = {"digits": plane, "digits-energy": energy, "digits-cka": similarities}
    for path in panels.save(figures, seeds, docs / "evidence"):
        print(path)


# -- claims ----------------------------------------------------------------------------------------


def _each(
    quantity: Any, label: str, *arguments: Any, groups: Sequence[str] = ()
) -> Iterator[Quantity]:
    """Yield a quantity of `claims` for each architecture, whose name begins its label."""
    for suite, title in ARCHITECTURES.items():
        yield from _listed(quantity(f"{title}: {label}", *arguments, suite=suite))


def _listed(made: Quantity | Iterator[Quantity]) -> Iterator[Quantity]:
    if isinstance(made, Quantity):
        yield made
    else:
        yield from made


def _numbers(
    label: str, judge: Judge | None, value: Any, *arguments: str, in_points: bool = False
) -> Iterator[Quantity]:
    for suite, title in ARCHITECTURES.items():
        text = f"{title}: {label}"
        yield number(text, judge, value, suite, *arguments, in_points=in_points)


def _dominant(seed: Seed, suite: str, mode: str) -> float:
    return dominant(seed, mode, suite)


def _closer(seed: Seed, suite: str, model: str, reference: str) -> float:
    return closer(seed, model, reference, f"{suite} OOD")


def _over_wise(seed: Seed, suite: str, model: str) -> float:
    return over_best(seed, model, ["pretrained", *WISE, "finetuned"], suite)


def claims(seeds: Sequence[Seed]) -> list[Claim]:
    """Return the claims with what the seeds say, in the order of the paper's argument."""
    listed = [
        ("Editing one checkpoint raises OOD accuracy", "abstract; Table 1",
         [q for mode, x in MODES.items()
          for q in _each(gain, f"{mode} − fine-tuned", f"monosoup_{x}", "finetuned", "OOD", more)]),
        ("… and keeps ID accuracy", "abstract; Table 1",
         [q for mode, x in MODES.items()
          for q in _each(gain, f"{mode} − fine-tuned", f"monosoup_{x}", "finetuned", "ID", kept)]),
        ("The gain is the spectral split's, not shrinkage (the paper has no such control)",
         "implied by §4, appendix J",
         [q for mode, x in MODES.items() for control, name in CONTROLS.items()
          for q in _each(both, f"{mode} − {name}", f"monosoup_{x}", f"{control}_{x}", None, more)]),
        ("At equal ID it is at least as good as Wise-FT", "Tables 3, 5",
         [q for mode, x in MODES.items()
          for q in _numbers(f"{mode} − the best Wise-FT of no less ID, OOD", kept, _over_wise,
                            f"monosoup_{x}", in_points=True)]),
        ("Cutting the tail off hurts, even at 95 % of the energy", "§4, Figure 3b, appendix D",
         [q for share in (0.9, 0.95, 0.99)
          for q in _each(both, f"leading {share:.0%} alone − fine-tuned", f"high_R{share:g}",
                         "finetuned", less, less)]),
        ("λ_high exceeds λ_low in every layer", "appendix J",
         [q for mode in MODES
          for q in _numbers(f"share of matrices with λ_high > λ_low, {mode}", None, _dominant,
                            mode)]),
        ("On OOD inputs the edited features are closer to the pretrained ones",
         "appendix G, Figures 9, 10",
         [*(q for mode, x in MODES.items()
            for q in _numbers(f"CKA of the last block, {mode} − fine-tuned", more, _closer,
                              f"monosoup_{x}", "finetuned")),
          *_numbers("CKA of the last block, variance − its norm-matched scalar", None, _closer,
                    "monosoup_R0.8", "scalar_R0.8")]),
    ]  # fmt: skip
    return [
        Claim(text, source, tuple(quantity.measure(seeds) for quantity in quantities))
        for text, source, quantities in listed
    ]


# -- blocks ----------------------------------------------------------------------------------------


def _setting(seeds: Sequence[Seed]) -> str:
    answers = seeds[0].content.suites["vit"]
    items = sum(len(task.clusters) for task in answers.tasks.values())
    versions = ", ".join(
        f"{name} {answers.versions[name]}" for name in ("timm", "torchvision", "torch", "mergekit")
    )
    limited = " (--limit: a quick look)" if seeds[0].content.limit else ""
    return (
        f"{len(seeds)} seeds ({', '.join(str(seed.seed) for seed in seeds)}), "
        f"{len(seeds[0].models('vit'))} models of each architecture, {items} images per model of "
        f"the suite `{SUITE}`{limited}; {versions}."
    )


def _energies(seeds: Sequence[Seed]) -> str:
    rows = []
    for suite, title in ARCHITECTURES.items():
        for e in ENERGIES:
            row = [title, f"{e:g}"]
            for reference in ("finetuned", f"scalar_R{e:g}"):
                for group in GROUPS:
                    found = effect(seeds, suite, f"monosoup_R{e:g}", reference, group)
                    row.append(with_interval(found.mean, found.low, found.high))
            rows.append(row)
    header = ["", "R", "ID − fine-tuned", "OOD − fine-tuned", "ID − its scalar", "OOD − its scalar"]
    return page.table(header, rows)


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


BLOCKS = {
    "setting": _setting,
    "claims": lambda seeds: page.claims_table(claims(seeds)),
    "vit": lambda seeds: page.scores(seeds, "vit", SHOWN, "finetuned"),
    "convnext": lambda seeds: page.scores(seeds, "convnext", SHOWN, "finetuned"),
    "sets": _sets,
    "energies": _energies,
}


# -- figures ---------------------------------------------------------------------------------------


def plane(seeds: Sequence[Seed]) -> Any:
    """Return ID against OOD, means over seeds, a panel for each architecture."""
    figure, axes = panels.grid(2, (10.5, 4.2))
    lines = {
        "Wise-FT": ["pretrained", *WISE, "finetuned"],
        "MonoSoup, R": [f"monosoup_R{e:g}" for e in ENERGIES],
        "its scalar, R": [f"scalar_R{e:g}" for e in ENERGIES],
        "truncated": ["high_R0.5", "high_R0.9", "high_R0.95", "high_R0.99"],
    }
    for panel, (suite, title) in zip(axes, ARCHITECTURES.items(), strict=True):
        panels.draw_plane(panel, seeds, suite, lines)
        panel.set(title=f"{title}, means over {len(seeds)} seeds")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def energy(seeds: Sequence[Seed]) -> Any:
    """Return differences against R for each architecture, with 95 % bands over seeds."""
    figure, axes = panels.grid(4, (14, 3.2))
    places = [(suite, group) for suite in ARCHITECTURES for group in GROUPS]
    for panel, (suite, group) in zip(axes, places, strict=True):
        for kind, label, colour in (("monosoup", "MonoSoup", "C0"), ("scalar", "scalar", "C1")):
            panels.band(panel, seeds, suite, group, ENERGIES, kind, "finetuned", label, colour)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(xlabel="R", title=f"{ARCHITECTURES[suite]}, {group} − fine-tuned, points")
    axes[0].legend(frameon=False)
    return figure


def similarities(seeds: Sequence[Seed]) -> Any:
    """Return CKA with the pretrained model by block, mean over seeds (paper, Figures 9, 10)."""
    return panels.similarities(seeds)
