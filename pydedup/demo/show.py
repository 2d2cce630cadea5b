# SPDX-License-Identifier: Apache-2.0
"""How the demo looks: headings, progress, tables. Nothing is decided here."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pydedup.types import AddReport

if TYPE_CHECKING:
    from pydedup.demo.run import Prediction
    from pydedup.report.figures import StoreStats

__all__ = [
    "counter",
    "facts",
    "heading",
    "next_commands",
    "pair",
    "predictions",
    "seconds",
    "size",
    "sizes",
    "spinner",
    "watch",
]


def size(n_bytes: int) -> str:
    """Return a number of bytes in MiB, e.g. ``1,234.5 MiB``."""
    return f"{n_bytes / 2**20:,.1f} MiB"


def heading(console: Console, text: str) -> None:
    """Begin a phase."""
    console.print()
    console.print(text, style="bold")


def facts(console: Console, values: Mapping[str, str]) -> None:
    """Print labelled facts, one a line."""
    width = max(map(len, values))
    for label, value in values.items():
        console.print(f"  {label:<{width}}  {value}")


def spinner(console: Console, text: str) -> AbstractContextManager[object]:
    """Show that something whose length is unknown is under way."""
    return console.status(text)


@contextmanager
def watch(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback for the API's ``progress``: one bar per stage."""
    stages: dict[str, TaskID] = {}
    with _bars(console) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage.capitalize(), total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield show


@contextmanager
def counter(console: Console, text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a callback that takes how many more are done."""
    with _bars(console) as bars:
        bar = bars.add_task(text, total=total)

        def step(count: int) -> None:
            bars.advance(bar, count)

        yield step


def sizes(console: Console, reports: Sequence[AddReport], stats: StoreStats) -> None:
    """Print what each model and all of them together took."""
    table = _table(
        "Model",
        "Weights",
        "New in\nstore",
        "Of its\nsize",
        "Shared\nblocks",
        "Delta\nblocks",
        "New\npages",
    )
    for report in reports:
        table.add_row(*_size_row(report.model, [report]))
    table.add_section()
    table.add_row(*_size_row("all of them", reports), style="bold")
    _print_table(console, table)
    console.print(
        f"  Before: {size(stats.logical_bytes)} of weights. After: {size(stats.stored_bytes)}, the "
        f"whole database. Saved: {100 * stats.saved_share:.1f} %, without loss.",
        style="bold green" if stats.saved_share > 0 else "bold red",
    )


def _size_row(title: str, reports: Sequence[AddReport]) -> list[str]:
    logical = sum(report.logical_bytes for report in reports)
    stored = sum(report.stored_bytes for report in reports)
    blocks = sum(report.blocks for report in reports)
    return [
        title,
        size(logical),
        size(stored),
        _percent(stored, logical),
        _percent(sum(report.shared_blocks for report in reports), blocks),
        _percent(sum(report.delta_blocks for report in reports), blocks),
        f"{sum(report.pages for report in reports):,}",
    ]


def pair(console: Console, base: str, tuned: str, reports: Sequence[AddReport]) -> None:
    """Say what a full fine-tune takes, and why."""
    by_model = {report.model: report for report in reports}
    report = by_model[tuned]
    console.print(
        f"  {tuned} is a full fine-tune of {base}: nearly every weight moved, so only "
        f"{_percent(report.shared_blocks, report.blocks)} of its blocks are shared. "
        f"{_percent(report.delta_blocks, report.blocks)} are kept as their difference to a similar "
        f"block, bit for bit: it takes {_percent(report.stored_bytes, report.logical_bytes)} of "
        "its size.",
        style="dim",
    )


def predictions(console: Console, outcomes: Sequence[Prediction]) -> None:
    """Print the store against torch in memory, per classifier."""
    table = _table(
        "Model",
        "Texts",
        "Accuracy\ntorch",
        "Accuracy\nstore",
        "Logits\noff by",
        "Same\nclass",
        "Seconds\ntorch",
        "Seconds\nstore",
    )
    for outcome in outcomes:
        outputs = outcome.outputs
        table.add_row(
            outcome.model,
            f"{outputs.texts:,}",
            f"{outcome.accuracy_in_memory:.4f}",
            f"{outcome.accuracy_from_store:.4f}",
            f"{outputs.max_difference:.1e}",
            f"{outputs.same_class:,}" if outputs.agrees else f"{outputs.same_class:,} FAILED",
            f"{outcome.seconds_in_memory:.2f}",
            f"{outcome.seconds_from_store:.2f}",
        )
    _print_table(console, table)
    console.print(
        "  Seconds are of this one run, the machine's other work included: no benchmark.",
        style="dim",
    )
    ties = sum(outcome.outputs.ties for outcome in outcomes)
    if ties:
        console.print(f"  {ties} texts have two classes that are equal but for rounding.")


def seconds(console: Console, phases: Mapping[str, float]) -> None:
    """Print where the time went."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    console.print()
    console.print(f"Done in {sum(phases.values()):.0f} s ({parts})")


def next_commands(console: Console, url: str) -> None:
    """Print what can be tried on the store that the demo left."""
    heading(console, "The store is yours to look at")
    program = _program()
    for command, why in (
        ("ls", "all models"),
        ("info {} imdb@2", "one model: sizes, pages read"),
        ("explain {} imdb@2", "whom it shares blocks with, and what removing it would free"),
        ("diff {} imdb@1 imdb@2", "what two more epochs changed"),
        ("export {} bbc@1 bbc.safetensors", "back to a file"),
        ("verify {}", "check every byte again"),
    ):
        line = command.format(url) if "{}" in command else f"{command} {url}"
        console.print(f"  {program} {line}", style="cyan", highlight=False, soft_wrap=True)
        console.print(f"      {why}", style="dim")


def _program() -> str:
    """Return what runs pydedup in the user's shell, who need not have activated its environment."""
    started = Path(sys.argv[0])
    found = shutil.which("pydedup")
    is_found = found is not None and started.exists() and started.samefile(found)
    return sys.argv[0] if started.name == "pydedup" and not is_found else "pydedup"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _print_table(console: Console, table: Table) -> None:
    """Print it, on a narrow terminal without its last columns: half of a number says nothing."""
    room = console.options.update(max_width=sys.maxsize)
    while len(table.columns) > 1 and console.measure(table, options=room).maximum > console.width:
        table.columns.pop()
    console.print(table)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<22}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )
