"""Checks of what lies beside the weights: configuration, tokenizer, code, and other weights.

mergekit writes one model's files into the merged folder (:mod:`mergekit_monosoup.check.output` says
which), so that a fine-tune may have the right weights and another model's context length. Only
local folders are looked into.
"""

from __future__ import annotations

import importlib.resources
from collections import defaultdict
from collections.abc import Iterable, Iterator

import transformers
from mergekit._data import chat_templates
from transformers import CONFIG_MAPPING

from mergekit_monosoup.check import leftovers
from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, define_check, nearest
from mergekit_monosoup.check.output import (
    Output,
    differences,
    joined,
    shown_value,
    template_file,
    tokenizer_differences,
)
from mergekit_monosoup.check.planning import is_one_class
from mergekit_monosoup.check.vocabulary import Vocabularies
from mergekit_monosoup.checkpoints import quantisation
from mergekit_monosoup.checkpoints.beside import Beside, printable


def _output(document: Document) -> Output | None:
    """Return what is written beside the merged weights, if mergekit gets to that."""
    if document.raw or document.config is None:
        return None  # mergekit-pytorch writes weights alone
    if len(document.tensors) < len(document.opened) or document.reads.lacking:
        return None  # it stops before, as TEN501, TEN508 or TEN512 says
    output = Output(document)
    return output if output.beside(output.donor) is not None else None


def _folders(document: Document) -> dict[str, Beside]:
    """Return the folders of models and adapters, each once, under the first name that has it."""
    if document.raw:
        return {}
    found: dict[str, tuple[str, Beside]] = {}
    for name, beside in [*document.beside.items(), *document.adapter_folders.items()]:
        found.setdefault(beside.folder, (name, beside))
    return dict(found.values())


