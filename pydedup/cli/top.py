# SPDX-License-Identifier: Apache-2.0
"""``pydedup top``: a server of `pydedup serve`, watched while it works."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pydedup import text
from pydedup.cli import options, output
from pydedup.cli.serving import TOKEN_VARIABLE
from pydedup.cli.tables import Column, print_table, shorten, table_lines
from pydedup.errors import UnavailableError, UnsupportedFormatError, not_installed

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from pydedup.http.scrape import Rates, Scrape, Source

__all__ = ["top"]

_COLUMNS = (
    Column("Model", number=False, name=True, style="cyan"),
    Column("Requests/s"),
    Column("Failed/s", rank=1),
    Column("Requests", rank=2),
    Column("Failed", rank=3),
)


@click.command(short_help="Watch a server: requests, latencies, batches, its buffer pool.")
@click.argument("url", metavar="URL")
@options.number_option(
    "--interval",
    "SECONDS",
    click.FloatRange(0.1, 3600),
    1.0,
    "Time between looks, over which rates are taken.",
)
@click.option("--once", is_flag=True, help="Look twice, print one table, and end.")
@options.file_option(
    "--token-file", f"File with the token of the server; else {TOKEN_VARIABLE}, if set."
)
@options.file_option("--tls-ca", "Certificate to trust, PEM.")
@options.json_option
def top(
    url: str,
    interval: float,
    once: bool,
    token_file: Path | None,
    tls_ca: Path | None,
    as_json: bool,
) -> None:
    """Watch a server of `pydedup serve`: URL is its address, such as http://127.0.0.1:8000.

    Shows requests per second, latencies, models, batches and the buffer pool, from /metrics. q or
    Ctrl-C ends it. Into a pipe or a file, on a terminal with TERM=dumb, and with --json, it runs as
    with --once.
    """
    if math.isnan(interval):  # which is in any range
        raise click.UsageError("--interval must be a number of seconds")
    try:
        from pydedup.http.access import read_token
        from pydedup.http.scrape import Source
    except ModuleNotFoundError as error:
        raise UnsupportedFormatError(not_installed("top", error, "serve")) from None
    source = Source(url, read_token(token_file, os.environ, TOKEN_VARIABLE), tls_ca)
    with contextlib.closing(source):
        # On a dumb terminal rich's Live would show nothing at all.
        live = sys.stdout.isatty() and not output.console().is_dumb_terminal
        if once or as_json or not live:
            _look_once(source, interval, as_json)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(source, interval)


def _look_once(source: Source, interval: float, as_json: bool) -> None:
    from pydedup.http.scrape import Rates

    before = source.scrape()
    time.sleep(interval)
    rates = Rates(before, source.scrape())
    if as_json:
        output.emit_json(_document(source.url, rates))
        return
    output.print_heading(source.url)
    output.print_fields(_fields(rates))
    rows = _model_rows(rates)
    if rows:
        output.print_line()
        print_table(_COLUMNS, rows)


# ---- live ---------------------------------------------------------------------------------------


def _watch(source: Source, interval: float) -> None:
    """Show the server until somebody has seen enough; one that is away is asked again."""
    from rich.live import Live

    from pydedup.http.scrape import Rates

    before: Scrape | None = None
    rates: Rates | None = None
    with (
        _keys() as pressed,
        # Nothing else prints, and what would take the place of sys.stdout knows no encoding.
        Live(
            console=output.console(), screen=True, auto_refresh=False, redirect_stdout=False
        ) as live,
    ):
        while True:
            trouble = ""
            try:
                now = source.scrape()
                rates, before = Rates(before, now), now
            except UnavailableError as error:
                trouble = str(error)
            live.update(_screen(source.url, rates, trouble, live.console.size), refresh=True)
            # The first look has nothing to compare with: the second one comes soon.
            if pressed(interval if rates is None or rates.span is not None else min(interval, 0.5)):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Yield what waits for some seconds and says whether q was pressed meanwhile."""
    if sys.stdin is None or not sys.stdin.isatty():

        def slept(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield slept
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0]:
                keys = os.read(keyboard, 64)
                if not keys or b"q" in keys.lower():  # nothing: the terminal is gone
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _screen(url: str, rates: Rates | None, trouble: str, size: tuple[int, int]) -> Group:
    """Return what fills the terminal; nothing of it is wrapped."""
    from rich.console import Group
    from rich.text import Text

    width, height = size
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append("pydedup top  ", "bold")
    head.append(text.clean(url), "cyan")
    head.append(f"  {time.strftime('%H:%M:%S')}  q quits", "dim")
    parts: list[Any] = [head]
    if trouble:
        again = "; what follows is the last that was seen" if rates is not None else ""
        said = f"{text.clean(trouble)}; asking again{again}"
        parts.append(Text(said, "bold red", no_wrap=True, overflow="ellipsis"))
    if rates is not None:
        # No grid: that of Rich 13.7 is wider than the terminal, which then cuts off the dots.
        fields = [
            Text(no_wrap=True, overflow="ellipsis").append(f"{label:10}", "dim").append(value)
            for label, value in _fields(rates)
        ]
        parts += ["", *fields, "", *_table_of(rates, width, height - 14)]
    return Group(*parts)


def _table_of(rates: Rates, width: int, room: int) -> list[Text]:
    """Return the models as lines of a table, or their names where no more fits."""
    from rich.text import Text

    rows = _model_rows(rates)
    shown = rows[: max(room, 1)]
    lines = table_lines(_COLUMNS, shown, width)
    if lines is None:
        lines = [Text("Model", "bold")]
        lines += [Text(shorten(output.printable(row[0]), width), "cyan") for row in shown]
    for line, row in zip(lines[1:], shown, strict=True):
        if row[2].strip("0.,"):  # failures
            line.stylize("red")
    if len(rows) > len(shown):
        lines.append(Text(f"and {len(rows) - len(shown):,} more", "dim"))
    return lines


