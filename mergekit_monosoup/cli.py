"""The console script `mergekit-monosoup`: what to look at before and after a merge.

Merging itself is mergekit's. A command imports what it needs when it runs: torch and mergekit take
seconds, and those that read records or print help need neither.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from mergekit_monosoup import __version__, terminal
from mergekit_monosoup.parameters import (
    METHODS,
    MONOSOUP,
    Count,
    Mode,
    Order,
    Rule,
    Similarity,
    parameter_table,
)
from mergekit_monosoup.waiting import announced, repeated

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_monosoup.checkpoints.storage import Storage
    from mergekit_monosoup.report import Record

Item = TypeVar("Item")
EXISTING_FILE: Any = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE: Any = click.Path(dir_okay=False, path_type=Path)
# Those of `report.SORTS`, which would have to be imported for the help of every command.
SORTS = ("name", "update", "edit", "rank", "realised", "params", "seconds")
_sort = click.option(
    "--sort",
    type=click.Choice(SORTS),
    help="Order of the rows, the largest first. Default: as in the model.",
)


class _Program(click.Group):
    """The commands, in an output of any encoding; names from files are harmless in its errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with terminal.output():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = terminal.message(error.message)  # type: ignore[misc] # Final in some
            raise


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-monosoup")
def main() -> None:
    """Companion of the merge methods `monosoup` and `svc`.

    Merge with mergekit-yaml; check and read reports here.
    """


# -- before a merge --------------------------------------------------------------------------------


def _list_checks(context: click.Context, _: click.Parameter, listing: bool) -> None:
    """Print the table of checks and exit, where ``--list`` is given."""
    if listing:
        with announced("reading mergekit …"):
            from mergekit_monosoup.check import CHECKS, table

        terminal.echo(table(CHECKS))
        context.exit()


@main.command()
@click.argument("config", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON instead of text.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="CODE[,CODE]",
    help="Leave out warnings of these codes. An error cannot be ignored.",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_checks,
    help="Print what is checked, as a Markdown table, and exit.",
)
def check(config: Path, as_json: bool, ignore: tuple[str, ...]) -> None:
    """Find what mergekit would drop in silence in CONFIG. Exit code 1 if there is an error.

    Unknown or misspelt keys and parameters, wrong values, parameters where nobody reads them, a
    missing base model, tensors whose shapes differ. Reads file headers only. If there is no error
    it says which tensors would be edited, and with which values.
    """
    with announced("reading mergekit …"):
        from mergekit_monosoup.check import examine

    codes = [code for part in ignore for code in part.split(",") if code.strip()]
    try:
        examination = examine(config, codes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--ignore") from None
    findings = examination.findings
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        terminal.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            level = click.style(finding.level, fg="red" if finding.level == "error" else "yellow")
            where = terminal.plain(terminal.shortened(finding.where, terminal.LONGEST_CELL))
            words = terminal.plain(terminal.shortened(" ".join(finding.message.split())))
            terminal.echo(f"{level}  {finding.code}  {where}: {words}")
        counts = f"{errors} error(s), {len(findings) - errors} warning(s)"
        terminal.echo(f"{terminal.plain(config)}: {counts if findings else 'fine'}")
        for line in examination.summary:
            terminal.echo(f"  {terminal.plain(line)}")
    raise SystemExit(1 if errors else 0)


def _loading(command: Callable[..., None]) -> Callable[..., None]:
    """Add mergekit's options for where models come from, handed on as one ``storage``."""

    @click.option(
        "--transformers-cache",
        type=click.Path(),
        help="Override storage path for downloaded models.",
    )
    @click.option(
        "--lora-merge-cache",
        type=click.Path(),
        help="Path to store merged LoRA models (for BASE+ADAPTER).",
    )
    @click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Trust remote code when an adapter is merged (danger).",
    )
    @functools.wraps(command)
    def with_storage(
        transformers_cache: str | None,
        lora_merge_cache: str | None,
        trust_remote_code: bool,
        **rest: Any,
    ) -> None:
        from mergekit_monosoup.checkpoints.storage import Storage

        storage = Storage(
            transformers_cache=transformers_cache,
            lora_merge_cache=lora_merge_cache,
            trust_remote_code=trust_remote_code,
        )
        command(storage=storage, **rest)

    return with_storage


