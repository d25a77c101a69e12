"""The tokenizer of a merge, which a resumed merge must get with its tokens in the same order.

mergekit orders a union of vocabularies differently in each process. So the order is kept beside the
finished batches, as text: a pickle there would let whoever can write to OUT run code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import tokenizers
from mergekit.graph import Executor, Task
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from pydantic import TypeAdapter, ValidationError

from mergekit_monosoup import files
from mergekit_monosoup.distributed.publication import FolderError


@dataclass(frozen=True)
class Vocabulary:
    """What has to be the same in a resumed merge.

    Attributes:
        tokens: the number of each.
        fast: the JSON of the library tokenizers; None for tokenizers in pure Python.
    """

    tokens: dict[str, int]
    fast: str | None


def build(task: BuildTokenizer, kept: Path, *, resuming: bool) -> TokenizerInfo:
    """Return the tokenizer that mergekit builds from the models, its tokens as in ``kept``.

    A merge that is not resumed decides that order, and writes it there.

    Raises:
        FolderError: the models' tokenizers do not give the tokens that are kept.
    """
    targets: list[Task[Any]] = [task]
    ((_, info),) = Executor(targets).run(quiet=True)
    if resuming:
        return _reordered(info, kept)
    fast = info.tokenizer.backend_tokenizer.to_str() if info.tokenizer.is_fast else None
    files.write_text(kept, dumps(asdict(Vocabulary(info.tokenizer.get_vocab(), fast))))
    return info


def _reordered(info: TokenizerInfo, kept: Path) -> TokenizerInfo:
    """Return the tokenizer with the order of tokens that is kept."""
    before = _read(kept)
    now = info.tokenizer.get_vocab()
    if now == before.tokens:
        return info
    if now.keys() == before.tokens.keys() and before.fast is not None and info.tokenizer.is_fast:
        _order(info.tokenizer, before.fast)
        if info.tokenizer.get_vocab() == before.tokens:
            numbers = {now[token]: number for token, number in before.tokens.items()}
            permutations = {
                model: {numbers[new]: old for new, old in permutation.items()}
                for model, permutation in info.permutations.items()
            }
            return info.model_copy(update={"permutations": permutations})
    raise FolderError(
        f"{kept}: the tokenizers of the models no longer give the vocabulary that the finished "
        "batches were merged with; start over with --force"
    )


def _read(kept: Path) -> Vocabulary:
    try:
        return TypeAdapter(Vocabulary).validate_json(kept.read_bytes())
    except (OSError, ValidationError) as error:
        raise FolderError(f"{kept}: missing or damaged; start over with --force") from error


def _order(tokenizer: Any, fast: str) -> None:
    """Give a tokenizer the vocabulary in the JSON of the library tokenizers, as mergekit does."""
    try:
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(fast)
    except Exception as error:  # the library raises nothing narrower
        raise FolderError(
            f"the vocabulary is damaged ({error}); start over with --force"
        ) from error
