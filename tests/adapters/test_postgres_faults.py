# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: servers that refuse, go away and come back, and connections that are cut.

They are done to a real server: the shared one where only connections are concerned, otherwise one
of our own, which may be stopped and asks for passwords.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.errors import UnavailableError

PASSWORD = "right-0f-c0urse"
WRONG = "wr0ng-0ne"


def open_store(url: str, schema: str) -> Adapter:
    adapter = registry.connect(url, mode="a", schema=schema)
    adapter.create_schema({})
    return adapter


def add_pages(adapter: Adapter, count: int) -> dict[int, bytes]:
    payloads = [random.Random(i).randbytes(1 << 20) for i in range(count)]
    with adapter.transaction():
        ids = adapter.insert_pages([(bytes(16), payload) for payload in payloads], state=LIVE)
    return dict(zip(ids, payloads, strict=True))


def cut(url: str, application: str) -> int:
    """End all connections of that name; return how many there were."""
    query = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
    query += "WHERE application_name = %s"
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query, [application]).fetchone()
        assert row is not None
        return int(row[0])


# ---- connections that are cut -------------------------------------------------------------------


@pytest.fixture
def name(postgres_url: str) -> Iterator[str]:
    """A schema of its own, which is the application's name too."""
    schema = f"test_{secrets.token_hex(6)}"
    yield schema
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@pytest.fixture
def adapter(postgres_url: str, name: str) -> Iterator[Adapter]:
    adapter = open_store(named(postgres_url, name), name)
    yield adapter
    adapter.close()


def named(url: str, name: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}application_name={name}"


def test_a_cut_idle_connection_is_not_noticed(
    adapter: Adapter, postgres_url: str, name: str
) -> None:
    pages = add_pages(adapter, 2)
    for use in (
        adapter.epoch,
        lambda: dict(adapter.read_pages(list(pages))) == pages,
        lambda: add_pages(adapter, 1),
        adapter.compact,
    ):
        assert cut(postgres_url, name) == 1
        use()
    assert cut(postgres_url, name) == 1
    with adapter.snapshot():
        assert len(adapter.page_rows()) == 3
        with adapter.snapshot():
            assert dict(adapter.read_pages(list(pages))) == pages


def test_reading_goes_on_while_connections_are_cut(
    adapter: Adapter, postgres_url: str, name: str
) -> None:
    pages = add_pages(adapter, 40)
    end, cuts = time.monotonic() + 3, 0
    reads, failures = [0], []

    def read() -> None:
        try:
            while time.monotonic() < end:
                assert dict(adapter.read_pages(list(pages))) == pages
                assert len(adapter.page_rows()) == 40
                reads[0] += 1
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        cuts += cut(postgres_url, name)
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert cuts > 10
    assert reads[0] > 0


@pytest.mark.parametrize("scope", ["transaction", "snapshot"])
def test_a_cut_transaction_is_told_and_not_repeated(
    adapter: Adapter, postgres_url: str, name: str, scope: str
) -> None:
    def interrupted() -> None:
        with getattr(adapter, scope)():
            if scope == "transaction":
                adapter.put_job("lost", "", "", "")
            assert cut(postgres_url, name) == 1
            adapter.models()

    with pytest.raises(UnavailableError, match="reading goes on"):
        interrupted()
    assert adapter.jobs() == []
    with adapter.transaction():
        adapter.put_job("kept", "", "", "")
    assert [job[0] for job in adapter.jobs()] == ["kept"]


class Proxy:
    """Passes bytes between a client and the server, and cuts connections after so many of them.

    Bytes of the server alone are counted. A cut is the end of both connections, in the middle of
    whatever is under way.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.after: int | None = None
        self.cuts = 0
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._target)
            threads = [
                threading.Thread(target=self._pass, args=(client, server, False)),
                threading.Thread(target=self._pass, args=(server, client, True)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if counted and self.after is not None and passed > self.after:
                    sink.sendall(data[: len(data) // 2])
                    self.after, self.cuts = None, self.cuts + 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_a_connection_that_is_cut_within_a_page(postgres_url: str, name: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        info = connection.info
        assert info.host.startswith("/"), "this test needs a server with a Unix socket"
        target, user, database = f"{info.host}/.s.PGSQL.{info.port}", info.user, info.dbname
    with tempfile.TemporaryDirectory() as folder:
        proxy = Proxy(target, Path(folder))
        adapter = open_store(f"postgresql://{user}@/{database}?host={folder}", name)
        pages = add_pages(adapter, 20)
        for after in (100_000, (1 << 20) + 20, 9 << 20, 17 << 20):
            in_new_connection(adapter, lambda after=after: cut_within(proxy, adapter, pages, after))
        assert proxy.cuts == 4
        # Writing is not repeated, and nothing of it is kept.
        with pytest.raises(UnavailableError), adapter.transaction():
            put_job_while_cut(proxy, adapter)
        assert adapter.jobs() == []
        add_pages(adapter, 1)
        adapter.close()
        proxy.close()


def in_new_connection(adapter: Adapter, function: Any) -> None:
    """Call the function in a thread of its own, which has a connection of its own."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # shown below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not failures, failures


def cut_within(proxy: Proxy, adapter: Adapter, pages: dict[int, bytes], after: int) -> None:
    adapter.epoch()
    proxy.after = after
    assert dict(adapter.read_pages(list(pages))) == pages
    assert proxy.after is None, "it was not cut"


def put_job_while_cut(proxy: Proxy, adapter: Adapter) -> None:
    proxy.after = 0
    adapter.put_job("lost", "", "", "")


