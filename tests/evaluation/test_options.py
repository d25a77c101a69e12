"""What the programs share: arguments, and how errors are printed."""

from __future__ import annotations

import argparse

import pytest

from evaluation import options
from evaluation.engines import EvaluationError
from evaluation.sources import SourceError
from evaluation.suite import SuiteError

ENDLESS = ["nan:1:0.1", "0:inf:0.1", "0:1:1e-300"]


def test_both_ends_of_a_range_count():
    tenths = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert options.numbers("0.5:0.95:0.05") == tenths
    assert len(options.numbers("0:1:0.1")) == 11 and options.numbers("0.5,0.8") == [0.5, 0.8]


@pytest.mark.parametrize("text", ["0.5:0.9", "0.9:0.5:0.1", "0:1:0", "a", "0.5,1.5", "", *ENDLESS])
def test_what_is_no_range_and_no_list_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        options.numbers(text)


def test_the_exit_code_says_how_it_ended(capsys):
    def fail(error):
        raise error

    assert options.exit_code(lambda: None) == 0
    for error in (SuiteError("a"), SourceError("b"), EvaluationError("c"), OSError("d")):
        assert options.exit_code(lambda error=error: fail(error)) == 1
    assert capsys.readouterr().err == "error: a\nerror: b\nerror: c\nerror: d\n"
    assert options.exit_code(lambda: fail(KeyboardInterrupt()), "; bye") == 130
    assert capsys.readouterr().err == "interrupted; bye\n"
    with pytest.raises(KeyError):
        options.exit_code(lambda: fail(KeyError("a defect is not hidden")))


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_name_that_would_lead_elsewhere_is_refused(name):
    assert options.named_path("a.b-1=x") == ("a.b-1", "x")
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=PATH"):
        options.named_path(f"{name}=x")
