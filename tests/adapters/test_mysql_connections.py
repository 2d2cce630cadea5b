# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: connections that break, servers that come back, statements kept prepared."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import mysql.connector
import mysql.connector.errorcode
import pytest
from mysql.connector import HAVE_CEXT

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.errors import UnavailableError
from pydedup.testing._contract_base import add_pages

MIB = 1 << 20
Run = Callable[..., list[tuple[Any, ...]]]


def with_options(url: str, **options: Any) -> str:
    added = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if urlsplit(url).query else '?'}{added}"


@pytest.fixture
def url(mysql_database: str) -> str:
    return mysql_database


@pytest.fixture
def run(mysql_run: Run) -> Run:
    return mysql_run


@pytest.fixture(params=["extension", "pure"] if HAVE_CEXT else ["pure"])
def adapter(url: str, request: pytest.FixtureRequest) -> Iterator[Adapter]:
    adapter = registry.connect(with_options(url, use_pure=request.param == "pure"), mode="a")
    adapter.create_schema({})
    yield adapter
    adapter.close()


def cut_all(run: Run, url: str) -> int:
    """Kill all connections to the database; return how many there were."""
    database = urlsplit(url).path.strip("/")
    found = run(url, "SELECT id, db FROM information_schema.processlist WHERE command = 'Sleep'")
    mine = [number for number, where in found if where == database]
    cut = 0
    for number in mine:
        try:
            run(url, f"KILL CONNECTION {number}")
        except mysql.connector.Error as error:
            # One of those that we look with, which was just closing.
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


class CuttingProxy:
    """Passes bytes on to a server's socket and cuts a connection after so many of them."""

    def __init__(self, path: Path, target: str, cuts: list[int]) -> None:
        self.path, self._target, self._cuts = path, target, cuts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connections = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                left = self._cuts[self.connections : self.connections + 1]
                self.connections += 1
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                for source, sink, limit in ((client, server, []), (server, client, left)):
                    threading.Thread(
                        target=self._carry, args=(source, sink, limit), daemon=True
                    ).start()

    def _carry(self, source: socket.socket, sink: socket.socket, limit: list[int]) -> None:
        left = limit[0] if limit else 1 << 62
        with contextlib.suppress(OSError):
            while left > 0 and (piece := source.recv(min(left, 65536))):
                sink.sendall(piece)
                left -= len(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def test_a_connection_cut_in_the_middle_of_a_page(adapter: Adapter, url: str) -> None:
    target = dict(parse_qsl(urlsplit(url).query)).get("unix_socket")
    if target is None:
        pytest.skip("the server was given by host and port; the proxy needs its socket")
    ids = add_pages(adapter, 40, size=MIB)
    path = Path(target).with_name("cut.sock")
    proxy = CuttingProxy(path, target, [3 * MIB + 5, 10 * MIB + 77_777])
    base = url.partition("?")[0]
    pure = adapter._place.options["use_pure"]  # type: ignore[attr-defined]
    through = registry.connect(f"{base}?unix_socket={path}&use_pure={pure}", mode="r")
    try:
        found = dict(through.read_pages(ids))
        assert found == {number: bytes([i]) * MIB for i, number in enumerate(ids)}
        assert proxy.connections == 3
    finally:
        through.close()
        proxy.close()
        path.unlink()


def test_what_was_interrupted_answers_nobody_else(adapter: Adapter) -> None:
    """The answer of a statement that Ctrl-C cut short is not taken for that of the next."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for scope in (contextlib.nullcontext, adapter.snapshot):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt), scope():
                adapter._query("SELECT SLEEP(1), 17")  # type: ignore[attr-defined]
            assert adapter.epoch() == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def test_reading_goes_on_when_a_killed_server_is_back(own_mysql: Any) -> None:
    """A read that finds the server dead waits for it; what was committed is there, all else not."""
    adapter = registry.connect(own_mysql.url, mode="a")
    try:
        adapter.create_schema({})
        ids = add_pages(adapter, 8, size=MIB)

        def delete() -> None:
            adapter.delete_pages(ids)
            own_mysql.kill()
            adapter.bump_epoch()

        with pytest.raises(UnavailableError), adapter.transaction():
            delete()
        found: list[dict[int, bytes]] = []
        reader = threading.Thread(target=lambda: found.append(dict(adapter.read_pages(ids))))
        reader.start()
        own_mysql.start()
        reader.join(5)  # seconds after its return
        assert not reader.is_alive()
        assert found == [{number: bytes([i]) * MIB for i, number in enumerate(ids)}]
        assert adapter.epoch() == 0
        with adapter.transaction():
            assert adapter.bump_epoch(0)
        assert adapter.integrity_errors() == []
    finally:
        adapter.close()
