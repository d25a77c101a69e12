"""Whole runs with the tiny suite, a trained tiny Qwen3 and the real lm-eval: results, resuming, and what makes them stale."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import yaml
from helpers.tiny import WORLD
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from demo import score
from evaluation import run, sources, store, tables
from evaluation.engines import language as engine
from evaluation.suite import SHIPPED, load

ROOT = Path(__file__).parents[2]

TASKS = [task.task for task in load("tiny").tasks]


def start(
    models: Path,
    out: Path,
    *more: str,
    suite: str = "tiny",
    names: tuple[str, ...] = ("finetuned",),
) -> int:
    given = {
        "pretrained": models / "pretrained",
        "finetuned": models / "finetuned",
        "soup": models / "soup.yml",
    }
    named = [word for name in names for word in ("--model", f"{name}={given[name]}")]
    cache = str(out / "merged")
    return run.main(
        [suite, *named, "--out", str(out), "--merge-cache", cache, "--device", "cpu", *more]
    )


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """One complete run of three models, which the tests below read and copy."""
    out = tmp_path_factory.mktemp("results") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
        )
        assert start(models, out, "--limit", "40", names=("pretrained", "finetuned", "soup")) == 0
    return out


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The tasks that a model is really asked, in order."""
    found: list[str] = []
    ask = engine.Model.ask

    def recorded(self, task, *arguments):
        result = ask(self, task, *arguments)
        found.append(task.task)
        return result

    monkeypatch.setattr(engine.Model, "ask", recorded)
    return found


def result(folder: Path, model: str, suite: str = "tiny"):
    return json.loads((folder / f"{model}.{suite}.json").read_text())


def test_a_merge_with_an_adapter_runs_and_follows_its_weights(models, tmp_path):
    base = models / "pretrained"
    config = tmp_path / "lora.yml"
    given = {"model": f"{base}+{tmp_path / 'adapter'}"}
    config.write_text(
        yaml.safe_dump({"merge_method": "monosoup", "base_model": str(base), "models": [given]})
    )
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(Qwen3ForCausalLM.from_pretrained(base), lora).save_pretrained(
            tmp_path / "adapter"
        )
        found.append(sources.find("lora", str(config), tmp_path / "cache"))
    assert found[0].fingerprint["weights"] != found[1].fingerprint["weights"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        source.folder.name for source in found
    }
    before, after = (load_file(place / "model.safetensors") for place in (base, found[0].folder))
    name = "model.layers.0.self_attn.{}.weight"
    assert torch.equal(before[name.format("k_proj")], after[name.format("k_proj")])
    assert not torch.equal(before[name.format("q_proj")], after[name.format("q_proj")])


