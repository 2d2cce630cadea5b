# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: connections that are cut, and waits and writers that are ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapters._errors import CancelledError, ConnectionLostError
from pydedup.adapters._postgres_statement import Statement, copy_statement
from pydedup.errors import UnavailableError
from pydedup.testing._contract_base import (
    add_pages,
    add_random_pages,
    in_thread,
    open_store,
    with_option,
)
from pydedup.testing.proxy import CuttingProxy
from pydedup.testing.servers import PostgresServer

MIB = 1 << 20


def cut(url: str, application: str) -> int:
    """End all connections of that name; return how many there were."""
    ours = "FROM pg_stat_activity WHERE application_name = %s"
    with psycopg.connect(url, autocommit=True) as connection:
        cuts = connection.execute(f"SELECT pid, pg_terminate_backend(pid) {ours}", [application])
        ended = [pid for pid, _ in cuts.fetchall()]
        left = "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)"
        for _ in range(1000):  # PostgreSQL 13 cannot be told to wait for them
            if not connection.execute(left, [ended]).fetchall():
                return len(ended)
            time.sleep(0.01)
    raise AssertionError(f"connections of {application} are still there")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
@pytest.mark.parametrize(("asked", "milliseconds"), [("", 60_000), ("tcp_user_timeout=5000", 5000)])
def test_a_host_that_falls_silent_is_given_up(
    own_postgres: PostgresServer, asked: str, milliseconds: int
) -> None:
    """Within a statement, too: the system tried to send it for 15 minutes."""
    place = own_postgres.new_place().replace("@/", f"@127.0.0.1:{own_postgres.port}/")
    place = place.replace(f"host={own_postgres.folder}&port={own_postgres.port}&", "")
    adapter = registry.connect(with_option(place, asked) if asked else place, mode="a")
    with adapter._pool.acquire() as session:  # type: ignore[attr-defined]
        number = os.dup(session.connection.pgconn.socket)
    with socket.socket(fileno=number) as held:
        found = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    adapter.close()
    assert found == milliseconds


