"""What the installed lm-eval knows: everything that the shipped suites name, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch

from evaluation import suite
from evaluation.engines import EvaluationError, language


@pytest.fixture(scope="module")
def manager():
    """lm-eval's own tasks, of the folders that the suites need.

    Its index of all of them takes twenty seconds.
    """
    folders = ["arc", "gsm8k", "gsm8k_platinum", "gsm_plus", "hellaswag", "mgsm/native_cot"]
    folders += ["mmlu/default", "mmlu_pro", "sciq"]
    own = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[own / folder for folder in folders], include_defaults=False
    )


@pytest.mark.parametrize("name", [name for name in suite.shipped() if name.startswith("qwen")])
def test_every_task_metric_and_filter_is_in_lm_eval(name, manager):
    made = suite.load(name)
    language.check_tasks(manager, made)
    assert made.public and made.ID and made.OOD


def test_groups_are_looked_into(manager):
    leaves = language.leaves(manager, "mmlu_humanities")
    assert len(leaves) == 13 and "mmlu_philosophy" in leaves
    assert language.leaves(manager, "gsm8k") == ["gsm8k"]


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
def test_what_lm_eval_lacks_is_named(make_suite, manager, task, message):
    with pytest.raises(EvaluationError) as caught:
        language.check_tasks(manager, make_suite(ID=[task]))
    assert message in str(caught.value) and "suite mine" in str(caught.value)


def test_without_network_the_data_set_is_named(manager, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        EvaluationError,
        match=r"gsm8k needs the data set openai/gsm8k, .* `tiny` needs no network",
    ):
        language.check_data(manager, suite.load("qwen-math").tasks)


def test_what_is_logged_is_written_as_json():
    """lm-eval logs NumPy's and torch's numbers, and objects that JSON does not know."""
    logged = {"a": np.float64(0.5), 1: (torch.tensor(2), None), "dtype": torch.bfloat16}
    plain = language._plain(logged)
    assert plain == {"a": 0.5, "1": [2, None], "dtype": "torch.bfloat16"}
    assert json.loads(json.dumps(plain)) == plain
