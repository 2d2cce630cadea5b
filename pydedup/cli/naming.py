# SPDX-License-Identifier: Apache-2.0
"""``pydedup alias`` and ``rm``: what models are called, and which are there at all."""

from __future__ import annotations

import sys
from contextlib import suppress

import click

from pydedup import Store, text
from pydedup.cli import completing, options, output
from pydedup.cli.errors import Exit, warn
from pydedup.cli.progress import WAITING, Watch
from pydedup.errors import CorruptStoreError

__all__ = ["alias", "rm"]


@click.command(short_help="Point NAME@ALIAS at a version.")
@options.store_argument
@options.model_argument
@click.argument("alias", metavar="ALIAS", shell_complete=completing.complete_aliases)
@click.argument(
    "version", metavar="[VERSION]", required=False, shell_complete=completing.complete_versions
)
@click.option("--delete", is_flag=True, help="Delete the alias instead.")
@options.json_option
def alias(
    url: str, name: str, alias: str, version: str | None, delete: bool, as_json: bool
) -> None:
    """Point NAME@ALIAS at VERSION, whatever it pointed at before; or delete it."""
    if delete == (version is not None):
        raise click.UsageError("give either a VERSION to point at or --delete")
    with options.existing_store(url) as store:
        before = None
        with suppress(CorruptStoreError):  # of one whose row is damaged, an alias can be deleted
            before = next((info for info in store.versions(name) if alias in info.aliases), None)
        with Watch(WAITING):
            store.alias(name, alias, version)
    was = None if before is None else before.version
    if as_json:
        output.emit_json({"name": name, "alias": alias, "version": version, "previous": was})
    elif delete:
        pointed = "" if was is None else f" (it was version {was})"
        output.print_note(f"{name}@{alias} is gone{pointed}")
    else:
        moved = f" (it was {was})" if was not in (None, version) else ""
        output.print_note(f"{name}@{alias} is version {version}{moved}")


@click.command(short_help="Remove a version, old versions, or all versions of a model.")
@options.store_argument
@options.model_argument
@click.option("--all-versions", is_flag=True, help="All versions of NAME, and its aliases.")
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(min=1),
    help="All versions of NAME but the newest N, and but those that an alias points at.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@options.json_option
def rm(
    url: str,
    name: str,
    all_versions: bool,
    keep: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Remove a version, old versions, or all versions of a model.

    `pydedup vacuum` then gives the space back.

    Less than a quarter of a page that others still use is not given back. Asks first when it is run
    on a terminal.
    """
    with (options.read_store if dry_run else options.existing_store)(url) as store:
        asks = not (yes or dry_run) and sys.stdin is not None and sys.stdin.isatty()
        if asks and not _agreed(store, name, all_versions, keep):
            warn("nothing was removed")
            return Exit.DIFFERENT
        with Watch(WAITING):
            removed = store.remove(name, all_versions=all_versions, keep=keep, dry_run=dry_run)
    if as_json:
        output.emit_json({"dry_run": dry_run, "removed": removed})
    else:
        for address in removed:
            output.print_note(f"{'would remove' if dry_run else 'removed'} {address}")
        if dry_run:
            output.print_note("dry run: nothing was removed", "yellow")
        elif removed:
            output.print_note("`pydedup vacuum` gives the space back", "dim")
        else:
            output.print_note(f"{name} has no older versions; nothing was removed")
    return Exit.OK


def _agreed(store: Store, name: str, all_versions: bool, keep: int | None) -> bool:
    """Ask on standard error whether the versions that are to be removed, if any, may go."""
    doomed = store.remove(name, all_versions=all_versions, keep=keep, dry_run=True)
    if not doomed:
        return True
    what = text.listed(doomed)
    try:
        meant = options.meant_by(store, name)
    except CorruptStoreError as error:
        warn(str(error))
    else:
        what += f" ({text.size(sum(i.logical_bytes for i in meant if i.address in doomed))})"
    return click.confirm(text.clean(f"Remove {what} from {store.url}?"), err=True)
