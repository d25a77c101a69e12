"""What the paper claims, as numbers of a fine-tune and its merges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from evaluation.evidence.claims import (
    Claim,
    Judge,
    Quantity,
    always,
    at_most,
    kept,
    less,
    more,
)
from evaluation.evidence.collect import GROUPS, MatrixRecord, Seed
from evaluation.evidence.models import TWO_TASKS
from evaluation.evidence.subjects import Part, Subject
from evaluation.suite import GroupName

MODES = {"freevariance": "free", "variance": "R0.8"}
RULES = {
    "rho": "ρ alone",
    "cos": "cos α alone",
    "uniform": "one half of both parts",
    "high": "high alone",
}


def claims(seeds: Sequence[Seed], *subjects: Subject) -> list[Claim]:
    """Return what the seeds say to all claims, in the order of the paper's argument.

    Claims about models that none of these fine-tunes has are left out. Where there are several
    fine-tunes, every label says of which it is.
    """
    found = []
    for definition in CLAIMS:
        quantities = [
            replace(quantity, label=f"{subject.title}: {quantity.label}")
            if len(subjects) > 1
            else quantity
            for subject in subjects
            if set(definition.needs) <= set(subject.parts)
            for quantity in definition.quantities(subject)
        ]
        if quantities:
            measured = tuple(quantity.measure(seeds) for quantity in quantities)
            found.append(Claim(definition.text, definition.source, measured))
    return found


class Definition(NamedTuple):
    """A claim, where the paper makes it, the models that it needs, and what is measured."""

    text: str
    source: str
    quantities: Callable[[Subject], Iterable[Quantity]]
    needs: tuple[Part, ...] = ()


# -- numbers of a seed -----------------------------------------------------------------------------


def gain(
    s: Subject,
    label: str,
    model: str,
    reference: str,
    group: GroupName,
    judge: Judge | None,
    suite: str | None = None,
) -> Quantity:
    """Return the difference between two models in one group."""
    suite = suite or s.suite

    def difference(seed: Seed) -> float:
        return seed.score(suite, model, group) - seed.score(suite, reference, group)

    return Quantity(f"{label}, {group}", difference, judge)


def both(
    s: Subject,
    label: str,
    model: str,
    reference: str,
    id_: Judge | None,
    ood: Judge | None,
    suite: str | None = None,
) -> Iterator[Quantity]:
    """Yield the differences between two models in both groups."""
    yield gain(s, label, model, reference, "ID", id_, suite)
    yield gain(s, label, model, reference, "OOD", ood, suite)


def scores(seed: Seed, suite: str, models: Iterable[str]) -> list[tuple[float, float]]:
    """Return (ID, OOD) of models."""
    return [(seed.score(suite, model, "ID"), seed.score(suite, model, "OOD")) for model in models]


def over_best(seed: Seed, suite: str, model: str, others: Iterable[str]) -> float:
    """Return OOD of a model minus the best OOD among others with no less ID.

    That one is chosen with hindsight.
    """
    [(id_, ood)] = scores(seed, suite, [model])
    return ood - max((y for x, y in scores(seed, suite, others) if x >= id_), default=0.0)


def wider_front(seed: Seed, s: Subject, curve: str) -> float:
    """Return the area under the front of MonoSoup + Wise-FT minus that of another curve."""
    own, other = (front(scores(seed, s.suite, s.curves[c])) for c in ("MonoSoup + Wise-FT", curve))
    return own - other


def front(models: Iterable[tuple[float, float]]) -> float:
    """Return the area of the unit square below and to the left of some (ID, OOD) point."""
    area, reached = 0.0, 0.0
    for x, y in sorted(models, reverse=True):
        area, reached = area + x * max(y - reached, 0.0), max(reached, y)
    return area


def excess_energy(seed: Seed, s: Subject) -> float:
    """Return R with the best mean of ID and OOD, minus 0.8."""
    balance = {
        e: sum(seed.score(s.suite, s.named(f"monosoup_R{e:g}"), group) for group in GROUPS)
        for e in s.energies
    }
    return max(balance, key=lambda e: balance[e]) - 0.8


def extra_lift(seed: Seed, s: Subject, tuned: str, other: str, setting: str) -> float:
    """Return the OOD gain of MonoSoup on one fine-tune minus that on another."""

    def lift(model: str) -> float:
        soup = f"{s.of(model)}monosoup_{setting}"
        return seed.score(s.suite, soup, "OOD") - seed.score(s.suite, model, "OOD")

    return lift(tuned) - lift(other)


def closer(seed: Seed, s: Subject, model: str, reference: str) -> float:
    """Return the difference of two models' CKA with the pretrained one: last block, OOD items."""
    values = [seed.content.cka[f"{s.sets}OOD"][name][-1] for name in (model, reference)]
    own, theirs = (float("nan") if value is None else value for value in values)
    return own - theirs


