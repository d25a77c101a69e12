"""The world of tweets, on a corpus made up here, and training of a body made up here."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
import torch
import transformers
from helpers import bert

from evaluation.worlds import finished, tweets, tweets_training
from evaluation.worlds.tweets import LABELS, Tweet

MENTIONS = {
    "airlines": "@united",
    "football": "superbowl",
    "cars": "driverless",
    "apple": "aapl",
    "coachella": "coachella",
    "claritin": "claritin",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rows = [
        (label, f"{mention} text {number} {label}")
        for mention, label, number in itertools.product(MENTIONS.values(), LABELS, range(12))
    ]
    rows.append(("positive", "RT @somebody: @united text 0 negative http://t.co/x"))  # two labels
    rows.append(("neutral", "about nothing"))
    path = tmp_path_factory.mktemp("corpus") / "corpus.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentiment", "confidence", "text"])
        writer.writerows([label, "1", text] for label, text in rows)
    return path


def test_items_are_balanced_and_apart(corpus, monkeypatch):
    monkeypatch.setattr(tweets, "TEST_TUNED", 4)
    monkeypatch.setattr(tweets, "TEST_OTHER", 5)
    world = tweets.build_world(3, corpus)
    assert {topic: len(items) for topic, items in world.test.items()} == {
        topic: 12 if topic == "airlines" else 15 for topic in MENTIONS
    }
    for topic, items in world.test.items():
        assert all(MENTIONS[topic] in item.text for item in items)
        assert len({sum(item.label == label for item in items) for label in LABELS}) == 1
    others = {item.text for item in world.others}
    assert len(others) == 5 * 3 * 7 and not any(MENTIONS["airlines"] in text for text in others)
    assert not others & {item.text for items in world.test.values() for item in items}
    texts = {item.text for item in world.train}
    assert not texts & {item.text for item in world.test["airlines"]}
    # The tweet that came with two labels is in neither.
    assert len(texts) == 3 * 8 - 1
    assert "@united text 0 negative" not in texts
    assert world.shares["cars"] == dict.fromkeys(LABELS, 1 / 3)
    assert tweets.build_world(3, corpus) == world != tweets.build_world(4, corpus)


def test_texts_are_written_as_the_engine_reads_them(corpus, tmp_path):
    from evaluation.engines.text_classifier import read_items

    world = tweets.build_world(0, corpus)
    tweets.write_texts(world, tmp_path)
    read = read_items(tmp_path / "cars.jsonl")
    assert [(item.text, item.label) for item in read] == [
        (item.text, item.label) for item in world.test["cars"]
    ]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    folder = tmp_path_factory.mktemp("body")
    words = [*LABELS, "flight", "late", "the"]
    tokenizer = bert.tokenizer(folder, words)
    torch.manual_seed(0)
    # A body whose features differ from text to text.
    config = bert.config(words, initializer_range=1.0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shares_right(folder, items):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer([item.text for item in items], padding=True, return_tensors="pt")
    with torch.inference_mode():
        best = model(**inputs).logits.argmax(-1).tolist()
    names = [model.config.id2label[number] for number in best]
    return sum(n == item.label for n, item in zip(names, items, strict=True)) / len(items)


def test_a_probe_is_learned_and_a_zero_head_is_not(body, tmp_path):
    items = [Tweet(f"the flight {label} late {label}", label) for label in LABELS] * 8
    assert tweets_training.make_pretrained(items, tmp_path / "probe", body=body)
    assert not tweets_training.make_pretrained(items, tmp_path / "probe", body=body)
    assert shares_right(tmp_path / "probe", items) == 1
    tweets_training.make_pretrained(items, tmp_path / "zero", "zero", body=body)
    zero = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "zero")
    assert not zero.classifier.weight.any()


@pytest.mark.parametrize("rank", [None, 2])
def test_a_fine_tune_moves_the_body_and_is_made_once(body, tmp_path, rank):
    items = [Tweet(f"the flight {label}", label) for label in LABELS] * 8
    base, target = tmp_path / "base", tmp_path / "tuned"
    tweets_training.make_pretrained(items, base, "zero", body=body)
    recipe = tweets_training.Recipe(learning_rate=1e-2, epochs=1, batch=8, rank=rank)
    assert tweets_training.fine_tune(base, target, items, recipe, seed=0)
    assert not tweets_training.fine_tune(base, target, items, recipe, seed=0)
    states = [
        transformers.AutoModelForSequenceClassification.from_pretrained(f).state_dict()
        for f in (base, target)
    ]
    assert states[0].keys() == states[1].keys()
    moved = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(states[0][moved], states[1][moved])
    written = json.loads((target / finished.RECIPE_FILE).read_text(encoding="utf-8"))
    assert written["recipe"]["recipe"]["rank"] == rank