@main.command()
@click.argument("base")
@click.argument("tuned", required=False)
@click.option(
    "--R",
    "R",
    type=float,
    default=MONOSOUP["R"].default,
    show_default=True,
    help="Energy threshold of `variance`.",
)
@click.option(
    "--cosine",
    "others",
    multiple=True,
    metavar="OTHER",
    help="Another fine-tune to compare directions with.",
)
@click.option("--spectra", is_flag=True, help="Store each spectrum as a short curve, for `plot`.")
@click.option("--layers", is_flag=True, help="A row for every matrix instead of means over layers.")
@_sort
@click.option("--out", type=FILE, help="Write the records, as a merge's report.")
@_loading
def inspect(
    base: str,
    tuned: str | None,
    R: float,
    others: tuple[str, ...],
    spectra: bool,
    layers: bool,
    sort: str | None,
    out: Path | None,
    storage: Storage,
) -> None:
    """Show the spectra of TUNED − BASE.

    Beside them, what MonoSoup would make of them in either mode. Nothing is merged.

    Models as in mergekit: a folder, a hub name, BASE+ADAPTER. In memory are as many
    tensors at a time as there are threads. A LoRA adapter may stand in the place of TUNED,
    or alone, without a base: its spectra take milliseconds.
    """
    from mergekit_monosoup import report as reports
    from mergekit_monosoup.report import advice, inspected

    with _errors():
        if out is not None:
            reports.check_path(str(out))
        elif spectra:
            raise ValueError("--spectra stores curves in the records: add --out FILE")
        inspections, count, remarks = _inspections(base, tuned, others, storage, R, spectra)
        records: list[reports.Record] = []
        unedited, journal = 0, reports.Journal()
        for of_tensor in _progress(inspections, "inspecting", count):
            if of_tensor and out is not None:
                journal.add(of_tensor, str(out))
            records += of_tensor
            unedited += not of_tensor
        if not records:
            raise ValueError(
                f"{base} and {tuned} share no matrix of floating point: there is nothing to inspect"
            )
    console = terminal.console()
    console.print(inspected.table(records, console.width, every_layer=layers, sort=sort))
    lines = [*remarks]
    if unedited:
        lines.append(
            f"{unedited} tensors hold no matrix of floating point (norms, biases, integers): "
            "they are not edited."
        )
    reading = inspected.reading(records, partial=bool(remarks))
    reading += advice.which_mode(records)
    for line in [*lines, *inspected.cosine_lines(records), *reading]:
        console.print(terminal.plain(line))


