# SPDX-License-Identifier: Apache-2.0
"""What the tests of SQLite share: a store in a file, pages in it, and a small disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.testing.disks import SmallDisk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def adapter(path: Path) -> Iterator[Adapter]:
    adapter = open_store(path)
    yield adapter
    adapter.close()


@pytest.fixture
def disk(tmp_path: Path, new_disk: Callable[[Path, int], SmallDisk]) -> SmallDisk:
    return new_disk(tmp_path / "disk", 16)


def open_store(path: Path) -> Adapter:
    adapter = registry.connect(f"sqlite:///{path}", mode="a")
    adapter.create_schema({})
    return adapter


def add_pages(adapter: Adapter, count: int, state: str = LIVE) -> list[int]:
    """Add pages of a MiB, and a change to the epoch, in one transaction."""
    with adapter.transaction():
        adapter.bump_epoch()
        return adapter.insert_pages(
            [(bytes(16), random.Random(i).randbytes(1 << 20)) for i in range(count)], state=state
        )
