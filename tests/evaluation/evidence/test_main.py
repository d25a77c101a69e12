"""The program `python -m evaluation.evidence`: options, and how failures are told."""

from __future__ import annotations

import pytest

from evaluation.evidence import __main__ as program


@pytest.mark.parametrize("option", ["--processes", "--limit"])
def test_zero_of_anything_is_refused(option, capsys):
    """`--limit 0` would write into docs/ as if there were no limit."""
    with pytest.raises(SystemExit):
        program.main([option, "0"])
    assert "is not a positive number" in capsys.readouterr().err


def test_a_seed_that_fails_is_told_with_the_end_of_its_log(tmp_path, capsys, monkeypatch):
    def fails(world, seed, options, log, advance):
        log.write_text("before\nerror: no room left\n")
        return 1

    monkeypatch.setattr(program, "_run_one", fails)
    code = program.main(
        ["--world", "sums", "--seeds", "3", "--out", str(tmp_path), "--docs", str(tmp_path)]
    )
    told = capsys.readouterr().err
    assert (
        code == 1 and "sums, seed 3 failed" in told and "no room left" in told and "again" in told
    )


def test_an_interrupt_is_exit_code_130(tmp_path, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_run_all", interrupted)
    assert program.main(["--seeds", "3", "--out", str(tmp_path)]) == 130