class TestResults:
    def test_answers_are_graded_as_the_demo_grades_them(self, models, finished):
        """Another program, without lm-eval, asks the same questions."""
        some_right = 0.0
        for name in ("pretrained", "finetuned"):
            model = Qwen3ForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
            items = {skill: items[:40] for skill, items in WORLD.test.items()}
            right = score.grade(model, AutoTokenizer.from_pretrained(models / name), items)
            [read] = [r for r in store.read(finished) if r.data["model"] == name]
            for skill, expected in right.items():
                ours = [row.values["exact_match,answer"] for row in read.rows[f"tiny_{skill}"]]
                assert ours == list(expected), skill
                some_right += sum(ours)
        assert some_right > 0, "models that know nothing test nothing"

    def test_a_result_says_where_it_comes_from(self, models, finished):
        tuned, soup = result(finished, "finetuned"), result(finished, "soup")
        assert tuned["suite"]["name"] == "tiny" and tuned["suite"]["seed"] == 1234
        assert tuned["settings"] == {"backend": "hf", "device": "cpu", "dtype": "auto", "limit": 40}
        assert (
            tuned["versions"]["lm-eval"].startswith("0.4.")
            and tuned["versions"]["torch"] == torch.__version__
        )
        assert tuned["w0"]["given"] == str(models / "pretrained")
        assert soup["w0"]["fingerprint"] == result(finished, "pretrained")["source"]["fingerprint"]
        assert soup["source"]["merge"]["config"]["parameters"] == {"mode": "variance", "R": 0.7}
        assert set(soup["source"]["merge"]["inputs"]) == {
            str(models / "pretrained"),
            str(models / "finetuned"),
        }
        weights = {
            name: result(finished, name)["source"]["fingerprint"]["weights"]
            for name in ("pretrained", "finetuned", "soup")
        }
        assert len(set(weights.values())) == 3
        assert "--model" in tuned["command"]
        assert tuned["git"] is None or len(tuned["git"].removesuffix("-dirty")) == 40

    def test_scores_are_means_over_the_rows(self, finished):
        for read in store.read(finished):
            for task in TASKS:
                rows = read.rows[task]
                assert len(rows) == read.data["tasks"][task]["items"] == 40
                values = [row.values["exact_match,answer"] for row in rows]
                assert read.data["tasks"][task]["scores"]["exact_match,answer"][
                    "mean"
                ] == pytest.approx(sum(values) / 40)
                assert read.data["tasks"][task]["num_fewshot"] == {task: 0}
            sums = [row.cluster for row in read.rows["tiny_sum_fr"]]
            assert sums == [
                row.cluster for row in read.rows["tiny_sum_de"]
            ]  # one item in two languages

    def test_a_table_can_be_made_of_it(self, finished, capsys):
        assert tables.main([str(finished)]) == 0
        shown = capsys.readouterr().out
        assert "| soup |" in shown and "OOD average" in shown and "Only the first 40 items" in shown

    def test_sampling_defaults_of_a_checkpoint_do_not_reach_the_answers(
        self, models, finished, tmp_path, asked
    ):
        copy = tmp_path / "copy"
        shutil.copytree(models / "pretrained", copy)
        settings = {
            "do_sample": True,
            "temperature": 9.0,
            "repetition_penalty": 50.0,
            "max_new_tokens": 1,
        }
        (copy / "generation_config.json").write_text(json.dumps(settings))
        out = tmp_path / "out"
        assert (
            run.main(
                [
                    "tiny",
                    "--model",
                    f"pretrained={copy}",
                    "--out",
                    str(out),
                    "--limit",
                    "40",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        assert asked == TASKS
        ours, theirs = (folder / "pretrained.tiny.samples.jsonl.gz" for folder in (out, finished))
        assert ours.read_bytes() == theirs.read_bytes()


class TestResuming:
    @pytest.fixture
    def out(self, finished, tmp_path) -> Path:
        return shutil.copytree(finished, tmp_path / "results")

    LIMIT = ("--limit", "40")

    def test_what_is_finished_is_not_asked_again(self, models, out, asked, capsys):
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.*")}
        assert start(models, out, *self.LIMIT, names=("pretrained", "finetuned", "soup")) == 0
        assert (
            asked == []
            and {path.name: path.stat().st_mtime_ns for path in out.glob("*.*")} == before
        )
        assert "soup: finished before" in capsys.readouterr().out
        assert start(models, out, *self.LIMIT, "--fresh") == 0
        assert asked == TASKS

    def test_changed_weights_are_asked_again(self, models, out, tmp_path, asked):
        copy = shutil.copytree(models / "finetuned", tmp_path / "copy")
        command = [
            "tiny",
            "--model",
            f"finetuned={copy}",
            "--out",
            str(out),
            "--device",
            "cpu",
            *self.LIMIT,
        ]
        assert run.main(command) == 0 and asked == []  # another place, the same weights
        model = Qwen3ForCausalLM.from_pretrained(copy)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3
        model.save_pretrained(copy)
        assert run.main(command) == 0 and asked == TASKS

    def test_a_changed_suite_or_limit_is_asked_again(self, models, out, tmp_path, asked, capsys):
        names = ["finetuned.tiny.json", "finetuned.tiny.samples.jsonl.gz"]
        before = [(out / name).read_bytes() for name in names]
        changed = tmp_path / "tiny.yml"
        changed.write_text((SHIPPED / "tiny.yml").read_text().replace("version: 1", "version: 2"))
        assert start(models, out, *self.LIMIT, suite=str(changed)) == 0 and asked == TASKS
        assert [(out / f"{name}.old").read_bytes() for name in names] == before, (
            "hours of asking are not thrown away"
        )
        assert "is now" in capsys.readouterr().out
        asked.clear()
        assert start(models, out, "--limit", "3", suite=str(changed)) == 0 and asked == TASKS
        assert result(out, "finetuned")["tasks"]["tiny_home"]["items"] == 3

    def test_a_merge_is_done_anew_only_if_something_changed(
        self, models, out, tmp_path, monkeypatch
    ):
        from mergekit import merge

        merges = []
        original = merge.run_merge
        monkeypatch.setattr(
            merge, "run_merge", lambda *a, **k: (merges.append(1), original(*a, **k))
        )
        assert start(models, out, *self.LIMIT, names=("soup",)) == 0 and merges == []
        config = models / "soup.yml"
        before = config.read_text()
        try:
            config.write_text(before + "# a comment changes nothing\n")
            assert start(models, out, *self.LIMIT, names=("soup",)) == 0 and merges == []
            config.write_text(before.replace("0.7", "0.6"))
            assert start(models, out, *self.LIMIT, names=("soup",)) == 0 and merges == [1]
        finally:
            config.write_text(before)

    def test_an_interrupted_run_goes_on_after_the_last_task(
        self, models, tmp_path, monkeypatch, asked, finished, capsys
    ):
        recorded = engine.Model.ask

        def stopped(self, task, *arguments):
            if task.task == TASKS[3]:
                raise KeyboardInterrupt
            return recorded(self, task, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(engine.Model, "ask", stopped)
            assert start(models, tmp_path, *self.LIMIT) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert not (tmp_path / "finetuned.tiny.json").exists() and asked == TASKS[:3]
        asked.clear()
        assert start(models, tmp_path, *self.LIMIT) == 0
        assert asked == TASKS[3:] and not (tmp_path / "finetuned.tiny.partial").exists()
        whole, pieced = (
            folder / "finetuned.tiny.samples.jsonl.gz" for folder in (finished, tmp_path)
        )
        assert whole.read_bytes() == pieced.read_bytes()

    def test_parts_of_another_key_or_half_written_are_not_used(self, tmp_path):
        pair = store.Pair(tmp_path, "m", "s")
        pair.keep("old", store.TaskResult("a", []))
        assert pair.resume("new") == {}
        pair.keep("key", store.TaskResult("a", []))
        pair.keep("key", store.TaskResult("b", []))
        part = pair.partial / "key" / "b.json.gz"
        part.write_bytes(part.read_bytes()[:-9])
        assert set(pair.resume("key")) == {"a"}
        pair.finish({"key": "key"}, [])  # a quick look between costs nothing
        assert set(pair.resume("old")) == {"a"} and pair.resume("key") == {}
        pair.finish({"key": "old"}, [])
        assert not pair.partial.exists()

    def test_a_killed_run_goes_on(self, models, tmp_path, asked):
        command = [
            sys.executable,
            "-m",
            "evaluation.run",
            "tiny",
            "--model",
            f"finetuned={models / 'finetuned'}",
        ]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "OMP_NUM_THREADS": "1",
        }
        child = subprocess.Popen(
            [*command, "--out", str(tmp_path), "--device", "cpu"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        part = tmp_path / "finetuned.tiny.partial"
        deadline = time.monotonic() + 120
        while (
            not (done := list(part.glob("*/*.json.gz")))
            and time.monotonic() < deadline
            and child.poll() is None
        ):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        said = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL and done, said
        kept = [
            json.loads(gzip.decompress(path.read_bytes()))["task"]
            for path in part.glob("*/*.json.gz")
        ]
        assert 0 < len(kept) < len(TASKS)
        assert start(models, tmp_path) == 0
        assert asked == [task for task in TASKS if task not in kept]
        assert result(tmp_path, "finetuned")["samples"]["rows"] == sum(
            len(items) for items in WORLD.test.values()
        )


def stop():
    raise KeyboardInterrupt


class TestErrors:
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
    def test_said_in_one_line(self, arguments, message, capsys, tmp_path):
        assert run.main([*arguments, "--out", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said

    def test_a_folder_that_cannot_be(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert run.main(["tiny", "--model", "a=b", "--out", str(tmp_path / "file")]) == 1
        assert f"{tmp_path / 'file'}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "gone", ["tokenizer.json", "model.safetensors", "config.json", "mergekit_config.yml"]
    )
    def test_a_damaged_checkpoint_is_named(self, models, tmp_path, gone, capsys):
        copy = shutil.copytree(models / "finetuned", tmp_path / "copy")
        for file in copy.glob("tokenizer*") if gone == "tokenizer.json" else [copy / gone]:
            file.write_text("{")
        assert (
            start(models, tmp_path / "out", "--model", f"broken={copy}", "--limit", "2", names=())
            == 1
        )
        assert str(copy) in capsys.readouterr().err

    def test_a_chat_template_that_is_not_there(self, models, tmp_path, capsys):
        suite = tmp_path / "chat.yml"
        suite.write_text(
            (ROOT / "evaluation" / "suites" / "tiny.yml").read_text() + "\nchat_template: true\n"
        )
        assert start(models, tmp_path / "out", "--limit", "2", suite=str(suite)) == 1
        assert "no chat template, which suite chat asks for" in capsys.readouterr().err

    def test_fresh_keeps_the_old_result_until_there_is_a_new_one(
        self, models, finished, tmp_path, monkeypatch, asked
    ):
        out = shutil.copytree(finished, tmp_path / "results")
        before = (out / "finetuned.tiny.json").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(engine.Model, "ask", lambda *_: stop())
            assert start(models, out, "--limit", "40", "--fresh") == 130
        assert (out / "finetuned.tiny.json").read_bytes() == before
        asks = engine.Model.ask
        with monkeypatch.context() as patch:
            patch.setattr(
                engine.Model,
                "ask",
                lambda self, task, *rest: (
                    stop() if task.task == TASKS[1] else asks(self, task, *rest)
                ),
            )
            assert start(models, out, "--limit", "40", "--fresh") == 130
        assert (out / "finetuned.tiny.json.old").read_bytes() == before
        asked.clear()
        assert start(models, out, "--limit", "40") == 0 and asked == TASKS[1:]  # goes on
        assert (out / "finetuned.tiny.json.old").read_bytes() == before

    def test_what_a_killed_merge_left_is_removed(self, models, tmp_path):
        child = subprocess.Popen(["true"])
        child.wait()
        left, other = (
            tmp_path / f"{name}.unfinished-{number}"
            for name, number in (("a", child.pid), ("b", os.getppid()))
        )
        left.mkdir()
        other.mkdir()
        for path in (left, other):
            os.utime(path, (0, 0))  # younger ones may be another machine's
        sources.find("soup", str(models / "soup.yml"), tmp_path)
        assert not left.exists() and other.exists()

    def test_a_folder_that_is_no_checkpoint(self, tmp_path, capsys):
        assert run.main(["tiny", "--model", f"a={tmp_path}", "--out", str(tmp_path / "out")]) == 1
        assert "has no config.json" in capsys.readouterr().err

    def test_a_bad_merge_configuration_is_found_before_merging(self, models, tmp_path, capsys):
        bad = tmp_path / "bad.yml"
        bad.write_text((models / "soup.yml").read_text().replace("R: 0.7", "r: 0.7"))
        assert run.main(["tiny", "--model", f"a={bad}", "--out", str(tmp_path / "out")]) == 1
        assert "monosoup has no such parameter" in capsys.readouterr().err

    def test_names_that_cannot_be_files(self, capsys):
        with pytest.raises(SystemExit):
            run.main(["tiny", "--model", "a/b=c"])
        assert "is not NAME=PATH" in capsys.readouterr().err
