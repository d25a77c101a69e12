"""Whole runs with the tiny suite, a trained tiny Qwen3 and the real lm-eval."""

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

import pytest
import torch
from helpers.runs import TASKS, result, start
from helpers.tiny import WORLD
from transformers import AutoTokenizer, Qwen3ForCausalLM

from demo import score
from evaluation import run, store, tables
from evaluation.engines import language
from evaluation.suite import SHIPPED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


class TestResults:
    def test_answers_are_graded_as_the_demo_grades_them(self, models, finished):
        """Another program, without lm-eval, asks the same questions."""
        some_right = 0.0
        for name in ("pretrained", "finetuned"):
            model = Qwen3ForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
            items = {skill: items[:40] for skill, items in WORLD.test.items()}
            right = score.grade(model, AutoTokenizer.from_pretrained(models / name), items)
            [read] = [r for r in store.read(finished) if r.result.model == name]
            for skill, expected in right.items():
                ours = [s.values["exact_match,answer"] for s in read.samples[f"tiny_{skill}"]]
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

    def test_scores_are_means_over_the_samples(self, finished):
        for read in store.read(finished):
            for task in TASKS:
                scores = read.result.tasks[task]
                assert len(read.samples[task]) == scores.items == 40
                values = [sample.values["exact_match,answer"] for sample in read.samples[task]]
                mean = scores.scores["exact_match,answer"].mean
                assert mean == pytest.approx(sum(values) / 40)
                assert scores.model_extra["num_fewshot"] == {task: 0}
            # One item in two languages.
            sums = [sample.cluster for sample in read.samples["tiny_sum_fr"]]
            assert sums == [sample.cluster for sample in read.samples["tiny_sum_de"]]

    def test_a_table_can_be_made_of_it(self, finished, capsys):
        assert tables.main([str(finished)]) == 0
        shown = capsys.readouterr().out
        assert "| soup |" in shown and "OOD average" in shown and "Only 40 items" in shown

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
        words = ["tiny", f"--model=pretrained={copy}", f"--out={out}", "--limit=40"]
        assert run.main([*words, "--device=cpu"]) == 0
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
        assert asked == []
        assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.*")} == before
        assert "soup: finished before" in capsys.readouterr().out
        assert start(models, out, *self.LIMIT, "--fresh") == 0
        assert asked == TASKS

    def test_changed_weights_are_asked_again(self, models, out, tmp_path, asked):
        copy = shutil.copytree(models / "finetuned", tmp_path / "copy")
        command = ["tiny", f"--model=finetuned={copy}", f"--out={out}", "--device=cpu", *self.LIMIT]
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

    def test_an_interrupted_run_goes_on_after_the_last_task(
        self, models, tmp_path, monkeypatch, asked, finished, capsys
    ):
        recorded = language.Model.ask

        def stopped(self, task, *arguments):
            if task.task == TASKS[3]:
                raise KeyboardInterrupt
            return recorded(self, task, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(language.Model, "ask", stopped)
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

    def test_a_killed_run_goes_on(self, models, tmp_path, asked):
        command = [sys.executable, "-m", "evaluation.run", "tiny", "--device", "cpu"]
        command += [f"--model=finetuned={models / 'finetuned'}", f"--out={tmp_path}"]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "OMP_NUM_THREADS": "1",
        }
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        part = tmp_path / "finetuned.tiny.partial"
        deadline = time.monotonic() + 120
        while not (parts := list(part.glob("*/*.json.gz"))):
            if time.monotonic() > deadline or child.poll() is not None:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        errors = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL and parts, errors
        parts = list(part.glob("*/*.json.gz"))
        kept = [json.loads(gzip.decompress(path.read_bytes()))["task"] for path in parts]
        assert 0 < len(kept) < len(TASKS)
        assert start(models, tmp_path) == 0
        assert asked == [task for task in TASKS if task not in kept]
        assert result(tmp_path, "finetuned")["samples"]["rows"] == sum(
            len(items) for items in WORLD.test.values()
        )

    def test_fresh_keeps_the_old_result_until_there_is_a_new_one(
        self, models, finished, tmp_path, monkeypatch, asked
    ):
        out = shutil.copytree(finished, tmp_path / "results")
        before = (out / "finetuned.tiny.json").read_bytes()
        ask = language.Model.ask

        def interrupt(stopped: str) -> int:
            def interrupted(self, task, *rest):
                if task.task == stopped:
                    raise KeyboardInterrupt
                return ask(self, task, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(language.Model, "ask", interrupted)
                return start(models, out, *self.LIMIT, "--fresh")

        assert interrupt(TASKS[0]) == 130
        assert (out / "finetuned.tiny.json").read_bytes() == before
        assert interrupt(TASKS[1]) == 130
        assert (out / "finetuned.tiny.json.old").read_bytes() == before
        asked.clear()
        assert start(models, out, *self.LIMIT) == 0 and asked == TASKS[1:]  # goes on
        assert (out / "finetuned.tiny.json.old").read_bytes() == before
