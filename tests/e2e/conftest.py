# SPDX-License-Identifier: Apache-2.0
"""Stores on every back end, for tests of what must be the same on all of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pydedup import registry

BACKENDS = ("sqlite", "postgres", "mysql")


@pytest.fixture(params=BACKENDS)
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty place for a store; the test runs once on each back end."""
    name = f"test_{secrets.token_hex(6)}"
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/{name}.db"
    elif request.param == "postgres":
        server = request.getfixturevalue("postgres_url")
        yield f"{server}{'&' if '?' in server else '?'}schema={name}"
        _run(server, f"DROP SCHEMA IF EXISTS {name} CASCADE")
    else:
        server = request.getfixturevalue("mysql_url")
        _run(server, f"CREATE DATABASE {name}")
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
        _run(server, f"DROP DATABASE {name}")


def _run(url: str, statement: str) -> None:
    adapter: Any = registry.connect(url, mode="a")
    try:
        with adapter._pool.acquire() as session:
            adapter._run(session, statement, (), lambda cursor: None)
    finally:
        adapter.close()


@pytest.fixture
def change_page() -> Callable[[str, int, Callable[[bytearray], Any]], None]:
    """Change the stored bytes of a page, as a failing disk does: nothing else is told."""

    def change(url: str, page_id: int, what: Callable[[bytearray], Any]) -> None:
        adapter: Any = registry.connect(url, mode="a")
        try:
            ((_, payload),) = adapter.read_pages([page_id])
            changed = bytearray(payload)
            what(changed)
            dialect = adapter._sql.dialect
            mark = dialect.placeholder
            with adapter.transaction():
                adapter._write(
                    f"UPDATE {dialect.name('pages')} SET payload = {mark} WHERE id = {mark}",  # noqa: S608
                    [bytes(changed), page_id],
                )
        finally:
            adapter.close()

    return change
