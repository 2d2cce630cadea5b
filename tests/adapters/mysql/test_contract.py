# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: the adapter contract on a real server, with both forms of the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pydedup.testing._contract_base import with_option
from pydedup.testing.adapter_contract import AdapterContract


class MysqlContract(AdapterContract):
    prefix = "pydedup_"

    @pytest.fixture(autouse=True)
    def _database(self, mysql_database: str, mysql_connect: Callable[[str], Any]) -> None:
        self._url, self._raw = mysql_database, mysql_connect

    def make_url(self, folder: Path) -> str:
        return self._url

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return with_option(url, f"timeout={seconds}")

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM {self.prefix}{table} ORDER BY 1"  # noqa: S608
        with self._raw(url) as connection, connection.cursor(prepared=True) as cursor:
            cursor.execute(query)
            return [
                tuple(bytes(value) if isinstance(value, bytearray) else value for value in row)
                for row in cursor.fetchall()
            ]


class TestMysql(MysqlContract):
    """With the C extension of the driver, if it loads here."""


class TestMysqlWithoutExtension(MysqlContract):
    """As where the extension does not load, after an import of torch; and with another prefix."""

    prefix = "acme_x"

    def make_url(self, folder: Path) -> str:
        return with_option(self._url, f"use_pure=true&prefix={self.prefix}")
