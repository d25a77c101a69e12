"""Pages of evidence: parts that are generated, and figures, from the seeds' files alone.

`python -m evaluation.evidence --tables` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import statistics
from evaluation.evidence import panels
from evaluation.evidence.claims import Claim
from evaluation.evidence.collect import GROUPS, Seed, effect
from evaluation.evidence.models import SUITE, TWO_TASKS
from evaluation.evidence.panels import Seeds
from evaluation.evidence.paper import claims
from evaluation.evidence.subjects import SUMS, Subject
from evaluation.formatting import with_error, with_interval
from evaluation.sources import SourceError

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

SHOWN = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "monosoup_free": "**MonoSoup**, freevariance",
    "scalar_free": "its control: norm-matched scalar per tensor",
    "same_norm_free": "its control: Wise-FT of the same norm",
    "monosoup_R0.8": "**MonoSoup**, variance R = 0.8",
    "scalar_R0.8": "its control: norm-matched scalar per tensor",
    "same_norm_R0.8": "its control: Wise-FT of the same norm",
    "wise_ft_0.9": "Wise-FT 0.9",
    "wise_ft_0.7": "Wise-FT 0.7",
    "wise_ft_0.5": "Wise-FT 0.5",
    "lines_0.5": "LiNeS, from 0.5 to 1",
    "second": "gentler fine-tune (rate 1e-3)",
    "second_monosoup_free": "its MonoSoup, freevariance",
    "second_monosoup_R0.8": "its MonoSoup, variance",
    "average": "average of both fine-tunes",
    "model_stock": "ModelStock of both",
    "average_monosoup_free": "MonoSoup of the average, freevariance",
    "average_monosoup_R0.8": "MonoSoup of the average, variance",
    "lora": "LoRA fine-tune, rank 8",
    "lora_monosoup_free": "its MonoSoup, freevariance",
    "lora_monosoup_R0.8": "its MonoSoup, variance",
}
ABLATED = {
    "monosoup_R0.8": "both (MonoSoup)",
    "rho_R0.8": "ρ alone",
    "cos_R0.8": "cos α alone",
    "uniform_R0.8": "one half of both parts",
    "high_R0.8": "high-energy part alone",
    "low_R0.8": "low-energy part alone",
    "high_R0.5": "leading 50 % alone",
    "high_R0.9": "leading 90 % alone",
    "high_R0.95": "leading 95 % alone",
    "high_R0.99": "leading 99 % alone",
}
TWO = {
    "second": "fine-tuned on sums in English",
    "italian": "fine-tuned on sums in Italian",
    "two_average": "average",
    "two_sum": "sum (task arithmetic)",
    "two_svc_average": "svc of the average",
    "two_svc_average_no_gain": "svc of the average, `alpha: 1`",
    "two_svc_sum": "svc of the sum",
    "two_monosoup_free": "MonoSoup of the average, freevariance",
    "two_monosoup_R0.8": "MonoSoup of the average, variance",
}


@dataclass(frozen=True)
class Page:
    """A page about one world.

    Attributes:
        name: of the file in docs/.
        stem: the seeds' files begin with it.
        blocks: what makes each generated block.
        figures: what draws each file of docs/evidence, by its name without .png.
    """

    name: str
    stem: str
    blocks: Mapping[str, Callable[[Sequence[Seed]], str]]
    figures: Mapping[str, Callable[[Sequence[Seed]], Any]]

    def write(self, docs: Path) -> None:
        """Fill the blocks and draw the figures.

        Raises:
            SourceError: fewer than two seeds, a page without blocks.
        """
        seeds = read(docs / "evidence", self.stem)
        fill(docs / self.name, seeds, self.blocks)
        for path in panels.save(self.figures, seeds, docs / "evidence"):
            print(path)


def fill(page: Path, seeds: Seeds, blocks: Mapping[str, Callable[[Seeds], str]]) -> None:
    """Replace every block of a page by what the seeds say; a page that is not there has no more.

    `seeds` is what the blocks are made of: those of a world, or of several.

    Raises:
        SourceError: the page lacks a block.
    """
    text = "".join(f"<!-- generated: {name} -->\n<!-- end -->\n" for name in blocks)
    if page.is_file():
        text = page.read_text(encoding="utf-8")
    page.write_text(filled(text, seeds, blocks, page.name), encoding="utf-8")
    print(page)


def read(folder: Path, stem: str) -> list[Seed]:
    """Return the seeds of a folder, whose files begin with `stem`.

    Raises:
        SourceError: fewer than two, or seeds that were made with different --limit.
    """
    seeds = sorted(
        (Seed.read(path) for path in folder.glob(f"{stem}-*.json")), key=lambda seed: seed.seed
    )
    if len(seeds) < 2:
        raise SourceError(
            f"{folder}: {len(seeds)} seeds; intervals over seeds need two, "
            "`python -m evaluation.evidence` makes them"
        )
    if len({seed.content.limit for seed in seeds}) > 1:
        limits = ", ".join(f"{seed.path.name}: {seed.content.limit}" for seed in seeds)
        raise SourceError(f"{folder}: made with different --limit ({limits})")
    return seeds


def filled(page: str, seeds: Seeds, blocks: Mapping[str, Callable[[Seeds], str]], name: str) -> str:
    """Return the page with every block replaced by what the seeds say now.

    Raises:
        SourceError: the page lacks a block, or has one that nothing fills.
    """
    if unknown := {found for _, found, _ in BLOCK.findall(page)} ^ blocks.keys():
        raise SourceError(f"{name}: blocks missing or unknown: {', '.join(sorted(unknown))}")
    return BLOCK.sub(lambda block: f"{block[1]}{blocks[block[2]](seeds)}\n{block[3]}", page)


def claims_table(found: Sequence[Claim]) -> str:
    """Return a table of claims, a row for each number."""
    rows = []
    for claim in found:
        heads = [(f"{claim.text} ({claim.source})", f"**{claim.verdict}**")]
        heads += [("", "")] * (len(claim.measurements) - 1)
        for (head, verdict), measurement in zip(heads, claim.measurements, strict=True):
            shown = [measurement.label, measurement.text(), measurement.verdict or ""]
            rows.append([head, *shown, verdict])
    return table(
        ["claim (source)", "measured", "mean [95 % interval]", "of this number", "claim"], rows
    )


def mean_score(seeds: Sequence[Seed], suite: str, model: str, task: str) -> str:
    """Return a model's accuracy in one task in per cent, mean over seeds with standard error."""
    group = seeds[0].content.suites[suite].tasks[task].group
    values = [float(seed.outcomes(suite, model, group)[task].mean()) for seed in seeds]
    return with_error(statistics.over_runs(values, 0.0)[0])


