# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""Tables of users beside a store, made and read by the drivers and not by our adapters."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing.mysql_servers import mysql_connection
from pydedup.testing.servers import unused_name

FEATURES = 3


class Tables:
    """The database of a store, seen by its driver: statements are those of a user."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.kind = url.partition(":")[0]

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        if self.kind == "sqlite":
            path = self.url.removeprefix("sqlite:///")
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                yield connection.cursor()
        elif self.kind == "mysql":
            with mysql_connection(self.url) as connection, connection.cursor() as cursor:
                yield cursor
        else:
            plain = urlsplit(self.url)
            query = "&".join(p for p in plain.query.split("&") if not p.startswith("schema="))
            with (
                psycopg.connect(
                    plain._replace(query=query).geturl(), autocommit=True
                ) as connection,
                connection.cursor() as cursor,
            ):
                yield cursor

    def run(self, statement: str, rows: Sequence[Sequence[object]] | None = None) -> list[Any]:
        """Run a statement, for each of some rows (``?`` marks values), and return what it finds."""
        if self.kind != "sqlite":
            statement = statement.replace("?", "%s")
        with self._cursor() as cursor:
            if rows is not None:
                cursor.executemany(statement, rows)
                return []
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []


@pytest.fixture
def tables(store_url: str) -> Tables:
    """The database of an empty place for a store."""
    return Tables(store_url)


@pytest.fixture
def new_name(tables: Tables) -> Iterator[Callable[[], str]]:
    """Names of tables that go away after the test, where databases outlive it."""
    made: list[str] = []

    def name() -> str:
        made.append(unused_name().replace("pydedup", "t"))
        return made[-1]

    yield name
    if tables.kind != "sqlite":
        for one in made:
            tables.run(f"DROP TABLE IF EXISTS {one}")


def weights(seed: int, outputs: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, FEATURES)).astype(np.float32)


def linear(outputs: int = 1, seed: int = 0) -> tuple[dict[str, np.ndarray], Graph]:
    """A model that is one product, and its graph."""
    node = Node("linear", ("x",), "y", {"weight": "w"})
    return {"w": weights(seed, outputs)}, Graph(("x",), ("y",), (node,))


def add(url: str, name: str, outputs: int = 1, seed: int = 0) -> np.ndarray:
    """Add a linear model to a store and return its weights."""
    model, graph = linear(outputs, seed)
    with pydedup.open(url) as store:
        store.add(name, model, graph=graph)
    return model["w"]


def features(count: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, FEATURES)).astype(np.float32)


@pytest.fixture
def source(tables: Tables, new_name: Callable[[], str]) -> Callable[..., str]:
    """Make a table of features and return its name: ids from 1 on, in no order."""

    def make(x: np.ndarray, **changes: object) -> str:
        name = new_name()
        columns = ", ".join(f"f{i} DOUBLE PRECISION" for i in range(x.shape[1]))
        tables.run(f"CREATE TABLE {name} (id BIGINT PRIMARY KEY, {columns})")
        rows = [[i + 1, *map(float, row)] for i, row in enumerate(x)]
        order = np.random.default_rng(1).permutation(len(rows))
        marks = ", ".join("?" * (1 + x.shape[1]))
        tables.run(f"INSERT INTO {name} VALUES ({marks})", [rows[i] for i in order])
        return name

    return make


def query_of(table: str, more: str = "") -> str:
    return f"SELECT id, f0, f1, f2 FROM {table} {more}"


def predictions(tables: Tables, table: str) -> dict[Any, float]:
    rows = tables.run(f"SELECT id, prediction FROM {table}")
    found = dict(rows)
    assert len(found) == len(rows)
    return found


def assert_right(found: dict[Any, float], x: np.ndarray, w: np.ndarray) -> None:
    assert sorted(found) == list(range(1, len(x) + 1))
    wanted = (x @ w.T)[:, 0]
    np.testing.assert_allclose([found[i + 1] for i in range(len(x))], wanted, rtol=1e-5, atol=1e-6)
