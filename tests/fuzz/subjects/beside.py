"""JSON files beside the weights, for everything that reads models."""

from __future__ import annotations

import os
import random

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command
from fuzz.subjects import models

ADDED = {
    "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.7}',
    "special_tokens_map.json": b'{"unk_token": {"content": "<unk>", "lstrip": false}}',
    "added_tokens.json": b'{"<pad>": 96}',
    "modules.json": b'[{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"}]',
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "quantize_config.json": b'{"bits": 4}',
    "vocab.json": b'{"a": 0}',
    "preprocessor_config.json": b'{"size": 3}',
}
KEYS = [
    *("architectures", "model_type", "vocab_size", "num_hidden_layers", "hidden_size", "auto_map"),
    *("quantization_config", "rope_scaling", "rope_theta", "torch_dtype", "dtype", "eos_token_id"),
    *("tie_word_embeddings", "text_config", "max_position_embeddings", "head_dim", "model"),
    *("vocab", "added_tokens", "chat_template", "tokenizer_class", "content", "id", "idx", "path"),
    *("r", "lora_alpha", "target_modules", "modules_to_save", "peft_type", "rank_pattern"),
]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Change one or two of the JSON files of a model, and add some that it lacked."""
    mutation.copied(models.good(), place.work)
    for _ in range(rng.randint(1, 2)):
        folder = rng.choice(models.NAMES)
        present = {
            path.name: path.read_bytes()
            for path in sorted((place.work / folder).glob("*.json"))
            if not path.name.endswith(".index.json") and path.is_file() and not path.is_symlink()
        }
        # config.json is what most is read of.
        name = rng.choice(
            [*ADDED, *present, *(["config.json"] * 3 if "config.json" in present else [])]
        )
        if os.path.lexists(place.work / folder / name) and name not in present:
            continue  # the change before put something else in its place
        original = present.get(name) or ADDED.get(name, b"{}")
        if rng.random() < 0.05:
            mutation.place_taken(rng, place.work / folder / name)
        else:
            place.write(f"{folder}/{name}", _changed(rng, original))
    text = rng.choice([models.CONFIG, models.CONFIG, models.WITH_ADAPTER])
    tokenizer = rng.choice(["", "tokenizer: {source: base}\n", "tokenizer: {source: union}\n"])
    place.write("m.yml", text + tokenizer)
    return [models.check(()), rng.choice([models.run(()), models.run(()), models.inspect(())])]


def _changed(rng: random.Random, original: bytes) -> bytes:
    try:
        return mutation.json_content(rng, original, KEYS)
    except ValueError:  # damaged by the change before
        return mutation.content(rng, original)
