"""Whole runs of a suite of generated images, with timm's ViT, and merges of files of weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import oracle, pictures
from PIL import Image
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="needs the extra vision")

from evaluation import greedy_soup, run, store, sweep, tables  # noqa: E402
from evaluation.engines import vision  # noqa: E402

TASKS = ["plain", "numbered"]
SUITE = {
    "title": "Colours",
    "engine": "vision",
    "version": 1,
    "public": False,
    "classes": list(pictures.COLOURS),
    "ID": [{"task": "plain", "metric": "acc", "images": {"folder": "plain", "origin": "my disk"}}],
    "OOD": [
        {
            "task": "numbered",
            "metric": "acc",
            "images": {"folder": "numbered", "folders": "numbers", "border": 1},
        }
    ],
}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def _model(folder, seed, classes=3):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **TINY)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A suite, its images, a pretrained and a fine-tuned model, and their merge."""
    folder = tmp_path_factory.mktemp("colours")
    pictures.write(folder / "data" / "plain", pictures.COLOURS, per_class=4)
    pictures.write(folder / "data" / "numbered", ["0", "1", "2"], per_class=3, seed=1)
    (folder / "colours.yml").write_text(yaml.safe_dump(SUITE))
    pretrained = _model(folder / "pretrained", 0)
    tuned = {
        name: tensor + 0.05 * torch.randn_like(tensor)
        for name, tensor in load_file(pretrained).items()
    }
    shutil.copytree(folder / "pretrained", folder / "finetuned")
    save_file(tuned, folder / "finetuned" / "model.safetensors")
    config = {
        "merge_method": "monosoup",
        "base_model": str(pretrained),
        "models": [{"model": str(folder / "finetuned" / "model.safetensors")}],
        "parameters": {"mode": "variance", "R": 0.7},
    }
    (folder / "merged.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def start(place, tmp_path):
    """Runs the suite on some of the models in a results folder of its own."""

    def run_suite(*more, names=("finetuned",), suite=None, data=None):
        paths = {name: place / name for name in ("pretrained", "finetuned")}
        paths["merged"] = place / "merged.yml"
        models = [f"--model={name}={paths[name]}" for name in names]
        places = ["--out", str(tmp_path / "out"), "--merge-cache", str(place / "cache")]
        words = [str(suite or place / "colours.yml"), *models, *places, "--device=cpu", *more]
        return run.main([*words, f"--data={data or place / 'data'}"])

    return run_suite


@pytest.fixture
def asked(monkeypatch):
    """The tasks that a model is really asked, in order."""
    tasks = []
    ask = vision.Model.ask

    def recorded(self, task):
        result = ask(self, task)
        tasks.append(task.task)
        return result

    monkeypatch.setattr(vision.Model, "ask", recorded)
    return tasks


def _by_hand(file, image, border):
    """Return the logits of one image, prepared with NumPy but for the resizing."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).eval()
    model.load_state_dict(load_file(file))
    opened = Image.open(image)
    width, height = opened.size
    opened = opened.crop((border, border, width - border, height - border))
    # timm: the shorter side to 32/0.9, bicubic, then the middle.
    scale = 35 / min(opened.size)
    resized = opened.resize([int(side * scale) for side in opened.size], Image.BICUBIC)
    left, top = ((side - 32) / 2 for side in resized.size)
    box = [round(left), round(top), round(left) + 32, round(top) + 32]
    pixels = (np.asarray(resized.crop(box), dtype=np.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        return model(torch.tensor(pixels).permute(2, 0, 1)[None])[0].numpy()


class TestResults:
    def test_answers_are_those_of_the_model_by_hand(self, place, start, tmp_path):
        assert start(names=("pretrained", "finetuned", "merged")) == 0
        results = {read.result.model: read for read in store.read(tmp_path / "out")}
        outcomes = set()
        for name in ("pretrained", "finetuned"):
            for task, border in (("plain", 0), ("numbered", 1)):
                samples = results[name].samples[task]
                assert len(samples) == {"plain": 12, "numbered": 9}[task]
                for sample in samples:
                    file = place / "data" / task / sample.cluster.removeprefix(f"{task} ")
                    logits = _by_hand(place / name / "model.safetensors", file, border)
                    folders = sorted(path.name for path in file.parents[1].iterdir())
                    assert sample.answers == {"none": folders[logits.argmax()]}
                    right = file.parent.name == folders[logits.argmax()]
                    assert sample.values == {"acc,none": float(right), "acc5,none": 1.0}
                    outcomes.add(right)
        assert outcomes == {True, False}, "models that are always right test nothing"
        merged = results["merged"].result
        assert merged.source.merge.config["parameters"] == {"mode": "variance", "R": 0.7}
        assert merged.w0.fingerprint == results["pretrained"].result.source.fingerprint
        assert merged.settings.dtype == "float32" and "timm" in merged.versions
        assert merged.tasks["plain"].model_extra["architecture"] == "vit_tiny_patch16_224"

    def test_a_merge_is_the_oracles(self, place, start):
        assert start(names=("merged",)) == 0
        [merged] = (place / "cache").glob("*/model.safetensors")
        states = [
            {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
            for file in (
                place / "pretrained" / "model.safetensors",
                place / "finetuned" / "model.safetensors",
                merged,
            )
        ]
        name = "blocks.0.mlp.fc1.weight"
        W0, W1, out = (state[name] for state in states)
        expected = oracle.monosoup(W0, W1, mode="variance", R=0.7)[1]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(out - W1).max() > 1e-3
        kernel = "patch_embed.proj.weight"  # a convolution is the matrix (out, in·kh·kw)
        W0, W1, out = (state[kernel].reshape(len(state[kernel]), -1) for state in states)
        expected = oracle.monosoup(W0, W1, mode="variance", R=0.7)[1]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    def test_a_table_can_be_made_of_it(self, start, tmp_path, capsys):
        assert start("--limit=3", names=("pretrained", "finetuned")) == 0
        assert tables.main([str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert "plain (ID)" in shown and "Only 3 items of each task were asked" in shown

    def test_labels_of_a_checkpoint_decide_the_order(self, place, tmp_path, start):
        """The same head, its classes in another order and said so, gives the same answers."""
        turned = shutil.copytree(place / "finetuned", tmp_path / "turned")
        state = load_file(turned / "model.safetensors")
        for name in ("head.weight", "head.bias"):
            state[name] = state[name].flip(0).contiguous()
        save_file(state, turned / "model.safetensors")
        config = json.loads((turned / "config.json").read_text())
        config["label_names"] = list(pictures.COLOURS)[::-1]
        (turned / "config.json").write_text(json.dumps(config))
        assert start(f"--model=turned={turned}") == 0
        first, second = store.read(tmp_path / "out")
        assert [s.answers for s in first.samples["plain"]] == [
            s.answers for s in second.samples["plain"]
        ]
        assert first.result.source.fingerprint != second.result.source.fingerprint


class TestPrograms:
    """What asks by way of a suite, whichever engine that names."""

    @pytest.mark.slow
    def test_a_sweep_with_controls_and_ablations(self, place, tmp_path, capsys):
        ends = [f"--{name}={place / name}" for name in ("pretrained", "finetuned")]
        words = [str(place / "colours.yml"), *ends, f"--data={place / 'data'}", "--device=cpu"]
        words += ["--R=0.7", "--alpha=0.5", "--methods=monosoup,wise_ft,lines,ablations"]
        words += [f"--out={tmp_path / 'out'}", f"--merge-cache={place / 'cache'}"]
        assert sweep.main(words) == 0
        results = {read.result.model: read.result for read in store.read(tmp_path / "out")}
        expected = {"pretrained", "finetuned", "wise_ft_0.5"}
        expected |= {f"{kind}_free" for kind in ("rho", "cos", "uniform", "high", "low")}
        for setting in ("free", "R0.7"):
            expected |= {f"{kind}_{setting}" for kind in ("monosoup", "scalar", "same_norm")}
        assert results.keys() == expected
        weights = {result.source.fingerprint.weights for result in results.values()}
        assert len(weights) == len(results)
        shown = capsys.readouterr().out
        assert "lines is left out" in shown and "monosoup_R0.7 minus same_norm_R0.7: ID" in shown

    def test_a_greedy_soup(self, place, tmp_path, capsys):
        models = [f"--model={name}={place / name}" for name in ("pretrained", "finetuned")]
        words = [str(place / "colours.yml"), *models, f"--data={place / 'data'}", "--device=cpu"]
        assert greedy_soup.main([*words, f"--out={tmp_path}"]) == 0
        kept, other = [line for line in capsys.readouterr().out.splitlines() if ": ID" in line]
        assert kept.startswith("kept") and other.split()[0] in ("kept", "left")
        assert (tmp_path / "configs").is_dir()


class TestResuming:
    def test_finished_tasks_are_not_asked_again(self, start, tmp_path, asked, monkeypatch, capsys):
        recorded = vision.Model.ask

        def stopped(self, task):
            if task.task == TASKS[1]:
                raise KeyboardInterrupt
            return recorded(self, task)

        with monkeypatch.context() as patch:
            patch.setattr(vision.Model, "ask", stopped)
            assert start() == 130 and asked == TASKS[:1]
        assert start() == 0 and asked == TASKS
        # How images are read changes no answer.
        assert start("--batch-size=2", "--workers=0") == 0 and asked == TASKS
        assert "finished before" in capsys.readouterr().out

    def test_what_decides_answers_is_asked_again(self, place, start, tmp_path, asked):
        data = shutil.copytree(place / "data", tmp_path / "data")
        assert start(data=data) == 0 and asked == TASKS
        pictures.write(data / "plain", ["bee"], seed=9)
        for more in ([], ["--limit=2"], ["--dtype=bfloat16"]):
            asked.clear()
            assert start(*more, data=data) == 0 and asked == TASKS, more

    def test_workers_and_batches_give_the_same_answers(self, start, tmp_path):
        files = []
        for more in (["--batch-size=5", "--workers=0"], ["--batch-size=3", "--workers=2"]):
            assert start("--fresh", *more) == 0
            files.append((tmp_path / "out" / "finetuned.colours.samples.jsonl.gz").read_bytes())
        assert files[0] == files[1]


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--data=/no/such"], "2 of the 2 data sets of colours are not there:\n  plain: my"),
            (["--backend=vllm"], "--backend is for suites of the engine language; colours is one"),
            (["--dtype=int8"], "--dtype int8: not one of torch"),
            (["--device=gpu"], "--device gpu"),
            (["--model=x=/no/such.pt"], "/no/such.pt: no such folder"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, place, tmp_path, words, message, capsys):
        given = [str(place / "colours.yml"), f"--model=a={place / 'finetuned'}"]
        assert run.main([*given, f"--out={tmp_path}", f"--data={place / 'data'}", *words]) == 1
        printed = capsys.readouterr().err
        assert message in printed and "Traceback" not in printed

    def test_without_data_the_folders_are_named(self, place, tmp_path, capsys):
        given = [str(place / "colours.yml"), f"--model=a={place / 'finetuned'}"]
        assert run.main([*given, f"--out={tmp_path}"]) == 1
        assert "--data: name the folder that holds plain, numbered" in capsys.readouterr().err

    def test_options_of_images_are_refused_for_texts(self, tmp_path, capsys):
        assert run.main(["tiny", "--model=a=b", f"--out={tmp_path}", "--workers=2"]) == 1
        assert "--workers is for suites of the engine vision; tiny is" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"classes": None}, "suite s: needs `classes`"),
            ({"ID": [{"task": "a", "metric": "acc"}]}, "a: needs `images: {folder: …}`"),
            (
                {"ID": [{**SUITE["ID"][0], "metric": "f1", "num_fewshot": 2}]},
                "plain has no f1,none; it has acc, acc5\nsuite s: plain: num_fewshot",
            ),
        ],
    )
    def test_suites_that_are_not_of_images(self, start, tmp_path, change, message, capsys):
        (tmp_path / "s.yml").write_text(yaml.safe_dump({**SUITE, **change}))
        assert start(suite=tmp_path / "s.yml") == 1
        assert message in capsys.readouterr().err

    def test_wrong_folders_of_all_data_sets_are_named(self, place, start, tmp_path, capsys):
        data = shutil.copytree(place / "data", tmp_path / "data")
        (data / "plain" / "dog").mkdir()
        shutil.rmtree(data / "numbered" / "1")
        assert start(data=data) == 1
        printed = capsys.readouterr().err
        assert "dog" in printed and "have no folder (1)" in printed

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_image_that_cannot_be_read(self, place, start, tmp_path, workers, capsys):
        data = shutil.copytree(place / "data", tmp_path / "data")
        (data / "plain" / "bee" / "2.png").write_bytes(b"<html>Not Found</html>")
        assert start(f"--workers={workers}", data=data) == 1
        printed = capsys.readouterr().err
        assert "bee/2.png: cannot be decoded" in printed and "Traceback" not in printed

    def test_weights_that_give_no_numbers(self, place, start, tmp_path, capsys):
        broken = shutil.copytree(place / "finetuned", tmp_path / "broken")
        state = load_file(broken / "model.safetensors")
        state["head.bias"][1] = float("nan")
        save_file(state, broken / "model.safetensors")
        assert start(f"--model=broken={broken}", names=()) == 1
        assert "ant/0.png are not finite" in capsys.readouterr().err

    def test_folders_of_classifiers_are_merged_as_files(self, place, start, tmp_path, capsys):
        text = (place / "merged.yml").read_text().replace("/model.safetensors", "")
        (tmp_path / "m.yml").write_text(text)
        assert start(f"--model=m={tmp_path / 'm.yml'}", names=()) == 1
        said = capsys.readouterr().err
        assert f"write {place / 'finetuned' / 'model.safetensors'}" in said
        assert f"write {place / 'pretrained' / 'model.safetensors'}" in said

    def test_a_merge_without_a_head_is_said_before(self, place, start, tmp_path, capsys):
        state = load_file(place / "finetuned" / "model.safetensors")
        body = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
        save_file(body, tmp_path / "body.safetensors")
        base, tuned = (str(place / "pretrained" / "model.safetensors"), "body.safetensors")
        config = {
            "merge_method": "monosoup",
            "base_model": base,
            "models": [{"model": str(tmp_path / tuned)}],
        }
        (tmp_path / "m.yml").write_text(yaml.safe_dump(config))
        assert start(f"--model=m={tmp_path / 'm.yml'}", names=()) == 1
        printed = capsys.readouterr().err
        assert "lacks 2 tensor(s)" in printed and "head.bias, head.weight" in printed
        config["base_model"], config["models"] = str(tmp_path / tuned), [{"model": base}]
        (tmp_path / "m.yml").write_text(yaml.safe_dump(config))
        assert start(f"--model=m={tmp_path / 'm.yml'}", names=()) == 1
        assert "not all models have the same tensors" in capsys.readouterr().err