def dominant(seed: Seed, s: Subject, mode: str) -> float:
    """Return the share of edited matrices with λ_high above λ_low."""
    pairs = [(record.lambda_high, record.lambda_low) for record in edited(seed, s, mode)]
    return float(
        np.mean([high > low for high, low in pairs if high is not None and low is not None])
    )


def realised(seed: Seed, s: Subject, mode: str) -> float:
    """Return the share of the edit that survives bfloat16, mean over edited matrices."""
    shares = [record.realised for record in edited(seed, s, mode)]
    return float(np.mean([share for share in shares if share is not None]))


def edited(seed: Seed, s: Subject, mode: str) -> list[MatrixRecord]:
    """Return the records of the matrices that a mode edits."""
    records = seed.content.records[s.records]
    return [r for r in records if r.mode == mode and r.lambda_high is not None]


# -- what is measured for each claim ---------------------------------------------------------------


def _gains(s: Subject, group: GroupName, judge: Judge) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        yield gain(s, f"{mode} − fine-tuned", s.named(f"monosoup_{x}"), s.tuned, group, judge)


def _beyond_shrinkage(s: Subject) -> Iterator[Quantity]:
    controls = {"scalar": "its norm-matched scalar"}
    if "same norm" in s.parts:
        controls["same_norm"] = "Wise-FT of its norm"
    for mode, x in MODES.items():
        for control, name in controls.items():
            soup, reference = s.named(f"monosoup_{x}"), s.named(f"{control}_{x}")
            yield from both(s, f"{mode} − {name}", soup, reference, None, more)


