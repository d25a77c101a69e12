"""Whether base and fine-tune look swapped, by the files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_monosoup.checkpoints.lineage import looks_swapped, parent


def card(base_model: object) -> str:
    return f"---\nlicense: mit\nbase_model: {json.dumps(base_model)}\n---\n# A model\n"


def folder(place: Path, readme: str = "", loaded_from: str = "") -> str:
    place.mkdir(parents=True)
    if readme:
        (place / "README.md").write_text(readme)
    if loaded_from:
        (place / "config.json").write_text(json.dumps({"_name_or_path": loaded_from}))
    return str(place)


@pytest.mark.parametrize(
    ("readme", "loaded_from", "expected"),
    [
        (card("a/base"), "", "a/base"),
        (card(["a/base"]), "/content/base", "a/base"),
        ("", "/content/base", "/content/base"),
        (card(["a/base", "b/other"]), "", ""),  # a merge has no one parent
        ("no front matter", "", ""),
        ("---\nbase_model: [\n---\n", "", ""),
        ("---\n- a\n---\n", "", ""),
        ("", "", ""),
    ],
)
def test_what_a_model_was_made_of(readme, loaded_from, expected, tmp_path):
    assert parent(folder(tmp_path / "m", readme, loaded_from))[0] == expected


BASE, TUNED = "org/base", "org/base-math"


@pytest.mark.parametrize(
    ("base", "tuned", "made_of", "alarm"),
    [
        (TUNED, BASE, BASE, True),  # swapped: the base says that it was made of the fine-tune
        ("./base-math", "./models/Base", BASE, True),
        (BASE, TUNED, "", False),
        (BASE, TUNED, "org/older", False),
        ("org/base-Instruct", "org/base-Instruct-math", BASE, False),
        # A mirror of the base, and a fine-tune in a folder of the same name.
        ("mirror/base", "./base", BASE, False),
        (BASE, TUNED, BASE, False),  # saved again, it names itself
    ],
)
def test_swapped(base, tuned, made_of, alarm, tmp_path):
    base_folder = folder(tmp_path / "a", card(made_of) if made_of else "")
    found = list(looks_swapped((base, base_folder), (tuned, folder(tmp_path / "b"))))
    assert len(found) == alarm
    assert all(base in text and made_of in text for text in found)


def test_models_that_name_each_other(tmp_path):
    base = folder(tmp_path / "a", card(TUNED))
    tuned = folder(tmp_path / "b", loaded_from=BASE)
    assert list(looks_swapped((BASE, base), (TUNED, tuned))) == []
