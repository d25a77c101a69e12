"""YAML of which no key may appear twice."""

from __future__ import annotations

import pytest
import yaml

from mergekit_monosoup.checkpoints.yaml import UniqueKeyLoader


def load(text: str):
    return yaml.load(text, Loader=UniqueKeyLoader)


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "b:\n  a: 1\n  a: 1", "- {a: 1, a: 2}", "? [1]\n: 1\n? [1]\n: 2"]
)
def test_a_key_that_appears_twice(text):
    with pytest.raises(yaml.YAMLError, match=r"appears twice|unhashable"):
        load(text)


def test_equal_keys_apart_and_merge_keys_are_fine():
    assert load("a: {k: 1}\nb: {k: 2}") == {"a": {"k": 1}, "b": {"k": 2}}
    assert load("x: &x {k: 1, m: 1}\ny:\n  <<: *x\n  k: 2")["y"] == {"k": 2, "m": 1}


def test_it_runs_no_code():
    with pytest.raises(yaml.YAMLError):
        load("!!python/object/apply:os.getcwd []")
