"""One's own questions asked by lm-eval: what is right, and when they are asked again."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.runs import result, start

from evaluation import local_tasks, store, suite, tables

CITY = {"prompt": "Kolima lives in"}
LARGER = {"prompt": "Larger of 3 or 17:", "choices": ["3", "17"], "answer": "17"}

W0 = ("pretrained",)  # which has learned to name a city


def write(folder, *rows, larger=(LARGER,), entry="questions: cities.jsonl"):
    folder.mkdir(exist_ok=True)
    for name, lines in (("cities", rows), ("larger", larger)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    path = folder / "mine.yml"
    path.write_text(f"ID:\n  - {{{entry}}}\nOOD:\n  - questions: larger.jsonl\n")
    return str(path)


def answers(out, task):
    """By item, what the model wrote or chose, and whether it was right."""
    (evaluation,) = store.read(out)
    key = {t.task: t.key for t in evaluation.result.suite.tasks}[task]
    return [
        (s.answers[s_key], s.values[key]) for s in evaluation.samples[task] for s_key in s.answers
    ]


@pytest.mark.slow
def test_a_run_of_ones_own_questions(models, tmp_path, asked, capsys):
    out, both = tmp_path / "out", ["own_cities", "own_larger"]
    mine = write(tmp_path / "a", CITY | {"answer": "Nowhere"})
    assert start(models, out, suite=mine, names=W0) == 0 and asked == both
    ((wrote,), right), *_ = answers(out, "own_cities")
    wrote = wrote.strip()
    assert wrote and right == 0
    shown = f"no answer is right. To line 1, whose answer is 'Nowhere', the model wrote ' {wrote}'"
    assert f"{tmp_path / 'a' / 'cities.jsonl'}: {shown}" in capsys.readouterr().err

    # Spelt in another way it counts, with more or less in it it does not.
    spelt = [f" {wrote.upper()}. ", wrote.lower(), wrote, f"{wrote}a", f"a {wrote}", wrote[:-1]]
    changed = [
        CITY | {"answer": answer, "cluster": f"{number}"} for number, answer in enumerate(spelt)
    ]
    choices = LARGER["choices"]
    mine = write(tmp_path / "a", *changed, larger=[LARGER, LARGER | {"answer": "3"}])
    assert start(models, out, suite=mine, names=W0) == 0 and asked == both * 2, (
        "a changed file is asked again"
    )
    assert [right for _, right in answers(out, "own_cities")] == [1, 1, 1, 0, 0, 0]
    for (chosen, right), answer in zip(answers(out, "own_larger"), ["17", "3"], strict=True):
        likelihoods = [likelihood for likelihood, _ in chosen]
        assert right == (choices[likelihoods.index(max(likelihoods))] == answer)
    assert (
        "warning: " in (said := capsys.readouterr().err) and "lines 1, 2, 3, 4, 5 and 6 ask" in said
    )

    # Neither where the suite lies nor what else is in its folder matters.
    shutil.move(tmp_path / "a", tmp_path / "b")
    mine = str(tmp_path / "b" / "mine.yml")
    assert start(models, out, suite=mine, names=W0) == 0 and len(asked) == 4
    assert "finished before" in capsys.readouterr().out
    assert start(models, out, "--limit", "1", suite=mine, names=W0) == 0 and len(asked) == 6
    assert {task["items"] for task in result(out, "pretrained", "mine")["tasks"].values()} == {1}
    (tmp_path / "b" / "cities.jsonl").unlink()  # tables need results alone
    assert tables.main([str(out), "--reference", "pretrained"]) == 0
    assert "| pretrained | 100.0 ± 0.0 |" in capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_is_taken_out_of_what_is_written(models, tmp_path, capsys):
    """A date is text; the last match counts; no match is no answer; a long prompt is refused."""
    rows = [CITY | {"answer": "2020-01-01"}, CITY | {"answer": "2021-01-01"}]
    entry = "questions: cities.jsonl, extract: '[A-Za-z]', generation: {max_gen_toks: 4}"
    mine = write(tmp_path / "a", *rows, entry=entry)
    assert start(models, tmp_path / "out", suite=mine, names=W0) == 0
    ((letter,), wrong), _ = answers(tmp_path / "out", "own_cities")
    assert len(letter) == 1 and wrong == 0

    mine = write(tmp_path / "a", *rows, larger=[LARGER, LARGER | {"prompt": "1 " * 80}])
    assert start(models, tmp_path / "out", suite=mine, names=W0) == 1
    said = capsys.readouterr().err
    assert "larger.jsonl, line 2: 1" in said and "the context of" in said and "is 128" in said


def test_what_lm_eval_is_given(tmp_path):
    """Tables say what is text: in JSON lines, a date would be read as a time."""
    import pyarrow.parquet

    mine = suite.load(write(tmp_path / "a", CITY | {"answer": "2020-01-01"}))
    local_tasks.write_questions(mine, tmp_path / "tasks")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tasks").iterdir()}
    assert files.keys() == {
        f"own_{n}.{end}" for n in ("cities", "larger") for end in ("yaml", "parquet")
    }
    table = pyarrow.parquet.read_table(tmp_path / "tasks" / "own_cities.parquet")
    assert table.to_pylist() == [CITY | {"answer": "2020-01-01"}]
    local_tasks.write_questions(mine, tmp_path / "tasks")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tasks").iterdir()} == files
