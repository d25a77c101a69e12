"""A good merge to spoil, and proof that a test produces the codes that it says.

``@pytest.mark.finds("KEY101")`` on a test: one of its checks finds something under that code.
test_list.py reads these marks: every code has one.
"""

from __future__ import annotations

import pytest
import yaml
from helpers import checkpoints

from mergekit_monosoup.check import Check


def pytest_configure(config):
    config.addinivalue_line("markers", "finds(*codes): codes of checks that the test produces")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[str, list[str]]:
    """A base model and two fine-tunes of it."""
    base, tuned = checkpoints.pair(tmp_path_factory.mktemp("check"), tuned=2)
    return str(base), [str(t) for t in tuned]


@pytest.fixture
def write(tmp_path, models):
    """Writes a good configuration with some keys replaced (None removes one); returns its path."""

    def make(text: str | None = None, **changes):
        base, tuned = models
        config = {
            "merge_method": "monosoup",
            "base_model": base,
            "models": [{"model": tuned[0]}],
        } | changes
        path = tmp_path / "merge.yml"
        path.write_text(
            text
            or yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False)
        )
        return path

    return make


@pytest.fixture(autouse=True)
def _marked_codes_are_found(request, monkeypatch):
    expected = {code for mark in request.node.iter_markers("finds") for code in mark.args}
    found = set()
    call = Check.__call__

    def recording(self, subject):
        for finding in call(self, subject):
            assert finding.level in self.levels, f"{self.code} does not say that it may be this"
            found.add(finding.code)
            yield finding

    monkeypatch.setattr(Check, "__call__", recording)
    yield
    assert expected <= found, f"{expected - found} were not found"