# ---- numbers ------------------------------------------------------------------------------------


def _fields(rates: Rates) -> list[tuple[str, str]]:
    now, before = rates.now, rates.pool
    latency, since = _latency(rates)
    up = "" if now.started is None else f"up {text.duration(_up_seconds(now.started))}"
    hits = "-" if rates.hit_ratio is None else text.percent(rates.hit_ratio)
    failed = _rate(rates, sum(rates.failed.values()))
    batches = rates.batch_requests, rates.batch_rows

    def gauge(name: str) -> str:
        return text.count(int(now.gauges.get(f"pydedup_{name}", 0)))

    def held(name: str) -> str:
        return text.size(int(now.pool.get(name, 0)))

    return [
        (
            "requests",
            f"{_rate(rates, rates.seconds.count)}, failed {failed}; "
            f"{text.count(now.under_way)} under way, {gauge('queue_requests')} waiting; "
            f"{text.count(int(now.seconds.count))} in all",
        ),
        (
            "latency",
            f"p50 {_seconds(latency.quantile(0.5))}, p99 {_seconds(latency.quantile(0.99))}, "
            f"mean {_seconds(latency.mean)}{since}",
        ),
        (
            "batches",
            f"{_rate(rates, batches[0].count)}, of {_mean(batches[0].mean)} requests and "
            f"{_mean(batches[1].mean)} rows; {gauge('running_batches')} running",
        ),
        (
            "pool",
            f"{held('bytes')} of {held('budget_bytes')} in "
            f"{text.plural(int(now.pool.get('pages', 0)), 'page')}, "
            f"{held('decoded_bytes')} decoded, {held('pinned_bytes')} pinned",
        ),
        (
            "pages",
            f"hits {hits}; misses {_rate(rates, before.get('misses', 0))}, "
            f"evictions {_rate(rates, before.get('evictions', 0))}",
        ),
        (
            "waits",
            f"{_rate(rates, before.get('waits', 0))}, "
            f"{before.get('wait_us', 0) / 1e3:,.1f} ms together",
        ),
        (
            "process",
            ", ".join(filter(None, [up, _resident(now.gauges)])) or "-",
        ),
    ]


def _up_seconds(started: float) -> float:
    # By its clock it may begin later than it is by ours.
    return max(time.time() - started, 0.0)


def _resident(gauges: Mapping[str, float]) -> str:
    resident = gauges.get("process_resident_memory_bytes")
    return "" if resident is None else f"{text.size(int(resident))} resident"


def _latency(rates: Rates) -> tuple[Any, str]:
    """Return the histogram to look at: of the interval, or of all time when it has nothing."""
    if rates.seconds.count > 0 and rates.span is not None:
        return rates.seconds, ""
    return rates.now.seconds, " (since the start)" if rates.now.seconds.count else ""


def _model_rows(rates: Rates) -> list[list[str]]:
    return [
        [
            line["model"] or "(no model)",
            _number(line["requests_per_second"]),
            _number(line["failed_per_second"]),
            text.count(line["requests"]),
            text.count(line["failed"]),
        ]
        for line in _model_lines(rates)
    ]


def _model_lines(rates: Rates) -> list[dict[str, Any]]:
    """Return the models, those with most requests now first."""
    totals: dict[str, int] = {}
    failed: dict[str, int] = {}
    for (model, outcome), value in rates.now.models.items():
        totals[model] = totals.get(model, 0) + int(value)
        failed[model] = failed.get(model, 0) + (0 if outcome == "ok" else int(value))
    lines = [
        {
            "model": model,
            "requests_per_second": rates.per_second(rates.models.get(model, 0)),
            "failed_per_second": rates.per_second(rates.failed.get(model, 0)),
            "requests": totals[model],
            "failed": failed[model],
        }
        for model in totals
    ]
    return sorted(
        lines,
        key=lambda line: (-(line["requests_per_second"] or 0), -line["requests"], line["model"]),
    )


def _document(url: str, rates: Rates) -> dict[str, Any]:
    now = rates.now
    latency, since = _latency(rates)
    return {
        "url": url,
        "interval_seconds": rates.span,
        "up_seconds": None if now.started is None else _up_seconds(now.started),
        "requests": {
            "total": int(now.seconds.count),
            "per_second": rates.per_second(rates.seconds.count),
            "failed_per_second": rates.per_second(sum(rates.failed.values())),
            "under_way": now.under_way,
            "waiting": int(now.gauges.get("pydedup_queue_requests", 0)),
        },
        "latency_seconds": {
            "p50": latency.quantile(0.5),
            "p99": latency.quantile(0.99),
            "mean": latency.mean,
            "since_start": bool(since),
        },
        "batches": {
            "per_second": rates.per_second(rates.batch_requests.count),
            "mean_requests": rates.batch_requests.mean,
            "mean_rows": rates.batch_rows.mean,
            "running": int(now.gauges.get("pydedup_running_batches", 0)),
        },
        "pool": {
            **{name: int(value) for name, value in now.pool.items()},
            "hit_ratio": rates.hit_ratio,
            "misses_per_second": rates.per_second(rates.pool.get("misses", 0)),
            "evictions_per_second": rates.per_second(rates.pool.get("evictions", 0)),
            "waits_per_second": rates.per_second(rates.pool.get("waits", 0)),
        },
        "models": _model_lines(rates),
    }


def _rate(rates: Rates, amount: float) -> str:
    return f"{_number(rates.per_second(amount))}/s"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
