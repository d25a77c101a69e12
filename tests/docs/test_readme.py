"""Every block of README.md runs as printed (with small checkpoints for the hub's), and what it quotes is what the code says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.hub import HUB, local, run

from demo import merge
from evaluation.run import _parser as evaluation_options
from evaluation.suite import load as load_suite
from evaluation.worlds import training as train
from mergekit_monosoup import report
from mergekit_monosoup.cli import main
from mergekit_monosoup.parameters import parameter_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [line for language, body in BLOCKS if language == "bash" for line in body.splitlines()]


def test_every_block_has_a_test():
    assert {language for language, _ in BLOCKS} == {"bash", "yaml", "python", "bibtex"}
    assert set(COMMANDS) == set(RUN), "a command was added to README.md: say below how it is run"


@pytest.mark.parametrize("method", ["monosoup", "svc"])
def test_parameter_table_is_the_one_that_the_code_prints(method):
    assert f"test -->\n{parameter_table(method)}\n<!--" in README


def test_report_fields_are_all_explained():
    table = README.split("## What happened to my weights?")[1].split("Look at")[0]
    assert set(re.findall(r"`(\w+)`", table.split("|---|---|")[1])) - {"edited", "copied"} == set(
        report.Record.__dataclass_fields__
    )


@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language == "yaml"])
def test_yaml_blocks_merge(body, hub, tmp_path):
    path = tmp_path / "readme.yml"
    path.write_text(body.replace("report.jsonl", "readme-report.jsonl"))
    config = local(path, hub, tmp_path)
    assert CliRunner().invoke(main, ["check", str(config)]).exit_code == 0
    run(config, tmp_path)
    assert any(
        record.action == "edited" for record in report.read(tmp_path / "readme-report.jsonl")
    )


@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language == "python"])
def test_python_blocks_run(body):
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    k, high, low = done.stdout.split()
    assert int(k) > 1 and float(high) + float(low) == pytest.approx(1)


# -- one function per command ----------------------------------------------------------------------------------------------


def merge_and_report(command, hub, folder):
    """`mergekit-yaml configs/monosoup.yml out/` and then the report that it wrote."""
    run(local(ROOT / "configs" / "monosoup.yml", hub, folder), folder)
    result = CliRunner().invoke(main, ["report", str(folder / "monosoup-report.jsonl")])
    assert result.exit_code == 0 and "layers.*.mlp.up_proj" in result.output


def own_script(command, hub, folder):
    words = shlex.split(command)[1:]
    if words[0] == "check":
        words[1] = str(local(ROOT / words[1], hub, folder))
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


def on_small_checkpoints(command, hub):
    """Runs a command of ours in the current folder, with the hub's models replaced."""
    for name, place in HUB.items():
        command = re.sub(rf"{re.escape(name)}(?![-\w])", str(hub / place), command)
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return result.output


def inspect_and_plot(command, hub, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = on_small_checkpoints(INSPECT, hub)
        assert "mlp.up_proj" in output and "freevariance: " in output
        assert {record.action for record in report.read("inspect.jsonl")} == {"inspected"}
        assert "inspect.png: 5 panels" in on_small_checkpoints(PLOT, hub)


def soup_and_merge(command, hub, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = on_small_checkpoints(SOUP, hub)
        assert "similarity " in output and "mergekit-yaml soup.yml" in output
        assert CliRunner().invoke(main, ["check", "soup.yml"]).exit_code == 0
        assert run(folder / "soup.yml", folder)


def ask_mergekit(command, hub, folder):
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True
    )
    assert done.stdout == "MonoSoup\n", done.stderr


def make(command, hub, folder):
    """Dry: this suite runs inside `make test`, and the demo's parts have tests of their own."""
    done = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    started = {
        "test": "pytest",
        "demo": "-m demo",
        "evidence": "-m evaluation.evidence",
        "lint": "ruff",
    }
    assert started[command.split()[1]] in done.stdout


def installed(command, hub, folder):
    """test_install.py builds the wheel and installs it in a clean environment."""
    assert command == "pip install ." and (ROOT / "tests" / "test_install.py").exists()


def run_with_workers(command, hub, folder):
    pytest.importorskip(
        "ray", reason="the extra `ray` is not installed (Ray has no wheels for the newest Python)"
    )
    words = shlex.split(command)[1:]
    words[1], words[2] = str(local(ROOT / words[1], hub, folder)), str(folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the report is written there
        done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and (folder / "out" / "config.json").exists(), done.output


INSPECT, PLOT = [
    c for c in COMMANDS if c.startswith(("mergekit-monosoup inspect", "mergekit-monosoup plot"))
]
SOUP, MERGE_OF_SOUP = [
    c for c in COMMANDS if c.startswith("mergekit-monosoup soup") or "soup.yml soup/" in c
]


def evaluate(command, hub, folder):
    """Read, not run: test_evaluation_run.py runs such commands, on models that it has."""
    words = shlex.split(command)
    if words[2] == "evaluation.run":
        options = evaluation_options().parse_args(words[3:])
        assert load_suite(options.suite).tasks
        left_by_the_demo = {train.PRETRAINED, train.FINETUNED, merge.FREE.merged.as_posix()}
        for _, place in options.model:
            assert (
                place in HUB
                or (ROOT / place).is_file()
                or place.removeprefix("demo-out/") in left_by_the_demo
            )
    else:
        assert words[2] == "evaluation.tables" and words[3] == "results/tiny"


RUN = {
    INSPECT: inspect_and_plot,
    PLOT: inspect_and_plot,
    SOUP: soup_and_merge,
    MERGE_OF_SOUP: soup_and_merge,
    "pip install .": installed,
    "mergekit-yaml configs/monosoup.yml out/": merge_and_report,
    "mergekit-monosoup report monosoup-report.jsonl": merge_and_report,
    "mergekit-monosoup run configs/monosoup.yml out/ --workers 2": run_with_workers,
    "mergekit-monosoup parameters": own_script,
    "python -c \"from mergekit.merge_methods import get; print(get('monosoup').spec.pretty_name)\"": ask_mergekit,
    "mergekit-monosoup check configs/monosoup.yml": own_script,
    "python -m evaluation.run tiny --model pretrained=demo-out/pretrained --model finetuned=demo-out/finetuned "
    "--model monosoup=demo-out/merged/freevariance": evaluate,
    "python -m evaluation.run qwen-mgsm --model pretrained=Qwen/Qwen3-0.6B --model finetuned=suayptalha/Qwen3-0.6B-Math-Expert "
    "--model monosoup=configs/monosoup.yml": evaluate,
    "python -m evaluation.tables results/tiny": evaluate,
    "make test": make,
    "make demo": make,
    "make evidence": make,
    "make lint": make,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, hub, tmp_path):
    RUN[command](command, hub, tmp_path)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_config_is_in_the_readme():
    assert all(f"configs/{path.name}" in README for path in (ROOT / "configs").glob("*.yml"))
