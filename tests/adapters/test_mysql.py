# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: the adapter contract on a real server, and what is special of it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import pytest

from pydedup.testing.adapter_contract import AdapterContract

MIB = 1 << 20
_numbers = itertools.count(1)


def raw_connection(url: str) -> Any:
    """A connection that the adapter knows nothing of, in the database of the URL."""
    import mysql.connector

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    place = {"unix_socket": options["unix_socket"]} if "unix_socket" in options else {}
    if not place:
        place = {"host": parts.hostname, "port": parts.port or 3306}
    return contextlib.closing(
        mysql.connector.connect(
            user=parts.username,
            password=parts.password or "",
            database=parts.path.lstrip("/") or None,
            charset="utf8mb4",
            collation="utf8mb4_bin",
            autocommit=True,
            **place,
        )
    )


def run(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements and return the rows of the last."""
    rows: list[tuple[Any, ...]] = []
    with raw_connection(url) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
    return rows


def with_options(url: str, **options: Any) -> str:
    added = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if urlsplit(url).query else '?'}{added}"


def elsewhere(url: str, database: str, user: str | None = None) -> str:
    """The same server; another database, and another user and password if given."""
    parts = urlsplit(url)
    location = parts.netloc if user is None else f"{user}@{parts.netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(netloc=location, path=f"/{database}"))


@pytest.fixture
def database(mysql_url: str) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    name = f"pydedup_test_{os.getpid()}_{next(_numbers)}"
    run(mysql_url, f"CREATE DATABASE {name} CHARACTER SET latin1")  # not the one that we need
    yield elsewhere(mysql_url, name)
    run(mysql_url, f"DROP DATABASE {name}")


class MysqlContract(AdapterContract):
    @pytest.fixture(autouse=True)
    def _database(self, database: str) -> None:
        self._url = database

    def make_url(self, folder: Path) -> str:
        return self._url

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return with_options(url, timeout=seconds)

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM pydedup_{table} ORDER BY 1"  # noqa: S608
        with raw_connection(url) as connection, connection.cursor(prepared=True) as cursor:
            cursor.execute(query)
            return [
                tuple(bytes(value) if isinstance(value, bytearray) else value for value in row)
                for row in cursor.fetchall()
            ]


class TestMysql(MysqlContract):
    """With the C extension of the driver, if it loads here."""


class TestMysqlWithoutExtension(MysqlContract):
    """As where the extension does not load: after an import of torch."""

    def make_url(self, folder: Path) -> str:
        return with_options(self._url, use_pure="true")