def _inspections(
    base: str,
    tuned: str | None,
    others: Sequence[str],
    storage: Storage,
    R: float,
    spectra: bool,
) -> tuple[Iterator[list[Record]], int, list[str]]:
    """Return the records of each tensor as they come, how many tensors there are, and remarks."""
    from mergekit_monosoup.adapters import command

    adapter = command.adapter_in(base, tuned)
    if adapter is not None:
        source = command.inspection(adapter, others, base if tuned else None, storage)
        remarks = source.comparison.remarks
        return source.records(R=R, spectra=spectra), len(source.names), remarks
    with announced("reading mergekit …"):
        from mergekit_monosoup.checkpoints.reader import Checkpoints
        from mergekit_monosoup.inspection import inspect_each

    checkpoints = Checkpoints([base, str(tuned), *others], storage)
    inspections = inspect_each(checkpoints, checkpoints.names, R=R, spectra=spectra)
    return inspections, len(checkpoints.names), checkpoints.remarks


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--base", required=True, help="The pretrained model of all of them.")
@click.option(
    "--threshold", required=True, type=float, help="A candidate joins when its cosine exceeds it."
)
@click.option("--scores", type=FILE, help="JSON or YAML: a number for each MODEL.")
@click.option(
    "--order",
    type=click.Choice(get_args(Order)),
    help="Of the candidates; `similarity` takes the nearest to the soup next. "
    "Default: scores if given, else as listed.",
)
@click.option(
    "--count",
    type=click.Choice(get_args(Count)),
    default="matrices",
    show_default=True,
    help="Which tensors are compared.",
)
@click.option(
    "--similarity",
    "how",
    type=click.Choice(get_args(Similarity)),
    default="mean",
    show_default=True,
    help="Mean of the matrices' cosines, or one cosine of the whole update.",
)
@click.option("--edit", is_flag=True, help="MonoSoup of the soup instead of the plain average.")
@click.option("--out", type=FILE, default="soup.yml", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite --out.")
@_loading
def soup(
    models: tuple[str, ...],
    base: str,
    threshold: float,
    scores: Path | None,
    order: Order | None,
    count: Count,
    how: Similarity,
    edit: bool,
    out: Path,
    force: bool,
    storage: Storage,
) -> None:
    """Choose MODELs by the similarity of their updates (paper, §3).

    Writes the merge for mergekit-yaml. The first MODEL is the best in distribution, unless
    --scores says which is. No data is needed; one pass over the files. LoRA adapters of the
    base are compared as such.
    """
    from mergekit_monosoup.adapters import command
    from mergekit_monosoup.files import write_text

    with announced("reading mergekit …"):
        from mergekit_monosoup import soup as soups

    with _errors():
        _check_new_configuration(out, force)
        soups.check_models(base, models)
        soups.check_choice(threshold, order, scores is not None)
        score_of = soups.read_scores(scores, models) if scores else None
        order = order or ("scores" if scores else "given")
        adapters = command.all_adapters(models)
        products = _products_of_adapters if adapters else _products
        gram, remarks = products(base, models, storage, count)
        decisions = soups.select(models, gram, threshold, order=order, how=how, scores=score_of)
        merged = command.on_base(base, decisions) if adapters else decisions
        write_text(out, soups.configuration(base, merged, threshold, edit=edit))
    console = terminal.console()
    similarities = soups.pairwise(gram, how)
    for part in soups.similarity_tables(models, similarities, console.width):
        console.print(part)
    for line in [*remarks, *soups.twins(models, similarities)]:
        console.print(terminal.plain(line))
    for decision in decisions:
        terminal.echo(terminal.message(soups.describe(decision)))
    place = terminal.plain(out)
    terminal.echo(
        f"{place}: {sum(d.taken for d in decisions)} of {len(models)} models; "
        f"merge with `mergekit-yaml {place} DIR`"
    )
    if adapters:
        terminal.echo(terminal.message(command.to_merge(decisions, edit)))


def _products(
    base: str, models: Sequence[str], storage: Storage, count: Count
) -> tuple[Tensor, list[str]]:
    """Return the inner products of the updates of models, and remarks."""
    from mergekit_monosoup import soup as soups
    from mergekit_monosoup.checkpoints.reader import Checkpoints

    checkpoints = Checkpoints([base, *models], storage)
    names = _progress(checkpoints.names, "comparing", len(checkpoints.names))
    return soups.products(checkpoints, names, count), checkpoints.remarks


def _products_of_adapters(
    _base: str, adapters: Sequence[str], _storage: Storage, _count: Count
) -> tuple[Tensor, list[str]]:
    """Return the inner products of the updates of adapters, and remarks; all are matrices."""
    from mergekit_monosoup.adapters.comparing import Comparison, products

    comparison = Comparison(adapters, one_base=True)
    grams = _progress(comparison.grams(), "comparing", len(comparison.names))
    return products(comparison, grams), comparison.remarks


def _check_new_configuration(out: Path, force: bool) -> None:
    """Raise ValueError unless ``out`` is a name under which a configuration may be written."""
    if out.suffix.lower() not in (".yml", ".yaml"):
        raise ValueError(f"--out {out}: what is written is a configuration, name it .yml")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; --force overwrites it")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder to write {out.name} to")


