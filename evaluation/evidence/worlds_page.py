"""Generated parts of docs/evidence-worlds.md: what holds in which world, from all seeds' files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation import statistics
from evaluation.evidence import page, panels, prediction
from evaluation.evidence.claims import CONTRADICTED, HOLDS, UNDECIDED, Claim
from evaluation.evidence.collect import GROUPS, Seed, effect
from evaluation.evidence.paper import CLAIMS, MODES, claims
from evaluation.evidence.subjects import COLUMNS, EVERY
from evaluation.formatting import with_error, with_interval
from evaluation.suite import GroupName

PAGE = "evidence-worlds.md"
Worlds = Mapping[str, Sequence[Seed]]
"""Seeds by what their files begin with."""

WORDS = {HOLDS: "holds", CONTRADICTED: "contradicted", UNDECIDED: "undecided"}


def write(docs: Path) -> None:
    """Fill the blocks of docs/evidence-worlds.md, and draw its figure.

    Raises:
        SourceError: a world has fewer than two seeds, a page without blocks.
    """
    worlds = read(docs / "evidence")
    page.fill(docs / PAGE, worlds, BLOCKS)
    for path in panels.save(FIGURES, worlds, docs / "evidence"):
        print(path)


def read(folder: Path) -> Worlds:
    """Return the seeds of all worlds."""
    return {stem: page.read(folder, stem) for stem in dict.fromkeys(s.stem for s in EVERY)}


def _claims(worlds: Worlds) -> str:
    """Return the table of claims and worlds: all verdicts of a claim in a cell."""
    found = [{claim.text: claim for claim in claims(worlds[s.stem], s)} for s in COLUMNS]
    rows = [
        [definition.text, *(_verdict(column.get(definition.text)) for column in found)]
        for definition in CLAIMS
    ]
    return page.table(["claim", *(s.name for s in COLUMNS)], rows)


def _verdict(claim: Claim | None) -> str:
    if claim is None:
        return ""
    counts = Counter(m.verdict for m in claim.measurements if m.verdict)
    total = sum(counts.values())
    said = [(word, counts[verdict]) for verdict, word in WORDS.items() if counts[verdict]]
    if len(said) == 1:
        return f"**{said[0][0]}**"
    return ", ".join(f"{word} {count}/{total}" for word, count in said)


def _fine_tunes(worlds: Worlds) -> str:
    """Return what fine-tuning did, and what the edit did, for every fine-tune of every world."""
    rows = []
    for s in EVERY:
        seeds = worlds[s.stem]
        for mode, x in MODES.items():
            soup = s.named(f"monosoup_{x}")
            row = [s.name if x == "free" else "", mode]
            tuning = [effect(seeds, s.suite, s.tuned, s.base, group) for group in GROUPS]
            row += [with_interval(t.mean, t.low, t.high) if x == "free" else "" for t in tuning]
            compared: list[tuple[GroupName, str]] = [
                ("ID", s.tuned),
                ("OOD", s.tuned),
                ("OOD", s.named(f"scalar_{x}")),
            ]
            for group, reference in compared:
                change = effect(seeds, s.suite, soup, reference, group)
                row.append(with_interval(change.mean, change.low, change.high))
            rows.append(row)
    header = ["fine-tune", "mode", "fine-tuning: ID", "OOD", "the edit: ID", "OOD",
              "OOD beyond its scalar"]  # fmt: skip
    return page.table(header, rows)


def _scores(worlds: Worlds) -> str:
    """Return the scores of pretrained and fine-tuned models."""
    rows = []
    for s in EVERY:
        row = [s.name, str(len(worlds[s.stem]))]
        for model in (s.base, s.tuned):
            for group in GROUPS:
                values = [seed.score(s.suite, model, group) for seed in worlds[s.stem]]
                row.append(with_error(statistics.over_runs(values, 0.0)[0]))
        rows.append(row)
    return page.table(
        ["fine-tune", "seeds", "pretrained: ID, %", "OOD, %", "fine-tuned: ID, %", "OOD, %"], rows
    )


def _split(worlds: Worlds) -> str:
    """Return what the split changes beside the scalar of the same norm, by R."""
    swept = [s for s in COLUMNS if s.energies]
    shared = [e for e in swept[0].energies if all(e in s.energies for s in swept)]
    rows = []
    for s in swept:
        for group in GROUPS:
            row = [f"{s.name}, {group}"]
            for e in shared:
                soup, scalar = (s.named(f"{kind}_R{e:g}") for kind in ("monosoup", "scalar"))
                change = effect(worlds[s.stem], s.suite, soup, scalar, group)
                row.append(with_interval(change.mean, change.low, change.high))
            rows.append(row)
    return page.table(["MonoSoup − its scalar", *(f"R = {e:g}" for e in shared)], rows)


BLOCKS = {
    "worlds": _claims,
    "tunes": _fine_tunes,
    "levels": _scores,
    "prediction": lambda worlds: prediction.table(prediction.cases(worlds)),
    "split": _split,
    "rule": lambda worlds: prediction.rule(prediction.cases(worlds)),
}
FIGURES = {"worlds": lambda worlds: prediction.figure(prediction.cases(worlds))}
