"""Image classifiers, asked what is in the images of torchvision's data sets.

An answer is the class with the highest score, right or wrong; `acc` is how many are right, `acc5`
how many have the right class among the five highest.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evaluation import fingerprint
from evaluation.engines import EvaluationError, Options, Settings, image_classifiers, image_sets
from evaluation.engines.image_sets import ImageFolders, ImagesError, Item
from evaluation.engines.machine import check_device, check_dtype, default_device
from evaluation.sources import Source
from evaluation.store import Sample, TaskResult
from evaluation.suite import Suite, Task

METRICS = {"acc": 1, "acc5": 5}  # how many of the highest scores may hold the right class
# Starting processes takes longer than reading so few images.
FEW = 1000


class Engine:
    """A suite of image data sets that are all there."""

    def __init__(self, suite: Suite, options: Options, out: Path) -> None:
        self.suite = suite
        _check_suite(suite)
        self.options = options
        self.settings = Settings(
            "torch", options.device or default_device(), options.dtype or "float32", options.limit
        )
        if self.settings.dtype == "auto":
            self.settings = Settings("torch", self.settings.device, "float32", options.limit)
        check_dtype(self.settings.dtype, auto=False)
        check_device(self.settings.device)
        self.columns = image_sets.listed_classes(suite.classes or ())
        self.sets = _open_all(suite, options.data, self.columns)
        self._prepared: dict[str, str] = {}  # how the first model prepares images, by its name

    @property
    def decides(self) -> Mapping[str, Any]:
        """Names and sizes of the images, and the architecture of files that do not say it."""
        limit = self.settings.limit
        digests = {name: of_task.digest(limit) for name, of_task in self.sets.items()}
        return {"images": digests, "architecture": self.options.architecture}

    def warnings(self, models: Sequence[Source]) -> Iterator[str]:
        """Nothing: how a model prepares images is known when it is loaded."""
        yield from ()

    def check(self, models: Sequence[Source]) -> None:
        """Nothing: the data was checked before, and a model is looked into when it is loaded."""

    def model(self, source: Source) -> Model:
        """Load a checkpoint."""
        model = Model(source.folder, self)
        said = model.classifier.preprocessing
        [(first, expected)] = self._prepared.items() or [(source.name, said)]
        self._prepared = {first: expected}
        if said != expected:
            print(
                f"warning: {source.name} prepares images as {said}, {first} as {expected}: "
                "the differences between them are not of the weights alone",
                file=sys.stderr,
            )
        return model


def _check_suite(suite: Suite) -> None:
    """Check that every task is images with one of our metrics, and nothing of other engines."""
    wrong = []
    if suite.classes is None:
        wrong.append("needs `classes`: what the columns of logits stand for")
    if suite.chat_template:
        wrong.append("chat_template is of no use to images")
    for task in suite.tasks:
        if task.images is None:
            wrong.append(f"{task.task}: needs `images: {{folder: …}}`")
        if task.metric not in METRICS or task.filter != "none":
            wrong.append(f"{task.task} has no {task.key}; it has {', '.join(METRICS)}")
        if task.num_fewshot is not None or task.generation or task.cluster:
            wrong.append(f"{task.task}: num_fewshot, generation and cluster are not for images")
    if wrong:
        raise EvaluationError("\n".join(f"suite {suite.name}: {line}" for line in wrong))


def _open_all(suite: Suite, data: Path | None, columns: Sequence[str]) -> dict[str, ImageFolders]:
    """Return the data set of each task; what is missing is said together."""
    specs = {task.task: task.images for task in suite.tasks if task.images}
    wanted = ", ".join(spec.folder for spec in specs.values())
    if data is None:
        raise EvaluationError(f"--data: name the folder that holds {wanted}")
    missing = [spec for spec in specs.values() if not (data / spec.folder).is_dir()]
    if missing:
        lines = [f"  {spec.folder}" + f": {spec.origin}" * bool(spec.origin) for spec in missing]
        raise EvaluationError(
            f"{data}: {len(missing)} of the {len(specs)} data sets of {suite.name} are not there:\n"
            + "\n".join(lines)
        )
    opened, faults = {}, []
    for name, spec in specs.items():
        try:
            opened[name] = image_sets.open_set(data / spec.folder, spec, columns)
        except ImagesError as error:
            faults.append(str(error))
    if faults:
        raise ImagesError("\n".join(faults))
    return opened


class Model:
    """One classifier, on the device. Use as a context: leaving it frees its memory."""

    def __init__(self, place: Path, engine: Engine) -> None:
        self._engine = engine
        self.classifier = image_classifiers.load(
            place, len(engine.columns), engine.options.architecture
        )
        for remark in self.classifier.remarks:
            print(f"{place}: {remark}", flush=True)
        self.order = _order(place, self.classifier.labels, engine.columns)
        dtype = getattr(torch, engine.settings.dtype)
        self.module = self.classifier.module.to(engine.settings.device, dtype)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        del self.module, self.classifier
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ask(self, task: Task) -> TaskResult:
        """Ask what is in every image of a data set.

        Raises:
            EvaluationError: an image cannot be read, or the model gives no numbers.
        """
        engine, images = self._engine, self._engine.sets[task.task]
        items = images.some(engine.settings.limit)
        rules = fingerprint.digest([images.border, images.classes.folders])[:16]
        samples = [
            _sample(task.task, images, item, digest, rules, highest)
            for item, digest, highest in self._answers(task.header, images, items)
        ]
        info = {
            "images": str(images.root),
            "classes": len(images.classes.folders),
            "architecture": self.classifier.architecture,
            "preprocessing": self.classifier.preprocessing,
            "remarks": list(self.classifier.remarks),
        }
        return TaskResult(task.task, samples, info)

    @torch.inference_mode()
    def _answers(
        self, header: str, images: ImageFolders, items: Sequence[Item]
    ) -> Iterator[tuple[Item, str, list[int]]]:
        """Yield each item with its digest, and its classes by falling score, five at most."""
        bar = tqdm(total=len(items), desc=header, unit=" images", leave=False, disable=None)
        done = 0
        with bar:
            for batch in self._batches(images, items):
                if isinstance(batch, str):
                    raise ImagesError(batch)
                pixels, digests = batch
                device, dtype = self._engine.settings.device, next(self.module.parameters()).dtype
                logits = self.module(pixels.to(device, dtype)).float()[:, self.order]
                scores = images.classes.scores(logits)
                chosen = items[done : done + len(digests)]
                _check_numbers(scores, chosen)
                highest = scores.topk(min(5, scores.shape[1])).indices.tolist()
                yield from zip(chosen, digests, highest, strict=True)
                done += len(digests)
                bar.update(len(digests))

    def _batches(self, images: ImageFolders, items: Sequence[Item]) -> DataLoader[Any]:
        options = self._engine.options
        workers = options.workers
        if workers is None:
            workers = cores() if len(items) >= FEW else 0
        return DataLoader(
            _Images(items, images.border, self.classifier.transform),
            batch_size=options.batch_size or self._engine.suite.batch_size,
            num_workers=workers,
            collate_fn=_together,
            pin_memory=self._engine.settings.device.startswith("cuda"),
        )


def _order(place: Path, labels: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Return which logit belongs to each class of the suite.

    A checkpoint that names the same classes may have them in another order. One that names others
    (in words, where a suite has synsets) is taken to have the suite's order, as is usual.
    """
    if set(labels) == set(columns):
        return [list(labels).index(name) for name in columns]
    return list(range(len(columns)))