@main.command()
@click.argument("method", type=click.Choice(list(METHODS)), default=MONOSOUP.name)
def parameters(method: str) -> None:
    """Print the parameters of METHOD as a Markdown table. Of monosoup if none is given."""
    terminal.echo(parameter_table(method))


# -- a merge ---------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Merge as mergekit-yaml does, on all cores.

    On one machine or many; resumes after a crash.
    """
    # The options are mergekit's own: `mergekit-monosoup --help` must not import mergekit for them.
    with announced("reading mergekit …"):
        from mergekit_monosoup.distributed.command import run as command

    # Its errors are shown by this program.
    command.main(
        list(arguments), prog_name=context.command_path, standalone_mode=False, obj=arguments
    )


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--method", type=click.Choice(list(METHODS)), default=MONOSOUP.name, show_default=True
)
@click.option("--mode", type=click.Choice(get_args(Mode)), help="monosoup: how to cut.")
@click.option("--R", "R", type=float, help="monosoup: energy threshold of `variance`.")
@click.option(
    "--coefficients", type=click.Choice(get_args(Rule)), help="monosoup: (λ_high, λ_low)."
)
@click.option("--alpha", type=float, help="monosoup: Wise-FT. svc: lower bound of coefficients.")
@click.option("--scaling", type=float, help="svc: factor of the sum.")
@click.option("--normalize", is_flag=True, default=None, help="svc: average instead of the sum.")
@click.option("--weight", "weights", type=float, multiple=True, help="Once for each ADAPTER.")
@click.option("--rank", type=click.IntRange(1), help="Compress the result to this rank.")
@click.option("--base", help="Their base model: to edit what is stored whole, for `realised`.")
@click.option("--report", "report_file", type=FILE, help="Write the records, as a merge's report.")
@click.option("--force", is_flag=True, help="Replace the adapter in --out.")
@_loading
def adapter(
    adapters: tuple[str, ...],
    out: Path,
    method: str,
    weights: tuple[float, ...],
    rank: int | None,
    base: str | None,
    report_file: Path | None,
    force: bool,
    storage: Storage,
    **values: Any,
) -> None:
    """Edit a LoRA adapter, or the average of several, as an adapter.

    The same mathematics as the merge methods, on matrices of the adapter's rank: no base model is
    needed, and it takes seconds. The parameters are those of `mergekit-monosoup parameters`.
    """
    with announced("reading torch …"):
        from mergekit_monosoup.adapters import command, editing

    with _errors():
        started = time.perf_counter()
        made = command.method_of(method, len(adapters), weights, values)
        options: dict[str, Any] = {"rank": rank, "base": base, "force": force}
        merge = command.prepare(adapters, out, made, report=report_file, storage=storage, **options)
        pieces = editing.write(
            merge,
            out,
            force=force,
            report=str(report_file) if report_file else None,
            progress=lambda pieces, total: _progress(pieces, "editing", total),
        )
        for line in command.lines(merge, pieces, out, time.perf_counter() - started):
            terminal.echo(terminal.message(line))


# -- after a merge ---------------------------------------------------------------------------------


@main.command()
@click.argument("files", nargs=-1, required=True, type=EXISTING_FILE, metavar="FILE...")
@_sort
@click.option("--json", "as_json", is_flag=True, help="Rows of the table as JSON.")
@click.option("--card", "as_card", is_flag=True, help="A Markdown paragraph for a model card.")
@click.option("--html", type=FILE, help="Write a page to look at in a browser.")
def report(
    files: Sequence[Path], sort: str | None, as_json: bool, as_card: bool, html: Path | None
) -> None:
    """Print what a merge did to each layer group.

    FILE is its report, written by `parameters: {report: FILE}`, or the records of an inspection.
    Several are shown one after the other, on a page side by side.
    """
    with _errors():
        if sum([as_json, as_card, html is not None]) > 1:
            raise ValueError("--json, --card and --html are each a form of its own: give one")
        if as_json and len(files) > 1:
            raise ValueError("--json takes one FILE: its rows do not say which file they are of")
        labelled = _labelled(files)
        texts = _texts(labelled, sort, as_card, html) if as_json or as_card or html else []
    # Not within: an output that fails is no wrong input.
    for text in texts:
        terminal.echo(text)
    if not texts:
        for label, records in labelled.items():
            _print_table(label if len(files) > 1 else "", records, sort)


def _labelled(files: Sequence[Path]) -> dict[str, list[Record]]:
    """Return the records of each file by its name, by its whole path where names are alike."""
    from mergekit_monosoup import report as reports

    short = len({file.name for file in files}) == len(files)
    return {file.name if short else str(file): reports.read(file) for file in files}


def _texts(
    labelled: dict[str, list[Record]], sort: str | None, as_card: bool, html: Path | None
) -> list[str]:
    """Return what to print of reports that are no table: JSON, cards, or where their page is."""
    if html is not None:
        from mergekit_monosoup import pages

        pages.write(labelled, html)
        size = html.stat().st_size / 1e6
        return [f"{terminal.plain(html)}: {len(labelled)} report(s), {size:.1f} MB"]
    if as_card:
        from mergekit_monosoup.report.card import card

        cards = [_naming(label, card, records) for label, records in labelled.items()]
        return ["\n\n".join(cards)]
    return [_naming(label, _rows, records, sort) for label, records in labelled.items()]


def _naming(label: str, function: Callable[..., Item], *arguments: Any) -> Item:
    """Call a function of records; its error gets the name of their file."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from error


