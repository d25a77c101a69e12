"""Figures of evidence, from the seeds' JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evaluation import features
from evaluation.evidence.collect import GROUPS, Seed, effect
from evaluation.evidence.models import ENERGIES, SUITE
from evaluation.evidence.subjects import Subject
from evaluation.suite import GroupName

Seeds = TypeVar("Seeds")

NAMED = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "monosoup_free": "MonoSoup freevariance",
    "scalar_free": "its norm-matched scalar",
    "monosoup_R0.8": "MonoSoup R = 0.8",
    "scalar_R0.8": "its norm-matched scalar",
}
COMPARED = {
    "monosoup_free": "freevariance",
    "scalar_free": "… norm-matched scalar",
    "same_norm_free": "… Wise-FT, same norm",
    "monosoup_R0.8": "variance R = 0.8",
    "scalar_R0.8": "… norm-matched scalar",
    "same_norm_R0.8": "… Wise-FT, same norm",
    "rho_R0.8": "ρ alone",
    "cos_R0.8": "cos α alone",
    "uniform_R0.8": "one half of both",
    "high_R0.8": "high only",
    "low_R0.8": "low only",
    "high_R0.95": "leading 95 % only",
    "wise_ft_0.5": "Wise-FT 0.5",
    "lines_0.5": "LiNeS 0.5",
}


def save(made: Mapping[str, Callable[[Seeds], Any]], seeds: Seeds, folder: Path) -> Iterator[Path]:
    """Write figures by their names into `folder` and yield their paths.

    `seeds` is what they are drawn from: those of a world, or of several.
    """
    for name, figure in made.items():
        path = folder / f"{name}.png"
        # Without the version of matplotlib in it, equal figures are equal files.
        figure(seeds).savefig(path, bbox_inches="tight", dpi=110, metadata={"Software": None})
        yield path


def plane(seeds: Sequence[Seed], s: Subject) -> Any:
    """Return ID against OOD, means over seeds.

    The three curves, MonoSoup over R, and the models that need no number.
    """
    figure, axes = grid(1, (7.2, 4.6))
    draw_plane(axes[0], seeds, s.suite, sweeps(s))
    axes[0].set(title=f"means over {len(seeds)} seeds")
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def sweeps(s: Subject) -> dict[str, list[str]]:
    """Return the models along each curve, and along R."""
    along = {
        title: [s.named(f"{kind}_R{e:g}") for e in s.energies]
        for title, kind in (("MonoSoup, R", "monosoup"), ("its scalar, R", "scalar"))
    }
    return {**s.curves, **along}


def draw_plane(
    panel: Any, seeds: Sequence[Seed], suite: str, lines: Mapping[str, Sequence[str]]
) -> None:
    """Draw ID against OOD: a line through each list of models, a marker for each of NAMED."""
    for number, (name, models) in enumerate(lines.items()):
        x, y = ([100 * _mean(seeds, model, group, suite) for model in models] for group in GROUPS)
        panel.plot(
            x,
            y,
            ".--" if "scalar" in name else ".-",
            color=f"C{number}",
            alpha=0.7,
            label=name,
            zorder=1,
        )
    for (model, title), marker in zip(NAMED.items(), "osD^vP", strict=True):
        panel.plot(
            100 * _mean(seeds, model, "ID", suite),
            100 * _mean(seeds, model, "OOD", suite),
            marker,
            color="black",
            label=title,
            fillstyle="none" if "scalar" in title else "full",
            zorder=2,
        )
    panel.set(xlabel="ID, %", ylabel="OOD, %")


def effects(seeds: Sequence[Seed]) -> Any:
    """Return differences from fine-tuned: every seed a dot, the mean with its 95 % interval."""
    figure, axes = grid(2, (9.6, 4.6), sharey=True)
    for panel, group in zip(axes, GROUPS, strict=True):
        for place, model in enumerate(COMPARED):
            gain = effect(seeds, SUITE, model, "finetuned", group)
            dots = [100 * d for d in gain.by_seed]
            panel.plot(dots, [place] * len(seeds), "|", color="black", zorder=3)
            reach = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
            panel.errorbar(
                100 * gain.mean,
                place,
                xerr=reach,
                fmt="o",
                capsize=3,
                color=f"C{'…' in COMPARED[model]:d}",
                zorder=2,
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(xlabel=f"{group} − fine-tuned, points")
    axes[0].set_yticks(range(len(COMPARED)), list(COMPARED.values()))
    axes[0].invert_yaxis()
    return figure


def energy(seeds: Sequence[Seed]) -> Any:
    """Return differences against R, with 95 % bands over seeds.

    MonoSoup and its scalar control from fine-tuned, and the one from the other.
    """
    figure, axes = grid(3, (12.6, 3.4))

    def line(
        panel: Any, prefix: str, reference: str, group: GroupName, label: str, color: str
    ) -> None:
        band(panel, seeds, SUITE, group, ENERGIES, prefix, reference, label, color)

    for panel, group in zip(axes, GROUPS, strict=False):
        line(panel, "monosoup", "finetuned", group, "MonoSoup", "C0")
        line(panel, "scalar", "finetuned", group, "norm-matched scalar", "C1")
        panel.set(ylabel=f"{group} − fine-tuned, points")
    line(axes[2], "monosoup", "scalar_R{R}", "ID", "ID", "C2")
    line(axes[2], "monosoup", "scalar_R{R}", "OOD", "OOD", "C3")
    axes[2].set(ylabel="MonoSoup − its scalar, points")
    for panel in axes:
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(xlabel="R")
    axes[0].legend(frameon=False)
    axes[2].legend(frameon=False)
    return figure


def energies(seeds: Sequence[Seed], *subjects: Subject) -> Any:
    """Return differences from fine-tuned against R, with 95 % bands over seeds."""
    places = [(s, group) for s in subjects for group in GROUPS]
    figure, axes = grid(len(places), (3.5 * len(places), 3.2))
    for panel, (s, group) in zip(axes, places, strict=True):
        for kind, label, colour in (("monosoup", "MonoSoup", "C0"), ("scalar", "scalar", "C1")):
            prefix = s.named(kind)
            band(panel, seeds, s.suite, group, s.energies, prefix, s.tuned, label, colour)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(xlabel="R", title=f"{s.title}, {group} − fine-tuned, points")
    axes[0].legend(frameon=False)
    return figure


def band(
    panel: Any,
    seeds: Sequence[Seed],
    suite: str,
    group: GroupName,
    energies: Sequence[float],
    prefix: str,
    reference: str,
    label: str,
    color: str,
) -> None:
    """Draw differences from a reference (with `{R}` for its R) against R, with a 95 % band."""
    gains = [
        effect(seeds, suite, f"{prefix}_R{e:g}", reference.format(R=f"{e:g}"), group)
        for e in energies
    ]
    low, high = [100 * g.low for g in gains], [100 * g.high for g in gains]
    panel.plot(energies, [100 * g.mean for g in gains], ".-", color=color, label=label)
    panel.fill_between(energies, low, high, color=color, alpha=0.15)


def similarities(seeds: Sequence[Seed]) -> Any:
    """Return CKA with the pretrained model by block, mean over seeds (paper, Figure 9)."""

    def mean(group: str, model: str) -> list[float | None]:
        by_seed = np.array([seed.content.cka[group][model] for seed in seeds], dtype=np.float64)
        return list(by_seed.mean(axis=0))

    groups = seeds[0].content.cka
    return features.heatmap(
        {group: {model: mean(group, model) for model in models} for group, models in groups.items()}
    )


def _mean(seeds: Sequence[Seed], model: str, group: GroupName, suite: str) -> float:
    return float(np.mean([seed.score(suite, model, group) for seed in seeds]))


def grid(columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])
