"""Values that files of other people might hold, at any place of them."""

from __future__ import annotations

import copy
import datetime
import random
from typing import Any

OUTSIDE = "/OUTSIDE"
"""Stands for a folder that nobody may write to; `Place.write` puts the real one in its place."""

TEXTS = [
    # what rich, a terminal, TeX or a table would take for something else
    *(
        "[/b]",
        "[bold]b",
        "\x1b[31mx",
        "a\u202eb",
        "$\\frac{$",
        "{}",
        "%s",
        "²",
        ":smile:",
        "`",
        "|",
    ),
    *(
        "a\0b",
        "\n",
        "two\nlines",
        "\u2028",
        "",
        " ",
        "\ufeff",
        "ends in \\",
        "'",
        '"',
        "é",
        "λ",
        "\t",
    ),
    # numbers that are none, or too large
    *("9" * 4400, "layers." + "9" * 5000 + ".w", "model.layers.99999999999999999999.w", "-1"),
    *("nan", "inf", "-inf", "1e999", "0x10", "1_000", "x" * 5000),
    # places
    *("..", "../x", "../../../x", f"{OUTSIDE}/x", "/", "~", "~/x", "/dev/zero", "/dev/full"),
    *("/proc/self/mem", "a/b", "a+b", "a@b", "a+b+c", "a/b@c+d/e@f", "C:\\x", "base", "tuned0"),
    *("base/model.safetensors", "tuned1/pytorch_model.bin", "http://x/y"),
    # words that mean something somewhere
    *("~", "*", "!!x", "a:b", "__class__", "__metadata__", "name", "default", "union", "lm_head"),
    *(
        "float64",
        "int8",
        "complex64",
        "torch.float32",
        "BF16",
        "F8_E4M3",
        "gptq",
        "LlamaForCausalLM",
    ),
    *("edited", "copied", "inspected", "variance", "freevariance", "linear", "monosoup", "svc"),
]
NUMBERS = [
    *(0, 1, -1, 2, 7, 2**31, 2**62, 2**63, -(2**63), 10**400),
    *(0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
]
SHAPES: list[Any] = [
    *(None, True, False, [], {}, [[]], [{}], [None], [[[1]]], [0, "x"], [1, 2, 3], [2**62, 2**62]),
    *([1] * 65, [1e308, 1e308], {"": 1}, {"a": 1}, {"a\x1b": 1e308}, {"[/b]": 0.5}, {"../x": "y"}),
    *({"filter": 1, "value": 2}, [{"filter": None, "value": None}], [{"filter": [], "value": {}}]),
    *([{"value": 1}, {"value": 2}], {"model": None}, {"path": 3}, {"source": None}),
    *({"tokens": {"x": None}}, {"tokens": {"x": {"source": "a", "force": True}}}),
    {"tokens": {"a": {"source": {"kind": "model_token", "model": "x", "token_id": 5}}}},
    *({"pad_to_multiple_of": -1}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
]
# Which YAML has and JSON has not.
OF_YAML: list[Any] = [
    *(datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 2, 3), b"hi", {"a"}),
    *({None: 1}, {1: 2}, {True: 1}, {1.5: 1}, {float("nan"): 1}),
]
DEEP = 5000


def value(rng: random.Random, *, yaml: bool = False) -> Any:
    """Return a value; of a JSON file, or of a YAML file."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(TEXTS)
    if kind < 0.55:
        return rng.choice(NUMBERS)
    if kind < 0.9:
        return copy.deepcopy(rng.choice(SHAPES + OF_YAML if yaml else SHAPES))
    if kind < 0.95:
        return [value(rng, yaml=yaml) for _ in range(rng.randint(0, 3))]
    return {rng.choice(TEXTS): value(rng, yaml=yaml) for _ in range(rng.randint(0, 3))}
