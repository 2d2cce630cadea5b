# SPDX-License-Identifier: Apache-2.0
"""``pydedup report``: a store as one page for a browser."""

from __future__ import annotations

from pathlib import Path

import click

from pydedup import text
from pydedup.cli import completing, options, output
from pydedup.cli.progress import Watch
from pydedup.replacement import Trace

__all__ = ["report"]


@click.command(short_help="Write one HTML page: sizes, sharing, pages, guarantees, cache.")
@options.store_argument
@click.option(
    "-o",
    "--output",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Where to write it; - is standard output.",
)
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    shell_complete=completing.complete_models,
    help="Show this model block by block, instead of the four largest; may be repeated.",
)
@options.file_option(
    "--trace",
    "Recorded uses of pages, from `pydedup serve --record`: show what each policy would have "
    "missed.",
)
@options.memory_option
@options.json_option
@options.quiet_option
def report(
    url: str,
    path: Path,
    models: tuple[str, ...],
    trace: Path | None,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a store as one HTML page.

    It shows sizes, who shares with whom, layers and blocks, pages, guarantees, and with --trace
    what each replacement policy would have missed. It loads nothing from anywhere and has no
    script, so it may be mailed or archived.

    Needs the extra `report`.
    """
    to_stdout = str(path) == "-"
    if to_stdout and as_json:
        raise click.UsageError("-o - prints the page, and --json a document: name a file with -o")
    recorded = None if trace is None else Trace.load(trace)
    with options.read_store(url, memory) as store, Watch("looking at the store", quiet=quiet):
        page = store.report(None if to_stdout else path, models=models, trace=recorded)
        where = store.url
    n_bytes = len(page.encode())
    if to_stdout:
        click.echo(page, nl=False)
    elif as_json:
        damaged = list(page.damaged)
        output.emit_json({"url": where, "path": str(path), "bytes": n_bytes, "damaged": damaged})
    else:
        output.print_note(f"wrote {path}: {text.size(n_bytes)}")
    output.refuse_damaged(where, page.damaged)
