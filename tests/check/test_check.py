"""`mergekit-monosoup check`: every silence of mergekit it promises to break, and no alarm on good files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from helpers import checkpoints
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_monosoup.check import check
from mergekit_monosoup.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, tuned = checkpoints.pair(tmp_path_factory.mktemp("check"), tuned=2)
    return str(base), [str(t) for t in tuned]


@pytest.fixture
def write(tmp_path, models):
    """Writes a good configuration with some keys replaced (None removes one); returns its path."""

    def make(text: str | None = None, **changes):
        base, tuned = models
        config = {
            "merge_method": "monosoup",
            "base_model": base,
            "models": [{"model": tuned[0]}],
        } | changes
        path = tmp_path / "merge.yml"
        path.write_text(
            text
            or yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False)
        )
        return path

    return make


def messages(path, level="error") -> list[str]:
    return [f"{f.where}: {f.message}" for f in check(path) if f.level == level]


def test_a_good_file_is_fine(write):
    R = [{"filter": "mlp", "value": [0.9, 0.6]}, {"value": "8e-1"}]
    path = write(parameters={"mode": "variance", "R": R, "report": "r.jsonl"})
    assert check(path) == []
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 0 and "fine" in result.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"base_modle": "x"},
            "base_modle: unknown key, mergekit ignores it; did you mean `base_model`?",
        ),
        (
            {"parameters": {"alhpa": 0.5}},
            "parameters.alhpa: monosoup has no such parameter, mergekit ignores it; did you",
        ),
        (
            {"parameters": {"R": 1.5}},
            "parameters.R: merge method monosoup: `R` must be a number in (0, 1], got 1.5",
        ),
        ({"parameters": {"R": [0.5, 2]}}, "`R` must be a number in (0, 1], got 2"),
        (
            {"parameters": {"mode": [{"filter": "mlp", "value": "vetterli"}]}},
            "`mode` must be one of freevariance, variance",
        ),
        ({"parameters": {"R": [{"value": 0.5}, {"filter": "mlp", "value": 0.6}]}}, "never reached"),
        (
            {"parameters": {"R": [{"filtre": "mlp", "value": 0.6}]}},
            "unknown key `filtre` in a filter; did you mean `filter`?",
        ),
        ({"base_model": None}, "add `base_model: <pretrained model>`"),
        ({"merge_method": "monosup"}, "'monosup' is not a merge method; did you mean `monosoup`?"),
        ({"dtype": "float33"}, "dtype: 'float33' is not a dtype"),
        ({"models": None}, "Exactly one of 'models', 'slices', or 'modules'"),
        ({"base_model": "./nowhere"}, "./nowhere: no such file or folder"),
    ],
)
def test_what_mergekit_drops_or_says_badly(write, changes, words):
    path = write(**changes)
    found = messages(path)
    assert any(words in message for message in found), found
    assert CliRunner().invoke(main, ["check", str(path)]).exit_code == 1


def test_parameters_where_nobody_reads_them(write, models):
    base, tuned = models
    entries = [{"model": base, "parameters": {"R": 0.5}}, {"model": tuned[0], "weigth": 1}]
    found = messages(write(models=entries))
    assert any("models[0].parameters.R: is ignored under base_model" in m for m in found)
    assert any("models[1].weigth: unknown key" in m for m in found)
    shared = [{"model": tuned[0], "parameters": {"weight": 1.0, "normalize": True}}]
    found = messages(write(merge_method="task_arithmetic", models=shared))
    assert found == [
        "models[0].parameters.normalize: is ignored under a model: write it under the top-level `parameters`"
    ]


def test_models_that_disagree(write, models):
    _, tuned = models
    found = messages(
        write(models=[{"model": tuned[0], "parameters": {"R": 0.5}}, {"model": tuned[1]}])
    )
    assert any(m.startswith("R: holds for the whole merge but the models disagree") for m in found)
    agreeing = [
        {"model": t, "parameters": {"R": 0.5, "weight": w}}
        for t, w in zip(tuned, (1, 2), strict=True)
    ]
    assert messages(write(models=agreeing)) == []


def test_slices_without_the_base(write, models):
    _, tuned = models
    slices = [{"sources": [{"model": tuned[0], "layer_range": [0, 2]}]}]
    assert any("list it in every slice" in m for m in messages(write(models=None, slices=slices)))


def test_shapes_from_headers_alone(write, models, tmp_path, monkeypatch):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "load_file", None)  # nothing may load a tensor
    found = messages(write(models=[{"model": str(other)}]))
    embedding = next(m for m in found if m.startswith("model.embed_tokens.weight"))
    assert (
        f"({checkpoints.VOCABULARY}, 32)" in embedding
        and f"({checkpoints.VOCABULARY + 8}, 32)" in embedding
    )
    assert "tokenizer: {source: base}" in embedding


def test_a_hub_name_that_cannot_be_reached_is_a_warning(write, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    path = write(models=[{"model": "Qwen/Qwen3-0.6B"}])
    assert messages(path) == []
    assert messages(path, "warning") == [
        "Qwen/Qwen3-0.6B: shapes not checked: ConnectionError: offline"
    ]


def test_files_that_are_not_merges(write, tmp_path):
    assert "cannot be read" in messages(tmp_path / "missing.yml")[0]
    assert "cannot be read as YAML" in messages(write("merge_method: [monosoup"))[0]
    assert "appears twice" in messages(write("merge_method: monosoup\nmerge_method: linear\n"))[0]
    assert "must be a mapping" in messages(write("- a\n- b\n"))[0]
    assert "is empty" in messages(write("# nothing\n"))[0]


def test_stages_of_mergekit_multi(write, models):
    base, tuned = models
    stage = {
        "merge_method": "monosoup",
        "base_model": base,
        "models": [{"model": tuned[0]}],
        "parameters": {"report": "r"},
    }
    last = {"merge_method": "linear", "models": [{"model": "edited", "parameters": {"weight": 1}}]}

    def dump(*documents):
        return write("\n---\n".join(yaml.safe_dump(d) for d in documents))

    assert check(dump({"name": "edited"} | stage, last)) == []
    again = dump({"name": "edited"} | stage, {"name": "other"} | stage, last)
    assert any("only the last is kept" in m for m in messages(again, "warning"))
    clash = dump({"name": "monosoup"} | stage, last)
    assert any("rename the stage" in m for m in messages(clash))


def test_narrower_output_is_mentioned(write):
    assert (
        "rounds to it after the method"
        in messages(write(dtype="float32", out_dtype="bfloat16"), "warning")[0]
    )


def test_json_output(write):
    result = CliRunner().invoke(main, ["check", str(write(parameters={"R": 7})), "--json"])
    finding, remark = json.loads(result.output)
    assert finding["level"] == "error" and finding["where"] == "parameters.R"
    assert remark["level"] == "warning"


def test_a_local_folder_that_looks_like_a_hub_name(write, models, tmp_path, monkeypatch):
    """mergekit asks the hub about it when it writes the model card, and offline that fails after the merge."""
    _, tuned = models
    (tmp_path / "tuned").symlink_to(tuned[0])
    monkeypatch.chdir(tmp_path)
    assert "write ./tuned" in messages(write(models=[{"model": "tuned"}]), "warning")[0]
    assert check(write(models=[{"model": "./tuned"}])) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"weight": 0}}, "weight: is 0 for every fine-tuned model"),
        ({"parameters": {"report": "/"}}, "`report`: / is a folder"),
        ({"parameters": {"report": ""}}, "`report`: is empty"),
        ({"parameters": {"R": [[0.1]]}}, "parameters.R: must be a value, a list of values"),
    ],
)
def test_what_a_new_user_ran_into(write, changes, words):
    found = messages(write(**changes))
    assert any(words in message for message in found), found
    assert len(found) <= 2, "one mistake, not every member of a union"


def test_R_without_the_mode_that_reads_it(write):
    assert messages(write(parameters={"R": 0.1}), "warning") == [
        "R: is read by `mode: variance` only, and the mode is freevariance"
    ]
    assert (
        check(write(parameters={"R": 0.1, "mode": [{"filter": "mlp", "value": "variance"}]})) == []
    )


def test_the_same_model_twice(write, models):
    base, tuned = models
    assert "models: listed twice" in messages(write(models=[{"model": tuned[0]}] * 2))[0]
    again = messages(write(models=[{"model": tuned[0]}, {"model": f"{base}/."}]))
    assert any("is the same model as" in message for message in again)


def test_filters_that_match_nothing(write):
    path = write(
        parameters={
            "alpha": [{"filter": "selfattn", "value": 0.1}, {"filter": "mlp", "value": 0.9}]
        }
    )
    assert [m for m in messages(path, "warning") if "filter" in m] == [
        "parameters.alpha: filter 'selfattn' is part of no tensor's name (it is plain text, not a pattern)"
    ]


def test_tensors_that_a_model_lacks_and_damaged_files(write, models, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    state = load_file(Path(models[0]) / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert "lacks 1 tensor(s)" in messages(write(models=[{"model": str(folder)}]), "warning")[0]
    (folder / "model.safetensors").write_bytes(b"\x10")
    without_config, damaged = messages(write(models=[{"model": str(folder)}]))
    assert (
        "has no config.json, which mergekit needs" in without_config and "cannot be read" in damaged
    )


def test_tensors_that_the_merge_needs(write, tmp_path, monkeypatch):
    """Tied heads and stacks of experts that are stored one by one are not missing, a part of such a stack is."""
    monkeypatch.chdir(tmp_path)
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3_moe", tied=True)
    path = write(base_model=str(base), models=[{"model": str(tuned)}])
    assert messages(path) == []
    state = checkpoints.state_dict(tuned)
    for gone in (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    ):
        del state[gone]
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    path = write(base_model=str(base), models=[{"model": str(broken)}])
    (error,) = messages(path)
    assert (
        error.startswith(f"{broken}: lacks 2 tensor(s) that the merge needs, whole or in part: ")
        and "q_proj" in error
    )
    assert not any("q_proj" in warning for warning in messages(path, "warning"))
    with pytest.raises(RuntimeError, match=r"required but not present|must match"):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(path.read_text())),
            "out",
            MergeOptions(quiet=True),
        )


def test_tensors_that_mergekit_passes_by(write, tmp_path):
    """mergekit knows no biases of Llama's attention; they would be gone, and load as zeros."""
    paths = []
    for name in ("base", "tuned"):
        config = checkpoints.config("llama")
        config.attention_bias = True
        torch.manual_seed(len(paths))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        paths.append(str(tmp_path / name))
    base, tuned = paths
    said = [
        m
        for m in messages(write(base_model=base, models=[{"model": tuned}]), "warning")
        if "not read" in m
    ]
    assert len(said) == 2 and said[0].startswith(f"{base}: 8 tensor(s) that mergekit does not read")
    assert "model.layers.0.self_attn.k_proj.bias" in said[0]
    layers = [{"sources": [{"model": path, "layer_range": [0, 1]} for path in paths]}]
    assert not [
        m
        for m in messages(write(base_model=base, models=None, slices=layers), "warning")
        if "not read" in m
    ]


