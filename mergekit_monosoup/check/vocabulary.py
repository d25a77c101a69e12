"""Tokens against rows of the embedding: what mergekit makes of them with `tokenizer:`, or without.

Vocabularies are those of the JSON files; a model whose tokenizer is none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from mergekit_monosoup.check.output import Output
from mergekit_monosoup.checkpoints.names import layer
from mergekit_monosoup.checkpoints.sections import mapping

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$"
)
_NO_TEXT = re.compile(r"vision|visual|audio|per_layer")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model.

    Attributes:
        numbers: token → its row.
        size: rows that config.json has for them; mergekit trusts it.
    """

    numbers: dict[str, int]
    size: int

    @cached_property
    def known(self) -> set[str]:
        """The tokens that have a row."""
        return {token for token, number in self.numbers.items() if number < self.size}

    @cached_property
    def beyond(self) -> list[str]:
        """The tokens that have none, by number."""
        return sorted(set(self.numbers) - self.known, key=self.numbers.__getitem__)


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of a merge, and the one that mergekit makes of them.

    Attributes:
        output: what is written beside the weights.
    """

    output: Output

    @cached_property
    def of_models(self) -> dict[str, Tokens]:
        """Model → its tokens, where both its tokenizer and its size are known."""
        found = {name: self._tokens(name) for name in self.output.document.models}
        return {name: tokens for name, tokens in found.items() if tokens is not None}

    def _tokens(self, name: str) -> Tokens | None:
        beside = self.output.beside(name)
        size = self._size(name)
        numbers = beside.vocabulary if beside is not None else {}
        return Tokens(numbers, size) if numbers and size is not None else None

    def _size(self, name: str) -> int | None:
        config = self.output.document.configs.get(self.output.called(name))
        for holder in (config, getattr(config, "text_config", None)):
            size = getattr(holder, "vocab_size", None)
            if type(size) is int:
                return size
        return None

    def rows(self, name: str) -> int | None:
        """Return the rows of a model's embedding, from its header."""
        tensors = self.output.document.tensors.get(name, {})
        for key in sorted(tensors):
            if _EMBEDDING.search(key) and not _NO_TEXT.search(key):
                return tensors[key].shape[0] if tensors[key].shape else None
        return None

    @cached_property
    def merged(self) -> set[str]:
        """The tokens of the merged model with `tokenizer:`; empty where that is not known."""
        source, base = self.output.tokenizer_source, self.of_models.get(self.output.donor)
        added = set(mapping(mapping(self.output.document.data.get("tokenizer")).get("tokens")))
        if source is None or base is None:
            return set()
        if source == "base":
            return base.known | added
        if source == "union":
            return set().union(*(tokens.known for tokens in self.of_models.values())) | added
        files = self.output.tokenizer(source)
        return set(files.vocabulary) | added if files is not None and files.vocabulary else set()

    @cached_property
    def merged_rows(self) -> int:
        """The rows of the merged embedding with `tokenizer:`, padding included."""
        settings = mapping(self.output.document.data.get("tokenizer"))
        unit = settings.get("pad_to_multiple_of")
        unit = unit if type(unit) is int and unit > 0 else 1
        return -(-len(self.merged) // unit) * unit

    @property
    def _renumbered(self) -> bool:
        """Whether some model's rows are others than the merged model's, in number or order."""
        models = list(self.of_models.values())
        return bool(self.merged) and any(
            tokens.size != self.merged_rows or tokens.numbers != models[0].numbers
            for tokens in models
        )

    def left_as_they_are(self) -> list[str]:
        """Return the tensors with a row for each token that `tokenizer:` does not rearrange.

        mergekit's idea of the architecture does not say that they have: one that it infers names
        the embeddings alone, and not those of every class.
        """
        if not self._renumbered:
            return []
        donor = self.output.donor
        size, tensors = self._size(donor), self.output.document.tensors.get(donor, {})
        config = self.output.document.configs.get(self.output.called(donor))
        settings = config.to_dict() if isinstance(config, PretrainedConfig) else {}
        by_chance = sum(value == size for value in _numbers(settings)) > 1
        return [
            task.tensor_name
            for task in self.output.document.planning.tasks
            if (weight := getattr(task.tensor_task, "output_weight", None)) is not None
            and weight.vocabulary_axis is None
            and (stored := tensors.get(task.tensor_name)) is not None
            and size in stored.shape
            and not layer(task.tensor_name)
            and (not by_chance or _EMBEDDING.search(task.tensor_name))
        ]

    def without_rows(self) -> Iterator[tuple[str, list[str], Tokens]]:
        """Yield (model, tokens, all of its tokens) where mergekit would look for a row in vain.

        It drops the base model's tokens without a row before, which it can for BPE only.
        """
        base = self.output.donor
        for name, tokens in self.of_models.items():
            if name != base and (lost := [t for t in tokens.beyond if t in self.merged]):
                yield name, lost, tokens

    def dropped(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (model, tokens) of the models whose tokens the merged model does not have."""
        for name, tokens in self.of_models.items():
            lost = [t for t in tokens.numbers if t not in self.merged]
            if lost and self.merged:
                yield name, sorted(lost, key=tokens.numbers.__getitem__)

    def kind(self, name: str) -> str:
        """Return the type of a model's tokenizer, `BPE`, as its file has it."""
        beside = self.output.beside(name)
        model = beside.json("tokenizer.json").get("model") if beside is not None else None
        return str(mapping(model).get("type", "no tokenizer.json"))


def _numbers(config: object) -> Iterator[int]:
    """Yield the whole numbers of a configuration."""
    if type(config) is int:
        yield config
    elif isinstance(config, dict | list | tuple):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _numbers(value)
