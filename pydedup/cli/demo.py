# SPDX-License-Identifier: Apache-2.0
"""``pydedup demo``: hands over to `pydedup.demo`, which needs more than pydedup itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from pydedup.cli import completing, options, output

__all__ = ["demo"]

#: Width of what the demo prints into a pipe or a file.
_PIPE_WIDTH = 120


@click.command(short_help="Store, check and serve a family of real models.")
@click.argument("url", metavar="[STORE]", required=False, shell_complete=completing.complete_stores)
@click.option(
    "--cache",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where downloads and trained models are kept.",
)
@click.option("--retrain", is_flag=True, help="Train again, even models that the cache has.")
@options.json_option
def demo(url: str | None, cache: Path | None, retrain: bool, as_json: bool) -> None:
    """Train text classifiers on real word vectors and texts, store them, check and serve them.

    Needs the network once, a few minutes and `pip install 'pydedup[demo]'`. STORE is by default
    sqlite:///pydedup-demo.db in the current folder, and stays there for you to look at.
    """
    # Imported now: its tables and bars take longer to import than most commands to run.
    from pydedup.demo.run import run_demo

    screen = output.console(stderr=as_json, width=None if output.width() else _PIPE_WIDTH)
    screen.soft_wrap = not screen.is_terminal  # what has to be folded there is, between words
    result = run_demo(url, cache, screen, retrain=retrain)
    if as_json:
        output.emit_json(dataclasses.asdict(result))