def test_what_lies_beside_the_tensors_of_a_bin_file(write, models, tmp_path):
    shutil.copytree(models[1][0], tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "model.safetensors").unlink()
    torch.save({**state, "epoch": 3}, tmp_path / "other" / "pytorch_model.bin")
    assert messages(write(models=[{"model": str(tmp_path / "other")}])) == []


def test_modules_that_the_architecture_lacks(write, models):
    path = write(models=None, modules={"text_decoder": {"models": [{"model": models[1][0]}]}})
    assert [m for m in messages(path) if "module" in m] == [
        f"modules.text_decoder: {models[0]} has no such module, it has: default"
    ]


def test_a_tokenizer_that_aligns_vocabularies(write, tmp_path):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    assert messages(write(models=[{"model": str(other)}], tokenizer={"source": "base"})) == []


@pytest.mark.parametrize(
    "value", [3, "x", None, True, 0.5, [], [3], ["x"], {}, {"a": 1}, [{"R": 0.5}], [[]]]
)
@pytest.mark.parametrize(
    "place",
    [
        "merge_method",
        "base_model",
        "models",
        "parameters",
        "slices",
        "modules",
        "tokenizer",
        "dtype",
        "out_dtype",
        "name",
    ],
)
def test_nothing_that_yaml_can_say_is_a_traceback(write, models, place, value):
    for changes in ({place: value}, {"models": [{"model": models[1][0], place: value}]}):
        text = yaml.safe_dump(
            {"merge_method": "monosoup", "base_model": models[0], "models": [], **changes}
        )
        for finding in check(write(text)):
            assert finding.message


