"""Items of the world of sums, and its tokenizer."""

from __future__ import annotations

import re

from helpers.tiny import WORLD

from evaluation.worlds.sums import (
    FACTS,
    NAMES,
    OTHER_SKILLS,
    SKILLS,
    SUMS,
    TEST_PAIRS,
    TUNED_SKILL,
    build_world,
    italian,
)
from evaluation.worlds.training import Recipe


def test_no_pair_of_numbers_is_both_trained_and_tested_in_any_order_or_language():
    for skills in (tuple(SUMS), ("larger",)):
        trained = {item.cluster for skill in skills for item in WORLD.train[skill]}
        tested = {item.cluster for skill in skills for item in WORLD.test[skill]}
        assert trained and len(tested) == TEST_PAIRS
        assert not trained & tested


def test_the_second_task_is_the_first_in_words_that_no_skill_uses():
    items = italian(WORLD.test[TUNED_SKILL])
    assert [item.answer for item in items] == [item.answer for item in WORLD.test[TUNED_SKILL]]
    assert {re.sub(r"\d+", "", item.prompt) for item in items} == {"Quanto fa  più ?"}


def test_a_cluster_is_the_unordered_pair():
    numbers = {}
    for item in WORLD.train["sum_en"] + WORLD.test["sum_en"]:
        a, b = item.prompt.removeprefix("What is ").removesuffix("?").split(" plus ")
        assert item.answer == str(int(a) + int(b))
        numbers.setdefault(item.cluster, set()).add(frozenset((a, b)))
    assert all(len(pairs) == 1 for pairs in numbers.values())
    assert len(numbers) == 50 * 51 // 2  # every pair is somewhere


def test_id_and_ood_are_disjoint_and_make_up_the_world():
    assert TUNED_SKILL not in OTHER_SKILLS
    assert {TUNED_SKILL, *OTHER_SKILLS} == set(SKILLS) == set(WORLD.test) == set(WORLD.train)
    prompts = [{item.prompt for item in WORLD.test[skill]} for skill in SKILLS]
    assert len(set().union(*prompts)) == sum(len(WORLD.test[skill]) for skill in SKILLS)
    assert set(Recipe().pretraining.skills) == set(OTHER_SKILLS)
    assert Recipe().finetuning.skills == (TUNED_SKILL,)


def test_facts_are_one_per_name_and_tested_as_trained():
    for skill, (_, answers) in FACTS.items():
        assert len({item.cluster for item in WORLD.test[skill]}) == len(WORLD.test[skill]) == NAMES
        assert WORLD.test[skill] == WORLD.train[skill]
        assert {item.answer for item in WORLD.test[skill]} <= set(answers)


def test_a_seed_is_a_world():
    assert build_world(0) == WORLD
    assert build_world(1).test["sum_en"] != WORLD.test["sum_en"]
    assert build_world(1).test["colour"] != WORLD.test["colour"]


def test_round_trip(tokenizer):
    for skill in SKILLS:
        for item in WORLD.test[skill][::25]:
            text = f"{item.prompt} {item.answer}"
            assert tokenizer.decode(tokenizer.encode(text)) == text
    unseen = "Ünseen — 東京 🙂"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_each_digit_is_a_token(tokenizer):
    for token in tokenizer.get_vocab():
        assert not any(character.isdigit() for character in token) or len(token) == 1, token
    tokens = tokenizer.tokenize("What is 12 plus 345?")
    assert [token for token in tokens if token.isdigit()] == list("12345")
