# SPDX-License-Identifier: Apache-2.0
"""``pydedup score``: the rows of a query, or of Parquet files, predicted and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import click

from pydedup import text
from pydedup.cli import completing, options, output
from pydedup.cli.errors import warn
from pydedup.cli.progress import Watch
from pydedup.types import ScoreReport
from pydedup.words import OnError

__all__ = ["score"]

#: Of rows that failed, so many are shown with their reasons.
_SHOWN = 10


@click.command(short_help="Predict the rows of a query into a table.")
@options.store_argument
@click.option("--query", metavar="SQL", help="One SELECT: a key, then the features.")
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    shell_complete=completing.complete_models,
    help="The model to predict with.",
)
@click.option("--into", metavar="TABLE", help="Table of predictions; created when missing.")
@click.option("--key", metavar="COLUMN", help="Column that is the key.  [default: the first]")
@options.number_option(
    "--batch", "N", click.IntRange(1, 1 << 20), 1024, "Rows predicted and written at a time."
)
@click.option(
    "--source",
    metavar="URL",
    shell_complete=completing.complete_stores,
    help="Database to read and write, if it is not that of the store.",
)
@click.option(
    "--on-error",
    type=click.Choice(get_args(OnError)),
    default="fail",
    show_default=True,
    help="What to do when a row cannot be predicted. fail: stop, with nothing of its batch "
    "written. skip: leave it out and go on.",
)
@options.on_option("Score on")
@click.option(
    "--parquet-in",
    multiple=True,
    metavar="PATH",
    shell_complete=completing.complete_files,
    help="With --on: Parquet files, or folders of them, instead of --query; may be repeated.",
)
@click.option(
    "--columns", metavar="A,B,...", help="With --parquet-in: the columns to read.  [default: all]"
)
@click.option(
    "--parquet-out",
    metavar="FOLDER",
    shell_complete=completing.complete_files,
    help="With --on: write Parquet files into a folder, instead of --into.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, 10_000),
    help="With --on: how many workers.  [default: as many as there are CPUs for]",
)
@options.number_option(
    "--cpus-per-worker",
    "N",
    click.IntRange(1, 1024),
    1,
    "With --on: CPUs, and threads, of each worker.",
)
@options.number_option(
    "--max-deaths",
    "N",
    click.IntRange(1, 1000),
    4,
    "With --on: workers that may die at one part of the work before it is given up.",
)
@options.memory_option
@options.json_option
@options.quiet_option
@click.pass_context
def score(
    context: click.Context,
    /,
    url: str,
    query: str | None,
    model: str,
    into: str | None,
    on: str | None,
    parquet_in: tuple[str, ...],
    columns: str | None,
    parquet_out: str | None,
    workers: int | None,
    cpus_per_worker: int,
    max_deaths: int,
    memory: str,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Predict each row of a query, and write the predictions to a table of the same database.

    The first column of the query is the key of its rows, the others are the features: numbers, a
    column each, or one column of bytes (float32), JSON or an array. Rows whose key is in the table
    are skipped, so a run that was cut off continues when it is run again, and no row is written
    twice. The query runs with your own rights, in a read-only transaction.

    With --on, workers of a Ray cluster do it, also from and to Parquet files.
    """
    _check(context, on, query=query, parquet_in=parquet_in, into=into, parquet_out=parquet_out)
    # ``how`` is what both ways of scoring take: key, batch, source, on_error.
    if on is None:
        with (
            options.existing_store(url, memory) as store,
            Watch("opening", quiet=quiet) as watch,
        ):
            report = store.score(query or "", model, into=into or "", progress=watch, **how)
    else:
        import pydedup.ray

        with Watch("starting Ray" if on == "local" else "connecting", quiet=quiet) as watch:
            report = pydedup.ray.score(
                query if query is not None else [Path(path) for path in parquet_in],
                url,
                model,
                into=into if into is not None else Path(parquet_out or ""),
                columns=None if columns is None else columns.split(","),
                on=on,
                workers=workers,
                cpus_per_worker=cpus_per_worker,
                memory=memory,
                max_deaths=max_deaths,
                progress=watch,
                **how,
            )
    if as_json:
        output.emit_json(_document(report))
        return
    _print(report)


def _check(context: click.Context, on: str | None, **given: object) -> None:
    """Raise where options that belong together are not."""
    for one, other in (("query", "parquet_in"), ("into", "parquet_out")):
        names = f"--{one}", f"--{other.replace('_', '-')}"
        if bool(given[one]) == bool(given[other]):
            how = "not both" if given[one] else "one of them is needed"
            raise click.UsageError(f"give {names[0]} or {names[1]}: {how}", context)
    ours = ("parquet_in", "parquet_out", "columns", "workers", "cpus_per_worker", "max_deaths")
    source = context.get_parameter_source
    for name in ours if on is None else ():
        if source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --on", context)


def _print(report: ScoreReport) -> None:
    if report.resumed:
        warn(f"continuing with {report.model}, which the work began with")
    if not report.rows + report.skipped + report.failed:
        output.print_note(f"there are no rows to predict; {report.table} exists")
        return
    said = f"scored {text.plural(report.rows, 'row')} with {report.model} into {report.table}"
    if report.skipped:
        were = "was" if report.skipped == 1 else "were"
        said += f"; {text.count(report.skipped)} {were} there"
        if not report.rows + report.failed:  # maybe by another version
            said += " (to predict them anew, delete them or name another place)"
    if report.failed:
        said += f"; {text.count(report.failed)} could not be predicted"
    output.print_note(said)
    for failure in report.failures[:_SHOWN]:
        output.print_note(f"  row with key {text.row_key(failure.key)}: {failure.reason}")
    if report.failed > _SHOWN:
        output.print_note(f"  and {text.count(report.failed - _SHOWN)} more")
    output.print_note(f"in {text.duration(report.seconds)}", "dim")


def _document(report: ScoreReport) -> dict[str, Any]:
    document = dataclasses.asdict(report)
    for failure in document["failures"]:
        failure["key"] = _plain(failure["key"])
    return document


def _plain(key: object) -> object:
    """Return a key as JSON has it; dates and others that are no number or text, as text."""
    try:
        json.dumps(key)
    except (TypeError, ValueError):
        return text.row_key(key, shortened=False)
    return key
