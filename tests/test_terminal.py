"""What a terminal is shown: names from files, in any encoding, on outputs that fail."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import evaluations
from safetensors.torch import save_file

from evaluation import tables
from mergekit_monosoup import terminal
from mergekit_monosoup.cli import main
from mergekit_monosoup.report import Record

NAMES = {
    "model.layers.0.mlp.up[/b].weight": "up[/b]",
    "[bold]b.weight": "[bold]b",
    ":smile:.weight": ":smile:",
    "a\x1b[31mred.weight": r"a\x1b[",
    "two\nlines.weight": r"two\nlines",
    "\u202etdib.weight": r"\u202etdib",
    r"$\frac{$.weight": r"$\frac{$",
    "x².weight": "x²",
    "ends in \\": "ends in \\",
    "layers." + "9" * 5000 + ".weight": "layers.*",
}
"""Names that rich, a terminal or int() would take for something else, and how they are shown."""


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert not set(result.output) & set("\x1b\u202e\0"), "it would reach the terminal"
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report, and three models, of tensors with such names."""
    folder = tmp_path_factory.mktemp("names")
    for number, model in enumerate(("base", "one[b]", "two")):
        torch.manual_seed(0)
        tensors = {name: torch.randn(4, 3) for name in NAMES}
        torch.manual_seed(number)
        (folder / model).mkdir()
        moved = {name: w + bool(number) * torch.randn(4, 3) for name, w in tensors.items()}
        save_file(moved, folder / model / "model.safetensors")
    lines = [
        Record(name=name, shape=(4, 3), dtype="float32", action="copied", reason=f"{name}!")
        for name in NAMES
    ]
    (folder / "r.jsonl").write_text("".join(line.to_json() + "\n" for line in lines))
    return folder


def test_the_report_shows_names_as_they_are(folder):
    output = invoke("report", folder / "r.jsonl")
    assert [shown for shown in NAMES.values() if shown not in output] == []
    assert json.loads(invoke("report", folder / "r.jsonl", "--json"))


@pytest.mark.parametrize("options", [[], ["--layers"]], ids=["means", "layers"])
def test_inspect_shows_names_as_they_are(folder, options):
    models = folder / "base", folder / "one[b]", "--cosine", folder / "two"
    output = invoke("inspect", *models, *options)
    assert [shown for shown in NAMES.values() if shown.split(".")[-1] not in output] == []
    assert "one[b]" in output


def test_soup_and_check_show_names_as_they_are(folder, tmp_path):
    models = folder / "one[b]", folder / "two", "--base", folder / "base"
    output = invoke("soup", *models, "--threshold", 0.5, "--out", tmp_path / "soup.yml")
    assert "one[b]: first" in output
    path = tmp_path / "bad\x1b.yml"
    path.write_text('{merge_method: linear, "a\\e[31m\\nb": 1, models: [{model: "x\\nerror"}]}')
    output = invoke("check", path)
    assert r"a\x1b[31m\nb: unknown key" in output and r"x\nerror: no such file" in output
    assert len(output.splitlines()) == output.count("error  ") + 1
    assert r"bad\x1b.yml" in invoke("report", tmp_path / "bad\x1b.yml")


def test_tables_of_evaluation_show_titles_as_they_are(tmp_path, capsys):
    for model, answers in (("finetuned", evaluations.TUNED), ("soup", evaluations.SOUP)):
        made = evaluations.suite(title="[/b] \x1b[31m\nnext λ")
        evaluations.write(tmp_path, model, answers, made=made)
    for form in ([], ["--latex"], ["--csv"]):
        assert tables.main([str(tmp_path), *form]) == 0
        output = capsys.readouterr().out
        assert "\x1b" not in output and (form == ["--csv"] or r"[/b] \x1b[31m\nnext λ" in output)


def test_long_text_loses_its_middle():
    assert terminal.shortened("x" * 2000) == "x" * 2000
    short = terminal.shortened("a" + "x" * 100_000 + "b", 100)
    assert len(short) <= 100 and short[0] == "a" and short[-1] == "b" and "99902 more" in short


# -- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp437", "ascii", "utf-16"])
def test_what_an_encoding_lacks_is_replaced(encoding, folder, tmp_path, monkeypatch):
    evaluations.write(tmp_path, "finetuned", evaluations.TUNED)
    evaluations.write(tmp_path, "soup", evaluations.SOUP)
    for program, arguments, expected in (
        (lambda a: main.main(a, standalone_mode=False), ["report", str(folder / "r.jsonl")], "W0"),
        (lambda a: main.main(a, standalone_mode=False), ["parameters"], "ceil(exp(entropy of"),
        (tables.main, [str(tmp_path)], "Scores, %"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        program(arguments)
        assert expected in written.getvalue().decode(encoding)


def test_replacements_look_alike():
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    with terminal.output():
        stream.reconfigure(errors=terminal.REPLACING)
        stream.write("λ_high ‖ΔW‖ − é ─ \udc80")
        stream.flush()
    assert written.getvalue() == b"l_high |DW| - ? - ?"


class Failing(io.RawIOBase):
    """A file on a full disk, or a pipe that nobody reads."""

    def __init__(self, number: int):
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        if self.number:
            raise OSError(self.number, "it failed")
        return len(content)


@pytest.mark.parametrize(
    ("number", "line"),
    [(errno.ENOSPC, "Error: the output cannot be written: it failed\n"), (errno.EPIPE, "")],
)
def test_an_output_that_fails(number, line, folder, tmp_path, monkeypatch, capsys):
    evaluations.write(tmp_path, "finetuned", evaluations.TUNED)
    for program, arguments in (
        (main.main, ["report", str(folder / "r.jsonl")]),
        (main.main, ["parameters"]),
        (tables.main, [str(tmp_path)]),
    ):
        raw = Failing(number)
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            program(arguments)
        assert ended.value.code == 1 and capsys.readouterr().err == line
        raw.number = 0  # Python closes it


def test_an_error_of_another_file_is_not_the_outputs():
    with pytest.raises(FileNotFoundError), terminal.output():
        Path("/no/such/file").read_text()
