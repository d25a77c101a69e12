"""The small JSON files beside a model's weights: configuration, generation, tokenizer.

They are read as text, and nothing is done with them: no code of a model runs. A file that is
damaged has an error of one line that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Any of these makes a folder one that a tokenizer can be loaded from.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

_LARGEST = 100_000_000  # bytes; tokenizers of the largest vocabularies have 40 MB


class DamagedError(ValueError):
    """A file that is there but does not hold what its name says."""


def printable(text: str) -> str:
    """Return a text from a file as it may be shown: a terminal would obey an escape sequence."""
    return text if text.isprintable() else repr(text)


def read_json(file: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it cannot be read.
    """
    text = _read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or nested too deeply
        raise DamagedError(f"is no JSON ({error}): copy or download it again") from None


def _read_text(file: str) -> str:
    """Return the text of a file, which may be a device or a pipe that never ends.

    Raises as :func:`read_json`.
    """
    try:
        return read_text(file, _LARGEST)
    except UnreadableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise DamagedError(str(error)) from None


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights in a local folder; each file is read once.

    Attributes:
        folder: its path; anything else than a folder has no files.
        faults: name of a file → why it cannot be used; filled while files are read.
    """

    folder: str
    faults: dict[str, str] = field(default_factory=dict, compare=False)
    _read: dict[str, Any] = field(default_factory=dict, compare=False)

    def has(self, *names: str) -> bool:
        """Whether one of these files is there."""
        return any(os.path.exists(os.path.join(self.folder, name)) for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """Return the mapping in a file; {} without the file, or where it is damaged."""
        return self._holding(dict, name)

    def list(self, name: str) -> Sequence[Any]:
        """Return the list in a file; [] without the file, or where it is damaged."""
        return self._holding(list, name)

    def _holding(self, kind: type[Any], name: str) -> Any:
        if name not in self._read:
            self._read[name] = kind()
            try:
                found = read_json(os.path.join(self.folder, name))
                if not isinstance(found, kind):
                    wanted = "mapping" if kind is dict else "list"
                    raise DamagedError(f"does not hold a {wanted}: copy or download it again")
                self._read[name] = found
            except FileNotFoundError:
                pass
            except DamagedError as error:
                self.faults[name] = str(error)
        return self._read[name]

    def _text(self, name: str) -> str:
        try:
            return _read_text(os.path.join(self.folder, name))
        except FileNotFoundError:
            return ""
        except DamagedError as error:
            self.faults[name] = str(error)
            return ""

    @property
    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    @property
    def has_tokenizer(self) -> bool:
        return self.has("tokenizer_config.json", *VOCABULARY_FILES)

    @cached_property
    def tokenizer_settings(self) -> dict[str, Any]:
        """Settings of tokenizer_config.json, and tokens of the older special_tokens_map.json."""
        of_map = {
            name: value
            for name, value in self.json("special_tokens_map.json").items()
            if name in TOKENS
        }
        settings = of_map | self.json("tokenizer_config.json")
        return {name: _content(value) for name, value in settings.items() if value is not None}

    @cached_property
    def chat_template(self) -> str:
        """The chat template, wherever it is kept; empty if there is none."""
        of_processor = self.json("chat_template.json").get("chat_template")
        in_settings = self.json("tokenizer_config.json").get("chat_template") or of_processor
        named = self._text("chat_template.jinja")  # transformers takes this file first
        if isinstance(in_settings, list):  # of several, each with its name
            templates = [entry for entry in in_settings if isinstance(entry, Mapping)]
            in_settings = {str(entry.get("name")): entry.get("template") for entry in templates}
        if isinstance(in_settings, Mapping):
            in_settings = in_settings.get("default")
        return (named or (in_settings if isinstance(in_settings, str) else "")).strip()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → number, of the files that are JSON; {} where there is none of these."""
        tokens = _numbered(self.json("vocab.json")) if not self.has("tokenizer.json") else {}
        tokenizer = self.json("tokenizer.json")
        model = tokenizer.get("model")
        stored = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(stored, list):  # Unigram: [token, score]
            stored = {e[0]: n for n, e in enumerate(stored) if isinstance(e, list) and e}
        tokens |= _numbered(stored)
        if tokens:  # what is added alone is no vocabulary
            tokens |= _numbered(self.json("added_tokens.json"))
            tokens |= _added(self.json("tokenizer_config.json").get("added_tokens_decoder"))
            tokens |= _added_list(tokenizer.get("added_tokens"))
        return tokens


def _content(value: Any) -> Any:
    """Return the text of a token that is stored with its properties; all else as it is."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _numbered(tokens: Any) -> dict[str, int]:
    if not isinstance(tokens, dict):
        return {}
    return {t: n for t, n in tokens.items() if isinstance(t, str) and type(n) is int}


def _added(decoder: Any) -> dict[str, int]:
    """Read {"7": {"content": "<s>"}}."""
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return {
        str(entry["content"]): int(number)
        for number, entry in entries
        # int() refuses thousands of digits.
        if isinstance(entry, dict) and "content" in entry and re.fullmatch(r"[0-9]{1,9}", number)
    }


def _added_list(entries: Any) -> dict[str, int]:
    """Read [{"id": 7, "content": "<s>"}]."""
    return {
        str(entry["content"]): entry["id"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and "content" in entry and type(entry.get("id")) is int
    }
