"""The console script `mergekit-monosoup`: what to look at before and after a merge. Merging itself is mergekit's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from mergekit_monosoup import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-monosoup")
def main() -> None:
    """Companion of the merge method `monosoup`. Merge with mergekit-yaml; check and read reports here."""


@main.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON instead of text.")
def check(config: Path, as_json: bool) -> None:
    """Find what mergekit would drop in silence in CONFIG; exit code 1 if there is an error.

    Unknown or misspelt keys and parameters, wrong values, parameters where nobody reads them, a missing base model,
    tensors whose shapes differ. Reads file headers only.
    """
    from mergekit_monosoup.check import check as run_check

    findings = run_check(config)
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            colour = "red" if finding.level == "error" else "yellow"
            click.echo(f"{click.style(finding.level, fg=colour)}  {finding.where}: {finding.message}")
        click.echo(
            f"{config}: {errors} error(s), {len(findings) - errors} warning(s)" if findings else f"{config}: fine"
        )
    raise SystemExit(1 if errors else 0)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Rows of the table as JSON.")
def report(file: Path, as_json: bool) -> None:
    """Print what happened to each layer group, from a report FILE written by `parameters: {report: FILE}`."""
    from mergekit_monosoup import report as reports

    try:
        records = reports.read(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([asdict(row) for row in reports.summarise(records)], indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe has no width; 80 columns would fold every number
        console = Console(width=160)
    console.print(reports.table(records, console.width))


@main.command()
def parameters() -> None:
    """Print the parameters of `monosoup` as a Markdown table."""
    from mergekit_monosoup.methods import parameter_table

    click.echo(parameter_table())


if __name__ == "__main__":
    main()
