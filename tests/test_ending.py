"""What a merge says at its end: one line, by whichever command, and never after a failure."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from mergekit import merge as mergekit_merge
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml

from mergekit_monosoup import ending, report
from mergekit_monosoup.cli import main


def configuration(hub: Path, place: Path, method: str = "monosoup", **more) -> str:
    text = {
        "merge_method": method,
        "base_model": f"{hub}/base",
        "models": [{"model": f"{hub}/tuned0"}],
        **more,
    }
    (place / "merge.yml").write_text(yaml.safe_dump(text))
    return str(place / "merge.yml")


def said(result) -> list[str]:
    """The lines of our own among those of the bars."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    lines = re.split(r"[\r\n]+", result.output)
    return [line for line in lines if "monosoup edited" in line or "svc calibrated" in line]


def merge(config: str, out: Path, *options: str):
    return CliRunner().invoke(run_yaml.main, [config, str(out), *options])


def test_the_line_is_that_of_the_report(hub, tmp_path):
    written = tmp_path / "r.jsonl"
    only = [{"filter": "mlp", "value": 0.0}, {"value": 1e9}]
    parameters = {"report": str(written), "min_rel_update": only}
    config = configuration(hub, tmp_path, parameters=parameters)
    (line,) = said(merge(config, tmp_path / "out"))
    records = [r for r in report.read(written) if len(r.shape) > 1]
    edited = [r for r in records if r.action == "edited"]
    assert 0 < len(edited) < len(records), "some are edited, and some not"
    sizes = np.array([r.edit_norm for r in edited]) ** 2
    kept = float((sizes * np.array([r.realised for r in edited])).sum() / sizes.sum())
    high = float(np.mean([r.lambda_high for r in edited]))
    assert line == (
        f"{tmp_path}/out: monosoup edited {len(edited)} of {len(records)} matrices, mean λ_high "
        f"{high:.2f}, rounding to bfloat16 kept {kept:.2f} of the edit; report: {written}"
    )


@pytest.mark.parametrize("options", [(), ("--workers", "1"), ("--workers", "2")], ids=str)
def test_run_says_it_once_and_of_its_folder(options, hub, tmp_path):
    config, out = configuration(hub, tmp_path), tmp_path / "out"
    small = ("--out-shard-size", "20K") if options == ("--workers", "2") else ()
    result = CliRunner().invoke(main, ["run", config, str(out), *options, *small])
    (line,) = said(result)
    assert line.startswith(f"{out}: monosoup edited 16 of 16 matrices")
    assert line.endswith("; `report: FILE` under `parameters` lists them all")


def test_each_stage_says_it_once(hub, tmp_path):
    models = [{"model": "first"}, {"model": f"{hub}/tuned1"}]
    second = {"merge_method": "svc", "base_model": f"{hub}/base", "models": models}
    first = {"name": "first", **yaml.safe_load(Path(configuration(hub, tmp_path)).read_text())}
    (tmp_path / "stages.yml").write_text(yaml.safe_dump_all([first, second]))
    stages, out = f"{tmp_path}/stages", f"{tmp_path}/out"
    arguments = [f"{tmp_path}/stages.yml", "--intermediate-dir", stages, "--out-path", out]
    lines = said(CliRunner().invoke(multimerge.main, arguments))
    assert [line.split(",")[0] for line in lines] == [
        f"{stages}/first: monosoup edited 16 of 16 matrices",
        f"{out}: svc calibrated 16 of 16 matrices",
    ]
    assert "mean of the median γ" in lines[1] and "λ_high" not in lines[1]


def flat(hub: Path, place: Path, **more) -> str:
    base, tuned = (f"{hub}/convnext_small.in12k{ft}.safetensors" for ft in ("", "_ft_in1k"))
    return configuration(hub, place, base_model=base, models=[{"model": tuned}], **more)


def test_mergekit_pytorch(hub, tmp_path, caplog):
    filters = [{"filter": "stem", "value": 1.0}, {"value": 0.0}]
    config = flat(hub, tmp_path, parameters={"mode": "variance", "min_rel_update": filters})
    arguments = [config, str(tmp_path / "out")]
    (line,) = said(CliRunner().invoke(merge_raw_pytorch.main, arguments))
    assert line.startswith(f"{tmp_path}/out: monosoup edited 1 of 1 matrices")
    assert "parameters.min_rel_update: filter 'stem' is part of no tensor's name" in caplog.text


def test_quiet_and_other_methods_say_nothing(hub, tmp_path, caplog):
    assert said(merge(configuration(hub, tmp_path), tmp_path / "a", "--quiet")) == []
    linear = configuration(hub, tmp_path, "task_arithmetic")
    (tmp_path / "merge.yml").write_text(Path(linear).read_text() + "parameters: {weight: 0.5}\n")
    assert said(merge(linear, tmp_path / "b")) == []
    result = CliRunner().invoke(main, ["run", linear, str(tmp_path / "c"), "--workers", "2"])
    assert result.exit_code == 0 and said(result) == []
    assert "nothing was edited" not in caplog.text + result.output


