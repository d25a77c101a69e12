"""What names mean: layers, types and stacks of layers, in architectures of all kinds."""

from __future__ import annotations

import pytest

from mergekit_monosoup.checkpoints.names import layer, natural
from mergekit_monosoup.checkpoints.places import arrange, depth

# Of each architecture: names, and what is told of them as (stack, layer, type).
NETWORKS = {
    "BERT": {
        "bert.embeddings.word_embeddings.weight": ("", (), "embeddings.word_embeddings"),
        "bert.encoder.layer.11.attention.self.query.weight": ("", (11,), "attention.self.query"),
        "cls.predictions.decoder.weight": ("", (), "cls.predictions.decoder"),
    },
    "EfficientNet": {
        "_conv_stem.weight": ("", (), "_conv_stem"),
        "_blocks.2._project_conv.weight": ("", (2,), "_project_conv"),
        "_blocks.10._project_conv.weight": ("", (10,), "_project_conv"),
    },
    "ResNet": {
        "conv1.weight": ("", (), "conv1"),
        "layer1.0.conv1.weight": ("", (1, 0), "conv1"),
        "layer1.0.downsample.0.weight": ("", (1, 0), "downsample.0"),
        "layer4.2.conv3.weight": ("", (4, 2), "conv3"),
    },
    "ConvNeXt of torchvision": {
        "features.1.0.block.0.weight": ("", (1, 0), "block.0"),
        "features.1.0.block.5.weight": ("", (1, 0), "block.5"),
        "features.7.2.block.5.weight": ("", (7, 2), "block.5"),
    },
    "ConvNeXt of transformers": {
        "convnext.embeddings.patch_embeddings.weight": ("", (), "embeddings.patch_embeddings"),
        "convnext.encoder.stages.1.downsampling_layer.1.weight": ("", (1,), "downsampling_layer.1"),
        "convnext.encoder.stages.1.layers.0.dwconv.weight": ("", (1, 0), "dwconv"),
        "classifier.weight": ("", (), "classifier"),
    },
    "Whisper": {
        "model.encoder.conv1.weight": ("", (), "encoder.conv1"),
        "model.encoder.layers.3.fc1.weight": ("encoder", (3,), "encoder.fc1"),
        "model.decoder.layers.3.fc1.weight": ("decoder", (3,), "decoder.fc1"),
        "proj_out.weight": ("", (), "proj_out"),
    },
    "CLIP": {
        "vision_model.encoder.layers.3.mlp.fc1.weight": (
            "vision_model",
            (3,),
            "vision_model.mlp.fc1",
        ),
        "text_model.encoder.layers.3.mlp.fc1.weight": ("text_model", (3,), "text_model.mlp.fc1"),
        "text_projection.weight": ("", (), "text_projection"),
    },
    "experts": {
        "model.layers.3.mlp.experts.7.up_proj.weight": ("", (3,), "mlp.experts.*.up_proj"),
        "model.layers.3.mlp.experts.gate_up_proj[3].up": (
            "",
            (3,),
            "mlp.experts.gate_up_proj[*].up",
        ),
    },
    "a chain": {f"features.{n}.weight": ("", (n,), "features") for n in range(12)},
    "many heads": {
        "layers.0.w": ("", (0,), "w"),
        **{f"heads.{n}.weight": ("", (), "heads.*") for n in range(12)},
    },
    "nobody's": {
        "": ("", (), "(unnamed)"),
        "layers." + "9" * 5000 + ".w": ("", (), "layers.*.w"),
        "²": ("", (), "²"),
    },
}


@pytest.mark.parametrize("network", NETWORKS)
def test_places(network):
    expected = NETWORKS[network]
    places = arrange(reversed(expected))
    assert places == expected
    assert sorted(places, key=lambda name: depth(name, places[name])) == list(expected)


def test_numbers_in_order():
    names = ["a.²", "a.9", "a.10", "a." + "9" * 5000, "a.1" + "0" * 5000, "a.x"]
    assert sorted(reversed(names), key=natural) == [*names[1:5], "a.x", "a.²"]
    assert layer("model.layers.007.w") == (7,)
    assert len(layer("stages.1." * 1000 + "w")) < 5
