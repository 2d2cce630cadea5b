# SPDX-License-Identifier: Apache-2.0
"""A SQLite file of a user's that need be no store: rows to predict, and predictions beside them."""

from __future__ import annotations

from pydedup.adapter import Adapter

from ._sqlite_file import locate
from .sqlite import SqliteAdapter

__all__ = ["connect"]


class _UserFile(SqliteAdapter):
    _elsewhere = ""

    def _make_ours(self, connection: object) -> None:
        """Leave the file as it is."""


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open a file that exists, ``sqlite:///path``, without changing anything about it."""
    file, timeout = locate(url, schema)
    file.size(create=False)
    writes = mode == "a" and file.is_writable()
    return _UserFile(url, file, "mode=rw" if writes else "mode=ro", timeout)
