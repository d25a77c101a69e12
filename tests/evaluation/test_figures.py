"""The program evaluation.figures."""

from __future__ import annotations

from evaluation import figures


def test_files(folder, tmp_path, capsys):
    assert figures.main([str(folder), "--out", str(tmp_path / "drawn")]) == 0
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert written == ["made-bars.png", "made-plane.png"]
    assert "made-plane.png" in capsys.readouterr().out
    assert figures.main([str(folder), "--reference", "nobody"]) == 1
