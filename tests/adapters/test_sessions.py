# SPDX-License-Identifier: Apache-2.0
"""When the connections of threads are closed."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import pytest

from pydedup.adapters._sessions import SessionPool


@pytest.mark.parametrize("in_use", [True, False])
def test_a_connection_in_use_outlives_what_is_local_to_its_thread(in_use: bool) -> None:
    """As when the interpreter ends under a daemon thread: MySQL's driver crashed."""
    opened: list[sqlite3.Connection] = []

    def connect() -> sqlite3.Connection:
        opened.append(sqlite3.connect(":memory:", check_same_thread=False))
        return opened[-1]

    pool = SessionPool(connect, name="here")
    ready, end = threading.Event(), threading.Event()

    def work() -> None:
        session = pool.acquire()
        with contextlib.ExitStack() as used:
            used.push(session)
            if not in_use:
                used.close()
            ready.set()
            assert end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    pool._local = threading.local()
    try:
        with contextlib.nullcontext() if in_use else pytest.raises(sqlite3.ProgrammingError):
            opened[0].execute("SELECT 1")
    finally:
        end.set()
        thread.join(60)
        opened[0].close()
