"""The file as a whole: what is no YAML or no merge, and stages that get in each other's way."""

from __future__ import annotations

import pytest
import yaml
from helpers.findings import messages
from mergekit.scripts.multimerge import load_config

from mergekit_monosoup.check import check


@pytest.mark.finds("DOC001", "DOC002", "DOC005")
def test_files_that_are_not_merges(write, tmp_path):
    assert "cannot be read" in messages(tmp_path / "missing.yml")[0]
    assert "cannot be read as YAML" in messages(write("merge_method: [monosoup"))[0]
    assert "appears twice" in messages(write("merge_method: monosoup\nmerge_method: linear\n"))[0]
    assert "must be a mapping" in messages(write("- a\n- b\n"))[0]
    assert "is empty" in messages(write("# nothing\n"))[0]


@pytest.mark.finds("DOC003", "DOC004")
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


def test_findings_name_their_stage_or_document(write, models):
    base, tuned = models
    good = {"merge_method": "monosoup", "base_model": base, "models": [{"model": tuned[0]}]}
    bad = good | {"dtype": "float33"}
    for first, label in ((bad, "document 1"), ({"name": "one"} | bad, "stage one")):
        message = messages(write(yaml.safe_dump_all([first, good])))[-1]
        assert message.startswith(f"{label}: dtype: 'float33' is not a dtype")
    (message,) = messages(write("[1]\n---\n" + yaml.safe_dump(good)))
    assert message == "document 1: top level: must be a mapping, not list"


def test_two_stages_of_one_name_are_both_looked_at(write, models):
    stages = [{"name": "twin", "merge_method": "linear", key: 1} for key in ("alpah", "bteta")]
    found = messages(write(yaml.safe_dump_all(stages)))
    assert any("alpah" in m for m in found) and any("bteta" in m for m in found)


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
            assert finding.message and finding.code


def merge(*models: str, **keys: str) -> str:
    listed = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return yaml.safe_dump({**keys, "merge_method": "linear", "models": listed})


@pytest.mark.finds("DOC006")
def test_stages_without_names_of_their_own(write, models):
    base, _ = models

    def found(*documents: str) -> list[str]:
        path = write("\n---\n".join(documents))
        with pytest.raises(ValueError, match=r"Duplicate merge name|Multiple unnamed"):
            load_config(path.read_text(), "between")
        return messages(path)

    twice = found(merge(base, name="a"), merge(base, name="a"), merge("a"))
    assert twice == ["stage a: is the name of 2 merges: mergekit-multi stops"]
    (nameless,) = found(merge(base, name="a"), merge("a"), merge(base))
    assert "2 of 3 merges have no `name`" in nameless


@pytest.mark.finds("DOC007")
@pytest.mark.parametrize("spelling", ["b", "b@main", "b+some/adapter"])
def test_stages_that_need_each_other(write, models, spelling):
    base, _ = models
    stages = merge(spelling, name="a"), merge("a", base, name="b"), merge("b")
    message = messages(write("\n---\n".join(stages)))[0]
    assert message.endswith("no stage can be the first of a circle: b needs a needs b") or (
        message.endswith("no stage can be the first of a circle: a needs b needs a")
    )
    chain = merge(base, name="a"), merge("a", base, name="b"), merge("b")
    assert messages(write("\n---\n".join(chain))) == []
