"""Parameters: which there are, where they are read, what they may be, and rules about several."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner
from helpers import checkpoints
from helpers.findings import messages
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import get
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, construct_param_dicts

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


@pytest.mark.parametrize("shared", [{"R": 0.9}, {}])
def test_a_model_may_repeat_what_holds_anyway(write, models, shared):
    """mergekit takes the top-level value, or the default, for the model that says nothing."""
    repeated = {"model": models[1][0], "parameters": {"R": shared.get("R", 0.8)}}
    parameters = {"mode": "variance", **shared}
    assert messages(write(models=[repeated, {"model": models[1][1]}], parameters=parameters)) == []


@finds("PAR209")
def test_weights_of_zero(write, models):
    none = [{"model": t, "parameters": {"weight": 0}} for t in models[1]]
    assert "weight: is 0 for every fine-tuned model" in messages(write(models=none))[0]
    none[0]["parameters"]["weight"] = 0.5
    assert messages(write(models=none)) == []


@pytest.fixture(scope="session")
def three_tasks(tmp_path_factory):
    """A base model and three fine-tunes."""
    return checkpoints.pair(tmp_path_factory.mktemp("svc"), tuned=3)


@pytest.fixture
def write_svc(write, three_tasks):
    """Writes a merge by `svc`, given the parameters of its models, up to three, and of all."""
    base, tuned = three_tasks

    def make(*of_models, **parameters):
        models = [
            {"model": str(name), "parameters": given}
            for name, given in zip(tuned, of_models, strict=False)
        ]
        return write(merge_method="svc", base_model=str(base), models=models, parameters=parameters)

    return make


def test_a_good_file_of_svc(write_svc):
    assert check(write_svc({}, {"weight": 2}, normalize=True, alpha=0.5)) == []
    assert check(write_svc({}, {}, {"merged": True})) == [], "it may differ between models"


@finds("PAR207", "PAR208")
def test_values_and_agreement_of_svc(write_svc):
    assert any("`alpha` must be a number > 0" in m for m in messages(write_svc({}, {}, alpha=0)))
    found = messages(write_svc({"alpha": 0.5}, {}))
    assert any(m.startswith("alpha: holds for the whole merge") for m in found)


@finds("PAR210")
def test_which_model_of_svc_is_the_merge(write_svc):
    (several,) = messages(write_svc({"merged": True}, {"merged": True}, {}))
    assert "merged: is true for" in several and "at most one model is the merge" in several
    (alone,) = messages(write_svc({"merged": True}, {}))
    assert "beside which at least two task models are needed" in alone


@finds("PAR211")
@pytest.mark.parametrize(
    ("name", "value", "default"),
    [("weight", 2, 1), ("scaling", 0.5, 1.0), ("normalize", True, False)],
)
def test_what_nothing_reads_beside_a_merged_model(write_svc, tmp_path, name, value, default):
    merged = {"merged": True}
    path = write_svc({}, {}, merged, **{name: value})
    (found,) = messages(path)
    assert found.startswith(f"{name}: would have no effect, for")
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    with pytest.raises(ValueError, match="would have no effect"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert messages(write_svc({}, {}, merged, **{name: default})) == []
    own = {name: default}
    overridden = write_svc(own, own, merged | own, **{name: value})
    assert messages(overridden) == [], "no model takes the shared value"


@finds("PAR212")
def test_R_without_the_mode_that_reads_it(write):
    assert messages(write(parameters={"R": 0.1}), "warning") == [
        "R: is read by `mode: variance` only, and the mode is freevariance"
    ]
    mode = [{"filter": "mlp", "value": "variance"}]
    assert check(write(parameters={"R": 0.1, "mode": mode})) == []


def test_a_misspelt_mode_may_be_the_one_that_reads_r(write):
    path = write(parameters={"mode": "varaince", "R": 0.9})
    assert "`mode` must be one of" in messages(path)[0]
    assert messages(path, "warning") == []


@finds("PAR213")
@pytest.mark.parametrize(
    ("value", "taken"),
    [([0.5, 1.0], 0.5), ([{"filter": "mlp", "value": [0.2, 0.7]}, {"value": 1.0}], 0.2)],
)
def test_a_gradient_in_a_file_for_mergekit_pytorch(write, models, value, taken):
    base, tuned = (f"{folder}/model.safetensors" for folder in (models[0], models[1][0]))
    path = write(
        base_model=base, models=[{"model": tuned}], merge_method="task_arithmetic",
        parameters={"weight": value},
    )  # fmt: skip
    config = RawPyTorchMergeConfig.model_validate(yaml.safe_load(path.read_text()))
    _, read = construct_param_dicts(config, get("task_arithmetic"), "model.layers.1.mlp.x")
    assert {model["weight"] for model in read.values() if model} == {taken}
    (message,) = messages(path)
    assert f"weight: mergekit-pytorch knows no layers, and takes {taken} of [{taken}, " in message
    assert messages(write(parameters={"R": [0.9, 0.7], "mode": "variance"})) == []


def test_a_list_of_one_value_is_no_gradient(write, models):
    base, tuned = (f"{folder}/model.safetensors" for folder in (models[0], models[1][0]))
    path = write(base_model=base, models=[{"model": tuned}], parameters={"alpha": [0.5, 0.5]})
    assert messages(path) == []
