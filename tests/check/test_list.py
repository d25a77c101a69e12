"""The list of checks, and the command: codes, --list, --ignore, --json, exit codes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.hub import local

from mergekit_monosoup import check as package
from mergekit_monosoup.check import CHECKS, Finding, check, table
from mergekit_monosoup.cli import main

HERE = Path(__file__).parent
DOCS = (HERE.parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
SUBJECTS = {
    "DOC0": "document",
    "KEY1": "keys",
    "PAR2": "parameters",
    "MOD3": "models",
    "PLAN4": "plan",
    "TEN5": "tensors",
    "FOL6": "folder",
}

# What a model's files are, and how their tensors are named: of two subjects, in one file.
BESIDES = {("files", "MOD3"), ("files", "TEN5")}


def command(*arguments: object):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


# -- the list --------------------------------------------------------------------------------------


def test_codes_are_unique_and_in_order():
    codes = [check.code for check in CHECKS]
    assert len(set(codes)) == len(codes)
    subjects = list(SUBJECTS)
    keys = [(subjects.index(re.sub(r"\d\d$", "", code)), code) for code in codes]
    assert keys == sorted(keys), "the table of contents is in the order of the codes"


@pytest.mark.parametrize("entry", CHECKS, ids=lambda entry: entry.code)
def test_each_check_stands_in_the_file_of_its_subject_and_has_a_test_there(entry):
    subject = entry.look.__module__.removeprefix("mergekit_monosoup.check.")
    assert subject == SUBJECTS[entry.code[:-2]] or (subject, entry.code[:4]) in BESIDES
    tests = (HERE / f"test_{subject}.py").read_text(encoding="utf-8")
    marked = {code for mark in re.findall(r"finds\(([^)]*)\)", tests) for code in mark.split(",")}
    assert f'"{entry.code}"' in {code.strip() for code in marked}, (
        "mark a test that produces it with `finds`; conftest.py sees to it that it does"
    )


@pytest.mark.parametrize("subject", [*SUBJECTS.values(), *{name for name, _ in BESIDES}])
def test_no_check_is_left_out_of_the_list(subject):
    made = {v for v in vars(getattr(package, subject)).values() if isinstance(v, package.Check)}
    assert made and made <= set(CHECKS)


def test_list_and_docs_show_the_same_table():
    assert command("--list").output.strip() == table(CHECKS)
    shown = re.search(r"<!-- generated.*?-->\n(.*?)\n<!--", DOCS, flags=re.S)
    assert shown and shown[1] == table(CHECKS), "paste `mergekit-monosoup check --list` there"
    for entry in CHECKS:
        assert entry.title and entry.advice and entry.levels
        assert "|" not in entry.title + entry.advice


def test_the_commands_of_the_docs_run(hub, tmp_path):
    (block,) = re.findall(r"^```bash\n(.*?)^```", DOCS, flags=re.M | re.S)
    program, name, config = shlex.split(block)
    assert (program, name) == ("mergekit-monosoup", "check")
    assert command(local(HERE.parents[1] / config, hub, tmp_path)).exit_code == 0


# -- the command -----------------------------------------------------------------------------------


def test_a_good_file_is_fine(write):
    R = [{"filter": "mlp", "value": [0.9, 0.6]}, {"value": "8e-1"}]
    path = write(parameters={"mode": "variance", "R": R, "report": "r.jsonl"})
    assert check(path) == []
    result = command(path)
    assert result.exit_code == 0 and "fine" in result.output


def test_text_shows_code_and_place(write):
    result = command(write(parameters={"R": 7}))
    assert result.exit_code == 1
    error, warning, total = result.output.splitlines()
    assert error.startswith("error  PAR207  parameters.R: merge method monosoup: `R` must be")
    assert warning.startswith("warning  PAR212  R: is read by `mode: variance` only")
    assert total.endswith("1 error(s), 1 warning(s)")


def test_json_output(write):
    result = command(write(parameters={"R": 7}), "--json")
    finding, remark = json.loads(result.output)
    assert finding["level"] == "error" and finding["where"] == "parameters.R"
    assert remark["level"] == "warning"
    assert (finding["code"], remark["code"]) == ("PAR207", "PAR212")
    assert set(finding) == {"level", "where", "message", "code"}


def test_warnings_do_not_fail(write):
    assert command(write(parameters={"R": 0.5})).exit_code == 0


# -- ignoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--ignore", "PAR212", "--ignore", "KEY105"],
        ["--ignore", "PAR212,KEY105"],
        ["--ignore", " par212, key105,"],
    ],
)
def test_warnings_can_be_ignored(write, options):
    path = write(parameters={"R": 0.5}, dtype="float32", out_dtype="bfloat16")
    assert {finding.code for finding in check(path)} == {"PAR212", "KEY105"}
    result = command(path, *options)
    assert result.exit_code == 0 and "fine" in result.output
    (left,) = check(path, ignore=["PAR212"])
    assert left.code == "KEY105"


def test_an_error_cannot_be_ignored(write):
    result = command(write(parameters={"R": 7}), "--ignore", "PAR207")
    assert result.exit_code == 2
    assert "PAR207 (wrong value of a parameter) is an error and cannot be ignored" in result.output


def test_of_a_code_with_both_levels_only_warnings_are_ignored(monkeypatch, write):
    found = [Finding("error", "a", "b", "TEN509"), Finding("warning", "a", "b", "TEN509")]
    monkeypatch.setattr(package, "_OF_FILE", (lambda file: found,))
    assert check(write(), ignore=["TEN509"]) == found[:1]


def test_an_unknown_code_names_the_near_ones(write):
    result = command(write(), "--ignore", "PAR21")
    assert result.exit_code == 2 and "'PAR21' is not the code of a check" in result.output
    assert "near: PAR21" in result.output
    assert "known: DOC001, " in command(write(), "--ignore", "xxx").output


def test_files_are_not_looked_at_before_the_codes(tmp_path):
    with pytest.raises(ValueError, match="not the code of a check"):
        check(tmp_path / "missing.yml", ignore=["NONE1"])
