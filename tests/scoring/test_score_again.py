# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: going on with what was begun, and aliases meanwhile."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError, UnavailableError
from pydedup.jobs import SCORING
from pydedup.serving.pin import Pin

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
    "note",
    [
        "{}",
        '{"model": 1, "runs": []}',
        '{"model": "1", "address": "m@1"}',
        '{"model": 1, "address": "m@1", "runs": 1}',
    ],
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


def test_the_same_query_of_another_database_is_other_work(tmp_path: Path) -> None:
    """Of which the version is what the alias means when it begins."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    for version in (1, 2):
        add(url, f"m@{version}", seed=version)
    for name, first in (("cut-off.db", "NULL"), ("other.db", "1")):
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as rows:
            rows.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, f0, f1, f2)")
            rows.execute(f"INSERT INTO t VALUES (1, 1, 2, 3), (2, {first}, 2, 3)")
            rows.commit()
    query, options = "SELECT * FROM t ORDER BY id", {"into": "p", "batch": 1}
    with pydedup.open(url) as store:
        store.alias("m", "prod", "1")
        with pytest.raises(ArgumentError, match="row with id 2"):
            store.score(query, "m@prod", source=tmp_path / "cut-off.db", **options)
        store.alias("m", "prod", "2")
        report = store.score(query, "m@prod", source=tmp_path / "other.db", **options)
        assert (report.model, report.rows, report.resumed) == ("m@2", 2, False)
        # So is another query, or another table.
        for changed, into in ((f"{query} LIMIT 1", "p"), (query, "q")):
            options = {"source": tmp_path / "cut-off.db", "into": into, "on_error": "skip"}
            report = store.score(changed, "m@prod", batch=1, **options)
            assert (report.model, report.resumed) == ("m@2", False)


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


@pytest.mark.parametrize("address", ["m", "m@prod"])
def test_the_version_of_work_that_was_removed_is_told(
    address: str, tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", seed=1)
    table, into = source(features(3)), new_name()
    ordered = query_of(table, "ORDER BY id")
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 2")
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        with pytest.raises(ArgumentError):
            store.score(ordered, address, into=into, batch=1)
    add(tables.url, "m@2", seed=2)
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "2")
        store.remove("m@1")
        for _ in range(2):
            with pytest.raises(NotFoundError, match=r"began with m@1, which was removed.*: m@2"):
                store.score(ordered, address, into=into)
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 2")
        assert store.score(ordered, "m@2", into=into).rows == 2
        # It was refused for good, also when the rest was done.
        assert store.score(ordered, address, into=into).skipped == 3
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


def test_what_is_noted_of_a_named_version_is_not_of_one_that_was_added_anew(tmp_path: Path) -> None:
    """As a scoring on Ray notes how far it is: the table may have rows of the version before."""
    with pydedup.open(tmp_path / "store.db") as store:

        def begin() -> tuple[int, Pin]:
            pin = Pin(store._adapter, store._catalog, store._adapter, "t", "SELECT 1", "m@1")
            return pin.take(always=True).row.id, pin

        store.add("m@1", {"w": np.ones((4, 4))})
        first, pin = begin()
        pin.noted(lambda spec: spec.update(done=7))
        again, pin = begin()
        assert (again, pin.resumed, pin.noted(dict)["done"]) == (first, True, 7)
        store.remove("m@1")
        store.add("m@1", {"w": np.zeros((4, 4))})
        other, pin = begin()
        assert (other != first, pin.resumed) == (True, False)
        assert "done" not in pin.noted(dict)
