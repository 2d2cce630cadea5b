# SPDX-License-Identifier: Apache-2.0
"""The statements in the forms that other databases need, run on SQLite, which takes them too."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup.adapter import LIVE, RETIRED, STAGING
from pydedup.adapters import _sqlite_base, sqlite
from pydedup.adapters._schema import TABLES, VIEWS, create_statements, literal
from pydedup.adapters._sql import Statements, batches
from pydedup.testing._contract_pages import PagesContract
from pydedup.testing._contract_rows import RowsContract

#: As MySQL will have it: no partial index, no pad, backticks; and new ids told by the statement.
OTHER = replace(
    _sqlite_base.DIALECT,
    prefix="",
    quote="`",
    partial_indexes=False,
    page_pad=False,
    returning_id=True,
)


class TestOtherDialect(PagesContract, RowsContract):
    @pytest.fixture(autouse=True)
    def _dialect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite, "DIALECT", OTHER)
        monkeypatch.delattr(sqlite.SqliteAdapter, "_read_payloads")  # by statements, as others

    def make_url(self, folder: Path) -> str:
        return f"sqlite:///{folder}/store.db"

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return f"{url}?timeout={seconds}"

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1"  # noqa: S608
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return connection.execute(query).fetchall()


@given(st.lists(st.integers(), max_size=300), st.integers(min_value=1, max_value=100))
def test_batches_hold_every_value_within_the_limit(values: list[int], limit: int) -> None:
    pieces = [list(piece) for piece in batches(values, limit)]
    assert all(1 <= len(piece) <= limit for piece in pieces)
    assert all(len(piece) & (len(piece) - 1) == 0 for piece in pieces)
    kept: list[int] = []
    for piece in pieces:
        rest = values[len(kept) :]
        kept += piece[: len(rest)]
        assert all(padding == piece[-1] for padding in piece[len(rest) :])
    assert kept == values


def test_a_schema_qualifies_every_table() -> None:
    dialect = replace(_sqlite_base.DIALECT, prefix="", qualifier='"mine".', placeholder="%s")
    statements = Statements(dialect)
    texts = [value for value in vars(statements).values() if isinstance(value, str)]
    texts += create_statements(dialect) + [statements.view(view) for view in VIEWS]
    texts += [
        *statements.delete_model,
        statements.find_blocks(4),
        statements.delete_members("pages", "id", 2),
    ]
    for text in texts:
        assert "?" not in text
        words = text.replace("(", " ").replace(")", " ").split()
        for before, word in itertools.pairwise(words):
            if before in ("FROM", "JOIN", "INTO", "TABLE", "VIEW") and word != "SELECT":
                is_named_there = word == "found" and text.startswith("WITH found AS")
                assert is_named_there or word.startswith('"mine".'), text


def test_states_and_pads_have_one_length_together() -> None:
    # What SQLite stores of them: text, 8 bytes of a time that is not whole, and the pad.
    lengths = set()
    for state in (STAGING, LIVE, RETIRED):
        for retired_at in (None, 1.5):
            (pad,) = _sqlite_base.DIALECT.pad(state, retired_at)
            lengths.add(len(state) + (0 if retired_at is None else 8) + len(pad))
    assert len(lengths) == 1


def test_only_our_own_names_become_sql() -> None:
    with pytest.raises(KeyError):
        _sqlite_base.DIALECT.name("meta; DROP TABLE x")
    with pytest.raises(ValueError, match="or 1"):
        literal("live' or 1 --")
    with pytest.raises(KeyError):
        Statements(_sqlite_base.DIALECT).update_model(["name = 'x' --"])
    assert set(TABLES).isdisjoint(VIEWS)
