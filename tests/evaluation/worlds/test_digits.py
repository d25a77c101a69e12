"""Images of the world of digits, and the checkpoints that are trained on them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from evaluation.worlds import digits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pretraining_never_sees_the_font_that_fine_tuning_sees():
    for seed in range(5):
        world = digits.build_world(seed)
        assert len(world.finetuning.fonts) == 1
        assert not {*world.finetuning.fonts} & {*world.pretraining.fonts}
        assert {*world.finetuning.fonts} | {*world.pretraining.fonts} == {*digits.FONTS}
    assert len({digits.build_world(seed).finetuning.fonts for seed in range(9)}) > 1


def test_the_same_numbers_draw_the_same_images_and_all_digits_are_there():
    style = digits.build_world(0).pretraining
    one, same, other = (digits.draw(style, 40, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.pixels, same.pixels) and not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (40, 3, 32, 32)
    assert one.pixels.min() >= 0 and one.pixels.max() <= 1
    assert torch.equal(one.digits.bincount(), torch.full((10,), 4))
    torch.testing.assert_close(one.pixels[20:], 1 - one.pixels[:20])  # their negatives


def test_shifts_are_what_their_names_say():
    tests = digits.build_world(0).tests
    light, dark = (
        digits.draw(tests[name], 50, generator()).pixels for name in ("fonts", "inverted")
    )
    assert light.mean() < 0.5 < dark.mean()
    blurred = digits.draw(replace(tests["blurred"], noise=0.0), 50, generator()).pixels
    sharp = digits.draw(replace(tests["fonts"], noise=0.0), 50, generator()).pixels
    steps = [(images[..., 1:] - images[..., :-1]).abs().max() for images in (sharp, blurred)]
    assert steps[1] < 0.6 * steps[0]


def test_handwritten_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, known = digits.handwritten(), datasets.load_digits()
    assert images.digits.tolist() == known.target.tolist()
    small = torch.nn.functional.adaptive_avg_pool2d(images.pixels[:, :1, 4:-4, 4:-4], 8)[:, 0]
    assert (
        torch.corrcoef(torch.stack([small.flatten(), torch.tensor(known.data).flatten()]))[0, 1]
        > 0.9
    )


def test_a_set_is_written_whole_and_stays(tmp_path):
    from PIL import Image
    from torch import tensor

    pixels = digits.draw(digits.build_world(0).tests["fonts"], 20, generator())
    digits.write_sets({"fonts": pixels}, tmp_path)
    files = sorted((tmp_path / "fonts").rglob("*.png"))
    assert len(files) == 20 and {file.parent.name for file in files} == set(map(str, range(10)))
    number = int(files[0].stem)
    read = tensor(list(Image.open(files[0]).tobytes())).reshape(32, 32, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(read, pixels.pixels[number])
    files[0].unlink()
    digits.write_sets({"fonts": pixels}, tmp_path)
    assert not files[0].exists()
    digits.write_sets({"fonts": pixels}, tmp_path, fresh=True)
    assert files[0].exists() and [entry.name for entry in tmp_path.iterdir()] == ["fonts"]


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_checkpoints_are_those_of_timm_and_reused(tmp_path, name):
    timm = pytest.importorskip("timm", reason="needs the extra vision")
    from evaluation.worlds import digits_training

    phase = digits_training.Phase(steps=2, batch=4, learning_rate=1e-3)
    hasty = digits_training.ARCHITECTURES[name]
    hasty = replace(hasty, pretraining=phase, finetuning=phase)
    world = digits.build_world(0)
    assert digits_training.train_pair(name, hasty, world, tmp_path)
    assert not digits_training.train_pair(name, hasty, world, tmp_path)
    for place in ("pretrained", "finetuned"):
        model = timm.create_model(f"local-dir:{tmp_path / place}", pretrained=True)
        config = json.loads((tmp_path / place / "config.json").read_text())
        assert config["label_names"] == list("0123456789")
        assert model.pretrained_cfg["mean"] == [0.5] * 3
    other = replace(hasty, finetuning=replace(phase, learning_rate=2e-3))
    assert digits_training.train_pair(name, other, world, tmp_path)
