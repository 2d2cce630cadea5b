# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end beside others who do the same, or lock or take what it writes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import pydedup
from pydedup import registry
from pydedup.errors import ArgumentError, ConflictError
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject
from pydedup.testing.mysql_servers import mysql_connection

from .conftest import Tables, add, assert_right, features, predictions, query_of

Make = Callable[..., str]


class _CutOffError(Exception):
    """What ends a run in these tests."""


@pytest.mark.parametrize("other_writes", [False, True])
def test_of_two_at_once_that_fail_the_version_stays_if_one_wrote(
    other_writes: bool,
    tables: Tables,
    source: Make,
    new_name: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first wrote nothing; the second goes by the version of the first, and may have."""
    w1 = add(tables.url, "m@1", seed=1)
    w2, x = add(tables.url, "m@2", seed=2), features(30)
    table, into = source(x), new_name()
    ordered = query_of(table, "ORDER BY id")
    bad = 15 if other_writes else 5
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = {bad}")

    def cut_off(stage: str, done: int, total: int) -> None:
        raise _CutOffError

    with pydedup.open(tables.url) as first, pydedup.open(tables.url) as second:
        first.alias("m", "prod", "1")
        real = type(first._adapter).table_columns
        begun: list[Any] = []

        def meanwhile(self: Any, *given: Any) -> Any:
            if self is first._adapter and not begun:
                begun.append(first._adapter.jobs())
                first.alias("m", "prod", "2")
                with pytest.raises(_CutOffError if other_writes else ArgumentError):
                    second.score(ordered, "m@prod", into=into, batch=10, progress=cut_off)
                begun.append(first._adapter.jobs())
            return real(self, *given)

        monkeypatch.setattr(type(first._adapter), "table_columns", meanwhile)
        with pytest.raises(ArgumentError, match=f"row with id {bad}"):
            first.score(ordered + " ", "m@prod", into=into, batch=20)
        assert [len(jobs) for jobs in begun] == [1, 1]  # it stays as long as the first may go on
        assert len(first._adapter.jobs()) == other_writes
        tables.run(f"UPDATE {table} SET f0 = {float(x[bad - 1, 0])!r} WHERE id = {bad}")
        report = first.score(ordered, "m@prod", into=into)
        assert (report.model, report.resumed) == (("m@1", True) if other_writes else ("m@2", False))
        assert report.skipped == (10 if other_writes else 0)
        assert first._adapter.jobs() == []
    assert_right(predictions(tables, into), x, w1 if other_writes else w2)


def test_a_run_whose_work_others_ended_and_began_again_leaves_theirs_alone(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    query, into = query_of(source(features(30)), "ORDER BY id"), new_name()
    begun: list[str] = []

    def cut_off(stage: str, done: int, total: int) -> None:
        raise _CutOffError

    with pydedup.open(tables.url) as store, pydedup.open(tables.url) as other:
        store.alias("m", "prod", "1")

        def meanwhile(stage: str, done: int, total: int) -> None:
            if not begun:
                begun.append(stage)
                assert other.score(query, "m@prod", into=into).resumed
                assert other._adapter.jobs() == []
                tables.run(f"DELETE FROM {into}")
                other.alias("m", "prod", "2")
                with pytest.raises(_CutOffError):
                    other.score(query, "m@prod", into=into, batch=10, progress=cut_off)

        store.score(query, "m@prod", into=into, batch=10, progress=meanwhile)
        store.alias("m", "prod", "1")
        report = store.score(query, "m@prod", into=into)
        assert (report.model, report.resumed) == ("m@2", True)
        assert store._adapter.jobs() == []


def test_two_at_once_write_each_row_once(tables: Tables, source: Make, new_name: Make) -> None:
    w, x, into = add(tables.url, "m@1"), features(200), new_name()
    table = source(x)
    with pydedup.open(tables.url) as first, pydedup.open(tables.url) as second:
        inner: list[Any] = []

        def interrupt(stage: str, done: int, total: int) -> None:
            if not inner:
                inner.append(None)
                inner[0] = second.score(query_of(table), "m@1", into=into, batch=50)

        report = first.score(query_of(table), "m@1", into=into, batch=50, progress=interrupt)
    assert report.rows + inner[0].rows == 200
    assert inner[0].skipped == report.rows == 50
    assert_right(predictions(tables, into), x, w)


def test_who_is_forestalled_again_and_again_writes_what_is_left(
    tables: Tables, source: Make, new_name: Make
) -> None:
    """After five times that was an error, of a unique index of another column."""
    w, x, into = add(tables.url, "m@1"), features(50), new_name()
    table = source(x)
    ids = iter(range(1, 9))
    with pydedup.open(tables.url) as other:

        def forestall() -> None:
            for number in itertools.islice(ids, 1):
                other.score(query_of(table, f"WHERE id = {number}"), "m@1", into=into)

        adapter = registry.connect(tables.url, mode="a")
        faulty, _ = inject(adapter, Fault("insert_predictions", forestall, call=0))
        with Store(faulty, 8 << 20) as store:
            report = store.score(query_of(table), "m@1", into=into)
    assert (report.rows, report.skipped) == (42, 8)
    assert_right(predictions(tables, into), x, w)


def test_who_loses_a_deadlock_tries_again(
    tables: Tables, source: Make, new_name: Make, mysql_run: Callable[..., Any]
) -> None:
    """As of two that score the same rows in opposite orders."""
    if tables.kind != "mysql":
        pytest.skip("SQLite knows no deadlock, and PostgreSQL's victim is a matter of time")
    w, x, into = add(tables.url, "m@1"), features(20), new_name()
    table = source(x)
    waiting = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    insert = f"INSERT INTO {into} (id, prediction, model) VALUES "
    with pydedup.open(tables.url) as store, ThreadPoolExecutor() as threads:
        store.score(query_of(table, "WHERE id < 0"), "m@1", into=into)
        with mysql_connection(tables.url) as other, other.cursor() as cursor:
            cursor.execute("START TRANSACTION")
            # Who wrote more is let through.
            cursor.execute(insert + ", ".join(f"({n}, 1, '')" for n in range(20, 2000)))
            scoring = threads.submit(store.score, query_of(table, "ORDER BY id"), "m@1", into=into)
            # MariaDB looks anew only where nobody asked for a tenth of a second.
            while not mysql_run(tables.url, waiting):
                assert not scoring.done()
                time.sleep(0.3)
            cursor.execute(f"{insert} (1, 1, '')")
            cursor.execute("ROLLBACK")
        assert scoring.result().rows == 20
    assert_right(predictions(tables, into), x, w)


def test_a_key_that_others_take_between_look_and_write(
    tables: Tables, source: Make, new_name: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x, into = add(tables.url, "m@1"), features(20), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table, "WHERE id < 0"), "m@1", into=into)
        real = type(store._adapter).insert_predictions
        taken: list[int] = []

        def late(self: Any, name: str, columns: Any, rows: Any) -> bool:
            if not taken:
                taken.append(7)
                tables.run(f"INSERT INTO {into} (id, prediction, model) VALUES (7, 1, 'other')")
            return bool(real(self, name, columns, rows))

        monkeypatch.setattr(type(store._adapter), "insert_predictions", late)
        report = store.score(query_of(table), "m@1", into=into)
    assert (report.rows, report.skipped) == (19, 1)
    found = predictions(tables, into)
    assert found.pop(7) == 1
    assert_right({**found, 7: float((x @ w.T)[6, 0])}, x, w)


def test_a_deadlock_of_postgresql(tables: Tables, new_name: Make) -> None:
    """The same there, where the one that is given up is ours when it looks first."""
    if tables.kind != "postgresql":
        pytest.skip("of MariaDB see above")
    add(tables.url, "m@1")
    into = new_name()
    tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction DOUBLE PRECISION)")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 2, 1, 2, 3"
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query"
    with pydedup.open(tables.url) as store, ThreadPoolExecutor() as threads:
        with tables._cursor() as other:
            other.execute("SET deadlock_timeout = '60s'")
            other.execute("BEGIN")
            other.execute(f"INSERT INTO {into} VALUES (2, 5)")
            scoring = threads.submit(store.score, query, "m@1", into=into)
            while not tables.run(f"{waits} LIKE 'INSERT INTO%{into}%'"):
                assert not scoring.done()
                time.sleep(0.01)
            other.execute(f"INSERT INTO {into} VALUES (1, 5)")
            other.execute("COMMIT")
        assert (scoring.result().rows, scoring.result().skipped) == (0, 2)


def test_a_lock_that_is_waited_for_in_vain_is_told_at_once(
    tables: Tables, source: Make, new_name: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no deadlock, and waiting anew would take several times what ?timeout= says."""
    add(tables.url, "m@1")
    table, tries = source(features(3)), []
    with pydedup.open(tables.url) as store:

        def locked(*arguments: object) -> bool:
            tries.append(arguments)
            raise ConflictError("another one is writing")

        monkeypatch.setattr(type(store._adapter), "insert_predictions", locked)
        with pytest.raises(ConflictError, match="another one is writing"):
            store.score(query_of(table), "m@1", into=new_name())
    assert len(tries) == 1
