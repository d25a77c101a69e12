"""Models: how they are named, whether they are there, and whether the method takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import checkpoints
from helpers.findings import messages

from mergekit_monosoup.check import check

finds = pytest.mark.finds


@finds("MOD301", "MOD302")
def test_the_same_model_twice(write, models):
    base, tuned = models
    assert "models: listed twice" in messages(write(models=[{"model": tuned[0]}] * 2))[0]
    again = messages(write(models=[{"model": tuned[0]}, {"model": f"{base}/."}]))
    assert any("is the same model as" in message for message in again)


@finds("MOD303")
def test_a_missing_base(write):
    found = messages(write(base_model=None))
    assert any("add `base_model: <pretrained model>`" in message for message in found), found


@finds("MOD303")
def test_slices_without_the_base(write, models):
    _, tuned = models
    slices = [{"sources": [{"model": tuned[0], "layer_range": [0, 2]}]}]
    assert any("list it in every slice" in m for m in messages(write(models=None, slices=slices)))


@finds("MOD304")
def test_paths_that_are_not_there(write, models):
    found = messages(write(base_model="./nowhere"))
    assert any("./nowhere: no such file or folder" in message for message in found), found
    path = write(models=[{"model": f"{models[1][0]}+./no/lora"}])
    assert "the adapter ./no/lora: no such" in messages(path)[0]


@finds("MOD305")
def test_a_local_folder_that_looks_like_a_hub_name(write, models, tmp_path, monkeypatch):
    """mergekit asks the hub about it for the model card, and offline that fails after the merge."""
    _, tuned = models
    (tmp_path / "tuned").symlink_to(tuned[0])
    monkeypatch.chdir(tmp_path)
    assert "write ./tuned" in messages(write(models=[{"model": "tuned"}]), "warning")[0]
    assert check(write(models=[{"model": "./tuned"}])) == []


def test_names_that_mergekit_cannot_parse(write):
    """It raises errors of two kinds, in what it makes of a name."""
    for name in ("a@b@c", "a+b+c"):
        path = write(models=[{"model": name}])
        (finding,) = check(path)
        assert "Invalid model path" in finding.message or "Can't parse" in finding.message


def test_valid_ways_to_write_a_merge(write, models, tmp_path):
    """Anchors with merge keys, modules, a base for one slice, other vocabularies in other slices.

    And stages as tokenizers.
    """
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


@pytest.mark.finds("MOD308")
def test_base_and_finetune_in_each_others_place(write, models, tmp_path):
    base, (tuned, _) = models
    for name, source in (("base", base), ("math", tuned)):
        (tmp_path / name).mkdir()
        for file in Path(source).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "math/README.md").write_text("---\nbase_model: [org/base]\n---\n")
    names = [f"{tmp_path}/{name}" for name in ("base", "math")]
    for base, tuned in (names, names[::-1]):
        found = messages(write(base_model=base, models=[{"model": tuned}]), "warning")
        assert [m for m in found if "look swapped" in m] == found[: tuned == names[0]]
