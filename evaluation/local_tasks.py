"""Tasks of lm-eval that are written here: JSON lines or a table of items, and a task file, each.

Of the items of a world (`worlds.tasks`), and of a person's own questions (`questions`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation import fingerprint
from evaluation.questions import IGNORED, Questions
from evaluation.suite import Suite, Task

ANSWER_TOKENS = 32  # of an answer to one's own question, unless the suite says otherwise
END_OF_ANSWER = ["\n"]


def task_config(name: str, data: Path, **more: Any) -> dict[str, Any]:
    """Return the task file of items that have a prompt, in a file of JSON lines or Parquet."""
    return {
        "task": name,
        "dataset_path": "json" if data.suffix == ".jsonl" else "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "doc_to_text": "prompt",  # fields by name: lm-eval compiles a template anew for every item
        "metadata": {"version": 1.0},
        **more,
    }


def generated(max_tokens: int, filters: Sequence[Mapping[str, Any]], **metric: Any) -> Any:
    """Return what a task file says of answers that the model writes, greedily, on one line."""
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": END_OF_ANSWER,
            "do_sample": False,
            "max_gen_toks": max_tokens,
        },
        "filter_list": [{"name": "answer", "filter": [*filters, {"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, **metric}
        ],
    }


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_changed(path, "".join(lines).encode())


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a task file."""
    write_changed(path, yaml.safe_dump(config, allow_unicode=True).encode())


def write_changed(path: Path, content: bytes) -> None:
    """Write a file if it does not hold this already, as half a file does not.

    The data sets library tells files by their times: rewriting an unchanged one would make it build
    its cache again.
    """
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# -- a person's own questions ----------------------------------------------------------------------


def write_questions(suite: Suite, folder: Path) -> None:
    """Write a task for every file of questions that the suite names."""
    for task in suite.tasks:
        if asked := suite.own.get(task.task):
            data = folder / f"{task.task}.parquet"
            write_changed(data, _table(rows(asked)))
            config = task_config(task.task, data, **how_asked(task, asked))
            write_config(folder / f"{task.task}.yaml", config)


def digest_of_questions(suite: Suite) -> dict[str, str]:
    """Return a digest of each file's questions and of how they are asked, by task."""
    return {
        task.task: fingerprint.digest([rows(asked), how_asked(task, asked)])
        for task in suite.tasks
        if (asked := suite.own.get(task.task))
    }


def how_asked(task: Task, asked: Questions) -> dict[str, Any]:
    """Return what the task file of a file of questions says besides its name and data.

    Worked examples are never put before a question: they would be other questions of the file.
    """
    if asked.multiple_choice:
        metrics = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ]
        return {
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": metrics,
        }
    filters = []
    if task.extract is not None:
        # The last match: a model that thinks aloud ends with its answer. What does not match is
        # blank, which no answer is.
        regex = {"function": "regex", "regex_pattern": task.extract}
        filters = [{**regex, "group_select": -1, "fallback": ""}]
    metric = {"ignore_case": True, "regexes_to_ignore": [IGNORED]}
    return {"num_fewshot": 0, **generated(ANSWER_TOKENS, filters, **metric)}


def rows(asked: Questions) -> list[dict[str, Any]]:
    """Return the items of a file of questions, as lm-eval and samples have them."""
    items = []
    for question in asked.questions:
        item: dict[str, Any] = {"prompt": question.prompt, "answer": question.answer}
        if asked.multiple_choice:
            item |= {
                "choices": list(question.choices),
                "label": question.choices.index(question.answer),
            }
        if asked.clustered:
            item["cluster"] = question.cluster
        items.append(item)
    return items


def _table(items: Sequence[Mapping[str, Any]]) -> bytes:
    """Return items as Parquet, which says what is text.

    In JSON lines, the data sets library takes an answer such as 2020-01-01 for a time.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(items)), content)
    return content.getvalue()
