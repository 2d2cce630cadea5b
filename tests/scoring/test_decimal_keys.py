# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""Keys that are decimals: exact beyond what a float holds, and harmless to the driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter_options import RangeAdapter
from pydedup.testing.rows_contract import read_ranges

from .conftest import Tables

ROWS = 90
#: Of glibc: with it malloc looks at what was written around its memory.
CHECKED_MALLOC = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


@pytest.fixture
def table(tables: Tables, new_name: Callable[[], str]) -> str:
    """A hundredth from one key to the next; as floats, which SQLite keeps, many are the same."""
    name = new_name()
    if tables.kind == "sqlite":
        return name
    tables.run(f"CREATE TABLE {name} (k DECIMAL(30, 2) NOT NULL PRIMARY KEY, n INTEGER)")
    base = Decimal(10**20)
    rows = [[str(base + Decimal(n) / 100), n] for n in range(ROWS)]
    tables.run(f"INSERT INTO {name} VALUES (?, ?)", rows)
    return name


def test_ranges_are_exact(tables: Tables, table: str) -> None:
    if tables.kind == "sqlite":
        return
    rows = registry.connect_rows(tables.url)
    try:
        assert isinstance(rows, RangeAdapter)
        bounds, parts = read_ranges(rows, f"SELECT k, n FROM {table}", 20)
        assert [len(part) for part in parts] == [20, 20, 20, 20, 10]
        asked = [*bounds, Decimal(10**20) + 5]
        assert rows.present_keys(rows.full_table_name(table), "k", asked) == set(bounds)
    finally:
        rows.close()


def test_a_power_of_ten_is_found(tables: Tables, table: str) -> None:
    """Which a decimal may be written as: it has no digits behind a point then, and not -20."""
    if tables.kind == "sqlite":
        return
    rows = registry.connect_rows(tables.url)
    try:
        there, gone = Decimal("1E+20"), Decimal("2E+20")
        assert rows.present_keys(rows.full_table_name(table), "k", [there, gone]) == {there}
    finally:
        rows.close()


READ = """
import sys
import mysql.connector
from pydedup import registry
from pydedup.testing.rows_contract import read_ranges
rows = registry.connect_rows(sys.argv[1])
for _ in range(10):
    read_ranges(rows, sys.argv[2], 20)
rows.close()
"""


def test_the_driver_keeps_to_its_memory(tables: Tables, table: str) -> None:
    """Given a Decimal, mysql-connector-python 9 writes where it may not."""
    if tables.kind != "mysql" or not CHECKED_MALLOC.exists():
        return
    checks = {"LD_PRELOAD": str(CHECKED_MALLOC), "MALLOC_CHECK_": "3", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-P", "-c", READ, tables.url, f"SELECT k, n FROM {table}"]
    ran = subprocess.run(command, env={**os.environ, **checks}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
