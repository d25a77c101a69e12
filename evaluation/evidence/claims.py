"""What the paper claims, what these seeds say to it: from the seeds' JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.evidence.collect import GROUPS, Effect, MatrixRecord, Seed
from evaluation.evidence.models import ALPHAS, ENERGIES, SUITE, TWO_TASKS
from evaluation.formatting import points, with_interval
from evaluation.suite import GroupName

MARGIN = 0.01  # "keeps" a score: the whole interval lies above −1 point

HOLDS, CONTRADICTED, UNDECIDED = "holds here", "contradicted here", "undecided"


@dataclass(frozen=True)
class Measurement:
    """One number with its interval, and what it says of the claim that it stands under."""

    label: str
    effect: Effect
    verdict: str | None  # None: shown, not judged
    in_points: bool = True  # else as it is: CKA, shares, areas

    def text(self) -> str:
        """Return the number with its interval."""
        scale, digits = (100.0, 1) if self.in_points else (1.0, 3)
        if self.effect.flat:
            return f"{points(self.effect.mean, scale, digits)} in every seed"
        return with_interval(self.effect.mean, self.effect.low, self.effect.high, scale, digits)


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper makes it, and what was measured of it."""

    text: str
    source: str
    measurements: tuple[Measurement, ...]

    @property
    def verdict(self) -> str:
        """That of all measurements if they agree."""
        verdicts = {m.verdict for m in self.measurements if m.verdict}
        return verdicts.pop() if len(verdicts) == 1 else "mixed"


def more(effect: Effect) -> str:
    """Judge the claim that this is above zero."""
    return HOLDS if effect.low > 0 else CONTRADICTED if effect.high < 0 else UNDECIDED


def less(effect: Effect) -> str:
    """Judge the claim that this is below zero."""
    return {HOLDS: CONTRADICTED, CONTRADICTED: HOLDS}.get(more(effect), UNDECIDED)


def kept(effect: Effect) -> str:
    """Judge the claim that nothing is lost."""
    return HOLDS if effect.low > -MARGIN else CONTRADICTED if effect.high < 0 else UNDECIDED


def best(effect: Effect) -> str:
    """Judge the claim that R of the best balance is at most 0.8.

    Half a step of the sweep more is no contradiction.
    """
    return HOLDS if effect.high < 0.025 else CONTRADICTED if effect.low > 0.025 else UNDECIDED


def always(share: Effect) -> str:
    """Judge the claim that this share is one."""
    return HOLDS if share.mean == 1 else CONTRADICTED


Judge = Callable[[Effect], str]


def verdict(effect: Effect, judge: Judge | None) -> str | None:
    """Return a judge's verdict; None where nothing is claimed.

    Seeds that agree to the last digit give no interval, and say nothing of the next one.
    """
    if judge is None:
        return None
    return UNDECIDED if effect.flat and judge is not always else judge(effect)


@dataclass(frozen=True)
class Quantity:
    """Something that every seed has a number of, and what a claim says of it."""

    label: str
    value: Callable[[Seed], float]
    judge: Judge | None
    in_points: bool = True

    def measure(self, seeds: Sequence[Seed]) -> Measurement:
        """Return its mean over the seeds, with the verdict."""
        effect = Effect.of([self.value(seed) for seed in seeds])
        return Measurement(self.label, effect, verdict(effect, self.judge), self.in_points)


def gain(
    label: str,
    model: str,
    reference: str,
    group: GroupName,
    judge: Judge | None,
    suite: str = SUITE,
) -> Quantity:
    """Return the difference between two models in one group."""

    def difference(seed: Seed) -> float:
        return seed.score(suite, model, group) - seed.score(suite, reference, group)

    return Quantity(f"{label}, {group}", difference, judge)


def both(
    label: str,
    model: str,
    reference: str,
    id_: Judge | None,
    ood: Judge | None,
    suite: str = SUITE,
) -> Iterator[Quantity]:
    """Yield the differences between two models in both groups."""
    yield gain(label, model, reference, "ID", id_, suite)
    yield gain(label, model, reference, "OOD", ood, suite)


def number(
    label: str,
    judge: Judge | None,
    value: Callable[..., float],
    *arguments: str,
    in_points: bool = False,
) -> Quantity:
    """Return the quantity that `value` computes of a seed and the arguments."""
    return Quantity(label, lambda seed: value(seed, *arguments), judge, in_points)


def claims(seeds: Sequence[Seed]) -> list[Claim]:
    """Return all claims with what the seeds say, in the order of the paper's argument."""
    return [
        Claim(text, source, tuple(quantity.measure(seeds) for quantity in quantities))
        for text, source, quantities in CLAIMS
    ]


CURVES: dict[str, list[str]] = {
    "Wise-FT": ["pretrained", *(f"wise_ft_{a:g}" for a in ALPHAS), "finetuned"],
    "LiNeS": [*(f"lines_{a:g}" for a in ALPHAS), "finetuned"],
    "MonoSoup + Wise-FT": [
        "pretrained",
        *(f"monosoup_wise_{a:g}" for a in ALPHAS),
        "monosoup_free",
    ],
}


