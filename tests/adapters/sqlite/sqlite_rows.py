# SPDX-License-Identifier: Apache-2.0
"""Databases with a table of payloads as ours is, and what the system has in memory of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.adapters._sqlite_places import PagePlaces


@contextlib.contextmanager
def rows_of(
    path: Path, payloads: dict[int, bytes], page_bytes: int, vacuum: str = "INCREMENTAL"
) -> Iterator[tuple[sqlite3.Connection, PagePlaces]]:
    """Make a database with a table like ours; yield a connection and who finds rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            f"PRAGMA page_size = {page_bytes}; PRAGMA auto_vacuum = {vacuum};"
            "CREATE TABLE before (x); CREATE TABLE pages (id INTEGER PRIMARY KEY, "
            "state TEXT, pad BLOB, payload BLOB)"
        )
        with connection:
            connection.executemany(
                "INSERT INTO pages VALUES (?, 'live', x'00', ?)", payloads.items()
            )
        yield connection, finding(connection, path)


def finding(connection: sqlite3.Connection, path: Path) -> PagePlaces:
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pages'")

    def checksums(ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        there = {row for (row,) in connection.execute("SELECT id FROM pages")}
        return ((row, str(row).encode()) for row in ids if row in there)

    return PagePlaces(str(path), lambda: root, checksums)


def read(places: PagePlaces, ids: Iterable[int]) -> dict[int, bytes]:
    def memory(nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    ids, found = list(ids), {}
    for _ in places.read(ids, memory):  # what was not met before is left to SQLite once
        pass
    for page, payload in places.read(ids, memory):
        assert page.id not in found
        assert page.checksum == str(page.id).encode()
        found[page.id] = bytes(payload)
    return found


def in_memory(path: Path) -> NDArray[np.bool_]:
    """Return which pages of a file the system has in memory; to ask brings none in."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = len(mapped)
        found = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (
            ctypes.c_void_p(start),
            ctypes.c_size_t(size),
            ctypes.c_void_p(found.ctypes.data),
        )
        assert libc.mincore(*arguments) == 0, os.strerror(ctypes.get_errno())
        return (found & 1).astype(bool)


def forget(path: Path) -> None:
    """Have the system drop the file from memory, or skip where it does not."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > 1 << 20 and in_memory(path)[(1 << 20) // mmap.PAGESIZE :].any():
        pytest.skip("the file system keeps the file in memory")
    try:
        handle = os.open(path, os.O_RDONLY)
        os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        pytest.skip("the file system does not say what is in memory")
    finally:
        os.close(handle)


@contextlib.contextmanager
def rows_out_of_memory(path: Path, payloads: dict[int, bytes]) -> Iterator[PagePlaces]:
    """Make such a database that the system has to read; yield who finds rows."""
    with rows_of(path, payloads, 65536):
        pass
    forget(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield finding(connection, path)
