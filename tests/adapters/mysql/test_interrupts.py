# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at moments at which the driver has a result that nobody has read."""

from __future__ import annotations

from typing import Any

import pytest
from mysql.connector import HAVE_CEXT

import pydedup


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
