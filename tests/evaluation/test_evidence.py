"""evaluation.evidence: what is compared, the JSON of a seed, claims against hand-computed numbers, the committed page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluations import write
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get
from scipy import stats

pytest.importorskip("lm_eval", reason="evaluation needs the extra eval")

from evaluation.evidence import __main__ as program
from evaluation.evidence import claims, collect, models, report
from evaluation.sources import SourceError
from evaluation.store import DamagedError
from evaluation.worlds import training as train
from evaluation.worlds.sums import TUNED_SKILL

DOCS = Path(__file__).parents[2] / "docs"


class TestModels:
    def test_every_merge_is_one_that_mergekit_knows_with_parameters_that_it_reads(self, tmp_path):
        made = [
            *models.merges(tmp_path),
            *models.two_task_merges(tmp_path),
            *models.rounded("a/b", "c/d"),
        ]
        names = [name for name, _ in made]
        assert len(names) == len(set(names)) and len(names) > 80
        for name, config in made:
            MergeConfiguration.model_validate(config)
            known = {parameter.name for parameter in get(config["merge_method"]).spec.parameters}
            given = set(config.get("parameters", {})).union(
                *(model.get("parameters", {}) for model in config["models"])
            )
            assert given <= known, name

    def test_what_claims_tables_and_figures_name_is_made(self):
        made = {
            name
            for name, _ in [
                *models.merges(Path()),
                *models.rounded("", ""),
                *models.two_task_merges(Path()),
            ]
        }
        made |= {*models.TRAINED, *models.TWO_TASKS_TRAINED} | {
            f"same_norm_{label}" for label in models.CONTROLLED
        }
        from evaluation.evidence import figures

        named = {*report.SHOWN, *report.ABLATED, *report.TWO, *figures.NAMED, *figures.COMPARED}
        named |= {model for curve in claims.CURVES.values() for model in curve}
        assert named <= made
        # bfloat16 copies of two models are asked, too; those of both suites are asked twice.
        assert program.model_count() == len(made) + len(models.IN_BFLOAT16) + len(
            {*models.TRAINED} & {*models.TWO_TASKS_TRAINED}
        )


def made_seed(
    folder: Path, seed: int, outcomes: dict[str, dict[str, list[int]]], **extra: Any
) -> collect.Seed:
    for model, by_task in outcomes.items():
        write(
            folder / f"results-{seed}",
            model,
            by_task,
            merge={"config": {"base_model": f"{folder.resolve()}/pretrained"}},
        )
    found = collect.suite_results(folder / f"results-{seed}", "made", folder)
    path = folder / f"seed-{seed}.json"
    path.write_text(json.dumps({"seed": seed, "suites": {"made": found}, **extra}))
    return collect.Seed.read(path)


class TestCollect:
    @pytest.fixture(autouse=True)
    def complete_results(self, monkeypatch):
        """`write` leaves out what collect copies and nobody here reads."""
        read = collect.store.read

        def completed(folder):
            for result in read(folder):
                result.data.setdefault("versions", {})
                result.data["source"].setdefault("fingerprint", {"weights": "0" * 64})
                yield result

        monkeypatch.setattr(collect.store, "read", lambda folder: list(completed(folder)))

    def test_answers_and_clusters_come_back(self, tmp_path):
        right = {"a": [1, 0, 1, 1, 0, 0, 1, 0, 1], "b": [0, 0], "c": [1, 1, 0]}
        seed = made_seed(tmp_path, 0, {"m": right})
        read = {**seed.outcomes("made", "m", "ID"), **seed.outcomes("made", "m", "OOD")}
        assert {task: values.tolist() for task, values in read.items()} == right
        assert {task: len(set(names)) for task, names in seed.clusters("made", "OOD").items()} == {
            "b": 2,
            "c": 3,
        }
        assert seed.score("made", "m", "ID") == pytest.approx(5 / 9)
        assert seed.score("made", "m", "OOD") == pytest.approx(
            (0 + 2 / 3) / 2
        )  # tasks weigh equally

    def test_no_path_of_a_machine_is_kept(self, tmp_path):
        seed = made_seed(tmp_path, 0, {"m": {"a": [1], "b": [1], "c": [1]}})
        assert str(tmp_path) not in seed.path.read_text()
        assert seed.data["suites"]["made"]["models"]["m"]["config"] == {"base_model": "pretrained"}

    def test_models_that_were_asked_other_questions_are_not_put_together(self, tmp_path):
        write(tmp_path / "r", "m", {"a": [1], "b": [1], "c": [1]})
        write(tmp_path / "r", "n", {"a": [1], "b": [1], "c": [1]}, item="other")
        with pytest.raises(DamagedError, match="other items"):
            collect.suite_results(tmp_path / "r", "made", tmp_path)

    def test_an_effect_is_the_mean_over_seeds_with_students_interval(self, tmp_path):
        ones = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
        seeds = [
            made_seed(
                tmp_path,
                n,
                {"m": {"a": [1, 1, 1, 1], "b": [1], "c": [1]}, "r": {"a": a, "b": [1], "c": [1]}},
            )
            for n, a in enumerate(ones)
        ]
        found = collect.effect(seeds, "made", "m", "r", "ID")
        assert found.by_seed == (0.5, 0.75, 0.25)
        expected = stats.ttest_1samp(found.by_seed, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


class TestClaims:
    @pytest.mark.parametrize(
        ("judge", "interval", "verdict"),
        [
            (claims.more, (0.001, 0.2), claims.HOLDS),
            (claims.more, (-0.1, 0.2), claims.UNDECIDED),
            (claims.more, (-0.2, -0.1), claims.CONTRADICTED),
            (claims.less, (-0.2, -0.1), claims.HOLDS),
            (claims.less, (-0.2, 0.1), claims.UNDECIDED),
            (claims.less, (0.1, 0.2), claims.CONTRADICTED),
            (claims.kept, (-0.009, 0.2), claims.HOLDS),
            (claims.kept, (-0.02, 0.001), claims.UNDECIDED),
            (claims.kept, (-0.02, -0.011), claims.CONTRADICTED),
            (claims.best, (-0.2, 0.0), claims.HOLDS),
            (claims.best, (-0.1, 0.1), claims.UNDECIDED),
            (claims.best, (0.05, 0.1), claims.CONTRADICTED),
        ],
    )
    def test_verdicts_follow_from_the_interval(self, judge, interval, verdict):
        low, high = interval
        assert judge(collect.Effect((), (low + high) / 2, low, high)) == verdict

    def test_a_small_sure_loss_is_still_kept(self):
        assert claims.kept(collect.Effect((), -0.005, -0.007, -0.003)) == claims.HOLDS

    def test_findings_that_disagree_make_a_mixed_claim(self):
        effect = collect.Effect((), 0.0, 0.0, 0.0)
        shown = claims.Finding("shown", effect, None)
        made = [
            claims.Finding(verdict, effect, verdict) for verdict in (claims.HOLDS, claims.UNDECIDED)
        ]
        assert claims.Claim("", "", (shown, made[0])).verdict == claims.HOLDS
        assert claims.Claim("", "", (shown, *made)).verdict == "mixed"

    def test_the_area_of_a_front(self):
        assert claims.front([(0.5, 0.5)]) == pytest.approx(0.25)
        assert claims.front([(0.5, 1.0), (1.0, 0.5)]) == pytest.approx(0.75)
        assert claims.front([(0.5, 1.0), (1.0, 0.5), (0.4, 0.9), (0.5, 0.5)]) == pytest.approx(
            0.75
        )  # dominated points


class TestCommitted:
    """docs/evidence.md says what docs/evidence/*.json say, and nothing else."""

    def test_the_page_is_what_the_seeds_give(self):
        seeds = report.read(DOCS / "evidence")
        page = (DOCS / report.PAGE).read_text(encoding="utf-8")
        assert len(seeds) >= 5
        assert report.filled(page, seeds) == page, "run `python -m evaluation.evidence --tables`"

    def test_intervals_and_scores_of_the_page_by_another_route(self):
        """freevariance − fine-tuned, OOD, from the raw bits: no function of the package between file and number."""
        import base64

        gains = []
        for path in sorted((DOCS / "evidence").glob("seed-*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))["suites"]["tiny"]
            accuracy = {}
            for model in ("monosoup_free", "finetuned"):
                means = []
                for task, about in found["tasks"].items():
                    if about["group"] == "OOD":
                        packed = base64.b64decode(found["models"][model]["right"][task])
                        bits = "".join(f"{byte:08b}" for byte in packed)[: len(about["clusters"])]
                        means.append(bits.count("1") / len(bits))
                accuracy[model] = np.mean(means)
            gains.append(100 * (accuracy["monosoup_free"] - accuracy["finetuned"]))
        interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
        expected = f"{np.mean(gains):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]".replace(
            "-", "−"
        )
        page = (DOCS / report.PAGE).read_text(encoding="utf-8")
        assert f"| freevariance − fine-tuned, OOD | {expected} |" in page

    def test_a_page_with_a_missing_block_is_refused(self):
        with pytest.raises(SourceError, match="claims"):
            report.filled("<!-- generated: setting -->\n<!-- end -->", [])

    def test_one_seed_is_too_few(self, tmp_path):
        with pytest.raises(SourceError, match="two"):
            report.read(tmp_path)


MERGES, TWO_TASK_MERGES = models.merges, models.two_task_merges


def few(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What CKA and the controls need, of all the merges."""
    needed = {
        f"{kind}_{label}"
        for kind in ("monosoup", "scalar", "high", "low")
        for label in models.SETTINGS
    }
    yield from ((name, config) for name, config in MERGES(folder) if name in needed)


def test_a_seed_from_training_to_json_and_again(tmp_path, monkeypatch, capsys):
    """With a model that knows nothing and three items per task; the second run asks nothing again."""
    small = replace(
        train.Recipe(),
        hidden=16,
        intermediate=32,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        pretraining=train.Phase(train.OTHER_SKILLS, 3, 8, 1e-3),
        finetuning=train.Phase((TUNED_SKILL,), 3, 8, 1e-3),
    )
    monkeypatch.setattr(train, "Recipe", lambda seed: replace(small, seed=seed))
    monkeypatch.setattr(models, "GENTLE", replace(models.GENTLE, steps=2, batch=4))
    monkeypatch.setattr(models, "ADAPTER", replace(models.ADAPTER, steps=2, batch=4))
    monkeypatch.setattr(models, "merges", few)
    monkeypatch.setattr(
        models, "rounded", lambda base, tuned: iter([("bf16_free", models.monosoup(base, [tuned]))])
    )
    monkeypatch.setattr(models, "two_task_merges", lambda folder: list(TWO_TASK_MERGES(folder))[:1])
    threads = torch.get_num_threads()
    try:
        program.run_seed(3, tmp_path / "seed-3", tmp_path / "evidence", limit=3)
        seed = collect.Seed.read(tmp_path / "evidence" / "seed-3.json")
        before = seed.path.read_text()
        capsys.readouterr()
        program.run_seed(3, tmp_path / "seed-3", tmp_path / "evidence", limit=3)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert (
        said.count("finished before") == len(seed.models("tiny")) + len(seed.models("tiny-two"))
        and "loading" not in said
    )
    assert {key: part for key, part in json.loads(before).items() if key != "minutes"} == {
        key: part for key, part in seed.read(seed.path).data.items() if key != "minutes"
    }
    assert {"same_norm_free", "bf16_finetuned", "low_R0.8", "lora"} <= set(seed.models("tiny"))
    assert all(
        len(about["clusters"]) == 3 for about in seed.data["suites"]["tiny-two"]["tasks"].values()
    )
    cka = seed.data["cka"]["OOD"]
    assert cka["pretrained"] == pytest.approx([1, 1]) and cka["finetuned"][-1] < 1
    assert {record["mode"] for record in seed.data["records"]["lora"]} == {
        "freevariance",
        "variance",
    }
    assert str(tmp_path) not in before
    with pytest.raises(SourceError, match="two"):
        report.read(tmp_path / "evidence")
    (tmp_path / "evidence" / "seed-4.json").write_text(
        before.replace('"limit": 3', '"limit": null')
    )
    with pytest.raises(SourceError, match="different --limit"):
        report.read(tmp_path / "evidence")


def test_seeds_that_agree_to_the_last_digit_decide_nothing():
    flat = collect.Effect.of([0.1, 0.1, 0.1])
    judges = (claims.more, claims.less, claims.kept, claims.best)
    assert [claims.verdict(flat, judge) for judge in judges] == [claims.UNDECIDED] * 4
    assert claims.verdict(collect.Effect.of([0.1, 0.1, 0.11]), claims.more) == claims.HOLDS
    assert claims.verdict(collect.Effect.of([1.0, 1.0]), claims.always) == claims.HOLDS
    assert claims.Finding("", flat, None).text() == "+10.0 in every seed"
