"""What mergekit writes beside the merged weights, from which model, and what other models have.

mergekit 0.1.5 (merge.py there) takes config.json from the base model, or from any of the models
where there is no base. Without `tokenizer:` it copies the tokenizer's files and
generation_config.json from the same model; where it has to load the tokenizer instead, with
`tokenizer:` or `chat_template:`, generation_config.json is left behind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.document import donor, tokenizer_source
from mergekit_monosoup.checkpoints.beside import TOKENS, Beside, printable
from mergekit_monosoup.checkpoints.reader import NAMES_IN_MESSAGE

Values = dict[str, Any]

# -- keys that change nothing for whoever uses the merged model ------------------------------------

# Where and how a model was saved or trained, and what mergekit or other checks deal with: dtypes,
# vocabularies, code, quantisation.
_HARMLESS = re.compile(
    r"transformers_version|_name_or_path|name_or_path|torch_dtype|dtype|use_cache|architectures|"
    r"_?attn_implementation\w*|output_attentions|output_hidden_states|return_dict|_commit_hash|"
    r"gradient_checkpointing|\w*dropout\w*|\w*pdrop|drop_path_rate|initializer_\w+|\w*_loss_coef|"
    r"output_router_logits|problem_type|finetuning_task|unsloth\w*|pretraining_tp|auto_map|"
    r"vocab_size|quantization_config|compression_config|_from_model_config|"
    r"return_dict_in_generate|chunk_size_feed_forward|tokenizer_class"
)
# What transformers takes where the file says nothing.
_GENERATION_DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "max_length": 20,
}
_FROM_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Tokenizers' settings that versions of transformers write differently for the same tokenizer, or
# that other checks look at.
_HARMLESS_IN_TOKENIZERS = re.compile(
    r"tokenizer_class|name_or_path|special_tokens_map_file|added_tokens_decoder|backend|is_local|"
    r"processor_class|clean_up_tokenization_spaces|legacy|tokenizer_file|vocab_file|use_fast|"
    r"from_slow|__type|auto_map|model_input_names|sp_model_kwargs|chat_template|errors|"
    r"spaces_between_special_tokens|local_files_only|unk_id|add_prefix_space"
)


def flat(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Return nested mappings as one, `text_config.rope_theta`, without harmless keys and nulls."""
    result: Values = {}
    for key, value in values.items():
        if value is None or _HARMLESS.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:  # [5] and 5 are one token
            alone = isinstance(value, list | tuple) and len(value) == 1
            result[f"{prefix}{key}"] = value[0] if alone else value
    return result


def differences(written: Values, wanted: Values) -> str:
    """Return the first differing keys with both values, and how many more there are."""
    keys = [k for k in dict.fromkeys([*wanted, *written]) if wanted.get(k) != written.get(k)]
    shown = [
        f"{printable(key)} {shown_value(wanted.get(key))} (not {shown_value(written.get(key))})"
        for key in keys[:NAMES_IN_MESSAGE]
    ]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more key(s)" if more > 0 else "")


def shown_value(value: Any) -> str:
    """Return a value from a file, short and without control characters."""
    text = "none" if value is None else repr(value) if isinstance(value, str) else str(value)
    shown = printable(text)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


