# SPDX-License-Identifier: Apache-2.0
"""What pydedup writes, held against the documented limits of engines that cannot be had here.

The limits, with where they are documented, are in docs/sharding.md. What is measured is what goes
through the adapter protocol: the largest row, and the bytes of the largest transaction, once as it
is written, and once as an engine counts it that keeps a row as one value and writes all of it
again when one column changes (TiDB, CockroachDB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pydedup import policies, registry
from pydedup.adapter import Adapter
from pydedup.ingest import pages as page_writing
from pydedup.ingest import write
from pydedup.store import Store
from pydedup.testing.faults import FaultyAdapter

MIB = 1 << 20
DOCUMENT = Path(__file__).parents[2] / "docs" / "sharding.md"

#: Engine -> (most bytes of a row, most bytes of a transaction or of what takes its place).
LIMITS = {
    "CockroachDB": (16 * MIB, 64 * MIB),
    "TiDB": (6 * MIB, 100 * MIB),
    "YugabyteDB": (32_000_000, int(0.95 * 255 * MIB)),
    "Vitess": (16 * MIB, None),
}
#: What a row or a key takes beside its values; generous.
OVERHEAD = 64


def size_of(value: Any) -> int:
    """Bytes of the values of a row, or of a part of it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value)
    if isinstance(value, str):
        return len(value.encode())
    if dataclasses.is_dataclass(value):
        return sum(size_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    return 8


class Recorder(FaultyAdapter):
    """Counts what is written, by row and by transaction."""

    largest_row = largest_as_written = largest_rewritten = 0

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter)
        self._as_written = self._rewritten = 0
        self._pages: dict[int, int] = {}

    def _count(self, *rows: int, before: int = 0) -> None:
        self.largest_row = max(self.largest_row, *rows) if rows else self.largest_row
        self._as_written += sum(rows) + OVERHEAD * len(rows)
        self._rewritten += sum(rows) + OVERHEAD * len(rows) + before

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("insert_", "put_", "replace_")):
            args = tuple(
                list(arg) if isinstance(arg, Iterable) and not isinstance(arg, str | dict) else arg
                for arg in args
            )
        result = super()._call(name, *args, **kwargs)
        if name == "insert_pages":
            sizes = [size_of(page) for page in args[0]]
            self._pages.update(zip(result, sizes, strict=True))
            self._count(*sizes)
        elif name == "replace_block_maps":
            self._count(*map(size_of, itertools.chain.from_iterable(args[1].values())))
        elif name == "set_page_state":
            ids = list(args[0])
            self._count(*[32] * len(ids), before=sum(self._pages.get(n, 0) for n in ids))
        elif name.startswith("insert_") and isinstance(args[-1], list):
            self._count(*map(size_of, args[-1]))
        elif name.startswith(("insert_", "put_", "set_", "update_", "bump_")):
            self._count(size_of(args))
        return result

    @contextlib.contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        if name == "transaction":
            self._as_written = self._rewritten = 0
        with super()._scope(name):
            yield
        if name == "transaction":
            self.largest_as_written = max(self.largest_as_written, self._as_written)
            self.largest_rewritten = max(self.largest_rewritten, self._rewritten)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """What an add of 110 MB wrote, and another of the same with noise."""
    url = f"sqlite:///{tmp_path_factory.mktemp('limits') / 'store.db'}"
    adapter = registry.connect(url, mode="a")
    adapter.create_schema({"hash_version": "1", "page_format": "1", "store_id": "0"})
    recorder = Recorder(adapter)
    rng = np.random.default_rng(0)
    model = {f"w{i}": rng.standard_normal((1024, 2700), np.float32) for i in range(10)}
    with Store(cast(Adapter, recorder), 128 * MIB) as store:
        store.add("base@1", model, policy=policies.Exact())
        noisy = {name: array * np.float32(1.0001) for name, array in list(model.items())[:2]}
        store.add("near@1", noisy, policy=policies.Lossless())
    return recorder


@pytest.mark.parametrize("engine", LIMITS)
def test_rows_and_staging_are_within_the_limits(recorded: Recorder, engine: str) -> None:
    row, transaction = LIMITS[engine]
    assert MIB // 2 < recorded.largest_row <= MIB + 100  # a page, and its checksum
    assert recorded.largest_row <= row
    if transaction is not None:
        assert 4 * MIB < recorded.largest_as_written <= transaction


def test_transactions_are_bounded_by_what_staging_gathers(recorded: Recorder) -> None:
    pages = page_writing.PAGES_PER_TRANSACTION
    assert recorded.largest_as_written <= pages * MIB + write._BYTES_PER_TRANSACTION


def test_where_rows_are_written_anew_publishing_is_not(recorded: Recorder) -> None:
    """The document says so: publishing changes the state of each new page."""
    _, most = LIMITS["TiDB"]
    assert most is not None
    assert recorded.largest_rewritten > most


def test_the_document_names_the_same_limits() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index("## Distributed engines") :]
    for engine, words in {
        "CockroachDB": ("16 MiB", "64 MiB", "1 MB"),
        "TiDB": ("6 MiB", "100 MiB", "1 GiB"),
        "YugabyteDB": ("32 MB", "255 MiB"),
        "Vitess": ("16 MiB", "10,000"),
    }.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {engine}")]
        for word in words:
            assert word in line, f"{engine}: {word}"
