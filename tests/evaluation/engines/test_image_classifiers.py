"""Image classifiers from files and folders: what they answer, and what is said of others."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import pictures
from PIL import Image
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="needs the extra vision")
open_clip = pytest.importorskip("open_clip", reason="needs the extra vision")
import transformers  # noqa: E402

from evaluation.engines import image_classifiers  # noqa: E402
from evaluation.engines.image_classifiers import CheckpointError  # noqa: E402

SMALL_VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32)


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A CLIP of open_clip with an image tower of one layer, as if OpenAI had made it."""
    folder = tmp_path_factory.mktemp("configs")
    tower = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (folder / "small-quickgelu.json").write_text(
        json.dumps({"embed_dim": 16, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text})
    )
    open_clip.add_model_config(folder)
    return "small-quickgelu"


@pytest.fixture
def soup(small_clip, monkeypatch):
    """A state dict as model-soups saves it, of three classes."""
    monkeypatch.setattr(image_classifiers, "CLIP_SIZES", (small_clip,))
    torch.manual_seed(0)
    clip = open_clip.create_model(small_clip)
    # The text tower is gone, what it was embedded by is not.
    state = {f"model.{n}": t for n, t in clip.state_dict().items() if "transformer.resb" not in n}
    state |= {f"model.visual.{name}": t for name, t in clip.visual.state_dict().items()}
    state["classification_head.weight"] = torch.randn(3, 16)
    state["classification_head.bias"] = torch.randn(3)
    return state


@pytest.fixture
def vit(tmp_path):
    """A folder of timm with a ViT of three classes."""
    return _save(tmp_path / "vit", num_classes=3)


def _save(folder, **more):
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **more})
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@torch.no_grad()
def _logits(loaded, images):
    return loaded.module(images).double()


class TestClip:
    @torch.no_grad()
    def test_its_logits_are_of_normalised_features(self, soup, small_clip, tmp_path, images):
        torch.save(soup, tmp_path / "model_0.pt")
        loaded = image_classifiers.load(tmp_path / "model_0.pt", 3)
        clip = open_clip.create_model(small_clip)
        start = "model.visual."
        tower = {n.removeprefix(start): t for n, t in soup.items() if n.startswith(start)}
        clip.visual.load_state_dict(tower)
        features = clip.visual.eval()(images).double()
        features /= features.square().sum(dim=1, keepdim=True).sqrt()
        weight, bias = (soup[f"classification_head.{name}"].double() for name in ("weight", "bias"))
        expected = features @ weight.T + bias
        torch.testing.assert_close(_logits(loaded, images), expected, rtol=1e-5, atol=1e-6)
        assert loaded.remarks == () and "0.48145466" in loaded.preprocessing
        assert loaded.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)

    def test_wrappers_are_taken_off_and_said(self, soup, tmp_path, images):
        plain, wrapped = tmp_path / "a.pt", tmp_path / "b.pt"
        torch.save(soup, plain)
        inside = {f"module.{name}": tensor for name, tensor in soup.items()}
        torch.save({"state_dict": inside, "epoch": 3}, wrapped)
        first, second = (image_classifiers.load(place, 3) for place in (plain, wrapped))
        assert torch.equal(_logits(first, images), _logits(second, images))
        assert "in a dictionary" in second.remarks[0] and "module." in second.remarks[1]

    @pytest.mark.parametrize("size", image_classifiers.CLIP_SIZES)
    def test_every_size_of_openai_is_known_by_its_shapes(self, size, tmp_path):
        """Without numbers: the largest has two gigabytes."""
        assert len(image_classifiers.CLIP_SIZES) == 9
        tower = image_classifiers._tower(size).state_dict()
        assert image_classifiers._clip_size(tmp_path, tower) == size

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.pop("classification_head.bias"),
                "no classification head: it lacks classification_head.bias",
            ),
            (
                lambda s: [s.pop(n) for n in list(s) if "model." in n and "visual" in n],
                "image tower of 0 tensors is none of OpenAI's CLIPs",
            ),
            (
                lambda s: s.update({"classification_head.weight": torch.zeros(5, 16)}),
                "its head has 5 classes, the suite asks for 3",
            ),
            (
                lambda s: s.update({"classification_head.weight": torch.zeros(3, 8)}),
                "its head takes 8 features, small-quickgelu has 16",
            ),
        ],
    )
    def test_what_is_wrong_is_said(self, soup, tmp_path, change, message):
        change(soup)
        torch.save(soup, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=f"m.pt.*{message}"):
            image_classifiers.load(tmp_path / "m.pt", 3)

    def test_a_clip_alone_has_no_head(self, soup, tmp_path):
        clip = {n.removeprefix("model."): t for n, t in soup.items() if n.startswith("model.")}
        torch.save(clip, tmp_path / "clip.pt")
        with pytest.raises(CheckpointError, match="a CLIP without a classification head"):
            image_classifiers.load(tmp_path / "clip.pt", 3)


