"""What is changed at random, and by which commands it is read; a file for each kind of input."""

from __future__ import annotations

from fuzz.subjects import (
    adapters,
    beside,
    configurations,
    names,
    places,
    questions,
    reports,
    results,
    scores,
    suites,
    texts,
    weights,
)

SUBJECTS = {
    subject.__name__.rpartition(".")[2]: subject.commands
    for subject in (
        configurations,
        weights,
        beside,
        reports,
        results,
        suites,
        questions,
        scores,
        names,
        places,
        texts,
        adapters,
    )
}
"""By name: writes the files of a case into a place and returns the commands that read them."""
