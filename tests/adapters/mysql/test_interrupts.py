# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at moments at which the driver has a result that nobody has read."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import pytest
from mysql.connector import HAVE_CEXT

import pydedup
from pydedup.adapters import _mysql_waiting
from pydedup.testing._contract_base import open_store, with_option


def test_an_interrupt_while_a_connection_is_made(
    mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an ArgumentError, "Unread result found", and whoever pressed Ctrl-C went on."""
    if HAVE_CEXT:
        from mysql.connector.cursor_cext import CMySQLCursor as Cursor
    else:
        from mysql.connector.cursor import MySQLCursor as Cursor  # type: ignore[assignment]

    def interrupted(cursor: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Cursor, "fetchone", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pydedup.open(mysql_database)
    with pydedup.open(mysql_database) as store:
        assert store.models() == []


def test_where_there_is_no_thread_to_connect_it_is_done_without(
    mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.12 ends, or in a crowded process: it was a RuntimeError of Python's."""

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_mysql_waiting, "start_new_thread", refused)
    with pydedup.open(mysql_database) as store:
        assert store.models() == []


def test_a_connection_that_comes_after_an_interrupt_is_closed() -> None:
    go_on, closed = threading.Event(), threading.Event()

    class Late:
        def close(self) -> None:
            closed.set()

    def connect() -> Late:
        _thread.interrupt_main()
        assert go_on.wait(60)
        return Late()

    with pytest.raises(KeyboardInterrupt):
        _mysql_waiting.interruptible(connect)
    go_on.set()
    assert closed.wait(60)


def test_an_interrupt_before_the_server_has_answered(
    mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked next on that connection would get this answer, and its end another's."""
    adapter = open_store(with_option(mysql_database, "use_pure=true"))
    with adapter._pool.acquire() as session:  # type: ignore[attr-defined]
        network = session.connection.raw._socket

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    def write() -> None:
        with adapter.transaction():
            adapter.set_meta("kept", "no")
            with monkeypatch.context() as patched:
                patched.setattr(network, "recv", interrupted)
                adapter.set_meta("kept", "neither")

    before = adapter.meta()
    with pytest.raises(KeyboardInterrupt):
        write()
    assert adapter.meta() == before
    with adapter.transaction():  # which no lock of the other keeps out
        adapter.set_meta("kept", "yes")
    assert adapter.meta() == {**before, "kept": "yes"}
    adapter.close()
