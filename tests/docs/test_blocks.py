"""Every code block of the pages runs as printed, with small checkpoints in place of the hub's.

Commands run in this process where that is possible: a new one spends ten seconds on imports.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import checkpoints, pages
from helpers.hub import HUB, able, local, run
from mergekit.scripts import run_yaml
from rich.console import Console
from safetensors.torch import load_file

from demo import merge
from evaluation import local_tasks, tables
from evaluation import run as evaluation_run
from evaluation.suite import load as load_suite
from evaluation.worlds import training as train
from mergekit_monosoup import report
from mergekit_monosoup.cli import main

BASH = pages.blocks("bash")
(MERGE_YML,) = (block for block in pages.blocks("yaml") if block.page == "README.md")
# A suite of one's own questions, and the files that it names.
(SUITE_YML,) = (block for block in pages.blocks("yaml") if "questions:" in block.text)
MERGES = [block for block in pages.blocks("yaml") if block != SUITE_YML]
# What each of our commands must print, at least. A command that is not here has no test.
PRINTS = {
    "check merge.yml": "merge.yml: fine",
    "check configs/monosoup.yml": "monosoup.yml: fine",
    "report report.jsonl": "layers.*.mlp.up_proj",
    "report monosoup-report.jsonl": "layers.*.mlp.up_proj",
    "report inspect.jsonl --html inspect.html": "inspect.html: 1 report(s), ",
    "report monosoup-report.jsonl --card": "the method [MonoSoup](https://arxiv.org/abs/2602.09689)",
    "parameters": "| `min_rel_update` |",
    "inspect": "freevariance: in all matrices",
    "plot inspect.jsonl --out inspect.png": "inspect.png: 8 panels",
    "soup": "mergekit-yaml soup.yml",
    "adapter": "an adapter of rank ",
    "report adapter.jsonl": "layers.*.mlp.down_proj",
    "inspect my-org/Qwen3-0.6B-lora-adapter": "freevariance: ",
    "inspect Qwen/Qwen3-0.6B my-org/Qwen3-0.6B-lora-adapter": "freevariance: ",
}
# Lines that are not executed here, and why.
NOT_RUN = {
    "pip install --constraint": "the same, of the extra vision",
    "pip install .": "needs a clean environment: test_install.py installs the wheel into one",
    "make demo": "trains for minutes: the demo's parts have tests of their own",
    "make evidence": "trains for half an hour: tests/evaluation/evidence has its parts",
    "python -m evaluation": "asks real models: tests/evaluation runs each program on small ones",
}


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch) -> Path:
    """The current folder: configs/ and README's merge.yml, with small checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for config in (pages.ROOT / "configs").glob("*.yml"):
        (tmp_path / "configs" / config.name).write_text(with_local_models(config.read_text(), hub))
    (tmp_path / "merge.yml").write_text(with_local_models(MERGE_YML.text, hub))
    (tmp_path / "my-suite.yml").write_text(SUITE_YML.text)
    names = re.findall(r"questions: ([\w.]+)", SUITE_YML.text)
    for name, block in zip(names, pages.blocks("json"), strict=True):
        (tmp_path / name).write_text(block.text)
    return tmp_path


def with_local_models(words: str, hub: Path) -> str:
    for name, place in HUB.items():
        words = re.sub(rf"{re.escape(name)}(?![-\w])", str(hub / place), words)
    return words


def test_every_block_has_a_language_that_is_tested():
    assert {block.language for block in pages.blocks()} == {
        "bash",
        "yaml",
        "python",
        "text",
        "bibtex",
        "math",  # TeX, which test_site.py turns into what browsers draw
        "json",
    }


# -- bash ------------------------------------------------------------------------------------------


def starts_processes(block: pages.Block) -> bool:
    """Whether a line starts Ray, or a Python that imports mergekit."""
    slow = ("mergekit-monosoup run", "python -c", "export ")
    return any(line.startswith(slow) for line in block.lines)


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=[pytest.mark.slow] * starts_processes(b), id=str(b)) for b in BASH],
)
def test_commands(block, hub, workplace, monkeypatch):
    for line in block.lines:
        execute(line, hub, monkeypatch)


