"""Text classifiers, asked by transformers: labelled texts, one JSON file of lines for each task.

    {"text": "the flight was late again", "label": "negative"}

Labels go by name: those of the data are looked up among those of the model's configuration. So
models whose classes stand in another order are compared rightly, and others are refused. An item
may have a `cluster`, which counts together in standard errors.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from evaluation import fingerprint
from evaluation.engines import EvaluationError, Options, Settings, spread
from evaluation.engines.machine import check_device, check_dtype, default_device
from evaluation.sources import Source
from evaluation.store import Sample, TaskResult
from evaluation.suite import Suite, Task
from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text

METRIC = "acc"  # the only one: whether the class with the largest score is the label's
MOST_TEXT = 2**30  # bytes of a file; all of it is in memory
MOST_TOKENS = 512  # of a text, where the tokenizer has no limit of its own; the rest is cut off


class Item(BaseModel):
    """A labelled text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str = Field(min_length=1)
    label: str
    cluster: str | None = None


class Engine:
    """A suite of labelled texts: `<task>.jsonl` in the folder of --data."""

    def __init__(self, suite: Suite, options: Options, out: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.suite = suite
        if options.data is None:
            raise EvaluationError(
                f"suite {suite.name} needs --data FOLDER, with "
                f"{', '.join(f'{task.task}.jsonl' for task in suite.tasks)}"
            )
        for task in suite.tasks:
            if (task.metric, task.filter) != (METRIC, "none"):
                raise EvaluationError(
                    f"suite {suite.name}: {task.task}: a classifier has no {task.key}; "
                    f"it has {METRIC},none"
                )
        self._folder = options.data
        self._batch_size = options.batch_size or suite.batch_size
        device = options.device or default_device()
        self.settings = Settings("hf", device, options.dtype or "auto", options.limit)
        check_dtype(self.settings.dtype, auto=True)
        check_device(self.settings.device)
        _ = self._items

    @cached_property
    def _items(self) -> dict[str, list[Item]]:
        return {task.task: read_items(self._file(task)) for task in self.suite.tasks}

    def _file(self, task: Task) -> Path:
        return self._folder / f"{task.task}.jsonl"

    @property
    def decides(self) -> Mapping[str, Any]:
        """The texts and their labels."""
        return {"texts": {t.task: fingerprint.of_file(self._file(t)) for t in self.suite.tasks}}

    def warnings(self, models: Sequence[Source]) -> Iterator[str]:
        """Yield that tokenizers differ."""
        if len({source.origin.fingerprint.tokenizer for source in models}) > 1:
            yield "the models' tokenizer files differ: they may read texts differently"

    def check(self, models: Sequence[Source]) -> None:
        """Check that every model has a class for every label of the data."""
        needed = {item.label for items in self._items.values() for item in items}
        for source in models:
            if not source.folder.is_dir():
                raise EvaluationError(
                    f"{source.folder}: a file of weights alone; a text classifier is a folder "
                    "with its config.json and tokenizer"
                )
            known = _labels(source.folder)
            if missing := sorted(needed - known.keys()):
                raise EvaluationError(
                    f"{source.folder}: has no class {', '.join(missing)}; its config.json "
                    f"(id2label) has {', '.join(known)}"
                )

    def model(self, source: Source) -> Model:
        """Load a checkpoint by transformers."""
        return Model(source.folder, self.settings, self._batch_size, self._items)


def read_items(path: Path) -> list[Item]:
    """Return the labelled texts of a JSON lines file.

    Raises:
        EvaluationError: it is not there or empty, or a line is no labelled text.
    """
    try:
        # Not splitlines(), which would also cut texts at characters of theirs.
        lines = read_text(path, MOST_TEXT).rstrip("\n").split("\n")
    except UnreadableError as error:
        raise EvaluationError(f"{path}: {error}") from error
    if lines == [""]:
        raise EvaluationError(f"{path}: has no texts")
    items = []
    for number, line in enumerate(lines, 1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            mistake = error.errors()[0]
            key = ".".join(map(str, mistake["loc"])) or "line"
            raise EvaluationError(f"{path}:{number}: {key}: {mistake['msg']}") from error
    return items


def _labels(folder: Path) -> dict[str, int]:
    """Return the number of each class by its name, as config.json has them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return {str(label): int(number) for number, label in config.id2label.items()}


class Model:
    """A classifier that is loaded. Use as a context: leaving it frees the memory for the next."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        batch_size: int,
        items: Mapping[str, Sequence[Item]],
    ) -> None:
        self._items, self._settings, self._batch_size = items, settings, batch_size
        self._labels = _labels(folder)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=settings.dtype, output_loading_info=True
            )
        except Exception as error:  # of configuration, tokenizer, weights: each has its own
            raise EvaluationError(
                f"{folder} cannot be loaded ({type(error).__name__}: {error})"
            ) from error
        if missing := sorted(info["missing_keys"]):
            # transformers would make up the head, and the answers would be those of chance.
            raise EvaluationError(
                f"{folder}: has no {missing[0]} (and {len(missing) - 1} more): "
                "is it a classifier, with its head?"
            )
        self._model = model.to(settings.device).eval()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def ask(self, task: Task) -> TaskResult:
        """Ask all items of one task, in batches of texts of about the same length."""
        numbers, items = zip(
            *spread(list(enumerate(self._items[task.task])), self._settings.limit), strict=True
        )
        limit = min(self._tokenizer.model_max_length, MOST_TOKENS)
        encoded = self._tokenizer([item.text for item in items], truncation=True, max_length=limit)[
            "input_ids"
        ]
        order = sorted(range(len(items)), key=lambda index: len(encoded[index]))
        chosen = [0] * len(items)
        starts = range(0, len(items), self._batch_size)
        for start in tqdm(starts, desc=task.header, unit="batch", leave=False):
            batch = order[start : start + self._batch_size]
            inputs = self._tokenizer.pad(
                {"input_ids": [encoded[index] for index in batch]}, return_tensors="pt"
            ).to(self._settings.device)
            for index, best in zip(
                batch, self._model(**inputs).logits.argmax(-1).tolist(), strict=True
            ):
                chosen[index] = best
        names = {number: label for label, number in self._labels.items()}
        samples = [
            _sample(task, number, item, names[best])
            for number, item, best in zip(numbers, items, chosen, strict=True)
        ]
        return TaskResult(task.task, samples, {"labels": sorted(self._labels)})


def _sample(task: Task, number: int, item: Item, answer: str) -> Sample:
    text = hashlib.sha256(item.text.encode()).hexdigest()
    return Sample(
        task=task.task,
        leaf=task.task,
        doc_id=number,
        doc_hash=fingerprint.digest(item.model_dump()),
        prompt_hash=text,
        target_hash=hashlib.sha256(item.label.encode()).hexdigest(),
        cluster=item.cluster or f"{task.task} {number}",
        values={task.key: float(answer == item.label)},
        answers={task.filter: answer},
    )
