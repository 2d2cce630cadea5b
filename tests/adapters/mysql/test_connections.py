# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: connections that break, statements that are kept prepared."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import mysql.connector
import mysql.connector.errorcode
import pytest
from mysql.connector import HAVE_CEXT

from pydedup import registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.errors import ArgumentError, StoreError, UnavailableError
from pydedup.testing._contract_base import (
    add_pages,
    add_random_pages,
    in_thread,
    open_store,
    with_option,
)
from pydedup.testing.proxy import CuttingProxy

MIB = 1 << 20
Run = Callable[..., list[tuple[Any, ...]]]


def cut_all(run: Run, url: str) -> int:
    """Kill all connections to the database; return how many there were."""
    parts = urlsplit(url)
    database = parts.path.strip("/")
    # From elsewhere: a connection of ours that is just closing is not one of them.
    url = parts._replace(path="/information_schema").geturl()
    idle = "SELECT id, db FROM information_schema.processlist WHERE command = 'Sleep'"
    mine: list[int] = []
    for _ in range(1000):  # who was just answered may not be idle yet
        mine = [number for number, where in run(url, idle) if where == database]
        if mine:
            break
        time.sleep(0.02)
    cut = 0
    for number in mine:
        try:
            run(url, f"KILL CONNECTION {number}")
        except mysql.connector.Error as error:
            # One of a test's own that was just closing.
            if error.errno != mysql.connector.errorcode.ER_NO_SUCH_THREAD:
                raise
        else:
            cut += 1
    return cut


def test_reads_survive_a_lost_connection(adapter: Adapter, url: str, run: Run) -> None:
    ids = add_pages(adapter, 2)
    for read in (adapter.epoch, adapter.models, lambda: list(adapter.read_pages(ids))):
        read()
        assert cut_all(run, url) > 0
        read()
    assert cut_all(run, url) > 0
    with adapter.snapshot():
        assert adapter.count_blocks() == 4
    assert cut_all(run, url) > 0
    with adapter.transaction():
        adapter.bump_epoch()
    assert adapter.epoch() == 1


