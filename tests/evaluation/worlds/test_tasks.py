"""The test items of a world as lm-eval tasks."""

from __future__ import annotations

import json

import yaml
from helpers.tiny import WORLD

from evaluation.worlds import tasks
from evaluation.worlds.sums import SKILLS


def test_every_answer_fits_what_is_generated(tokenizer):
    answers = {item.answer for skill in SKILLS for item in WORLD.test[skill]}
    longest = max(len(tokenizer.encode(f" {answer}")) for answer in answers)
    assert longest + 1 <= tasks.ANSWER_TOKENS


def test_every_test_item_is_written_and_an_unchanged_file_is_left_alone(tmp_path):
    tasks.write_tasks(0, tmp_path)
    for skill in (*SKILLS, "sum_it"):
        task = yaml.safe_load((tmp_path / f"{skill}.yaml").read_text(encoding="utf-8"))
        assert task["task"] == f"tiny_{skill}"
        lines = (tmp_path / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines()
        items = WORLD.test["sum_en" if skill == "sum_it" else skill]
        answers = [json.loads(line)["answer"] for line in lines]
        assert answers == [item.answer for item in items]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    tasks.write_tasks(0, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