def test_models_below_keys_of_their_own(write, models):
    """`tokens` maps tokens to what they are made from, one of several kinds with keys of their own."""
    tokens = {
        "<s>": {
            "source": {"kind": "model_token", "model": models[1][0], "token_id": 1},
            "force": True,
        }
    }
    assert messages(write(tokenizer={"source": "union", "tokens": tokens})) == []
    tokens["<s>"]["forse"] = True
    (message,) = messages(write(tokenizer={"source": "union", "tokens": tokens}))
    assert "tokenizer.tokens.<s>.forse: unknown key" in message and "`force`" in message


def test_filters_go_by_the_names_of_mergekit(write, tmp_path):
    """It stacks the experts that the files hold one by one."""
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3moe")
    given = {"base_model": str(base), "models": [{"model": str(tuned)}]}
    stored = set(checkpoints.state_dict(base))
    planned = {"gate_up_proj": True, "experts.0": any("experts.0." in name for name in stored)}
    for wanted, there in (("gate_up_proj", True), ("experts.0", False)):
        path = write(
            **given, parameters={"alpha": [{"filter": wanted, "value": 0.1}, {"value": 0.9}]}
        )
        found = [m for m in messages(path, "warning") if "filter" in m]
        assert bool(found) is not there, found
        assert not found or ("mergekit has them" in found[0]) is planned[wanted]


