# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: going on, aliases, and others who do the same."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup import registry
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotFoundError,
    UnavailableError,
)
from pydedup.jobs import SCORING
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject
from pydedup.testing.servers import mysql_connection

from .conftest import Tables, add, assert_right, features, predictions, query_of

Make = Callable[..., str]


def test_new_rows_alone_are_written_the_next_time(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w, x, into = add(tables.url, "m@1"), features(300), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table, "WHERE id <= 200"), "m@1", into=into, batch=64)
        tables.run(f"UPDATE {into} SET prediction = 7 WHERE id = 3")
        report = store.score(query_of(table, "ORDER BY id DESC"), "m@1", into=into, batch=64)
    assert (report.rows, report.skipped) == (100, 200)
    found = predictions(tables, into)
    assert found.pop(3) == 7  # what is there is left alone
    assert_right({**found, 3: float((x @ w.T)[2, 0])}, x, w)


@pytest.mark.parametrize("kind", ["BIGINT", "VARCHAR(20)"])
def test_keys_of_another_type_than_the_tables(
    kind: str, tables: Tables, source: Make, new_name: Make
) -> None:
    """A table of the user's own writes a key in its own way; the next run knows it again."""
    w, x, into = add(tables.url, "m@1"), features(600), new_name()
    table = source(x)
    tables.run(f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction DOUBLE PRECISION)")
    text = "CHAR(20)" if tables.kind == "mysql" else "VARCHAR(20)"
    key = f"CAST(id AS {text})" if kind == "BIGINT" else "id"
    if kind != "BIGINT" and tables.kind.startswith("postgres"):
        pytest.skip("PostgreSQL compares no text with a number")
    query = f"SELECT {key} AS id, f0, f1, f2 FROM {table}"
    with pydedup.open(tables.url) as store:
        first = store.score(f"{query} WHERE id <= 400", "m@1", into=into)
        assert (first.rows, first.skipped) == (400, 0)
        for rows in (200, 0):
            report = store.score(query, "m@1", into=into)
            assert (report.rows, report.skipped) == (rows, 600 - rows)
    assert_right({int(k): v for k, v in predictions(tables, into).items()}, x, w)


