# SPDX-License-Identifier: Apache-2.0
"""Tables of a store, damaged behind its back."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

from pydedup import registry


def change(url: str, statement: str, *values: object) -> None:
    """Change tables behind pydedup's back: ``{}`` stands for the name that is given next."""
    adapter: Any = registry.connect(url, mode="a")
    try:
        dialect = adapter._sql.dialect
        named = re.sub(r"\{(\w+)\}", lambda found: dialect.name(found[1]), statement)
        with adapter.transaction():
            assert adapter._write(named.replace("?", dialect.placeholder), values)
    finally:
        adapter.close()


def forget_maps(url: str) -> None:
    """Leave a store as one of before certificates told damage of block maps, and of pages."""
    adapter = registry.connect(url, mode="a")
    try:
        with adapter.transaction():
            for row in adapter.models():
                certificate = json.loads(row.certificate)
                assert certificate.pop("maps")
                assert certificate.pop("pages")
                adapter.update_model(row.id, certificate=json.dumps(certificate))
    finally:
        adapter.close()


def flip_last(payload: bytearray) -> None:
    """Change one bit of a page."""
    payload[-1] ^= 1


def put(path: Path, table: str, column: str, value: str, where: str = "1") -> bool:
    """Give a column of rows a value (SQL); whether there were such rows, and SQLite did it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (strict,) = connection.execute(
            "SELECT sql FROM sqlite_master WHERE name = ?", [table]
        ).fetchone()
    loose = re.sub(r" (TEXT|BLOB|REAL|INTEGER)\b(?! PRIMARY)| NOT NULL| STRICT,?", "", strict)
    for sql in (loose, strict):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            if sql is strict:
                changed = connection.execute(
                    f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {where}"  # noqa: S608
                )
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", [sql, table])
            connection.execute("PRAGMA writable_schema = RESET")
    return changed.rowcount > 0