@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_a_server_that_falls_silent_is_given_up(
    own_mysql: Any, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a host without power does: each of 14 tries waited for ``connect_timeout``."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 2.0)
    url = with_option(own_mysql.new_place(), f"connect_timeout=1&use_pure={pure}")
    adapter = open_store(url)
    own_mysql.kill()
    place = parse_qs(urlsplit(url).query)["unix_socket"][0]
    Path(place).unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(place)
            silent.listen(50)
            with pytest.raises(UnavailableError):
                adapter.models()
            silent.setblocking(False)
            tries = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    silent.accept()[0].close()
                    tries += 1
        assert 1 <= tries <= 5  # in two seconds, and one more that was under way
    finally:
        Path(place).unlink(missing_ok=True)
        own_mysql.start()
    assert adapter.models() == []
    adapter.close()


def test_a_lost_connection_undoes_a_transaction(adapter: Adapter, url: str, run: Run) -> None:
    def lose_and(call: Callable[[], object]) -> None:
        adapter.epoch()
        assert cut_all(run, url) > 0
        call()

    with pytest.raises(UnavailableError), adapter.transaction():
        lose_and(lambda: adapter.put_job("k", "", "", ""))
    with pytest.raises(UnavailableError), adapter.transaction():
        lose_and(adapter.jobs)  # it must not be read on another connection
    with pytest.raises(UnavailableError), adapter.snapshot():
        lose_and(adapter.jobs)
    with pytest.raises(UnavailableError), adapter.transaction():
        lose_and(lambda: None)  # and then it is committed
    assert adapter.epoch() == 0
    assert adapter.jobs() == []
    with adapter.transaction():
        adapter.put_job("j", "", "", "")
    assert len(adapter.jobs()) == 1


def test_a_store_is_opened_although_a_connection_is_lost(
    url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the names of its tables and those of their columns, too."""
    open_store(url).close()
    adapter = cast(Any, registry.connect(url, mode="a"))
    columns_of = adapter._sql.columns_of

    def cut(table: str) -> str:
        assert cut_all(run, url) > 0
        return cast(str, columns_of(table))

    monkeypatch.setattr(type(adapter._sql), "columns_of", lambda _, table: cut(table))
    assert adapter.schema_version() is not None
    adapter.close()


def test_a_creation_that_loses_its_lock_is_given_up(
    url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on over a new connection, and dropped the store of who had got the lock by then."""
    other, adapter = open_store(url), cast(Any, registry.connect(url, mode="a"))
    run(url, "DELETE FROM pydedup_meta")  # as a creation leaves it that is cut short
    ((number,),) = adapter._query("SELECT CONNECTION_ID()")
    look, define = adapter.schema_version, adapter._define

    def cut() -> int | None:  # asked for first, once there is the lock
        monkeypatch.undo()
        run(url, f"KILL CONNECTION {number}")
        return cast("int | None", look())

    def overtaken(statement: str) -> None:
        if other.schema_version() is None:
            other.create_schema({"of": "the other"})
            add_pages(other, 1)
        define(statement)

    monkeypatch.setattr(adapter, "schema_version", cut)
    adapter._define = overtaken
    with pytest.raises(UnavailableError):
        adapter.create_schema({"of": "me"})
    assert other.schema_version() is None
    adapter._define = define
    adapter.create_schema({"of": "me"})
    assert other.meta()["of"] == "me"
    adapter.close()
    other.close()


def test_a_creation_that_is_interrupted_keeps_no_lock(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, other = (cast(Any, registry.connect(url, mode="a")) for _ in range(2))

    def interrupt(session: object, sql: str, *rest: Any) -> object:
        if "RELEASE_LOCK" in sql:
            raise KeyboardInterrupt
        return run(session, sql, *rest)

    run = adapter._run
    monkeypatch.setattr(adapter, "_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter.create_schema({})
    with other._creating():  # a lock of a connection that is closed goes soon
        assert other.schema_version() == SCHEMA_VERSION
    adapter.close()
    other.close()


def test_a_connection_that_is_cut_within_a_page(adapter: Adapter, url: str) -> None:
    pages = add_random_pages(adapter, 40)
    pure = adapter._place.options["use_pure"]  # type: ignore[attr-defined]
    with CuttingProxy(url) as proxy:
        through = open_store(with_option(proxy.url, f"use_pure={pure}"))
        proxy.connections = 0
        proxy.cut_after(3 * MIB + 5, 7 * MIB + 77_777)
        assert in_thread(lambda: dict(through.read_pages(list(pages)))) == pages
        assert (proxy.connections, proxy.cuts) == (3, 2)
        # Writing is not repeated, and nothing of it is kept.
        with pytest.raises(UnavailableError), through.transaction():
            put_job_while_cut(proxy, through)
        assert through.jobs() == []
        add_pages(through, 1)
        through.close()


def put_job_while_cut(proxy: CuttingProxy, adapter: Adapter) -> None:
    proxy.cut_after(0)
    adapter.put_job("lost", "", "", "")


def test_what_was_interrupted_answers_nobody_else(adapter: Adapter) -> None:
    """The answer of a statement that Ctrl-C cut short is not taken for that of the next."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(scope: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with scope():
            adapter._query("SELECT SLEEP(1), 17")  # type: ignore[attr-defined]

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for scope in (contextlib.nullcontext, adapter.snapshot):
            with pytest.raises(KeyboardInterrupt):
                interrupted(scope)
            assert adapter.epoch() == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_result_that_nobody_read_is_left_with_its_connection(adapter: Adapter) -> None:
    """Ctrl-C may come between a statement and its rows."""

    def interrupt(cursor: object) -> None:
        raise KeyboardInterrupt

    for sql in ("SELECT 17", "SELECT 17 + %s"):  # prepared, and as a text
        with adapter._pool.acquire() as session, pytest.raises(KeyboardInterrupt):  # type: ignore[attr-defined]
            adapter._run(session, sql, [1] if "%s" in sql else [], interrupt)  # type: ignore[attr-defined]
        assert session.connection.broken
        assert adapter.epoch() == 0


def test_statements_are_kept_within_a_bound(adapter: Adapter, url: str, run: Run) -> None:
    def kept() -> int:
        ((_, count),) = run(url, "SHOW GLOBAL STATUS LIKE 'Prepared_stmt_count'")
        return int(count)

    number = "SELECT CONNECTION_ID()"
    before = adapter._query(number)  # type: ignore[attr-defined]
    # The server counts for all connections, and those of tests before may still be closing.
    last = [kept()]
    while len(last) < 5 or len(set(last[-5:])) > 1:
        assert len(last) < 200
        time.sleep(0.1)
        last.append(kept())
    counts = []
    for count in range(1, 100):
        found = adapter._query(f"SELECT {count} + ?", [count])  # type: ignore[attr-defined]
        assert found == [(2 * count,)]
        counts.append(kept())
    assert counts[0] < counts[-1] == counts[40]
    assert adapter._query(number) == before  # type: ignore[attr-defined]


def test_what_the_server_refused_costs_neither_the_connection_nor_a_statement(
    adapter: Adapter,
) -> None:
    number = "SELECT CONNECTION_ID()"

    def session_count(name: str) -> int:
        ((_, count),) = adapter._query(f"SHOW SESSION STATUS LIKE '{name}'")  # type: ignore[attr-defined]
        return int(count)

    row = ("x" * 2000, "")  # longer than the column
    before = adapter._query(number)  # type: ignore[attr-defined]
    with adapter.transaction():
        for _ in range(40):
            with pytest.raises(ArgumentError, match="does not take this value"):
                adapter._insert_many("meta", [row])  # type: ignore[attr-defined]
        adapter.set_meta("of", "the same transaction")
    assert adapter.meta()["of"] == "the same transaction"
    assert adapter._query(number) == before  # type: ignore[attr-defined]
    left = session_count("Com_stmt_prepare") - session_count("Com_stmt_close")
    assert session_count("Com_stmt_prepare") >= 40
    assert left < 20


def test_what_fails_among_its_rows_costs_neither_the_connection_nor_the_statement(
    adapter: Any,
) -> None:
    """As one that is cut short, or that MySQL refuses once its rows are asked for."""
    number = "SELECT CONNECTION_ID()"
    sql = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) "
        "SELECT i, IF(i < ?, i, (SELECT i UNION SELECT i + 1)) FROM n"
    )
    before = adapter._query(number)
    for _ in range(2):
        with pytest.raises(StoreError, match="more than 1 row"):
            adapter._query(sql, [500])
        assert adapter._query(sql, [1000]) == [(i, i) for i in range(1, 901)]
    assert adapter._query(number) == before


def test_an_equal_statement_is_not_prepared_again(adapter: Adapter, of_mysql: bool) -> None:
    """Statements are put together for each call, so they are equal and not the same object."""
    pages = add_pages(adapter, 20)

    def prepared() -> int:
        counted = "SHOW SESSION STATUS LIKE 'Com_stmt_prepare'"
        ((_, count),) = adapter._query(counted)  # type: ignore[attr-defined]
        return int(count)

    before = prepared()
    assert len(adapter.page_rows(ids=pages)) == 20
    first = prepared()
    for _ in range(5):
        assert len(adapter.page_rows(ids=pages)) == 20
    assert prepared() == first
    # MySQL prepares once more by itself when it has seen of which types parameters are.
    assert first == before + 1 or (of_mysql and first == before + 2)


@pytest.mark.parametrize("pure", [False, True])
def test_within_a_transaction_nothing_is_sent_but_its_statements(url: str, pure: bool) -> None:
    """The answer to a ping may be that another node of Galera ended it, and is lost then."""
    adapter = open_store(with_option(url, "use_pure=true") if pure else url)

    def received() -> int:
        sql = "SHOW SESSION STATUS "
        sql += "WHERE variable_name IN ('QUESTIONS', 'COM_ADMIN_COMMANDS')"
        return sum(int(count) for _, count in adapter._query(sql))  # type: ignore[attr-defined]

    with adapter.transaction():
        before = received()
        adapter.set_meta("of", "a test")
        adapter.set_meta("of", "the same statement again")
        adapter.bump_epoch()
        assert received() - before == 3 + 1
