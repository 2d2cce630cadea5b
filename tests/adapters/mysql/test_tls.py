# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: a server that demands TLS, with a certificate that we made."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mysql.connector import HAVE_CEXT

from pydedup import registry
from pydedup.errors import UnavailableError
from pydedup.testing._contract_base import add_random_pages, open_store, with_option
from pydedup.testing.proxy import CuttingProxy

PASSWORD = "right-0f-c0urse"


@pytest.fixture(scope="module")
def demanding(own_mysql: Any, mysql_run: Callable[..., object]) -> Iterator[str]:
    """URL by which a user comes over TCP to a server that takes nobody there without TLS."""
    mysql_run(
        own_mysql.url,
        f"CREATE USER careful IDENTIFIED BY '{PASSWORD}'",
        "GRANT ALL ON pydedup.* TO careful",
        "SET GLOBAL require_secure_transport = ON",
    )
    yield f"mysql://careful:{PASSWORD}@127.0.0.1:{own_mysql.port}/pydedup"
    mysql_run(own_mysql.url, "SET GLOBAL require_secure_transport = OFF", "DROP USER careful")


@pytest.fixture(params=["extension", "pure"] if HAVE_CEXT else ["pure"])
def url(demanding: str, request: pytest.FixtureRequest) -> str:
    return with_option(demanding, f"use_pure={request.param == 'pure'}")


def refused(url: str) -> str:
    with pytest.raises(UnavailableError) as caught:
        registry.connect(url, mode="a")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_without_tls_nobody_comes_in(url: str) -> None:
    said = refused(f"{url}&ssl_disabled=true")
    # MariaDB 10.11 says no more than that access is denied.
    assert "insecure transport" in said or "require_secure_transport" in said
    assert "ssl_disabled" in said


def test_a_certificate_that_is_not_trusted(url: str, certificate: tuple[Path, Path]) -> None:
    for option in ("", "&ssl_verify_cert=true"):  # naming an authority asks for it
        said = refused(f"{url}{option}&ssl_ca={certificate[0]}")
        assert "certificate" in said
        assert "ssl_ca" in said


@pytest.mark.parametrize("verify", ["", "&ssl_verify_cert=true", "&ssl_verify_identity=true"])
def test_a_store_over_tls(url: str, own_mysql: Any, verify: str) -> None:
    trust = f"&ssl_ca={own_mysql.certificate}" if verify else ""
    adapter = open_store(f"{url}{trust}{verify}")
    ((_, cipher),) = adapter._query("SHOW SESSION STATUS LIKE 'ssl_cipher'")  # type: ignore[attr-defined]
    assert cipher
    pages = add_random_pages(adapter, 3)
    assert dict(adapter.read_pages(list(pages))) == pages
    assert PASSWORD not in f"{adapter.url} {adapter!r} {vars(adapter)}"
    adapter.close()


def test_a_connection_that_is_cut_while_tls_is_agreed_on(url: str) -> None:
    """As where a server ends just then: the options of TLS were found fault with."""
    with CuttingProxy(url) as proxy, contextlib.closing(open_store(proxy.url)) as adapter:
        proxy.connections = 0
        proxy.cut_after(0, 1000, 1000)
        assert adapter.models() == []
        assert (proxy.connections, proxy.cuts) == (3, 3)


@pytest.mark.skipif(not HAVE_CEXT, reason="the pure driver names the error of the system")
def test_a_server_that_resets_connections_while_tls_is_agreed_on(
    demanding: str, own_mysql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.0)

    def serve() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(("127.0.0.1", own_mysql.port)) as server:
            client.sendall(server.recv(1000))
            assert client.recv(1000)  # to go on by TLS
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        there = demanding.replace(f":{own_mysql.port}/", f":{listener.getsockname()[1]}/")
        said = refused(f"{there}?use_pure=false")
        thread.join(60)
    assert said.endswith("check that the server runs and can be reached, and try again")
