"""Checks of the models' tensors, from file headers: names, shapes, dtypes, and what is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, Level, define_check
from mergekit_monosoup.check.keys import named_dtype
from mergekit_monosoup.checkpoints import adapters, misfit
from mergekit_monosoup.checkpoints.coverage import is_matrix
from mergekit_monosoup.checkpoints.headers import ForeignError, LackingError, Stored, WrappedError
from mergekit_monosoup.checkpoints.hub import HubError, RefusedError
from mergekit_monosoup.checkpoints.names import EXPERTS
from mergekit_monosoup.checkpoints.reader import NAMES_IN_MESSAGE
from mergekit_monosoup.checkpoints.sections import entries, mapping, unmatched

Tensors = dict[str, Stored]


# -- whether headers can be read -------------------------------------------------------------------


def _faults(document: Document) -> Iterator[tuple[str, Exception]]:
    """Yield (model, error) of the models, and of the adapters, whose headers cannot be read."""
    for name, error in document.opened.items():
        if isinstance(error, ForeignError | WrappedError) or error is document.references[name]:
            continue  # which files.py reports, or KEY102
        if isinstance(error, Exception):
            yield name, error
    for name, error in document.adapters.items():
        if isinstance(error, Exception):
            yield name.partition("+")[2], error


@define_check(
    "TEN501",
    "error",
    title="model that cannot be read",
    advice="download or copy it again",
)
def unreadable(document: Document) -> Iterator[Finding]:
    for name, error in _faults(document):
        if not isinstance(error, HubError):
            # The error of a cut-off file says it all.
            kind = "" if isinstance(error, LackingError) else f"{type(error).__name__}: "
            yield document.error(name, f"cannot be read: {kind}{error}")


@define_check(
    "TEN502",
    "error",
    "warning",
    title="hub repository that is not there for you (error), could not be asked, or has moved",
    advice="correct the name, log in with `hf auth login`, or check again with a network",
)
def unreachable(document: Document) -> Iterator[Finding]:
    for name, error in _faults(document):
        if isinstance(error, RefusedError):
            yield document.error(name, str(error))
        elif isinstance(error, HubError):
            yield document.warning(name, f"shapes not checked: {error}")
    for name, note in document.headers.notes.items():
        if name in {part for model in document.models for part in _paths(model)}:
            yield document.warning(name, note)


def _paths(model: str) -> list[str]:
    """Return the names of a model and its adapter, without revisions."""
    return [part.partition("@")[0] for part in model.split("+")]


@define_check(
    "TEN503",
    "error",
    "warning",
    title="adapter that does not fit its base (error), or of which that is not known",
    advice="name the model that the adapter was trained on; enlarge its vocabulary where that was",
)
def adapter(document: Document) -> Iterator[Finding]:
    for name, ours in document.adapters.items():
        base = document.tensors.get(name)
        if isinstance(ours, Exception) or base is None:
            continue
        if not adapters.shapes(ours, base):
            yield document.warning(name, "none of the adapter's tensors is called as in the base")
        if found := adapters.misfit(ours, base):
            yield document.error(name, found)


# -- dtypes ----------------------------------------------------------------------------------------


@define_check(
    "TEN504",
    "error",
    title="quantised model",
    advice="convert it to bfloat16 first: a merge of codes is noise",
)
def quantised(document: Document) -> Iterator[Finding]:
    for model, fault in document.quantised.items():
        yield document.error(model, fault)


@define_check(
    "TEN505",
    "warning",
    title="`out_dtype` without `dtype`, unlike what the models are stored in",
    advice="add `dtype`: the methods compute and round in what the checkpoints are stored in",
)
def working_dtype(document: Document) -> Iterator[Finding]:
    out = named_dtype(document, "out_dtype")
    if not document.own_method or document.data.get("dtype") is not None or out is None:
        return
    stored = (tensor for tensors in document.tensors.values() for tensor in tensors.values())
    floating = (tensor for tensor in stored if tensor.floating)
    widest = max(floating, key=lambda tensor: tensor.bits, default=None)
    if widest is None or 8 * out.itemsize == widest.bits:
        return
    if 8 * out.itemsize > widest.bits:
        message = (
            f"only stores wider what was rounded to {widest.dtype} before: "
            f"add `dtype: {document.data['out_dtype']}`"
        )
    else:
        message = (
            "mergekit rounds to it after the method: `realised` in the report is that of "
            f"{widest.dtype}, what is stored may be less"
        )
    yield document.warning("out_dtype", message)


# -- what the merge reads --------------------------------------------------------------------------


@define_check(
    "TEN506",
    "warning",
    title="filter that matches no tensor",
    advice="write a part of a tensor's name, in plain text; mergekit stacks and renames some",
)
def unmatched_filter(document: Document) -> Iterator[Finding]:
    if not document.tensors:
        return
    stored = {name for tensors in document.tensors.values() for name in tensors}
    merged = {task.tensor_name for task in document.planning.tasks} or stored
    for place, text in unmatched(document.data, merged):
        reason = "it is plain text, not a pattern"
        if any(text in name for name in stored):
            reason = "as mergekit has them: it stacks or renames what the files call so"
        yield document.warning(place, f"filter {text!r} is part of no tensor's name ({reason})")


def _sliced(document: Document) -> bool:
    """Whether models are cut into slices.

    Then not every tensor is merged, nor with that of the same name.
    """
    sections = (document.data, *map(mapping, mapping(document.data.get("modules")).values()))
    return any(section.get("slices") for section in sections)


@define_check(
    "TEN507",
    "error",
    "warning",
    title="tensors that mergekit does not read; an error if there are matrices among them",
    advice="expect them to be missing from the merged model, or merge with mergekit-pytorch; "
    "`run` merges without the matrices if told `--allow-incomplete`",
)
def unread(document: Document) -> Iterator[Finding]:
    for models, tensors in document.reads.unread_together.items():
        where, said = " and ".join(_in_order(document, models)), misfit.unread(tensors)
        if any(map(is_matrix, tensors.values())):
            said += f"{_unlisted_modules(document)}. {document.planning.way_out}"
            yield document.error(where, said)
        else:
            yield document.warning(where, said)


def _in_order(document: Document, models: Iterable[str]) -> list[str]:
    """Return models in the order in which they are named."""
    order = [*document.tensors, *models]
    return sorted(models, key=order.index)


def _unlisted_modules(document: Document) -> str:
    """Return which modules of the architecture `modules` leaves out, if it is given."""
    listed = mapping(document.data.get("modules"))
    known = next(iter(document.planning.architectures.values())).modules
    rest = sorted(set(known) - set(listed))
    return f" (`modules` does not list {', '.join(rest)})" if listed and rest else ""


@define_check(
    "TEN508",
    "error",
    title="tensors that the merge needs and a model lacks",
    advice="complete the checkpoint: a shard or an expert may be missing",
)
def lacking(document: Document) -> Iterator[Finding]:
    everywhere = document.reads.lacking_everywhere  # which TEN512 reports
    for model, names in document.reads.lacking.items():
        if document.renamed:
            continue  # it has them under other names, see TEN520
        if names - everywhere:
            said = misfit.lacking(model, names - everywhere)
            if len(document.reads.models) == 1:  # no other model tells whose fault it is
                said += (
                    " If it is, mergekit's definition of "
                    f"{misfit.class_of(next(iter(document.planning.known)))} does not fit it. "
                    f"{document.planning.way_out}"
                )
            yield document.error(model, said)


# -- models beside each other ----------------------------------------------------------------------


def _others(document: Document) -> Iterator[tuple[str, Tensors, str, Tensors]]:
    """Yield (first model, its tensors, other model, its tensors) of each but the first."""
    models = list(document.comparable.items())
    for other, tensors in models[1:]:
        yield *models[0], other, tensors


@define_check(
    "TEN509",
    "error",
    "warning",
    title="tensors of one name and different shapes (with `slices` a warning)",
    advice="merge fine-tunes of one model; for other vocabularies add `tokenizer: {source: base}`",
)
def shapes(document: Document) -> Iterator[Finding]:
    level: Level = "warning" if _sliced(document) else "error"
    for first, ours, other, theirs in _others(document):
        differing = [
            name for name in ours if name in theirs and _differ(document, ours[name], theirs[name])
        ]
        for name in differing[:NAMES_IN_MESSAGE]:
            hint = ""
            if _only_vocabulary(ours[name], theirs[name]):
                hint = "; the vocabularies differ: add `tokenizer: {source: base}`"
            yield document.finding(
                level,
                name,
                f"{ours[name].shape} in {first} but {theirs[name].shape} in {other}{hint}",
            )
        if len(differing) > NAMES_IN_MESSAGE:
            more = f"{len(differing) - NAMES_IN_MESSAGE} more tensors differ in shape from {first}"
            yield document.finding(level, other, more)


def _differ(document: Document, ours: Stored, theirs: Stored) -> bool:
    """Whether shapes differ, but for vocabularies that mergekit aligns."""
    keys = ("tokenizer", "tokenizer_source")
    aligned = any(document.data.get(key) is not None for key in keys)
    return ours.shape != theirs.shape and not (aligned and _only_vocabulary(ours, theirs))


def _only_vocabulary(ours: Stored, theirs: Stored) -> bool:
    by_token = "embed" in ours.name or "lm_head" in ours.name
    return by_token and ours.shape[1:] == theirs.shape[1:]


@define_check(
    "TEN510",
    "error",
    title="models without a tensor name in common",
    advice="merge models of one architecture; a single file may need a prefix removed",
)
def nothing_in_common(document: Document) -> Iterator[Finding]:
    for first, ours, other, theirs in _others(document):
        if _unrelated(ours, theirs) and other not in document.renamed:
            yield document.error(
                other, f"has no tensor name in common with {first}: another architecture?"
            )


def _unrelated(ours: Tensors, theirs: Tensors) -> bool:
    return bool(ours and theirs) and ours.keys().isdisjoint(theirs)


@define_check(
    "TEN511",
    "warning",
    title="tensors that only some models have",
    advice="see whether they belong to the model: they are kept as they are, or left out",
)
def partial(document: Document) -> Iterator[Finding]:
    for first, ours, other, theirs in _others(document):
        if _unrelated(ours, theirs) or other in document.renamed:
            continue
        for poorer, richer in ((other, first), (first, other)):
            names = _partly_missing(document, poorer, richer)
            if names and poorer not in document.reads.lacking:
                said = f"lacks {len(names)} tensor(s) of {richer}: {misfit.listed(names)}"
                yield document.warning(poorer, said + _unpaired_in_files(document, richer))


def _unpaired_in_files(document: Document, richer: str) -> str:
    """Return what mergekit-pytorch does with tensors that not every model has; a head, say."""
    if not document.raw:
        return ""
    if richer not in [mapping(entry).get("model") for entry in entries(document.data["models"])]:
        return "; mergekit-pytorch leaves out what only the base has: the merge lacks it, too"
    return (
        "; mergekit-pytorch stops at them, but for --tensor-union, which keeps them, or "
        "--tensor-intersection, which leaves them out"
    )


def _partly_missing(document: Document, poorer: str, richer: str) -> set[str]:
    """Return what one model has and another has not; without a plan, as the files call it.

    mergekit stacks experts that are stored one by one, and knows tensors by several names: by the
    names in the files, a model in another layout would seem to lack them.
    """
    reads = document.reads
    if reads.models:
        return reads.absent.get(poorer, set()) - reads.absent.get(richer, set())
    names = document.tensors[richer].keys() - document.tensors[poorer]
    if _stacks_experts(document.tensors[richer]) != _stacks_experts(document.tensors[poorer]):
        names = {name for name in names if not _OF_EXPERTS.search(name)}
    return names


# `mlp.experts.3.up_proj`, `mlp.experts.gate_up_proj`; Mixtral's block has another name, too, in
# the other layout.
_OF_EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.|\.mlp\.gate\.")


def _stacks_experts(tensors: Tensors) -> bool:
    return any(EXPERTS.search(name) for name in tensors)


@define_check(
    "TEN512",
    "error",
    title="definition of an architecture that fits none of the models",
    advice="merge the files with mergekit-pytorch, by the configuration that the message gives",
)
def misfitting_definition(document: Document) -> Iterator[Finding]:
    if names := document.reads.lacking_everywhere:
        model = next(iter(document.planning.known))
        said = misfit.lacking_everywhere(names, misfit.class_of(model))
        yield document.error("all models", f"{said}. {document.planning.way_out}")


@define_check(
    "TEN513",
    "error",
    title="stacks of experts that differ between the models",
    advice="complete the checkpoint: an expert is missing, or it is another model",
)
def uneven_stacks(document: Document) -> Iterator[Finding]:
    for model, said in misfit.uneven(document.reads):
        yield document.error(model, said)
