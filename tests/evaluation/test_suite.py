"""What a suite file may hold, and what the shipped ones say."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.evaluations import MINIMAL

from evaluation import suite


def test_a_minimal_file(make_suite):
    made = make_suite()
    assert made.name == "mine" and [task.key for task in made.tasks] == ["acc,none"] * 2
    assert made.digest() != make_suite(version=2).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "radio"}, "mine.yml: engine: Value error, no engine radio; there are language"),
        ({"sed": 1}, "mine.yml: sed: Extra inputs"),
        ({"seed": -1}, "mine.yml: seed: Input should be greater than or equal to 0"),
        (
            {"ID": [{"task": "a", "metric": "acc", "num_fewshots": 5}]},
            "mine.yml: ID.0.num_fewshots: Extra inputs",
        ),
        ({"ID": []}, "mine.yml: ID: "),
        ({"version": "1"}, "mine.yml: version: Input should be a valid integer"),
        ({"ID": [{"task": "b", "metric": "acc"}]}, "listed twice: b"),
        (
            {"ID": [{"task": "a", "metric": "acc", "generation": {"top_k": 20}}]},
            "add `do_sample: true`",
        ),
        ({"enable_thinking": False}, "no effect without `chat_template: true`"),
        ({"chat_template": True, "enable_thinking": True}, "not supported"),
        ({"include_path": 3}, "mine.yml: include_path: Input should be a valid string"),
        ({"name": "other"}, "a suite has the name of its file"),
    ],
)
def test_errors_name_file_and_key(make_suite, tmp_path, changes, message):
    with pytest.raises(suite.SuiteError) as caught:
        make_suite(**changes)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "at least 1 item" not in str(caught.value) or changes == {"ID": []}


@pytest.mark.parametrize(
    ("tasks", "lines"),
    [
        ([{"task": "a", "metric": "m", "generation": {"until": [1, {}], "top_k": None}}], 2),
        ([{"task": "a", "metric": "m", "generation": {1: 2}}], 1),
        ([3] * 50, 6),
    ],
)
def test_many_mistakes_are_a_few_lines(make_suite, tasks, lines):
    with pytest.raises(suite.SuiteError) as caught:
        make_suite(ID=tasks)
    said = str(caught.value).splitlines()
    assert len(said) == lines and all("mine.yml: " in line for line in said)
    assert ("45 more mistakes" in said[-1]) == (tasks == [3] * 50)


def test_a_key_given_twice(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(MINIMAL) + "seed: 1\nseed: 2\n")
    with pytest.raises(suite.SuiteError, match="'seed' appears twice"):
        suite.load(str(path))


def test_unreadable_files(tmp_path):
    with pytest.raises(suite.SuiteError, match=r"no-such: No such file.*shipped suites: convnext"):
        suite.load("no-such")
    (tmp_path / "list.yml").write_text("- 1")
    with pytest.raises(suite.SuiteError, match="must be a mapping"):
        suite.load(str(tmp_path / "list.yml"))
    (tmp_path / "bad.yml").write_text("a: [")
    with pytest.raises(suite.SuiteError, match="cannot be read as YAML"):
        suite.load(str(tmp_path / "bad.yml"))


def test_every_field_is_part_of_the_digest():
    made = suite.load("tiny")
    changed = {
        "seed": 1,
        "batch_size": 1,
        "world": 1,
        "chat_template": True,
        "title": "x",
        "OOD": made.OOD[1:],
    }
    digests = {made.model_copy(update={key: value}).digest() for key, value in changed.items()}
    assert len(digests | {made.digest()}) == 7


def test_a_field_that_came_later_leaves_older_results_valid(make_suite):
    """Results of before the field must still have the digest, and so the key, of their suite."""
    made = make_suite()
    older = [field for field in suite.Suite.model_fields if field not in suite.Suite.LATER]
    assert list(made.model_dump()) == list(json.loads(made.model_dump_json())) == older
    of_task = [field for field in suite.Task.model_fields if field not in suite.Task.LATER]
    assert list(made.ID[0].model_dump()) == of_task
    changed = made.model_copy(update={"engine": "other"})
    assert changed.model_dump()["engine"] == "other" and changed.digest() != made.digest()


def test_all_suites_are_shipped():
    papers = ["convnext", "imagenet-shifts", "qwen-general", "qwen-lora", "qwen-math", "qwen-mgsm"]
    offline = ["digits", "example", "tiny", "tiny-two", "tweets"]
    assert suite.shipped() == sorted([*papers, *offline])


def test_the_papers_settings():
    mgsm = suite.load("qwen-mgsm")
    languages = {task.task.rsplit("_")[-1] for task in mgsm.tasks}
    assert languages == {"en", "es", "fr", "de", "zh", "ja", "ru", "th"}
    assert {task.num_fewshot for task in mgsm.tasks} == {8} and len(mgsm.ID) == 1
    for task in mgsm.tasks:
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
        assert {key: task.generation[key] for key in sampling} == sampling