def _points(seed: Seed, models: Iterable[str], suite: str) -> list[tuple[float, float]]:
    return [(seed.score(suite, model, "ID"), seed.score(suite, model, "OOD")) for model in models]


def _curve(seed: Seed, curve: str) -> list[tuple[float, float]]:
    return _points(seed, CURVES[curve], SUITE)


def over_curve(seed: Seed, model: str, curve: str) -> float:
    """Return OOD of a model minus the best OOD that a curve reaches at no less ID.

    The number of the curve is chosen with hindsight.
    """
    return over_best(seed, model, CURVES[curve], SUITE)


def over_best(seed: Seed, model: str, others: Iterable[str], suite: str) -> float:
    """Return OOD of a model minus the best OOD among others with no less ID."""
    id_, ood = seed.score(suite, model, "ID"), seed.score(suite, model, "OOD")
    return ood - max((y for x, y in _points(seed, others, suite) if x >= id_), default=0.0)


def wider_front(seed: Seed, curve: str) -> float:
    """Return the area under the front of MonoSoup + Wise-FT minus that of another curve."""
    return front(_curve(seed, "MonoSoup + Wise-FT")) - front(_curve(seed, curve))


def front(models: Iterable[tuple[float, float]]) -> float:
    """Return the area of the unit square below and to the left of some (ID, OOD) point."""
    area, reached = 0.0, 0.0
    for x, y in sorted(models, reverse=True):
        area, reached = area + x * max(y - reached, 0.0), max(reached, y)
    return area


def excess_energy(seed: Seed) -> float:
    """Return R with the best mean of ID and OOD, minus 0.8."""
    balance = {
        e: sum(seed.score(SUITE, f"monosoup_R{e:g}", group) for group in GROUPS) for e in ENERGIES
    }
    return max(balance, key=lambda e: balance[e]) - 0.8


def extra_lift(seed: Seed, tuned: str, other: str, setting: str) -> float:
    """Return the OOD gain of MonoSoup on one fine-tune minus that on another."""

    def lift(model: str) -> float:
        prefix = "" if model == "finetuned" else f"{model}_"
        soup = f"{prefix}monosoup_{setting}"
        return seed.score(SUITE, soup, "OOD") - seed.score(SUITE, model, "OOD")

    return lift(tuned) - lift(other)


def closer(seed: Seed, model: str, reference: str, items: str = "OOD") -> float:
    """Return the difference of two models' CKA with the pretrained one: last block, OOD items."""
    values = [seed.content.cka[items][name][-1] for name in (model, reference)]
    own, theirs = (float("nan") if value is None else value for value in values)
    return own - theirs


def dominant(seed: Seed, mode: str, tuned: str = "finetuned") -> float:
    """Return the share of edited matrices with λ_high above λ_low."""
    pairs = [(record.lambda_high, record.lambda_low) for record in _edited(seed, mode, tuned)]
    return float(
        np.mean([high > low for high, low in pairs if high is not None and low is not None])
    )


def realised(seed: Seed, mode: str) -> float:
    """Return the share of the edit that survives bfloat16, mean over edited matrices."""
    return float(np.mean([record.realised for record in _edited(seed, mode)]))


def _edited(seed: Seed, mode: str, tuned: str = "finetuned") -> Iterable[MatrixRecord]:
    records = seed.content.records[tuned]
    return [r for r in records if r.mode == mode and r.lambda_high is not None]


MODES = {"freevariance": "free", "variance": "R0.8"}
CONTROLS = {"scalar": "its norm-matched scalar", "same_norm": "Wise-FT of its norm"}
# fmt: off
RULES = {
    "rho": "ρ alone", "cos": "cos α alone", "uniform": "one half of both parts",
    "high": "high alone",
}

