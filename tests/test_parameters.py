"""Parameters and their rules stand in one place, and everybody reads that place."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import _mergekit_monosoup_autoload as hook
from mergekit_monosoup import calibrate, edit, methods
from mergekit_monosoup.kernel.monosoup import Settings
from mergekit_monosoup.parameters import (
    METHODS,
    MONOSOUP,
    SVC,
    agreement_violations,
    merged_violations,
    parameter_table,
    unread_violations,
    unused_violations,
    weight_violations,
)

SPECS = {method.spec.name: method.spec for method in methods.MERGE_METHODS}


def messages(violations) -> list[str]:
    return [f"{violation.parameter} {violation.message}" for violation in violations]


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_declare_what_is_listed(name):
    declared = {parameter.name: parameter.default for parameter in SPECS[name].parameters}
    assert declared == {p.name: p.default for p in METHODS[name].parameters}
    assert SPECS[name].contract.min_non_base == METHODS[name].fewest


def test_the_hook_names_the_same_methods():
    """It cannot read the list: every start of Python would import this package."""
    assert set(hook.NAMES) == set(METHODS) == set(SPECS)


@pytest.mark.parametrize(("kernel", "method"), [(edit, MONOSOUP), (calibrate, SVC)])
def test_the_kernels_have_the_same_defaults(kernel, method):
    keywords = inspect.signature(kernel).parameters
    for name in set(keywords) & {p.name for p in method.parameters} - {"merged"}:
        assert keywords[name].default == method[name].default, name


def test_settings_are_the_parameters_that_reach_the_kernel():
    of_the_merge = {"weight", "report"}
    assert {f.name for f in fields(Settings)} == {
        p.name for p in MONOSOUP.parameters
    } - of_the_merge


@pytest.mark.parametrize(
    ("method", "name", "value", "fault"),
    [
        (MONOSOUP, "R", 0.5, ""),
        (MONOSOUP, "R", 1, ""),
        (MONOSOUP, "R", 0, "must be a number in (0, 1], got 0"),
        (MONOSOUP, "R", float("nan"), "must be a number in (0, 1], got nan"),
        (MONOSOUP, "R", True, "must be a number in (0, 1], got True"),
        (MONOSOUP, "R", "0.5", "must be a number in (0, 1], got '0.5'"),
        (MONOSOUP, "R", None, "must be a number in (0, 1], got None"),
        (MONOSOUP, "min_rel_update", 10**400, f"must be a number >= 0, got {10**400}"),
        (MONOSOUP, "mode", "variance", ""),
        (MONOSOUP, "mode", ["variance"], "must be one of freevariance, variance, got ['variance']"),
        (MONOSOUP, "min_rel_update", float("inf"), ""),
        (MONOSOUP, "report", None, ""),
        (MONOSOUP, "report", 3, "must be a file path, got 3"),
        (SVC, "alpha", float("inf"), "must be a number > 0 and finite, got inf"),
        (SVC, "merged", 1, "must be true or false, got 1"),
        (SVC, "merged", False, ""),
    ],
)
def test_values(method, name, value, fault):
    assert method[name].fault(value) == fault


def test_the_rules():
    zero = "weight is 0 for every fine-tuned model; give at least one a weight > 0"
    assert messages(weight_violations(MONOSOUP, [0, 0.0])) == [zero]
    for weights in ([0, 1], [], [0, [0, 1]]):  # a gradient is no business of this rule
        assert not messages(weight_violations(MONOSOUP, weights))

    (message,) = messages(agreement_violations(MONOSOUP, "R", {"a": 0.5, "b": 0.8}))
    assert "the models disagree (a: 0.5, b: 0.8; the default is 0.8)" in message
    assert not messages(agreement_violations(MONOSOUP, "R", {"a": 0.5, "b": 0.5}))

    assert "is true for a, b; at most one" in messages(merged_violations("ab", "cd"))[0]
    assert "got c alone" in messages(merged_violations("a", "c"))[0]
    assert "got none" in messages(merged_violations("a", ""))[0]
    assert not messages(merged_violations("a", "", one_tensor=True))  # no task model has it
    assert not messages(merged_violations("a", "cd")) and not messages(merged_violations("", "c"))

    written = {"weight": [1.0, 2.0], "scaling": [1.0], "normalize": [True]}
    assert [v.parameter for v in unused_violations("a", written)] == ["weight", "normalize"]

    assert [v.parameter for v in unread_violations({"R": [0.9]})] == ["R"]
    assert not messages(unread_violations({"R": [0.9], "mode": ["variance"]}))
    assert not messages(unread_violations({"mode": ["freevariance"]}))


@pytest.mark.parametrize("name", METHODS)
def test_the_table_has_a_row_for_each(name):
    rows = parameter_table(name).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [p.name for p in METHODS[name].parameters]


def test_reading_parameters_imports_neither_torch_nor_mergekit():
    code = (
        "import sys, mergekit_monosoup.parameters; print({'torch', 'mergekit'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
