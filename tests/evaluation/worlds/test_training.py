"""Checkpoints: trained, reused, and trained anew when anything changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny import SMALL_WORLD, UNTRAINED, WORLD
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from evaluation.worlds import finished, training
from evaluation.worlds.sums import TUNED_SKILL, italian

FASTER = replace(UNTRAINED.finetuning, learning_rate=2e-3)
FEWER = replace(SMALL_WORLD, train={**SMALL_WORLD.train, "home": SMALL_WORLD.train["home"][1:]})


def test_only_answers_are_targets(tokenizer):
    item = WORLD.train["home"][0]
    phase = training.Phase(("home",), steps=1, batch=1, learning_rate=0.0)
    [(inputs, targets)] = training._batches(
        [training._encode([item], tokenizer)], phase, 0, tokenizer
    )
    assert tokenizer.decode(inputs[0]).startswith(item.prompt)
    assert tokenizer.decode(targets[targets != training.IGNORED]) == f" {item.answer}<end>"
    first = int((targets[0] != training.IGNORED).nonzero()[0])
    # The whole prompt is seen, no answer is.
    assert tokenizer.decode(inputs[0, : first + 1]) == item.prompt


def test_checkpoints_load_and_differ(folder):
    base, tuned = (
        Qwen3ForCausalLM.from_pretrained(folder / name)
        for name in (training.PRETRAINED, training.FINETUNED)
    )
    assert base.config.tie_word_embeddings is False and base.dtype == torch.float32
    for (name, before), after in zip(
        base.state_dict().items(), tuned.state_dict().values(), strict=True
    ):
        assert torch.isfinite(after).all()
        assert not torch.equal(before, after), f"{name} was not trained"


def test_finished_checkpoints_are_reused(folder):
    before = (folder / training.FINETUNED / "model.safetensors").stat().st_mtime_ns
    assert not training.train_pair(UNTRAINED, SMALL_WORLD, folder)
    assert (folder / training.FINETUNED / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("recipe", "world"),
    [
        (replace(UNTRAINED, seed=1), SMALL_WORLD),
        (replace(UNTRAINED, finetuning=FASTER), SMALL_WORLD),
        (UNTRAINED, FEWER),
    ],
    ids=["seed", "settings", "items"],
)
def test_whatever_changes_the_weights_changes_the_fingerprint(recipe, world):
    assert training.fingerprint(recipe, world) != training.fingerprint(UNTRAINED, SMALL_WORLD)


def test_changed_settings_train_anew(tmp_path):
    assert training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)
    file = tmp_path / training.PRETRAINED / "model.safetensors"
    weights = file.read_bytes()
    assert training.train_pair(replace(UNTRAINED, seed=1), SMALL_WORLD, tmp_path)
    assert file.read_bytes() != weights
    again = training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)
    assert again, "the other settings' checkpoints were taken"
    assert file.read_bytes() == weights  # bitwise reproducible
    assert training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path, fresh=True)


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # weights are on disk, the rest is not
        patch.setattr(training.PreTrainedTokenizerBase, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)
    assert list(tmp_path.rglob("*.safetensors")) and not (tmp_path / training.PRETRAINED).exists()
    assert training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {training.PRETRAINED, training.FINETUNED}
    assert not training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)
    (tmp_path / training.FINETUNED / finished.RECIPE_FILE).write_text("{")
    assert training.train_pair(UNTRAINED, SMALL_WORLD, tmp_path)


def test_a_second_fine_tune_is_reused_until_its_settings_change(folder, tmp_path):
    items, target = italian(SMALL_WORLD.train[TUNED_SKILL]), tmp_path / "second"
    source, phase = folder / training.PRETRAINED, UNTRAINED.finetuning
    assert training.fine_tune(source, target, items, phase, 1)
    assert not training.fine_tune(source, target, items, phase, 1)
    assert training.fine_tune(source, target, items, phase, 2)
    assert training.fine_tune(source, target, items[1:], phase, 2)


def test_an_adapter_moves_every_linear_layer_by_its_rank_and_nothing_else(folder, tmp_path):
    items = WORLD.train[TUNED_SKILL]
    assert training.fine_tune(
        folder / training.PRETRAINED, tmp_path / "lora", items, UNTRAINED.finetuning, 0, rank=2
    )
    before, after = (
        load_file(place / "model.safetensors")
        for place in (folder / training.PRETRAINED, tmp_path / "lora")
    )
    for name, weight in before.items():
        delta = (after[name] - weight).double()
        sigma = torch.linalg.svdvals(delta) if delta.ndim == 2 else delta
        if "_proj" in name:
            assert delta.norm() > 0 and int((sigma > 1e-4 * sigma[0]).sum()) == 2, name
        else:
            assert not delta.any(), name
