"""Evaluation with models and data sets of the hub, answered by a hub on this machine.

The data sets have three rows and the columns of the real ones: what lm-eval's tasks read, and the
fields by which the suites cluster items (GSM-Plus's are those that its authors list).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from helpers.hub import HUB, able, changed
from helpers.hub_server import Fault, Hub

from evaluation import fingerprint, run, sources, suite
from evaluation.engines import EvaluationError, language
from evaluation.sources import SourceError

BASE, TUNED, OTHER, ADAPTER, *_ = HUB
QUESTION = {"question": "What is 1 + {}?", "answer": "It is so.\n#### {}"}
CHOICES = {"question": "What is 1 + {}?", "choices": ["1", "2", "3", "4"], "answer": 1}
MGSM = QUESTION | {"answer_number": 2, "equation_solution": "1 + {}"}
# Data set → its configurations, splits and columns.
DATA: dict[str, tuple[list[str], list[str], dict[str, Any]]] = {
    "openai/gsm8k": (["main"], ["train", "test"], QUESTION),
    "allenai/sciq": (
        ["default"],
        ["train", "validation", "test"],
        {"question": "What {}?", "support": "It is {}.", "correct_answer": "this"}
        | {f"distractor{number}": f"that {number}" for number in (1, 2, 3)},
    ),
    "qintongli/GSM-Plus": (
        ["default"],
        ["test", "testmini"],
        {"question": "What is 2 + {}?", "solution": "It is so.\n#### {}", "answer": "{}"}
        | {"perturbation_type": "digit expansion", "seed_question": QUESTION["question"]}
        | {"seed_solution": QUESTION["answer"], "seed_answer": "{}"},
    ),
    "madrylab/gsm8k-platinum": (["main"], ["test"], QUESTION | {"cleaning_status": "consensus"}),
    "TIGER-Lab/MMLU-Pro": (
        ["default"],
        ["validation", "test"],
        {"question_id": 1, "question": "What is 1 + {}?", "options": ["1", "2", "3"], "answer": "B"}
        | {"answer_index": 1, "cot_content": "A: Let's think step by step. The answer is (B)."}
        | {"category": "math", "src": "x"},
    ),
    "juletxara/mgsm": (
        ["en", "es", "fr", "de", "zh", "ja", "ru", "th"],
        ["train", "test"],
        MGSM,
    ),
    "allenai/ai2_arc": (
        ["ARC-Challenge"],
        ["train", "validation", "test"],
        {"id": "q{}", "question": "What {}?", "answerKey": "B"}
        | {"choices": {"text": ["1", "2"], "label": ["A", "B"]}},
    ),
    "Rowan/hellaswag": (
        ["default"],
        ["train", "validation"],
        {"ind": 1, "activity_label": "Sums", "ctx_a": "We add", "ctx_b": "and {}", "ctx": "x"}
        | {"endings": ["a", "b", "c", "d"], "label": "1"},
    ),
    "cais/mmlu": (["philosophy", "sociology"], ["dev", "test"], CHOICES | {"subject": "x"}),
}


def filled(value: Any, number: int) -> Any:
    """Return a row's value for one of three numbers."""
    if isinstance(value, str):
        return value.format(number)
    if isinstance(value, dict):
        return {key: filled(of_key, number) for key, of_key in value.items()}
    return [filled(one, number) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The folders of the data sets: a file for each split, named in the card as on the hub."""
    folder = tmp_path_factory.mktemp("data")
    for name, (configs, splits, columns) in DATA.items():
        rows = [json.dumps(filled(columns, number)) for number in (1, 2, 3)]
        listed = []
        for config in configs:
            for split in splits:
                file = folder / name / config / f"{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("\n".join(rows) + "\n")
            files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
            listed.append({"config_name": config, "data_files": files})
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    return folder


@pytest.fixture
def hub_of_all(models, data, hub, tmp_path, monkeypatch) -> Hub:
    """The hub with the data sets beside models that have room for an answer."""
    for name in DATA:
        models.add(name, data / name, kind="datasets")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", models.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return models


@pytest.fixture(scope="module")
def manager() -> lm_eval.tasks.TaskManager:
    """The tasks of the suites; of MMLU one subject of each group, for there are 25."""
    folders = ["arc", "gsm8k", "gsm8k_platinum", "gsm_plus", "hellaswag", "mgsm/native_cot"]
    own = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[own / folder for folder in [*folders, "mmlu/default", "mmlu_pro", "sciq"]],
        include_defaults=False,
    )


SUBJECTS = {"mmlu_humanities": "mmlu_philosophy", "mmlu_social_sciences": "mmlu_sociology"}


def tasks() -> Iterator[suite.Task]:
    """Yield every task of the shipped suites that has data on the hub, once."""
    every = [
        t for name in suite.shipped() if name.startswith("qwen") for t in suite.load(name).tasks
    ]
    for task in {task.task: task for task in every}.values():
        yield task.model_copy(update={"task": SUBJECTS.get(task.task, task.task)})


@pytest.mark.slow
def test_every_task_of_the_suites_finds_its_columns(hub_of_all, manager):
    every, loaded = list(tasks()), {}

    def load(names: list[str]) -> dict[str, Any]:
        loaded.update((found := manager.load(names))["tasks"])
        return found

    language.check_data(SimpleNamespace(load=load), every)
    assert {"gsm_plus", "gsm8k_platinum", "mmlu_pro_math", "hellaswag"} <= loaded.keys()
    for task in every:
        of_task = loaded[task.task]
        docs = list(of_task.eval_docs)
        assert len(docs) == 3
        for doc in docs:
            assert of_task.doc_to_text(doc) and of_task.doc_to_target(doc) is not None, task.task
        if task.cluster not in (None, "doc_id"):
            assert len({doc[task.cluster] for doc in docs}) == 3


# -- a run -----------------------------------------------------------------------------------------


def small_suite(folder: Path) -> str:
    """GSM8K and GSM-Plus as in the mathematical suite, with answers of four tokens."""
    shipped = yaml.safe_load((suite.SHIPPED / "qwen-math.yml").read_text())
    shipped |= {"ID": shipped["ID"][:1], "OOD": shipped["OOD"][:1]}
    for task in [*shipped["ID"], *shipped["OOD"]]:
        task |= {"generation": {"max_gen_toks": 4}, "num_fewshot": 1}
    (folder / "small.yml").write_text(yaml.safe_dump(shipped))
    return str(folder / "small.yml")


@pytest.mark.slow
def test_a_run_of_names(hub_of_all, hub, manager, tmp_path, monkeypatch, write, capsys):
    monkeypatch.setattr(language, "task_manager", lambda *_: manager)
    hub_of_all.add(BASE, able(hub / "base", tmp_path / "base"))
    hub_of_all.add(TUNED, hub / "tuned0", v1=able(hub / "tuned1", tmp_path / "tuned"))
    models = [f"pretrained={BASE}", f"soup={write(f'{TUNED}@v1')}"]
    places = ["--out", str(tmp_path / "out"), "--merge-cache", str(tmp_path / "merged")]
    arguments = [small_suite(tmp_path), *(f"--model={m}" for m in models), *places]
    assert run.main([*arguments, "--device", "cpu", "--limit", "1"]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "soup.small.json").read_text())
    assert {task["items"] for task in result["tasks"].values()} == {1}
    assert set(result["source"]["merge"]["inputs"]) == {BASE, f"{TUNED}@v1"}
    weights = result["source"]["merge"]["inputs"][f"{TUNED}@v1"]
    assert weights == fingerprint.of_weights(hub / "tuned1")

    hub_of_all.add(OTHER, tmp_path / "base")
    changed(tmp_path / "base" / "tokenizer_config.json", eos_token=None)
    arguments = [arguments[0], f"--model=other={OTHER}", *places, "--device", "cpu", "--limit", "1"]
    assert run.main(arguments) == 1
    assert re.search(r"no end-of-text token, .* gsm8k would end: set eos", capsys.readouterr().err)


def test_a_context_that_is_too_short_is_named(models, manager, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(language, "task_manager", lambda *_: manager)
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run.main(["qwen-math", f"--model=pretrained={BASE}", *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(
        r"its context is 64 tokens, and gsm8k asks for answers of up to 512, .* Copy the suite "
        r"qwen-math and set `generation: \{max_gen_toks: N\}` there, with N well below 64",
        line,
    )
    # The task's own number, where the suite has none; and what generates nothing needs no room.
    pro, sciq = (t for t in suite.load("qwen-math").tasks if t.task in ("mmlu_pro_math", "sciq"))
    assert {language._longest_answer(manager, task) for task in (pro, sciq)} == {2048, 0}


# -- what is downloaded, and what is refused -------------------------------------------------------


def test_of_a_model_only_what_is_loaded_is_downloaded(models, hub, tmp_path, monkeypatch):
    folder = shutil.copytree(hub / "tuned0", tmp_path / "tuned")
    (folder / "original").mkdir()
    for other in ("pytorch_model.bin", "model.gguf", "original/consolidated.safetensors"):
        (folder / other).write_bytes(bytes(10**6))
    (folder / "chat_template.jinja").write_text("x")
    models.add("org/model", folder, v1=hub / "tuned1")
    place = sources.local("org/model")
    assert {path.name for path in place.iterdir()} == {
        path.name for path in (hub / "tuned0").iterdir()
    } | {"chat_template.jinja"}
    assert models.sent("org/model") < 10**5
    assert fingerprint.of_weights(sources.local("org/model@v1")) == fingerprint.of_weights(
        hub / "tuned1"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sources.local("org/model") == place


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("no/model", None, "no/model: is no folder here, and the hub shows no such repository"),
        (f"{TUNED}@v9", None, "v9: the hub has no such revision"),
        (TUNED, Fault(f"{TUNED}/resolve", 401, "GatedRepo", "x"), "is gated: accept its licence"),
        (TUNED, Fault(TUNED, 503), "the hub answered 503"),
        (ADAPTER, None, r"is an adapter: write BASE\+ADAPTER"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(models, name, fault, message):
    models.faults = [fault] if fault else []
    with pytest.raises(SourceError, match=message) as caught:
        sources.local(name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("openai/gsm8k/", 403, "GatedRepo", "Visit the page to ask for access."),
            "data set openai/gsm8k.* is a gated dataset .* to ask for access. Log in with `hf auth",
        ),
        (Fault("openai/gsm8k", 401, "RepoNotFound", "no"), "set openai/gsm8k.* nor to be had"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_line(hub_of_all, manager, fault, message):
    hub_of_all.faults = [fault]
    with pytest.raises(EvaluationError, match=message) as caught:
        language.check_data(manager, suite.load("qwen-math").tasks[:1])
    assert "\n" not in str(caught.value)
