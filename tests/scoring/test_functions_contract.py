# SPDX-License-Identifier: Apache-2.0
"""The contracts of functions in a server: with PL/Python, without it, and of a played one.

PL/Python for the Python that runs this is not everywhere, so that the suite itself is tried on a
server that is played: a SQLite file whose connections have the functions once they were made in it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pydedup
import pydedup.sql
from pydedup.adapter_options import FunctionsAdapter
from pydedup.errors import ArgumentError, StoreError
from pydedup.testing._contract_base import with_option
from pydedup.testing.functions_contract import FunctionsAdapterContract, RefusedFunctionsContract
from pydedup.testing.servers import PlpythonServer, unused_name


def run_in(url: str, schema: str, statement: str) -> list[tuple[Any, ...]]:
    options = f"-c search_path={schema},public"
    with psycopg.connect(url, autocommit=True, options=options) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


class TestFunctionsInPlpython(FunctionsAdapterContract):
    @pytest.fixture(autouse=True)
    def _server(self, plpython: PlpythonServer) -> Iterator[None]:
        self.server, self.schema = plpython, unused_name()
        self.python_path = str(plpython.python_path)
        yield
        run_in(plpython.url, "public", f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")

    def make_url(self, folder: Path) -> str:
        return with_option(self.server.url, f"schema={self.schema}")

    def run(self, url: str, statement: str) -> list[tuple[Any, ...]]:
        return run_in(self.server.url, self.schema, statement)


class TestFunctionsWithoutPlpython(RefusedFunctionsContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres_url: str, postgres_schema: str) -> None:
        known = "SELECT 1 FROM pg_available_extensions WHERE name = 'plpython3u'"
        if run_in(postgres_url, "public", known):
            pytest.skip("this server has PL/Python")
        self.server, self.schema = postgres_url, postgres_schema

    def make_url(self, folder: Path) -> str:
        return with_option(self.server, f"schema={self.schema}")

    def run(self, url: str, statement: str) -> list[tuple[Any, ...]]:
        return run_in(self.server, self.schema, statement)


class Played:
    """A server whose functions are known to connections as long as a table of it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'made'").fetchall():
                ((found,),) = connection.execute("SELECT path FROM made").fetchall()
                if found is not None:
                    raise sqlite3.OperationalError(f"pydedup_predict: nothing in {found}")
                pydedup.sql.register(connection)
                connection.create_function("pydedup_version", 0, lambda: pydedup.__version__)
            return connection.execute(statement).fetchall()

    def function_statements(self, python_path: str | None) -> list[str]:
        if python_path is not None and (python_path[:1] != "/" or not python_path.isprintable()):
            raise ArgumentError(f"{python_path!r} is no absolute path")
        path = "NULL" if python_path is None else "'{}'".format(python_path.replace("'", "''"))
        return [f"CREATE TABLE IF NOT EXISTS made AS SELECT {path} AS path"]

    def install_functions(self, python_path: str | None) -> str:
        statements = self.function_statements(python_path)
        if python_path is not None:
            raise StoreError(f"nothing in {python_path}")
        for statement in statements:
            self.run(statement)
        return pydedup.__version__

    def drop_functions(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("DROP TABLE IF EXISTS made")


class TestFunctionsOfAPlayedServer(FunctionsAdapterContract):
    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = Played(tmp_path / "database" / "s.db")
        assert isinstance(self.server, FunctionsAdapter)
        monkeypatch.setattr(
            "pydedup.testing.functions_contract.registry.opened",
            lambda url, mode: contextlib.nullcontext(self.server),
        )

    def make_url(self, folder: Path) -> str:
        return f"sqlite:///{self.server.path}"

    def run(self, url: str, statement: str) -> list[tuple[Any, ...]]:
        return self.server.run(statement)
