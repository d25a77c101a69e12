"""Items of a world that is learned in two minutes: seven skills, prompts with one right answer.

Four skills ask for the sum of two numbers, each in its own language; one asks for the larger of two
numbers; two are facts about made-up names. Pairs of numbers are split into training and test pairs
*as sets*: if 7 + 12 is tested, then 12 + 7 is not trained either, and in none of the languages. A
fact cannot be deduced, so facts are tested on what was trained: they measure what the model still
remembers.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SUMS = {
    "sum_en": "What is {a} plus {b}?",
    "sum_fr": "Combien font {a} plus {b} ?",
    "sum_de": "Wie viel ist {a} und {b}?",
    "sum_es": "¿Cuánto es {a} más {b}?",
}
LARGER = "Larger of {a} or {b}:"
# fmt: off
COLOURS = (
    "red", "blue", "green", "yellow", "black", "white", "pink", "grey", "brown", "purple",
    "orange", "gold",
)
CITIES = (
    "Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito", "Accra", "Dublin",
    "Vienna", "Lagos",
)
# fmt: on
FACTS = {"colour": ("The colour of {name} is", COLOURS), "home": ("{name} lives in", CITIES)}
SKILLS = (*SUMS, "larger", *FACTS)

TUNED_SKILL = "sum_en"
"""The skill that fine-tuning teaches. Measured on it is "in distribution" (ID)."""

OTHER_SKILLS = tuple(skill for skill in SKILLS if skill != TUNED_SKILL)
"""What pretraining teaches and fine-tuning never shows: out of distribution (OOD)."""

OPERANDS = range(50)
TEST_PAIRS = 250  # unordered pairs per kind of question; each is tested in both orders
NAMES = 120
VOCABULARY = 512


@dataclass(frozen=True)
class Item:
    """One question with its answer.

    `cluster` names what it is about: items about the same pair or name are not independent.
    """

    skill: str
    prompt: str
    answer: str
    cluster: str


@dataclass(frozen=True)
class World:
    """Items to learn and items to test, by skill.

    `test` has both orders of TEST_PAIRS pairs for each arithmetic skill, NAMES items per fact.
    """

    train: dict[str, list[Item]]
    test: dict[str, list[Item]]


def build_world(seed: int) -> World:
    """Return the world of this seed: the pairs held out, the names, and what is true of them."""
    rng = random.Random(seed)
    train: dict[str, list[Item]] = {}
    test: dict[str, list[Item]] = {}

    seen, held_out = _split_pairs(itertools.combinations_with_replacement(OPERANDS, 2), rng)
    for skill, question in SUMS.items():
        train[skill], test[skill] = (
            [
                Item(skill, question.format(a=a, b=b), str(a + b), f"sum {min(a, b)} {max(a, b)}")
                for a, b in pairs
            ]
            for pairs in (seen, held_out)
        )

    seen, held_out = _split_pairs(itertools.combinations(OPERANDS, 2), rng)
    train["larger"], test["larger"] = (
        [
            Item(
                "larger", LARGER.format(a=a, b=b), str(max(a, b)), f"larger {min(a, b)} {max(a, b)}"
            )
            for a, b in pairs
        ]
        for pairs in (seen, held_out)
    )

    names = _names(rng)
    for skill, (question, answers) in FACTS.items():
        facts = [
            Item(skill, question.format(name=name), rng.choice(answers), f"name {name}")
            for name in names
        ]
        train[skill] = test[skill] = facts
    return World(train, test)


def italian(english: Iterable[Item]) -> list[Item]:
    """Return the items of `sum_en`, asked in Italian.

    An eighth skill, `sum_it`, which no pretraining teaches: for a second fine-tune.
    """
    return [
        Item(
            "sum_it",
            item.prompt.replace("What is", "Quanto fa").replace("plus", "più"),
            item.answer,
            item.cluster,
        )
        for item in english
    ]


def build_tokenizer(items: Iterable[Item]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned from the items.

    Every digit is its own token, so numbers share their parts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{item.prompt} {item.answer}" for item in items), trainer)
    # Left padding: generation continues from the last position of a row, which has to be the end
    # of its prompt.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _split_pairs(
    pairs: Iterable[tuple[int, int]], rng: random.Random
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split unordered pairs into (training, test) pairs, both orders of each.

    A mirrored sum in training would give the answer of its twin away.
    """
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    return _both_orders(shuffled[TEST_PAIRS:]), _both_orders(shuffled[:TEST_PAIRS])


def _both_orders(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({order for a, b in pairs for order in ((a, b), (b, a))})


def _names(rng: random.Random) -> list[str]:
    """Return three-syllable names such as "Bakilo", all different."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: set[str] = set()
    while len(names) < NAMES:
        names.add("".join(rng.choices(syllables, k=3)).capitalize())
    return sorted(names)  # a set's order changes from process to process
