"""Folders of images as data sets: classes by name, and which logits have a say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import pictures
from PIL import Image

pytest.importorskip("timm", reason="needs the extra vision")

from evaluation.engines import image_sets
from evaluation.engines.image_sets import Classes, ImagesError
from evaluation.suite import ImageSet, load

SHIFTS = {task.task: task.images for task in load("imagenet-shifts").tasks}
IMAGENET = image_sets.named_classes("imagenet-1k")


@pytest.fixture
def twelve(tmp_path):
    """Twelve folders named by number, which as texts come in the order 0, 1, 10, 11, 2, …"""
    return pictures.write(tmp_path / "v2", [str(number) for number in range(12)])


@pytest.fixture
def objectnet(tmp_path):
    """Two of ObjectNet's classes that ImageNet has, one that it has not, and the four tables."""
    root = tmp_path / "objectnet-1.0"
    pictures.write(root / "images", ["air_freshener", "bench", "teapot"])
    tables = root / "mappings"
    tables.mkdir()
    labels = {"air_freshener": "Air freshener", "bench": "Bench", "teapot": "Teapot"}
    (tables / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    words = {"Bench": "park bench; pew, settle", "Teapot": "teapot"}
    (tables / "objectnet_to_imagenet_1k.json").write_text(json.dumps(words))
    # Column of logits → line of the list of words, in another order.
    (tables / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({7: 0, 3: 1, 5: 2, 9: 3}))
    (tables / "imagenet_to_label_2012_v2").write_text("teapot\ndrum\npew, settle\npark bench\n")
    return root / "images"


def test_folders_that_are_numbers_are_columns(twelve):
    columns = [f"class {number}" for number in range(12)]
    opened = image_sets.open_set(twelve, ImageSet(folder="v2", folders="numbers"), columns)
    for item in opened.items:
        folder = item.file.parent.name
        assert opened.classes.folders[item.target] == folder
        assert opened.classes.columns[item.target] == (int(folder),)
    assert len(opened.items) == 12
    logits = torch.eye(12)  # the highest of row i is column i
    answers = opened.classes.scores(logits).argmax(dim=1)
    assert [opened.classes.folders[answer] for answer in answers] == [str(i) for i in range(12)]


def test_only_the_classes_of_a_subset_compete(tmp_path):
    """Columns 0 to 5; the data set has those of 1 and 4, and 0 is the highest of all."""
    columns = ["a", "b", "c", "d", "e", "f"]
    root = pictures.write(tmp_path / "some", ["b", "e"])
    opened = image_sets.open_set(root, ImageSet(folder="some", classes=("e", "b")), columns)
    logits = torch.tensor([[9.0, 1.0, 5.0, 5.0, 2.0, 5.0], [9.0, 3.0, 5.0, 5.0, 2.0, 5.0]])
    scores = opened.classes.scores(logits)
    assert scores.tolist() == [[2.0, 1.0], [2.0, 3.0]]  # of e, of b
    assert [opened.classes.folders[answer] for answer in scores.argmax(dim=1)] == ["e", "b"]


@pytest.mark.parametrize("task", ["imagenet-r", "imagenet-a"])
def test_the_papers_subsets_are_200_columns_of_imagenet(tmp_path, task):
    names = image_sets.named_classes(task)
    assert len(names) == len(set(names)) == 200 and set(names) < set(IMAGENET)
    root = pictures.write(tmp_path / task, names)
    classes = image_sets.open_set(root, SHIFTS[task], IMAGENET).classes
    outside = next(number for number, name in enumerate(IMAGENET) if name not in names)
    inside = IMAGENET.index(names[17])
    logits = torch.zeros(1, 1000)
    logits[0, outside], logits[0, inside] = 9.0, 1.0
    assert classes.folders[classes.scores(logits).argmax()] == names[17]


def test_objectnets_classes_answer_with_their_highest_logit(objectnet):
    opened = image_sets.open_set(objectnet, SHIFTS["objectnet"], IMAGENET)
    assert opened.classes == Classes(("bench", "teapot"), ((9, 5), (7,)))
    assert [item.file.parent.name for item in opened.items] == ["bench", "teapot"]
    logits = torch.zeros(2, 1000)
    logits[:, 3] = 9.0  # a drum, which ObjectNet has not
    logits[0, [9, 5, 7]] = torch.tensor([1.0, 4.0, 3.0])
    logits[1, [9, 5, 7]] = torch.tensor([1.0, 2.0, 3.0])
    assert opened.classes.scores(logits).tolist() == [[4.0, 3.0], [2.0, 3.0]]


def test_objectnets_border_is_cropped(objectnet):
    [bench, _] = image_sets.open_set(objectnet, SHIFTS["objectnet"], IMAGENET).items
    image, digest = image_sets.read(bench, SHIFTS["objectnet"].border)
    whole = Image.open(bench.file)
    assert image.size == (20, 16) and whole.size == (24, 20) and len(digest) == 64
    assert image.getpixel((0, 0)) == whole.getpixel((2, 2))
    assert image.getpixel((19, 15)) == whole.getpixel((21, 17))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "dog").mkdir(), r"1 of its folders are none of the 3 classes \(dog"),
        (lambda root: shutil.rmtree(root / "bee"), r"1 of 3 classes have no folder \(bee"),
        (lambda root: (root / "bee" / "0.png").unlink(), "no valid file for the classes bee"),
        (lambda root: [shutil.rmtree(root / n) for n in pictures.COLOURS], "no folders, of which"),
    ],
)
def test_what_is_not_the_data_set_is_said(tmp_path, damage, message):
    """Never a wrong accuracy: a missing folder would shift all classes after it."""
    root = pictures.write(tmp_path / "x", pictures.COLOURS)
    image_sets.open_set(root, ImageSet(folder="x"), pictures.COLOURS)
    damage(root)
    with pytest.raises(ImagesError, match=message):
        image_sets.open_set(root, ImageSet(folder="x"), pictures.COLOURS)