class _Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"w": torch.zeros(2), "x": _Harmful(tmp_path / "harm")}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        image_classifiers.load(tmp_path / "m.pt", 3)
    assert not (tmp_path / "harm").exists()


class TestTimm:
    def test_folder_and_file_are_the_same_model(self, vit, tmp_path, images):
        alone = tmp_path / "alone.pt"
        torch.save(load_file(vit / "model.safetensors"), alone)
        named = image_classifiers.load(vit / "model.safetensors", 3)
        assert torch.equal(
            _logits(image_classifiers.load(vit, 3), images), expected := _logits(named, images)
        )
        model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).eval()
        model.load_state_dict(load_file(vit / "model.safetensors"))
        with torch.no_grad():
            assert torch.equal(model(images).double(), expected)
        assert named.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
        with pytest.raises(CheckpointError, match=r"alone.pt: does not say .* --architecture NAME"):
            image_classifiers.load(alone, 3)

    def test_an_architecture_may_be_named(self, tmp_path):
        torch.manual_seed(0)
        model = timm.create_model("test_convnext", num_classes=3).eval()
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        loaded = image_classifiers.load(tmp_path / "m.safetensors", 3, "test_convnext")
        images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
        with torch.no_grad():
            assert torch.equal(_logits(loaded, images), model(images).double())
        with pytest.raises(CheckpointError, match="timm cannot make no_such_model"):
            image_classifiers.load(tmp_path / "m.safetensors", 3, "no_such_model")

    def test_what_is_wrong_is_said(self, vit, tmp_path):
        with pytest.raises(CheckpointError, match="its head has 3 classes, the suite asks for 7"):
            image_classifiers.load(vit, 7)
        with pytest.raises(CheckpointError, match=r"has 5 .* asks for 3\. `python -m evaluation"):
            image_classifiers.load(_save(tmp_path / "five", num_classes=5), 3)
        with pytest.raises(CheckpointError, match=r"no classification head: it lacks head.weight"):
            image_classifiers.load(_save(tmp_path / "body", num_classes=0), 3)
        (vit / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
        with pytest.raises(CheckpointError) as caught:
            image_classifiers.load(vit, 3)
        said = str(caught.value)
        assert "is not of the architecture vit_tiny_patch16_224; it lacks: blocks.1" in said
        assert "other shapes: blocks.0" in said and "instead of" in said and "\n" not in said

    def test_two_files_of_weights_are_one_too_many(self, vit):
        save_file({"x": torch.zeros(1)}, vit / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"2 files of weights .* name one of them"):
            image_classifiers.load(vit, 3)


class TestTransformers:
    @pytest.fixture
    def folder(self, tmp_path):
        torch.manual_seed(0)
        labels = dict(enumerate(pictures.COLOURS))
        config = transformers.ViTConfig(**SMALL_VIT, id2label=labels)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    def test_logits_and_preprocessing_are_its_own(self, folder, images):
        loaded = image_classifiers.load(folder, 3)
        model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(_logits(loaded, images), model(images).logits.double())
        pixels = loaded.transform(Image.new("RGB", (50, 40), (255, 0, 0)))
        assert pixels.shape == (3, 32, 32) and pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
        assert loaded.labels == pictures.COLOURS
        # What mergekit-pytorch writes is a file without the library's mark.
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
        merged = image_classifiers.load(folder / "model.safetensors", 3)
        assert torch.equal(_logits(merged, images), _logits(loaded, images))

    def test_a_missing_head_is_not_drawn_at_random(self, folder):
        state = load_file(folder / "model.safetensors")
        body = {name: tensor for name, tensor in state.items() if "classifier" not in name}
        save_file(body, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"no classification head: it lacks classifier"):
            image_classifiers.load(folder, 3)

    def test_other_faults_are_one_line(self, folder):
        with pytest.raises(CheckpointError, match="its head has 3 classes, the suite asks for 9"):
            image_classifiers.load(folder, 9)
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(CheckpointError, match="cannot be loaded as an image classifier") as e:
            image_classifiers.load(folder, 3)
        assert "\n" not in str(e.value)
