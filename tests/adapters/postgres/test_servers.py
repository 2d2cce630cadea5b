# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: servers that refuse, go away and come back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import ReadOnlyError, UnavailableError
from pydedup.testing._contract_base import open_store, with_option

PASSWORD = "right-0f-c0urse"
WRONG = "wr0ng-0ne"


# ---- servers that refuse ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(own_postgres: Any) -> str:
    """URL of a server that asks everybody but its superuser for a password."""
    url: str = own_postgres.url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET password_encryption = 'scram-sha-256'")  # PostgreSQL 13: md5
        connection.execute(f"CREATE ROLE careful LOGIN PASSWORD '{PASSWORD}'")
        connection.execute("GRANT CREATE ON DATABASE postgres TO careful")
        (row,) = connection.execute("SHOW hba_file")
        rules = (
            "local all postgres trust\nhostssl all all all reject\nlocal all all scram-sha-256\n"
        )
        Path(row[0]).write_text(rules)
        connection.execute("SELECT pg_reload_conf()")
    where = url.partition("?")[2]
    return f"postgresql://careful:{{password}}@/postgres?{where}"


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
    adapter = open_store(with_option(right, "schema=by_password"))
    assert PASSWORD not in adapter.url
    adapter.close()
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    adapter = open_store(with_option(strict.replace(":{password}", ""), "schema=by_password"))
    assert adapter.epoch() == 0
    adapter.close()


def test_parameters_of_tls_reach_libpq() -> None:
    # libpq itself refuses this pair, before it connects; a server with TLS is in test_tls.py.
    url = f"postgresql://u:{PASSWORD}@localhost:1/x?sslmode=require&sslrootcert=system"
    assert "weak sslmode" in refused(url)


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        ("localhost:1/x", "check that the server runs"),
        ("/x?host=/missing", "check that the server runs"),
        ("nowhere.invalid/x", "check the host"),
    ],
)
def test_servers_that_are_not_there(where: str, advice: str) -> None:
    start = time.monotonic()
    assert advice in refused(f"postgresql://u:{PASSWORD}@{where}")
    assert time.monotonic() - start < 9, "opening must not wait for a server to come"


@pytest.fixture(params=["standby", "setting"])
def read_only_server(request: pytest.FixtureRequest, own_postgres: Any) -> Iterator[Any]:
    """A server, and what makes it one that only reads, under clients that go on."""
    signal = own_postgres.folder / "standby.signal"

    def restart() -> None:
        signal.touch()
        own_postgres.kill()
        own_postgres.start()

    def switch(value: str = "on") -> None:
        with psycopg.connect(own_postgres.url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.execute("SELECT pg_reload_conf()")
            ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            while connection.execute(f"{ends} WHERE application_name = 'pydedup'").fetchone():
                time.sleep(0.01)

    if request.param == "setting":
        yield own_postgres, switch
        switch("off")
        return
    yield own_postgres, restart
    signal.unlink()
    own_postgres.kill()
    own_postgres.start()


def test_a_server_that_became_read_only(read_only_server: Any) -> None:
    server, becomes_read_only = read_only_server
    weights = np.arange(70_000, dtype=np.float32)
    with pydedup.open(server.new_place()) as store:
        store.add("m", {"w": weights})
        becomes_read_only()
        assert (store.load("m")["w"] == weights).all()
        for change in (lambda: store.add("n", {"w": -weights}), lambda: store.remove("m")):
            with pytest.raises(ReadOnlyError, match="connect to the primary server"):
                change()
        assert [info.name for info in store.models()] == ["m"]


def test_a_store_opened_on_a_standby_is_written_after_its_promotion(own_postgres: Any) -> None:
    """It stayed read-only until it was opened again; so did one of a user who was granted more."""
    url = own_postgres.new_place()
    weights = np.arange(70_000, dtype=np.float32)
    with pydedup.open(url) as store:
        store.add("m", {"w": weights})
    (own_postgres.folder / "standby.signal").touch()
    own_postgres.kill()
    own_postgres.start()
    with pydedup.open(url) as store:
        assert store.read_only
        with pytest.raises(ReadOnlyError):
            store.add("n", {"w": -weights})
        with psycopg.connect(own_postgres.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        store.add("n", {"w": -weights})
        assert not store.read_only
        assert (store.load("n")["w"] == -weights).all()


def test_a_server_in_a_test_keeps_its_port_while_it_is_down(own_postgres: Any) -> None:
    """The kernel gives it to no connection; of one that has it all the same, the log tells."""
    begins = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert own_postgres.port < begins
    own_postgres.kill()
    with (
        socket.create_server(("127.0.0.1", own_postgres.port)),
        pytest.raises(RuntimeError, match=r"did not start: (?s:.*)could not bind"),
    ):
        own_postgres.start()
    own_postgres.start()
    assert open_store(own_postgres.new_place()).models() == []