def test_objectnets_tables_are_needed_whole(objectnet):
    tables = objectnet.parent / "mappings"
    (tables / "objectnet_to_imagenet_1k.json").write_text('{"Bench": "a word that is no class"}')
    with pytest.raises(ImagesError, match="not the tables of ObjectNet's download"):
        image_sets.open_set(objectnet, SHIFTS["objectnet"], IMAGENET)
    shutil.rmtree(tables)
    with pytest.raises(ImagesError, match=r"folder_to_objectnet_label.json: No such file"):
        image_sets.open_set(objectnet, SHIFTS["objectnet"], IMAGENET)


def test_imagenets_val_is_looked_into(tmp_path):
    pictures.write(tmp_path / "imagenet" / "val", pictures.COLOURS)
    opened = image_sets.open_set(
        tmp_path / "imagenet", ImageSet(folder="imagenet"), pictures.COLOURS
    )
    assert len(opened.items) == 3 and opened.root.name == "val"


def test_a_limit_is_spread_over_the_classes(tmp_path):
    root = pictures.write(tmp_path / "x", pictures.COLOURS, per_class=4)
    opened = image_sets.open_set(root, ImageSet(folder="x"), pictures.COLOURS)
    assert [(item.number, item.target) for item in opened.some(3)] == [(0, 0), (4, 1), (8, 2)]
    assert opened.some(12) == opened.some(99) == opened.some(None) == opened.items


def test_the_digest_follows_names_and_sizes(tmp_path):
    root = pictures.write(tmp_path / "x", pictures.COLOURS, per_class=2)

    def digest() -> str:
        return image_sets.open_set(root, ImageSet(folder="x"), pictures.COLOURS).digest()

    found = {digest()}
    (root / "ant" / "0.png").rename(root / "ant" / "2.png")
    found.add(digest())
    pictures.write(root, ["bee"], seed=5)
    found.add(digest())
    assert len(found) == 3


def test_lists_of_classes_are_known_by_name():
    assert image_sets.listed_classes(["x", "y"]) == ("x", "y") and len(IMAGENET) == 1000
    with pytest.raises(ImagesError, match="no classes are named imagenet; there are imagenet-1k"):
        image_sets.named_classes("imagenet")
