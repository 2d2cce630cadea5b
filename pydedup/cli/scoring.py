# SPDX-License-Identifier: Apache-2.0
"""``pydedup score``: the rows of a query predicted, and written beside them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from pydedup import text
from pydedup.cli import options, output
from pydedup.cli.errors import warn
from pydedup.cli.progress import Watch
from pydedup.types import ScoreReport

__all__ = ["score"]

#: Of rows that failed, so many are shown with their reasons.
_SHOWN = 10


@click.command(short_help="Predict the rows of a query into a table.")
@options.store_argument
@click.option("--query", required=True, metavar="SQL", help="One SELECT: a key, then the features.")
@click.option("--model", required=True, metavar="NAME", help="The model to predict with.")
@click.option(
    "--into", required=True, metavar="TABLE", help="Table of predictions; created when missing."
)
@click.option("--key", metavar="COLUMN", help="Column of the query that is the key, not the first.")
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 20),
    default=1024,
    show_default=True,
    help="Rows predicted and written at a time.",
)
@click.option(
    "--source",
    metavar="URL",
    help="Database to read and write, when it is not that of the store.",
)
@click.option(
    "--on-error",
    type=click.Choice(("fail", "skip")),
    default="fail",
    show_default=True,
    help="Where a row cannot be predicted. fail: stop, nothing of its batch written. skip: leave "
    "it out and go on.",
)
@options.memory_option
@options.json_option
@options.quiet_option
def score(
    url: str,
    query: str,
    model: str,
    into: str,
    key: str | None,
    batch: int,
    source: str | None,
    on_error: str,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict each row that a query finds, and write it to a table of the same database.

    The first column of the query is the key of its rows, the others are the features: numbers, a
    column each, or one column of bytes (float32), JSON or an array. Rows whose key is in the table
    are skipped, so a run that was cut off goes on when it is run again, and no row is written
    twice. The query runs with your own rights, in a read-only transaction.
    """
    with (
        options.existing_store(url, memory) as store,
        Watch("opening", quiet=quiet) as watch,
    ):
        report = store.score(
            query,
            model,
            into=into,
            key=key,
            batch=batch,
            source=source,
            on_error=on_error,
            progress=watch,
        )
    if as_json:
        output.emit_json(_document(report))
        return
    _print(report)


def _print(report: ScoreReport) -> None:
    if report.resumed:
        warn(f"going on with {report.model}, which the work began with")
    if not report.rows + report.skipped + report.failed:
        output.print_note(f"the query finds no rows; table {report.table} is there")
        return
    said = f"scored {text.plural(report.rows, 'row')} with {report.model} into {report.table}"
    if report.skipped:
        said += f"; {text.count(report.skipped)} were there"
    if report.failed:
        said += f"; {text.count(report.failed)} could not be predicted"
    output.print_note(said)
    for failure in report.failures[:_SHOWN]:
        output.print_note(f"  row {failure.key!r}: {failure.reason}")
    if report.failed > _SHOWN:
        output.print_note(f"  and {text.count(report.failed - _SHOWN)} more")
    output.print_note(f"in {text.duration(report.seconds)}", "dim")


def _document(report: ScoreReport) -> dict[str, Any]:
    document = dataclasses.asdict(report)
    for failure in document["failures"]:
        failure["key"] = _plain(failure["key"])
    return document


def _plain(key: object) -> object:
    """Return a key as JSON has it; others than numbers and texts as Python writes them."""
    try:
        json.dumps(key)
    except (TypeError, ValueError):
        return repr(key)
    return key