def test_who_fell_silent_is_asked_again(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minute for which such a host was waited for was more than there was for trying again."""
    now, failures = [0.0], [60.0, 1.0, *[5.0] * 9]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr("pydedup.adapters._again.time", clock)

    def read() -> str:
        if len(failures) == 9:
            return "there"
        now.append(now.pop() + failures.pop(0))
        raise ConnectionLostError("no answer")

    assert adapter._again(read) == "there"
    failures.pop()
    with pytest.raises(ConnectionLostError):
        adapter._again(read)
    assert len(failures) == 5


def test_nobody_pauses_for_long(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses double, for so long as reading would not go on soon after the server is back."""
    now, pauses = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("pydedup.adapters._again.time", clock)

    def read() -> str:
        if now[0] > 9:
            return "there"
        raise ConnectionLostError("no answer")

    assert adapter._again(read) == "there"
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert pauses[-1] <= 1


@pytest.fixture
def url(postgres_url: str, schema: str) -> str:
    """The schema is the application's name too, by which connections are cut."""
    return with_option(postgres_url, f"schema={schema}&application_name={schema}")


def test_a_cut_idle_connection_is_not_noticed(
    adapter: Adapter, postgres_url: str, schema: str
) -> None:
    pages = add_random_pages(adapter, 2)
    for use in (
        adapter.epoch,
        lambda: dict(adapter.read_pages(list(pages))) == pages,
        lambda: add_pages(adapter, 1),
        adapter.compact,
    ):
        assert cut(postgres_url, schema) == 1
        use()
    assert cut(postgres_url, schema) == 1
    with adapter.snapshot():
        assert len(adapter.page_rows()) == 3
        with adapter.snapshot():
            assert dict(adapter.read_pages(list(pages))) == pages


def test_a_store_is_opened_although_a_connection_is_lost(
    adapter: Any, postgres_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the names of its tables and those of their columns, too."""
    columns_of = adapter._sql.columns_of

    def cut_before(table: str) -> str:
        assert cut(postgres_url, schema) == 1
        return str(columns_of(table))

    monkeypatch.setattr(type(adapter._sql), "columns_of", lambda _, table: cut_before(table))
    assert adapter.schema_version() is not None


def test_reading_goes_on_while_connections_are_cut(
    adapter: Adapter, postgres_url: str, schema: str
) -> None:
    pages = add_random_pages(adapter, 40)
    end, cuts, done = time.monotonic() + 100, 0, threading.Event()
    reads, failures = [0], []

    def read() -> None:
        try:
            while not done.is_set():
                assert dict(adapter.read_pages(list(pages))) == pages
                assert len(adapter.page_rows()) == 40
                reads[0] += 1
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    while (cuts < 40 or not reads[0]) and not failures and time.monotonic() < end:
        cuts += cut(postgres_url, schema)
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert cuts >= 40
    assert reads[0] > 0


def test_a_connection_is_cut_in_the_middle_of_pages(
    adapter: Adapter, postgres_url: str, schema: str
) -> None:
    """What came is not read again, and what did not is, on another connection."""
    pages = add_random_pages(adapter, 60)
    found, cuts = [], 0
    for row in adapter.read_pages(list(pages)):
        found.append(row)
        if len(found) in (1, 2, 25, 50):  # what was on its way may still come, then it is noticed
            cuts += cut(postgres_url, schema)
    assert cuts >= 2
    assert len(found) == 60
    assert dict(found) == pages


def test_who_takes_pages_slowly_has_them_all(adapter: Adapter, url: str) -> None:
    """A limit for statements is not one for what is done with their rows."""
    pages = add_random_pages(adapter, 60)
    hasty = registry.connect(with_option(url, "options=-c%20statement_timeout%3D1000"), mode="r")
    try:
        found = []
        for row in hasty.read_pages(list(pages)):
            found.append(row)
            if len(found) in (5, 40):  # of more than what buffers on the way hold
                time.sleep(1.3)
    finally:
        hasty.close()
    assert len(found) == 60
    assert dict(found) == pages


def test_a_standby_that_ends_a_statement_is_asked_for_the_rest(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that replays a vacuum, which is what a serialization failure is there."""
    pages, copied, tries = add_random_pages(adapter, 8), adapter._copied, list[int]()

    def ended(session: Any, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        tries.append(len(ids))
        yield from islice(copied(session, ids), 3)
        if len(ids) > 3:
            raise CancelledError("conflict with recovery")

    monkeypatch.setattr(adapter, "_copied", ended)
    found = list(adapter.read_pages(list(pages)))
    assert len(found) == 8
    assert dict(found) == pages
    assert tries == [8, 5, 2]


def test_reading_given_up_leaves_no_connection(
    adapter: Adapter, postgres_url: str, schema: str
) -> None:
    pages = add_random_pages(adapter, 20)
    for _ in range(5):
        reading = adapter.read_pages(list(pages))
        for page_id, _ in islice(reading, 3):
            assert len(adapter.page_rows(ids=[page_id])) == 1
        del reading
    # A server that is busy sees only after a while that a client has gone.
    count = "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = %s"
    end = time.monotonic() + 20
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        while connection.execute(count, [schema]).fetchall() > [(1,)] and time.monotonic() < end:
            time.sleep(0.01)
    assert cut(postgres_url, schema) == 1


@pytest.mark.parametrize("scope", ["transaction", "snapshot"])
def test_a_cut_transaction_is_told_and_not_repeated(
    adapter: Adapter, postgres_url: str, schema: str, scope: str
) -> None:
    def interrupted() -> None:
        with getattr(adapter, scope)():
            if scope == "transaction":
                adapter.put_job("lost", "", "", "")
            assert cut(postgres_url, schema) == 1
            adapter.models()

    with pytest.raises(UnavailableError, match="reading goes on"):
        interrupted()
    assert adapter.jobs() == []
    with adapter.transaction():
        adapter.put_job("kept", "", "", "")
    assert [job[0] for job in adapter.jobs()] == ["kept"]


def test_a_connection_that_is_cut_within_a_page(url: str) -> None:
    with CuttingProxy(url) as proxy:
        adapter = open_store(proxy.url)
        pages = add_random_pages(adapter, 20)
        for number, after in enumerate((100_000, MIB + 20, 9 * MIB, 17 * MIB), start=1):
            proxy.cut_after(after)
            assert in_thread(lambda: dict(adapter.read_pages(list(pages)))) == pages
            assert proxy.cuts == number, "it was not cut"
        # Writing is not repeated, and nothing of it is kept.
        with pytest.raises(UnavailableError), adapter.transaction():
            put_job_while_cut(proxy, adapter)
        assert adapter.jobs() == []
        add_pages(adapter, 1)
        adapter.close()


def test_a_host_that_is_found_dead_when_a_transaction_begins(url: str) -> None:
    """One that went down closes no connection; nothing was done yet, so it begins on another."""
    with CuttingProxy(url) as proxy:
        adapter = open_store(proxy.url)
        proxy.cut_after(0)
        with adapter.transaction():
            adapter.put_job("kept", "", "", "")
        proxy.cut_after(0)
        with adapter.snapshot():
            assert [job[0] for job in adapter.jobs()] == ["kept"]
        assert proxy.cuts == 2
        adapter.close()


def put_job_while_cut(proxy: CuttingProxy, adapter: Adapter) -> None:
    proxy.cut_after(0)
    adapter.put_job("lost", "", "", "")


def test_ctrl_c_ends_the_wait_for_a_lock(adapter: Adapter, url: str) -> None:
    patient = open_store(with_option(url, "timeout=60"))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

    def wait() -> None:
        with patient.transaction():
            patient.bump_epoch()

    def interrupted() -> None:
        timer.start()
        wait()

    def hold() -> None:
        with adapter.transaction():
            adapter.bump_epoch()
            begun.set()
            done.wait(60)

    begun, done = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(30)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - start < 30
    finally:
        timer.join()
        done.set()
        holder.join()
    wait()
    assert patient.epoch() == 2
    patient.close()


@pytest.mark.parametrize(("begun", "read"), [(b"SELECT 17", False), (b"BEGIN", True)])
def test_what_was_interrupted_is_read_by_nobody_else(
    adapter: Adapter, begun: bytes, read: bool
) -> None:
    """Ctrl-C may come when a statement has been sent, before the driver waits for its answer."""
    with adapter._pool.acquire() as session:  # type: ignore[attr-defined]
        pgconn = session.connection.pgconn
        if read:
            pgconn.exec_(begun)
        else:
            pgconn.send_query(begun)
    start = time.monotonic()
    assert adapter.epoch() == 0
    assert adapter.jobs() == []
    assert time.monotonic() - start < 5
    with adapter.transaction():
        adapter.bump_epoch()
    assert adapter.epoch() == 1


def test_a_killed_writer_leaves_whole_transactions(url: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from pydedup import registry\n"
        "adapter = registry.connect(sys.argv[1], mode='a')\n"
        "adapter.create_schema({})\n"
        "for i in range(3):\n"
        "    with adapter.transaction():\n"
        "        adapter.bump_epoch()\n"
        "        adapter.insert_pages([(bytes(16), bytes(1 << 20))] * 10, state='live')\n"
        "        if i == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-P", "-c", code, url]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    adapter = open_store(url)
    assert (adapter.epoch(), len(adapter.page_rows())) == (2, 20)
    add_pages(adapter, 1)  # nothing is locked any more
    assert adapter.integrity_errors() == []
    adapter.close()


def test_a_statement_longer_than_what_the_socket_takes_at_once(adapter: Adapter) -> None:
    """On a handle with a high number, too, as in a server with many connections of its own."""
    pages = add_random_pages(adapter, 3, size=5000)
    others = [os.dup(0) for _ in range(1024)]
    try:
        found = in_thread(lambda: read_among_many(adapter, pages))
    finally:
        for other in others:
            os.close(other)
    assert found == pages


def read_among_many(adapter: Any, pages: Iterable[int]) -> dict[int, bytes]:
    table = adapter._sql.dialect.name("pages")
    ids = [*pages, *range(10**12, 10**12 + 60_000)]
    with adapter._pool.acquire() as session:
        statement = Statement(session, copy_statement(table, "id, payload", ids))
        assert statement.socket > 1024
        return dict(statement.rows_as_they_come())
