"""The program evaluation.figures."""

from __future__ import annotations

from evaluation import drawings, figures


def test_files(folder, tmp_path, capsys):
    assert figures.main([str(folder), "--out", str(tmp_path / "drawn")]) == 0
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert written == ["made-bars.png", "made-plane.png"]
    assert "made-plane.png" in capsys.readouterr().out
    assert figures.main([str(folder), "--reference", "nobody"]) == 1


def test_a_full_disk_keeps_the_earlier_figure(folder, monkeypatch, capsys):
    assert figures.main([str(folder)]) == 0
    before = sorted((p.name, p.read_bytes()) for p in folder.glob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawings.files.os, "fsync", full)
    assert figures.main([str(folder)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted((p.name, p.read_bytes()) for p in folder.glob("*")) == before
