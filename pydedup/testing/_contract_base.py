# SPDX-License-Identifier: Apache-2.0
"""What the parts of the adapter contract share: what a subclass gives, fixtures, sample rows."""

from __future__ import annotations

import abc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, STAGING, Adapter, ModelRow, TensorRow

__all__ = [
    "EVERY_BYTE",
    "HOSTILE_NAMES",
    "META",
    "PATIENCE_SECONDS",
    "ContractBase",
    "add_pages",
    "add_random_pages",
    "checksum_of",
    "in_thread",
    "model_row",
    "open_store",
    "tensor_row",
    "with_option",
]

R = TypeVar("R")

META: Final = {"hash_version": "1", "greeting": "grüß 'dich'; \N{SNOWMAN}"}
EVERY_BYTE: Final = bytes(range(256))

HOSTILE_NAMES: Final = (
    "plain",
    "it's",
    'dou"ble',
    "back`tick",
    "semi;colon -- comment",
    "'; DROP TABLE pydedup_models; --",
    "100%s %d ? :name $1",
    "back\\slash\\'",
    "trailing ",
    " leading",
    "UPPER",
    "upper",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",  # one code point
    "e\N{COMBINING ACUTE ACCENT}",  # looks the same, two
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u200b",
    "%",
    "_",
    "x" * 255,
    "\N{GRINNING FACE}" * 255,
)

#: How long a test waits for a thread or process before it fails.
PATIENCE_SECONDS: Final = 60.0


class ContractBase(abc.ABC):
    """What a subclass must give."""

    @abc.abstractmethod
    def make_url(self, folder: Path) -> str:
        """Return the URL of an empty place for a store; ``folder`` is empty and writable."""

    @abc.abstractmethod
    def with_lock_wait(self, url: str, seconds: float) -> str:
        """Return the URL with that limit on waiting for another writer."""

    @abc.abstractmethod
    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return all rows of a table, named as in ``pydedup.adapter`` (``"pages"``), ascending.

        Read through a connection that the adapter knows nothing of: bytes as ``bytes``, text as
        ``str``.
        """

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        """Give an empty place."""
        folder = tmp_path / "database"
        folder.mkdir()
        return self.make_url(folder)

    @pytest.fixture
    def adapter(self, url: str) -> Iterator[Adapter]:
        """Give a store without a model."""
        adapter = self.open(url)
        yield adapter
        adapter.close()

    def open(self, url: str) -> Adapter:
        """Return the store at this place, created when missing."""
        return open_store(url)


def open_store(url: str) -> Adapter:
    """Return the store at a place, created when missing."""
    adapter = registry.connect(url, mode="a")
    try:
        adapter.create_schema(META)
    except BaseException:
        adapter.close()
        raise
    return adapter


def with_option(url: str, option: str) -> str:
    """Return the URL with one more ``name=value``."""
    return f"{url}{'&' if '?' in url else '?'}{option}"


def model_row(name: str = "m", version: str = "1", state: str = STAGING, **kwargs: Any) -> ModelRow:
    """Return a model row that is not inserted yet."""
    values: dict[str, Any] = {
        "created_at": 1_700_000_000.123456,
        "policy": "lossless",
        "certificate": '{"policy": "lossless"}',
        "metadata": '{"task": "\u00fc"}',
        "logical_bytes": 3 << 40,
        "digest": EVERY_BYTE[:16],
    }
    return ModelRow(id=0, name=name, version=version, state=state, **{**values, **kwargs})


def tensor_row(model_id: int, ordinal: int, name: str = "w") -> TensorRow:
    """Return a tensor row."""
    return TensorRow(model_id, ordinal, name, "f32", "[3, 4]", "[64, 64]")


def checksum_of(number: int) -> bytes:
    """Return 16 bytes made of a number: a checksum, or a hash."""
    return number.to_bytes(16, "little")


def add_pages(adapter: Adapter, count: int, *, state: str = LIVE, size: int = 100) -> list[int]:
    """Insert pages in a transaction of their own; page ``i`` holds two blocks with hash ``i``."""
    pages = [(checksum_of(i), bytes([i % 256]) * size) for i in range(count)]
    with adapter.transaction():
        ids = adapter.insert_pages(pages, state=state)
        adapter.insert_blocks(
            (checksum_of(i), page_id, slot, None)
            for i, page_id in enumerate(ids)
            for slot in (1, 0)
        )
    return ids


def add_random_pages(adapter: Adapter, count: int, *, size: int = 1 << 20) -> dict[int, bytes]:
    """Insert live pages in a transaction of their own; return what they hold."""
    payloads = [random.Random(i).randbytes(size) for i in range(count)]
    with adapter.transaction():
        ids = adapter.insert_pages(
            [(checksum_of(i), payload) for i, payload in enumerate(payloads)], state=LIVE
        )
    return dict(zip(ids, payloads, strict=True))


def in_thread(function: Callable[[], R]) -> R:
    """Return what the function returns in a thread of its own, or raise what it raises."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "the thread is still waiting"
    if errors:
        raise errors[0]
    return results[0]
