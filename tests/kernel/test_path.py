"""A tensor's path through the package: few files, few frames, none of them anonymous."""

from __future__ import annotations

import traceback
from itertools import groupby
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_tensors

import mergekit_monosoup
from mergekit_monosoup.kernel import assemble, spectrum

PACKAGE = Path(mergekit_monosoup.__file__).parent


@pytest.mark.parametrize("method", ["monosoup", "svc"])
def test_from_the_task_to_the_rounded_weight(method, monkeypatch):
    """At most 8 frames and 7 files are on the stack where the weight is rounded."""
    stacks = []
    original = assemble.flat

    def noted(block):
        stacks.append(traceback.extract_stack()[:-1])
        return original(block)

    monkeypatch.setattr(assemble, "flat", noted)
    torch.manual_seed(0)
    base = torch.randn(24, 16)
    tuned = [base + 0.1 * torch.randn(24, 16) for _ in range(2)]
    merge_tensors([base, *tuned], method, base_index=0)
    assert stacks
    for stack in stacks:
        frames = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
        files = [file for file, _ in groupby(frame.filename for frame in frames)]
        names = [frame.name for frame in frames]
        assert len(names) <= 8, names
        assert len(files) == len(set(files)) <= 7, files
        assert not any(name.startswith("<") for name in names), names


def test_the_spectrum_adds_the_solvers_alone(monkeypatch):
    """The Gram matrix is made on the same path, two frames deeper; solvers never see the tensor."""
    stacks = []
    original = spectrum.gram

    def noted(*arguments):
        stacks.append(traceback.extract_stack()[:-1])
        return original(*arguments)

    monkeypatch.setattr(spectrum, "gram", noted)
    base = torch.randn(24, 16)
    merge_tensors([base, base + 0.1 * torch.randn(24, 16)], "monosoup", base_index=0)
    frames = [frame for frame in stacks[0] if Path(frame.filename).is_relative_to(PACKAGE)]
    assert [frame.name for frame in frames] == [
        "_monosoup",
        "_merge_matrices",
        "in_order",
        "edit",
        "_edit",
        "__init__",
    ]