def _check_numbers(scores: Tensor, items: Sequence[Item]) -> None:
    broken = ~scores.isfinite().all(dim=1)
    if broken.any():
        first = items[int(broken.nonzero()[0])]
        raise EvaluationError(
            f"the model's logits of {first.file} are not finite: its weights are damaged, or too "
            "large for --dtype"
        )


def _sample(
    task: str, images: ImageFolders, item: Item, digest: str, rules: str, highest: list[int]
) -> Sample:
    folders = images.classes.folders
    return Sample(
        task,
        task,
        item.number,
        digest[:16],
        rules,
        fingerprint.digest(folders[item.target])[:16],
        f"{task} {item.file.relative_to(images.root).as_posix()}",
        {f"{metric},none": float(item.target in highest[:n]) for metric, n in METRICS.items()},
        {"none": folders[highest[0]]},
    )


@dataclass(frozen=True)
class _Images(Dataset[Any]):
    """Images as the model takes them, or what is wrong with one."""

    items: Sequence[Item]
    border: int
    transform: Any

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Tensor, str] | str:
        try:
            image, digest = image_sets.read(self.items[number], self.border)
            return self.transform(image), digest
        # Raised in a worker, they would come with the worker's traceback.
        except (ImagesError, OSError) as error:
            return str(error)
        except (ValueError, RuntimeError) as error:  # an image of one pixel, say
            return f"{self.items[number].file}: cannot be prepared: {error}"


def _together(read: list[tuple[Tensor, str] | str]) -> tuple[Tensor, list[str]] | str:
    """Return a batch, or the first fault."""
    for one in read:
        if isinstance(one, str):
            return one
    pixels, digests = zip(*read, strict=True)
    return torch.stack(pixels), list(digests)


@functools.cache
def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
