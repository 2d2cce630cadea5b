# SPDX-License-Identifier: Apache-2.0
"""All that a store has recorded, to be compared with what it has later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pydedup
from pydedup.adapters._schema import TABLES


@pytest.fixture(scope="session")
def all_rows() -> Callable[[pydedup.Store], dict[str, list[str]]]:
    """Return the rows of each table, but for the time of an add and the count of changes."""
    return _all_rows


def _all_rows(store: pydedup.Store) -> dict[str, list[str]]:
    adapter: Any = store._adapter
    found = {}
    for table, definition in TABLES.items():
        names = [name for name in definition.names if name != "created_at"]
        sql = (
            f"SELECT {adapter._sql.dialect.columns(names)} FROM {adapter._sql.dialect.name(table)}"  # noqa: S608
        )
        rows = [row for row in adapter._query(sql) if row[0] not in ("epoch", b"epoch")]
        found[table] = sorted(map(repr, rows))
    return found
