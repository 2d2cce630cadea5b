# SPDX-License-Identifier: Apache-2.0
"""What several files of tests of one database share."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest


@pytest.fixture(scope="session")
def mysql_connect() -> Callable[[str], Any]:
    """Open a connection that the adapter knows nothing of, as a context manager that closes it."""

    def connect(url: str) -> Any:
        import mysql.connector

        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        place: dict[str, Any] = {"host": parts.hostname, "port": parts.port or 3306}
        if "unix_socket" in options:
            place = {"unix_socket": options["unix_socket"]}
        connection = mysql.connector.connect(
            user=parts.username,
            password=parts.password or "",
            database=parts.path.lstrip("/"),
            charset="utf8mb4",
            collation="utf8mb4_bin",
            autocommit=True,
            **place,
        )
        return contextlib.closing(connection)

    return connect


@pytest.fixture(scope="session")
def mysql_run(mysql_connect: Callable[[str], Any]) -> Callable[..., list[tuple[Any, ...]]]:
    """Run statements at a URL and return the rows of the last."""

    def run(url: str, *statements: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        with mysql_connect(url) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
                rows = cursor.fetchall() if cursor.description else []
        return rows

    return run


@pytest.fixture
def mysql_database(
    mysql_url: str, mysql_run: Callable[..., list[tuple[Any, ...]]]
) -> Iterator[str]:
    """The URL of an empty database of the test's own, whose defaults are none that we need."""
    name = f"pydedup_{secrets.token_hex(6)}"
    mysql_run(mysql_url, f"CREATE DATABASE {name} CHARACTER SET latin1")
    yield urlsplit(mysql_url)._replace(path=f"/{name}").geturl()
    mysql_run(mysql_url, f"DROP DATABASE {name}")