def as_library(config: str, out: Path) -> None:
    read = MergeConfiguration.model_validate(yaml.safe_load(Path(config).read_text()))
    mergekit_merge.run_merge(read, str(out), MergeOptions(quiet=True))


def test_a_program_gets_a_log_record_and_no_output(hub, tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, "mergekit_monosoup"):
        as_library(configuration(hub, tmp_path), tmp_path / "out")
    levels = {r.levelname for r in caplog.records if "monosoup edited 16 of" in r.getMessage()}
    assert levels == {"INFO"} and "edited" not in "".join(capfd.readouterr())


def test_what_failed_says_nothing_and_is_not_counted_in_the_next(hub, tmp_path, monkeypatch):
    config = configuration(hub, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # all weights are written by then
        patch.setattr(mergekit_merge, "_copy_tagalong_files", full)
        failed = merge(config, tmp_path / "out")
    assert isinstance(failed.exception, OSError) and "monosoup edited" not in failed.output
    with monkeypatch.context() as patch:  # some tensors are merged by then
        seen = iter([False] * 5 + [True])
        original = mergekit_merge.Executor._move_tensors
        patch.setattr(
            mergekit_merge.Executor,
            "_move_tensors",
            lambda *a: full() if next(seen, True) else original(*a),
        )
        failed = merge(config, tmp_path / "out")
    assert isinstance(failed.exception, OSError) and "monosoup edited" not in failed.output
    (line,) = said(merge(config, tmp_path / "out"))
    assert "edited 16 of 16 matrices" in line


def test_a_model_that_run_does_not_publish_is_not_announced(hub, tmp_path, monkeypatch):
    def replaced(*_: object, **__: object) -> list[str]:
        return ["somebody replaced it"]

    monkeypatch.setattr("mergekit_monosoup.distributed.driver.changed_inputs", replaced)
    for options in ((), ("--workers", "1")):
        arguments = ["run", configuration(hub, tmp_path), str(tmp_path / "out"), *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1 and "monosoup edited" not in result.output


@pytest.mark.parametrize("broken", ["sentence", "warnings", "_count"])
def test_a_fault_of_ours_breaks_no_merge(broken, hub, tmp_path, monkeypatch):
    if broken == "_count":
        monkeypatch.setattr(ending, "_files_are_closed", lambda _: 1 / 0)
    else:
        monkeypatch.setattr(report.Tally, broken, lambda _: 1 / 0)
    assert merge(configuration(hub, tmp_path), tmp_path / "out").exit_code == 0
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parameters": {"min_rel_update": 1e9}}, "Look at `min_rel_update` and its filters"),
        ({"base": "tuned0"}, "Is base_model the model that the fine-tuning started from"),
    ],
)
def test_nothing_edited_is_a_warning_in_place_of_the_line(more, words, hub, tmp_path, caplog):
    if more.pop("base", None):
        (tmp_path / "same").symlink_to(hub / "tuned0")
        more = {"base_model": str(tmp_path / "same")}
    result = merge(configuration(hub, tmp_path, **more), tmp_path / "out")
    assert said(result) == []
    warning = next(r for r in caplog.records if "none of 16 matrices was edited" in r.getMessage())
    assert warning.levelname == "WARNING" and words in warning.getMessage()
    assert f"{tmp_path}/out: monosoup: " in warning.getMessage() and "(16)" in warning.getMessage()


def test_a_filter_that_matches_nothing_is_a_warning_before_the_merge(hub, tmp_path, caplog):
    filters = [{"filter": text, "value": 0.9} for text in ("self_atn", "mlp", "*")]
    models = [{"model": f"{hub}/tuned0", "parameters": {"weight": filters[:1]}}]
    parameters = {"mode": "variance", "R": filters}
    config = configuration(hub, tmp_path, models=models, parameters=parameters)
    for command in ([], ["run"]):
        caplog.clear()
        out = str(tmp_path / f"out{len(command)}")
        program = main if command else run_yaml.main
        assert CliRunner().invoke(program, [*command, config, out]).exit_code == 0
        found = [r.getMessage() for r in caplog.records if "is part of no" in r.getMessage()]
        assert [message.split(" is part")[0] for message in found] == [
            "models[0].parameters.weight: filter 'self_atn'",
            "parameters.R: filter 'self_atn'",
        ]


def test_swapped_models_are_a_warning(hub, tmp_path, caplog):
    for name in ("base", "tuned0"):
        (tmp_path / name).mkdir()
        for file in (hub / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "tuned0/README.md").write_text("---\nbase_model: someone/base\n---\n# Fine-tune\n")
    paths = [f"{tmp_path}/{name}" for name in ("base", "tuned0")]
    for base, tuned in (paths, reversed(paths)):
        caplog.clear()
        config = configuration(hub, tmp_path, base_model=base, models=[{"model": tuned}])
        assert merge(config, tmp_path / Path(base).name / "out").exit_code == 0
        assert ("look swapped: README.md" in caplog.text) == base.endswith("tuned0")
