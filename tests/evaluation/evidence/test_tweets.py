"""A seed of tweets, from training to JSON and tables, with a body and a corpus made up here."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers import bert
from helpers.evidence import coins, models_of_tweets
from mergekit.config import MergeConfiguration
from transformers import BertModel

from evaluation.evidence import collect, tweets, tweets_page
from evaluation.formatting import with_interval
from evaluation.worlds.tweets import LABELS, TOPICS, TUNED_TOPIC, Tweet, World

WORDS = [*LABELS, "about", *TOPICS]


def test_what_tables_name_is_made_and_counted():
    shown = {*tweets_page.SHOWN, *tweets_page.ABLATED, *tweets_page.ASKED, *tweets.COMPARED}
    assert shown <= models_of_tweets()
    assert tweets.model_count() == len(models_of_tweets())


def test_every_merge_is_one_that_mergekit_reads():
    for _, config in tweets.merges(Path("folder")):
        MergeConfiguration.model_validate(config)


@pytest.mark.slow
def test_the_page_of_made_answers(tmp_path):
    groups = ("ID", "OOD")
    for seed in (0, 1, 2):
        made = coins(
            seed,
            {tweets.SUITE: models_of_tweets()},
            tweets.SUITE,
            records=tweets.RECIPES,
            cka=groups,
        )
        made.write(tmp_path / "evidence" / f"tweets-{seed}.json")
    tweets_page.PAGE.write(tmp_path)
    written = (tmp_path / tweets_page.PAGE.name).read_text()
    seeds = [collect.Seed.read(path) for path in sorted((tmp_path / "evidence").glob("*.json"))]
    gain = collect.effect(seeds, tweets.SUITE, "harsh_monosoup_free", "harsh", "OOD")
    assert f"| {with_interval(gain.mean, gain.low, gain.high)} |" in written
    pictures = {path.name for path in (tmp_path / "evidence").glob("*.png")}
    assert pictures == {"tweets.png", "tweets-energy.png", "tweets-cka.png"}


def texts(number: int) -> dict[str, list[Tweet]]:
    return {
        topic: [
            Tweet(" ".join([topic, *["about"] * again, label]), label)
            for label, again in itertools.product(LABELS, range(number))
        ]
        for topic in TOPICS
    }


@pytest.fixture
def hasty(monkeypatch, tmp_path):
    """A body of one block, an epoch on twelve texts, one merge of each kind."""
    body = tmp_path / "body"
    body.mkdir()
    BertModel(bert.config(WORDS)).save_pretrained(body)
    bert.tokenizer(body, WORDS).save_pretrained(body)
    world = World(texts(4)[TUNED_TOPIC], texts(3)["cars"], texts(2), {})
    monkeypatch.setattr(tweets.tweets, "build_world", lambda seed: world)
    monkeypatch.setattr(tweets, "make_pretrained", partial(tweets.make_pretrained, body=body))
    recipes = {
        name: replace(tweets.RECIPES[name], epochs=1, batch=4)
        for name in (tweets.FINETUNED, tweets.ZERO, tweets.LORA)
    }
    monkeypatch.setattr(tweets, "RECIPES", recipes)
    needed = {"monosoup_free", "split_mlp"}
    monkeypatch.setattr(tweets, "CONTROLLED", {"": tweets.FINETUNED})
    few = [merge for merge in tweets.merges(tmp_path / "tweets-0") if merge[0] in needed]
    monkeypatch.setattr(tweets, "merges", lambda folder: iter(few))
    monkeypatch.setattr(tweets, "COMPARED", (tweets.PRETRAINED, tweets.LORA))
    monkeypatch.setattr(tweets, "SETTINGS", {"free": {}})
    rounded = tweets.rounded
    monkeypatch.setattr(tweets, "rounded", lambda *pair: list(rounded(*pair))[:1])
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    yield
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before


@pytest.mark.slow
def test_a_seed_from_training_to_json_and_again(tmp_path, hasty, capsys):
    tweets.run_seed(0, tmp_path / "tweets-0", tmp_path / "evidence", limit=3)
    file = tmp_path / "evidence" / "tweets-0.json"
    first = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    capsys.readouterr()
    tweets.run_seed(0, tmp_path / "tweets-0", tmp_path / "evidence", limit=3)
    printed = capsys.readouterr().out
    assert "loading" not in printed and "steps" not in printed
    assert {**json.loads(file.read_text()), "minutes": 0} == {**first, "minutes": 0}

    seed = collect.Seed.read(file)
    assert {"same_norm_free", "split_mlp", "lora", "bf16_monosoup_free"} <= set(
        seed.models(tweets.SUITE)
    )
    assert seed.content.cka["OOD"]["pretrained"] == pytest.approx([1, 1])
    assert seed.content.trained["lora"]["rank"] == 8
    heads = [r for r in seed.content.records["zero"] if r.name == "classifier.weight"]
    assert heads and all(record.rel_update is None for record in heads)  # W0 is zero there
    assert not (tmp_path / "tweets-0" / "merged").exists()