def execute(line: str, hub: Path, monkeypatch) -> None:
    """Run one line of a bash block in the current folder, and look at what came of it."""
    words = shlex.split(with_local_models(line, hub))
    if words[0] == "export":
        monkeypatch.setenv(*words[1].split("="))
        ask = [sys.executable, "-c", "from mergekit.merge_methods import get; get('monosoup')"]
        assert subprocess.run(ask, capture_output=True).returncode, "mergekit knows the method"
        return
    if words[:2] == ["python", "-c"]:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.stdout == "MonoSoup\n", done.stderr
        return
    for start, stands_in in STANDS_IN.items():
        if line.startswith(start):
            stands_in(shlex.split(line), monkeypatch)
            return
    command = {"mergekit-monosoup": main, "mergekit-yaml": run_yaml.main}[words[0]]
    done = CliRunner().invoke(command, words[1:])
    assert done.exit_code == 0, done.output
    if words[1] == "run" or command is run_yaml.main:
        folder = words[3] if words[1] == "run" else words[2]
        assert Path(folder, "config.json").exists()
    else:
        assert expected(line) in done.output


def expected(line: str) -> str:
    """What a command of ours must print: by the whole line, or by its first word."""
    rest = line.removeprefix("mergekit-monosoup ")
    return PRINTS[rest] if rest in PRINTS else PRINTS[rest.split()[0]]


def dry_make(words: list[str], monkeypatch) -> None:
    started = {
        "demo": "-m demo",
        "evidence": "-m evaluation.evidence",
        "evidence-real": "-m evaluation.evidence --world tweets",
    }
    done = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=pages.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and started[words[1]] in done.stdout, done.stderr


def installed_elsewhere(words: list[str], monkeypatch) -> None:
    assert (pages.ROOT / "tests" / "test_install.py").exists()


def in_pyproject(words: list[str], monkeypatch) -> None:
    extras = re.findall(r"^(\w+) = \[", (pages.ROOT / "pyproject.toml").read_text(), flags=re.M)
    named = re.findall(r"\[(.*)\]", words[-1])[0].split(",")
    assert set(named) <= set(extras) and Path(pages.ROOT, words[3]).is_file()


class ParsedError(Exception):
    """Carries the options out of a program that goes no further."""


