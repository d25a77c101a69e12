"""docs/evidence*.md say what docs/evidence/*.json say, and nothing else."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation.evidence import digits_page, page, tweets_page, worlds_page
from evaluation.sources import SourceError

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("made", [page.PAGE, digits_page.PAGE, tweets_page.PAGE])
def test_the_page_is_what_the_seeds_give(made):
    seeds = page.read(DOCS / "evidence", made.stem)
    text = (DOCS / made.name).read_text(encoding="utf-8")
    assert len(seeds) >= 5
    filled = page.filled(text, seeds, made.blocks, made.name)
    assert filled == text, "run `python -m evaluation.evidence --tables`"


def test_the_page_of_all_worlds_is_what_their_seeds_give():
    text = (DOCS / worlds_page.PAGE).read_text(encoding="utf-8")
    worlds = worlds_page.read(DOCS / "evidence")
    filled = page.filled(text, worlds, worlds_page.BLOCKS, worlds_page.PAGE)
    assert filled == text, "run `python -m evaluation.evidence --tables`"


def test_intervals_and_scores_of_the_page_by_another_route():
    """freevariance − fine-tuned, OOD, from the raw bits.

    No function of the package is between file and number.
    """

    gains = []
    for path in sorted((DOCS / "evidence").glob("seed-*.json")):
        tiny = json.loads(path.read_text(encoding="utf-8"))["suites"]["tiny"]
        accuracy = {}
        for model in ("monosoup_free", "finetuned"):
            means = []
            for task, about in tiny["tasks"].items():
                if about["group"] == "OOD":
                    packed = base64.b64decode(tiny["models"][model]["right"][task])
                    bits = "".join(f"{byte:08b}" for byte in packed)[: len(about["clusters"])]
                    means.append(bits.count("1") / len(bits))
            accuracy[model] = np.mean(means)
        gains.append(100 * (accuracy["monosoup_free"] - accuracy["finetuned"]))
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    expected = f"{np.mean(gains):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]".replace(
        "-", "−"
    )
    text = (DOCS / page.PAGE.name).read_text(encoding="utf-8")
    assert f"| freevariance − fine-tuned, OOD | {expected} |" in text


def test_a_page_with_a_missing_block_is_refused():
    with pytest.raises(SourceError, match="claims"):
        page.filled("<!-- generated: setting -->\n<!-- end -->", [], page.PAGE.blocks, "page")


def test_one_seed_is_too_few(tmp_path):
    with pytest.raises(SourceError, match="two"):
        page.read(tmp_path, "seed")
