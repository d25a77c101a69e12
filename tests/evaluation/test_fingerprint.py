"""What a result depends on."""

from __future__ import annotations

from evaluation import fingerprint
from evaluation.engines import ENGINES


def test_only_the_versions_that_decide_an_answer_count():
    """A new NumPy must not cost the results of a night."""
    installed = fingerprint.versions()
    assert {"numpy", "mergekit"} <= set(installed)
    assert set(fingerprint.deciding(installed, ENGINES["language"].packages)) == {
        "lm-eval",
        "transformers",
        "torch",
    }


def test_code_counts_at_any_depth_by_its_place(tmp_path):
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "a.py").write_text("1")
    first = fingerprint.of_tree(tmp_path, "*.py")
    (tmp_path / "kernel" / "a.py").write_text("2")
    second = fingerprint.of_tree(tmp_path, "*.py")
    (tmp_path / "kernel" / "a.py").rename(tmp_path / "a.py")
    assert len({first, second, fingerprint.of_tree(tmp_path, "*.py")}) == 3