def test_ctrl_c_ends_the_wait_for_a_lock(adapter: Adapter, postgres_url: str, name: str) -> None:
    patient = open_store(f"{named(postgres_url, name)}&timeout=60", name)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

    def wait() -> None:
        with patient.transaction():
            patient.bump_epoch()

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
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert time.monotonic() - start < 10
    finally:
        timer.join()
        done.set()
        holder.join()
    wait()
    assert patient.epoch() == 2
    patient.close()


def test_a_killed_writer_leaves_whole_transactions(postgres_url: str, name: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from pydedup import registry\n"
        "adapter = registry.connect(sys.argv[1], mode='a', schema=sys.argv[2])\n"
        "adapter.create_schema({})\n"
        "for i in range(3):\n"
        "    with adapter.transaction():\n"
        "        adapter.bump_epoch()\n"
        "        adapter.insert_pages([(bytes(16), bytes(1 << 20))] * 10, state='live')\n"
        "        if i == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-P", "-c", code, named(postgres_url, name), name]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    adapter = open_store(named(postgres_url, name), name)
    assert (adapter.epoch(), len(adapter.page_rows())) == (2, 20)
    add_pages(adapter, 1)  # nothing is locked any more
    assert adapter.integrity_errors() == []
    adapter.close()


# ---- servers that refuse ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(own_postgres: Any) -> str:
    """URL of a server that asks everybody but its superuser for a password."""
    url: str = own_postgres.get_uri()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE careful LOGIN PASSWORD '{PASSWORD}'")
        connection.execute("GRANT CREATE ON DATABASE postgres TO careful")
        (row,) = connection.execute("SHOW hba_file")
        rules = (
            "local all postgres trust\nhostssl all all all reject\nlocal all all scram-sha-256\n"
        )
        Path(row[0]).write_text(rules)
        connection.execute("SELECT pg_reload_conf()")
        (row,) = connection.execute("SHOW unix_socket_directories")
    return f"postgresql://careful:{{password}}@/postgres?host={row[0]}"


def refused(url: str) -> str:
    with pytest.raises(UnavailableError) as caught:
        registry.connect(url, mode="a")
    error: BaseException | None = caught.value
    while error is not None:
        assert PASSWORD not in f"{error} {error!r}"
        assert WRONG not in f"{error} {error!r}"
        error = error.__cause__
    return str(caught.value)


def test_passwords(strict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    right = strict.format(password=PASSWORD)
    assert "check the user and the password" in refused(strict.format(password=WRONG))
    assert "PGPASSWORD" in refused(strict.replace(":{password}", ""))
    missing = refused(right.replace("/postgres?", "/missing?"))
    assert "createdb" in missing
    assert "careful@/missing" in missing
    adapter = open_store(right, "by_password")
    assert PASSWORD not in adapter.url
    adapter.close()
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    adapter = open_store(strict.replace(":{password}", ""), "by_password")
    assert adapter.epoch() == 0
    adapter.close()


def test_parameters_of_tls_reach_libpq() -> None:
    # libpq itself refuses this pair, before it connects; a server with TLS is not at hand here.
    url = f"postgresql://u:{PASSWORD}@localhost:1/x?sslmode=require&sslrootcert=system"
    assert "weak sslmode" in refused(url)


@pytest.mark.parametrize("where", ["localhost:1/x", "/x?host=/missing", "nowhere.invalid/x"])
def test_servers_that_are_not_there(where: str) -> None:
    start = time.monotonic()
    assert "check that the server runs" in refused(f"postgresql://u:{PASSWORD}@{where}")
    assert time.monotonic() - start < 9, "opening must not wait for a server to come"


# ---- servers that go away -----------------------------------------------------------------------


def stop(server: Any) -> None:
    """End the server at once, as a crash does: it has to recover when it starts."""
    pid = server.get_pid()
    os.kill(pid, signal.SIGQUIT)
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_server_that_stays_away(
    own_postgres: Any, strict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.adapters._postgres_base.AGAIN_SECONDS", 0.3)
    adapter = open_store(strict.format(password=PASSWORD), "down")
    stop(own_postgres)
    try:
        read = lambda: list(adapter.read_pages([1]))  # noqa: E731
        for use in (adapter.epoch, read, lambda: add_pages(adapter, 1)):
            with pytest.raises(UnavailableError, match="check that the server runs"):
                use()
    finally:
        own_postgres.ensure_postgres_running()
    assert adapter.epoch() == 0
    adapter.close()


def test_serving_outlives_a_restart(own_postgres: Any, strict: str) -> None:
    adapter = open_store(strict.format(password=PASSWORD), "restarted")
    pages = add_pages(adapter, 20)
    done = threading.Event()
    served = [0.0, 0.0]
    failures: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            while not done.is_set():
                assert dict(adapter.read_pages(list(pages))) == pages, "a read was not made again"
                with contextlib.suppress(UnavailableError), adapter.snapshot():
                    # Here nothing is read again: it might be of another state.
                    assert [row.id for row in adapter.page_rows()] == list(pages)
                served[number] = time.monotonic()
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            time.sleep(0.3)
            stop(own_postgres)
            time.sleep(1)
            own_postgres.ensure_postgres_running()
            back = time.monotonic()
            while min(served) < back and not failures:
                assert time.monotonic() < back + 5
                time.sleep(0.02)
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not failures, failures
    add_pages(adapter, 1)
    assert adapter.integrity_errors() == []
    adapter.close()