def _over_curves(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        for curve in ("Wise-FT", "LiNeS"):
            if curve in s.curves:
                yield Quantity(
                    f"{mode} − the best {curve} of no less ID, OOD",
                    partial(
                        over_best,
                        suite=s.suite,
                        model=s.named(f"monosoup_{x}"),
                        others=s.curves[curve],
                    ),
                    kept,
                )


def _fronts(s: Subject) -> Iterator[Quantity]:
    for curve in ("Wise-FT", "LiNeS"):
        yield Quantity(
            f"area under the front, MonoSoup + Wise-FT − {curve}",
            partial(wider_front, s=s, curve=curve),
            more,
            in_points=False,
        )


def _nothing_to_choose(s: Subject) -> Iterator[Quantity]:
    free, fixed = s.named("monosoup_free"), s.named("monosoup_R0.8")
    yield from both(s, "freevariance − variance", free, fixed, kept, kept)


def _middle_energies(s: Subject) -> Iterator[Quantity]:
    half_a_step = (s.energies[1] - s.energies[0]) / 2  # more than 0.8 by that is no contradiction
    yield Quantity(
        "R of the best mean of ID and OOD, minus 0.8",
        partial(excess_energy, s=s),
        at_most(half_a_step),
        in_points=False,
    )


def _weaker_gain_more(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        for pair in s.weaker:
            yield _lift(s, f"{mode}: OOD gain of {pair.label}", pair.weaker, pair.stronger, x, more)


def _lift(s: Subject, label: str, tuned: str, other: str, x: str, judge: Judge) -> Quantity:
    return Quantity(label, partial(extra_lift, s=s, tuned=tuned, other=other, setting=x), judge)


def _truncated(s: Subject) -> Iterator[Quantity]:
    for share in (0.9, 0.95, 0.99):
        label = f"leading {share:.0%} alone − fine-tuned"
        yield from both(s, label, s.named(f"high_R{share:g}"), s.tuned, less, less)


def _rho(s: Subject) -> Iterator[Quantity]:
    rho = s.named("rho_R0.8")
    yield gain(s, "ρ alone − fine-tuned", rho, s.tuned, "ID", kept)
    yield gain(s, "ρ alone − both", rho, s.named("monosoup_R0.8"), "OOD", less)


def _cos(s: Subject) -> Iterator[Quantity]:
    cos = s.named("cos_R0.8")
    yield gain(s, "cos α alone − fine-tuned", cos, s.tuned, "OOD", more)
    yield gain(s, "cos α alone − fine-tuned", cos, s.tuned, "ID", less)


def _both_signals(s: Subject) -> Iterator[Quantity]:
    for rule, label in RULES.items():
        soup, other = s.named("monosoup_R0.8"), s.named(f"{rule}_R0.8")
        yield gain(s, f"both − {label}", soup, other, "OOD", more)


def _dominant(s: Subject) -> Iterator[Quantity]:
    for mode in MODES:
        yield Quantity(
            f"share of matrices with λ_high > λ_low, {mode}",
            partial(dominant, s=s, mode=mode),
            always,
            in_points=False,
        )


def _average(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        label, soup = f"{mode} of the average − ModelStock", f"average_monosoup_{x}"
        yield from both(s, label, soup, "model_stock", kept, more)


def _lora(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        yield gain(s, f"{mode} − LoRA fine-tune", f"lora_monosoup_{x}", "lora", "OOD", more)
    for mode, x in MODES.items():
        label = f"{mode}: OOD gain of LoRA − of full fine-tuning"
        yield _lift(s, label, "lora", s.tuned, x, less)


def _above_pretrained(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        yield gain(s, f"{mode} − pretrained", s.named(f"monosoup_{x}"), s.base, "OOD", more)


def _features(s: Subject) -> Iterator[Quantity]:
    def compared(label: str, model: str, reference: str, judge: Judge | None = more) -> Quantity:
        text = f"CKA of the last block, {label}"
        return Quantity(text, partial(closer, s=s, model=model, reference=reference), judge, False)

    for mode, x in MODES.items():
        yield compared(f"{mode} − fine-tuned", s.named(f"monosoup_{x}"), s.tuned)
    fixed = s.named("monosoup_R0.8")
    yield compared("low alone − variance", s.named("low_R0.8"), fixed)
    yield compared("variance − its norm-matched scalar", fixed, s.named("scalar_R0.8"), None)


def _bfloat16(s: Subject) -> Iterator[Quantity]:
    for mode, x in MODES.items():
        narrow, wide = f"bf16_monosoup_{x}", f"bf16_monosoup_{x}_float32"
        yield from both(s, f"{mode}, bfloat16 − float32 output", narrow, wide, kept, kept)
    yield Quantity(
        "share of a freevariance edit that survives bfloat16, mean over matrices",
        partial(realised, s=s, mode="freevariance"),
        None,
        in_points=False,
    )


def _svc(s: Subject) -> Iterator[Quantity]:
    for label, model, reference in (
        ("svc − average", "two_svc_average", "two_average"),
        ("svc with alpha = 1 − average", "two_svc_average_no_gain", "two_average"),
        ("svc − sum", "two_svc_sum", "two_sum"),
    ):
        yield from both(s, label, model, reference, more, more, TWO_TASKS)


# fmt: off
CLAIMS: list[Definition] = [
    Definition("Editing one checkpoint raises OOD accuracy",
               "abstract; Tables 1, 2", lambda s: _gains(s, "OOD", more)),
    Definition("… and keeps ID accuracy",
               "abstract; Tables 1, 2", lambda s: _gains(s, "ID", kept)),
    Definition("The gain is the spectral split's, not shrinkage (the paper has no such control)",
               "implied by §4, appendix J", _beyond_shrinkage),
    Definition("At equal ID it is at least as good as Wise-FT and LiNeS",
               "Tables 2, 3; Figure 5", _over_curves, ("Wise-FT",)),
    Definition("As the end of a Wise-FT curve it gives a better front",
               "§5.3, Figure 5", _fronts, ("Wise-FT", "LiNeS", "MonoSoup + Wise-FT")),
    Definition("Nothing has to be chosen: freevariance matches a fixed R",
               "appendix I, Table 5", _nothing_to_choose),
    Definition("Middle values of R, 0.6 to 0.8, balance best",
               "§5.4, appendix I", _middle_energies, ("R",)),
    Definition("Weaker checkpoints gain more",
               "Table 1, Figure 4", _weaker_gain_more),
    Definition("Cutting the tail off hurts, even at 95 % of the energy",
               "§4, Figure 3b, appendix D", _truncated, ("truncation",)),
    Definition("ρ alone keeps ID and brings little OOD",
               "§5.4, Figure 6", _rho, ("ablations",)),
    Definition("cos α alone lifts OOD and can cost ID",
               "§5.4, Figure 6", _cos, ("ablations",)),
    Definition("Both signals together are the best out of distribution",
               "§5.4, Figure 6", _both_signals, ("ablations",)),
    Definition("λ_high exceeds λ_low in every layer",
               "appendix J", _dominant),
    Definition("The edit of an average of two beats ModelStock",
               "Tables 1, 4", _average, ("average",)),
    Definition("On LoRA fine-tunes the gains shrink but stay",
               "appendix L, Table 8", _lora, ("LoRA",)),
    Definition("OOD accuracy ends above the pretrained model's",
               "appendix K, Table 6", _above_pretrained),
    Definition("On OOD inputs the edited features are closer to the pretrained ones",
               "appendix G, Figure 9", _features, ("features",)),
    Definition("Writing bfloat16 keeps what the edit gained (not the paper's)",
               "README", _bfloat16, ("bfloat16",)),
    Definition("SVC improves the merge of two tasks",
               "arXiv 2602.05536", _svc, ("two tasks",)),
]
# fmt: on
