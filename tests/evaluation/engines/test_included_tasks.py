"""A person's own task files for lm-eval: found, told from each other, and what fails in them."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.runs import start

from evaluation import suite
from evaluation.engines import EvaluationError, Options, language

ROWS = [{"q": f"What is {a} plus 1?", "a": str(a + 1)} for a in range(3)]
TASK = {
    "task": "my_sums",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "process_docs": "!function code.same",
    "doc_to_text": "{{q}}",
    "doc_to_target": "a",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A suite of a person's own task of lm-eval: mine.yml, tasks/sums.yaml, code.py, rows.jsonl."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "code.py").write_text("def same(docs):\n    return docs\n")
    task(tmp_path)
    entry = {"task": "my_sums", "metric": "exact_match"}
    other = {"questions": "larger.jsonl"}
    (tmp_path / "larger.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    content = {"include_path": "tasks", "public": False, "ID": [entry], "OOD": [other]}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(content))
    # lm-eval's own tasks take ten seconds, and are not asked for.
    manager = language.TaskManager
    monkeypatch.setattr(
        language, "TaskManager", lambda **given: manager(**given | {"include_defaults": False})
    )
    return tmp_path


def task(folder, **changes) -> None:
    data = {"data_files": {"test": str(folder / "rows.jsonl")}}
    text = yaml.safe_dump({**TASK, "dataset_kwargs": data, **changes})
    text = text.replace("'!function code.same'", "!function code.same")
    (folder / "tasks" / "sums.yaml").write_text(text)


def engine(folder) -> language.Engine:
    return language.Engine(suite.load(str(folder / "mine.yml")), Options(device="cpu"), folder)


@pytest.mark.slow
def test_a_run_of_ones_own_task_file(folder, models, asked):
    mine = str(folder / "mine.yml")
    for _ in range(2):
        assert start(models, folder / "out", suite=mine) == 0
        assert asked == ["my_sums", "own_larger"]


def test_whatever_decides_a_task_decides_the_key(folder, tmp_path_factory):
    keys = [engine(folder).decides]
    for file, text in (
        ("tasks/code.py", "def same(docs):\n    return docs.select([0])\n"),
        ("rows.jsonl", json.dumps(ROWS[0])),
        ("larger.jsonl", '{"prompt": "a", "answer": "c"}\n'),
    ):
        (folder / file).write_text(text)
        keys.append(engine(folder).decides)
    task(folder, doc_to_text="q")
    keys.append(engine(folder).decides)
    assert len({json.dumps(key) for key in keys}) == 5
    assert keys[0].keys() == {"local_tasks", "own_questions", "included_tasks"}
    (folder / "tasks" / "other.yaml").write_text("task: other\n")
    assert engine(folder).decides == keys[-1], "what is not asked decides nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "my_sum"}, "lm-eval has no task my_sums; did you mean my_sum?"),
        ({"metric_list": [{"metric": "acc"}]}, "my_sums has no exact_match,none; it has acc,none"),
        ({"class": "!function code.same"}, "my_sums is a task of Python code"),
    ],
)
def test_a_task_file_that_the_suite_cannot_ask(folder, changes, message):
    task(folder, **changes)
    with pytest.raises(EvaluationError) as caught:
        engine(folder)
    assert message in str(caught.value)


def test_files_that_lm_eval_passes_over_are_named(folder):
    tasks = folder / "tasks"
    (tasks / "sums.yaml").rename(tasks / "sums.yml")
    (tasks / "a.yaml").write_text("task: [")
    (tasks / "b.yaml").write_text("tusk: b")
    with pytest.raises(EvaluationError) as caught:
        engine(folder)
    said = str(caught.value)
    for way in ("{questions: FILE.jsonl}", "include_path: FOLDER"):
        assert f"`{way}`" in said
    assert f"{tasks / 'sums.yml'}: lm-eval reads files that end in .yaml; rename it" in said
    assert f"{tasks / 'a.yaml'}: not YAML (" in said
    assert f"{tasks / 'b.yaml'}: it has neither `task` nor `group`" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{q.x.y}}"}, "UndefinedError"),
        ({"test_split": "tset"}, "sums.yaml: "),
        ({"dataset_kwargs": {"data_files": {"test": "no/such.jsonl"}}}, "no/such.jsonl"),
    ],
)
def test_a_task_file_that_does_not_fit_its_data(folder, changes, message):
    task(folder, **changes)
    asked = engine(folder)
    with pytest.raises(EvaluationError) as caught:
        asked.check([])
    assert message in str(caught.value) and "sums.yaml: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
