"""YAML out of its own tokens, and any text in a terminal, a table and a file's name.

By hypothesis, which makes what it finds as short as it can.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from evaluation.formatting import file_name
from fuzz.place import Place
from fuzz.programs import Command, Outcome
from fuzz.values import TEXTS
from mergekit_monosoup import terminal
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import PlainLoader, UniqueKeyLoader, parse_documents
from mergekit_monosoup.report import layer_group
from mergekit_monosoup.report.labels import shorten

TOKENS = [
    *("&a ", "*a ", "&b ", "*b ", "a: ", "- ", "[", "]", "{", "}", ",", "\n", "  ", "\n  ", "? "),
    *(": ", "<<: ", "= ", "!!int ", "!!set ", "!!omap ", "!!pairs ", "!!binary ", "!!timestamp "),
    *("!!float ", "!!bool ", "!!null ", "!!str ", "!!map ", "!!seq ", "!!python/name:os.system "),
    *("'", '"', "|", "> ", "#x\n", "---\n", "...\n", "%YAML 1.1\n", "1", "0x", "0b1", "1:2", "~"),
    *(
        "2020-01-01",
        "2020-99-99",
        ".nan",
        "-.inf",
        "\\ud800",
        '"\\x00"',
        "\t",
        "é",
        "\x85",
        "\u2028",
    ),
    *("9" * 5000, "1_0", "e5", "+"),
]
ANY_TEXT = st.one_of(st.text(max_size=60), st.sampled_from(TEXTS))
SECONDS = 2


def _parses(parts: list[str]) -> None:
    text, started = "".join(parts), time.process_time()
    for loader in (PlainLoader, UniqueKeyLoader):
        words = ""
        try:
            repr(parse_documents(text, loader))
        except UnreadableError as error:
            words = str(error)
        assert "\n" not in words
    assert time.process_time() - started < SECONDS


def _shows(names: list[str]) -> None:
    labels = shorten(names, 20)
    assert len(labels) == len(names)
    assert all(len(label) <= 20 or label in names for label in labels)
    for name in names:
        assert terminal.plain(name).isprintable()
        assert str(terminal.cell(name)).isprintable()
        layer_group(name)
        part = file_name(name)
        assert part not in ("", ".", "..") and not set(part) & set("/\\\0") and len(part) < 250


PROPERTIES: dict[str, tuple[Callable[..., None], st.SearchStrategy[list[str]]]] = {
    "yaml": (_parses, st.lists(st.sampled_from(TOKENS), max_size=25)),
    "names": (_shows, st.lists(ANY_TEXT, min_size=1, max_size=8, unique=True)),
}


def holds(arguments: Sequence[str]) -> Outcome:
    """Try a property with 100 examples of hypothesis."""
    which, number = arguments
    holding, examples = PROPERTIES[which]
    phases = (Phase.generate, Phase.shrink)
    options = settings(
        max_examples=100,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    try:
        seed(int(number))(options(given(examples)(holding)))()
    except Exception as error:
        return Outcome(1, "", "", error)
    return Outcome(0, "", "")


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Take hypothesis's numbers from the case's."""
    return [Command(holds, [rng.choice(list(PROPERTIES)), str(rng.getrandbits(32))])]
