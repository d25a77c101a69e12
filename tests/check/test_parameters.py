"""Parameters: which there are, where they are read, what they may be, and rules about several."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from helpers.findings import messages

from mergekit_monosoup.check import check
from mergekit_monosoup.cli import main

finds = pytest.mark.finds


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        pytest.param(
            {"alhpa": 0.5},
            "parameters.alhpa: monosoup has no such parameter, mergekit ignores it; did you",
            marks=finds("PAR201"),
        ),
        pytest.param({"R": None}, "parameters.R: has no value; leave the", marks=finds("PAR204")),
        pytest.param(
            {"R": [{"filtre": "mlp", "value": 0.6}]},
            "unknown key `filtre` in a filter; did you mean `filter`?",
            marks=finds("PAR205"),
        ),
        pytest.param(
            {"R": [{"value": 0.5}, {"filter": "mlp", "value": 0.6}]},
            "never reached",
            marks=finds("PAR206"),
        ),
        pytest.param(
            {"R": 1.5},
            "parameters.R: merge method monosoup: `R` must be a number in (0, 1], got 1.5",
            marks=finds("PAR207"),
        ),
        pytest.param(
            {"R": [0.5, 2]}, "`R` must be a number in (0, 1], got 2", marks=finds("PAR207")
        ),
        pytest.param(
            {"mode": [{"filter": "mlp", "value": "vetterli"}]},
            "`mode` must be one of freevariance, variance",
            marks=finds("PAR207"),
        ),
        pytest.param({"report": "/"}, "`report`: / is a folder", marks=finds("PAR207")),
        pytest.param({"report": ""}, "`report`: is empty", marks=finds("PAR207")),
        pytest.param({"report": "a\0b"}, "holds a null byte", marks=finds("PAR207")),
        pytest.param(
            {"weight": 0}, "weight: is 0 for every fine-tuned model", marks=finds("PAR209")
        ),
    ],
)
def test_what_mergekit_drops_or_says_badly(write, parameters, words):
    path = write(parameters=parameters)
    found = messages(path)
    assert any(words in message for message in found), found
    assert len(found) <= 2, "one mistake, not every member of a union"
    assert CliRunner().invoke(main, ["check", str(path)]).exit_code == 1


@finds("PAR202", "PAR203")
def test_parameters_where_nobody_reads_them(write, models):
    base, tuned = models
    entries = [{"model": base, "parameters": {"R": 0.5}}, {"model": tuned[0]}]
    found = messages(write(models=entries))
    assert any("models[0].parameters.R: is ignored under base_model" in m for m in found)
    shared = [{"model": tuned[0], "parameters": {"weight": 1.0, "normalize": True}}]
    found = messages(write(merge_method="task_arithmetic", models=shared))
    assert found == [
        "models[0].parameters.normalize: is ignored under a model: "
        "write it under the top-level `parameters`"
    ]


@finds("PAR208")
def test_models_that_disagree(write, models):
    _, tuned = models
    found = messages(
        write(models=[{"model": tuned[0], "parameters": {"R": 0.5}}, {"model": tuned[1]}])
    )
    assert any(m.startswith("R: holds for the whole merge, but the models disagree") for m in found)
    agreeing = [
        {"model": t, "parameters": {"R": 0.5, "weight": w}}
        for t, w in zip(tuned, (1, 2), strict=True)
    ]
    assert messages(write(models=agreeing)) == []


@finds("PAR209")
def test_weights_of_zero(write, models):
    none = [{"model": t, "parameters": {"weight": 0}} for t in models[1]]
    assert "weight: is 0 for every fine-tuned model" in messages(write(models=none))[0]
    none[0]["parameters"]["weight"] = 0.5
    assert messages(write(models=none)) == []


@pytest.fixture
def write_svc(write, models, tmp_path):
    """Writes a merge by `svc` of three task models, given their parameters."""
    third = tmp_path / "third"
    third.symlink_to(models[0])
    tasks = [*models[1], str(third)]

    def make(*under, **parameters):
        entries = [
            {"model": name, "parameters": given} for name, given in zip(tasks, under, strict=False)
        ]
        return write(merge_method="svc", models=entries, parameters=parameters)

    return make


@finds("PAR208", "PAR210")
def test_which_model_of_svc_is_the_merge(write_svc):
    apart = [{"weight": 1, "merged": False}] * 2
    # The third is a copy of the base, which is a finding of its own.
    told = [m for m in messages(write_svc(*apart, {"merged": True})) if "same model" not in m]
    assert told == [], "weight and merged may differ between models"
    assert any(
        m.startswith("alpha: holds for the whole merge")
        for m in messages(write_svc({"alpha": 0.5}, {}))
    )
    several = messages(write_svc({"merged": True}, {"merged": True}, {}))
    assert any(
        "merged: is true for" in m and "at most one model is the merge" in m for m in several
    )
    alone = messages(write_svc({"merged": True}, {}))
    assert any("beside which at least two task models are needed" in m for m in alone)


@finds("PAR211")
@pytest.mark.parametrize("name", ["weight", "scaling", "normalize"])
def test_what_nothing_reads_beside_a_merged_model(write_svc, name):
    value = {"weight": 2, "scaling": 0.5, "normalize": True}[name]
    found = messages(write_svc({}, {}, {"merged": True}, **{name: value}))
    assert any(m.startswith(f"{name}: would have no effect, for") for m in found)
    default = {"weight": 1, "scaling": 1.0, "normalize": False}[name]
    found = messages(write_svc({}, {}, {"merged": True}, **{name: default}))
    assert not any("no effect" in m for m in found)


@finds("PAR212")
def test_R_without_the_mode_that_reads_it(write):
    assert messages(write(parameters={"R": 0.1}), "warning") == [
        "R: is read by `mode: variance` only, and the mode is freevariance"
    ]
    mode = [{"filter": "mlp", "value": "variance"}]
    assert check(write(parameters={"R": 0.1, "mode": mode})) == []
