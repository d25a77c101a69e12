"""The test items of a world as lm-eval tasks: JSON lines and task files in a folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation import local_tasks

ANSWER_TOKENS = 8  # longest answer seen, with its end token: 4


def write_tasks(seed: int, folder: Path) -> None:
    """Write one task per skill of the world of this seed, and one for the skill `sum_it`.

    Tasks are called `tiny_<skill>` and scored by the exact answer.
    """
    from evaluation.worlds.sums import build_world, italian

    test = build_world(seed).test
    for skill, items in {**test, "sum_it": italian(test["sum_en"])}.items():
        data = folder / f"{skill}.jsonl"
        rows = [
            {"prompt": item.prompt, "answer": item.answer, "cluster": item.cluster}
            for item in items
        ]
        local_tasks.write_json_lines(data, rows)
        local_tasks.write_config(folder / f"{skill}.yaml", _task(skill, data))


def _task(skill: str, data: Path) -> dict[str, Any]:
    # The whole output has to be the answer, but for blanks around it; anything else fails to match
    # and is wrong.
    whole = {"function": "regex", "regex_pattern": r"^\s*(\S+)\s*$"}
    return local_tasks.task_config(
        f"tiny_{skill}", data, **local_tasks.generated(ANSWER_TOKENS, [whole])
    )
