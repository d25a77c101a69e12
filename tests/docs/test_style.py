"""Markdown that can be read as a diff."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import pages
from helpers.pages import ROOT

FILES = pages.everything()
# Pages that leave a long sentence on one line; the others break it at 100 columns.
WHOLE_SENTENCES = ("docs/check.md", "CONTRIBUTING.md")
UNTOUCHED = re.compile(r"<!-- generated.*?<!-- end -->|^```.*?^```$", flags=re.M | re.S)
# The end of a sentence and the beginning of the next, outside of code and abbreviations.
TWO_SENTENCES = re.compile(
    r"(?<!e\.g)(?<!i\.e)(?<!\bEq)(?<!\bapp)(?<!\bal)[.!?][)*\"”]* +"
    r"(?:[A-Z*(]|mergekit|bfloat16|torch\b)"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> list[str]:
    """The lines without headings, tables, blocks, images and generated parts."""
    lines = UNTOUCHED.sub("", path.read_text("utf-8")).splitlines()
    lines = [re.sub(r"^(\s*)\d+\.", r"\1*", line) for line in lines]  # a number is no sentence
    return [line for line in lines if not line.lstrip().startswith(("#", "|", "<!--", "!["))]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_lines_are_short_and_hold_one_sentence(path):
    lines = [re.sub(r"`[^`]*`", lambda code: "x" * len(code[0]), line) for line in prose(path)]
    assert [line for line in lines if TWO_SENTENCES.search(line)] == []
    if name(path) not in WHOLE_SENTENCES:
        assert [line for line in lines if len(line) > 100 and not unbreakable(line)] == []


def unbreakable(line: str) -> bool:
    """One link, or one piece of code, longer than a line."""
    return len(line.split()) < 3


def test_the_rules_of_style_have_teeth(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("One sentence. And another.\n\n* **Bold.** Text (so).\n\n```\nA. B\n```\n")
    assert [bool(TWO_SENTENCES.search(line)) for line in prose(page) if line] == [True, True]


def test_readme_is_short():
    assert len(pages.text("README.md").splitlines()) <= 130
