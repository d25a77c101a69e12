"""Small BERTs: a tokenizer of a few words, and a body or a classifier of one block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer(folder: Path, words: Sequence[str]) -> transformers.BertTokenizer:
    """Return a tokenizer of these words, whose vocabulary is written into the folder."""
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]), encoding="utf-8")
    return transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))


def config(words: Sequence[str], **settings: Any) -> transformers.BertConfig:
    """Return the configuration of one block of width 16."""
    return transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        **settings,
    )
