# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: the adapter contract on a real server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pydedup.testing._contract_base import with_option
from pydedup.testing.adapter_contract import AdapterContract


class TestPostgres(AdapterContract):
    @pytest.fixture(autouse=True)
    def _place(self, postgres_url: str, schema: str) -> None:
        self.server, self.schema = postgres_url, schema

    def make_url(self, folder: Path) -> str:
        return with_option(self.server, f"schema={self.schema}")

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return with_option(url, f"timeout={seconds}")

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM {self.schema}.{table} ORDER BY 1"  # noqa: S608
        with psycopg.connect(self.server) as connection:
            return connection.execute(query, binary=True).fetchall()
