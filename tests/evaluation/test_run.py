"""Errors of the program evaluation.run: one line that names what is wrong."""

from __future__ import annotations

import shutil

import pytest
from helpers.runs import start

from evaluation import run
from evaluation.suite import SHIPPED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such", "--model", "a=b"], "shipped suites"),
        (["tiny", "--model", "a=/no/such/folder"], "/no/such/folder: no such folder"),
        (["tiny", "--model", "a=b", "--model", "a=c"], "two models have the same name"),
        (["tiny", "--model", "a=none.yml"], "none.yml: no such file"),
        (
            ["tiny", "--model", "a=tests", "--dtype", "float31"],
            "--dtype float31: not one of torch's",
        ),
        (["tiny", "--model", "a=tests", "--device", "gpu"], "--device gpu"),
        (
            ["tiny", "--model", "a=tests", "--device", "meta"],
            "--device meta: lm-eval's hf models run on",
        ),
        (["tiny", "--model", "a=tests", "--backend", "vllm"], "vLLM is not installed"),
    ],
)
def test_an_error_is_one_line(arguments, message, capsys, tmp_path):
    assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(["tiny", "--model", "a=b", "--out", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gone", ["tokenizer.json", "model.safetensors", "config.json", "mergekit_config.yml"]
)
def test_a_damaged_checkpoint_is_named(models, tmp_path, gone, capsys):
    copy = shutil.copytree(models / "finetuned", tmp_path / "copy")
    for file in copy.glob("tokenizer*") if gone == "tokenizer.json" else [copy / gone]:
        file.write_text("{")
    assert (
        start(models, tmp_path / "out", "--model", f"broken={copy}", "--limit", "2", names=()) == 1
    )
    assert str(copy) in capsys.readouterr().err


def test_a_chat_template_that_is_not_there(models, tmp_path, capsys):
    suite = tmp_path / "chat.yml"
    suite.write_text((SHIPPED / "tiny.yml").read_text() + "\nchat_template: true\n")
    assert start(models, tmp_path / "out", "--limit", "2", suite=str(suite)) == 1
    assert "no chat template, which suite chat asks for" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert run.main(["tiny", "--model", f"a={tmp_path}", "--out", str(tmp_path / "out")]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_a_bad_merge_configuration_is_found_before_merging(models, tmp_path, capsys):
    bad = tmp_path / "bad.yml"
    bad.write_text((models / "soup.yml").read_text().replace("R: 0.7", "r: 0.7"))
    assert run.main(["tiny", "--model", f"a={bad}", "--out", str(tmp_path / "out")]) == 1
    assert "monosoup has no such parameter" in capsys.readouterr().err


def test_names_that_cannot_be_files(capsys):
    with pytest.raises(SystemExit):
        run.main(["tiny", "--model", "a/b=c"])
    assert "is not NAME=PATH" in capsys.readouterr().err
