"""What `check` says a merge comes to, against the report of that merge."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from helpers import checkpoints
from mergekit.scripts import merge_raw_pytorch, run_yaml

from mergekit_monosoup import report
from mergekit_monosoup.check import examine


def summary(path) -> list[str]:
    examination = examine(path)
    assert [f for f in examination.findings if f.level == "error"] == []
    return examination.summary


MATRICES = "all matrices; not: 9 that are no matrices, as norms and biases"
ATTENTION = {"filter": "self_attn", "value": 0.0}
OFF = {"value": 1e9}


@pytest.mark.parametrize(
    ("parameters", "lines"),
    [
        ({}, [f"monosoup, freevariance: edits 16 of 25 tensors: {MATRICES}"]),
        (
            {"mode": "variance", "R": [0.9, 0.7]},
            # Embeddings and heads get the first value of a gradient.
            ["edits 16 of 25", "R: 0.9 in embed_tokens, lm_head; 0.9 → 0.7 by depth in "],
        ),
        (
            {"alpha": 0.5, "coefficients": "rho"},
            ["edits 16 of 25", "alpha: 0.5", "coefficients: rho"],
        ),
        ({"R": 0.5}, ["freevariance: edits 16 of 25"]),  # which nothing reads
        (
            {"min_rel_update": [ATTENTION, OFF]},
            [
                "edits 8 of 25 tensors: self_attn.*; not: 8 by `min_rel_update`: embed_tokens, "
                "mlp.*, lm_head; 9 that are no matrices, as norms and biases"
            ],
        ),
        ({"min_rel_update": 1e9}, ["edits 0 of 25 tensors; not: 16 by `min_rel_update`: all"]),
        (
            {"mode": [{"filter": "self_attn", "value": "variance"}]},
            [
                "monosoup, freevariance and variance: edits 16",
                "R: 0.8",
                "parameters.mode has no entry without `filter`: 8 matrices that none matches take "
                "the default freevariance",
            ],
        ),
    ],
)
def test_in_words(parameters, lines, write):
    found = summary(write(parameters=parameters))
    assert len(found) == len(lines), found
    for line, words in zip(found, lines, strict=True):
        assert words in line


def test_a_model_without_a_value_takes_that_of_all(write, models):
    weight = [{"filter": "mlp", "value": 2.0}]
    entry = {"model": models[1][0], "parameters": {"weight": weight}}
    (_, line) = summary(write(models=[entry], parameters={"weight": 3.0}))
    assert line.startswith("models[0].parameters.weight has no entry without `filter`: 10 matrices")
    assert line.endswith("that none matches take 3")


@pytest.mark.parametrize("program", [run_yaml.main, merge_raw_pytorch.main])
def test_it_is_what_the_merge_does(program, write, models, tmp_path):
    """The kinds and numbers are those of the records."""
    files = ["", "/model.safetensors"][program is merge_raw_pytorch.main]
    R = 0.9 if files else [0.9, 0.7]  # mergekit-pytorch knows no layers
    parameters = {"min_rel_update": [ATTENTION, OFF], "mode": "variance", "R": R}
    parameters["report"] = str(tmp_path / "r.jsonl")
    base, tuned = models[0] + files, models[1][0] + files
    path = write(base_model=base, models=[{"model": tuned}], parameters=parameters)
    first, second = summary(path)
    CliRunner().invoke(program, [str(path), str(tmp_path / "out")], catch_exceptions=False)
    records = report.read(tmp_path / "r.jsonl")
    edited = [r for r in records if r.action == "edited"]
    assert {"self_attn" in r.name for r in edited} == {True}
    assert f"edits {len(edited)} of {len(records)} tensors: self_attn.*;" in first
    by_depth = [r.R for r in report.by_depth(edited)]
    numbers = list(dict.fromkeys(f"{R:g}" for R in by_depth))
    assert second == ("R: 0.9 → 0.7 by depth" if len(numbers) > 1 else f"R: {numbers[0]}")
    assert len(numbers) == (1 if files else 2)


def test_svc_and_slices_and_stacks(write, models, tmp_path):
    given = {"merge_method": "svc", "parameters": {"normalize": True}}
    path = write(**given, models=[{"model": tuned} for tuned in models[1]])
    assert summary(path) == [
        f"svc: calibrates 16 of 25 tensors: {MATRICES}",
        "normalize: true",
    ]
    sources = [{"model": m, "layer_range": [1, 2]} for m in (models[0], models[1][0])]
    (line,) = summary(write(models=None, slices=[{"sources": sources}]))
    assert "edits 9 of 14 tensors" in line, "one layer of two"
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3_moe")
    (line,) = summary(write(base_model=str(base), models=[{"model": str(tuned)}]))
    assert "mlp.experts.gate_up_proj" in line or "mlp.*" in line or "all matrices" in line


def test_other_methods_and_errors_have_none(write):
    other = write(merge_method="task_arithmetic", parameters={"weight": 0.5})
    assert summary(other) == []
    assert examine(write(parameters={"R": 7})).summary == []
