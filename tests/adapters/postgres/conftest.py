# SPDX-License-Identifier: Apache-2.0
"""What the tests of PostgreSQL share: a schema of the test's own, and ways to look behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pydedup.adapter import Adapter
from pydedup.testing._contract_base import open_store, with_option


@pytest.fixture
def schema(postgres_schema: str) -> str:
    return postgres_schema


@pytest.fixture
def url(postgres_url: str, schema: str) -> str:
    return with_option(postgres_url, f"schema={schema}")


@pytest.fixture
def adapter(url: str) -> Iterator[Adapter]:
    adapter = open_store(url)
    yield adapter
    adapter.close()


@pytest.fixture
def sql(postgres_url: str) -> Iterator[Any]:
    """Run a statement as the superuser, and get its rows."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:

        def run(statement: str, *parameters: Any) -> list[Any]:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
def role(postgres_user: tuple[str, str]) -> str:
    """A user that may do nothing yet."""
    return postgres_user[0]
