# SPDX-License-Identifier: Apache-2.0
"""Opening of stores: what is checked first, and how a memory budget is divided."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydedup import codec, config, registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.adapter_options import ReadIntoAdapter, RowAdapter, only_sound_rows, page_copies
from pydedup.catalog import recorded_pages
from pydedup.errors import (
    ArgumentError,
    MissingStoreError,
    NotFoundError,
    PydedupError,
    ReadOnlyError,
    SchemaVersionError,
    StorageFullError,
)
from pydedup.hashing import HASH_VERSION
from pydedup.layout import PAGE_BYTES
from pydedup.pool import PagePool
from pydedup.replacement import DEFAULT_POLICY
from pydedup.text import listed
from pydedup.words import OpenMode, Replacement

if TYPE_CHECKING:
    from pydedup.moving.source import End

__all__ = [
    "check_store",
    "check_writable",
    "connect_store",
    "open_end",
    "open_rows",
    "pool_bytes",
    "pool_of",
]

# Part of the memory budget that is not the pool's: buffers of adds and of kernels.
_SCRATCH_BYTES = 48 * 1024 * 1024


def connect_store(
    url: str | os.PathLike[str], *, mode: OpenMode, schema: str | None = None
) -> Adapter:
    """Return the adapter of a store, which is created where it is missing and ``mode`` is "a".

    Raises what `pydedup.open` does.
    """
    url = registry.place_of(url)
    config.threads()  # refuses a setting that the core would take for none
    config.kernels()  # or one that is no fault of what is computed later: a row, a request, a page
    adapter = registry.connect(url, mode=mode, schema=schema)
    try:
        _check_schema(adapter, mode)
        return adapter
    except BaseException:
        adapter.close()
        raise


def _check_schema(adapter: Adapter, mode: OpenMode) -> None:
    version = adapter.schema_version()
    if version is None:
        if mode == "r":
            raise MissingStoreError(f"{adapter.url} holds no store")
        import uuid

        meta = {
            "store_id": uuid.uuid4().hex,
            "hash_version": str(HASH_VERSION),
            "page_format": str(codec.PAGE_VERSION),
        }
        try:
            adapter.create_schema(meta)
        except StorageFullError as exc:  # there is nothing to vacuum
            raise StorageFullError(
                f"no room for a new store in {adapter.url} ({exc.__cause__ or exc}); free some "
                "space, a few MiB, and open it again"
            ) from exc
    elif version < SCHEMA_VERSION:
        if adapter.read_only:
            raise SchemaVersionError(
                f"{adapter.url} was written by an older pydedup (schema {version}, this one reads "
                f"{SCHEMA_VERSION}); to migrate it, open it once for writing (mode 'a', or "
                "`pydedup vacuum`) as the user who created it (docs/sql.md, Roles)"
            )
        adapter.migrate_schema()
    elif version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{adapter.url} was written by a newer pydedup (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade pydedup"
        )
    with only_sound_rows(adapter):  # who only reads can do without the others
        hashes = adapter.meta().get("hash_version")
    if hashes != str(HASH_VERSION):  # pages say by themselves of what format each is
        raise SchemaVersionError(
            f"{adapter.url} was written by another pydedup (hash_version {hashes}, this one knows "
            f"{HASH_VERSION}); use that one"
        )


def check_store(adapter: Adapter) -> Adapter:
    """Return an adapter whose tables are those of a store that this pydedup reads, as they are.

    Raises NotAStoreError, SchemaVersionError.
    """
    _check_schema(adapter, "r")
    return adapter


def pool_bytes(memory_bytes: int) -> int:
    """Return how much of the memory that a store may take is for pages."""
    # However little it is: a block that is a delta needs its page and that of its base at once,
    # and beside them attached modules keep what is small.
    least = min(memory_bytes, 2 * PAGE_BYTES + PAGE_BYTES // 4)
    return max(memory_bytes - min(_SCRATCH_BYTES, memory_bytes // 2), least)


def pool_of(
    adapter: Adapter, memory_bytes: int, replacement: Replacement = DEFAULT_POLICY
) -> PagePool:
    """Return the buffer pool of a store that may take so much memory."""
    scratch = memory_bytes - pool_bytes(memory_bytes)
    return PagePool(
        recorded_pages(adapter),
        memory_bytes - scratch,
        lambda page_ids: _said_of_lost(adapter, page_ids),
        policy=replacement,
        readers=adapter.capabilities.page_readers,
        scratch_bytes=scratch // 2,
        copies=page_copies(adapter),
        read_into=adapter.read_pages_into if isinstance(adapter, ReadIntoAdapter) else None,
    )


@contextlib.contextmanager
def open_end(
    url: str | os.PathLike[str], *, mode: OpenMode, memory: str | int, schema: str | None = None
) -> Iterator[End]:
    """Open a store that models are copied to or from."""
    from pydedup.moving.source import End

    url = registry.place_of(url)
    budget = config.parse_memory(memory)
    adapter = connect_store(url, mode=mode, schema=schema)
    try:
        yield End(adapter, pool_of(adapter, budget))
    finally:
        adapter.close()


@contextlib.contextmanager
def open_rows(adapter: Adapter, source: str | os.PathLike[str] | None) -> Iterator[RowAdapter]:
    """Give the database of users' tables: the one of a store, or another.

    Raises NotFoundError where the other one is not there; ReadOnlyError, ArgumentError where the
    store's own cannot be used.
    """
    if source is not None:
        try:
            rows = registry.connect_rows(registry.absolute(source))
        except MissingStoreError as error:
            raise NotFoundError(f"{error.what} that is to be read and written") from error
        try:
            yield rows
        finally:
            rows.close()
        return
    if adapter.read_only:
        raise ReadOnlyError(
            f"{adapter.url} is open for reading only, and predictions would go there; name the "
            "database to write to with source (--source), which may be the same"
        )
    if not isinstance(adapter, RowAdapter):
        raise ArgumentError(f"tables of users in {adapter.url} cannot be read")
    yield adapter


def check_writable(adapter: Adapter, what: str) -> None:
    """Raise ReadOnlyError when a store is open for reading only."""
    if adapter.read_only:
        raise ReadOnlyError(
            f"cannot {what}: {adapter.url} is open for reading only: it was opened with mode 'r', "
            "this user may not write there, or its place cannot be written to"
        )


def _said_of_lost(adapter: Adapter, page_ids: Sequence[int]) -> tuple[str, str]:
    """Say for an error who reads pages that are damaged or gone, and what to do."""
    them = "it" if len(page_ids) == 1 else "them"
    advice = (
        f"; verify --repair-from restores {them} in {adapter.url} from another store, a backup or "
        "a model's file"
    )
    try:
        ids = {model_id for model_id, _ in adapter.readers_of(page_ids)}
        readers = sorted(row.address for row in adapter.models() if row.id in ids) if ids else []
    except PydedupError:
        return "", advice
    return (f"; read by {listed(readers)}" if readers else ""), advice
