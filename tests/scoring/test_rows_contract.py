# SPDX-License-Identifier: Apache-2.0
"""The contract of tables of users, on each database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pydedup.testing.rows_contract import RangeAdapterContract

from .conftest import Tables


class TestRowsOfUsers(RangeAdapterContract):
    @pytest.fixture(autouse=True)
    def _database(self, tables: Tables) -> None:
        self.tables = tables

    def make_url(self, folder: Path) -> str:
        return self.tables.url

    def run(
        self, url: str, statement: str, rows: Sequence[Sequence[object]] | None = None
    ) -> list[tuple[Any, ...]]:
        return self.tables.run(statement, rows)