def parsed(words: list[str], monkeypatch) -> None:
    """A program of evaluation/ takes these options, and the models that they name are there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        raise ParsedError(parse(self, *arguments))

    program = importlib.import_module(words[2])
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParsedError) as stopped:
            program.main(words[3:])
    options = stopped.value.args[0]
    if hasattr(options, "suite"):
        assert load_suite(options.suite).tasks
    places = [place for _, place in getattr(options, "model", [])]
    places += [options.pretrained, options.finetuned] if words[2] == "evaluation.sweep" else []
    by_demo = {train.PRETRAINED, train.FINETUNED, merge.FREE.merged.as_posix()}
    for place in places:
        assert (
            place in HUB
            or (pages.ROOT / place).is_file()
            or place.removeprefix("demo-out/") in by_demo
            or re.fullmatch(r"[A-Z]|model_[0-9]+[.]pt|pair/(pre|fine)t\w+", place)
        ), place


STANDS_IN = dict(
    zip(NOT_RUN, [in_pyproject, installed_elsewhere, dry_make, dry_make, parsed], strict=True)
)


def test_nothing_is_excused_in_vain():
    lines = [line for block in BASH for line in block.lines]
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN)
    assert all(any(start in line for line in lines) for start in PRINTS)


# -- yaml and python -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", MERGES, ids=str)
def test_yaml_blocks_merge(block, hub, workplace):
    Path("block.yml").write_text(block.text)
    config = local(workplace / "block.yml", hub, workplace)
    assert CliRunner().invoke(main, ["check", str(config)]).exit_code == 0
    merged = run(config, workplace)
    tuned = checkpoints.state_dict(hub / "tuned0")
    assert any(not torch.equal(weight, tuned[name]) for name, weight in merged.items())
    assert any(record.action == "edited" for record in report.read("report.jsonl"))


@pytest.mark.parametrize("block", pages.blocks("python"), ids=str)
def test_python_blocks_run(block, hub, workplace, capsys):
    run(workplace / "merge.yml", workplace)
    exec(compile(block.text, block.page, "exec"), {})
    printed = capsys.readouterr().out
    if "edit(" in block.text:
        k, high, low = printed.split()
        assert int(k) > 1 and float(high) + float(low) == pytest.approx(1)
    elif "whole.safetensors" in block.text:
        out = workplace / "out"
        assert load_file(out / "whole.safetensors").keys() == checkpoints.state_dict(out).keys()
    elif "summarise" in block.text:
        assert printed.splitlines()[-1].startswith("total ")
    else:
        assert printed == "MonoSoup\n"


# -- one's own questions ---------------------------------------------------------------------------


@pytest.mark.slow
def test_ones_own_questions(hub, workplace, monkeypatch, capsys):
    """The page's files, suite and commands, with models that have words and an end of text."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workplace / "datasets"))
    for name in ("base", "tuned0"):
        able(hub / name, workplace / "able" / name)
    merge_config = (pages.ROOT / "configs" / "monosoup.yml").read_text()
    Path("configs", "monosoup.yml").write_text(with_local_models(merge_config, workplace / "able"))
    (block,) = (block for block in BASH if "my-suite.yml" in block.text)
    for line, program in zip(block.lines, (evaluation_run, tables), strict=True):
        words = shlex.split(with_local_models(line, workplace / "able"))
        assert program.main([*words[3:], *(["--device", "cpu"] * (program is evaluation_run))]) == 0
    printed = capsys.readouterr().out
    assert "| model | sums (ID) | capitals (OOD) |" in printed and "| monosoup |" in printed
    assert Path("results/my-suite/finetuned.my-suite.samples.jsonl.gz").exists()


def test_ones_own_questions_are_as_the_page_says(workplace):
    asked = load_suite("my-suite.yml")
    text = pages.between("docs/evaluation.md", "## Your own questions", "## What the numbers are")
    assert f"at most {local_tasks.ANSWER_TOKENS} tokens" in text
    assert [len(questions.questions) for questions in asked.own.values()] == [2, 1]
    assert {task.key for task in asked.tasks} == {"exact_match,answer", "acc,none"}


# -- what the pages say is printed -----------------------------------------------------------------


def without_digits(printed: str) -> list[str]:
    """The lines, with every number replaced: its last digit may differ between machines."""
    lines = (re.sub(r"[\d.]*\d", "#", line.rstrip()) for line in printed.splitlines())
    return [re.sub(r" +", " ", line) for line in lines if line.strip()]


def printed_by_readme() -> str:
    for command in (["check", "merge.yml"], ["report", "report.jsonl"]):
        if command[0] == "report":
            run(Path("merge.yml"), Path("."))
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    console = Console(width=80, record=True, file=io.StringIO())  # a narrow terminal
    console.print(report.table(report.read("report.jsonl"), 80))
    return "merge.yml: fine\n" + console.export_text()


def printed_by_guide(hub: Path) -> str:
    inspected = CliRunner().invoke(main, ["inspect", str(hub / "base"), str(hub / "tuned0")])
    checked = CliRunner().invoke(main, ["check", "configs/per_layer.yml"])
    merged = CliRunner().invoke(run_yaml.main, ["configs/monosoup.yml", "out/"])
    return inspected.output + checked.output + merged.output


@pytest.mark.parametrize(
    "block",
    [b for b in pages.blocks("text") if b.page not in ("docs/evaluation.md", "docs/vision.md")],
    ids=str,
)
def test_quoted_output_is_real(block, hub, workplace):
    printed = printed_by_readme() if block.page == "README.md" else printed_by_guide(hub)
    quoted = [line for line in without_digits(block.text) if line != "…"]
    assert quoted and [line for line in quoted if line not in without_digits(printed)] == []
