"""evaluation.cka on checkpoints of a real architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.cka_oracle import linear_cka
from helpers.tiny import WORLD
from transformers import AutoModel, AutoTokenizer

from evaluation import cka


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Texts in two formats, of different lengths, so that batches are padded."""
    folder = tmp_path_factory.mktemp("cka")
    prompts = [item.prompt for item in WORLD.test["sum_en"][:20]] + [
        item.prompt for item in WORLD.test["home"][:20]
    ]
    (folder / "id.txt").write_text("\n".join(prompts) + "\n\n")
    rows = [
        json.dumps({"prompt" if i % 2 else "text": text[:-2]})
        for i, text in enumerate(prompts[:20])
    ]
    (folder / "ood.jsonl").write_text("\n".join(rows))
    for name in ("pretrained", "finetuned"):
        (folder / name).symlink_to(models / name)
    return folder


def start(folder, out, *more):
    models = [f"--model={name}={folder / name}" for name in ("pretrained", "finetuned")]
    texts = [f"--text=ID={folder / 'id.txt'}", f"--text=OOD={folder / 'ood.jsonl'}"]
    places = ["--out", str(out), "--merge-cache", str(out / "merged")]
    return cka.main([*models, *texts, *places, "--device", "cpu", *more])


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "cka"
    assert start(folder, out, "--variants", "--batch-size", "16") == 0
    # No features are left.
    assert {path.name for path in out.iterdir()} == {"cka.json", "cka.png", "configs", "merged"}
    return json.loads((out / "cka.json").read_text())


def test_every_model_and_block(result):
    for texts in ("ID", "OOD"):
        models = ["pretrained", "finetuned", "high_only", "low_only"]
        assert list(result["cka"][texts]) == models
        # The embedding and one block.
        assert all(len(blocks) == 2 for blocks in result["cka"][texts].values())
        assert result["cka"][texts]["pretrained"] == pytest.approx([1, 1])
        assert all(0 < value < 0.9999 for value in result["cka"][texts]["finetuned"])
    assert result["texts"]["ID"]["items"] == 40 and result["texts"]["OOD"]["items"] == 20
    assert result["models"]["high_only"]["merge"]["config"]["parameters"] == {
        "coefficients": "high"
    }


def test_the_values_are_those_of_the_models(folder, result):
    """Text by text, without padding, and by the definition."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "pretrained")
    lines = (folder / "id.txt").read_text().split("\n")[:40]
    features = []
    for name in ("pretrained", "finetuned"):
        model = AutoModel.from_pretrained(folder / name).eval()
        states = [
            model(
                **tokenizer(line, return_tensors="pt", return_token_type_ids=False),
                output_hidden_states=True,
            ).hidden_states
            for line in lines
        ]
        features.append(
            [
                np.stack([s[block][0].mean(0).detach().double().numpy() for s in states])
                for block in range(2)
            ]
        )
    expected = [linear_cka(x, y) for x, y in zip(*features, strict=True)]
    # Features are stored in float32.
    assert result["cka"]["ID"]["finetuned"] == pytest.approx(expected, abs=1e-5)


def test_batches_limit_the_texts(folder, tmp_path):
    assert start(folder, tmp_path / "out", "--batches", "2", "--batch-size", "5") == 0
    assert json.loads((tmp_path / "out" / "cka.json").read_text())["texts"]["ID"]["items"] == 10


def test_errors(folder, tmp_path, capsys):
    base, tuned = (f"--model={name}={folder / name}" for name in ("pretrained", "finetuned"))
    out, texts = f"--out={tmp_path}", f"--text=ID={folder / 'id.txt'}"

    def error(*arguments: str) -> str:
        assert cka.main([out, *arguments]) == 1
        return capsys.readouterr().err

    assert "at least one other" in error(base, texts)
    assert "named finetuned" in error(base, texts, "--variants")
    assert "No such file" in error(base, tuned, f"--text=ID={tmp_path / 'none'}")
    bad = tmp_path / "bad.jsonl"
    for content, message in (
        (b'{"text": "w1"}\n{"question": "w2"}\n', "line 2 has neither"),
        (b'{"text": "w1"}\n{"text\n', "line 2"),
        (b'{"text": "\xe9"}\n[1]\n', "not UTF-8 (byte 0xe9"),
        (b"[1]\n", "line 1"),
    ):
        bad.write_bytes(content)
        assert message in error(base, tuned, f"--text=ID={bad}")
    assert "have the same name" in error(base, tuned, texts, texts)


def test_a_line_ends_where_a_line_ends(tmp_path):
    """Not at U+2028 or U+0085, which JSON leaves as they are."""
    lines = ["a\u2028b", "c\x85d"]
    for name, texts in (
        ("t.jsonl", [json.dumps({"text": x}, ensure_ascii=False) for x in lines]),
        ("t.txt", lines),
    ):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        assert cka.read_texts(tmp_path / name) == lines
