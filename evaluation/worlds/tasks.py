"""The test items of a world as lm-eval tasks: JSON lines and task files in a folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ANSWER_TOKENS = 8  # longest answer seen, with its end token: 4


def write_tasks(seed: int, folder: Path) -> None:
    """Write one task per skill of the world of this seed, and one for the skill `sum_it`.

    Tasks are called `tiny_<skill>` and scored by the exact answer.
    """
    from evaluation.worlds.sums import build_world, italian

    folder.mkdir(parents=True, exist_ok=True)
    test = build_world(seed).test
    for skill, items in {**test, "sum_it": italian(test["sum_en"])}.items():
        data = folder / f"{skill}.jsonl"
        rows = [
            {"prompt": item.prompt, "answer": item.answer, "cluster": item.cluster}
            for item in items
        ]
        _write(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        _write(folder / f"{skill}.yaml", yaml.safe_dump(_task(skill, data), allow_unicode=True))


def _write(path: Path, text: str) -> None:
    # The data sets library tells files by their times: rewriting an unchanged one would make it
    # build its cache again.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _task(skill: str, data: Path) -> dict[str, Any]:
    return {
        "task": f"tiny_{skill}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",  # fields by name: lm-eval compiles a template anew for every item
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
        # The whole output has to be the answer, but for blanks around it; anything else fails to
        # match and is wrong.
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": r"^\s*(\S+)\s*$"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
