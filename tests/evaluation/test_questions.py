"""A person's own questions: what a file may hold, what is said of each mistake, in a suite."""

from __future__ import annotations

import json

import pytest
import yaml

from evaluation import questions, suite
from evaluation.questions import QuestionsError

SUM = {"prompt": "What is 12 plus 30?", "answer": "42"}
LARGER = {"prompt": "Larger of 3 or 17:", "choices": ["3", "17"], "answer": "17"}


@pytest.fixture
def file(tmp_path):
    """Writes lines, JSON or as they are, to my.jsonl."""

    def write(*lines, name="my.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8")
        return path

    return write


def test_a_file_of_each_kind(file):
    lines = file(
        "\ufeff" + json.dumps(SUM | {"cluster": 7}), "", SUM | {"answer": 42, "cluster": "b"}
    )
    written = questions.read(lines)
    assert [(q.line, q.answer, q.cluster) for q in written.questions] == [
        (1, "42", "7"),
        (3, "42", "b"),
    ]
    assert written.clustered and not written.multiple_choice
    chosen = questions.read(file(LARGER))
    assert chosen.multiple_choice and not chosen.clustered


def test_separators_within_a_text_end_no_line(file):
    (question,) = questions.read(
        file(json.dumps(SUM | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False))
    ).questions
    assert question.prompt == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a" "answer": "b"}', "not JSON (Expecting ',' delimiter at column 16)"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", 'not a question: a line is {"prompt"'),
        ({"prompt": "a"}, "answer is missing"),
        ({"answer": "a"}, "prompt is missing"),
        (SUM | {"promt": "a"}, 'unknown field "promt"; did you mean prompt?'),
        (SUM | {"x1": "a"}, 'unknown field "x1"; there are prompt, answer, choices, cluster'),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', '"prompt" appears twice'),
        (SUM | {"answer": 0.5}, "answer must be text in quotes, not 0.5"),
        (SUM | {"answer": True}, "answer must be text in quotes, not true"),
        (SUM | {"answer": " "}, "answer is empty"),
        (SUM | {"answer": " .. "}, 'answer " .. " is nothing but full stops'),
        (SUM | {"cluster": None}, "cluster must be text in quotes, not null"),
        (SUM | {"prompt": "\ud800"}, "prompt holds half of a surrogate pair"),
        (LARGER | {"answer": "4"}, 'answer "4" is not among choices: "3", "17"'),
        (LARGER | {"choices": ["17"]}, 'choices must be a list of two or more texts, not ["17"]'),
        (LARGER | {"choices": "17"}, "choices must be a list of two or more texts"),
        (LARGER | {"choices": ["17", "17"]}, 'choices has one twice: "17", "17"'),
        (LARGER | {"choices": ["17", 1.5]}, "a choice must be text in quotes, not 1.5"),
        (LARGER, "it has choices, and line 1 has no choices; put each kind in a file"),
        (SUM | {"cluster": "a"}, "it has a cluster, and line 1 has no cluster; give one to all"),
    ],
)
def test_a_mistake_is_said_with_file_and_line(file, line, message):
    path = file(SUM, line)
    with pytest.raises(QuestionsError) as caught:
        questions.read(path)
    assert f"{path}, line 2: {message}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it holds no question"),
        (b" \n\n", "it holds no question"),
        (b"\xff\xfe", "it is UTF-16"),
        (b'{"prompt": "\xe9"}', "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_without_questions(tmp_path, content, message):
    path = tmp_path / "my.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QuestionsError, match=message) as caught:
        questions.read(path)
    assert str(path) in str(caught.value)


def test_the_same_question_twice_is_said(file):
    other = LARGER | {"choices": ["17", "3"]}  # another order of choices is another question
    asked = questions.read(file(LARGER, other, LARGER | {"answer": "3"}, LARGER))
    (said,) = asked.repeated()
    assert 'lines 1, 3 and 4 ask the same question, "Larger of 3 or 17:"' in said


# -- in a suite ------------------------------------------------------------------------------------


@pytest.fixture
def own_suite(file, tmp_path):
    """Writes sums.jsonl, larger.jsonl, and a suite of both with more keys for the first."""

    def make(entry=None, **changes):
        (tmp_path / "data").mkdir(exist_ok=True)
        file(SUM, SUM | {"prompt": "What is 40 plus 2?"}, name="data/sums.jsonl")
        file(LARGER | {"cluster": "3 17"}, name="data/larger.jsonl")
        content = {
            "ID": [{"questions": "data/sums.jsonl", **(entry or {})}],
            "OOD": [{"questions": "data/larger.jsonl", "label": "which"}],
        }
        (tmp_path / "mine.yml").write_text(yaml.safe_dump({**content, **changes}))
        return suite.load(str(tmp_path / "mine.yml"))

    return make


def test_two_lines_are_a_suite(own_suite, monkeypatch):
    monkeypatch.chdir("/")  # the files are where the suite is
    made = own_suite()
    assert [(t.task, t.header, t.key, t.cluster) for t in made.tasks] == [
        ("own_sums", "sums", "exact_match,answer", None),
        ("own_larger", "which", "acc,none", "cluster"),
    ]
    assert (made.title, made.version, made.public) == ("mine", 1, False)
    assert made.own["own_sums"].questions[1].prompt == "What is 40 plus 2?"
    # As a result has it: without the files, and not to be told from the suite that was asked.
    again = suite.Suite.model_validate(json.loads(made.model_dump_json()))
    assert again.tasks == made.tasks and again.digest() == made.digest() and not again.own


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"filter": "x"}, "takes no key `filter`; `extract` takes the answer out"),
        ({"num_fewshot": 2}, "takes no key `num_fewshot`; write worked examples into the prompts"),
        ({"task": "gsm8k"}, "takes no key `task`"),
        ({"questions": 3}, "questions: must be the name of a file, not 3"),
        ({"questions": "other.jsonl"}, "other.jsonl: cannot be read: No such file"),
        ({"extract": "(x"}, "ID.0.extract: Value error, not a regular expression: missing )"),
        ({"questions": "data/larger.jsonl"}, "listed twice: own_larger"),
        (
            {"questions": "data/larger.jsonl", "extract": "x"},
            "only for `questions` without choices",
        ),
        ({"labl": "x"}, "ID.0.labl: Extra inputs"),
    ],
)
def test_what_an_entry_cannot_say(own_suite, entry, message):
    with pytest.raises(suite.SuiteError) as caught:
        own_suite(entry)
    assert message in str(caught.value)


def test_beside_public_tasks_a_suite_says_whether_it_is_public(own_suite):
    with pytest.raises(suite.SuiteError, match=r"mine.yml: public: Field required"):
        own_suite(OOD=[{"task": "arc_easy", "metric": "acc"}])
    assert own_suite(OOD=[{"task": "arc_easy", "metric": "acc"}], public=True).own.keys() == {
        "own_sums"
    }


def test_mistakes_of_all_files_are_a_few_lines(own_suite, file):
    own_suite()
    bad = file(*["x"] * 9, name="bad.jsonl")
    with pytest.raises(suite.SuiteError) as caught:
        own_suite({"questions": "bad.jsonl"}, OOD=[{"questions": "none.jsonl"}])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and f"{bad}, line 1: not JSON" in lines[0] and "5 more" in lines[5]


def test_a_folder_of_task_files_must_be_there(own_suite):
    with pytest.raises(
        suite.SuiteError, match=r"mine.yml: include_path: .*nowhere is not a folder"
    ):
        own_suite(include_path="nowhere")
