# SPDX-License-Identifier: Apache-2.0
"""What the tests of MySQL and MariaDB share: a database of the test's own, and both drivers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from mysql.connector import HAVE_CEXT

from pydedup.adapter import Adapter
from pydedup.testing._contract_base import open_store, with_option


@pytest.fixture
def url(mysql_database: str) -> str:
    return mysql_database


@pytest.fixture
def run(mysql_run: Callable[..., list[tuple[Any, ...]]]) -> Callable[..., list[tuple[Any, ...]]]:
    return mysql_run


@pytest.fixture(params=["extension", "pure"] if HAVE_CEXT else ["pure"])
def adapter(url: str, request: pytest.FixtureRequest) -> Iterator[Adapter]:
    adapter = open_store(with_option(url, f"use_pure={request.param == 'pure'}"))
    yield adapter
    adapter.close()


@dataclass
class User:
    """A user with a password of every kind of character, and at first without a privilege."""

    name: str
    secret: str
    _url: str
    _run: Callable[..., object]

    @property
    def url(self) -> str:
        """The test's database, as this user."""
        return self.url_with(self.secret)

    def url_with(self, password: str) -> str:
        """The test's database, as this user, with another password."""
        parts = urlsplit(self._url)
        login = f"{self.name}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}"
        return parts._replace(netloc=login).geturl()

    def grant(self, privileges: str) -> None:
        """Let the user do these on the test's database."""
        database = urlsplit(self._url).path.strip("/")
        self._run(self._url, f"GRANT {privileges} ON {database}.* TO {self.name}")


@pytest.fixture
def user(url: str, mysql_run: Callable[..., object]) -> Iterator[User]:
    name, secret = f"u{secrets.token_hex(6)}", "s3cret@/:&?#%"
    mysql_run(url, f"CREATE USER {name} IDENTIFIED BY '{secret}'")
    yield User(name, secret, url, mysql_run)
    mysql_run(url, f"DROP USER {name}")
