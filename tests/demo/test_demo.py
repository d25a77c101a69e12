"""The parts of `python -m demo`, each small enough to finish in seconds; the whole takes minutes and is run as such."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoTokenizer, Qwen3ForCausalLM

from demo import merge, score, summary
from demo.__main__ import grade_checkpoint, main
from evaluation.worlds import training as train
from evaluation.worlds.sums import (
    FACTS,
    NAMES,
    OTHER_SKILLS,
    SKILLS,
    SUMS,
    TEST_PAIRS,
    TUNED_SKILL,
    Item,
    build_tokenizer,
    build_world,
    italian,
)

WORLD = build_world(0)
SMALL = replace(WORLD, train={skill: items[:100] for skill, items in WORLD.train.items()})
TINY = train.Recipe(
    hidden=16,
    intermediate=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    pretraining=train.Phase(OTHER_SKILLS, steps=3, batch=8, learning_rate=1e-3),
    finetuning=train.Phase((TUNED_SKILL,), steps=3, batch=8, learning_rate=1e-3),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(item for skill in SKILLS for item in WORLD.train[skill])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestWorld:
    def test_no_pair_of_numbers_is_both_trained_and_tested_in_any_order_or_language(self):
        for skills in (tuple(SUMS), ("larger",)):
            trained = {item.cluster for skill in skills for item in WORLD.train[skill]}
            tested = {item.cluster for skill in skills for item in WORLD.test[skill]}
            assert trained and len(tested) == TEST_PAIRS
            assert not trained & tested

    def test_the_second_task_is_the_first_in_words_that_no_skill_uses(self):
        items = italian(WORLD.test[TUNED_SKILL])
        assert [item.answer for item in items] == [item.answer for item in WORLD.test[TUNED_SKILL]]
        assert {re.sub(r"\d+", "", item.prompt) for item in items} == {"Quanto fa  più ?"}

    def test_a_cluster_is_the_unordered_pair(self):
        numbers = {}
        for item in WORLD.train["sum_en"] + WORLD.test["sum_en"]:
            a, b = item.prompt.removeprefix("What is ").removesuffix("?").split(" plus ")
            assert item.answer == str(int(a) + int(b))
            numbers.setdefault(item.cluster, set()).add(frozenset((a, b)))
        assert all(len(pairs) == 1 for pairs in numbers.values())
        assert len(numbers) == 50 * 51 // 2  # every pair is somewhere

    def test_id_and_ood_are_disjoint_and_make_up_the_world(self):
        assert TUNED_SKILL not in OTHER_SKILLS
        assert {TUNED_SKILL, *OTHER_SKILLS} == set(SKILLS) == set(WORLD.test) == set(WORLD.train)
        prompts = [{item.prompt for item in WORLD.test[skill]} for skill in SKILLS]
        assert len(set().union(*prompts)) == sum(len(WORLD.test[skill]) for skill in SKILLS)
        assert (
            set(TINY.pretraining.skills)
            == set(train.Recipe().pretraining.skills)
            == set(OTHER_SKILLS)
        )
        assert train.Recipe().finetuning.skills == (TUNED_SKILL,)

    def test_facts_are_one_per_name_and_tested_as_trained(self):
        for skill, (_, answers) in FACTS.items():
            assert (
                len({item.cluster for item in WORLD.test[skill]}) == len(WORLD.test[skill]) == NAMES
            )
            assert WORLD.test[skill] == WORLD.train[skill]
            assert {item.answer for item in WORLD.test[skill]} <= set(answers)

    def test_a_seed_is_a_world(self):
        assert build_world(0) == WORLD
        assert build_world(1).test["sum_en"] != WORLD.test["sum_en"]
        assert build_world(1).test["colour"] != WORLD.test["colour"]


class TestTokenizer:
    def test_round_trip(self, tokenizer):
        for skill in SKILLS:
            for item in WORLD.test[skill][::25]:
                text = f"{item.prompt} {item.answer}"
                assert tokenizer.decode(tokenizer.encode(text)) == text
        unseen = "Ünseen — 東京 🙂"
        assert tokenizer.decode(tokenizer.encode(unseen)) == unseen

    def test_each_digit_is_a_token(self, tokenizer):
        for token in tokenizer.get_vocab():
            assert not any(character.isdigit() for character in token) or len(token) == 1, token
        assert [
            token for token in tokenizer.tokenize("What is 12 plus 345?") if token.isdigit()
        ] == list("12345")

    def test_every_answer_fits_what_is_generated(self, tokenizer):
        answers = {item.answer for skill in SKILLS for item in WORLD.test[skill]}
        assert (
            max(len(tokenizer.encode(f" {answer}")) for answer in answers) + 1
            <= score.ANSWER_TOKENS
        )

    def test_only_answers_are_targets(self, tokenizer):
        item = WORLD.train["home"][0]
        phase = train.Phase(("home",), steps=1, batch=1, learning_rate=0.0)
        [(inputs, targets)] = train._batches(
            [train._encode([item], tokenizer)], phase, 0, tokenizer
        )
        assert tokenizer.decode(inputs[0]).startswith(item.prompt)
        assert tokenizer.decode(targets[targets != train.IGNORED]) == f" {item.answer}<end>"
        first = int((targets[0] != train.IGNORED).nonzero()[0])
        assert (
            tokenizer.decode(inputs[0, : first + 1]) == item.prompt
        )  # the whole prompt is seen, no answer is


def _items(clusters: list[str], skill: str = "s") -> list[Item]:
    return [Item(skill, f"{number}", "", cluster) for number, cluster in enumerate(clusters)]


class TestStatistics:
    def test_independent_items_give_the_binomial_standard_error(self):
        right = np.array([1.0] * 30 + [0.0] * 10)
        estimate = score.mean_over_skills(
            {"s": right}, {"s": _items([str(i) for i in range(40)])}, ["s"]
        )
        assert estimate.mean == pytest.approx(0.75)
        assert estimate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
        assert estimate.standard_error == pytest.approx(stats.sem(right, ddof=0))
        assert estimate.interval() == pytest.approx(
            stats.norm.interval(0.95, 0.75, math.sqrt(0.75 * 0.25 / 40))
        )

    def test_skills_weigh_the_same_and_their_errors_add_in_squares(self):
        values = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0, 1.0, 0.0])}
        items = {"a": _items(["1", "2"]), "b": _items(["3", "4", "5", "6"])}
        estimate = score.mean_over_skills(values, items, ["a", "b"])
        assert estimate.mean == pytest.approx((0.5 + 0.75) / 2)
        assert estimate.standard_error == pytest.approx(math.sqrt(0.25 / 2 + 0.1875 / 4) / 2)

    def test_repeating_each_item_adds_no_precision(self):
        right = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
        clusters = list("abcde")
        once = score.mean_over_skills({"s": right}, {"s": _items(clusters)}, ["s"])
        twice = score.mean_over_skills({"s": np.tile(right, 2)}, {"s": _items(clusters * 2)}, ["s"])
        across = score.mean_over_skills(
            {"s": right, "t": right},
            {"s": _items(clusters), "t": _items(clusters, "t")},
            ["s", "t"],
        )
        assert twice.standard_error == pytest.approx(once.standard_error)
        assert across.standard_error == pytest.approx(once.standard_error)

    def test_interval_of_a_clustered_difference_agrees_with_the_bootstrap(self):
        rng = np.random.default_rng(0)
        luck = rng.normal(size=150)  # one number per cluster, shared by its three items
        model, reference = (
            (luck[:, None] + rng.normal(size=(150, 3)) > cut).astype(float) for cut in (-0.6, 0.1)
        )
        gain = score.paired_difference({"s": model.ravel()}, {"s": reference.ravel()})
        items = {"s": _items([str(cluster) for cluster in range(150) for _ in range(3)])}
        low, high = score.mean_over_skills(gain, items, ["s"]).interval()
        drawn = stats.bootstrap(
            ((model - reference).mean(axis=1),),
            np.mean,
            n_resamples=4000,
            method="percentile",
            rng=0,
        ).confidence_interval
        # Both are estimates: 2 % of the width apart when written.
        assert (low, high) == pytest.approx(tuple(drawn), abs=0.1 * (high - low))

    def test_confidence_widens_the_interval(self):
        narrow, wide = (
            score.Estimate(0.0, 1.0).interval(0.95),
            score.Estimate(0.0, 1.0).interval(0.99),
        )
        assert narrow[1] == pytest.approx(1.959964, abs=1e-6) and wide[1] == pytest.approx(
            2.575829, abs=1e-6
        )


QUESTIONS = {
    skill: _items([f"{skill} {number}" for number in range(200)], skill) for skill in SKILLS
}


class TestSummary:
    def grades(self, **right: tuple[int, int]) -> dict[str, score.Values]:
        """Accuracy of each model as (ID, OOD) right answers of 200; the same items are right in every model."""

        def of(id_right: int, ood_right: int) -> score.Values:
            counts = {skill: id_right if skill == TUNED_SKILL else ood_right for skill in SKILLS}
            return {
                skill: np.array([1.0] * count + [0.0] * (200 - count))
                for skill, count in counts.items()
            }

        titles = [summary.PRETRAINED, summary.FINETUNED, *(soup.title for soup in merge.SOUPS)]
        return {title: of(*pair) for title, pair in zip(titles, right.values(), strict=True)}

    def test_sentences_follow_the_numbers(self):
        said = summary.sentences(
            self.grades(
                before=(20, 198),
                tuned=(180, 120),
                wise=(160, 180),
                free=(180, 121),
                fc=(180, 120),
                varied=(181, 90),
                vc=(181, 91),
            ),
            QUESTIONS,
        )
        assert said[0] == "Fine-tuning took ID from 10.0 to 90.0 % and OOD from 99.0 to 60.0 %."
        wise, free, varied, free_to_wise, varied_to_wise, free_split, varied_split = said[1:8]
        assert re.fullmatch(
            r"Against fine-tuned, Wise-FT 0.5: ID −10.0 \[.*\], lower; OOD \+30.0 \[.*\], higher\.",
            wise,
        )
        assert re.search(
            r"MonoSoup freevariance: ID unchanged on every item; OOD \+0.5 \[.*\], higher", free
        )
        assert re.search(r"ID \+0.5 \[−.*\], which covers zero; OOD −15.0 \[.*\], lower", varied)
        assert re.search(
            r"Against Wise-FT 0.5, MonoSoup freevariance: ID \+10.0 .*, higher; OOD −29.5 .*, lower",
            free_to_wise,
        )
        assert varied_to_wise.startswith("Against Wise-FT 0.5, MonoSoup variance R=0.8: ID +10.5 [")
        assert re.search(
            r"control .*MonoSoup freevariance: ID unchanged .* OOD \+0.5 \[.*\], higher", free_split
        )
        assert re.search(
            r"control .*MonoSoup variance R=0.8: ID unchanged .* OOD −0.5 \[.*\], lower",
            varied_split,
        )

    def test_gains_and_losses_that_cancel_are_not_called_unchanged(self):
        grades = self.grades(
            a=(20, 198),
            b=(180, 120),
            c=(180, 120),
            d=(180, 120),
            e=(180, 120),
            f=(180, 120),
            g=(180, 120),
        )
        swapped = {
            skill: values[::-1] if skill == "home" else values
            for skill, values in grades["fine-tuned"].items()
        }
        said = summary.sentences({**grades, merge.FREE.title: swapped}, QUESTIONS)
        assert (
            re.search(r"OOD 0.0 \[−.*\], which covers zero", said[2])
            and "OOD unchanged on every item" in said[3]
        )

    def test_the_table_fits_100_columns_and_shows_each_model(self):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(
            summary.table(
                self.grades(
                    a=(20, 198),
                    b=(180, 120),
                    c=(160, 180),
                    d=(180, 121),
                    e=(180, 120),
                    f=(181, 90),
                    g=(181, 91),
                ),
                QUESTIONS,
            )
        )
        shown = console.export_text()
        assert shown.count("  norm-matched control") == 2
        assert (
            "Wise-FT 0.5" in shown
            and "80.0 ± 2.8" in shown
            and "−10.0 [" in shown
            and "…" not in shown
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert train.train_pair(TINY, SMALL, folder)
    return folder


class TestTraining:
    def test_checkpoints_load_and_differ(self, folder):
        base, tuned = (
            Qwen3ForCausalLM.from_pretrained(folder / name)
            for name in (train.PRETRAINED, train.FINETUNED)
        )
        assert base.config.tie_word_embeddings is False and base.dtype == torch.float32
        for (name, before), after in zip(
            base.state_dict().items(), tuned.state_dict().values(), strict=True
        ):
            assert torch.isfinite(after).all()
            assert not torch.equal(before, after), f"{name} was not trained"

    def test_the_saved_model_is_graded(self, folder):
        items = {skill: WORLD.test[skill][:3] for skill in SKILLS}
        tokenizer = AutoTokenizer.from_pretrained(folder / train.FINETUNED)
        grades = score.grade(
            Qwen3ForCausalLM.from_pretrained(folder / train.FINETUNED), tokenizer, items
        )
        assert list(grades) == list(SKILLS)
        assert all(values.shape == (3,) and set(values) <= {0.0, 1.0} for values in grades.values())

    def test_a_model_that_learned_one_fact_is_right_about_it_and_wrong_elsewhere(
        self, tokenizer, tmp_path
    ):
        fact, other = WORLD.train["home"][0], replace(WORLD.train["home"][0], answer="nowhere")
        phase = train.Phase(("home",), steps=30, batch=4, learning_rate=3e-2)
        recipe = replace(TINY, pretraining=phase, finetuning=phase)
        train.train_pair(recipe, replace(SMALL, train={**SMALL.train, "home": [fact]}), tmp_path)
        model = Qwen3ForCausalLM.from_pretrained(tmp_path / train.FINETUNED)
        saved = AutoTokenizer.from_pretrained(tmp_path / train.FINETUNED)
        grades = score.grade(model, saved, {"home": [other, fact, other], "empty": []})
        assert grades["home"].tolist() == [0.0, 1.0, 0.0] and grades["empty"].size == 0

    def test_padding_does_not_change_answers(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder / train.FINETUNED)
        model = Qwen3ForCausalLM.from_pretrained(folder / train.FINETUNED)
        prompts = [WORLD.test[skill][0].prompt for skill in SKILLS]
        greedy = score.GenerationConfig(
            do_sample=False,
            max_new_tokens=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        alone = [score._answers(model, tokenizer, [prompt], greedy)[0] for prompt in prompts]
        assert score._answers(model, tokenizer, prompts, greedy) == alone

    def test_finished_checkpoints_are_reused(self, folder):
        before = (folder / train.FINETUNED / "model.safetensors").stat().st_mtime_ns
        assert not train.train_pair(TINY, SMALL, folder)
        assert (folder / train.FINETUNED / "model.safetensors").stat().st_mtime_ns == before

    @pytest.mark.parametrize(
        ("recipe", "world"),
        [
            (replace(TINY, seed=1), SMALL),
            (replace(TINY, finetuning=replace(TINY.finetuning, learning_rate=2e-3)), SMALL),
            (TINY, replace(SMALL, train={**SMALL.train, "home": SMALL.train["home"][1:]})),
        ],
        ids=["seed", "settings", "items"],
    )
    def test_whatever_changes_the_weights_changes_the_fingerprint(self, recipe, world):
        assert train.fingerprint(recipe, world) != train.fingerprint(TINY, SMALL)

    def test_changed_settings_train_anew(self, tmp_path):
        assert train.train_pair(TINY, SMALL, tmp_path)
        weights = (tmp_path / train.PRETRAINED / "model.safetensors").read_bytes()
        assert train.train_pair(replace(TINY, seed=1), SMALL, tmp_path)
        assert (tmp_path / train.PRETRAINED / "model.safetensors").read_bytes() != weights
        assert train.train_pair(TINY, SMALL, tmp_path), "the other settings' checkpoints were taken"
        assert (
            tmp_path / train.PRETRAINED / "model.safetensors"
        ).read_bytes() == weights  # bitwise reproducible
        assert train.train_pair(TINY, SMALL, tmp_path, fresh=True)

    def test_an_interrupted_run_leaves_nothing_that_looks_finished(self, tmp_path, monkeypatch):
        def killed(*_args, **_kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:  # weights are on disk, the rest is not
            patch.setattr(train.PreTrainedTokenizerBase, "save_pretrained", killed)
            with pytest.raises(KeyboardInterrupt):
                train.train_pair(TINY, SMALL, tmp_path)
        assert list(tmp_path.rglob("*.safetensors")) and not (tmp_path / train.PRETRAINED).exists()
        assert train.train_pair(TINY, SMALL, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {train.PRETRAINED, train.FINETUNED}
        assert not train.train_pair(TINY, SMALL, tmp_path)
        (tmp_path / train.FINETUNED / train.RECIPE_FILE).write_text("{")
        assert train.train_pair(TINY, SMALL, tmp_path)

    def test_a_second_fine_tune_is_reused_until_its_settings_change(self, folder, tmp_path):
        items, target = italian(SMALL.train[TUNED_SKILL]), tmp_path / "second"
        assert train.fine_tune(folder / train.PRETRAINED, target, items, TINY.finetuning, 1)
        assert not train.fine_tune(folder / train.PRETRAINED, target, items, TINY.finetuning, 1)
        assert train.fine_tune(folder / train.PRETRAINED, target, items, TINY.finetuning, 2)
        assert train.fine_tune(folder / train.PRETRAINED, target, items[1:], TINY.finetuning, 2)

    def test_an_adapter_moves_every_linear_layer_by_its_rank_and_nothing_else(
        self, folder, tmp_path
    ):
        items = WORLD.train[TUNED_SKILL]
        assert train.fine_tune(
            folder / train.PRETRAINED, tmp_path / "lora", items, TINY.finetuning, 0, rank=2
        )
        before, after = (
            load_file(place / "model.safetensors")
            for place in (folder / train.PRETRAINED, tmp_path / "lora")
        )
        for name, weight in before.items():
            delta = (after[name] - weight).double()
            sigma = torch.linalg.svdvals(delta) if delta.ndim == 2 else delta
            if "_proj" in name:
                assert delta.norm() > 0 and int((sigma > 1e-4 * sigma[0]).sum()) == 2, name
            else:
                assert not delta.any(), name


class TestSoups:
    @pytest.mark.parametrize("soup", merge.SOUPS, ids=lambda soup: soup.file)
    def test_yaml_says_what_the_title_says(self, soup):
        config = yaml.safe_load(soup.yaml)
        assert config["base_model"] == f"./{train.PRETRAINED}"
        assert [source["model"] for source in config["models"]] == [f"./{train.FINETUNED}"]
        parameters = config.get("parameters", {})
        assert parameters.get("report") == (soup.report.as_posix() if soup.reports else None)
        if soup is merge.WISE:
            assert config["merge_method"] == "task_arithmetic"
            assert soup.title.endswith(str(config["models"][0]["parameters"]["weight"]))
        else:
            assert config["merge_method"] == "monosoup" and parameters["mode"] in soup.title
            assert "R" not in parameters or f"R={parameters['R']}" in soup.title
            assert (parameters.get("coefficients") == "scalar") == soup.title.endswith(
                merge.CONTROL
            )

    def test_wise_ft_is_the_mean_of_the_two_and_can_be_graded(self, folder):
        assert merge.merge(merge.WISE, folder) == "mergekit-yaml configs/wise-ft.yml merged/wise-ft"
        base, tuned, soup = (
            Qwen3ForCausalLM.from_pretrained(folder / name).state_dict()
            for name in (train.PRETRAINED, train.FINETUNED, merge.WISE.merged)
        )
        for name, weight in soup.items():
            torch.testing.assert_close(weight, (base[name] + tuned[name]) / 2)
        assert grade_checkpoint(folder / merge.WISE.merged, {"home": WORLD.test["home"][:2]})[
            "home"
        ].shape == (2,)

    def test_mergekit_failing_stops_the_demo_with_its_message(self, folder):
        broken = replace(
            merge.WISE,
            file="broken",
            yaml=merge.WISE_FT.replace("task_arithmetic", "no_such_method"),
        )
        left = folder / broken.merged / "model.safetensors"
        left.parent.mkdir(parents=True)
        left.write_text("of an earlier run")
        with pytest.raises(merge.CommandError, match=r"(?s)exit code 1.*no_such_method"):
            merge.merge(broken, folder)
        assert not left.exists()
        assert "no_such_method" in (folder / "logs" / "broken.log").read_text()

    def test_a_missing_tool_is_named(self):
        with pytest.raises(merge.CommandError, match="mergekit-no-such-tool is not in"):
            merge.tool("mergekit-no-such-tool")


def test_results_hold_every_number(tmp_path, monkeypatch, capsys):
    """The whole run with the merges replaced: each soup is a copy of the fine-tuned model."""
    # Enough to answer one city to every "lives in", so that some answers are right.
    recipe = replace(
        TINY, pretraining=train.Phase(("home",), steps=40, batch=16, learning_rate=1e-2)
    )
    monkeypatch.setattr(train, "Recipe", lambda seed: replace(recipe, seed=seed))
    monkeypatch.setattr(
        merge,
        "merge",
        lambda soup, out: shutil.copytree(out / train.FINETUNED, out / soup.merged).name,
    )
    monkeypatch.setattr(merge, "print_report", lambda soup, out: None)
    monkeypatch.setattr(merge, "tool", lambda name: name)
    assert main(["--out", str(tmp_path / "out"), "--seed", "3"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    items = [
        json.loads(line)
        for line in (tmp_path / "out" / "test-items.jsonl").read_text("utf-8").splitlines()
    ]
    assert results["seed"] == 3 and results["recipe"]["seed"] == 3
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["models"]) == {
        summary.PRETRAINED,
        summary.FINETUNED,
        *(soup.title for soup in merge.SOUPS),
    }
    tuned, soup = results["models"][summary.FINETUNED], results["models"][merge.FREE.title]
    assert (
        soup["weights_sha256"]
        == tuned["weights_sha256"]
        != results["models"][summary.PRETRAINED]["weights_sha256"]
    )
    assert soup["minus fine-tuned"]["ood"] == {
        "mean": 0.0,
        "standard_error": 0.0,
        "interval_95": [0.0, 0.0],
    }
    assert [item["skill"] for item in items] == [
        skill for skill in SKILLS for _ in tuned["skills"][skill]["right"]
    ]
    for skill in SKILLS:
        for model in results["models"].values():
            counted = model["skills"][skill]
            assert counted["mean"] == pytest.approx(counted["right"].count("1") / counted["items"])
    assert tuned["ood"]["mean"] == pytest.approx(
        np.mean([tuned["skills"][skill]["mean"] for skill in OTHER_SKILLS])
    )
    assert results["models"][summary.PRETRAINED]["skills"]["home"]["mean"] > 0
    shown = capsys.readouterr().out
    assert all(sentence[:80] in shown for sentence in results["sentences"])


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "thesis.txt").write_text("precious")
    assert main(["--out", str(tmp_path), "--fresh"]) == 1
    assert "--out" in capsys.readouterr().out
    assert (tmp_path / "pretrained" / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]
