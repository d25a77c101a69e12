"""Text classifiers: labels go by name, and what cannot be answered is said before it is asked."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import bert

from evaluation import sources
from evaluation.engines import EvaluationError, Options, start
from evaluation.evaluator import evaluate
from evaluation.store import read
from evaluation.suite import Suite, Task

WORDS = ["good", "bad", "plain", "very", "day"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Two folders with the same weights, whose classes stand in opposite order."""
    folder = tmp_path_factory.mktemp("classifiers")
    tokenizer = bert.tokenizer(folder, WORDS)
    for name, order in {"ab": ("bad", "good"), "ba": ("good", "bad")}.items():
        torch.manual_seed(0)
        config = bert.config(
            WORDS,
            id2label=dict(enumerate(order)),
            label2id={label: number for number, label in enumerate(order)},
        )
        model = transformers.BertForSequenceClassification(config)
        if name == "ba":
            with torch.no_grad():
                for part in (model.classifier.weight, model.classifier.bias):
                    part.copy_(part.flip(0))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


TEXTS = ["good day", "bad day", "very very very good day", "plain", "bad"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("one", "two"):
        write(folder / f"{name}.jsonl", [{"text": t, "label": "good"} for t in TEXTS])
    return folder


def suite(metric="acc"):
    one, two = (Task(task=name, metric=metric) for name in ("one", "two"))
    return Suite(
        name="own",
        engine="text_classifier",
        title="Own",
        version=1,
        public=False,
        ID=(one,),
        OOD=(two,),
    )


def answers(folder, texts):
    """The class of each text, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        best = [model(**tokenizer(t, return_tensors="pt")).logits.argmax().item() for t in texts]
    return [model.config.id2label[number] for number in best]


def test_models_of_either_order_of_classes_answer_alike(classifiers, data, tmp_path):
    models = {name: str(classifiers / name) for name in ("ab", "ba")}
    evaluate(suite(), models, tmp_path / "out", Options(data=data, device="cpu", batch_size=2))
    expected = answers(classifiers / "ab", TEXTS)
    for evaluation in read(tmp_path / "out"):
        samples = evaluation.samples["one"]
        assert [sample.answers["none"] for sample in samples] == expected
        right = [float(answer == "good") for answer in expected]
        assert [sample.values["acc,none"] for sample in samples] == right


def test_a_limit_is_spread_over_the_file(classifiers, tmp_path):
    """A file may be sorted by class: its first items would be of one."""
    data, task = tmp_path / "data", suite().tasks[0]
    data.mkdir()
    rows = [{"text": f"very {text}", "label": text} for text in ("good", "bad") for _ in range(5)]
    for name in ("one", "two"):
        write(data / f"{name}.jsonl", rows)
    source = sources.find("ab", str(classifiers / "ab"), tmp_path / "merged")
    labels = {"good": [], "bad": []}
    for limit in (None, 4):
        engine = start(suite(), Options(device="cpu", data=data, limit=limit), tmp_path)
        with engine.model(source) as model:
            samples = model.ask(task).samples
        for label, found in labels.items():
            found.append(
                {s.doc_id: s.doc_hash for s in samples if rows[s.doc_id]["label"] == label}
            )
    for whole, some in labels.values():
        assert len(whole) == 5 and len(some) == 2
        assert some.items() <= whole.items()  # an item keeps its number


def test_a_changed_text_is_asked_again(classifiers, data, tmp_path, capsys):
    models = {"ab": str(classifiers / "ab")}
    options = Options(data=data, device="cpu")
    evaluate(suite(), models, tmp_path / "out", options)
    evaluate(suite(), models, tmp_path / "out", options)
    assert "finished before" in capsys.readouterr().out
    write(data / "two.jsonl", [{"text": "very bad", "label": "bad"}])
    evaluate(suite(), models, tmp_path / "out", options)
    assert "finished before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "good"}', "one.jsonl:1: label: Field required"),
        ('{"text": "", "label": "good"}', "one.jsonl:1: text: "),
        ('{"text": "good", "label": 1}', "one.jsonl:1: label: "),
        ('{"text": "good", "label": "good", "lable": "x"}', "one.jsonl:1: lable: "),
        ("good", "one.jsonl:1: line: Invalid JSON"),
        ("", "one.jsonl: has no texts"),
    ],
)
def test_a_line_that_is_no_labelled_text_is_named(data, tmp_path, line, words):
    (data / "one.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=words):
        start(suite(), Options(data=data, device="cpu"), tmp_path)


def test_what_cannot_be_asked_is_said_before(classifiers, data, tmp_path):
    with pytest.raises(EvaluationError, match=r"needs --data FOLDER, with one\.jsonl, two\.jsonl"):
        start(suite(), Options(device="cpu"), tmp_path)
    with pytest.raises(EvaluationError, match=r"a classifier has no f1,none"):
        start(suite("f1"), Options(data=data, device="cpu"), tmp_path)
    write(data / "two.jsonl", [{"text": "day", "label": "neutral"}])
    engine = start(suite(), Options(data=data, device="cpu"), tmp_path)
    model = sources.find("ab", str(classifiers / "ab"), tmp_path)
    with pytest.raises(EvaluationError, match=r"has no class neutral; .* has bad, good"):
        engine.check([model])


def test_a_body_without_a_head_is_no_classifier(classifiers, data, tmp_path):
    body = tmp_path / "body"
    model = transformers.BertModel.from_pretrained(classifiers / "ab")
    model.save_pretrained(body)
    transformers.AutoTokenizer.from_pretrained(classifiers / "ab").save_pretrained(body)
    engine = start(suite(), Options(data=data, device="cpu"), tmp_path)
    with pytest.raises(EvaluationError, match=r"has no classifier\.bias .*is it a classifier"):
        engine.model(sources.find("body", str(body), tmp_path))