CLAIMS: list[tuple[str, str, list[Quantity]]] = [
    ("Editing one checkpoint raises OOD accuracy",
     "abstract; Tables 1, 2",
     [gain(f"{mode} − fine-tuned", f"monosoup_{x}", "finetuned", "OOD", more)
      for mode, x in MODES.items()]),
    ("… and keeps ID accuracy",
     "abstract; Tables 1, 2",
     [gain(f"{mode} − fine-tuned", f"monosoup_{x}", "finetuned", "ID", kept)
      for mode, x in MODES.items()]),
    ("The gain is the spectral split's, not shrinkage (the paper has no such control)",
     "implied by §4, appendix J",
     [quantity
      for mode, x in MODES.items()
      for control, name in CONTROLS.items()
      for quantity in both(f"{mode} − {name}", f"monosoup_{x}", f"{control}_{x}", None, more)]),
    ("At equal ID it is at least as good as Wise-FT and LiNeS",
     "Tables 2, 3; Figure 5",
     [number(f"{mode} − the best {curve} of no less ID, OOD",
             kept, over_curve, f"monosoup_{x}", curve, in_points=True)
      for mode, x in MODES.items()
      for curve in ("Wise-FT", "LiNeS")]),
    ("As the end of a Wise-FT curve it gives a better front",
     "§5.3, Figure 5",
     [number(f"area under the front, MonoSoup + Wise-FT − {curve}", more, wider_front, curve)
      for curve in ("Wise-FT", "LiNeS")]),
    ("Nothing has to be chosen: freevariance matches a fixed R",
     "appendix I, Table 5",
     [*both("freevariance − variance", "monosoup_free", "monosoup_R0.8", kept, kept)]),
    ("Middle values of R, 0.6 to 0.8, balance best",
     "§5.4, appendix I",
     [number("R of the best mean of ID and OOD, minus 0.8", best, excess_energy)]),
    ("Weaker checkpoints gain more",
     "Table 1, Figure 4",
     [number(f"{mode}: OOD gain of fine-tuned − of the gentler fine-tune",
             more, extra_lift, "finetuned", "second", x, in_points=True)
      for mode, x in MODES.items()]),
    ("Cutting the tail off hurts, even at 95 % of the energy",
     "§4, Figure 3b, appendix D",
     [quantity
      for share in (0.9, 0.95, 0.99)
      for quantity in both(f"leading {share:.0%} alone − fine-tuned",
                           f"high_R{share:g}", "finetuned", less, less)]),
    ("ρ alone keeps ID and brings little OOD",
     "§5.4, Figure 6",
     [gain("ρ alone − fine-tuned", "rho_R0.8", "finetuned", "ID", kept),
      gain("ρ alone − both", "rho_R0.8", "monosoup_R0.8", "OOD", less)]),
    ("cos α alone lifts OOD and can cost ID",
     "§5.4, Figure 6",
     [gain("cos α alone − fine-tuned", "cos_R0.8", "finetuned", "OOD", more),
      gain("cos α alone − fine-tuned", "cos_R0.8", "finetuned", "ID", less)]),
    ("Both signals together are the best out of distribution",
     "§5.4, Figure 6",
     [gain(f"both − {label}", "monosoup_R0.8", f"{rule}_R0.8", "OOD", more)
      for rule, label in RULES.items()]),
    ("λ_high exceeds λ_low in every layer",
     "appendix J",
     [number(f"share of matrices with λ_high > λ_low, {mode}", always, dominant, mode)
      for mode in MODES]),
    ("The edit of an average of two beats ModelStock",
     "Tables 1, 4",
     [quantity
      for mode, x in MODES.items()
      for quantity in both(f"{mode} of the average − ModelStock",
                           f"average_monosoup_{x}", "model_stock", kept, more)]),
    ("On LoRA fine-tunes the gains shrink but stay",
     "appendix L, Table 8",
     [*(gain(f"{mode} − LoRA fine-tune", f"lora_monosoup_{x}", "lora", "OOD", more)
        for mode, x in MODES.items()),
      *(number(f"{mode}: OOD gain of LoRA − of full fine-tuning",
               less, extra_lift, "lora", "finetuned", x, in_points=True)
        for mode, x in MODES.items())]),
    ("OOD accuracy ends above the pretrained model's",
     "appendix K, Table 6",
     [gain(f"{mode} − pretrained", f"monosoup_{x}", "pretrained", "OOD", more)
      for mode, x in MODES.items()]),
    ("On OOD inputs the edited features are closer to the pretrained ones",
     "appendix G, Figure 9",
     [*(number(f"CKA of the last block, {mode} − fine-tuned",
               more, closer, f"monosoup_{x}", "finetuned")
        for mode, x in MODES.items()),
      number("CKA of the last block, low alone − variance",
             more, closer, "low_R0.8", "monosoup_R0.8"),
      number("CKA of the last block, variance − its norm-matched scalar",
             None, closer, "monosoup_R0.8", "scalar_R0.8")]),
    ("Writing bfloat16 keeps what the edit gained (not the paper's)",
     "README",
     [*(quantity
        for mode, x in MODES.items()
        for quantity in both(f"{mode}, bfloat16 − float32 output",
                             f"bf16_monosoup_{x}", f"bf16_monosoup_{x}_float32", kept, kept)),
      number("share of a freevariance edit that survives bfloat16, mean over matrices",
             None, realised, "freevariance")]),
    ("SVC improves the merge of two tasks",
     "arXiv 2602.05536",
     [*both("svc − average", "two_svc_average", "two_average", more, more, TWO_TASKS),
      *both("svc with alpha = 1 − average",
            "two_svc_average_no_gain", "two_average", more, more, TWO_TASKS),
      *both("svc − sum", "two_svc_sum", "two_sum", more, more, TWO_TASKS)]),
]
# fmt: on