# -- what is written -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """What lies beside the weights of a merge's models, and what of it goes into the merged folder.

    Attributes:
        document: one that mergekit reads, for mergekit-yaml or a stage of mergekit-multi.
    """

    document: Document

    @cached_property
    def donor(self) -> str:
        """The model whose config.json is written, or the first of those that it may be."""
        return donor(self.document.data)

    @property
    def by_chance(self) -> bool:
        """Whether mergekit takes any of the models, in another order each time it runs."""
        named = self.document.data.get("base_model") is not None
        return not named and len(self.document.models) > 1

    @cached_property
    def tokenizer_source(self) -> str | None:
        """`base`, `union` or a model where the tokenizer is built, else None."""
        source = tokenizer_source(self.document.data)
        return None if source is None else str(source)

    @cached_property
    def tokenizer_donor(self) -> str:
        """The model whose tokenizer is written, extended where the source is `union`."""
        source = self.tokenizer_source
        return self.donor if source in (None, "base", "union") else str(source)

    @cached_property
    def copied(self) -> bool:
        """Whether mergekit copies the tokenizer's files and generation_config.json."""
        beside = self.beside(self.donor)
        return (
            self.tokenizer_source is None
            and not self.document.data.get("chat_template")
            and beside is not None
            and beside.has("tokenizer_config.json")
            and beside.has("tokenizer.json", "tokenizer.model")
        )

    def called(self, name: str) -> str:
        """Return the model that the files are from: of a stage the one that it takes them from."""
        return self.document.origins.get(name, name)

    def beside(self, name: str) -> Beside | None:
        """Return the files beside a model's weights."""
        return self.document.beside.get(self.called(name))

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The models whose configuration may differ from the one that is written."""
        return tuple(
            name
            for name in self.document.models
            if name != self.donor
            and (beside := self.beside(name)) is not None
            and beside != self.beside(self.donor)
            and self._alike(name)
        )

    def _alike(self, name: str) -> bool:
        """Whether a model is of the donor's kind and shape; if not, other checks say so."""
        ours, theirs = (self.document.tensors.get(model, {}) for model in (self.donor, name))
        of_files = [self._read_by_transformers(model) for model in (self.donor, name)]
        return of_files[0] == of_files[1] and (
            self._sliced
            or all(
                tensor.shape[1:] == theirs[key].shape[1:]
                for key, tensor in ours.items()
                if key in theirs
            )
        )

    def _read_by_transformers(self, name: str) -> tuple[Any, bool]:
        """Return the class of a model, and whether its configuration can be loaded."""
        beside = self.beside(name)
        loaded = isinstance(self.document.configs.get(self.called(name)), PretrainedConfig)
        return (beside.config.get("architectures") if beside is not None else None), loaded

    @property
    def _sliced(self) -> bool:
        return any(self.document.data.get(key) for key in ("slices", "modules"))

    # -- config.json and generation_config.json ----------------------------------------------------

    def configuration(self, name: str) -> Values:
        """Return what config.json says, with transformers' defaults where it says nothing.

        Versions of transformers write the same configuration differently.
        """
        config = self.document.configs.get(self.called(name))
        if config is None or isinstance(config, Exception):
            beside = self.beside(name)
            return flat(beside.config if beside else {})
        values = flat(config.to_dict())
        if self._sliced:  # mergekit writes how many layers there are
            values = {k: v for k, v in values.items() if not re.search(r"layers$|layer_types$", k)}
        return values

    def generation(self, name: str) -> Values | None:
        """Return what generation_config.json says that is no default; None without the file."""
        beside = self.beside(name)
        if beside is None or not beside.has("generation_config.json"):
            return None
        values = flat(beside.json("generation_config.json"))
        stated = {k: v for k, v in values.items() if _GENERATION_DEFAULTS.get(k) != v}
        return self._from_config(name) | stated

    def _from_config(self, name: str) -> Values:
        """Return what transformers takes from config.json where the other file says nothing."""
        config = self.configuration(name)
        return {key: config[key] for key in _FROM_CONFIG if key in config}

    @property
    def written_generation(self) -> Values:
        """What holds for generation with the merged model."""
        copied = self.generation(self.donor) if self.copied else None
        return self._from_config(self.donor) if copied is None else copied

    # -- tokenizer ---------------------------------------------------------------------------------

    def tokenizer(self, name: str) -> Beside | None:
        """Return the files of a model's tokenizer, an adapter's own before those of its base."""
        adapter = self.document.adapter_folders.get(self.called(name))
        if adapter is not None and adapter.has_tokenizer and name != self.donor:
            return adapter
        beside = self.beside(name)
        return beside if beside is not None and beside.has_tokenizer else None

    @property
    def tokenized(self) -> Iterator[tuple[str, Beside]]:
        """Each model with a tokenizer of its own, but for the one that is written.

        Nor the base model's, where the configuration names another.
        """
        written = self.tokenizer(self.tokenizer_donor)
        for name in self.document.models:
            files = self.tokenizer(name)
            chosen_against = name == self.donor and self.tokenizer_donor != name
            if files is not None and files != written and not chosen_against:
                yield name, files

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template that is written; None where the configuration has its own."""
        chosen = self.document.data.get("chat_template")
        written = self.tokenizer(self.tokenizer_donor)
        inherited = written.chat_template if written else ""
        if not chosen:
            return inherited
        if chosen != "auto":
            return None
        common = self._templates.most_common(1)
        return common[0][0] if common else inherited

    @cached_property
    def _templates(self) -> Counter[str]:
        """The chat templates of the models, and how many have each."""
        found = [self.beside(name) for name in self.document.models]
        return Counter(b.chat_template for b in found if b is not None and b.chat_template)

    @property
    def templates_tie(self) -> bool:
        """Whether `chat_template: auto` leaves to chance which template is written."""
        first_two = [count for _, count in self._templates.most_common(2)]
        chosen = self.document.data.get("chat_template")
        return chosen == "auto" and len(first_two) == 2 and first_two[0] == first_two[1]


def tokenizer_differences(written: Beside, wanted: Beside) -> str:
    """Return in which settings two tokenizers differ, for any version that wrote them.

    A key that only one of them has may be the other's default; tokens and what is added to each
    text are not.
    """
    if "tokenizer_config.json" in {**written.faults, **wanted.faults}:
        return ""
    ours = {"add_eos_token": False} | written.tokenizer_settings
    theirs = {"add_eos_token": False} | wanted.tokenizer_settings
    keys = [
        key
        for key in dict.fromkeys([*theirs, *ours])
        if not _HARMLESS_IN_TOKENIZERS.fullmatch(key)
        and (key in TOKENS or (key in ours and key in theirs))
    ]
    return differences(
        {k: ours[k] for k in keys if k in ours}, {k: theirs[k] for k in keys if k in theirs}
    )


def template_file(beside: Beside) -> str:
    """Return the name of the file that holds the chat template."""
    names = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
    with_key = [n for n in names[1:] if beside.json(n).get("chat_template")]
    return names[0] if beside.has(names[0]) else next(iter(with_key), names[1])


def joined(names: list[str]) -> str:
    """Return names of models for a message."""
    shown = ", ".join(map(printable, names[:NAMES_IN_MESSAGE]))
    more = len(names) - NAMES_IN_MESSAGE
    return shown + (f" and {more} more" if more > 0 else "")
