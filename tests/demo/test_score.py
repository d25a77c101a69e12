"""Grades and their means with standard errors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import SMALL_WORLD, UNTRAINED, WORLD, questions
from scipy import stats
from transformers import AutoTokenizer, Qwen3ForCausalLM

from demo import score
from evaluation.statistics import Estimate, paired
from evaluation.worlds import training
from evaluation.worlds.sums import SKILLS


class TestStatistics:
    def test_independent_items_give_the_binomial_standard_error(self):
        right = np.array([1.0] * 30 + [0.0] * 10)
        estimate = score.mean_over_skills(
            {"s": right}, {"s": questions([str(i) for i in range(40)])}, ["s"]
        )
        assert estimate.mean == pytest.approx(0.75)
        assert estimate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
        assert estimate.standard_error == pytest.approx(stats.sem(right, ddof=0))
        assert estimate.interval() == pytest.approx(
            stats.norm.interval(0.95, 0.75, math.sqrt(0.75 * 0.25 / 40))
        )

    def test_skills_weigh_the_same_and_their_errors_add_in_squares(self):
        values = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0, 1.0, 0.0])}
        items = {"a": questions(["1", "2"]), "b": questions(["3", "4", "5", "6"])}
        estimate = score.mean_over_skills(values, items, ["a", "b"])
        assert estimate.mean == pytest.approx((0.5 + 0.75) / 2)
        assert estimate.standard_error == pytest.approx(math.sqrt(0.25 / 2 + 0.1875 / 4) / 2)

    def test_repeating_each_item_adds_no_precision(self):
        right = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
        clusters = list("abcde")
        once = score.mean_over_skills({"s": right}, {"s": questions(clusters)}, ["s"])
        twice = score.mean_over_skills(
            {"s": np.tile(right, 2)}, {"s": questions(clusters * 2)}, ["s"]
        )
        across = score.mean_over_skills(
            {"s": right, "t": right},
            {"s": questions(clusters), "t": questions(clusters, "t")},
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
        gain = paired({"s": model.ravel()}, {"s": reference.ravel()})
        items = {"s": questions([str(cluster) for cluster in range(150) for _ in range(3)])}
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
            Estimate(0.0, 1.0).interval(0.95),
            Estimate(0.0, 1.0).interval(0.99),
        )
        assert narrow[1] == pytest.approx(1.959964, abs=1e-6) and wide[1] == pytest.approx(
            2.575829, abs=1e-6
        )


class TestGrades:
    def test_the_saved_model_is_graded(self, folder):
        items = {skill: WORLD.test[skill][:3] for skill in SKILLS}
        tokenizer = AutoTokenizer.from_pretrained(folder / training.FINETUNED)
        grades = score.grade(
            Qwen3ForCausalLM.from_pretrained(folder / training.FINETUNED), tokenizer, items
        )
        assert list(grades) == list(SKILLS)
        assert all(values.shape == (3,) and set(values) <= {0.0, 1.0} for values in grades.values())

    def test_a_model_that_learned_one_fact_is_right_about_it_and_wrong_elsewhere(self, tmp_path):
        fact, other = WORLD.train["home"][0], replace(WORLD.train["home"][0], answer="nowhere")
        phase = training.Phase(("home",), steps=30, batch=4, learning_rate=3e-2)
        recipe = replace(UNTRAINED, pretraining=phase, finetuning=phase)
        training.train_pair(
            recipe, replace(SMALL_WORLD, train={**SMALL_WORLD.train, "home": [fact]}), tmp_path
        )
        model = Qwen3ForCausalLM.from_pretrained(tmp_path / training.FINETUNED)
        saved = AutoTokenizer.from_pretrained(tmp_path / training.FINETUNED)
        grades = score.grade(model, saved, {"home": [other, fact, other], "empty": []})
        assert grades["home"].tolist() == [0.0, 1.0, 0.0] and grades["empty"].size == 0

    def test_padding_does_not_change_answers(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder / training.FINETUNED)
        model = Qwen3ForCausalLM.from_pretrained(folder / training.FINETUNED)
        prompts = [WORLD.test[skill][0].prompt for skill in SKILLS]
        greedy = score.GenerationConfig(
            do_sample=False,
            max_new_tokens=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        alone = [score._answers(model, tokenizer, [prompt], greedy)[0] for prompt in prompts]
        assert score._answers(model, tokenizer, prompts, greedy) == alone