def test_an_alias_is_what_it_was_until_the_work_is_done(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w1, w2 = add(tables.url, "m@1", seed=1), add(tables.url, "m@2", seed=2)
    x = features(30)
    table, into = source(x), new_name()
    ordered = query_of(table, "ORDER BY id")
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 25")
        with pytest.raises(ArgumentError, match="row with id 25"):
            store.score(ordered, "m@prod", into=into, batch=10)
        store.alias("m", "prod", "2")
        store.vacuum(lease_seconds=0.0)  # which leaves work that is to go on alone
        assert [job[3] for job in store._adapter.jobs()] == [SCORING]
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 25")
        report = store.score(ordered, "m@prod", into=into, batch=10)
        assert (report.model, report.rows, report.skipped, report.resumed) == ("m@1", 10, 20, True)
        assert store._adapter.jobs() == []
        x[24, 0] = 0
        assert_right(predictions(tables, into), x, w1)
        # Work that begins after that takes the alias as it is now.
        tables.run(f"DELETE FROM {into} WHERE id <= 15")
        report = store.score(ordered, "m@prod", into=into, batch=10)
        assert (report.model, report.rows, report.resumed) == ("m@2", 15, False)
    found = predictions(tables, into)
    assert_right({k: v for k, v in found.items() if k <= 15}, x[:15], w2)
    by_model = dict(tables.run(f"SELECT model, COUNT(*) FROM {into} GROUP BY model"))
    assert by_model == {"m@1": 15, "m@2": 15}


@pytest.mark.parametrize(
    "note", ["{}", '{"model": "1", "address": "m@1"}', '{"model": 1, "address": "m@1", "runs": 1}']
)
def test_a_damaged_note_of_the_version_is_told(
    tables: Tables, source: Make, new_name: Make, note: str
) -> None:
    """It was a KeyError, or a TypeError."""
    add(tables.url, "m@1")
    table, into = source(features(20)), new_name()
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 15")
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        with pytest.raises(ArgumentError, match="row with id 15"):
            store.score(query_of(table, "ORDER BY id"), "m@prod", into=into, batch=10)
        ((job, _, cursor, state),) = store._adapter.jobs()
        with store._adapter.transaction():
            store._adapter.put_job(job, note, cursor, state)
        with pytest.raises(CorruptStoreError, match=f"the note '{job}' of a scoring cannot be"):
            store.score(query_of(table, "ORDER BY id"), "m@prod", into=into, batch=10)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_file_is_the_same_however_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Or predictions of two versions would be in one table."""
    monkeypatch.chdir(tmp_path)
    for version in (1, 2):
        add("sqlite:///s.db", f"m@{version}", seed=version)
    source = "rows.db" if elsewhere else "s.db"
    with contextlib.closing(sqlite3.connect(source)) as rows:
        rows.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, f0, f1, f2)")
        rows.executemany("INSERT INTO t VALUES (?, 1, 2, 3)", [[n] for n in range(20)])
        rows.commit()
    query, options = "SELECT * FROM t ORDER BY id", {"into": "p", "batch": 10}

    def cut_off(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pydedup.open("s.db") as store:
        store.alias("m", "prod", "1")
        named = {"source": source} if elsewhere else {}
        with pytest.raises(KeyboardInterrupt):
            store.score(query, "m@prod", progress=cut_off, **options, **named)
        store.alias("m", "prod", "2")
    with pydedup.open(tmp_path / "s.db") as store:
        named = {"source": f"sqlite:///{tmp_path}/{source}"} if elsewhere else {}
        report = store.score(query, "m@prod", **options, **named)
        assert (report.model, report.rows, report.resumed) == ("m@1", 10, True)
        assert [row for row in store._adapter.jobs() if row[3] == SCORING] == []


def test_an_alias_moved_in_the_middle_changes_nothing(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w1 = add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    x, into = features(30), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")

        def move(stage: str, done: int, total: int) -> None:
            store.alias("m", "prod", "2")

        store.score(query_of(table), "m@prod", into=into, batch=10, progress=move)
    assert_right(predictions(tables, into), x, w1)


def test_the_version_of_work_that_was_removed_is_told(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", seed=1)
    table, into = source(features(3)), new_name()
    ordered = query_of(table, "ORDER BY id")
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 2")
    with pydedup.open(tables.url) as store, pytest.raises(ArgumentError):
        store.score(ordered, "m", into=into, batch=1)
    add(tables.url, "m@2", seed=2)
    with pydedup.open(tables.url) as store:
        store.remove("m@1")
        for _ in range(2):
            with pytest.raises(NotFoundError, match=r"began with m@1, which was removed.*: m@2"):
                store.score(ordered, "m", into=into)
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 2")
        assert store.score(ordered, "m@2", into=into).rows == 2
        # It was refused for good, also when the rest was done.
        assert store.score(ordered, "m", into=into).skipped == 3
        assert store._adapter.jobs() == []


def test_a_run_that_wrote_nothing_holds_no_version(
    tables: Tables, source: Make, new_name: Make
) -> None:
    """Whatever it was refused for, the next run takes the alias as it is by then."""
    add(tables.url, "m@1", seed=1)
    w2, x = add(tables.url, "m@2", seed=2), features(3)
    table, into = source(x), new_name()
    tables.run(f"CREATE TABLE {into} (id BIGINT, prediction DOUBLE PRECISION)")
    query = query_of(table)
    with pydedup.open(tables.url) as store:
        store.add("plain@1", {"w": w2})
        store.alias("m", "prod", "1")
        with pytest.raises(ArgumentError, match="not unique by itself"):
            store.score(query, "m@prod", into=into)
        with pytest.raises(ArgumentError, match="no column 'nope'"):
            store.score(query, "m@prod", into=into, key="nope")
        for wrong in (f"SELECT id, f0, f9 FROM {table}", f"SELECT * FROM {table}_not"):
            with pytest.raises(ArgumentError, match="query failed"):
                store.score(wrong, "m@prod", into=into)
        with pytest.raises(NotFoundError, match="no graph"):
            store.score(query, "plain", into=into)
        tables.run(f"DROP TABLE {into}")
        limit = "prediction DOUBLE PRECISION CHECK (prediction > 1e9)"
        tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, {limit})")
        with pytest.raises(ArgumentError, match=f"writing to table .*{into}"):
            store.score(query, "m@prod", into=into)
        tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 2")
        with pytest.raises(ArgumentError, match="row with id 2"):
            store.score(query, "m@prod", into=into)
        assert store._adapter.jobs() == []
        tables.run(f"UPDATE {table} SET f0 = {float(x[1, 0])!r} WHERE id = 2")
        tables.run(f"DROP TABLE {into}")
        store.alias("m", "prod", "2")
        report = store.score(query, "m@prod", into=into)
        assert (report.model, report.rows, report.resumed) == ("m@2", 3, False)
    assert_right(predictions(tables, into), x, w2)


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


def test_a_run_that_may_have_written_holds_its_version(
    tables: Tables, source: Make, new_name: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection, or an interrupt, may hide a commit."""
    add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    table, into = source(features(3)), new_name()
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        real = type(store._adapter).insert_predictions
        for error in (UnavailableError, KeyboardInterrupt):
            tables.run(f"DROP TABLE IF EXISTS {into}")

            def lost(self: Any, *given: Any, error: type[BaseException] = error) -> bool:
                assert real(self, *given)
                raise error

            with monkeypatch.context() as patched:
                patched.setattr(type(store._adapter), "insert_predictions", lost)
                with pytest.raises(error):
                    store.score(query_of(table), "m@prod", into=into)
            store.alias("m", "prod", "2")
            report = store.score(query_of(table), "m@prod", into=into)
            assert (report.model, report.skipped, report.resumed) == ("m@1", 3, True)
            store.alias("m", "prod", "1")


@pytest.mark.parametrize("again", [False, True])
def test_a_version_that_is_removed_under_the_work_is_told(
    again: bool, tables: Tables, source: Make, new_name: Make
) -> None:
    """Also where another took its name and version meanwhile."""
    add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    table, into = source(features(30)), new_name()

    def remove(stage: str, done: int, total: int) -> None:
        if done == 10:
            with pydedup.open(tables.url) as other:
                other.remove("m@1")
            if again:
                add(tables.url, "m@1", seed=3)

    said = rf"m@1 was removed while rows were scored with it; what was scored stays in \S*{into}\. "
    with pydedup.open(tables.url) as store:
        with pytest.raises(NotFoundError, match=said + "Name another version to score the rest"):
            store.score(query_of(table), "m@1", into=into, batch=10, progress=remove)
        assert len(predictions(tables, into)) == 10
        report = store.score(query_of(table), "m@2", into=into)
        assert (report.rows, report.skipped) == (20, 10)


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
