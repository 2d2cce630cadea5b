# SPDX-License-Identifier: Apache-2.0
"""A store over three servers of PostgreSQL: the adapter contract, each page on two of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pydedup.testing.adapter_contract import AdapterContract
from pydedup.testing.shards import ShardedPlace


class TestShards(AdapterContract):
    @pytest.fixture(autouse=True)
    def _place(self, place: ShardedPlace) -> None:
        self.place = place

    def make_url(self, folder: Path) -> str:
        return self.place.url(replicas=2)

    def with_lock_wait(self, url: str, seconds: float) -> str:
        coordinator, _, shards = url.partition("|")
        return f"{coordinator}&timeout={seconds}|{shards}"

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM {{}}.{table} ORDER BY 1"  # noqa: S608
        rows = self.place.rows(0, query)
        if "payload" not in columns or table != "pages":
            return rows
        ids = [number for (number,) in self.place.rows(0, "SELECT id FROM {}.pages ORDER BY 1")]
        copies = self.place.payloads()
        assert all(len(copies[number]) == 1 for number in ids), "copies of a page differ"
        at = columns.index("payload")
        return [
            (*row[:at], copies[number].pop(), *row[at + 1 :])
            for row, number in zip(rows, ids, strict=True)
        ]