def _grouped(said: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return text → models, of which each is said only once."""
    groups: dict[str, list[str]] = defaultdict(list)
    for model, text in said:
        if text:
            groups[text].append(model)
    return groups


_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)

# -- whether mergekit can use the files ------------------------------------------------------------


@define_check(
    "FOL601",
    "error",
    "warning",
    title="JSON file of a model that is damaged (any but config.json a warning)",
    advice="copy or download that file again",
)
def damaged(document: Document) -> Iterator[Finding]:
    for name, beside in _folders(document).items():
        for file in _JSON_FILES:
            beside.json(file)
        for file, fault in beside.faults.items():
            if file == "config.json":
                yield document.error(f"{name}: {file}", fault)
            else:
                yield document.warning(
                    f"{name}: {file}", f"{fault}; where mergekit copies it, it stays so"
                )


@define_check(
    "FOL602",
    "error",
    title="config.json that mergekit cannot use",
    advice="write the key that the message names into it, or update transformers",
)
def unusable_config(document: Document) -> Iterator[Finding]:
    for name, beside in _folders(document).items():
        config = document.configs.get(name)
        if config is None or "config.json" in beside.faults or _needs_trust(beside):
            continue
        if isinstance(config, Exception):
            yield document.error(f"{name}: config.json", _refusal(beside, config))
        elif not is_one_class(config.architectures):
            classes = ", ".join(map(shown_value, config.architectures or [])) or "none"
            yield document.error(
                f"{name}: config.json",
                f"`architectures` must name one class, and names {classes}: mergekit stops at its "
                'start; write, for example, "architectures": ["LlamaForCausalLM"]',
            )


def _refusal(beside: Beside, error: Exception) -> str:
    """Return why transformers does not load a configuration."""
    kind = beside.config.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        return (
            f"transformers {transformers.__version__} has no model_type {shown_value(kind)}, so "
            "mergekit stops at its start: correct it, or update transformers"
        )
    words = " ".join(str(error).split())
    return (
        f"cannot be loaded by transformers, so mergekit stops at its start: {printable(words):.200}"
    )


def _needs_trust(beside: Beside) -> bool:
    """Whether the configuration's class is in a file of the model's own."""
    kind = beside.config.get("model_type")
    return "AutoConfig" in _auto_map(beside, "config.json") and kind not in CONFIG_MAPPING


def _auto_map(beside: Beside, file: str) -> dict[str, object]:
    found = beside.json(file).get("auto_map")
    return found if isinstance(found, dict) else {}


@define_check(
    "FOL603",
    "warning",
    title="code of a model's own",
    advice="add --trust-remote-code if you do, and copy the *.py files into the merged folder",
)
def own_code(document: Document) -> Iterator[Finding]:
    output = _output(document)
    said = ((n, _about_code(beside, output, n)) for n, beside in _folders(document).items())
    for text, models in _grouped(said).items():
        yield document.warning(joined(models), text)


def _about_code(beside: Beside, output: Output | None, name: str) -> str:
    files = _code(beside)
    needed = _needs_trust(beside)
    built = output is not None and output.tokenizer_source is not None
    needed |= built and bool(_auto_map(beside, "tokenizer_config.json"))
    written = output is not None and name in (output.called(output.donor), output.tokenizer_donor)
    left = [file for file in files if beside.has(file)]
    if needed:
        text = (
            f"code of its own is needed (auto_map: {joined(files)}): mergekit stops at its start "
            "without --trust-remote-code, which runs that code; `check` does not run it, and "
            "compares names and shapes only"
        )
    elif written and left:
        text = f"code of its own (auto_map: {joined(files)}), which mergekit does not copy"
    else:
        return ""
    return f"{text}; copy {joined(left)} into the merged folder" if left else text


def _code(beside: Beside) -> list[str]:
    """Return the files that auto_map names; those of another repository with its name."""
    places: list[object] = []
    for file in ("config.json", "tokenizer_config.json"):
        for value in _auto_map(beside, file).values():
            places += value if isinstance(value, list) else [value]
    classes = (place for place in places if isinstance(place, str) and "." in place)
    return list(dict.fromkeys(f"{place.rpartition('.')[0]}.py" for place in classes))


@define_check(
    "FOL604",
    "error",
    title="leftover quantization_config",
    advice="remove that key from config.json: the weights are not quantised",
)
def leftover_quantisation(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None or output.called(output.donor) in document.quantised:
        return
    beside = output.beside(output.donor)
    if beside is not None and quantisation.declared(beside):
        method = printable(quantisation.method(beside))
        yield document.error(
            f"{output.called(output.donor)}: config.json",
            f"has a quantization_config ({method}), but its weights are not quantised: mergekit "
            "copies it, and with it the merged model does not load, or is taken for quantised; "
            "remove the key here, or from the merged config.json",
        )


# -- what is written, and what other models have ---------------------------------------------------


def _gets(output: Output, file: str) -> str:
    whose = output.called(output.donor)
    if output.by_chance:
        return (
            f"the merged model gets {file} of any of the models, {whose} for one "
            "(`base_model` would decide)"
        )
    return f"the merged model gets {file} of {whose}"


def _has(models: list[str]) -> str:
    return f"{joined(models)} {'has' if len(models) == 1 else 'have'}"


@define_check(
    "FOL605",
    "warning",
    title="other settings in config.json than those that are written",
    advice="write the fine-tune's values into the merged config.json, if they are wanted",
)
def other_config(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None:
        return
    written = output.configuration(output.donor)
    said = ((name, differences(written, output.configuration(name))) for name in output.others)
    for text, models in _grouped(said).items():
        yield document.warning(
            "config.json",
            f"{_gets(output, 'that')}; {_has(models)} {text}: "
            "where these are wanted, write them into the merged config.json",
        )


@define_check(
    "FOL606",
    "warning",
    title="other generation settings than those that are written, or none written",
    advice="copy the wanted model's generation_config.json into the merged folder",
)
def other_generation(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None:
        return
    written = output.written_generation
    names = output.others if output.copied else (output.donor, *output.others)
    found = ((name, output.generation(name)) for name in names)
    said = ((name, differences(written, v)) for name, v in found if v is not None)
    for text, models in _grouped(said).items():
        yield document.warning(
            "generation_config.json",
            f"{_generation_written(output)}; {_has(models)} {text}: where these are wanted, copy "
            f"generation_config.json of {models[-1]} into the merged folder",
        )


def _generation_written(output: Output) -> str:
    if output.copied:
        if output.generation(output.donor) is None:
            return f"the merged model gets none, for {output.called(output.donor)} has none"
        return _gets(output, "that")
    if output.tokenizer_source is not None:
        return "with `tokenizer:` mergekit writes none"
    return "where mergekit loads the tokenizer instead of copying its files it writes none"


@define_check(
    "FOL607",
    "warning",
    title="other tokenizer or chat template than the one that is written",
    advice="copy the wanted model's file, or add `tokenizer: {source: MODEL}`",
)
def other_tokenizer(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None:
        return
    written = output.tokenizer(output.tokenizer_donor)
    tokenized = list(output.tokenized)
    if written is None:
        if tokenized and output.beside(output.tokenizer_donor) is not None:
            yield document.warning(
                "tokenizer",
                f"the merged model gets none, for {output.called(output.tokenizer_donor)} has "
                f"none; copy that of {tokenized[-1][0]}, or add "
                f"`tokenizer: {{source: {tokenized[-1][0]}}}`",
            )
        return
    settings = ((name, tokenizer_differences(written, files)) for name, files in tokenized)
    for text, models in _grouped(settings).items():
        yield document.warning(
            "tokenizer_config.json",
            f"{_tokenizer_gets(output)}; {_has(models)} {text}: "
            + _tokenizer_way_out(output, models[-1], dict(tokenized)[models[-1]]),
        )
    yield from _other_templates(document, output, tokenized)
    if output.tokenizer_source is None:
        yield from _other_vocabularies(document, output, written, tokenized)


def _tokenizer_gets(output: Output) -> str:
    if output.tokenizer_source is None:
        return _gets(output, "that")
    return f"the merged model gets that of {output.called(output.tokenizer_donor)}"


def _tokenizer_way_out(output: Output, model: str, files: Beside) -> str:
    # Of BASE+ADAPTER mergekit would take the tokenizer of BASE.
    if output.tokenizer_source is None or model in output.document.adapter_folders:
        return f"where these are wanted, copy the tokenizer's files of {files.folder}"
    return f"where these are wanted, write `tokenizer: {{source: {model}}}`"


def _other_templates(
    document: Document, output: Output, tokenized: list[tuple[str, Beside]]
) -> Iterator[Finding]:
    written = output.chat_template
    if written is None:
        return  # the configuration has its own
    if output.templates_tie:
        yield document.warning(
            "chat_template",
            "`auto` takes the most common of the models' templates, and several are equally "
            "common: it may be any of these; write the template's name or text, or copy one "
            "into the merged folder",
        )
        return
    others = [(n, files) for n, files in tokenized if files.chat_template not in ("", written)]
    for models in _grouped((name, files.chat_template) for name, files in others).values():
        files = dict(others)[models[-1]]
        theirs = f"{_has(models)} another one" if written else f"which has none; {_has(models)} one"
        yield document.warning(
            "chat template",
            f"{_tokenizer_gets(output)}{';' if written else ','} {theirs}: where it is "
            f"wanted, copy {template_file(files)} of {files.folder} into the merged folder",
        )


def _other_vocabularies(
    document: Document, output: Output, written: Beside, tokenized: list[tuple[str, Beside]]
) -> Iterator[Finding]:
    vocabularies = Vocabularies(output)
    rows = vocabularies.rows(output.donor)
    for name, files in tokenized:
        if not written.vocabulary or vocabularies.rows(name) != rows:
            continue  # of different embeddings TEN509 says more
        ours = written.vocabulary
        other = [t for t, number in files.vocabulary.items() if ours.get(t) != number]
        if not other or (name in document.adapter_folders and len(files.vocabulary) > (rows or 0)):
            continue  # an adapter of another vocabulary does not fit, which TEN503 says
        way_out = f"to keep them add `tokenizer: {{source: {name}}}`"
        if name in document.adapter_folders:
            way_out = f"where these are wanted, copy the tokenizer's files of {files.folder}"
        yield document.warning(
            "tokenizer.json",
            f"{_tokenizer_gets(output)}; {name} has other tokens, or under other numbers: "
            f"{_tokens(other)}; {way_out}",
        )


@define_check(
    "FOL608",
    "warning",
    title="weights and modules that mergekit neither merges nor copies",
    advice="copy them from the fine-tune into the merged folder, or merge them by mergekit-pytorch",
)
def left_behind(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None:
        return
    found = leftovers.of_models(output)
    said = ((n, joined(files)) for n, files in found.items())
    for text, models in _grouped(said).items():
        where = joined([output.called(name) for name in models])
        weights = [f for f in found[models[0]] if leftovers.is_weights(f)]
        merge = "; mergekit-pytorch merges such a file with that of the base" if weights else ""
        yield document.warning(
            where,
            f"mergekit neither merges nor copies {text}: copy what the merged model needs "
            f"from {models[-1]}{merge}",
        )


# -- tokens and rows -------------------------------------------------------------------------------


@define_check(
    "FOL609",
    "error",
    "warning",
    title="tokens without a row in the embedding (without `tokenizer:` a warning)",
    advice="resize that model's embedding to its tokenizer, or correct vocab_size in config.json",
)
def tokens_without_rows(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None:
        return
    vocabularies = Vocabularies(output)
    base = vocabularies.of_models.get(output.donor)
    resize = "resize its embedding (transformers: `resize_token_embeddings`), or remove the tokens"
    if base is not None and base.beyond:
        lacking = f"{len(base.beyond)} token(s) have no row among its {base.size}"
        tokens = _tokens(base.beyond)
        if output.tokenizer_source is None:
            yield document.warning(
                output.called(output.donor),
                f"{lacking}, nor in the merged model, which gets its tokenizer: {tokens}; {resize}",
            )
        elif (kind := vocabularies.kind(output.donor)) != "BPE":
            yield document.error(
                output.called(output.donor),
                f"{lacking}: {tokens}; mergekit can drop them from a BPE tokenizer only, this is "
                f"{kind}, so the merge stops; {resize}",
            )
    for name, lost, of_model in vocabularies.without_rows():
        yield document.error(
            name,
            f"{len(lost)} token(s) have no row among the {of_model.size} of its config.json: "
            f"{_tokens(lost)}; mergekit would stop with a KeyError; {resize}",
        )


def _tokens(tokens: list[str]) -> str:
    return joined([shown_value(token) for token in tokens])


@define_check(
    "FOL610",
    "warning",
    title="tokens or rows of the embedding that `tokenizer:` drops",
    advice="take `source: union` or that model for tokens, and `pad_to_multiple_of` for rows",
)
def dropped_rows(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None or output.tokenizer_source is None:
        return
    vocabularies = Vocabularies(output)
    for name, tokens in vocabularies.dropped():
        if name == output.donor and set(tokens) <= set(vocabularies.of_models[name].beyond):
            continue  # which FOL609 says
        yield document.warning(
            "tokenizer",
            f"the merged model will not have {len(tokens)} token(s) of {name}: "
            f"{_tokens(tokens)}" + _keeping(vocabularies, name, tokens),
        )
    rows, base = vocabularies.rows(output.donor), vocabularies.of_models.get(output.donor)
    merged = vocabularies.merged_rows
    if rows and merged and base is not None and len(base.known) < rows and merged < rows:
        yield document.warning(
            "tokenizer",
            f"the merged embedding has {merged} rows where {output.called(output.donor)} has "
            f"{rows}: mergekit cuts off the padding; to keep the size write "
            f"`pad_to_multiple_of: {rows}` under `tokenizer`",
        )


def _keeping(vocabularies: Vocabularies, name: str, lost: list[str]) -> str:
    """Return how tokens would be kept, if any way there is."""
    if set(lost) <= set(vocabularies.of_models[name].beyond):
        return "; they have no row in its embedding"
    return "; `tokenizer: {source: union}` keeps those of all models"


@define_check(
    "FOL611",
    "error",
    title="chat_template that mergekit does not take",
    advice="write `auto`, a name that the message lists, or the template itself, in Jinja",
)
def unknown_template(document: Document) -> Iterator[Finding]:
    chosen = document.data.get("chat_template")
    if document.raw or not isinstance(chosen, str) or chosen in ("", "auto"):
        return
    names = sorted(
        entry.name.removesuffix(".jinja")
        for entry in importlib.resources.files(chat_templates).iterdir()
        if entry.name.endswith(".jinja")
    )
    is_template = len(chosen) >= 20 and "{" in chosen  # as mergekit tells them apart
    if chosen not in names and not is_template:
        yield document.error(
            "chat_template",
            f"{shown_value(chosen)} is neither a template nor the name of one, which mergekit "
            f"notices after the merge, and writes no tokenizer{nearest(chosen, ['auto', *names])}",
        )


@define_check(
    "FOL612",
    "error",
    title="tensors with a row for each token that `tokenizer:` does not rearrange",
    advice="leave `tokenizer:` out, and give the models one vocabulary before the merge",
)
def rows_left_as_they_are(document: Document) -> Iterator[Finding]:
    output = _output(document)
    if output is None or output.tokenizer_source is None:
        return
    if names := Vocabularies(output).left_as_they_are():
        yield document.error(
            "tokenizer",
            f"{joined(sorted(names))}: a row for each token, and mergekit does not know it, so "
            "these stay in the old order and size, and the merged model would be broken; leave "
            "`tokenizer:` out where all models number their tokens alike (for another size call "
            "`resize_token_embeddings` of transformers after the merge), else give the models one "
            "vocabulary first",
        )
