"""The page of all worlds: those of the repository, and tweets that were answered by coins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.evidence import coins, models_of_tweets

from evaluation.evidence import claims, collect, tweets, worlds_page
from evaluation.evidence.subjects import COLUMNS, EVERY

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.slow
def test_every_fine_tune_has_a_row_and_every_world_a_column(tmp_path):
    results = tmp_path / "evidence"
    results.mkdir()
    for stem in ("seed", "digits"):
        for seed in (0, 1):
            shutil.copy(DOCS / "evidence" / f"{stem}-{seed}.json", results)
    for seed in (0, 1):
        made = coins(
            seed,
            {tweets.SUITE: models_of_tweets()},
            tweets.SUITE,
            records=tweets.RECIPES,
            cka=("ID", "OOD"),
        )
        made.write(results / f"tweets-{seed}.json")
    worlds_page.write(tmp_path)
    text = (tmp_path / worlds_page.PAGE).read_text(encoding="utf-8")
    assert all(f"\n| {subject.name} | freevariance |" in text for subject in EVERY)
    assert f"| claim | {' | '.join(subject.name for subject in COLUMNS)} |" in text
    digits = "\n| SVC improves the merge of two tasks | "
    assert (results / "worlds.png").stat().st_size > 10_000
    assert text.split(digits)[1].split("\n")[0].count("|  ") == len(COLUMNS) - 1  # not tried there


def test_a_cell_counts_what_the_numbers_of_a_claim_say():
    effect = collect.Effect((), 0.0, 0.0, 0.0)

    def claim(*verdicts: str | None) -> claims.Claim:
        return claims.Claim("", "", tuple(claims.Measurement("", effect, v) for v in verdicts))

    assert worlds_page._verdict(None) == ""
    assert worlds_page._verdict(claim(claims.HOLDS, None, claims.HOLDS)) == "**holds**"
    mixed = claim(claims.HOLDS, claims.UNDECIDED, claims.HOLDS)
    assert worlds_page._verdict(mixed) == "holds 2/3, undecided 1/3"
