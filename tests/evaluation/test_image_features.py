"""Hidden states of image classifiers against a forward by hand, and `evaluation.cka --images`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import pictures
from helpers.cka_oracle import linear_cka

timm = pytest.importorskip("timm", reason="needs the extra vision")
import transformers  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from evaluation import cka, image_features  # noqa: E402
from evaluation.sources import SourceError  # noqa: E402

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_CONVNEXT = {"depths": [1, 2, 1, 1], "dims": [8, 12, 16, 20], "patch_size": 2}


def small(name):
    torch.manual_seed(0)
    arguments = {"vit_tiny_patch16_224": SMALL_VIT, "convnext_tiny": SMALL_CONVNEXT}[name]
    return timm.create_model(name, num_classes=3, **arguments).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_a_vision_transformer_by_hand(pixels):
    model = small("vit_tiny_patch16_224")
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    expected = [tokens.mean(1)]
    for block in model.blocks:
        tokens = block(tokens)
        expected.append(tokens.mean(1))
    found = image_features.pooled(model, image_features.blocks(model), pixels)
    assert [state.shape for state in found] == [(3, 24)] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(module._forward_hooks for module in model.modules()), "a hook was left"


@torch.inference_mode()
def test_a_convnext_by_hand(pixels):
    model = small("convnext_tiny")
    state = model.stem(pixels)
    expected = []
    for stage in model.stages:
        state = stage.downsample(state)
        expected = expected or [state.mean((2, 3))]  # what goes into the first block
        for block in stage.blocks:
            state = block(state)
            expected.append(state.mean((2, 3)))
    found = image_features.pooled(model, image_features.blocks(model), pixels)
    assert [state.shape[1] for state in found] == [8, 8, 12, 12, 16, 20]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("config", "model", "count"),
    [
        ("ViTConfig", "ViTForImageClassification", 12),
        ("CLIPConfig", "CLIPForImageClassification", 12),
        ("ConvNextConfig", "ConvNextForImageClassification", 18),
    ],
)
def test_blocks_of_transformers(config, model, count):
    with torch.device("meta"):
        module = getattr(transformers, model)(getattr(transformers, config)())
    assert len(image_features.blocks(module)) == count


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair of ConvNeXts, and two sets of images."""
    place = tmp_path_factory.mktemp("image-cka")
    model = small("convnext_tiny")
    save_for_hf(model, str(place / "pretrained"), safe_serialization=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std().nan_to_num() * torch.randn_like(weight)
    save_for_hf(model, str(place / "finetuned"), safe_serialization=True)
    pictures.write(place / "id", pictures.COLOURS, 4)
    pictures.write(place / "ood", pictures.COLOURS, 3, seed=1)
    return place


def start(place, out, *more):
    models = [f"--model={name}={place / name}" for name in ("pretrained", "finetuned")]
    sets = [f"--images=ID={place / 'id'}", f"--images=OOD={place / 'ood'}"]
    places = ["--out", str(out), "--merge-cache", str(out / "merged")]
    return cka.main([*models, *sets, *places, "--device", "cpu", *more])


def test_the_program_gives_the_definition(place, tmp_path):
    assert start(place, tmp_path, "--variants", "--batch-size", "5") == 0
    result = json.loads((tmp_path / "cka.json").read_text())
    assert (tmp_path / "cka.png").is_file()
    assert list(result["cka"]["OOD"]) == ["pretrained", "finetuned", "high_only", "low_only"]
    assert result["images"]["ID"]["items"] == 12 and result["images"]["OOD"]["items"] == 9
    states = [_states(place / name, place / "ood") for name in ("pretrained", "finetuned")]
    expected = [linear_cka(x, y) for x, y in zip(*states, strict=True)]
    assert result["cka"]["OOD"]["finetuned"] == pytest.approx(expected, abs=1e-4)
    assert max(expected) < 0.9999, "the pair is too close to tell anything"


def _states(model, images):
    """Features of all images, one image at a time."""
    from evaluation.engines import image_classifiers

    loaded = image_classifiers.load(model, 3)
    from PIL import Image

    rows = []
    for file in sorted(images.rglob("*.png")):
        pixels = loaded.transform(Image.open(file).convert("RGB"))[None]
        found = image_features.pooled(loaded.module, image_features.blocks(loaded.module), pixels)
        rows.append([state[0].double().numpy() for state in found])
    return [np.stack(block) for block in zip(*rows, strict=True)]


def test_batches_are_spread_over_all_folders(place):
    chosen = image_features.image_files(place / "id", 3)
    assert [file.parent.name for file in chosen] == list(pictures.COLOURS)


def test_errors(place, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="two images at least, and finds 0"):
        image_features.image_files(tmp_path / "none")
    (place / "broken").mkdir()
    for name in ("a.png", "b.png"):
        (place / "broken" / name).write_bytes(b"no image")
    assert start(place, tmp_path / "out", f"--images=X={place / 'broken'}") == 1
    assert "a.png: cannot be decoded" in capsys.readouterr().err
    resnet = timm.create_model("resnet18", num_classes=3)
    save_for_hf(resnet, str(tmp_path / "resnet"), safe_serialization=True)
    arguments = [f"--model={name}={tmp_path / 'resnet'}" for name in ("pretrained", "b")]
    assert cka.main([*arguments, f"--images=ID={place / 'id'}", f"--out={tmp_path / 'x'}"]) == 1
    assert "is a block of a vision transformer or ConvNeXt" in capsys.readouterr().err
