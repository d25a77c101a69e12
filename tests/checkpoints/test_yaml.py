"""YAML of which no key may appear twice, and which ends in one line whatever it says."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import (
    MOST_BYTES,
    PlainLoader,
    UniqueKeyLoader,
    parse_documents,
    read_document,
    read_documents,
)


def load(text: str):
    return yaml.load(text, Loader=UniqueKeyLoader)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b:\n  a: 1\n  a: 1", "- {a: 1, a: 2}"])
def test_a_key_that_appears_twice(text):
    with pytest.raises(yaml.YAMLError, match="appears twice"):
        load(text)
    assert yaml.load(text, Loader=PlainLoader) == yaml.safe_load(text)


def test_equal_keys_apart_and_merge_keys_are_fine():
    assert load("a: {k: 1}\nb: {k: 2}") == {"a": {"k": 1}, "b": {"k": 2}}
    assert load("x: &x {k: 1, m: 1}\ny:\n  <<: *x\n  k: 2")["y"] == {"k": 2, "m": 1}


def doubling(first: str, again: str) -> str:
    lines = [f"a{i}: &a{i} {again.format(i - 1, i - 1)}\n" for i in range(1, 60)]
    return f"a0: &a0 {first}\n" + "".join(lines)


ENDLESS = {
    "a: &a [*a]": r"\*a stands inside of &a itself in line 1, column 8",
    "a: &a\n  b: [{c: *a}]": "inside of &a",
    "a: &a\n  <<: *a": "inside of &a",
    doubling("[x, x]", "[*a{}, *a{}]"): "more than 50000 values",
    doubling("{x: 1}", "{{<<: [*a{}, *a{}]}}"): "more than 50000 values",
    "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)).replace("*a0", "x"): "more than",
    "[" * 100_000: "nest",
    "{a: " * 5000: "more than 40 levels",
    "- " * 100_000: "more than 40 levels",
    "---\n" * 60_000: "more than 500 documents",
}
WRONG = {
    "a: " + "9" * 5000: "kind `int` in line 1",
    "a: 0x" + "f" * 5000: "more than 64 bits",
    "a: 1" + ":1" * 5000: "more than 64 bits",
    "a: 2020-13-45": "kind `timestamp`",
    "a: !!timestamp x": "kind `timestamp`",
    "a: !!bool maybe": "kind `bool`",
    "a: !!float x": "kind `float`",
    "a: !!binary x": "base64",
    "2020-01-01: a": "key must be text, not date",
    "!!binary aGk=: a": "key must be text, not bytes",
    "? [1]\n: a": "key must be text, not list",
    'a: "\\ud800"': "invalid Unicode|surrogate",
    "<<: 3": "expected a mapping",
    "a: *b": "undefined alias",
    "a:\n\t- b": "cannot start any token",
    "a: \0": "#x0000",
    "!!python/object/apply:os.getcwd []": "could not determine a constructor",
    "%YAML 2.0\n---\na: 1": "incompatible",
}


@pytest.mark.parametrize(
    ("text", "reason"),
    (ENDLESS | WRONG).items(),
    ids=[*(f"endless{i}" for i in range(len(ENDLESS))), *(f"wrong{i}" for i in range(len(WRONG)))],
)
def test_what_cannot_be_read_is_said_in_one_line_and_at_once(text, reason):
    started = time.process_time()
    with pytest.raises(UnreadableError, match=reason) as caught:
        parse_documents(text)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 2


def test_without_libyaml_a_surrogate_is_refused_too():
    with pytest.raises(yaml.YAMLError, match="surrogate"):
        load('a: "\\ud800"')


def test_values_that_yaml_may_hold_stay():
    text = "\ufeffa: [.nan, -.inf, 1e3, ~, yes, 0o7, 2020-01-01]\nb: &b {c: 1}\nd: [*b, *b]"
    assert repr(parse_documents(text)) == repr(list(yaml.safe_load_all(text)))


def special_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "large").write_bytes(b"a" * (MOST_BYTES + 1))
    (folder / "utf-16").write_text("a: 1", encoding="utf-16")
    (folder / "latin-1").write_bytes("a: 1\nb: é".encode("latin-1"))
    return {
        folder: "it is a folder",
        folder / "pipe": "it is a pipe",
        "/dev/zero": "it is a device",
        folder / "large": "larger than 256 kB",
        folder / "utf-16": "UTF-16, save it as UTF-8",
        folder / "latin-1": "byte 0xe9 in line 2",
        folder / "missing": "No such file",
        folder / ("x" * 5000): "name too long",
        "a\0b": "no file can have this name",
    }


def test_what_lies_under_a_name_and_is_no_text_file(tmp_path):
    for path, reason in special_files(tmp_path).items():
        with pytest.raises(UnreadableError, match=reason):
            read_documents(path)


def test_one_document_where_one_is_wanted(tmp_path):
    (tmp_path / "two.yml").write_text("a: 1\n---\nb: 1")
    with pytest.raises(UnreadableError, match="2 documents"):
        read_document(tmp_path / "two.yml")
    (tmp_path / "none.yml").write_text("# nothing")
    assert read_document(tmp_path / "none.yml") is None
