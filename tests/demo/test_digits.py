"""`python -m demo --world digits` with models that learned next to nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo.__main__ import main


@pytest.mark.slow
def test_the_whole_of_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="needs the extra vision")
    from evaluation.worlds import digits, digits_training

    phase = digits_training.Phase(steps=2, batch=4, learning_rate=1e-3)
    hasty = {
        name: replace(architecture, pretraining=phase, finetuning=phase)
        for name, architecture in digits_training.ARCHITECTURES.items()
    }
    monkeypatch.setattr(digits_training, "ARCHITECTURES", hasty)
    monkeypatch.setattr(digits, "TEST_IMAGES", 20)
    by_hand = digits.Images(*(part[:20] for part in digits.handwritten()))
    monkeypatch.setattr(digits, "handwritten", lambda: by_hand)
    out = tmp_path / "out"
    assert main(["--world", "digits", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "5. ConvNeXt: accuracy" in shown and "conv_dw" in shown and "monosoup_R0.8" in shown
    assert (out / "vit" / "results" / "scalar_free.digits.json").is_file()
    assert main(["--world", "digits", "--out", str(out), "--seed", "1"]) == 1
    assert "of another world or seed" in capsys.readouterr().out
    assert main(["--out", str(out)]) == 1, "the other world does not fit either"
