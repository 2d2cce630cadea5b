# SPDX-License-Identifier: Apache-2.0
"""``pydedup copy``, ``backup`` and ``restore``: models and whole stores from place to place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import click

from pydedup import config, text
from pydedup.cli import completing, options, output
from pydedup.cli.errors import Exit, warn
from pydedup.cli.progress import Watch
from pydedup.cli.tables import Column, print_table
from pydedup.errors import MissingStoreError, NotAStoreError
from pydedup.names import check_path
from pydedup.types import CopiedModel, CopyReport
from pydedup.words import OnConflict

__all__ = ["backup", "copy", "restore"]

_COLUMNS = (
    Column("Model", number=False, name=True, style="cyan"),
    Column("Size"),
    Column("New bytes"),
    Column("Blocks", rank=2),
    Column("Shared", rank=1),
    Column("New pages", rank=3),
    Column("", number=False),
)
#: What the table says of a model that was not simply copied.
_REMARKS = {
    "copied": "",
    "replaced": "in the place of another",
    "there": "was there",
    "skip": "left out: its name is taken",
    "gone": "left out: removed meanwhile",
    "damaged": "left out: damaged",
}
#: Of more models than these, only those are shown that something is to be said about.
_MOST_ROWS = 20


_skip_damaged_option = click.option(
    "--skip-damaged",
    is_flag=True,
    help="Leave out models that are damaged, instead of ending there, and say which; the exit "
    "status is then 1.",
)


@click.command(short_help="Copy models to another store, of any database.")
@options.store_argument
@click.argument("target", metavar="TARGET", shell_complete=completing.complete_stores)
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=completing.complete_models)
@click.option(
    "--all-versions", is_flag=True, help="All versions of each NAME, not only the newest."
)
@click.option(
    "--on-conflict",
    type=click.Choice(get_args(OnConflict)),
    default="error",
    show_default=True,
    help="What to do when TARGET has another model as NAME@VERSION, or another version as "
    "NAME@ALIAS. error: copy nothing. skip: leave it out. replace: put the copy in its place.",
)
@_skip_damaged_option
@options.memory_option
@options.json_option
@options.quiet_option
def copy(
    url: str,
    target: str,
    names: tuple[str, ...],
    all_versions: bool,
    on_conflict: OnConflict,
    skip_damaged: bool,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Copy models from STORE to TARGET: all of them, or those named.

    TARGET is a store like STORE, in the same or another database; it is created if it does not
    exist. An empty one gets the pages as they are, another one only the blocks that it does not
    have. What arrives is read back and checked; then each model appears with its name, version,
    aliases, policy and metadata. A copy that was cut off continues when it is run again.
    """
    if all_versions and not names:
        raise click.UsageError("--all-versions goes with a NAME; without one, all are copied")
    half = config.parse_bytes(memory) // 2
    if half < config.LEAST_MEMORY:
        least = f"{config.LEAST_MEMORY >> 19}MiB"
        raise click.BadParameter(
            f"{memory!r} is too little for two stores; give {least} or more",
            param_hint="'--memory'",
        )
    with options.read_store(url, str(half)) as store, Watch("opening", quiet=quiet) as watch:
        report = store.copy_to(
            target,
            names or None,
            all_versions=all_versions,
            on_conflict=on_conflict,
            skip_damaged=skip_damaged,
            memory=half,
            progress=watch,
        )
    return _print(report, "copied", as_json)


@click.command(short_help="Write a whole store to one file.")
@options.store_argument
@options.target_argument("FILE")
@click.option("--replace", is_flag=True, help="Replace an earlier backup in FILE.")
@_skip_damaged_option
@options.memory_option
@options.json_option
@options.quiet_option
def backup(
    url: str,
    path: str,
    replace: bool,
    skip_damaged: bool,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write a whole store, of whatever database, to one file.

    FILE is itself a store, in SQLite, and every command takes it. It appears under its name when it
    is complete and checked; until then it is FILE.partial, where a backup that was cut off
    continues when it is run again. STORE may be used meanwhile.
    """
    with options.read_store(url, memory) as store, Watch("opening", quiet=quiet) as watch:
        report = store.backup(path, replace=replace, skip_damaged=skip_damaged, progress=watch)
    return _print(report, "backed up", as_json)


@click.command(short_help="Write a backup into an empty store.")
@click.argument("path", metavar="FILE", shell_complete=completing.complete_files)
@options.store_argument
@options.memory_option
@options.json_option
@options.quiet_option
def restore(path: str, url: str, memory: str, as_json: bool, quiet: bool) -> None:
    """Write the backup in FILE into STORE, which is empty or does not exist yet.

    A restore that was cut off continues when it is run again, so models of that backup may be there
    already. To add the models of a backup to others, use `pydedup copy FILE STORE`.
    """
    check_path(path, "FILE")
    try:
        options.read_store(path).close()  # a mistyped name creates no store
    except MissingStoreError as error:
        raise NotAStoreError(f"there is no such backup: {error.what}") from error
    with options.writable_store(url, memory) as store, Watch("opening", quiet=quiet) as watch:
        report = store.restore(path, progress=watch)
    _print(report, "restored", as_json)


def _print(report: CopyReport, done: str, as_json: bool) -> int:
    for said in dict.fromkeys(report.damaged):  # a page of many models is one sentence
        warn(f"left out, being damaged: {said}")
    status = Exit.DIFFERENT if report.damaged else Exit.OK
    if as_json:
        output.emit_json(_document(report))
        return status
    shown = _rows_to_show(report.models)
    if shown:
        print_table(_COLUMNS, [_row(model) for model in shown])
    new = [model for model in report.models if model.is_new]
    said = f"{done} {text.plural(len(new), 'model')}"
    if new:
        weights = text.size(sum(model.logical_bytes for model in new))
        said += f": {weights} of weights, {text.size(report.stored_bytes)} written"
    there = sum(model.status == "there" for model in report.models)
    if there:
        said += f"; {text.plural(there, 'model')} {'was' if there == 1 else 'were'} there"
    output.print_note(said)
    checked = ", read back and checked," if new else ""
    output.print_note(f"to {report.target}{checked} in {text.duration(report.seconds)}", "dim")
    return status


def _rows_to_show(models: Sequence[CopiedModel]) -> list[CopiedModel]:
    """Return all models, or of many only those that were not simply copied, or there."""
    if len(models) <= _MOST_ROWS:
        return list(models)
    return [model for model in models if model.status not in ("copied", "there")]


def _row(model: CopiedModel) -> list[str]:
    figures = ["-", "-", "-", "-"]
    if model.is_new:
        counts = (model.blocks, model.shared_blocks, model.pages)
        figures = [text.size(model.stored_bytes), *map(text.count, counts)]
    return [model.model, text.size(model.logical_bytes), *figures, _REMARKS[model.status]]


def _document(report: CopyReport) -> dict[str, Any]:
    return {
        "source": report.source,
        "target": report.target,
        "copied": report.copied,
        "stored_bytes": report.stored_bytes,
        "aliases": report.aliases,
        "damaged": list(report.damaged),
        "seconds": report.seconds,
        "models": [dataclasses.asdict(model) for model in report.models],
    }
