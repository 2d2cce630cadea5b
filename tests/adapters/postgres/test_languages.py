# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL that speaks another language: its SQLSTATE says what it is, and not its words.

One server here is a few lines that refuse all connections; the other is a real one with German
messages, where Debian's packages of it and of locales are installed.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapters._errors import ConnectionLostError, CrowdedError
from pydedup.adapters._postgres_errors import MissingDatabaseError, refusal
from pydedup.adapters._postgres_url import locate
from pydedup.errors import ArgumentError, PydedupError, UnavailableError
from pydedup.testing.servers import unused_name, unused_port
from pydedup.testing.shards import MODELS, POLICY, give_known_places

GERMAN = "Das geht hier leider nicht"
NEGOTIATIONS = (80877103, 80877104)  # of TLS and GSSAPI, which come before the user and database


class Refusing:
    """A server that refuses every connection, in German."""

    def __init__(self, code: str) -> None:
        fields = {"S": "FATAL", "V": "FATAL", "C": code, "M": GERMAN}
        body = b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0"
        self._answer = b"E" + struct.pack(">i", len(body) + 4) + body
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"postgresql://me@127.0.0.1:{self._socket.getsockname()[1]}/mine"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                while True:
                    length, what = struct.unpack(">ii", client.recv(8, socket.MSG_WAITALL))
                    client.recv(length - 8, socket.MSG_WAITALL)
                    if what not in NEGOTIATIONS:
                        break
                    client.sendall(b"N")
                client.sendall(self._answer)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        ("3D000", UnavailableError, "create the database first"),
        ("28P01", UnavailableError, "check the user and the password"),
        ("28000", UnavailableError, "pg_hba.conf"),
        ("42501", UnavailableError, "GRANT CONNECT"),
        ("42704", ArgumentError, "options="),
        ("22023", ArgumentError, "options="),
        ("53300", UnavailableError, "max_connections"),
        ("57P03", UnavailableError, "server runs"),
        ("55000", UnavailableError, "SQLSTATE 55000"),
        ("XX000", UnavailableError, "log"),
    ],
)
def test_who_is_refused_is_told_why(code: str, kind: type[PydedupError], advice: str) -> None:
    server = Refusing(code)
    try:
        with pytest.raises(kind, match=GERMAN) as told:
            registry.connect(server.url, mode="a")
    finally:
        server.close()
    assert advice in str(told.value)
    assert ("server runs" in str(told.value)) is (code == "57P03")


