# SPDX-License-Identifier: Apache-2.0
"""DuckDB: the contract of pydedup's adapters, and a store's life from beginning to end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import ArgumentError, NotAStoreError, UnavailableError
from pydedup.testing.adapter_contract import AdapterContract


class TestDuckdb(AdapterContract):
    def make_url(self, folder: Path) -> str:
        return f"duckdb:///{folder}/store.duckdb"

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return f"{url}?timeout={seconds}"

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        with duckdb.connect(url.removeprefix("duckdb:///")) as connection:
            query = f"SELECT {', '.join(columns)} FROM pydedup_{table} ORDER BY 1"  # noqa: S608
            return connection.execute(query).fetchall()


def test_a_store_lives_in_duckdb(tmp_path: Path) -> None:
    url = f"duckdb:///{tmp_path}/store.duckdb"
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((2000, 64)).astype(np.float32)}
    tuned = {"w": base["w"].copy()}
    tuned["w"][:200] += 1
    assert "duckdb" in registry.schemes()
    with pydedup.open(url) as store:
        store.add("net@1", base)
        assert store.add("net@2", tuned).shared_blocks > 0
        store.alias("net", "prod", "2")
    with pydedup.open(url, mode="r") as store:
        assert np.array_equal(store.load("net@prod")["w"], tuned["w"])
        x = rng.standard_normal((3, 64)).astype(np.float32)
        product = store.tensor("net@1", "w").matmul(x)
        np.testing.assert_allclose(product, x @ base["w"].T, rtol=1e-4, atol=1e-4)
        assert len(store.sharing()) == 1
    with pydedup.open(url) as store:
        store.remove("net@1")
        store.vacuum()
        assert np.array_equal(store.load("net")["w"], tuned["w"])
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


@pytest.mark.parametrize("url", ["duckdb://host/x", "duckdb:///", "duckdb:///x?timeout=soon"])
def test_urls_that_mean_nothing(url: str) -> None:
    with pytest.raises(ArgumentError):
        registry.connect(url, mode="a")


def test_a_file_that_another_process_creates_meanwhile_is_waited_for(tmp_path: Path) -> None:
    path, made = tmp_path / "store.duckdb", tmp_path / "made.duckdb"
    duckdb.connect(made).close()
    path.write_bytes(bytes(4096))  # as it is before its first page is written
    creating = threading.Timer(0.3, made.replace, [path])
    creating.start()
    with pydedup.open(f"duckdb:///{path}") as store:
        assert not creating.is_alive()
        store.add("m@1", {"w": np.ones((8, 8), np.float32)})
        assert store.verify().ok


def test_a_file_of_others_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(UnavailableError, match=r"not a valid DuckDB database"):
        pydedup.open(f"duckdb:///{path}")
    assert path.read_text() == "mine"


def test_a_missing_file_is_not_created_by_reading(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="mode 'a'"):
        pydedup.open(f"duckdb:///{tmp_path}/none.duckdb", mode="r")
    assert list(tmp_path.iterdir()) == []
