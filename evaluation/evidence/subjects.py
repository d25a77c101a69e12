"""The fine-tunes that claims are made about: what their merges are called, and which there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from evaluation.evidence import digits, models, tweets
from evaluation.evidence.models import FINETUNED, LORA, PRETRAINED, SECOND

Part = Literal[
    "same norm", "Wise-FT", "LiNeS", "MonoSoup + Wise-FT", "R", "truncation", "ablations",
    "average", "LoRA", "features", "bfloat16", "two tasks",
]  # fmt: skip
"""Models that only some fine-tunes have, beside MonoSoup and its norm-matched scalar."""

ALL: tuple[Part, ...] = (
    "same norm", "Wise-FT", "LiNeS", "MonoSoup + Wise-FT", "R", "truncation", "ablations",
    "average", "LoRA", "features", "bfloat16",
)  # fmt: skip


def world_of(stem: str) -> str:
    """Return the name of the world whose seeds' files begin so."""
    return "sums" if stem == "seed" else stem


@dataclass(frozen=True)
class Pair:
    """Two fine-tunes of which one is thought the weaker.

    Attributes:
        label: names them.
        weaker, stronger: their names.
    """

    label: str
    weaker: str
    stronger: str


@dataclass(frozen=True)
class Subject:
    """A fine-tune of a world, with its merges.

    Attributes:
        title: tells it from others of its world.
        stem: the seeds' files begin with it.
        suite: of evaluation/suites, or the name that a seed's file gives a model's answers.
        tuned, base: the names of the fine-tune, and of what it started from.
        prefix: begins the names of its merges.
        parts: which models there are.
        energies, alphas: of the sweeps.
        records: what a seed's file calls the records of its matrices.
        sets: begins the names of sets of items of which features were compared.
        weaker: pairs of fine-tunes of its world.
    """

    title: str
    stem: str
    suite: str
    tuned: str = FINETUNED
    base: str = PRETRAINED
    prefix: str = ""
    parts: Sequence[Part] = ()
    energies: Sequence[float] = ()
    alphas: Sequence[float] = ()
    records: str = FINETUNED
    sets: str = ""
    weaker: Sequence[Pair] = ()
    curves: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        ends = {
            "Wise-FT": ("wise_ft", self.base, self.tuned),
            "LiNeS": ("lines", None, self.tuned),
            "MonoSoup + Wise-FT": ("monosoup_wise", self.base, self.named("monosoup_free")),
        }
        curves = {
            name: [m for m in (first, *self._along(stem), last) if m is not None]
            for name, (stem, first, last) in ends.items()
            if name in self.parts
        }
        object.__setattr__(self, "curves", curves)  # of a frozen one

    @property
    def world(self) -> str:
        """The name of its world."""
        return world_of(self.stem)

    @property
    def name(self) -> str:
        """World and title, where several worlds are shown."""
        return f"{self.world}, {self.title}"

    def named(self, merge: str) -> str:
        """Return what one of its merges is called."""
        return f"{self.prefix}{merge}"

    def _along(self, stem: str) -> list[str]:
        return [self.named(f"{stem}_{alpha:g}") for alpha in self.alphas]

    def of(self, tuned: str) -> str:
        """Return what the names of the merges of another fine-tune of its world begin with."""
        return "" if tuned == FINETUNED else f"{tuned}_"


SUMS = Subject(
    "Qwen3",
    "seed",
    models.SUITE,
    parts=(*ALL, "two tasks"),
    energies=models.ENERGIES,
    alphas=models.ALPHAS,
    weaker=(Pair("fine-tuned − of the gentler fine-tune", FINETUNED, SECOND),),
)
SUMS_OTHERS = tuple(
    Subject(title, "seed", models.SUITE, name, prefix=f"{name}_", records=name)
    for name, title in {SECOND: "gentler", LORA: "LoRA"}.items()
)
DIGITS = tuple(
    Subject(
        title,
        "digits",
        name,
        parts=("same norm", "Wise-FT", "R", "truncation", "features"),
        energies=digits.ENERGIES,
        alphas=digits.ALPHAS,
        records=name,
        sets=f"{name} ",
    )
    for name, title in digits.ARCHITECTURES.items()
)
TWEETS = Subject(
    "usual",
    "tweets",
    tweets.SUITE,
    parts=ALL,
    energies=tweets.ENERGIES,
    alphas=tweets.ALPHAS,
    weaker=(
        Pair("the harsh fine-tune − of the usual", tweets.HARSH, FINETUNED),
        Pair("the usual fine-tune − of the gentle", FINETUNED, SECOND),
    ),
)
TWEETS_OTHERS = tuple(
    Subject(
        title,
        "tweets",
        tweets.SUITE,
        name,
        tweets.base_of(name),
        prefix=f"{name}_",
        parts=("same norm",) if f"{name}_" in tweets.CONTROLLED else (),
        records=name,
    )
    for name, title in {
        tweets.WIDE: "wide base",
        tweets.WIDE_HARSH: "wide base, harsh",
        tweets.HARSH: "harsh",
        SECOND: "gentle",
        tweets.ZERO: "zero head",
        LORA: "LoRA",
    }.items()
)
TWEETS_WIDE = TWEETS_OTHERS[0]
COLUMNS = (SUMS, *DIGITS, TWEETS, TWEETS_WIDE)
"""Those of the table of claims."""

EVERY = (SUMS, *SUMS_OTHERS, *DIGITS, TWEETS, *TWEETS_OTHERS)