def test_what_mergekit_would_refuse_at_its_start(write, models, tmp_path):
    layers = [
        {"sources": [{"model": name, "layer_range": [0, 9]} for name in (models[0], models[1][0])]}
    ]
    assert (
        f"layer_range [0, 9]: {models[0]} has 2" in messages(write(models=None, slices=layers))[0]
    )
    assert "cannot plan this merge" in messages(write(merge_method="breadcrumbs"))[0]
    _, (llama,) = checkpoints.pair(tmp_path, "llama")
    (message,) = messages(write(models=[{"model": str(llama)}]))[:1]
    assert (
        "is a LlamaForCausalLM" in message
        and "a Qwen3ForCausalLM; mergekit merges them with --allow-crimes" in message
    )


def test_adapters_and_codes_and_dtypes(write, models, tmp_path):
    assert (
        "the adapter ./no/lora: no such"
        in messages(write(models=[{"model": f"{models[1][0]}+./no/lora"}]))[0]
    )
    state = {"w": torch.randn(4, 4).to(torch.float8_e4m3fn), "b": torch.zeros(4)}
    save_file(state, tmp_path / "codes.safetensors")
    given = {
        "base_model": None,
        "models": [{"model": str(tmp_path / "codes.safetensors")}],
        "merge_method": "linear",
    }
    assert "is quantised: 1 tensor(s) hold F8_E4M3 codes, w for one" in messages(write(**given))[0]
    bf16 = checkpoints.pair(tmp_path / "bf16", dtype=torch.bfloat16)
    given = {"base_model": str(bf16[0]), "models": [{"model": str(bf16[1][0])}]}
    (message,) = messages(write(**given, out_dtype="float32"), "warning")
    assert "only stores wider what was rounded to BF16 before: add `dtype: float32`" in message
    (message,) = messages(write(out_dtype="bfloat16"), "warning")
    assert "is that of F32" in message
    assert (
        check(write(**given, out_dtype="bfloat16"))
        == []
        == check(write(**given, dtype="float32", out_dtype="float32"))
    )


def test_valid_ways_to_write_a_merge(write, models, tmp_path):
    """Anchors with merge keys, modules, a base for one slice, other vocabularies in other slices, stages as tokenizers."""
    base, tuned = models
    text = f"""
merge_method: monosoup
base_model: {base}
models:
  - &first
    model: {tuned[0]}
    parameters: {{weight: 1}}
  - <<: *first
    model: {tuned[1]}
"""
    assert messages(write(text)) == []
    entries = [{"model": base}, {"model": tuned[0]}]
    assert messages(write(models=None, modules={"default": {"models": entries}})) == []
    layers = [{"sources": [{**entry, "layer_range": [0, 2]} for entry in entries]}]
    assert messages(write(models=None, modules={"default": {"slices": layers}})) == []
    pair = [{"model": name, "layer_range": [0, 2]} for name in tuned]
    slices = [{"base_model": tuned[1], "sources": pair}]
    assert (
        messages(
            write(
                merge_method="task_arithmetic", models=None, slices=slices, parameters={"weight": 1}
            )
        )
        == []
    )
    assert messages(write(models=None, slices=[{"sources": pair}])), (
        "the base is not among the sources"
    )
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    parts = [
        [{"model": base, "layer_range": [0, 1]}],
        [{"model": str(other), "layer_range": [1, 2]}],
    ]
    given = {"merge_method": "passthrough", "base_model": None, "models": None}
    path = write(**given, slices=[{"sources": part} for part in parts])
    assert messages(path) == [] and any(
        "vocabularies differ" in m for m in messages(path, "warning")
    )
    parts[0][0]["layer_range"] = [-1, 1]
    assert (
        "layer_range [-1, 1]"
        in messages(write(**given, slices=[{"sources": part} for part in parts]))[0]
    )
    stages = [
        {
            "name": "s1",
            "merge_method": "linear",
            "models": [{"model": t, "parameters": {"weight": 1}} for t in tuned],
        },
        {"merge_method": "passthrough", "models": [{"model": "s1"}], "tokenizer_source": "s1"},
    ]
    assert messages(write(yaml.safe_dump_all(stages))) == []
    assert check(write(parameters={"report": "a\0b"})), "a null byte is no file name"