def _rows(records: Sequence[Record], sort: str | None) -> str:
    """Return the rows of a merge's table as JSON."""
    from mergekit_monosoup import report as reports

    if all(record.action == "inspected" for record in records):
        raise ValueError("holds an inspection, not a merge: its lines are JSON already")
    rows = reports.sort_rows(reports.summarise(records), sort)
    return json.dumps([asdict(row) for row in rows], indent=2)


def _print_table(label: str, records: Sequence[Record], sort: str | None) -> None:
    """Print the table of a merge or an inspection, under the name of its file if it has one."""
    from mergekit_monosoup import report as reports
    from mergekit_monosoup.report import inspected

    console = terminal.console()
    if label:
        console.print(f"{terminal.plain(label)}:")
    is_inspection = all(record.action == "inspected" for record in records)
    make_table = inspected.table if is_inspection else reports.table
    console.print(make_table(records, console.width, sort=sort))


@main.command()
@click.argument("files", nargs=-1, required=True, type=EXISTING_FILE)
@click.option("--out", required=True, type=FILE, help="PNG, SVG or PDF file.")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help="Draw only this mode of an inspection.",
)
def plot(files: Sequence[Path], out: Path, mode: str | None) -> None:
    """Draw reports, of merges and inspections.

    By depth: λ_high and λ_low, relative updates, what rounding leaves, effective ranks. Beside
    them spectra and cosines.
    """
    from mergekit_monosoup import plots

    with _errors():
        plots.check_suffix(out)
        figure = plots.draw(_labelled(files), mode=mode)
        plots.save(figure, out)
    terminal.echo(f"{terminal.plain(out)}: {len(figure.axes)} panels")


# -- shared ----------------------------------------------------------------------------------------


@contextmanager
def _errors() -> Iterator[None]:
    """Show a wrong input as a message without a traceback; a bug keeps its traceback."""
    from mergekit_monosoup.errors import SolverError

    try:
        yield
    except (ValueError, OSError, ImportError, SolverError, OverflowError) as error:
        raise click.ClickException(str(error)) from error


def _progress(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Iterate over ``items`` with a bar on stderr, or lines now and then where it is a file."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, label, total, console=console, transient=True)
        return
    done = 0
    with repeated(lambda: f"{label}: {done} of {total} tensors"):
        for item in items:
            yield item
            done += 1


if __name__ == "__main__":
    main()
