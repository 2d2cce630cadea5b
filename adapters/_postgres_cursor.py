# SPDX-License-Identifier: Apache-2.0
"""How results of psycopg are had, and what its log leaves out."""

from __future__ import annotations

import json
import logging
from typing import Any

import psycopg
from psycopg import pq

__all__ = ["BinaryCursor", "json_or_text"]


class BinaryCursor(psycopg.Cursor[Any]):
    """A cursor whose results come in binary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format = pq.Format.BINARY


def json_or_text(document: str | bytes) -> Any:
    """Return what JSON says, or itself where that is too deep, or a number of it too long."""
    try:
        return json.loads(document)
    except (ValueError, RecursionError):
        return document if isinstance(document, str) else str(document, "utf-8")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of psycopg is about anything but a COPY of ours, or many rows sent together.

    Of one that has failed, and could not be ended either, the error is raised: who sees it on a
    terminal needs no line above it.
    """
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    if isinstance(about, psycopg.Pipeline):
        connection = getattr(about, "_conn", None)
        return getattr(connection, "cursor_factory", None) is not BinaryCursor
    return not (isinstance(about, psycopg.Copy) and isinstance(about.cursor, BinaryCursor))


logging.getLogger("psycopg").addFilter(_is_news)
