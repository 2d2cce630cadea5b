# SPDX-License-Identifier: Apache-2.0
"""Space that a vacuum leaves to a server, given back as docs/moving.md says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.errors import ConflictError

MIB = 1 << 20
TEXT = (Path(__file__).parents[2] / "docs" / "moving.md").read_text(encoding="utf-8")


def documented(words: str) -> str:
    """The statement of the docs that begins so."""
    found = re.search(rf"`({words} [^`]+)`", TEXT)
    assert found is not None
    return found[1]


def shrunk(url: str, give_back: Callable[[], object]) -> None:
    rng = np.random.default_rng(0)
    kept = {"w": rng.standard_normal((512, 1024)).astype(np.float32)}
    with pydedup.open(url) as store:
        store.add("gone", {"w": rng.standard_normal((4096, 1024)).astype(np.float32)})
        store.add("kept", kept)  # behind it: what is free at the end of a file, PostgreSQL cuts off
        full = store.stats().stored_bytes
        store.remove("gone")
        store.vacuum()
        figures = store.stats()
        assert figures.page_bytes < 3 * MIB
        assert figures.stored_bytes > full - 2 * MIB, "the file keeps its space"
        give_back()
        assert store.stats().stored_bytes < full - 12 * MIB
        assert store.verify().ok
        assert store.load("kept")["w"].tobytes() == kept["w"].tobytes()


def test_postgres_gives_space_back(postgres_url: str, postgres_schema: str) -> None:
    statement = documented("VACUUM FULL").replace("pydedup.", f"{postgres_schema}.")

    def give_back() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(statement)

    shrunk(
        f"{postgres_url}{'&' if '?' in postgres_url else '?'}schema={postgres_schema}", give_back
    )


def test_mariadb_gives_space_back(mysql_database: str, mysql_run: Callable[..., Any]) -> None:
    shrunk(mysql_database, lambda: mysql_run(mysql_database, documented("OPTIMIZE TABLE")))


def test_mariadb_ends_a_snapshot_that_is_read_meanwhile(
    mysql_database: str, mysql_run: Callable[..., Any]
) -> None:
    """Why the docs say that no copy, backup or verify shall run then; who reads outside goes on."""
    model = {"w": np.arange(1 << 20, dtype=np.float32)}
    with pydedup.open(mysql_database) as store:
        store.add("m", model)
        adapter = store._adapter
        ids = [row.id for row in adapter.page_rows()]

        def read_while_optimized() -> None:
            with adapter.snapshot():
                assert adapter.models()
                mysql_run(mysql_database, documented("OPTIMIZE TABLE"))
                list(adapter.read_pages(ids))

        with pytest.raises(ConflictError, match="try again"):
            read_while_optimized()
        assert store.load("m")["w"].tobytes() == model["w"].tobytes()


def test_a_version_takes_no_pages_for_tables_of_its_own(tmp_path: Path) -> None:
    """SQLite: what a row has beyond a quarter of a page takes a page, however little."""
    path, versions = tmp_path / "s.db", 40
    array = np.random.default_rng(0).standard_normal((288, 288)).astype(np.float32)
    with pydedup.open(path) as store:
        for number in range(versions + 1):
            array[0, 0] = number
            store.add("m", {"w": array}, block_shape=(8, 8))  # 1,296 hashes are 20 KiB
            if number == 0:
                first = store.stats().stored_bytes
        assert (store.stats().stored_bytes - first) / versions < 45_000
        np.testing.assert_array_equal(store.load("m")["w"], array)
