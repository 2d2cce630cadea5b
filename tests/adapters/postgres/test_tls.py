# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: a server that demands TLS.

The build of PostgreSQL that tests use knows no TLS, so it is spoken by a process in front of the
server, as stunnel or a pooler does. What is said to a client without TLS is the server's own.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pydedup import registry
from pydedup.errors import UnavailableError
from pydedup.testing._contract_base import add_random_pages, open_store, with_option
from pydedup.testing.proxy import CuttingProxy

PASSWORD = "right-0f-c0urse"
#: A client's first message when it wants TLS: length 8, code 80877103.
WANTS_TLS = bytes.fromhex("00000008 04d2162f")


class TlsFront:
    """Speaks TLS with clients, and passes on to a server's Unix socket what they say."""

    def __init__(self, target: Path, certificate: Path, key: Path) -> None:
        self._target = str(target)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            if client.recv(8, socket.MSG_WAITALL) != WANTS_TLS:
                return
            client.sendall(b"S")
            with self._context.wrap_socket(client, server_side=True) as secret:
                server.connect(self._target)
                back = threading.Thread(target=self._pass, args=(server, secret), daemon=True)
                back.start()
                self._pass(secret, server)
                back.join(10)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def front(own_postgres: Any, certificate: tuple[Path, Path]) -> Iterator[TlsFront]:
    front = TlsFront(own_postgres.folder / f".s.PGSQL.{own_postgres.port}", *certificate)
    yield front
    front.close()


@pytest.fixture
def user(own_postgres: Any) -> Iterator[str]:
    """A user who must give a password, and without TLS (over TCP) is not let in at all."""
    rules = own_postgres.folder / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
    with psycopg.connect(own_postgres.url, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SET password_encryption = 'scram-sha-256'")  # PostgreSQL 13: md5
        connection.execute(f"CREATE ROLE tls_user LOGIN PASSWORD '{PASSWORD}'")
        connection.execute("GRANT CREATE ON DATABASE postgres TO tls_user")
        yield "tls_user"
        connection.execute("DROP OWNED BY tls_user CASCADE")
        connection.execute("DROP ROLE tls_user")
        rules.write_text(before)
        connection.execute("SELECT pg_reload_conf()")


def refused(url: str) -> str:
    with pytest.raises(UnavailableError) as caught:
        registry.connect(url, mode="a")
    error: BaseException | None = caught.value
    while error is not None:
        assert PASSWORD not in f"{error} {error!r}"
        error = error.__cause__
    return str(caught.value)


def test_without_tls_nobody_comes_in(own_postgres: Any, user: str) -> None:
    url = f"postgresql://{user}:{PASSWORD}@127.0.0.1:{own_postgres.port}/postgres"
    with psycopg.connect(own_postgres.url) as connection:
        told = "no encryption" if connection.info.server_version >= 140000 else "SSL off"
    for mode in ("disable", "prefer"):
        said = refused(f"{url}?sslmode={mode}")
        assert told in said
        assert "sslmode" in said
    said = refused(f"{url}?sslmode=require")
    assert "server does not support SSL" in said
    assert "sslmode" in said


def test_a_certificate_that_is_not_trusted(
    front: TlsFront, user: str, own_mysql: Any, tmp_path: Path
) -> None:
    url = f"postgresql://{user}:{PASSWORD}@127.0.0.1:{front.port}/postgres?sslmode=verify-full"
    for other in (own_mysql.certificate, tmp_path / "missing.pem"):
        said = refused(f"{url}&sslrootcert={other}")
        assert "certificate" in said
        assert "see sslmode, sslrootcert" in said


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_store_over_tls(
    front: TlsFront, user: str, certificate: tuple[Path, Path], mode: str
) -> None:
    url = f"postgresql://{user}:{PASSWORD}@127.0.0.1:{front.port}/postgres?schema=over_tls"
    adapter = open_store(with_option(url, f"sslmode={mode}&sslrootcert={certificate[0]}"))
    with adapter._pool.acquire() as session:  # type: ignore[attr-defined]
        assert session.connection.pgconn.ssl_in_use
    pages = add_random_pages(adapter, 3)
    assert dict(adapter.read_pages(list(pages))) == pages
    assert PASSWORD not in f"{adapter.url} {adapter!r} {vars(adapter)}"
    adapter.close()


def test_a_connection_that_is_cut_while_tls_is_agreed_on(
    front: TlsFront, user: str, certificate: tuple[Path, Path]
) -> None:
    """As where a server ends just then: the options of TLS were found fault with."""
    place = f"postgresql://{user}:{PASSWORD}@127.0.0.1:{front.port}/postgres?schema=cut_tls"
    trusting = with_option(place, f"sslmode=verify-full&sslrootcert={certificate[0]}")
    with CuttingProxy(trusting) as proxy, contextlib.closing(open_store(proxy.url)) as adapter:
        # Two of them while the user is let in: after a refusal it is asked once more, for its code.
        proxy.cut_after(0, 1000, 1000, 3000, 3000)
        assert adapter.models() == []
        assert proxy.cuts == 5


def test_a_server_that_resets_connections_while_tls_is_agreed_on() -> None:
    def serve() -> None:
        client, _ = listener.accept()
        with client:
            assert client.recv(8, socket.MSG_WAITALL) == WANTS_TLS
            client.sendall(b"S")
            assert client.recv(1000)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        place = f"postgresql://me@127.0.0.1:{listener.getsockname()[1]}/db?sslmode=require"
        said = refused(place)
        thread.join(60)
    assert said.endswith("check that the server runs and can be reached, and try again")