def scores(seeds: Sequence[Seed], suite: str, shown: dict[str, str], reference: str | None) -> str:
    """Return a table of models with their scores, and differences from `reference`."""
    header = ["model", "ID, %", "OOD, %"] + (
        ["ID − fine-tuned", "OOD − fine-tuned"] if reference else []
    )
    rows = []
    for model, title in shown.items():
        row = [title]
        for group in GROUPS:
            values = [seed.score(suite, model, group) for seed in seeds]
            row.append(with_error(statistics.over_runs(values, 0.0)[0]))
        if reference:
            for group in GROUPS:
                gain = effect(seeds, suite, model, reference, group)
                row.append(
                    "" if model == reference else with_interval(gain.mean, gain.low, gain.high)
                )
        rows.append(row)
    return table(header, rows)


def energies(seeds: Sequence[Seed], *subjects: Subject) -> str:
    """Return a table of the threshold R: differences from fine-tuned, and from the scalar."""
    rows = []
    for s in subjects:
        for energy in s.energies:
            row = [s.title] * (len(subjects) > 1) + [f"{energy:g}"]
            for reference in (s.tuned, s.named(f"scalar_R{energy:g}")):
                for group in GROUPS:
                    soup = s.named(f"monosoup_R{energy:g}")
                    gain = effect(seeds, s.suite, soup, reference, group)
                    row.append(with_interval(gain.mean, gain.low, gain.high))
            rows.append(row)
    header = ["R", "ID − fine-tuned", "OOD − fine-tuned", "ID − its scalar", "OOD − its scalar"]
    return table([""] * (len(subjects) > 1) + header, rows)


def limited(seeds: Sequence[Seed]) -> str:
    """Return a remark if not all items were asked."""
    return " (--limit: a quick look)" if seeds[0].content.limit else ""


def _setting(seeds: Sequence[Seed]) -> str:
    tiny = seeds[0].content.suites[SUITE]
    items = sum(len(task.clusters) for task in tiny.tasks.values())
    models = sum(len(seeds[0].models(suite)) for suite in (SUITE, TWO_TASKS))
    curves = ", ".join(f"{name} ({len(points)} points)" for name, points in SUMS.curves.items())
    packages = ("lm-eval", "mergekit", "torch", "transformers", "python")
    versions = ", ".join(f"{name} {tiny.versions[name]}" for name in packages)
    numbers = ", ".join(str(seed.seed) for seed in seeds)
    return (
        f"{len(seeds)} seeds ({numbers}), {models} models each, {items} items per model of "
        f"the suite `{SUITE}`{limited(seeds)}; curves: {curves}; {versions}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)
    )


PAGE = Page(
    "evidence.md",
    "seed",
    {
        "setting": _setting,
        "claims": lambda seeds: claims_table(claims(seeds, SUMS)),
        "scores": lambda seeds: scores(seeds, SUITE, SHOWN, "finetuned"),
        "energies": lambda seeds: energies(seeds, SUMS),
        "ablations": lambda seeds: scores(seeds, SUITE, ABLATED, "finetuned"),
        "two": lambda seeds: scores(seeds, TWO_TASKS, TWO, None),
    },
    {
        "plane": lambda seeds: panels.plane(seeds, SUMS),
        "effects": panels.effects,
        "energy": panels.energy,
        "cka": panels.similarities,
    },
)
