# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (numbers that are made here)
"""MySQL/MariaDB: how streams of users' rows end, as the server sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from pydedup.adapter import Adapter
from pydedup.adapter_options import KeyRange, RangeAdapter, RowColumn

MIB = 1 << 20
#: The rows of this many bytes are more than all buffers on the way hold.
MANY = 100 * MIB
Run = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def rows(adapter: Adapter) -> RangeAdapter:
    assert isinstance(adapter, RangeAdapter)
    return adapter


def numbers(count: int, width: int = 1) -> str:
    """Return a query whose rows are the number of its connection, their own, and a text."""
    return (
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 1000) "
        f"SELECT CONNECTION_ID() AS c, n AS k, REPEAT('x', {width}) AS x FROM t LIMIT {count}"
    )


def wait_until_gone(run: Run, url: str, connection: int) -> None:
    """Wait until the server has nothing to do with a connection any more."""
    deadline = time.monotonic() + 60
    while run(url, f"SELECT 1 FROM information_schema.processlist WHERE id = {connection}"):
        assert time.monotonic() < deadline, "the server still serves a connection that was closed"
        time.sleep(0.02)


def connections(run: Run, url: str) -> int:
    """Count those to the test's database."""
    where = "information_schema.processlist WHERE db = DATABASE()"
    ((count,),) = run(url, f"SELECT COUNT(*) FROM {where}")
    return int(count)


def counter(run: Run, url: str, name: str) -> int:
    ((_, value),) = run(url, f"SHOW GLOBAL STATUS LIKE '{name}'")
    return int(value)


@pytest.mark.parametrize("within", [None, KeyRange(RowColumn("k", "BIGINT"), 0, 500)])
@pytest.mark.parametrize("batch", [7, 100, 1000])
def test_a_stream_read_to_its_end_says_goodbye(
    rows: RangeAdapter, url: str, run: Run, within: KeyRange | None, batch: int
) -> None:
    aborted = counter(run, url, "Aborted_clients")
    query = numbers(500)
    opened = (
        rows.read_rows(query, batch) if within is None else rows.read_range(query, batch, within)
    )
    with opened as stream:
        found: list[Any] = [row for some in stream for row in some]
    assert sorted(row[1] for row in found) == list(range(1, 501))
    wait_until_gone(run, url, found[0][0])
    assert counter(run, url, "Aborted_clients") == aborted


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_left_of_a_stream_is_not_read(
    rows: RangeAdapter, url: str, run: Run, ranged: bool, fails: bool
) -> None:
    sent = counter(run, url, "Bytes_sent")
    query, within = numbers(1000, MANY // 1000), KeyRange(RowColumn("k", "BIGINT"), 0, 1000)
    opened = rows.read_range(query, 4, within) if ranged else rows.read_rows(query, 4)
    with contextlib.suppress(ZeroDivisionError), opened as stream:
        some: list[Any] = list(next(iter(stream)))
        assert len(some) == 4
        if fails:
            raise ZeroDivisionError
    wait_until_gone(run, url, some[0][0])
    assert counter(run, url, "Bytes_sent") - sent < MANY // 2
    with rows.read_rows("SELECT 1 AS k", 1) as stream:  # the adapter goes on
        assert [list(batch) for batch in stream] == [[(1,)]]


def test_columns_are_told_without_rows(rows: RangeAdapter, url: str, run: Run) -> None:
    before = connections(run, url)
    aborted, sent = (counter(run, url, name) for name in ("Aborted_clients", "Bytes_sent"))
    columns = rows.query_columns(numbers(1000, MANY // 1000))
    assert [column.name for column in columns] == ["c", "k", "x"]
    deadline = time.monotonic() + 60
    while connections(run, url) > before:
        assert time.monotonic() < deadline, "the server still serves a connection that was closed"
        time.sleep(0.02)
    assert counter(run, url, "Aborted_clients") == aborted
    assert counter(run, url, "Bytes_sent") - sent < MIB
