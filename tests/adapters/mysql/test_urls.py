# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: what a URL means to the driver, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pydedup.adapters._mysql_url import CONNECT_SECONDS, locate
from pydedup.errors import ArgumentError, StoreError
from pydedup.testing._contract_base import open_store, with_option

WAIT = {"connection_timeout": CONNECT_SECONDS}


@pytest.fixture(autouse=True)
def no_password_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MYSQL_PWD", raising=False)


@pytest.mark.parametrize(
    ("url", "shown", "options"),
    [
        ("mysql://h/db", "mysql://h/db", {"host": "h", "database": "db"}),
        (
            "mysql://me@[::1]:3307/db",  # shown as me@::1:3307
            "mysql://me@[::1]:3307/db",
            {"host": "::1", "port": 3307, "database": "db", "user": "me"},
        ),
        (
            "mysql://[fe80::1%25eth0]/db",
            "mysql://[fe80::1%25eth0]/db",
            {"host": "fe80::1%eth0", "database": "db"},
        ),
        ("mysql:///db", "mysql://localhost/db", {"host": "localhost", "database": "db"}),
        (
            "mysql://me@/d%20b",
            "mysql://me@localhost/d%20b",
            {"host": "localhost", "database": "d b", "user": "me"},
        ),
        (
            "mariadb://m%40e:p%2Fw@h:3307/db?prefix=acme_&unix_socket=/s&compress=no&use_pure=1",
            "mariadb://m@e@h:3307/db?unix_socket=/s&prefix=acme_",
            {"host": "h", "port": 3307, "database": "db", "user": "m@e", "password": "p/w"}
            | {"unix_socket": "/s", "compress": False, "use_pure": True},
        ),
        (
            "mysql://h/db?connect_timeout=0.2&read_timeout=2.6&tls_versions=TLSv1.2,TLSv1.3",
            "mysql://h/db",
            {"host": "h", "database": "db", "connection_timeout": 1, "read_timeout": 3}
            | {"tls_versions": ["TLSv1.2", "TLSv1.3"]},
        ),
    ],
)
def test_what_the_driver_is_given(url: str, shown: str, options: dict[str, Any]) -> None:
    place = locate(url)
    assert place.url == shown
    assert place.options == WAIT | options
    assert place.database == options["database"]


def test_a_schema_is_the_database_as_it_is_written() -> None:
    place = locate("mysql://h/other", "a/b%20")
    assert (place.database, place.options["database"]) == ("a/b%20", "a/b%20")
    assert place.url == "mysql://h/a/b%2520"


@pytest.mark.parametrize(
    ("url", "schema"),
    [
        ("mysql://h", None),
        ("mysql://h/", None),
        ("mysql://h/a/b", None),
        ("mysql://h/db", ""),
        ("mysql://h/db", "a\0"),
    ],
)
def test_what_names_no_database(url: str, schema: str | None) -> None:
    with pytest.raises(ArgumentError, match="names no database; write mysql://user:password@"):
        locate(url, schema)


def test_tls_that_is_asked_for_and_forbidden() -> None:
    there = __file__
    with pytest.raises(ArgumentError, match="ssl_key asks for TLS, and ssl_disabled=true"):
        locate(f"mysql://h/db?ssl_disabled=true&ssl_key={there}")
    options = locate("mysql://h/db?ssl_disabled=true&ssl_verify_cert=false").options
    assert options == WAIT | {"host": "h", "database": "db"} | {
        "ssl_disabled": True,
        "ssl_verify_cert": False,
    }


@pytest.mark.parametrize(("asked", "seconds"), [("7.2", 8), ("0", 1)])
def test_the_timeout_is_that_of_every_lock(url: str, asked: str, seconds: int) -> None:
    """In whole seconds, of which the server wants one at least."""
    adapter: Any = open_store(with_option(url, f"timeout={asked}"))
    waits = "SELECT @@innodb_lock_wait_timeout, @@lock_wait_timeout"
    assert adapter._query(waits) == [(seconds, seconds)]
    adapter.close()


def test_no_server_gets_a_file_of_this_machine(
    adapter: Any, url: str, run: Any, tmp_path: Path
) -> None:
    """It may answer any statement by asking for one, of any name; a driver that may sends it."""
    file = tmp_path / "secret"
    file.write_text("s3cret\n")
    ((before,),) = run(url, "CREATE TABLE got (line TEXT)", "SELECT @@GLOBAL.local_infile")
    run(url, "SET GLOBAL local_infile = ON")
    try:
        with pytest.raises(StoreError):
            adapter._define(f"LOAD DATA LOCAL INFILE '{file}' INTO TABLE got")
    finally:
        run(url, f"SET GLOBAL local_infile = {before}")
    assert run(url, "SELECT line FROM got") == []