def test_who_lets_connections_wait_is_not_asked_twice() -> None:
    """As a host without power does: who waits for it should wait once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/mine?connect_timeout=2"
        with pytest.raises(UnavailableError, match="server runs"):
            registry.connect(url, mode="a")
        silent.settimeout(0.2)
        silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()


@pytest.fixture(scope="module")
def german(server_folder: Path) -> Iterator[str]:
    """The URL of a real server with German messages, which lets in who knows the password."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    texts = Path("/usr/share/locale/de/LC_MESSAGES")
    there = [one for one in programs if (texts / f"postgres-{one.parts[4]}.mo").exists()]
    localedef = shutil.which("localedef")
    if not there or localedef is None or not Path("/usr/share/i18n/locales/de_DE").exists():
        pytest.skip("no PostgreSQL with German messages here (apt-get install postgresql locales)")
    user = "postgres" if os.geteuid() == 0 else None
    folder = server_folder / "german"
    data, port = folder / "data", unused_port()
    folder.mkdir()
    if user is not None:
        shutil.chown(folder, user)
    made = [localedef, "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")]
    subprocess.run(made, check=True, capture_output=True)

    def run(program: str, *arguments: str) -> None:
        command = [str(there[-1].parent / program), "-D", str(data), *arguments]
        quiet, environment = subprocess.DEVNULL, {**os.environ, "LOCPATH": str(folder)}
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=quiet, env=environment)

    (folder / "password").write_text("geheim\n")
    login = ["-U", "postgres", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
    run("initdb", *login, "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
    with (data / "postgresql.conf").open("a") as file:
        file.write(f"listen_addresses = '127.0.0.1'\nport = {port}\nfsync = off\n")
        file.write("unix_socket_directories = ''\nlc_messages = 'de_DE.UTF-8'\n")
    run("pg_ctl", "-w", "-l", str(folder / "log"), "start")
    yield f"postgresql://postgres:geheim@127.0.0.1:{port}"
    run("pg_ctl", "-w", "-m", "fast", "stop")


def test_a_real_one_is_understood(german: str) -> None:
    with pytest.raises(UnavailableError, match="existiert nicht; create the database first"):
        registry.connect(f"{german}/nirgends", mode="a")
    wrong = german.replace("geheim", "falsch")
    with pytest.raises(UnavailableError, match="fehlgeschlagen; check the user") as told:
        registry.connect(f"{wrong}/postgres", mode="a")
    assert "falsch" not in str(told.value)
    with pytest.raises(ArgumentError, match=r"Konfigurationsparameter.*options="):
        registry.connect(f"{german}/postgres?options=-c%20there%3D1", mode="a")


def test_shards_that_are_gone_and_slips_are_told_apart(
    german: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words were not understood: a slip, or a wrong password, was a shard that is down."""
    give_known_places(monkeypatch)  # of three new pages, none was for the shard that is gone: 1/27
    names = [unused_name() for _ in range(3)]

    def url(*shards: str) -> str:
        coordinator = f"{german}/postgres?schema={names[0]}&replicas=2"
        return "postgresql+shards://" + "|".join(
            place.partition("://")[2] for place in (coordinator, *shards)
        )

    with psycopg.connect(f"{german}/postgres", autocommit=True) as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name}")
        one, two, three = (f"{german}/{name}" for name in names)
        with pydedup.open(url(one, two, three)) as store:
            store.add_many(dict(MODELS), policy=POLICY)
        with pytest.raises(UnavailableError, match="create the database first"):
            pydedup.open(url(one, two, f"{german}/nirgends"))
        with pytest.raises(UnavailableError, match="check the user and the password"):
            pydedup.open(url(one, two, three.replace("geheim", "falsch")))
        connection.execute(f"DROP DATABASE {names[2]} WITH (FORCE)")
    with pydedup.open(url(one, two, three)) as store:
        for address, arrays in MODELS.items():
            assert store.load(address)["w"].tobytes() == arrays["w"].tobytes()
        with pytest.raises(UnavailableError, match=f"{names[2]}.* is gone.*refill --replace"):
            store.add("late@1", {"w": MODELS["m0@1"]["w"] + 1}, policy=POLICY)


@pytest.mark.parametrize(
    ("told", "kind", "advice"),
    [
        ('password authentication failed for user "me"', UnavailableError, "check the user and"),
        ('database "x" does not exist', MissingDatabaseError, "create the database first"),
        ('role "me" does not exist', UnavailableError, "CREATE ROLE"),
        ('role "me" is not permitted to log in', UnavailableError, "ALTER ROLE ... LOGIN"),
        ('permission denied for database "x"', UnavailableError, "GRANT CONNECT"),
        ("no more connections allowed (max_client_conn)", CrowdedError, "of pgbouncer"),
        ('too many connections for role "me"', CrowdedError, "raise its limit: ALTER ROLE"),
        ("sorry, too many clients already", CrowdedError, "raise max_connections"),
        ("remaining connection slots are reserved", CrowdedError, "raise max_connections"),
        ('invalid integer value "a" for connection option "port"', ArgumentError, "this option"),
        ('invalid value for parameter "work_mem"', ArgumentError, "this option"),
        ('unrecognized configuration parameter "x"', ArgumentError, "options="),
        ("session is read-only", ConnectionLostError, "target_session_attrs"),
        ("server is in hot standby mode", ConnectionLostError, "target_session_attrs"),
        ("failed to resolve host 'x'", ConnectionLostError, "check the host"),
        ("server does not support SSL, but SSL was required", UnavailableError, "see sslmode"),
        ("certificate verify failed", UnavailableError, "see sslmode"),
        ('no pg_hba.conf entry for host "::1", no encryption', UnavailableError, "see sslmode"),
        ('no pg_hba.conf entry for host "::1"', UnavailableError, "in the server's pg_hba.conf"),
        ("Connection refused", ConnectionLostError, "check that the server runs"),
    ],
)
def test_where_there_is_no_code_the_words_are_understood(
    told: str, kind: type[PydedupError], advice: str
) -> None:
    """As where a server took too long to be asked for one."""
    place = locate("postgresql://me@host/x", None, ())
    error = refusal(None, told, place, needs_password=False)
    assert type(error) is kind
    assert f"postgresql://me@host/x: {told}; " in str(error)
    assert advice in str(error)
