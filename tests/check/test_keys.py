"""Keys and their values, parameters aside."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from helpers.findings import messages
from mergekit import merge_methods

from mergekit_monosoup.cli import main

finds = pytest.mark.finds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param(
            {"base_modle": "x"},
            "base_modle: unknown key, mergekit ignores it; did you mean `base_model`?",
            marks=finds("KEY101"),
        ),
        pytest.param(
            {"models": None},
            "Exactly one of 'models', 'slices', or 'modules'",
            marks=finds("KEY102"),
        ),
        pytest.param(
            {"merge_method": "monosup"},
            "'monosup' is not a merge method; did you mean `monosoup`?",
            marks=finds("KEY103"),
        ),
        pytest.param(
            {"dtype": "float33"}, "dtype: 'float33' is not a dtype", marks=finds("KEY104")
        ),
    ],
)
def test_what_mergekit_drops_or_says_badly(write, changes, words):
    path = write(**changes)
    found = messages(path)
    assert any(words in message for message in found), found
    assert CliRunner().invoke(main, ["check", str(path)]).exit_code == 1


@finds("KEY102")
def test_one_mistake_is_one_finding_not_every_member_of_a_union(write):
    found = messages(write(parameters={"R": [[0.1]]}))
    assert "parameters.R: must be a value, a list of values" in found[0]
    assert len(found) <= 2


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"merge_method": None, "merge_methd": "monosoup"}, "merge_methd"),
        ({"base_model": None, "base_modle": "x"}, "base_modle"),
        ({"models": None, "modls": []}, "modls"),
        ({"models": [{"modle": "x"}]}, "models[0].modle"),
        ({"parameters": {"alpha": [{"filter": "mlp", "valu": 0.5}]}}, "parameters.alpha"),
        (
            {"parameters": {"alpha": [{"filtr": "mlp", "value": 0.5}, {"value": 0.1}]}},
            "parameters.alpha",
        ),
        ({"parameters": {"alpha": None}}, "parameters.alpha"),
        ({"models": [{"model": "a+b+c"}]}, "top level"),
        ({"models": [{"model": None}]}, "models[0].model"),
    ],
)
def test_one_mistake_is_one_finding(write, changes, place):
    """What is missing because its key is misspelt is not missing, too."""
    (message,) = messages(write(**changes))
    assert message.startswith(f"{place}: ")


@finds("KEY101")
def test_keys_below_a_model(write, models):
    found = messages(write(models=[{"model": models[1][0], "weigth": 1}]))
    assert any("models[0].weigth: unknown key" in m for m in found)


@finds("KEY101")
def test_models_below_keys_of_their_own(write, models):
    """`tokens` maps tokens to what they are made from, one of several kinds with their own keys."""
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


@finds("KEY105")
def test_narrower_output_is_mentioned(write):
    path = write(dtype="float32", out_dtype="bfloat16")
    assert "rounds to it after the method" in messages(path, "warning")[0]
    assert messages(write(dtype="bfloat16", out_dtype="float32"), "warning") == []


def test_a_switched_off_package_is_no_typing_error(write, monkeypatch):
    """MERGEKIT_MONOSOUP_AUTOLOAD=0 keeps mergekit from knowing the methods, as asked."""
    others = [
        m for m in merge_methods.registered_methods() if m.spec.name not in ("monosoup", "svc")
    ]
    monkeypatch.setattr(merge_methods, "registered_methods", lambda: others)
    monkeypatch.setenv("MERGEKIT_MONOSOUP_AUTOLOAD", "0")
    (message,) = messages(write())
    assert "this package is switched off by MERGEKIT_MONOSOUP_AUTOLOAD=0" in message
