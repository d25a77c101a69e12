"""The table and the sentences follow the numbers."""

from __future__ import annotations

import io
import re

import numpy as np
from helpers.tiny import questions
from rich.console import Console

from demo import merge, summary
from evaluation.statistics import Values
from evaluation.worlds.sums import SKILLS, TUNED_SKILL

QUESTIONS = {
    skill: questions([f"{skill} {number}" for number in range(200)], skill) for skill in SKILLS
}


def grades(*right: tuple[int, int]) -> dict[str, Values]:
    """Return grades of each model with (ID, OOD) right answers of 200, the same in each.

    Pretrained, fine-tuned, then the soups in the order of `merge.SOUPS`.
    """

    def of(id_right: int, ood_right: int) -> Values:
        counts = {skill: id_right if skill == TUNED_SKILL else ood_right for skill in SKILLS}
        return {skill: np.repeat([1.0, 0.0], [n, 200 - n]) for skill, n in counts.items()}

    titles = [summary.PRETRAINED, summary.FINETUNED, *(soup.title for soup in merge.SOUPS)]
    return {title: of(*pair) for title, pair in zip(titles, right, strict=True)}


def test_sentences_follow_the_numbers():
    soups = [(160, 180), (180, 121), (180, 120), (181, 90), (181, 91)]
    sentences = summary.sentences(grades((20, 198), (180, 120), *soups), QUESTIONS)
    expected = [
        r"Fine-tuning took ID from 10.0 to 90.0 % and OOD from 99.0 to 60.0 %\.$",
        r"Against fine-tuned, Wise-FT 0.5: ID −10.0 \[.*\], lower; OOD \+30.0 \[.*\], higher\.$",
        r".*MonoSoup freevariance: ID unchanged on every item; OOD \+0.5 \[.*\], higher",
        r".*ID \+0.5 \[−.*\], which covers zero; OOD −15.0 \[.*\], lower",
        r"Against Wise-FT 0.5, MonoSoup freevariance: ID \+10.0 .*, higher; OOD −29.5 .*, lower",
        r"Against Wise-FT 0.5, MonoSoup variance R=0.8: ID \+10.5 \[",
        r".*control .*MonoSoup freevariance: ID unchanged .* OOD \+0.5 \[.*\], higher",
        r".*control .*MonoSoup variance R=0.8: ID unchanged .* OOD −0.5 \[.*\], lower",
    ]
    for sentence, pattern in zip(sentences[:8], expected, strict=True):
        assert re.match(pattern, sentence), (pattern, sentence)


def test_gains_and_losses_that_cancel_are_not_called_unchanged():
    given = grades((20, 198), *[(180, 120)] * 6)
    swapped = {
        skill: values[::-1] if skill == "home" else values
        for skill, values in given["fine-tuned"].items()
    }
    sentences = summary.sentences({**given, merge.FREE.title: swapped}, QUESTIONS)
    assert re.search(r"OOD 0.0 \[−.*\], which covers zero", sentences[2])
    assert "OOD unchanged on every item" in sentences[3]


def test_the_table_fits_100_columns_and_shows_each_model():
    soups = [(160, 180), (180, 121), (180, 120), (181, 90), (181, 91)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary.table(grades((20, 198), (180, 120), *soups), QUESTIONS))
    shown = console.export_text()
    assert shown.count("  norm-matched control") == 2
    assert all(text in shown for text in ("Wise-FT 0.5", "80.0 ± 2.8", "−10.0 ["))
    assert "…" not in shown
