"""Suites: what a file may hold, and that the installed lm-eval knows everything that the shipped ones name."""

from __future__ import annotations

from pathlib import Path

import lm_eval.tasks
import pytest
import yaml

from evaluation import suite
from evaluation.engines import language as engine

MINIMAL = {
    "title": "t",
    "version": 1,
    "public": False,
    "ID": [{"task": "a", "metric": "acc"}],
    "OOD": [{"task": "b", "metric": "acc"}],
}


@pytest.fixture(scope="module")
def manager():
    """lm-eval's own tasks, of the folders that the suites need: its index of all of them takes twenty seconds."""
    folders = [
        "arc",
        "gsm8k",
        "gsm8k_platinum",
        "gsm_plus",
        "hellaswag",
        "mgsm/native_cot",
        "mmlu/default",
        "mmlu_pro",
        "sciq",
    ]
    own = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[own / folder for folder in folders], include_defaults=False
    )


def load(tmp_path, **changes):
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return suite.load(str(path))


class TestFiles:
    def test_a_minimal_file(self, tmp_path):
        made = load(tmp_path)
        assert made.name == "mine" and [task.key for task in made.tasks] == ["acc,none"] * 2
        assert made.digest() != load(tmp_path, version=2).digest()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
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
            ({"name": "other"}, "a suite has the name of its file"),
        ],
    )
    def test_errors_name_file_and_key(self, tmp_path, changes, message):
        with pytest.raises(suite.SuiteError) as caught:
            load(tmp_path, **changes)
        assert message in str(caught.value) and str(tmp_path) in str(caught.value)
        assert "at least 1 item" not in str(caught.value) or changes == {"ID": []}

    def test_a_key_given_twice(self, tmp_path):
        path = tmp_path / "mine.yml"
        path.write_text(yaml.safe_dump(MINIMAL) + "seed: 1\nseed: 2\n")
        with pytest.raises(suite.SuiteError, match="'seed' appears twice"):
            suite.load(str(path))

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(
            suite.SuiteError, match=r"no-such: No such file.*shipped suites: qwen-general"
        ):
            suite.load("no-such")
        (tmp_path / "list.yml").write_text("- 1")
        with pytest.raises(suite.SuiteError, match="must be a mapping"):
            suite.load(str(tmp_path / "list.yml"))
        (tmp_path / "bad.yml").write_text("a: [")
        with pytest.raises(suite.SuiteError, match="not YAML"):
            suite.load(str(tmp_path / "bad.yml"))

    def test_every_field_is_part_of_the_digest(self):
        made = suite.load("tiny")
        changed = {
            "seed": 1,
            "batch_size": 1,
            "world": 1,
            "chat_template": True,
            "title": "x",
            "OOD": made.OOD[1:],
        }
        assert (
            len(
                {
                    made.digest(),
                    *(made.model_copy(update={k: v}).digest() for k, v in changed.items()),
                }
            )
            == 7
        )


class TestShipped:
    def test_all_are_there(self):
        assert suite.shipped() == [
            "qwen-general",
            "qwen-lora",
            "qwen-math",
            "qwen-mgsm",
            "tiny",
            "tiny-two",
        ]

    @pytest.mark.parametrize(
        "name", [name for name in suite.shipped() if not name.startswith("tiny")]
    )
    def test_every_task_metric_and_filter_is_in_lm_eval(self, name, manager):
        made = suite.load(name)
        engine.check_tasks(manager, made)
        assert made.public and made.ID and made.OOD

    def test_the_papers_settings(self):
        mgsm = suite.load("qwen-mgsm")
        assert {task.task.rsplit("_")[-1] for task in mgsm.tasks} == {
            "en",
            "es",
            "fr",
            "de",
            "zh",
            "ja",
            "ru",
            "th",
        }
        assert {task.num_fewshot for task in mgsm.tasks} == {8} and len(mgsm.ID) == 1
        for task in mgsm.tasks:
            assert {
                k: task.generation[k] for k in ("do_sample", "temperature", "top_p", "top_k")
            } == {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
            }

    def test_groups_are_looked_into(self, manager):
        found = engine.leaves(manager, "mmlu_humanities")
        assert len(found) == 13 and "mmlu_philosophy" in found
        assert engine.leaves(manager, "gsm8k") == ["gsm8k"]

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"task": "gsm8", "metric": "acc"}, "lm-eval has no task gsm8; did you mean gsm8k"),
            (
                {"task": "gsm8k", "metric": "acc"},
                "gsm8k has no acc,none; it has exact_match,strict-match, exact_match,flex",
            ),
            (
                {"task": "mmlu_humanities", "metric": "f1"},
                "mmlu_philosophy has no f1,none; it has acc,none",
            ),
            (
                {"task": "sciq", "metric": "acc", "generation": {"max_gen_toks": 5}},
                "sciq generates nothing",
            ),
            (
                {
                    "task": "gsm8k",
                    "metric": "exact_match",
                    "filter": "strict-match",
                    "generation": {"max_gen_tokens": 8},
                },
                "gsm8k: generation has no max_gen_tokens; did you mean max_gen_toks",
            ),
            (
                {
                    "task": "gsm8k",
                    "metric": "exact_match",
                    "filter": "strict-match",
                    "generation": {"until": 5},
                },
                "until must be a text or a list of texts, not 5",
            ),
        ],
    )
    def test_what_lm_eval_lacks_is_named(self, tmp_path, manager, task, message):
        with pytest.raises(engine.EngineError) as caught:
            engine.check_tasks(manager, load(tmp_path, ID=[task]))
        assert message in str(caught.value) and "suite mine" in str(caught.value)

    def test_without_network_the_data_set_is_named(self, manager, monkeypatch, tmp_path):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            engine.EngineError,
            match=r"gsm8k needs the data set openai/gsm8k, .* `tiny` needs no network",
        ):
            engine.check_data(manager, suite.load("qwen-math").tasks)
