"""CKA against its definition in NumPy and against its invariances; then a run on checkpoints of a real architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.tiny import WORLD
from transformers import AutoModel, AutoTokenizer

from evaluation import cka
from evaluation.cka import LinearCKA

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 12)) @ RNG.standard_normal((12, 12)) + 5
Y = X[:, :7] + 0.5 * RNG.standard_normal((300, 7))


def definition(x, y):
    """HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)) with linear kernels and the centring matrix H, items × items."""
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l))


def ours(x, y, piece=300):
    return cka.cka(
        (x[i : i + piece] for i in range(0, len(x), piece)),
        (y[i : i + piece] for i in range(0, len(y), piece)),
    )


class TestFormula:
    def test_the_definition(self):
        assert 0.1 < definition(X, Y) < 0.99
        assert ours(X, Y) == pytest.approx(definition(X, Y), abs=1e-12)

    @pytest.mark.parametrize("piece", [1, 7, 299])
    def test_pieces_make_no_difference(self, piece):
        assert ours(X, Y, piece) == pytest.approx(definition(X, Y), abs=1e-12)

    def test_invariances(self):
        orthogonal, _ = np.linalg.qr(RNG.standard_normal((12, 12)))
        value = definition(X, Y)
        assert ours(X, X) == pytest.approx(1, abs=1e-12)
        assert ours(X, -3 * X @ orthogonal + 2) == pytest.approx(1, abs=1e-12)
        assert ours(X @ orthogonal, Y) == pytest.approx(value, abs=1e-12)
        assert ours(1e-3 * X - 7, 1e4 * Y + 1) == pytest.approx(value, abs=1e-12)
        assert ours(Y, X) == pytest.approx(value, abs=1e-12)
        squeezed = X @ np.diag([10.0] + [1.0] * 11)
        assert abs(ours(X, squeezed) - 1) > 0.01, (
            "not invariant to any linear map, or it would measure nothing"
        )

    def test_a_large_mean_costs_no_digits(self):
        assert ours(X + 1e6, Y - 1e6, 30) == pytest.approx(
            definition(X, Y), abs=1e-8
        )  # 1e6 itself costs six digits

    def test_where_it_is_not_defined(self):
        assert (
            ours(X[:1], Y[:1]) is None
            and ours(np.ones((9, 3)), Y[:9]) is None
            and LinearCKA().value() is None
        )
        with pytest.raises(ValueError, match="3 and 2 items"):
            LinearCKA().add(X[:3], Y[:2])


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
    given = [f"pretrained={folder / 'pretrained'}", f"finetuned={folder / 'finetuned'}"]
    words = [word for model in given for word in ("--model", model)]
    texts = ["--text", f"ID={folder / 'id.txt'}", "--text", f"OOD={folder / 'ood.jsonl'}"]
    return cka.main(
        [
            *words,
            *texts,
            "--out",
            str(out),
            "--merge-cache",
            str(out / "merged"),
            "--device",
            "cpu",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "cka"
    assert start(folder, out, "--variants", "--batch-size", "16") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "cka.json",
        "cka.png",
        "configs",
        "merged",
    ]  # no features left
    return json.loads((out / "cka.json").read_text())


class TestRun:
    def test_every_model_and_block(self, result):
        for texts in ("ID", "OOD"):
            assert list(result["cka"][texts]) == [
                "pretrained",
                "finetuned",
                "high_only",
                "low_only",
            ]
            assert all(
                len(blocks) == 2 for blocks in result["cka"][texts].values()
            )  # embedding and one block
            assert result["cka"][texts]["pretrained"] == pytest.approx([1, 1])
            assert all(0 < value < 0.9999 for value in result["cka"][texts]["finetuned"])
        assert result["texts"]["ID"]["items"] == 40 and result["texts"]["OOD"]["items"] == 20
        assert result["models"]["high_only"]["merge"]["config"]["parameters"] == {
            "coefficients": "high"
        }

    def test_the_values_are_those_of_the_models(self, folder, result):
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
        expected = [definition(x, y) for x, y in zip(*features, strict=True)]
        assert result["cka"]["ID"]["finetuned"] == pytest.approx(
            expected, abs=1e-5
        )  # features are stored in float32

    def test_batches_limit_the_texts(self, folder, tmp_path):
        assert start(folder, tmp_path / "out", "--batches", "2", "--batch-size", "5") == 0
        assert json.loads((tmp_path / "out" / "cka.json").read_text())["texts"]["ID"]["items"] == 10

    def test_errors(self, folder, tmp_path, capsys):
        base = f"pretrained={folder / 'pretrained'}"
        texts = ["--text", f"ID={folder / 'id.txt'}", "--out", str(tmp_path)]
        assert cka.main(["--model", base, *texts]) == 1
        assert "at least one other" in capsys.readouterr().err
        assert cka.main(["--model", base, "--variants", *texts]) == 1
        assert "named finetuned" in capsys.readouterr().err
        tuned = f"finetuned={folder / 'finetuned'}"
        assert (
            cka.main(
                [
                    "--model",
                    base,
                    "--model",
                    tuned,
                    "--text",
                    f"ID={tmp_path / 'none'}",
                    "--out",
                    str(tmp_path),
                ]
            )
            == 1
        )
        assert "No such file" in capsys.readouterr().err
        (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"question": "w2"}\n')
        words = [
            "--model",
            base,
            "--model",
            tuned,
            "--text",
            f"ID={tmp_path / 'bad.jsonl'}",
            "--out",
            str(tmp_path),
        ]
        assert cka.main(words) == 1
        assert "line 2 has neither" in capsys.readouterr().err
        for content, message in (
            (b'{"text": "w1"}\n{"text\n', "line 2"),
            (b'{"text": "\xe9"}\n[1]\n', "not UTF-8"),
            (b"[1]\n", "line 1"),
        ):
            (tmp_path / "bad.jsonl").write_bytes(content)
            assert cka.main(words) == 1
            assert message in capsys.readouterr().err
        assert cka.main([*words, "--text", f"ID={folder / 'id.txt'}"]) == 1
        assert "have the same name" in capsys.readouterr().err

    def test_a_line_ends_where_a_line_ends(self, tmp_path):
        """Not at U+2028 or U+0085, which JSON leaves as they are."""
        lines = ["a\u2028b", "c\x85d"]
        for name, texts in (
            ("t.jsonl", [json.dumps({"text": x}, ensure_ascii=False) for x in lines]),
            ("t.txt", lines),
        ):
            (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
            assert cka._texts(tmp_path / name) == lines
